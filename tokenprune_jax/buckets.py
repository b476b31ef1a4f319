"""Which bucket served examples go into: the shapes of every segment's programs, and when a batch is worth one.

A bucket's lengths are those of the ladder. Where a method separates examples by how many keys they have or how many rows are
updated, those in like quarters share a bucket; where rows of all examples are gathered `together`, any may.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenprune_jax.ladder import COARSE, HALF, LENGTHS, QUARTERS, SHORT, Ladder, crowded, quarter
from tokenprune_jax.models import Classifier
from tokenprune_jax.segments import Bucket, Programs, Report


def lengths_of(model: Classifier) -> tuple[int, ...]:
  """The lengths of a model's ladder by default: fewer where shapes are many, as of what is told apart or kept by place."""
  reducer = model.reducer
  kept = model.readout == 'tokens' and reducer.shortens() and reducer.decides(model.config.depth)
  return COARSE if kept or reducer.needs_words() or reducer.separates() else LENGTHS


class Place(NamedTuple):
  """Where rows wait: the segment that comes next, and their bucket in it."""

  segment: int
  bucket: Bucket


class Buckets:
  """The buckets of a model's segments, of a ladder that is settled for it."""

  def __init__(self, model: Classifier, programs: Programs, ladder: Ladder):
    self.programs, self.ladder = programs, ladder
    self.shortens, self.separates = model.reducer.shortens(), set(model.reducer.separates())
    self.halts = 'rows' in self.separates
    # What is kept of each token is kept by its place in the input: then examples share a pool with their like.
    self.by_length = model.readout == 'tokens' or not self.shortens
    # Rows are gathered where slots stay that are not updated: of words that halt, or the padding of short sentences.
    stays = self.halts or (model.readout == 'tokens' and not self.shortens)
    self.gathers = stays and len(programs.segments) > 1

  def rows(self, slots: int) -> int:
    """Rows of a full batch: twice as many where about half of the slots are computed."""
    # Where no input slot is left, of the added ones.
    held = slots or self.programs.result(len(self.programs.segments) - 2).tokens.added
    return self.ladder.rows(held) * (2 if self.together(slots) else 1)

  def entry(self, slots: int) -> Bucket:
    """The full bucket of requests that need so many slots."""
    return Bucket(self.rows(slots), slots, length=slots if self.by_length else 0)

  def of(self, index: int) -> list[Bucket]:
    """All full buckets that a segment may get."""
    entries = [self.entry(slots) for slots in self.ladder.lengths]
    if index == 0:
      return entries
    return [
      Bucket(self.rows(slots), slots, *shares, length)
      for length in dict.fromkeys(bucket.length for bucket in entries)
      for slots in self.left(index, length)
      for shares in self.shares(slots)
    ]

  def together(self, slots: int) -> bool:
    """Whether batches of so many slots gather the rows of all examples together, so that any may share them."""
    return self.gathers and slots <= SHORT and self.ladder.rows(slots) > 1

  def forms(self, index: int, bucket: Bucket) -> list[Bucket]:
    """What a segment's programs are compiled for, of a full bucket: all of its rows, or one."""
    alone = bucket._replace(rows=1)
    if not self.together(bucket.slots):
      return list(dict.fromkeys((alone, bucket)))
    return [
      *(bucket._replace(together=share) for share in (None, *range(1, QUARTERS))),
      *(alone._replace(updated=share) for share in ((None, HALF) if index and self.halts else (None,))),
    ]

  def form(self, place: Place, updated: Sequence[int]) -> Place:
    """The program for examples of a bucket of which so many slots are updated; of requests, so many tokens."""
    index, bucket = place
    if not self.together(bucket.slots):
      return place
    added = self.programs.result(max(index - 1, 0)).tokens.added
    total = bucket.slots + added
    if bucket.rows > 1:
      count = sum(updated) + (0 if index else added * len(updated))
      bucket = bucket._replace(together=quarter(count, bucket.rows * total))
    elif index and self.halts and 2 * updated[0] <= total:
      bucket = bucket._replace(updated=HALF)
    return Place(index, bucket)

  def worth(self, place: Place, count: int) -> bool:
    """Whether so many requests go as one batch of a program, rather than one by one."""
    rows, slots, together = place.bucket.rows, place.bucket.slots, place.bucket.together
    # What is of all slots (keys, values, attention) takes about a quarter of a whole block's time.
    share = 1.0 if together is None else (1 + 3 * together / QUARTERS) / 4
    return crowded(count, slots, share * rows * slots)

  def left(self, index: int, length: int) -> tuple[int, ...]:
    """Input slots that a segment may get of examples of a length (0: of any); 0 alone where all were combined."""
    if index and not self.programs.has_inputs(index - 1):
      return (0,)
    if length and (index == 0 or not self.shortens):
      return (length,)
    return tuple(slots for slots in self.ladder.lengths if slots <= (length or slots))

  def apart(self, slots: int) -> set[str]:
    """Of which of 'keys' and 'rows' examples that share a pool have the same quarter."""
    return self.separates - ({'rows'} if self.together(slots) else set())

  def shares(self, slots: int) -> list[tuple[int | None, int | None]]:
    """The quarters of keys and rows by which pools differ."""
    names = self.apart(slots)
    keys, updated = ([None, *range(1, QUARTERS)] if name in names else [None] for name in ('keys', 'rows'))
    return list(itertools.product(keys, updated))

  def moves(self, index: int) -> Iterator[tuple[Bucket, Bucket]]:
    """(target, source): full pools of a segment, and batches of the one before that rows are taken from."""
    for target in self.of(index):
      for slots in self.left(index - 1, target.length):
        before = slots if self.programs.has_inputs(index - 1) else 0
        if target.slots <= before:
          for rows in {1, self.rows(slots)}:
            yield target, Bucket(rows, before, length=target.length)

  def after(self, place: Place, report: Report, row: int) -> Bucket:
    """Where a row goes after the segment that ran at `place`."""
    index, length = place.segment, place.bucket.length
    slots = self.ladder.slots(max(int(report.live[row]), 1)) if self.programs.has_inputs(index) else 0
    total, apart = slots + self.programs.result(index).tokens.added, self.apart(slots)
    keys = quarter(int(report.widest[row]), total) if 'keys' in apart else None
    updated = quarter(int(report.updated[row]), total) if 'rows' in apart else None
    return Bucket(self.rows(slots), slots, keys, updated, length)
