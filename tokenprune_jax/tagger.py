"""A trained tagger in use: sentences in; a tag and its probability for each word, and the spans that tags mark, out."""

import collections
import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenprune_jax import compile_cache, data, decoding, models, pretrained, segments, serve, settings
from tokenprune_jax.data import files, sentences, tags, windows
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs
from tokenprune_jax.runner import Runner

OPTIONS = settings.DEFAULTS['data']['tagging']


class Tagged(NamedTuple):
  """A sentence with the tag that the model gives to each word."""

  words: tuple[str, ...]
  tags: tuple[str, ...]
  probabilities: tuple[float, ...]  # of these tags

  @property
  def spans(self) -> list[dict[str, Any]]:
    """What the tags mark: kind, first word, the word behind the last, and text; nothing where they mark no spans."""
    return [
      {'kind': kind, 'start': start, 'stop': stop, 'text': ' '.join(self.words[start:stop])}
      for kind, start, stop in tags.spans(self.tags)
    ]


class Tagger(Runner):
  """A tagger of words. A sentence longer than the model is read as its run has it, in overlapping windows or not at all.

  options: of the run's config.data.tagging. Sentences are read one by one, also where the run reads them as documents.
  """

  def __init__(
    self, exported: pretrained.Exported, executor: str = 'compact', options: Mapping[str, Any] | None = None
  ):
    super().__init__(exported, executor)
    self.options = {**OPTIONS, **(options or {}), 'documents': False}

  @functools.cached_property
  def encoder(self) -> windows.WordEncoder:
    """The tokenizer, with its length."""
    return windows.WordEncoder(self.tokenizer, self.max_length)

  def split(self, given: Sequence[Any], first: int = 1) -> data.Split:
    """Sentences as windows. Raises UserError as `predict` does, which numbers them from `first`."""
    units = [[sentence] for sentence in checked_sentences(given, first)]
    return windows.encode_sentences(units, self.encoder, self.labels, 'plain', self.options)

  def answer(self, split: data.Split, probabilities: Sequence[np.ndarray]) -> list[Tagged]:
    """The tags of a split's sentences; probabilities: [n c] of each example, or more rows, of padding, behind them."""
    assert split.tags is not None and split.words is not None
    labelled = [split.tags[split.place(i)] >= 0 for i in range(len(split))]
    odds = np.concatenate([p[: len(here)][here] for p, here in zip(probabilities, labelled)]).astype(
      np.float64
    )
    with np.errstate(divide='ignore'):  # a probability may be too small for its type
      found = decoding.best_tags(np.log(odds), split.words, self.constrained)
    best = split.words.tags(found)
    sure = split.words.cut(np.round(odds[np.arange(len(found)), found], 6).tolist())
    words = [sentence.words for sentence in split.words.sentences]
    return [Tagged(word, tuple(tag), tuple(p)) for word, tag, p in zip(words, best, sure)]

  def serve(self, **options: Any) -> 'TagServer':
    """A server of this model; options: those of `serve.Server`. Its programs are kept in JAX's compilation cache."""
    compile_cache.turn_on()
    return TagServer(self, serve.Server(self.model, self.params, **options))

  def predict(
    self, given: Sequence[Any], batch_size: int = 16, controls: Mapping[str, float] | None = None
  ) -> list[dict[str, Any]]:
    """One dict a sentence, in order: words, tags, probabilities of these tags and, where tags mark spans, spans.

    given: sentences as lists of words, or as strings, which are parted at white space. spans: [{kind, start, stop, text}].
    controls: settings of the method in place of those it was exported with. Raises UserError for an empty list, an empty
    sentence, something that is no sentence, or a control that the method has not.
    """
    marked = tags.scheme_of(self.labels) != 'plain'
    found = self.tagged(given, batch_size, controls)
    return [{**sentence._asdict(), **({'spans': sentence.spans} if marked else {})} for sentence in found]

  def tagged(
    self, given: Sequence[Any], batch_size: int = 16, controls: Mapping[str, float] | None = None
  ) -> list[Tagged]:
    """As `predict`."""
    split = self.split(given)
    found = {i: result['probabilities'] for i, result in self.results(split, batch_size, controls)}
    return self.answer(split, [found[i] for i in range(len(split))])

  def depths(self, given: Sequence[Any], batch_size: int = 16) -> list[tuple[int, ...]]:
    """Of each sentence, the layer at which each of its words was answered: the last one where no exit was sure of it.

    Raises UserError as `predict` does, and where words have no exits.
    """
    model, found = self.model, {}
    if not model.reducer.needs_words():
      raise UserError('the words of this model have no exits: all are answered behind the last layer.')
    split, encoder = self.split(given), models.encoder_of(model, 'mask')
    variables = {'params': segments.encoder_params(self.params)}

    @jax.jit
    def exits(batch):
      ids, mask, types, words = (batch[name] for name in ('ids', 'mask', 'types', 'words'))
      inputs = Inputs(ids, mask, types, {}, model.labels, model.config, words=words)
      return encoder.apply(variables, inputs)[1]['word_exit']

    for batch in self.batches(split, batch_size):
      layers = np.asarray(exits(jax.tree.map(jnp.asarray, batch)))
      for row in np.flatnonzero(batch['weight']):
        answered = batch['words'][row, batch['label'][row] >= 0]
        found[int(batch['index'][row])] = layers[row, answered]
    assert split.words is not None
    every = np.concatenate([found[i] for i in range(len(split))])
    every = np.where(every > 0, every, model.config.depth)
    return [tuple(layers) for layers in split.words.cut(every.tolist())]


class TagServer:
  """A `serve.Server` that takes sentences, each in as many windows as it needs, and answers with `Tagged`."""

  def __init__(self, tagger: Tagger, server: serve.Server):
    self.tagger, self.server = tagger, server

  def map(self, given: Iterable[Any], controls: Mapping[str, Any] | None = None) -> Iterator[Tagged]:
    """The answers in the order of the sentences, which are read as there is room. Raises UserError as `Tagger.predict`."""
    waiting: collections.deque[data.Split] = collections.deque()
    refused: list[UserError] = []

    def requests() -> Iterator[dict[str, np.ndarray]]:
      for number, sentence in enumerate(given, 1):
        try:
          split = self.tagger.split([sentence], number)
        except UserError as error:  # raised when its turn comes
          refused.append(error)
          return
        assert split.word_of is not None
        waiting.append(split)
        for i in range(len(split)):
          yield {'ids': split.ids(i), 'words': split.word_of[split.place(i)]}

    answers = self.server.map(requests(), controls)
    for answer in answers:
      split = waiting.popleft()
      rest = itertools.islice(answers, len(split) - 1)
      yield from self.tagger.answer(split, [one.probabilities for one in (answer, *rest)])
    if refused:
      raise refused[0]

  def precompile(self) -> int:
    """As `Server.precompile`."""
    return self.server.precompile()

  def close(self, cancel: bool = False) -> None:
    """As `Server.close`."""
    self.server.close(cancel)

  def __enter__(self) -> 'TagServer':
    return self

  def __exit__(self, kind, error, trace) -> None:
    self.close(cancel=error is not None)


def checked_sentences(given: Sequence[Any], first: int = 1) -> list[Sentence]:
  """Sentences of words without tags, numbered from `first`. Raises UserError as `Tagger.predict` says."""
  if isinstance(given, str):
    raise UserError('predict was given one string; expected a list of sentences. Write predict([sentence]).')
  found = []
  for number, words in enumerate(given, first):
    words = words.split() if isinstance(words, str) else words
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) for word in words):
      raise UserError(f'sentence number {number} is {words!r:.60}; expected a list of words, or a string.')
    problem = sentences.word_problem(words)
    if problem:
      raise UserError(f'sentence number {number}: {problem}')
    found.append(Sentence(tuple(words), (), 'sentence', number))
  if not found:
    raise UserError('there are no sentences to tag; expected one or more.')
  return found


def read_sentences(path: pathlib.Path, spec: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The sentences of a file; spec: a run's config.data. Raises UserError naming the line at fault."""
  found = []
  if path.suffix == '.txt':
    for row in files.plain_rows(path, 'config.predict'):
      words, problem = tuple(row.text.split()), row.problem
      found.append(Sentence(words, (), str(path), row.line, problem=problem or sentences.word_problem(words)))
  else:
    columns = sentences.columns_of(path, spec['text'], spec['label'])._replace(tag='')
    comment = {**OPTIONS, **spec['tagging']}['comment']
    found = list(sentences.read(path, columns, comment, 'config.predict'))
  for sentence in found:
    if sentence.problem:
      raise UserError(f'{sentence.where(sentence.at)}: {sentence.problem}. Correct the line or delete it.')
  if not found:
    raise UserError(f'{path} holds no sentences; expected one a line.')
  return [sentence.words for sentence in found]
