"""A trained model in use: texts in; label, probabilities and the words it kept out.

Shapes: b batch, n slots, L layers (from 1; axis 0 of an example's `kept` [L n] is layer 1).
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import compile_cache, data, evaluate, models, pretrained, serve, settings, workdir
from tokenprune_jax.data import files, sentences, windows
from tokenprune_jax.data import tags as spans
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.data.tokenise import text_problem
from tokenprune_jax.errors import UserError
from tokenprune_jax.export import SETTINGS

Text = str | tuple[str, str]  # a pair: two texts read together
SHORTEST = 32  # slots of the smallest batch shape; the others double it


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


def load(folder: str | os.PathLike, executor: str = 'compact') -> 'Predictor | Tagger':
  """The model of a run's workdir, or of an exported folder. Raises UserError where neither is there."""
  folder = pathlib.Path(folder)
  for place in (folder / 'model', folder):
    if (place / SETTINGS).is_file():
      exported = pretrained.load_exported(place)
      return (Tagger if exported.readout == 'tokens' else Predictor)(exported, executor)
  raise UserError(
    f'{folder} holds no trained model: there is no {SETTINGS} in it or in its folder model/. '
    'Name the --workdir of a finished run, or a folder that such a run exported.'
  )


class Runner:
  """A model with its tokenizer; one compiled program for each batch shape, kept for later calls."""

  def __init__(self, exported: pretrained.Exported, executor: str = 'compact'):
    self.labels, self.max_length, self.tokenizer = exported.labels, exported.max_length, exported.tokenizer
    doubled = (SHORTEST << i for i in range(exported.max_length.bit_length()))
    self.buckets = (*(slots for slots in doubled if slots < exported.max_length), exported.max_length)
    self.model = models.Classifier(
      exported.config, models.make_reducer(exported.reducer_spec), len(exported.labels), exported.readout,
      exported.head, executor,
    ).check()  # fmt: skip
    self.params = jax.device_put(exported.params)
    self.forward = jax.jit(functools.partial(forward, self.model))
    self.masked = jax.jit(functools.partial(forward, self.model.clone(executor='mask')))

  def results(self, split: data.Split, batch_size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(example, what `forward` says of it), examples of like length together."""
    plan = data.batches(
      split, batch_size=batch_size, buckets=self.buckets, seed=0, epoch_shuffle=False,
      pad_id=self.model.config.pad_id,
    )  # fmt: skip
    for batch in plan.iterator():
      result = jax.device_get(self.forward(self.params, batch))
      if result['overflow'].any():  # a capacity was too small
        result = evaluate.replaced(result, jax.device_get(self.masked(self.params, batch)))
      for row in np.flatnonzero(batch['weight']):
        yield int(batch['index'][row]), {name: values[row] for name, values in result.items()}


class Predictor(Runner):
  """A classifier of texts."""

  @functools.cached_property
  def encode(self) -> data.Encoder:
    """The tokenizer, with its length."""
    return data.Encoder(self.tokenizer, self.max_length)

  def predict(self, texts: Sequence[Any], batch_size: int = 16) -> list[dict[str, Any]]:
    """One dict a text, in order: text, label, probabilities {label: p}, kept [{word, share}] and truncated.

    texts: strings, or pairs of strings. kept: the words that some head still sees at the last layer that has
    words, with the share of heads that do. truncated: how many tokens of a text too long for the model were
    cut off. Raises UserError for an empty list, an empty text, something that is no text, or strings and
    pairs together.
    """
    return [reading.record() for reading in self.readings(texts, batch_size)]

  def serve(self, **options: Any) -> serve.Server:
    """A server of this model, for texts and pairs: `serve.Server`, whose other options may be given.

    Its programs are kept in JAX's persistent compilation cache.
    """
    compile_cache.turn_on()
    return serve.Server(self.model, self.params, encode=self.encode, labels=self.labels, **options)

  def read(self, text: Text) -> Reading:
    """Everything about one text, for pictures."""
    return self.readings([text], 1)[0]

  def readings(self, texts: Sequence[Any], batch_size: int) -> list[Reading]:
    """A reading of each text, in order; texts of like length share a batch."""
    texts = checked(texts)
    split = data.encode([first(text) for text in texts], self.tokenizer, self.max_length, seconds(texts))
    found = {i: self.reading(texts[i], result) for i, result in self.results(split, batch_size)}
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
      for kind, start, stop in spans.spans(self.tags)
    ]


class Tagger(Runner):
  """A tagger of words. A sentence longer than the model is read in overlapping windows."""

  @functools.cached_property
  def encoder(self) -> windows.WordEncoder:
    """The tokenizer, with its length."""
    return windows.WordEncoder(self.tokenizer, self.max_length)

  def predict(self, given: Sequence[Any], batch_size: int = 16) -> list[dict[str, Any]]:
    """One dict a sentence, in order: words, tags, probabilities of these tags and, where tags mark spans, spans.

    given: sentences as lists of words, or as strings, which are parted at white space. spans: [{kind, start, stop, text}].
    Raises UserError for an empty list, an empty sentence, or something that is no sentence.
    """
    marked = spans.scheme_of(self.labels) != 'plain'
    found = self.tagged(given, batch_size)
    return [{**sentence._asdict(), **({'spans': sentence.spans} if marked else {})} for sentence in found]

  def tagged(self, given: Sequence[Any], batch_size: int = 16) -> list[Tagged]:
    """As `predict`."""
    units = [[sentence] for sentence in checked_sentences(given)]
    options = settings.DEFAULTS['data']['tagging']
    split = windows.encode_sentences(units, self.encoder, self.labels, 'plain', options)
    found = {i: result['probabilities'] for i, result in self.results(split, batch_size)}
    assert split.tags is not None and split.words is not None
    answered = [found[i][: split.lengths[i]][split.tags[split.place(i)] >= 0] for i in range(len(split))]
    odds = np.concatenate(answered).astype(np.float64)
    best, sure = split.words.tags(odds.argmax(-1)), split.words.cut(np.round(odds.max(-1), 6).tolist())
    words = [sentence.words for sentence in split.words.sentences]
    return [Tagged(word, tuple(tag), tuple(p)) for word, tag, p in zip(words, best, sure)]


def checked_sentences(given: Sequence[Any]) -> list[Sentence]:
  """Sentences of words without tags. Raises UserError as `Tagger.predict` says."""
  if isinstance(given, str):
    raise UserError('predict was given one string; expected a list of sentences. Write predict([sentence]).')
  found = []
  for number, words in enumerate(given, 1):
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


def forward(model: models.Classifier, params: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
  """probabilities [b c], kept [b L n], assignment [b n] and overflow [b]."""
  output = model.apply({'params': params}, batch)
  found = {name: getattr(output.trace, name) for name in ('kept', 'assignment', 'overflow')}
  return {'probabilities': jax.nn.softmax(output.logits), **found}


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
  task = 'tag' if isinstance(model, Tagger) else 'classify'
  records = model.predict(
    READERS[task](pathlib.Path(file), {**settings.DEFAULTS['data'], **config.get('data', {})})
  )
  lines = (json.dumps(record, ensure_ascii=False) + '\n' for record in records)
  workdir.write_text(pathlib.Path(out), ''.join(lines))
  return len(records)


def read_file(path: pathlib.Path, spec: Mapping[str, Any]) -> list[Text]:
  """The texts of a file with the columns of `spec`, a run's config.data."""
  return read_texts(path, files.Columns(spec['text'], spec['text_pair']))


def read_sentences(path: pathlib.Path, spec: Mapping[str, Any]) -> list[tuple[str, ...]]:
  """The sentences of a file; spec: a run's config.data. Raises UserError naming the line at fault."""
  found = []
  if path.suffix == '.txt':
    for row in plain_rows(path):
      words, problem = tuple(row.text.split()), row.problem
      found.append(Sentence(words, (), str(path), row.line, problem=problem or sentences.word_problem(words)))
  else:
    columns = sentences.columns_of(path, spec['text'], spec['label'])._replace(tag='')
    comment = {**settings.DEFAULTS['data']['tagging'], **spec['tagging']}['comment']
    found = list(sentences.read(path, columns, comment, 'config.predict'))
  for sentence in found:
    if sentence.problem:
      raise UserError(f'{sentence.where(sentence.at)}: {sentence.problem}. Correct the line or delete it.')
  if not found:
    raise UserError(f'{path} holds no sentences; expected one a line.')
  return [sentence.words for sentence in found]


READERS: dict[str, Callable[..., list[Any]]] = {'classify': read_file, 'tag': read_sentences}


def read_texts(path: pathlib.Path, columns: files.Columns) -> list[Text]:
  """All texts, or pairs, of a file. Raises UserError naming the line at fault."""
  texts: list[Text] = []
  for row in plain_rows(path) if path.suffix == '.txt' else files.read(path, columns, 'config.predict'):
    text = (row.text, row.text_pair) if columns.text_pair and path.suffix != '.txt' else row.text
    problem = row.problem or ('' if all(map(str.strip, parts_of(text))) else 'the text is empty')
    if problem:
      raise UserError(f'{path}:{row.line}: {problem}. Correct the line or delete it.')
    texts.append(text)
  if not texts:
    raise UserError(f'{path} holds no texts; expected one a line.')
  return texts


def plain_rows(path: pathlib.Path) -> Iterator[files.Row]:
  """The lines of a .txt file."""
  try:
    # Bytes that are not UTF-8 become surrogates, which text_problem finds; only \n, \r and \r\n end a line.
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
      for number, line in enumerate(file, 1):
        text = line.rstrip('\r\n')
        yield files.Row(number, text, problem=text_problem(text))
  except OSError as error:
    raise UserError(f'config.predict: cannot read {path}: {error.strerror}. Name a file of texts.') from error
