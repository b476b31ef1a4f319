"""Learned token pruning: thresholds on attention received, learned by layer (LTP; arXiv 2107.00910, section 3).

  a_j     = mean over heads of sum_i A_hij                      s_j = a_j / norm
  theta_l = scale (threshold (l - 1) / L + delta_l / 128)       delta learned, 0 at the start; layer 1 keeps all
  hard    M_j = [s_j >= max(theta_l, 1e-5)]                     the others leave, as in threshold.py
  soft    M_j = sigmoid((s_j - theta_l) / temperature)
  loss  + weight sum_l mean_j M_j                               or, where a budget is asked for,
        + weight (MACs / dense MACs - target_macs)^2            of hard masks that have the gradient of soft ones, which
                                                                scores get by the share `score_gradient`

Stages: the model is fine-tuned; mode 'soft' learns thresholds with it; mode 'hard' trains it further under fixed ones. What
validation and inference see is always hard. Scores of norm 'received' are in units of 1/128 of attention received, the
official code's own where a text is padded to 128; its `per_padded_token` follows the padding, its paper's `per_live_token`
prunes long inputs much harder. Reconstructed here: a soft mask goes into the stream (seen and updated), so that the hard one
is its limit; the official code multiplies the layer's output instead (`soft_form='output'`). [CLS] is protected (`protect`).

`first_layer` lets layer 1 prune too, and has l in place of l - 1: where layers are few, a budget is else spent below.

Ours is how a model is set below the budget it was trained for: `floor`, the lowest threshold of the first layer that prunes.
Trained thresholds leave that layer nearly whole and little behind the middle ones, so that a larger `scale` takes the little
that is left there; what leaves first is saved in all layers behind.

Controls of a request: `threshold`, `scale`, `floor` [b], in place of the fields.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tokenprune_jax import budget, schedule
from tokenprune_jax.attention import Evidence
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.reducers import threshold
from tokenprune_jax.tasks import weighted_mean
from tokenprune_jax.tokens import Tokens, leave

TINY: dict = {'threshold': 0.015}
NEUTRAL: dict = {'threshold': 0.0, 'scale': 0.0}
CONTROLS = {'threshold': 'threshold', 'scale': 'scale', 'floor': 'floor'}
MODE_ORDER = ('soft', 'hard')
NORMS = ('received', 'per_live_token', 'per_padded_token')
SOFT_FORMS = ('stream', 'output')
# Of the attention that a token receives on average: where a floor is looked for first.
HALF = 0.5 / threshold.REFERENCE
LOWEST = 1e-5  # of a hard threshold: a token that receives nothing leaves wherever a layer prunes


def hard_mask(score: Float[Array, 'b n'], theta: Float[Array, 'b 1']) -> Float[Array, 'b n']:
  """1 where a token stays."""
  return (score >= jnp.maximum(theta, LOWEST)).astype(score.dtype)


def soft_mask(
  score: Float[Array, 'b n'], theta: Float[Array, 'b 1'], temperature: float
) -> Float[Array, 'b n']:
  """How much a token stays."""
  return jax.nn.sigmoid((score - theta) / temperature)


def flatter(x: Float[Array, '*b'], share: float) -> Float[Array, '*b']:
  """x with that share of its gradient."""
  still = jax.lax.stop_gradient(x)
  return still + share * (x - still) if share else still


def straight_through(hard: Float[Array, '*b'], soft: Float[Array, '*b']) -> Float[Array, '*b']:
  """The value of `hard` with the gradient of `soft`."""
  return hard + (soft - jax.lax.stop_gradient(soft))


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """The scale at which validation meets the budget, where there is one; then capacities, where a rate is given."""
  found = scaled(fields, fields['target_macs'], costing(validation)) if fields.get('target_macs') else {}
  return {**found, **validation.calibrated(fields, lambda cost: cost.rows, found)}


def costing(validation: Any) -> Callable[[float, float], float]:
  """(scale, floor) -> what validation costs there, measured once."""
  return functools.cache(lambda scale, floor: validation.mac_ratio({'scale': scale, 'floor': floor}))


def scaled(
  fields: Mapping[str, Any], target: float, cost: Callable[[float, float], float]
) -> dict[str, float]:
  """The factor of all thresholds at which it costs that much, without a floor."""
  start = fields.get('scale', Method.scale)
  return {'scale': budget.from_zero(lambda scale: cost(scale, 0.0), target, start), 'floor': 0.0}


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The scale, as `budget` asks for it; below what a model was trained for the floor; capacities go with it."""
  scale, cost = fields.get('scale', Method.scale), costing(validation)
  if fields.get('target_macs') and target < cost(scale, 0.0) - budget.CLOSE:
    start = fields.get('floor') or HALF
    found = {'scale': scale, 'floor': budget.from_zero(lambda floor: cost(scale, floor), target, start)}
  else:
    found = scaled(fields, target, cost)
  return {**found, **validation.calibrated(fields, lambda cost: cost.rows, found)}


def least(fields: Mapping[str, Any], config: EncoderConfig, lengths: np.ndarray) -> float:
  """MACs as a share of dense's where one token is left behind each layer that prunes, of texts of these lengths [N]."""
  left = np.ones((len(lengths), config.depth))
  if not fields.get('first_layer', Method.first_layer):
    left[:, 0] = lengths
  return budget.of_counts(config, lengths, left)


class Deltas(nn.Module):
  """What is learned of the thresholds [L]; 1 is the attention that a token receives on average."""

  @nn.compact
  def __call__(self, depth: int) -> Float[Array, ' L']:
    return self.param('delta', nn.initializers.zeros, (depth,))


class Method(Reducer):
  """Removes tokens that receive less attention than their layer's learned threshold."""

  threshold: float = 0.01  # of the last layer at the start, by norm
  mode: str = 'hard'  # or 'soft', in which thresholds are learned
  temperature: float = 1e-3  # of the soft mask, in the unit of the scores
  weight: float = 0.1  # of the loss on masks, or on the budget
  # The budget, as a share of dense's multiply-adds; 0: none, masks are pushed down by `weight` alone.
  target_macs: float = 0.0
  # Under a budget, the share of the masks' gradient that the scores get too. They hang on the masks below, each a hundred
  # times as steep as its scores: over twelve layers the whole of it grows a millionfold.
  score_gradient: float = 0.3
  scale: float = 1.0  # factor of all thresholds: how a trained model meets its budget
  floor: float = 0.0  # lowest threshold of the first layer that prunes, in the unit of `threshold`; 0: none
  score_norm: str = 'received'  # or 'per_live_token', 'per_padded_token'
  soft_form: str = 'stream'  # or 'output'
  protect: bool = True  # [CLS], which the official code does not
  first_layer: bool = False  # whether the first layer prunes too
  capacities: tuple[float, ...] = ()  # by layer, share of the padded length that survivors are gathered into
  # Share of examples that a capacity found on validation may be too small for; 0: none is.
  overflow_rate: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    for key, low in (('threshold', 0), ('scale', 0), ('floor', 0), ('weight', 0)):
      if not getattr(self, key) >= low:
        raise UserError(f'reducer.{key} is {getattr(self, key)}; expected {low} or more')
    if not self.temperature > 0:
      raise UserError(f'reducer.temperature is {self.temperature}; expected a number above 0')
    if not 0 <= self.score_gradient <= 1:
      raise UserError(f'reducer.score_gradient is {self.score_gradient}; expected a share from 0 to 1')
    for key, value, choices in (
      ('mode', self.mode, ('hard', 'soft')),
      ('score_norm', self.score_norm, NORMS),
      ('soft_form', self.soft_form, SOFT_FORMS),
    ):
      if value not in choices:
        raise UserError(f'reducer.{key} is {value!r}; choose one of {", ".join(choices)}')
    if self.target_macs:
      # The attention of the first layer that prunes runs whole, and all below: a third of a layer's products or more.
      whole = 1 / 3 if self.first_layer else 1 + 1 / 3
      schedule.check_budget('reducer.target_macs', self.target_macs, whole / depth)
    schedule.check_capacities(self.capacities, self.overflow_rate, depth)

  def setup(self):
    self.learned = Deltas()

  def soft(self) -> str:
    return 'stream' if self.mode == 'soft' else ''  # the scores need a gradient under either form

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, True) for l in range(1 if self.first_layer else 2, depth + 1))

  def reads(self, layer: int) -> tuple[str, ...]:
    return ('received',) if layer > 1 or self.first_layer else ()

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    b = inputs.ids.shape[0]
    base, scale, floor = (
      inputs.controls.get(name, jnp.full(b, value)).astype(jnp.float32)[:, None]
      for name, value in (('threshold', self.threshold), ('scale', self.scale), ('floor', self.floor))
    )
    layer = jnp.arange(inputs.depth)
    rising = base * (layer + self.first_layer) / inputs.depth
    theta = scale * (rising + self.learned(inputs.depth) / threshold.REFERENCE)
    raised = (layer == (0 if self.first_layer else 1)) & (floor > 0)
    memory = {
      'thresholds': jnp.where(raised, jnp.maximum(theta, floor), theta),
      'layers_run': jnp.zeros(b, jnp.int32),
    }
    if self.protect:
      tokens = tokens.replace(protected=tokens.protected | (tokens.position == 0))
    if self.mode == 'soft':
      memory |= {'training': jnp.full(b, float(train)), 'real': inputs.mask.sum(-1).astype(jnp.float32)}
      if train and not self.target_macs:
        memory['loss'] = jnp.zeros(())
      if train and self.target_macs:
        memory |= {'mac_target': jnp.asarray(self.target_macs), 'mac_weight': jnp.asarray(self.weight)}
    return tokens, memory

  def norm(self, tokens: Tokens) -> Float[Array, '#b 1'] | float:
    """What attention received is divided by."""
    if self.score_norm == 'received':
      return float(threshold.REFERENCE)
    if self.score_norm == 'per_padded_token':
      return float(tokens.length)
    return jnp.maximum((tokens.updated > 0).sum(-1, keepdims=True), 1).astype(jnp.float32)

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    n, theta = tokens.x.shape[1] - tokens.added, threshold.now(memory)
    memory = {**memory, 'layers_run': memory['layers_run'] + 1}
    if n == 0 or (layer == 1 and not self.first_layer):
      return tokens, memory
    assert evidence.received is not None  # `reads` asked for it
    score, guarded = evidence.received.mean(axis=1)[:, :n] / self.norm(tokens), tokens.protected[:, :n]
    hard = jnp.where(guarded, 1, hard_mask(score, theta))
    if self.mode == 'hard':
      stay = (tokens.updated[:, :n] > 0) & (hard > 0)
      room = schedule.places(self.capacities[layer - 1], tokens.length) if self.capacities else None
      return leave(tokens, stay, score, 'gone', room), memory
    # What only scales an output may scale any.
    spared = guarded & (self.protect or self.soft_form == 'stream')
    if self.target_macs:
      score = flatter(score, self.score_gradient)
    soft = jnp.where(spared, 1, soft_mask(score, theta, self.temperature))
    live = (tokens.size[:, :n] > 0).astype(soft.dtype)
    if 'loss' in memory:
      share = (
        soft.mean(-1)
        if self.score_norm == 'per_padded_token'
        else (soft * live).sum(-1) / jnp.maximum(memory['real'], 1)
      )
      memory['loss'] += self.weight * weighted_mean(share, memory['real'] > 0)
    if self.target_macs:
      soft = straight_through(hard, soft)
    mask = jnp.where(memory['training'][:, None] > 0, soft, hard)
    return self.masked(tokens, memory, jnp.pad(mask, ((0, 0), (0, tokens.added)), constant_values=1))

  def masked(self, tokens: Tokens, memory: Memory, mask: Float[Array, 'b n']) -> tuple[Tokens, Memory]:
    """A soft mask in the stream; or, while that trains, in memory until the layer's output is there."""
    here = mask
    if self.soft_form == 'output':
      memory, here = {**memory, 'mask': mask}, jnp.where(memory['training'][:, None] > 0, 1, mask)
    seen = tokens.seen * (here if tokens.seen.ndim == 2 else here[:, None])
    return tokens.replace(seen=seen, updated=tokens.updated * here), memory

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if not train or 'mask' not in memory:
      return tokens, memory
    memory = dict(memory)
    return tokens.replace(x=tokens.x * memory.pop('mask')[..., None]), memory
