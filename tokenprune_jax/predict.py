"""A trained model in use: texts in; label, probabilities and the words it kept out.

Shapes: b batch, n slots, L layers (from 1; axis 0 of an example's `kept` [L n] is layer 1).
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenprune_jax import compile_cache, data, pretrained, serve, settings, tagger, workdir
from tokenprune_jax.data import files
from tokenprune_jax.errors import UserError
from tokenprune_jax.export import SETTINGS
from tokenprune_jax.runner import Runner

Text = str | tuple[str, str]  # a pair: two texts read together


class Word(NamedTuple):
  """One word of the text, with the share of heads that see it by layer, up to where tokens are combined."""

  text: str
  gap: str  # what stands between it and the word before
  shares: tuple[float, ...]
  slot: int  # its combination slot; -1: none

  @property
  def share(self) -> float:
    """Share of (heads x layers) in which the word is still a key."""
    return sum(self.shares) / len(self.shares)


class Reading(NamedTuple):
  """What the model made of one text."""

  text: Text
  label: str
  probabilities: dict[str, float]
  words: tuple[Word, ...]
  tokens: int  # read by the model, the special ones included
  truncated: int  # tokens cut off

  @property
  def probability(self) -> float:
    """Of the label it says."""
    return self.probabilities[self.label]

  @property
  def share_by_layer(self) -> list[float]:
    """Mean share over words of the heads that see them, a number a layer."""
    return np.mean([word.shares for word in self.words], axis=0).tolist() if self.words else []

  def record(self) -> dict[str, Any]:
    """JSON-ready: text, label, probabilities, kept; and truncated, where something was cut off."""
    kept = [
      {'word': word.text, 'share': round(word.shares[-1], 4)} for word in self.words if word.shares[-1] > 0
    ]
    found = {'text': self.text, 'label': self.label, 'probabilities': self.probabilities, 'kept': kept}
    return {**found, 'truncated': self.truncated} if self.truncated else found


def load(folder: str | os.PathLike, executor: str = 'compact') -> 'Predictor | tagger.Tagger':
  """The model of a run's workdir, or of an exported folder. Raises UserError where neither is there."""
  folder = pathlib.Path(folder)
  for place in (folder / 'model', folder):
    if (place / SETTINGS).is_file():
      exported = pretrained.load_exported(place)
      if exported.readout != 'tokens':
        return Predictor(exported, executor)
      run = (workdir.read_json(folder / 'config.json') or {}).get('data', {})
      return tagger.Tagger(exported, executor, run.get('tagging', {}))
  raise UserError(
    f'{folder} holds no trained model: there is no {SETTINGS} in it or in its folder model/. '
    'Name the --workdir of a finished run, or a folder that such a run exported.'
  )


class Predictor(Runner):
  """A classifier of texts."""

  @functools.cached_property
  def encode(self) -> data.Encoder:
    """The tokenizer, with its length."""
    return data.Encoder(self.tokenizer, self.max_length)

  def predict(
    self, texts: Sequence[Any], batch_size: int = 16, controls: Mapping[str, float] | None = None
  ) -> list[dict[str, Any]]:
    """One dict a text, in order: text, label, probabilities {label: p}, kept [{word, share}] and truncated.

    texts: strings, or pairs of strings. kept: the words that some head still sees at the last layer that has
    words, with the share of heads that do. truncated: how many tokens of a text too long for the model were
    cut off. controls: settings of the method in place of those it was exported with, such as {'exit_threshold': 0.3}.
    Raises UserError for an empty list, an empty text, something that is no text, strings and pairs together, or a
    control that the method has not.
    """
    return [reading.record() for reading in self.readings(texts, batch_size, controls)]

  def serve(self, **options: Any) -> serve.Server:
    """A server of this model, for texts and pairs: `serve.Server`, whose other options may be given.

    Its programs are kept in JAX's persistent compilation cache.
    """
    compile_cache.turn_on()
    return serve.Server(self.model, self.params, encode=self.encode, labels=self.labels, **options)

  def read(self, text: Text) -> Reading:
    """Everything about one text, for pictures."""
    return self.readings([text], 1)[0]

  def readings(
    self, texts: Sequence[Any], batch_size: int, controls: Mapping[str, float] | None = None
  ) -> list[Reading]:
    """A reading of each text, in order; texts of like length share a batch."""
    texts = checked(texts)
    split = data.encode([first(text) for text in texts], self.tokenizer, self.max_length, seconds(texts))
    found = {i: self.reading(texts[i], result) for i, result in self.results(split, batch_size, controls)}
    return [found[i] for i in range(len(texts))]

  def reading(self, text: Text, result: dict[str, np.ndarray]) -> Reading:
    """One example's arrays in words."""
    [(encoding, cut)] = self.encode([first(text)], seconds([text]))
    probabilities = {label: round(float(p), 6) for label, p in zip(self.labels, result['probabilities'])}
    label = self.labels[int(np.argmax(result['probabilities']))]
    layers = np.array(self.model.reducer.blocks(self.model.config.depth)) - 1
    kept = result['kept'][layers, : len(encoding)]
    kept = kept[kept.any(-1)]  # once tokens are combined there are no words left to keep
    words = merge(parts_of(text), encoding, kept, result['assignment'])
    return Reading(text, label, probabilities, tuple(words), len(encoding), cut)


def checked(texts: Sequence[Any]) -> list[Text]:
  """The texts as a list of strings or of pairs (tuples). Raises UserError as `Predictor.predict` says."""
  if isinstance(texts, str):
    raise UserError('predict was given one string; expected a list of texts. Write predict([text]).')
  texts = [tuple(text) if isinstance(text, list) else text for text in texts]
  if not texts:
    raise UserError('predict was given no texts; expected at least one.')
  for place, text in enumerate(texts):
    parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
    if not all(isinstance(part, str) for part in parts):
      raise UserError(f'text number {place + 1} is {text!r:.60}; expected a string, or a pair of strings.')
    if not all(part.strip() for part in parts):
      raise UserError(f'text number {place + 1} is empty; expected some words. Leave it out.')
    if isinstance(text, tuple) != isinstance(texts[0], tuple):
      raise UserError(
        f'text number {place + 1} and text number 1 are of two kinds; expected all strings or all pairs.'
      )
  return texts


def parts_of(text: Text) -> tuple[str, ...]:
  """A text as a tuple of one, a pair as it is."""
  return (text,) if isinstance(text, str) else text


def first(text: Text) -> str:
  """The text, of a pair the first."""
  return text if isinstance(text, str) else text[0]


def seconds(texts: Sequence[Text]) -> list[str] | None:
  """The second texts of pairs; None where texts are no pairs."""
  return None if isinstance(texts[0], str) else [text[1] for text in texts]


def merge(parts: Sequence[str], encoding: Any, kept: np.ndarray, assignment: np.ndarray) -> Iterator[Word]:
  """Word pieces as words: the mean of their shares in kept [layers n], and the slot of the first."""
  pieces: dict[tuple[int, int], list[int]] = {}
  for token, (part, word) in enumerate(zip(encoding.sequence_ids, encoding.word_ids)):
    if word is not None:  # not a special token
      # Where two encodings were joined, the tokenizer marks the second text only.
      pieces.setdefault((part or 0, word), []).append(token)
  last_part, end = 0, 0
  for (part, _), tokens in pieces.items():
    start, stop = encoding.offsets[tokens[0]][0], encoding.offsets[tokens[-1]][1]
    gap = parts[part][end:start] if part == last_part else '\n'
    last_part, end = part, stop
    by_layer = tuple(kept[:, tokens].mean(-1, dtype=np.float64).tolist())
    yield Word(parts[part][start:stop], gap, by_layer, int(assignment[tokens[0]]))


def predict_file(folder: str | os.PathLike, file: str | os.PathLike, out: str | os.PathLike) -> int:
  """Labels every text of `file` into `out`, a JSON object a line, whole or not at all. Returns their number.

  file: .txt with a text a line; or .csv, .tsv or .jsonl with the columns that the run was trained on, `text`
  where the folder is no run. For a tagger .txt with a sentence a line, .jsonl, or any other name with a word a line.
  Raises UserError, naming file and line, for what cannot be read, before any text is labelled.
  """
  config = workdir.read_json(pathlib.Path(folder) / 'config.json') or {}
  model = load(folder)
  task = 'tag' if isinstance(model, tagger.Tagger) else 'classify'
  records = model.predict(
    READERS[task](pathlib.Path(file), {**settings.DEFAULTS['data'], **config.get('data', {})})
  )
  lines = (json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  workdir.write_text(pathlib.Path(out), ''.join(lines))
  return len(records)


def read_file(path: pathlib.Path, spec: Mapping[str, Any]) -> list[Text]:
  """The texts of a file with the columns of `spec`, a run's config.data."""
  return read_texts(path, files.Columns(spec['text'], spec['text_pair']))


READERS: dict[str, Callable[..., list[Any]]] = {'classify': read_file, 'tag': tagger.read_sentences}


def read_texts(path: pathlib.Path, columns: files.Columns) -> list[Text]:
  """All texts, or pairs, of a file. Raises UserError naming the line at fault."""
  texts: list[Text] = []
  plain, key = path.suffix == '.txt', 'config.predict'
  for row in files.plain_rows(path, key) if plain else files.read(path, columns, key):
    text = (row.text, row.text_pair) if columns.text_pair and not plain else row.text
    problem = row.problem or ('' if all(map(str.strip, parts_of(text))) else 'the text is empty')
    if problem:
      raise UserError(f'{path}:{row.line}: {problem}. Correct the line or delete it.')
    texts.append(text)
  if not texts:
    raise UserError(f'{path} holds no texts; expected one a line.')
  return texts
