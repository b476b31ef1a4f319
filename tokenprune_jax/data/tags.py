"""Tags that mark spans of words: what they say, whether they keep to their scheme, and other ways to write it.

  bio    B-PER opens a span, I-PER goes on with it, O is outside
  bioes  a span of several words also ends with E-PER, one of a single word is S-PER
  plain  tags by themselves, as parts of speech

Tags are read as conlleval and seqeval read them, leniently: I-PER behind O, or behind another kind, opens a span too. Tags
that come back differently when their spans are written down again are against their scheme.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SCHEMES = ('bio', 'bioes', 'plain')
MARKED = re.compile(r'O|[BIES](-.+)?', re.DOTALL)


class Span(NamedTuple):
  """Words start to stop - 1; kind '' where tags have none."""

  kind: str
  start: int
  stop: int


def scheme_of(tags: Iterable[str]) -> str:
  """The scheme that a set of tags can be."""
  known = set(tags)
  marks = {tag[:1] for tag in known}
  if not all(MARKED.fullmatch(tag) for tag in known) or not marks & set('BIES'):
    return 'plain'
  return 'bioes' if marks & set('ES') else 'bio'


def spans(tags: Sequence[str]) -> list[Span]:
  """The spans of a sentence, in order."""
  found: list[Span] = []
  start, open_kind = 0, None  # of the span that is open
  for i, tag in enumerate([*tags, 'O']):
    mark, _, kind = tag.partition('-')
    if open_kind is not None and (mark in ('B', 'S', 'O') or kind != open_kind):
      found.append(Span(open_kind, start, i))
      open_kind = None
    if mark != 'O' and open_kind is None:
      start, open_kind = i, kind
    if mark in ('E', 'S'):  # the span ends with this word
      found.append(Span(kind, start, i + 1))
      open_kind = None
  return found


def written(found: Iterable[Span], count: int, scheme: str) -> tuple[str, ...]:
  """The tags of a sentence of `count` words with these spans; scheme: 'bio' or 'bioes'."""
  tags = ['O'] * count
  for kind, start, stop in found:
    marks = ['B', *'I' * (stop - start - 1)]
    if scheme == 'bioes':
      marks[-1] = 'S' if len(marks) == 1 else 'E'
    tags[start:stop] = [f'{mark}-{kind}' if kind else mark for mark in marks]
  return tuple(tags)


def first_illegal(tags: Sequence[str], scheme: str) -> int | None:
  """Place of the first tag that is against the scheme; None where all keep to it."""
  if scheme == 'plain':
    return None
  right = written(spans(tags), len(tags), scheme)
  return next((i for i, (tag, other) in enumerate(zip(tags, right)) if tag != other), None)
