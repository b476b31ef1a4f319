"""A user's own CSV, TSV or JSONL files, gzipped or not, read once into a tfds dataset that their content finds again."""

import contextlib
import csv
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from tokenprune_jax.data.tokenise import text_problem
from tokenprune_jax.errors import UserError

DELIMITERS = {'.csv': ',', '.tsv': '\t'}
SUFFIXES = (*DELIMITERS, '.jsonl')


class Columns(NamedTuple):
  """Names of the columns to read; '' for none."""

  text: str
  text_pair: str = ''
  label: str = ''


class Row(NamedTuple):
  """One row; `problem` says why it cannot be used, '' where it can."""

  line: int  # in the file, from 1: where the row starts
  text: Any = ''  # str, as the other two, unless there is a problem
  text_pair: Any = ''
  label: str = ''
  problem: str = ''


class BadRows:
  """Rows that cannot be used: as data.on_bad_row says, the first stops everything or all are counted."""

  def __init__(self, policy: str, count: int = 0, examples: list[str] | None = None):
    if policy not in ('error', 'skip'):
      raise UserError(f"data.on_bad_row={policy!r}; expected 'error' or 'skip'")
    self.policy = policy
    self.count = count
    self.examples = examples or []  # the first few, for the report

  def add(self, where: str, problem: str) -> None:
    """Notes one row, or raises UserError. where: its file and line."""
    if self.policy == 'error':
      raise UserError(
        f"{where}: {problem}. Correct the row, or set data.on_bad_row='skip' to leave out such rows."
      )
    self.count += 1
    if len(self.examples) < 5:
      self.examples.append(f'{where}: {problem}')


def read(path: str | Path, columns: Columns, key: str = '') -> Iterator[Row]:
  """The rows of a CSV or TSV file with a header, or of a JSONL file, in order; blank lines do not count.

  Cells are quoted as CSV writers do (quotes inside doubled), in TSV too. key: the config key that named the
  file, for messages. Raises UserError where the file cannot be read, is empty, lacks a column or breaks off
  inside quotes.
  """
  path = Path(path)
  found = False
  for row in read_rows(path, columns, key):
    found = True
    yield row if row.problem else row._replace(problem=cell_problem(row, columns))
  if not found:
    raise UserError(f'{path} holds no rows; expected one document a row')


def cell_problem(row: Row, columns: Columns) -> str:
  """Why a cell of the row cannot be used; '' where all can."""
  for name, value in zip(columns, row[1:4]):
    problem = text_problem(value)
    if problem:
      return f'{name}: {problem}'
  return f'{columns.label}: there is no label' if columns.label and not row.label else ''


def plain_rows(path: Path, key: str) -> Iterator[Row]:
  """The lines of a .txt file."""
  with opened(path, key) as file:
    for number, line in enumerate(file, 1):  # only \\n, \\r and \\r\\n end a line
      text = line.rstrip('\r\n')
      yield Row(number, text, problem=text_problem(text))


def read_rows(path: Path, columns: Columns, key: str) -> Iterator[Row]:
  """Rows of the file's format, with errors of the file system as UserError."""
  suffix = suffix_of(path)
  if suffix not in SUFFIXES:
    raise UserError(
      f'{named(path, key)}: expected a file that ends in {", ".join(SUFFIXES)}, or in one of these and .gz'
    )
  with opened(path, key) as file:
    if suffix == '.jsonl':
      yield from read_jsonl(file, columns)
    else:
      yield from read_table(file, path, DELIMITERS[suffix], columns)


def suffix_of(path: Path) -> str:
  """What a file's name ends in, .gz aside."""
  return path.with_suffix('').suffix if path.suffix == '.gz' else path.suffix


def named(path: Path, key: str) -> str:
  """What a message calls a file. key: the config key that named it, or ''."""
  return f'{key}={str(path)!r}' if key else str(path)


@contextlib.contextmanager
def opened(path: Path, key: str) -> Iterator[Any]:
  """The lines of a file, gzipped or not. Raises UserError for errors of the file system while it is open."""
  try:
    # Bytes that are not UTF-8 become surrogates, so that the row they stand in can be named or skipped.
    with (gzip.open if path.suffix == '.gz' else open)(
      path, 'rt', encoding='utf-8-sig', errors='surrogateescape', newline=''
    ) as file:
      yield file
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(
      f'{named(path, key)} cannot be read: {getattr(error, "strerror", None) or error}'
    ) from error


def read_jsonl(file: Iterator[str], columns: Columns) -> Iterator[Row]:
  """One JSON object a line."""
  for number, line in enumerate(file, 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      yield Row(number, problem=f'not JSON ({error})')
      continue
    if not isinstance(record, dict):
      yield Row(number, problem=f'expected a JSON object, found {type(record).__name__}')
      continue
    missing = [name for name in columns if name and name not in record]
    if missing:
      yield Row(number, problem=f'no key {missing[0]!r}; there are {sorted(record)}')
      continue
    text, pair, label = (record[name] if name else '' for name in columns)
    if not isinstance(label, (str, int)):
      yield Row(number, problem=f'{columns.label}: expected text or a whole number, found {label!r:.40}')
      continue
    # As it would stand in CSV: true and 1 are 'true' and '1'.
    yield Row(number, text, pair, json.dumps(label) if isinstance(label, bool) else str(label).strip())


def read_table(file: Iterator[str], path: Path, delimiter: str, columns: Columns) -> Iterator[Row]:
  """Rows under a header line."""
  limit = csv.field_size_limit(sys.maxsize)  # a document may well be longer than csv's 128 KiB
  try:
    # A lenient reader would swallow what follows a stray quote, to the end of the file.
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    header = read_header(reader, path)
    places = [find_column(name, header, path) for name in columns]
    line = reader.line_num
    while True:
      start = line + 1
      try:
        cells = next(reader)
      except StopIteration:
        return
      except csv.Error as error:
        line = reader.line_num
        if 'unexpected end' in str(error):
          raise UserError(
            f'{path}:{start}: a quote opens here and never closes; double quotes inside text'
          ) from error
        yield Row(start, problem=f'{error}; quotes inside quoted text must be doubled')
        continue
      line = reader.line_num
      if len(cells) == len(header):
        text, pair, label = ('' if place is None else cells[place] for place in places)
        yield Row(start, text, pair, label.strip())
      elif cells:
        yield Row(start, problem=f'{len(cells)} cells where the header has {len(header)}')
  finally:
    csv.field_size_limit(limit)


def read_header(reader: Any, path: Path) -> list[str]:
  """The first line that is not blank. Raises UserError where there is none or it is not text."""
  try:
    header: list[str] = next((cells for cells in reader if cells), [])
  except csv.Error as error:
    raise UserError(f'{path}:{reader.line_num}: the header cannot be read ({error})') from error
  if not header:
    raise UserError(f'{path} is empty; expected a header line and one document a row')
  if any(map(text_problem, header)):
    raise UserError(f'{path}:{reader.line_num}: the header is not UTF-8; save the file in that encoding')
  return [name.strip() for name in header]


def find_column(name: str, header: list[str], path: Path) -> int | None:
  """Place of a column in the header; None for ''. Raises UserError."""
  if not name:
    return None
  if header.count(name) != 1:
    problem = 'has two columns' if name in header else 'has no column'
    raise UserError(
      f'{path} {problem} named {name!r}; its header has {header}. data.text, data.text_pair and data.label '
      'name the columns'
    )
  return header.index(name)


class UserFiles(tfds.core.GeneratorBasedBuilder):
  """The rows of a user's files: text, text_pair, label (as written) and line; splits as given, rows in their
  order.

  Its config is named after the files and their content: what has changed is read again, the rest is not.
  """

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, paths: Mapping[str, str], columns: Columns, on_bad_row: str, data_dir: Path):
    """paths: {'train': path, …}. Raises UserError where one cannot be read."""
    self.paths = dict(paths)
    self.columns = columns
    self.bad = BadRows(on_bad_row)
    name = content_key(paths, columns, on_bad_row)
    config = tfds.core.BuilderConfig(name=name, version=self.VERSION)
    super().__init__(data_dir=data_dir, config=config, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    features = {name: tfds.features.Text() for name in Columns._fields}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({**features, 'line': tfds.features.Scalar(np.int64)}),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(skipped=0, examples=[]),
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split) for split in self.paths}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    path = self.paths[split]
    number = 0
    for row in read(path, self.columns, f'data.{split}'):
      if row.problem:
        self.bad.add(f'{path}:{row.line}', row.problem)
        continue
      yield number, {'text': row.text, 'text_pair': row.text_pair, 'label': row.label, 'line': row.line}
      number += 1
    if not number:
      raise UserError(f'{path}: none of its rows can be used; the first is {self.bad.examples[0]}')
    self.info.metadata.update(skipped=self.bad.count, examples=self.bad.examples)


def content_key(paths: Mapping[str, str], columns: Columns, on_bad_row: str) -> str:
  """A name for what is read from these files. Raises UserError where one cannot be read."""
  digest = hashlib.sha256(repr((tuple(columns), on_bad_row)).encode())
  for split, path in sorted(paths.items()):
    try:
      with open(path, 'rb') as file:
        content = hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
      raise UserError(f'data.{split}={path!r} cannot be read: {error.strerror or error}') from error
    digest.update(repr((split, str(path), content)).encode())
  return digest.hexdigest()[:32]
