"""How many tokens stay, layer by layer, as counts and as shares of a length."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tokenprune_jax.errors import UserError


def next_counts(ratio: float, length: int, rounding: str = 'down') -> tuple[int, ...]:
  """next_counts[t] = floor(ratio * t) for t = 0 … length, at least 1 where t >= 1; exact in decimals.

  rounding: 'down', or 'nearest', a half to the even number.
  """
  exact, whole = Fraction(str(ratio)), round if rounding == 'nearest' else math.floor
  return tuple(max(whole(exact * t), min(t, 1)) for t in range(length + 1))


def cascade(keep: float, depth: int) -> tuple[float, ...]:
  """SpAtten's shares by layer (arXiv 2012.09852) as in LTP's code: 1 in the first layers, then in a line to `keep`."""
  whole = min(max(3, math.ceil(0.15 * depth)), depth)
  falling = depth - whole
  return tuple(max(1 - max(l - whole, 0) * (1 - keep) / max(falling, 1), 0.01) for l in range(1, depth + 1))


def manual(keep: float, depth: int) -> tuple[float, ...]:
  """The shares that STTABT's authors set by hand for pruning on the way up: in a line, `keep` on average of 12 layers.

  1.5 keep to 0.4 keep where keep is at most 0.666, else 1 to a little above 2 keep - 1.
  """
  steps = [11 * l / max(depth - 1, 1) / 10 for l in range(depth)]  # 0 to 1.1, as over 12 layers
  if keep <= 0.666:
    found = [keep * (1.5 - step) for step in steps]
  else:
    found = [(1 - step) * (2 - 2 * keep) + 2 * keep - 1 for step in steps]
  return tuple(min(max(share, 0.01), 1.0) for share in found)


def places(share: float, length: int) -> int:
  """The capacity that holds `share` of a padded length: rounded up, at least 1."""
  return max(math.ceil(share * length - 1e-6), 1)


def shared(method: Any, layer: int, batch: int, length: int) -> dict[str, Any]:
  """What a batch shares behind a layer, by a method's `batch_capacities` (`costs.Validation.batch_capacities`).

  Fields of a `Capacity`; none where the method has none, or where fewer than its `capacity_batch` examples would share.
  batch: examples, also those that have left. length: what they are padded to. The entries of the largest number of examples
  that is not above `batch` are read, and of these the first that is long enough.
  """
  fitting = [entry for entry in method.batch_capacities if entry[0] <= batch]
  if not fitting or batch < method.capacity_batch:
    return {}
  most = max(entry[0] for entry in fitting)
  own = [entry for entry in fitting if entry[0] == most]
  *_, slots, examples = next((entry for entry in own if length <= entry[1]), own[-1])
  return {'batch_rows': places(slots[layer], batch * length), 'examples': places(examples[layer], batch)}


def check_shares(key: str, shares: Sequence[float], depth: int) -> None:
  """Raises UserError unless there is one share a layer, above 0 and at most 1."""
  if len(shares) != depth or not all(0 < share <= 1 for share in shares):
    raise UserError(f'{key} needs {depth} shares above 0 and at most 1, one a layer, got {tuple(shares)}')


def check_budget(key: str, share: float, least: float) -> None:
  """Raises UserError unless a share of dense's MACs can be met where at least `least` of them is always left."""
  if not 0 < share <= 1:
    raise UserError(f'{key} is {share}; it is a share of the dense multiply-adds, above 0 and at most 1')
  if share < least:
    raise UserError(
      f'{key} is {share}, which this method cannot reach: whatever it removes, at least {least:.2f} is left. Ask for '
      'more, or take an encoder with more layers.'
    )


def check_capacities(capacities: Sequence[float], overflow_rate: float, depth: int) -> None:
  """Raises UserError for a method's fields `capacities` and `overflow_rate`."""
  if not 0 <= overflow_rate < 1:
    raise UserError(f'reducer.overflow_rate is {overflow_rate}; it is a share of examples, from 0 to below 1')
  if capacities:
    check_shares('reducer.capacities', capacities, depth)


def check_exits(layers: Sequence[int], depth: int, least: int = 0) -> None:
  """Raises UserError unless `least` exits or more stand behind different layers below the last, in their order."""
  if len(layers) < least or not all(1 <= l < depth for l in layers):
    raise UserError(f'reducer.layers is {layers}; an exit stands behind one of the layers 1 to {depth - 1}')
  if list(layers) != sorted(set(layers)):
    raise UserError(f'reducer.layers is {layers}; expected different layers in their order')


def check_batch_capacities(batch_capacities: Sequence[Any], capacity_batch: int, depth: int) -> None:
  """Raises UserError for a method's fields of these names."""
  if type(capacity_batch) is not int or capacity_batch < 0:
    raise UserError(
      f'reducer.capacity_batch is {capacity_batch}; it is how many examples share capacities, or 0 where each has its own'
    )
  if batch_capacities and not capacity_batch:
    raise UserError('reducer.batch_capacities go with capacity_batch, how many examples share them')
  for entry in batch_capacities:
    if not isinstance(entry, tuple) or len(entry) != 4:
      raise UserError(
        f'reducer.batch_capacities holds {entry!r}; expected entries (examples of a batch, length, shares of the slots by '
        'layer, shares of the examples by layer), as calibrate finds them'
      )
    for shares in entry[2:]:
      check_shares('reducer.batch_capacities', shares, depth)
