"""The shapes that served examples are grouped into."""

import dataclasses
import math

import jax

from tokenprune_jax.errors import UserError

# Close enough to waste little, few enough to compile.
LENGTHS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
COARSE = (16, 32, 64, 128, 192, 256, 384, 512)  # where programs are many: `buckets.lengths_of`
BATCH_TOKENS = {'cpu': 512}  # slots of a full batch; on a CPU a larger one leaves the cache
MANY_TOKENS = 16384  # on an accelerator
LEAST = 8  # slots that a row counts as at least: very short ones would wait for too much company
QUARTERS = 4  # capacities of keys and rows in a bucket, where a slot may be updated and not seen
HALF = QUARTERS // 2
OVERHEAD = 100  # slots that would take as long as starting a program does: measured on 2 cores, MiniLM-L6
SHORT = 128  # slots up to which rows are gathered from a whole batch: attention, then computed for all, is cheap there


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The shapes that examples are grouped into.

  lengths: of the input slots, increasing; the last one holds the longest request. batch_tokens: slots of a full batch
  (0: by the backend), where a row counts as 8 at least. A batch has either one row or as many as fit.
  """

  lengths: tuple[int, ...] = LENGTHS
  batch_tokens: int = 0

  def settled(self, longest: int) -> 'Ladder':
    """The ladder for a model that reads at most `longest` tokens. Raises UserError where it is none."""
    rising = all(low < high for low, high in zip((0, *self.lengths), self.lengths))
    if not self.lengths or any(type(n) is not int for n in self.lengths) or not rising:
      raise UserError(
        f'ladder.lengths is {self.lengths}; expected whole numbers above 0 in increasing order.'
      )
    if self.batch_tokens < 0:
      raise UserError(
        f'ladder.batch_tokens is {self.batch_tokens}; expected a number of slots, or 0 for the default.'
      )
    tokens = self.batch_tokens or BATCH_TOKENS.get(jax.default_backend(), MANY_TOKENS)
    below = tuple(n for n in self.lengths if n < longest)
    return Ladder((*below, longest) if self.lengths[-1] >= longest else below, tokens)

  def slots(self, count: int) -> int:
    """The smallest length that holds `count` tokens."""
    return next(n for n in self.lengths if n >= count)

  def rows(self, slots: int) -> int:
    """Rows of a full batch."""
    return max(1, self.batch_tokens // max(slots, LEAST))


def crowded(count: int, slots: int, batch_slots: int | float) -> bool:
  """Whether `count` examples of so many slots are cheaper in one batch of `batch_slots` than one by one."""
  return count * (OVERHEAD + slots) >= OVERHEAD + batch_slots


def quarter(count: int, total: int) -> int | None:
  """The quarter of `total` slots that holds `count`, 1 to 3; None: no fewer than all of them."""
  share = max(math.ceil(count * QUARTERS / total), 1)
  return share if share < QUARTERS else None
