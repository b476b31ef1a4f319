"""A few examples at a time, so that what is worked on stays in the cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

CACHED_SLOTS = 1024  # on a CPU: a group's states, attention maps and hidden layer then stay in the cache


def group_rows(group_slots: int, b: int, n: int, cached: int = CACHED_SLOTS) -> int:
  """Of b examples of n slots, how many are worked on at a time at inference: a divisor of b.

  group_slots: how many slots; 0: all; -1: by default `cached` on one CPU device, and all elsewhere: a batch that is spread
  over devices must not be walked through in order.
  """
  limit = group_slots
  if limit < 0:
    limit = cached if on_one_cpu() else 0
  return largest_divisor(b, limit // n) or 1 if limit else b


def on_one_cpu() -> bool:
  """Whether programs run on one CPU device: only there is walking through a batch in order a gain."""
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def largest_divisor(count: int, limit: int) -> int:
  """The largest divisor of `count` that is at most `limit`; 0 where there is none."""
  return max((part for part in range(1, count + 1) if count % part == 0 and part <= limit), default=0)


def in_groups(function: Callable, module: nn.Module, given: Any, rows: int):
  """function(module, given) -> arrays with leading axis b, on `rows` examples at a time. given: arrays like that."""
  if rows == len(jax.tree.leaves(given)[0]):
    return function(module, given)

  def body(module, carry, part):
    return carry, function(module, part)

  walk = nn.scan(body, variable_broadcast='params', split_rngs={'params': False})
  _, found = walk(module, (), jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), given))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
