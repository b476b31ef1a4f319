"""Sentences of words with a tag each, from files of one word a line (as CoNLL's) or of one JSON object a line.

A CoNLL file has a word and its columns a line, parted by tabs or by spaces, and blank lines between sentences; a line
-DOCSTART- opens a document. In JSONL a sentence is {"words": […], "tags": […]}.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenprune_jax.data.files import named, opened, suffix_of
from tokenprune_jax.data.tokenise import text_problem
from tokenprune_jax.errors import UserError

DOCUMENT = '-DOCSTART-'
DEFAULTS = {'.jsonl': ('words', 'tags'), '': ('0', '-1')}  # what `text` and `label` of config.data then mean


class Sentence(NamedTuple):
  """Words and their tags (none where they are not asked for), and where they stand.

  problem: why it cannot be used, '' where it can; at: the word that this is about.
  """

  words: tuple[str, ...]
  tags: tuple[str, ...]
  path: str
  line: int  # of the first word, from 1
  by_line: bool = False  # each word has a line of its own
  document: int = 0  # number of -DOCSTART- lines before it
  problem: str = ''
  at: int = 0

  def where(self, word: int = 0) -> str:
    """File and line of a word."""
    return f'{self.path}:{self.line + word * self.by_line}'


class Columns(NamedTuple):
  """Where words and tags stand: keys in JSONL, else numbers from 0, from the end where negative; tag '' for none."""

  word: str
  tag: str


def columns_of(path: str | Path, word: str, tag: str) -> Columns:
  """The columns of a file. word, tag: config.data.text and label, which by default name those of a text classifier."""
  default = DEFAULTS.get(suffix_of(Path(path)), DEFAULTS[''])
  return Columns(*(own if given in ('text', 'label') else given for given, own in zip((word, tag), default)))


def read(path: str | Path, columns: Columns, comment: str = '', key: str = '') -> Iterator[Sentence]:
  """All sentences of a file, in order, those with a problem included.

  comment: how lines begin that are skipped where they stand before a sentence's first word; '': none are. key: the config
  key that named the file, for messages. Raises UserError where the file cannot be read, lacks a column or is empty.
  """
  path, found = Path(path), False
  with opened(path, key) as file:
    if suffix_of(path) == '.jsonl':
      sentences = read_jsonl(file, path, columns)
    else:
      sentences = read_conll(file, path, columns, comment)
    for sentence in sentences:
      found = True
      yield sentence
  if not found:
    raise UserError(f'{named(path, key)} holds no sentences')


def read_jsonl(file: Iterable[str], path: Path, columns: Columns) -> Iterator[Sentence]:
  """One JSON object a line; blank lines do not count."""
  for number, line in enumerate(file, 1):
    if line.strip():
      words, tags, problem = json_lists(line, columns)
      yield Sentence(words, tags, str(path), number, problem=problem)


def json_lists(line: str, columns: Columns) -> tuple[tuple[str, ...], tuple[str, ...], str]:
  """(words, tags, what is wrong with them)."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    return (), (), f'not JSON ({error})'
  if not isinstance(record, dict):
    return (), (), f'expected a JSON object, found {type(record).__name__}'
  values: list[tuple[str, ...]] = []
  for name in filter(None, columns):
    given = record.get(name)
    if not isinstance(given, list) or not all(isinstance(entry, str) for entry in given):
      found = f'{given!r:.60}' if name in record else f'the keys {sorted(record)}'
      return (), (), f'expected a list of texts under {name!r}, found {found}'
    values.append(tuple(given))
  words, tags = values[0], values[1] if columns.tag else ()
  problem = word_problem(words)
  if not problem and columns.tag and len(words) != len(tags):
    problem = f'there are {len(words)} words and {len(tags)} tags; expected one tag a word'
  return words, tags, problem


def word_problem(words: Iterable[str]) -> str:
  """Why words cannot be tagged; '' where they can."""
  words = tuple(words)
  if not words:
    return 'the sentence is empty; expected one word or more'
  for number, word in enumerate(words, 1):
    problem = text_problem(word) or ('' if word.strip() else 'it is empty')
    if problem:
      return f'word {number}: {problem}'
  return ''


class Reading:
  """A sentence of a CoNLL file while its lines are read."""

  def __init__(self, path: Path, line: int, document: int):
    self.words: list[str] = []
    self.tags: list[str] = []
    self.about = str(path), line, True, document
    self.problem, self.at = '', 0

  def add(self, cells: list[str], width: int, word: int, tag: int | None) -> None:
    """A line's cells; width: how many there should be."""
    problem = text_problem(' '.join(cells))
    if not problem and len(cells) != width:
      problem = f'{len(cells)} columns where the lines before have {width}'
    if not problem and not (cells[word].strip() and (tag is None or cells[tag].strip())):
      problem = 'the word or its tag is empty'
    if problem and not self.problem:
      self.problem, self.at = problem, len(self.words)
    self.words.append('' if problem else cells[word])
    self.tags += [] if tag is None else ['' if problem else cells[tag].strip()]

  def sentence(self) -> Sentence:
    """What was read."""
    return Sentence(tuple(self.words), tuple(self.tags), *self.about, self.problem, self.at)


def read_conll(file: Iterable[str], path: Path, columns: Columns, comment: str) -> Iterator[Sentence]:
  """Sentences between blank lines. All lines have as many columns as the first word's."""
  width, document, word, tag = 0, 0, 0, None
  open_one: Reading | None = None
  for number, line in enumerate(itertools.chain(file, ['']), 1):
    cells = cells_of(line)
    begins = cells[:1] == [DOCUMENT]
    if open_one is not None and (begins or not cells):
      yield open_one.sentence()
      open_one = None
    document += begins
    if begins or not cells or (open_one is None and comment and line.startswith(comment)):
      continue
    if not width:
      width, where = len(cells), f'{path}:{number}'
      word = place_of(columns.word, width, 'data.text', where)
      tag = place_of(columns.tag, width, 'data.label', where) if columns.tag else None
    open_one = open_one or Reading(path, number, document)
    open_one.add(cells, width, word, tag)


def cells_of(line: str) -> list[str]:
  """The columns of a line; none where it is blank."""
  line = line.rstrip('\r\n')
  if not line.strip():
    return []
  return line.split('\t') if '\t' in line else [cell for cell in line.split(' ') if cell]


def place_of(column: str, width: int, key: str, where: str) -> int:
  """A column's number from 0. Raises UserError where the file has no such column."""
  number: Any = int(column) if column.removeprefix('-').isdecimal() else None
  if number is None or not -width <= number < width:
    raise UserError(
      f'{key}={column!r}: expected the number of a column from 0, or from the end as -1; {where} has {width}'
    )
  return number % width
