"""How many tokens stay, layer by layer, as counts and as shares of a length."""

import math
from collections.abc import Sequence
from fractions import Fraction

from tokenprune_jax.errors import UserError


def next_counts(ratio: float, length: int) -> tuple[int, ...]:
  """next_counts[t] = floor(ratio * t) for t = 0 … length, at least 1 where t >= 1; exact in decimals."""
  exact = Fraction(str(ratio))
  return tuple(max(math.floor(exact * t), min(t, 1)) for t in range(length + 1))


def places(share: float, length: int) -> int:
  """The capacity that holds `share` of a padded length: rounded up, at least 1."""
  return max(math.ceil(share * length - 1e-6), 1)


def check_shares(key: str, shares: Sequence[float], depth: int) -> None:
  """Raises UserError unless there is one share a layer, above 0 and at most 1."""
  if len(shares) != depth or not all(0 < share <= 1 for share in shares):
    raise UserError(f'{key} needs {depth} shares above 0 and at most 1, one a layer, got {tuple(shares)}')


def check_budget(key: str, share: float, depth: int) -> None:
  """Raises UserError unless a share of dense's MACs can be met by removal that begins after the first layer.

  Layer 1 runs whole and so does the attention of layer 2, a third of its products or more.
  """
  if not 0 < share <= 1:
    raise UserError(f'{key} is {share}; it is a share of the dense multiply-adds, above 0 and at most 1')
  least = (1 + 1 / 3) / depth
  if share < least:
    raise UserError(
      f'{key} is {share}, which no threshold reaches: with {depth} layers, of which the first keeps all tokens, at least '
      f'{least:.2f} is left. Ask for more, or take an encoder with more layers.'
    )


def check_capacities(capacities: Sequence[float], overflow_rate: float, depth: int) -> None:
  """Raises UserError for a method's fields `capacities` and `overflow_rate`."""
  if not 0 <= overflow_rate < 1:
    raise UserError(f'reducer.overflow_rate is {overflow_rate}; it is a share of examples, from 0 to below 1')
  if capacities:
    check_shares('reducer.capacities', capacities, depth)
