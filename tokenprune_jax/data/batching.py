"""Batches of few static shapes: examples grouped by length, each step a pure function of (seed, epoch).

An epoch takes ceil(N / batch_size) steps whatever the lengths: what is left over of one length bucket moves
on to the next longer one, so that a single batch at most is not full. Its empty rows have weight 0.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int, Shaped

from tokenprune_jax.data.tokenise import Split
from tokenprune_jax.errors import UserError

Batch = dict[str, Shaped[np.ndarray, 'b *n']]
ENDLESS = min(sys.maxsize, 2**62)  # steps of a training iterator


@dataclasses.dataclass(frozen=True)
class Epoch:
  """What is in each global batch."""

  rows: Int[np.ndarray, 'steps b']  # example of the split, -1 = filler
  widths: Int[np.ndarray, ' steps']  # slots of a row


def plan_epoch(
  lengths: Int[np.ndarray, ' N'], buckets: Sequence[int], batch_size: int, key: tuple[int, int] | None
) -> Epoch:
  """The batches of one epoch. key: (seed, epoch) to shuffle by; None: shortest bucket first, in order."""
  rng = None if key is None else np.random.default_rng(key)
  order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
  bucket = np.searchsorted(buckets, lengths[order])
  batches, widths, left = [], [], order[:0]
  for i, width in enumerate(buckets):
    members = np.concatenate([left, order[bucket == i]])
    full = len(members) // batch_size
    batches.append(members[: full * batch_size].reshape(full, batch_size))
    widths += [width] * full
    left = members[full * batch_size :]
  if len(left):
    batches.append(np.pad(left, (0, batch_size - len(left)), constant_values=-1)[None])
    # As long as its longest example needs, which may be shorter than the last bucket.
    widths.append(buckets[np.searchsorted(buckets, lengths[left].max())])
  rows, slots = np.concatenate(batches), np.array(widths)
  if rng is None:
    return Epoch(rows, slots)
  mixed = rng.permutation(len(rows))
  return Epoch(rows[mixed], slots[mixed])


class BatchPlan:
  """All batches of a split, of every epoch, as one process sees them. Made by `batches`."""

  def __init__(
    self,
    split: Split,
    batch_size: int,
    buckets: tuple[int, ...],
    seed: int,
    epoch_shuffle: bool,
    local: slice,
    pad_id: int,
  ):
    self.split = split
    self.batch_size = batch_size  # global
    self.buckets = buckets
    self.seed = seed
    self.epoch_shuffle = epoch_shuffle
    self.local = local  # rows of a global batch that this process gets
    self.pad_id = pad_id
    self._latest: tuple[int, Epoch] = (-1, Epoch(np.zeros((0, 0), int), np.zeros(0, int)))

  @property
  def steps_per_epoch(self) -> int:
    """ceil(N / batch_size)."""
    return -(-len(self.split) // self.batch_size)

  def epoch(self, epoch: int) -> Epoch:
    """The plan of an epoch, counted from 0."""
    latest = self._latest
    if latest[0] != epoch:
      key = (self.seed, epoch) if self.epoch_shuffle else None
      latest = (epoch, plan_epoch(self.split.lengths, self.buckets, self.batch_size, key))
      self._latest = latest  # one assignment: iterators prefetch in threads of their own
    return latest[1]

  def padding_share(self, epoch: int) -> float:
    """Share of an epoch's slots, over all processes, that hold no token."""
    return 1 - int(self.split.lengths.sum()) / (int(self.epoch(epoch).widths.sum()) * self.batch_size)

  def batch(self, step: int) -> Batch:
    """This process's rows of a step's batch; steps count from 0 through all epochs. Fields: see `batches`."""
    epoch, place = divmod(step, self.steps_per_epoch)
    plan = self.epoch(epoch)
    return collate(self.split, plan.rows[place, self.local], int(plan.widths[place]), self.pad_id)

  def iterator(self, start_step: int = 0) -> grain.DatasetIterator:
    """Batches from `start_step` on: without end where epochs are shuffled, else for one epoch.

    Its get_state() and set_state() count from step 0 whatever the start. Batches are made ahead in one
    thread.
    """
    steps = ENDLESS if self.epoch_shuffle else self.steps_per_epoch
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(grain.MapDataset.range(steps).map(self.batch).to_iter_dataset(options))
    if start_step:
      iterator.set_state({**iterator.get_state(), 'next_index': start_step})
    return iterator


def collate(split: Split, rows: Int[np.ndarray, ' b'], width: int, pad_id: int) -> Batch:
  """Examples `rows` (-1: filler) side by side, filled up on the right to `width` slots."""
  count = len(rows)
  batch: dict[str, Any] = {
    'ids': np.full((count, width), pad_id, np.int32),
    'mask': np.zeros((count, width), bool),
    'types': np.zeros((count, width), np.int32),
    'label': np.zeros(count, np.int32) if split.tags is None else np.full((count, width), -1, np.int32),
    'weight': (rows >= 0).astype(np.float32),
    'index': rows.astype(np.int32),
  }
  if split.word_of is not None:
    batch['words'] = np.full((count, width), -1, np.int32)
  for row in np.flatnonzero(rows >= 0):
    example = int(rows[row])
    length = split.lengths[example]
    batch['ids'][row, :length] = split.ids(example)
    batch['types'][row, :length] = split.types(example)
    batch['mask'][row, :length] = True
    if split.tags is None:
      batch['label'][row] = split.label[example]
    else:
      batch['label'][row, :length] = split.tags[split.place(example)]
    if split.word_of is not None:
      batch['words'][row, :length] = split.word_of[split.place(example)]
  return batch


def batches(
  split: Split,
  *,
  batch_size: int,
  buckets: tuple[int, ...],
  seed: int,
  epoch_shuffle: bool,
  process_index: int = 0,
  process_count: int = 1,
  pad_id: int,
) -> BatchPlan:
  """The batches of `split`, as numpy dicts of a process's b = batch_size / process_count rows.

  ids [b n] int32, mask [b n] bool (True at tokens), types [b n] int32, label [b] int32, weight [b] float32 (0
  at filler rows), index [b] int32 (example in the split, -1 at filler rows); n is one of `buckets`. Where the
  split labels tokens, label is [b n], -1 at tokens without one, and words [b n] int32 the number of the word that each is
  a piece of, -1 for none. The rows of all processes, in their order, are the batch that one process would get.

  batch_size: rows over all processes. seed: of the shuffling. Raises UserError where the split is empty, the
  batch cannot be shared out, or an example is longer than the last bucket.
  """
  if not len(split):
    raise UserError('there is nothing to make batches of: the split has no example')
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f'a batch of {batch_size} cannot be shared out over {process_count} processes; choose a multiple in '
      'optimizer.batch_size and eval.batch_size'
    )
  longest = int(split.lengths.max())
  needed = [
    *sorted(width for width in buckets if width < longest),
    *sorted(w for w in buckets if w >= longest)[:1],
  ]
  if not needed or needed[-1] < longest:
    raise UserError(
      f'data.buckets={tuple(buckets)} end before the longest example, of {longest} tokens; add a bucket of '
      'that length or lower data.max_length'
    )
  share = batch_size // process_count
  local = slice(process_index * share, (process_index + 1) * share)
  return BatchPlan(split, batch_size, tuple(needed), seed, epoch_shuffle, local, pad_id)
