"""Absolute threshold on attention received: LTP's rule with a threshold that is given (arXiv 2107.00910, section 3).

  a_j   = mean over heads of sum_i A_hij: 1 where attention is uniform, whatever the length
  tau_l = 128 threshold (l - 1) / L, so that layer 1 keeps all tokens
  kept  a_j >= tau_l; the others leave between attention and feed-forward, and never return

LTP learns a threshold for each layer (ltp.py). Its code divides a_j by the padded length, 128 there: 128
stands in tau_l so that its thresholds carry over and a decision does not depend on padding. Reconstructed here: the
first token is protected, which LTP does not do, so that no example is left empty; where combining replaces a block, l
counts the blocks that run.

Control of a request: `threshold` [b], in place of the field.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax import budget, schedule
from tokenprune_jax.attention import Evidence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens, leave

TINY: dict = {'threshold': 0.015}
NEUTRAL: dict = {'threshold': 0.0}
CONTROLS = {'threshold': 'threshold'}
REFERENCE = 128  # tokens, the padded length of the official recipe


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """Capacities that hold all but `overflow_rate` of the validation examples, where one is given."""
  return validation.calibrated(fields, lambda cost: cost.rows)


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The threshold at which validation costs it; capacities go with it."""

  def cost(threshold):
    return validation.mac_ratio({'threshold': threshold})

  found = {'threshold': budget.from_zero(cost, target, fields.get('threshold', Method.threshold))}
  return {**found, **validation.calibrated(fields, lambda cost: cost.rows, found)}


def now(memory: Memory) -> Float[Array, 'b 1']:
  """The threshold of the layer that runs."""
  return jnp.take_along_axis(memory['thresholds'], memory['layers_run'][:, None], axis=1)


class Method(Reducer):
  """Removes tokens that receive too little attention."""

  threshold: float = 0.01  # of the last layer, in attention received per 128 tokens; 0: keep all
  capacities: tuple[float, ...] = ()  # by layer, share of the padded length that survivors are gathered into
  # Share of examples that a capacity found on validation may be too small for; 0: none is.
  overflow_rate: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    if not self.threshold >= 0:
      raise UserError(
        f'reducer.threshold is {self.threshold}; it is the attention a token must receive, 0 or more'
      )
    schedule.check_capacities(self.capacities, self.overflow_rate, depth)

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, True) for l in range(2, depth + 1))

  def reads(self, layer: int) -> tuple[str, ...]:
    return ('received',) if layer > 1 else ()

  def thresholds(self, inputs: Inputs) -> Float[Array, 'b L']:
    """tau by layer."""
    given = jnp.full(inputs.ids.shape[0], self.threshold)
    last = inputs.controls.get('threshold', given).astype(jnp.float32)
    return last[:, None] * (REFERENCE / inputs.depth) * jnp.arange(inputs.depth)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    # The layer's number is counted, not a constant: layers then have equal code, and share one compiled program.
    memory = {'thresholds': self.thresholds(inputs), 'layers_run': jnp.zeros(inputs.ids.shape[0], jnp.int32)}
    return tokens.replace(protected=tokens.protected | (tokens.position == 0)), memory

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    n, threshold = tokens.x.shape[1] - tokens.added, now(memory)
    memory = {**memory, 'layers_run': memory['layers_run'] + 1}
    if layer == 1 or n == 0:
      return tokens, memory
    assert evidence.received is not None  # `reads` asked for it
    score = evidence.received.mean(axis=1)[:, :n]
    stay = (tokens.updated[:, :n] > 0) & ((score >= threshold) | tokens.protected[:, :n])
    room = schedule.places(self.capacities[layer - 1], tokens.length) if self.capacities else None
    return leave(tokens, stay, score, 'gone', room), memory
