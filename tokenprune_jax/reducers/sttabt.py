"""Attention back-tracking with Concrete masking (STTABT; Lee, Kim, Lee, Hwang, ICLR 2023).

A small encoder of the same depth and heads, the ApproxNet, runs first and predicts the attention maps of the big one. Walked
from the last layer to the first they give a plan: the tokens that each layer needs (`backtracking`). Layer l then attends to
the tokens of its own plan entry and updates those of the next, so that its attention is rectangular.

  distil  L_att + L_hid + L_emb + L_pred, the big encoder dense and frozen:
          L_att  = mean over layers, heads and real rows of KL(A || A of ApproxNet)
          L_hid  = mean over layers of |W_l h_l - h_l of the big one|^2, of their inputs;  L_emb the same of the embeddings
          L_pred = |softmax - softmax of ApproxNet|^2
  topk    each layer is asked for the ceil(keep t) best of t tokens
  soft    learned thresholds theta_l (Concrete masking); loss + theta_weight sum_l (theta_l - theta)^2
          + mask_weight (sigmoid(theta) - mean over layers of the share of tokens that are updated)^2
  hard    the same, with masks of 0 and 1; what validation and inference see in either

With `factor=1` the ApproxNet begins as a copy of the encoder: the oracle, which plans by the true attention of the dense
run and shows what a perfect ApproxNet would keep. It costs more than it saves.

Controls of a request: `keep` (topk), `shift` (added to all thresholds) [b], in place of the fields.

The read-out has to be [CLS]: a mean over all tokens needs all of them. Reconstructed here: the ApproxNet's classifier is a
tanh layer and a linear one; hidden states are compared at real tokens only (`padding=True`: at all, as the official code).
Soft masks go into the stream (seen and updated); with `soft_form='inside'` they also scale queries, keys, values and the
hidden layer, as in the official code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from tokenprune_jax import backtracking, budget, flops, schedule
from tokenprune_jax.approx_net import ApproxNet, Widths, distil, map_divergence, state_error
from tokenprune_jax.attention import Evidence, soft_weights
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.grouping import group_rows, in_groups
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tasks import weighted_mean
from tokenprune_jax.tokens import Capacity, Tokens

TINY: dict = {'mode': 'hard', 'factor': 4, 'theta': -1.5}
NEUTRAL: dict = {'mode': 'topk', 'keep': 1.0, 'factor': 4}
CONTROLS = {'keep': 'keep', 'shift': 'shift'}
READOUT = 'cls'  # what the shared tests read out
MODES = ('distil', 'topk', 'soft', 'hard')
MODE_ORDER = ('distil', 'soft', 'hard')
CACHED_SLOTS = 2048  # of an ApproxNet a quarter of MiniLM-L6, its maps and the walk: what stays in the cache
FURTHEST = 20.0  # of a shift: all tokens, or none but [CLS]


class Thresholds(nn.Module):
  """theta [L]."""

  @nn.compact
  def __call__(self, depth: int, start: float) -> Float[Array, ' L']:
    return self.param('theta', nn.initializers.constant(start), (depth,))


def regularisers(
  theta: Float[Array, ' L'], start: float, plan: Float[Array, 'b l n'], valid: Float[Array, 'b n']
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(sum over layers of (theta_l - start)^2, squared distance of the share that is updated from sigmoid(start))."""
  real = valid.sum(-1)
  share = weighted_mean(plan[:, 1:].sum(-1).mean(-1) / jnp.maximum(real, 1), real > 0)
  return ((theta - start) ** 2).sum(), (jax.nn.sigmoid(start) - share) ** 2


OBJECTIVES = {'distil_approx': distil}


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """The setting that meets the budget, where there is one; then capacities, where a rate is given."""
  if fields.get('mode') == 'distil':  # nothing leaves
    return {}
  if fields.get('target_macs'):
    return at_budget(fields, fields['target_macs'], validation)
  return validation.calibrated(fields, lambda cost: cost.keys)


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """topk: `keep`; else `shift`, as `budget` asks for them; capacities go with it."""
  topk = fields.get('mode', Method.mode) == 'topk'
  name, cheap, dear = ('keep', 1e-6, 1.0) if topk else ('shift', -FURTHEST, FURTHEST)

  def cost(value):
    return validation.mac_ratio({name: value})

  if (least := cost(cheap)) > target:
    raise UserError(
      f'the budget is {target}, but on the validation split at least {least:.3f} of the dense multiply-adds are left: '
      'what the ApproxNet costs, and what [CLS] needs. Ask for more, or take a larger reducer.factor.'
    )
  found = {name: budget.bisect(cost, target, dear, cheap)}
  return {**found, **validation.calibrated(fields, lambda cost: cost.keys, found)}


def asked(keep: Float[Array, 'b'], real: Int[Array, 'b']) -> Int[Array, 'b']:
  """How many tokens each layer is asked for: a share is rounded up as by `schedule.places`, here in float32."""
  return jnp.where(keep <= 1, jnp.ceil(keep * real * (1 - 1e-6)), jnp.minimum(keep, real)).astype(jnp.int32)


def gated(
  mask: Float[Array, 'b *h n'], planned: Float[Array, 'b n'], tokens: Tokens
) -> Float[Array, 'b *h n']:
  """What the plan says, in place of `mask`; what others took out stays out, slots that are no input tokens as they are."""
  position = tokens.position
  if mask.ndim == 3:
    planned, position = planned[:, None], position[:, None]
  return jnp.where(position < 0, mask, planned * (mask > 0))


def coming(plan: Float[Array, 'b l n']) -> Float[Array, 'b l n']:
  """The plan without its first entry, the last one twice: layers find theirs in one place, and share compiled programs."""
  return jnp.concatenate([plan[:, 1:], plan[:, -1:]], axis=1)


def walk_macs(config: EncoderConfig, topk: bool, rows: Num[Any, 'b L'], real: Num[Any, 'b']) -> Num[Any, 'b']:
  """Multiply-adds of the walk: of so many rows of each ApproxNet layer the scores again, and their weighted sums.

  Concrete masks also take the keys' covariance in each head, and each row's variance by it (`backtracking.standard`).
  """
  found, depth = rows.sum(-1) * real * (config.width + config.heads), rows.shape[-1]
  if topk or config.relative_buckets:
    return found
  return found + (rows.sum(-1) + depth * real) * config.width * (config.width // config.heads)


def least(fields: Mapping[str, Any], config: EncoderConfig, lengths: np.ndarray) -> float:
  """Share of dense's MACs where layers take in [CLS] alone: the ApproxNet's and the walk's. lengths [N]: of the texts."""
  narrow = Method(factor=fields.get('factor', Method.factor)).narrow(config)
  dense, own = (flops.dense_macs(each, 0, 'linear', lengths).sum() for each in (config, narrow))
  first, topk = np.ones_like(lengths), fields.get('mode', Method.mode) == 'topk'
  rows = np.stack([first if topk else lengths] * (config.depth - 1) + [first], axis=1)
  walked = walk_macs(narrow, topk, rows, lengths).sum()
  return float((own + walked + len(lengths) * config.depth * flops.block_macs(config, 1, 1, 1, 1)) / dense)


def inherits(fields: Mapping[str, Any]) -> str:
  """The parameters that an earlier stage has to have learned, as a regular expression."""
  whole = fields.get('factor', Method.factor) == 1  # an oracle copies the encoder
  return '' if whole or fields.get('mode', Method.mode) == 'distil' else 'approx/.*'


class Method(Reducer):
  """Runs each layer on the tokens that the layers above it will need."""

  mode: str = 'topk'  # or 'distil', 'soft', 'hard'
  factor: int = 4  # the ApproxNet's width and hidden layer are those of the encoder divided by it
  keep: float = 0.35  # topk: share of an example's tokens that each layer is asked for; above 1 a number
  theta: float = -1.0  # concrete: threshold that all layers start from; sigmoid(theta) is about what is kept
  shift: float = 0.0  # concrete: added to all thresholds as they were learned; what meets a budget
  # Share of dense's multiply-adds that a stage ends by finding keep or shift for; 0: none.
  target_macs: float = 0.0
  mix: float = 0.1  # how much of an output's own score goes into what it asks of the layer below
  theta_weight: float = 1e-3
  mask_weight: float = 1e-3
  soft_form: str = 'stream'  # or 'inside'
  padding: bool = False  # distil: states of padding are compared too
  capacities: tuple[float, ...] = ()  # by layer, share of the padded length that its tokens are gathered into
  # Share of examples that a capacity found on validation may be too small for; 0: none is.
  overflow_rate: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    if self.mode not in MODES:
      raise UserError(f'reducer.mode is {self.mode!r}; choose one of {", ".join(MODES)}')
    if self.soft_form not in ('stream', 'inside'):
      raise UserError(f'reducer.soft_form is {self.soft_form!r}; choose one of stream, inside')
    if not self.keep > 0:
      raise UserError(
        f'reducer.keep is {self.keep}; it is a share above 0 and at most 1, or a number of tokens'
      )
    if self.factor < 1:
      raise UserError(f'reducer.factor is {self.factor}; it divides the width, so choose 1 or more')
    if not 0 <= self.mix <= 1:
      raise UserError(f'reducer.mix is {self.mix}; expected a share from 0 to 1')
    if self.target_macs:
      schedule.check_budget('reducer.target_macs', self.target_macs, self.factor**-2)
    if self.theta_weight < 0 or self.mask_weight < 0:
      raise UserError(
        f'reducer.theta_weight is {self.theta_weight} and mask_weight is {self.mask_weight}; expected 0 or more'
      )
    schedule.check_capacities(self.capacities, self.overflow_rate, depth)

  def setup(self):
    self.approx = ApproxNet()
    if self.mode == 'distil':
      self.widths = Widths()
    if self.mode in ('soft', 'hard'):
      self.thresholds = Thresholds()

  def copies(self) -> dict[str, str]:
    return {'approx/encoder': 'encoder'} if self.factor == 1 else {}

  def readouts(self) -> tuple[str, ...]:
    return ('cls', 'mean') if self.mode == 'distil' else ('cls',)

  def soft(self) -> str:
    return self.soft_form if self.mode == 'soft' else ''

  def separates(self) -> tuple[str, ...]:
    return () if self.mode == 'distil' else ('rows',)

  def decides(self, depth: int) -> tuple[Half, ...]:
    return () if self.mode == 'distil' else tuple(Half(l, False) for l in range(depth))

  def reads(self, layer: int) -> tuple[str, ...]:
    return ('weights',) if self.mode == 'distil' else ()

  def controlled(self, inputs: Inputs, name: str) -> Float[Array, 'b']:
    """A setting by example: its control, or the field."""
    given = jnp.full(inputs.ids.shape[0], getattr(self, name))
    return inputs.controls.get(name, given).astype(jnp.float32)

  def narrow(self, config: EncoderConfig) -> EncoderConfig:
    """The ApproxNet's shape. Raises UserError where heads do not divide its width."""
    width = config.width // self.factor
    if config.width % self.factor or width % config.heads:
      raise UserError(
        f'reducer.factor is {self.factor}, but {config.heads} heads cannot share a width of {config.width} / {self.factor}'
      )
    return dataclasses.replace(
      config, width=width, hidden=max(config.hidden // self.factor, 1), dropout=0.0, attention_dropout=0.0,
      kernel='plain', joint=False, group_slots=0,
    )  # fmt: skip

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    config, depth = self.narrow(inputs.encoder), inputs.encoder.depth
    valid = inputs.mask.astype(jnp.float32)
    real = valid.sum(-1)
    if self.mode == 'distil':
      return tokens, self.compared(tokens.x, inputs, valid)
    theta = None if self.mode == 'topk' else self.thresholds(depth, self.theta)
    if theta is None:
      setting = self.controlled(inputs, 'keep')
    else:
      setting = theta + self.controlled(inputs, 'shift')[:, None]
    b, n = inputs.ids.shape
    rows = b if train else group_rows(inputs.encoder.group_slots, b, n, CACHED_SLOTS)
    given = {'ids': inputs.ids, 'mask': inputs.mask, 'types': inputs.types, 'setting': setting}
    plan, walked = in_groups(lambda own, given: own.planned(inputs, **given), self, given, rows)
    memory = {
      'macs_approx': flops.dense_macs(config, inputs.labels, 'linear', real),
      'macs_plan': walk_macs(config, self.mode == 'topk', walked, real),
    }
    if theta is not None and train:
      moved, share = regularisers(theta, self.theta, plan, valid)
      memory['loss'] = self.theta_weight * moved + self.mask_weight * share
    if theta is not None and not (train and self.mode == 'soft'):
      plan = (plan >= 0.5).astype(plan.dtype)
    plan = jnp.pad(plan, ((0, 0), (0, 0), (0, tokens.length - plan.shape[2])))
    return self.followed(tokens, plan, 0), {**memory, 'plan': coming(plan)}

  def compared(self, states: Float[Array, 'b n d'], inputs: Inputs, valid: Float[Array, 'b n']) -> Memory:
    """distil: what the big encoder's layers are compared with, and the loss of what it begins with."""
    depth = inputs.encoder.depth
    seen, logits = self.approx(self.narrow(inputs.encoder), inputs, 'scores')
    mine = self.widths(seen, inputs.encoder.width, depth)
    weight = valid.max(-1, keepdims=True) * jnp.ones_like(valid) if self.padding else valid
    loss = (
      state_error(mine['embedding'], states, weight) + state_error(mine['hidden_0'], states, weight) / depth
    )
    watched = {
      f'approx_{l}': soft_weights(seen[f'scores_{l}'], valid[:, None, None]) for l in range(1, depth + 1)
    }
    return {'loss': loss, 'logits': logits[:, None], 'weight': weight, 'valid': valid, **mine, **watched}

  def planned(
    self, inputs: Inputs, *, ids: Array, mask: Array, types: Array, setting: Float[Array, 'b *l']
  ) -> tuple[Float[Array, 'b l n'], Float[Array, 'b L']]:
    """(the plan, soft where thresholds are learned; rows of each layer's maps that its walk reads) of some examples.

    setting: `keep` [b], or thresholds [b l].
    """
    config = self.narrow(inputs.encoder)
    seen, _ = self.approx(config, inputs._replace(ids=ids, mask=mask, types=types, controls={}), 'terms')
    terms, real = [seen[f'terms_{l}'] for l in range(1, config.depth + 1)], mask.sum(-1)
    if self.mode == 'topk':
      layers = [backtracking.shares(each, mask) for each in terms]
      plan = backtracking.top_k(layers, mask, [asked(setting, real)] * config.depth, self.mix)
      return plan, plan[:, 1:].sum(-1)
    layers = [backtracking.standings(each, mask) for each in terms]
    plan, _ = backtracking.concrete(layers, mask, setting, self.mix)
    walked = jnp.broadcast_to(real[:, None].astype(jnp.float32), (len(real), config.depth))
    return plan, walked.at[:, -1].set(1)

  def followed(self, tokens: Tokens, plan: Float[Array, 'b l n'], layer: int) -> Tokens:
    """The stream behind a layer: what the next one takes in is seen, what the one after that takes in is updated.

    plan: its first entry is the next layer's.
    """
    depth = plan.shape[1] - 1
    place = jnp.maximum(tokens.position, 0)
    real = (tokens.size > 0) & (tokens.position >= 0)

    def of(entry):
      return jnp.take_along_axis(plan[:, entry], place, axis=1) * real

    rooms = [self.room(min(entry, depth), depth, tokens) for entry in (layer, layer + 1)]
    return tokens.replace(
      seen=gated(tokens.seen, of(0), tokens), updated=gated(tokens.updated, of(1), tokens),
      score=jnp.take_along_axis(plan.sum(1), place, axis=1) * real,
      # Concrete plans by the text's order: cut by score, MiniLM took 6% longer.
      capacity=Capacity(slots=rooms[0], keys=rooms[0], rows=rooms[1], by_score=self.mode == 'topk'),
    )  # fmt: skip

  def updated_alone(self, tokens: Tokens, depth: int, layer: int) -> Tokens:
    """The stream behind a layer's attention, where it is known how many are updated: the others are needed no more."""
    room = None if self.mode == 'soft' else self.room(layer, depth, tokens)
    if room is None:
      return tokens
    left = (tokens.updated > 0).astype(tokens.seen.dtype)
    seen = tokens.seen * (left if tokens.seen.ndim == 2 else left[:, None])
    return tokens.replace(seen=seen, capacity=tokens.capacity._replace(slots=room))

  def room(self, entry: int, depth: int, tokens: Tokens) -> int | None:
    """How many slots a plan's entry may hold, those that are no input tokens included; None: not known."""
    if entry == depth:
      return 1 + tokens.added
    if self.capacities:
      return schedule.places(self.capacities[entry], tokens.length) + tokens.added
    if self.mode != 'topk':
      return None
    asked = schedule.places(self.keep, tokens.length) if self.keep <= 1 else int(self.keep)
    # What each layer above asks for, and [CLS].
    return min(tokens.length, 1 + (depth - entry) * asked) + tokens.added

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    if self.mode != 'distil':
      return self.updated_alone(tokens, memory['plan'].shape[1] - 1, layer), memory
    assert evidence.weights is not None  # `reads` asked for it
    apart = map_divergence(evidence.weights, memory[f'approx_{layer}'], memory['valid'])
    return tokens, {**memory, 'loss': memory['loss'] + apart / self.layers(memory)}

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if self.mode != 'distil':
      plan = memory['plan']
      return self.followed(tokens, plan, layer), {**memory, 'plan': coming(plan)}
    if f'hidden_{layer}' not in memory:  # the last layer's output is not compared
      return tokens, memory
    error = state_error(memory[f'hidden_{layer}'], tokens.x, memory['weight'])
    return tokens, {**memory, 'loss': memory['loss'] + error / self.layers(memory)}

  def layers(self, memory: Memory) -> int:
    """The depth, from what is remembered of each layer."""
    return sum(name.startswith('hidden_') for name in memory)
