"""Searching for settings at which a method costs a stated share of dense's multiply-adds (`stages.at_budget`)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from tokenprune_jax import flops
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError


class Unreachable(UserError):
  """No setting is as cheap as a budget."""


CLOSE = 0.005  # to a budget: nothing is left to find
STEPS = 12  # bisections
FURTHEST = 1e4


def bisect(
  cost: Callable[[float], float], target: float, dear: float, cheap: float, steps: int = STEPS
) -> float:
  """A setting between `dear` and `cheap` where a monotone cost is about `target`; cost(cheap) is at most that."""
  for _ in range(steps):
    middle = (dear + cheap) / 2
    if abs(reached := cost(middle) - target) <= CLOSE / 4:
      return middle
    dear, cheap = (middle, cheap) if reached > 0 else (dear, middle)
  return cheap


def from_zero(cost: Callable[[float], float], target: float, start: float) -> float:
  """A setting at which a cost that falls from 0 on is about `target`; nothing is known of how far that is.

  start: tried first. Raises UserError where the cost stays above.
  """
  cost = functools.cache(cost)
  if abs(cost(start) - target) <= CLOSE:
    return start
  low, high = 0.0, max(start, 1e-3)
  while (reached := cost(high)) > target:
    low, high = high, 4 * high
    if high > FURTHEST:
      raise Unreachable(
        f'the budget is {target}, but on the validation split at least {reached:.3f} of the dense multiply-adds are left '
        'whatever the thresholds: protected tokens stay, and the first layer runs whole. Ask for more.'
      )
  return bisect(cost, target, low, high)


def of_counts(config: EncoderConfig, lengths: np.ndarray, left: np.ndarray) -> float:
  """MACs as a share of dense's where `left` [N l] of each example's `lengths` [N] tokens go on after each attention.

  l: the layers that run.
  """
  before = np.concatenate([lengths[:, None], left[:, :-1]], axis=1)
  total = flops.block_macs(config, before, before, before, left).sum()
  return float(total / flops.block_macs(config, *[lengths * 1.0] * 4).sum() / config.depth)


def fixed_counts(
  target: float, validation: Any, left: Callable[[np.ndarray, float], np.ndarray], most: float, now: float
) -> float:
  """The factor of a method's counts at which validation costs `target`.

  left(lengths [N], factor) -> [N L] tokens that go on after each layer's attention; at `most` all of them. now: the factor
  that the validated model runs at: what it costs there beside these counts alone, as by other methods of a chain or by
  what is read of the maps, is taken for a share that stays. Raises UserError where even a factor of 0 costs more.
  """
  lengths, (run, reached) = validation.lengths(), validation.measured({})

  def counted(factor):
    return of_counts(validation.encoder, lengths, left(lengths, factor)[:, run])

  share = reached / counted(now)

  def cost(factor):
    return share * counted(factor)

  if (least := cost(0.0)) > target:
    raise Unreachable(
      f'the budget is {target}, but with one token left after the first layer {least:.3f} of the dense '
      'multiply-adds remain: its projections and attention run whole. Ask for more.'
    )
  return bisect(cost, target, most, 0.0, steps=40)
