"""`load`: a dataset by name or from files, de-duplicated, split, tokenised and ready for `batches`."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenprune_jax import settings
from tokenprune_jax.data import splits
from tokenprune_jax.data.source import Source, open_source
from tokenprune_jax.data.tokenise import Encoder, Split, Words, encode_cached, text_problem
from tokenprune_jax.errors import UserError

CHUNK = 1000  # examples read from disk at once


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Three splits with the names of their classes."""

  name: str
  labels: tuple[str, ...]  # Split.label counts them from 0
  splits: Mapping[str, Split]  # 'train', 'valid', 'test'
  max_length: int  # tokens
  duplicates: int  # documents dropped because another has the same text
  skipped: int  # rows left out because they cannot be used
  bad_rows: tuple[str, ...]  # what was wrong with the first of those
  repaired: int = 0  # tagged sentences that were against their scheme

  def identity(self) -> dict[str, Any]:
    """What a model learns from, to be known again: the labels, and of the splits for training and validation a digest."""
    learned = {name: self.splits[name] for name in ('train', 'valid')}
    return {
      'labels': list(self.labels),
      **{name: {'examples': len(split), 'digest': split.digest()} for name, split in learned.items()},
    }

  def describe(self) -> str:
    """Sizes, documents cut and by how much, and what was dropped: some lines for a person."""
    classes = ', '.join(self.labels[:8]) + (', …' if len(self.labels) > 8 else '')
    words = self.splits['train'].words
    kind = 'classes' if words is None else f'{words.scheme} tags'
    lines = [f'{self.name}: {len(self.labels)} {kind} ({classes})']
    lines += [f'  {name}: {self.describe_split(split)}' for name, split in self.splits.items()]
    lines.append(f'  dropped: {self.duplicates:,} duplicates, {self.skipped:,} rows that cannot be used')
    lines += [f'  repaired: tags of {self.repaired:,} sentences'] if self.repaired else []
    lines += [f'    {row}' for row in self.bad_rows]
    return '\n'.join(lines)

  def describe_split(self, split: Split) -> str:
    """One split's part of `describe`."""
    if split.words is not None:
      return self.describe_words(split, split.words)
    count = np.bincount(split.label, minlength=len(self.labels))
    cut = split.cut[split.cut > 0]
    text = f'{len(split):,} documents ({count.min():,} to {count.max():,} a class)'
    if not len(cut):
      return f'{text}, none longer than {self.max_length} tokens'
    lost = cut.sum() / (split.lengths.sum() + cut.sum())
    return (
      f'{text}, {len(cut):,} ({len(cut) / len(split):.1%}) cut to {self.max_length} tokens: each loses '
      f'{cut.mean():,.0f} on average and {cut.max():,} at most, together {lost:.1%} of all tokens'
    )

  def describe_words(self, split: Split, words: Words) -> str:
    """The same where words are tagged."""
    parts = sum(given[0] != given[-1] for given in words.cut(words.example.tolist()))
    text = f'{len(words.sentences):,} sentences of {len(words.example):,} words in {len(split):,} inputs'
    text += f', {parts:,} sentences longer than {self.max_length} tokens in windows' if parts else ''
    lost = int(split.cut.sum())
    return text + (f', {lost:,} pieces of words longer than that left out' if lost else '')


@dataclasses.dataclass(frozen=True)
class Usable:
  """What is known of the documents of one source split that can be used."""

  places: np.ndarray  # [n] int, in the source split
  keys: list[bytes]  # [n] fingerprints
  labels: np.ndarray  # [n] int

  def at(self, indices: np.ndarray) -> 'Usable':
    """Some of them."""
    return Usable(self.places[indices], [self.keys[i] for i in indices], self.labels[indices])


def load(
  spec: Mapping[str, Any], tokenizer: Any, max_length: int, cache_dir: str | os.PathLike, *, seed: int
) -> Dataset:
  """The dataset that `spec` (config.data; missing keys have their defaults) names.

  name: one of `datasets.BUILDERS` (bbc, imdb, rotten_tomatoes, newsgroups, r8, synthetic), 'file', or a tfds
  name. tokenizer: a fast one of transformers. max_length: tokens, special ones included. cache_dir: for
  prepared datasets and tokens, which any number of runs may share. seed: picks the documents of a limited
  training split; the splits themselves and the limited others are the same for all seeds.

  Raises UserError for whatever is wrong with the spec, the files or the folder.
  """
  spec = {**settings.DEFAULTS['data'], **spec}
  cache, encoder = Path(cache_dir), Encoder(tokenizer, max_length)
  source = open_source(spec, cache)
  labels = class_names(source, spec['labels'])
  parts, duplicates = divide(source, labels)
  chosen = {}
  for split, (origin, part) in parts.items():
    salt = f'limit {split} {seed if split == "train" else 0}'
    part = limited(part, spec[f'{split}_limit'], salt)
    chosen[split] = tokenise(source, origin, part, encoder, cache, f'tokenising {split}')
  return Dataset(
    name=source.name,
    labels=labels,
    splits=chosen,
    max_length=max_length,
    duplicates=duplicates,
    skipped=source.bad.count,
    bad_rows=tuple(source.bad.examples),
  )


def divide(source: Source, labels: tuple[str, ...]) -> tuple[dict[str, tuple[str, Usable]], int]:
  """{'train', 'valid', 'test': (source split, documents)} without duplicates, and how many those were."""
  usable = {split: examine(source, split, labels) for split in source.splits}
  kept = splits.drop_duplicates({split: part.keys for split, part in usable.items()})
  unique = {split: part.at(kept[split]) for split, part in usable.items()}
  sizes = np.bincount(unique['train'].labels, minlength=len(labels))
  if np.count_nonzero(sizes) < 2 or sizes.max() < 2:
    raise UserError(
      f'{source.paths["train"]} has {sizes.tolist()} documents of the classes {labels} that differ from each '
      'other and from those of the other splits; expected some of two classes or more, and several of one'
    )
  parts = splits.fill_in(
    {split: part.keys for split, part in unique.items()},
    {split: part.labels for split, part in unique.items()},
  )
  duplicates = sum(len(part.keys) for part in usable.values()) - sum(map(len, kept.values()))
  return {split: (origin, unique[origin].at(rows)) for split, (origin, rows) in parts.items()}, duplicates


def limited(part: Usable, limit: int, salt: str) -> Usable:
  """At most `limit` documents (0: all), each class in its share. Their texts and `salt` decide which."""
  if not limit or limit >= len(part.keys):
    return part
  return part.at(splits.stratified(part.keys, part.labels, limit, salt=salt))


def class_names(source: Source, given: Sequence[Any]) -> tuple[str, ...]:
  """The dataset's classes, those of data.labels, or those of the training rows in order. Raises UserError."""
  if source.labels and given and tuple(given) != source.labels:
    raise UserError(
      f'data.labels={tuple(given)} differ from the classes of {source.name}: {source.labels}; leave it ()'
    )
  names = source.labels or tuple(map(str, given))
  if not names:
    names = tuple(
      sorted({text(example['label']) for _, example in examples(source, 'train')}, key=label_order)
    )
  if len(set(names)) < max(2, len(names)):
    raise UserError(f'{source.paths["train"]}: the classes are {names}; expected two or more different ones')
  return names


def label_order(label: str) -> tuple[bool, int, str]:
  """Numbers by value, before names."""
  number = label.removeprefix('-').isdecimal() and len(label) < 20
  return not number, int(label) if number else 0, label


def text(value: Any) -> str:
  """A text feature: bytes where it was read from disk."""
  return value.decode('utf-8', 'surrogateescape') if isinstance(value, bytes) else value


def examples(
  source: Source, split: str, places: Sequence[int] | None = None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """(place, example) of a source split, or of some places in it. Raises UserError for a damaged file."""
  documents = source.splits[split]
  places = range(len(documents)) if places is None else places
  for start in range(0, len(places), CHUNK):
    chunk = list(places[start : start + CHUNK])
    try:
      found = documents.__getitems__(chunk)
    except (OSError, RuntimeError, ValueError, IndexError) as error:
      raise UserError(
        f'the prepared dataset {source.name} is damaged ({error}); delete its folder in the cache, run again'
      ) from error
    yield from zip(chunk, found)


def examine(source: Source, split: str, labels: tuple[str, ...]) -> Usable:
  """Reads all documents of a source split once; rows without text or a known label go to source.bad."""
  numbers = {name: i for i, name in enumerate(labels)}
  places, keys, found = [], [], []
  for place, example in examples(source, split):
    first, second = texts_of(source, example)
    label = example[source.columns.label]
    number = int(label) if source.labels else numbers.get(text(label), -1)
    problem = text_problem(first) or text_problem(second)
    if not problem and not (first.strip() and (second.strip() or not source.columns.text_pair)):
      problem = 'the text is empty'
    if not problem and number < 0:
      shown = repr(text(label)) if not source.labels else 'there is no label: it'
      problem = f'{shown} is none of the classes {", ".join(labels)}'
    if problem:
      source.bad.add(source.where(split, place, example), problem)
      continue
    places.append(place)
    keys.append(splits.fingerprint(first, second))
    found.append(number)
  if not places:
    raise UserError(
      f'{source.paths[split]}: none of its rows can be used; the first: {source.bad.examples[:1]}'
    )
  return Usable(np.array(places, np.int64), keys, np.array(found, np.int32))


def texts_of(source: Source, example: Mapping[str, Any]) -> tuple[str, str]:
  """The text of an example and its second one ('' where there is none)."""
  columns = source.columns
  return text(example[columns.text]), text(example[columns.text_pair]) if columns.text_pair else ''


def tokenise(source: Source, origin: str, part: Usable, encoder: Encoder, cache: Path, title: str) -> Split:
  """The tokens of some documents, from the cache if it has them."""
  texts = [texts_of(source, example) for _, example in examples(source, origin, part.places.tolist())]
  pairs = [second for _, second in texts] if source.columns.text_pair else None
  encoded = encode_cached(encoder, [first for first, _ in texts], pairs, cache / 'tokens', title)
  documents, places = source.splits[origin], part.places
  return Split(encoded, part.labels, lambda i: texts_of(source, documents[int(places[i])]))
