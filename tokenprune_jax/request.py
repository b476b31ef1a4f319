"""What a server is asked for, and what it answers."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenprune_jax.data.tokenise import text_problem
from tokenprune_jax.errors import UserError


class Answer(NamedTuple):
  """label: its name, or number; logits [c]; layers: blocks that ran; macs, dense_macs: multiply-adds, also of the plain
  encoder. A tagger answers with a list of labels, and logits [n c], of the request's n tokens."""

  label: str | int | list[Any]
  logits: np.ndarray
  layers: int
  macs: float
  dense_macs: float
  truncated: int = 0  # tokens cut off a text that is too long

  @property
  def probabilities(self) -> np.ndarray:
    """[c], of all classes, or [n c]."""
    odds = np.exp(self.logits - self.logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


@dataclasses.dataclass(eq=False)
class Request:
  """One example on its way."""

  ids: np.ndarray
  types: np.ndarray
  words: np.ndarray | None  # where the method decides by them
  controls: Mapping[str, float]
  truncated: int
  future: concurrent.futures.Future
  since: int = 0  # batches that the server had started when it came
  macs: float = 0.0
  layers: int = 0

  def fail(self, error: Exception) -> None:
    """Hands the error to whoever waits."""
    if not self.future.done():
      self.future.set_exception(error)


class Reader(NamedTuple):
  """Makes requests of what callers give.

  longest: tokens that fit; vocabulary: number of token ids; controls: those that a request may set, with their defaults;
  encode: as in `serve.Server`. words: whether requests have to say which word each token is a piece of. refuse: raises
  UserError for controls (as sorted pairs) that the method cannot have.
  """

  longest: int
  vocabulary: int
  controls: Mapping[str, float]
  encode: Callable[..., Sequence[Any]] | None
  words: bool = False
  refuse: Callable[[tuple[tuple[str, float], ...]], None] = lambda _: None

  def read(self, given: Any, controls: Mapping[str, Any]) -> Request:
    """A request of token ids, {'ids', 'words'}, a text or a pair of texts. Raises UserError for anything else."""
    unknown = sorted(set(controls) - set(self.controls))
    if unknown:
      known = ', '.join(self.controls) or 'none'
      raise UserError(f'unknown control {unknown[0]!r}; the server was made with: {known}.')
    own = checked_controls(controls)
    self.refuse(tuple(sorted(own.items())))
    values = {**self.controls, **own}
    words = None
    if isinstance(given, Mapping):
      given, words = self.with_words(given)
    elif self.words:
      raise UserError(
        "this model decides by words: a request is {'ids': token ids, 'words': the number of the word that each is a piece "
        'of, -1 for none}. The server of a loaded tagger makes it of a sentence.'
      )
    texts = (given,) if isinstance(given, str) else given
    if isinstance(texts, (tuple, list)) and any(isinstance(part, str) for part in texts):
      ids, types, cut = self.encoded(texts)
    else:
      ids = self.checked(given)
      types, cut = np.zeros_like(ids), 0
    return Request(ids, types, words if self.words else None, values, cut, concurrent.futures.Future())

  def with_words(self, given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, words) of a request that has both. Raises UserError where words do not fit."""
    if set(given) != {'ids', 'words'}:
      raise UserError(f"the request has the keys {sorted(map(str, given))}; expected 'ids' and 'words'.")
    ids, words = self.checked(given['ids']), as_array(given['words'])
    if words.shape != ids.shape or not np.issubdtype(words.dtype, np.integer):
      raise UserError(
        f'the request has {len(ids)} token ids; words is {given["words"]!r:.60}, expected as many numbers.'
      )
    steps = np.diff(words[words >= 0], prepend=-1)
    if words.min() < -1 or (steps < 0).any() or (steps > 1).any():
      raise UserError('words are to be numbered from 0 in their order, and tokens of none to have -1.')
    return ids, words.astype(np.int32)

  def encoded(self, texts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, types, tokens cut off) of a text or a pair."""
    if len(texts) > 2 or not all(isinstance(part, str) for part in texts):
      raise UserError(f'the request is {texts!r:.60}; expected one text, a pair of texts, or token ids.')
    for problem in map(text_problem, texts):
      if problem:
        raise UserError(f'the request holds a text that cannot be read: {problem}.')
    if not all(part.strip() for part in texts):
      raise UserError('the request holds an empty text; expected some words.')
    if self.encode is None:
      raise UserError(
        'the request is a text, and the server was made without a tokenizer; give it token ids.'
      )
    [(encoding, cut)] = self.encode([texts[0]], [texts[1]] if len(texts) == 2 else None)
    types = np.array(encoding.type_ids, np.int32) * getattr(self.encode, 'has_types', True)
    return self.checked(encoding.ids), types, cut

  def checked(self, given: Any) -> np.ndarray:
    """Token ids as an array. Raises UserError."""
    ids = as_array(given)
    if ids.size == 0:
      raise UserError('the request is empty; expected at least one token.')
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise UserError(f'the request is {given!r:.60}; expected one text, a pair of texts, or token ids.')
    if len(ids) > self.longest:
      raise UserError(f'the request has {len(ids)} tokens; this server takes at most {self.longest}.')
    if ids.min() < 0 or ids.max() >= self.vocabulary:
      wrong = ids.min() if ids.min() < 0 else ids.max()
      raise UserError(
        f'the request holds token id {wrong}; the model has the ids 0 to {self.vocabulary - 1}.'
      )
    return ids.astype(np.int32)


def checked_controls(controls: Mapping[str, Any]) -> dict[str, float]:
  """The controls as numbers. Raises UserError for what is none, or is not finite."""
  try:
    found = {name: float(value) for name, value in controls.items()}
  except (TypeError, ValueError):
    found = {'': np.nan}
  if not all(map(np.isfinite, found.values())):
    raise UserError(f'controls are {dict(controls)}; expected finite numbers.')
  return found


def as_array(given: Any) -> np.ndarray:
  """As NumPy reads it; something of two axes where rows differ in length."""
  try:
    return np.asarray(given)
  except ValueError:
    return np.zeros((1, 1))
