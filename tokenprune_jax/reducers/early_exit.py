"""Early exit: an example leaves at the first layer whose own classifier is sure of it.

  entropy          u_l = -sum_c p_c log p_c / log C < threshold          (FastBERT, arXiv 2004.02178; DeeBERT, 2004.12993)
  max_probability  max_c p_c > threshold                                 (Sledgehammer, arXiv 2004.07453)
  patience         `threshold` exits in a row have changed nothing       (PABEE, arXiv 2006.04152)

p = softmax(exit_l / T_l), T_l = 1 unless temperatures are given or fitted; the answer is that exit's. While training nobody
leaves, and objectives see the logits of all exits (`exit_heads`), the lowest first:

  exits          sum over exits of KL(last || exit): no labels needed; `exits_reverse`: KL(exit || last), as FastBERT's paper
  exits_labels   sum over exits of the cross-entropy (DeeBERT's second stage)
  exits_sum      the same with the last classifier (Sledgehammer)
  exits_joint    the mean of all cross-entropies, the i-th weighted by i

The first three are for a stage with train='reducer/.*', on frozen states. Where the encoder learns too, `own_segment` keeps
an exit's gradient to the layers behind the exit before it, so that exits do not pull at each other's layers (SWEET, arXiv
2306.02307). `fit_temperatures` ends a stage by finding T_l on the validation split.

`compact` computes every row, unless at least `capacity_batch` examples share what those left need: `batch_capacities`,
found for `overflow_rate` when a stage ends. Where it is too small the surest leave, with what their last exit said.

Control of a request: `exit_threshold` [b], in place of the field.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize_scalar

from tokenprune_jax import budget, exit_heads, flops, schedule
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer, read_out
from tokenprune_jax.tasks import classification_loss, divergence, weighted_mean
from tokenprune_jax.tokens import Tokens, empty_rows, live

TINY: dict = {'layers': (1, 2), 'threshold': 0.95}
NEUTRAL: dict = {'layers': (1, 2), 'threshold': 0.0}
CONTROLS = {'threshold': 'exit_threshold'}
NEVER = {'entropy': 0.0, 'max_probability': 1.0, 'patience': 1e6}  # thresholds at which nobody leaves
EASIEST = {'entropy': 1.0, 'max_probability': 0.0, 'patience': 1.0}
HOTTEST = 20.0  # a temperature, and its inverse


# --------------------------------------------------------------------------------------------------- Criteria
def uncertainty(logits: Float[Array, '*b c']) -> Float[Array, '*b']:
  """Entropy of the softmax as a share of the largest there is; from log-probabilities, so it is never NaN."""
  log_p = jax.nn.log_softmax(logits)
  return -(jnp.exp(log_p) * log_p).sum(-1) / jnp.log(float(logits.shape[-1]))


def is_sure(
  criterion: str, logits: Float[Array, 'b c'], threshold: Float[Array, 'b'], streak: Int[Array, 'b']
) -> Bool[Array, 'b']:
  """Whether an example may leave. streak: how many exits before this one have in a row said the same."""
  if criterion == 'entropy':
    return uncertainty(logits) < threshold
  if criterion == 'max_probability':
    return jax.nn.softmax(logits).max(-1) > threshold
  return streak >= threshold


# ------------------------------------------------------------------------------------------------- Objectives
def logits_of(apply, params, batch, rng):
  """(the model's output, logits [b e c] of the exits). Raises UserError where the stage has none."""
  output = apply(params, batch, rng)
  if output.exits is None:
    raise UserError('this objective trains exits, but the stage has none; name reducer.layers')
  return output, output.exits


def exits(apply, params, batch, rng, teacher, reverse=False):
  """Every exit agrees with the last classifier; the mean over the batch's rows by weight."""
  output, found = logits_of(apply, params, batch, rng)
  last = jax.lax.stop_gradient(output.logits)[:, None]
  apart = divergence(found, last) if reverse else divergence(last, found)  # [b e]
  loss = weighted_mean(apart.sum(-1), batch['weight'])
  return loss + output.loss, {'exit_loss': loss}


def exits_reverse(apply, params, batch, rng, teacher):
  """`exits` with the divergence that FastBERT's paper writes."""
  return exits(apply, params, batch, rng, teacher, reverse=True)


def label_losses(found, batch) -> list[Array]:
  """Cross-entropy of each exit."""
  return [classification_loss(found[:, i], batch) for i in range(found.shape[1])]


def exits_labels(apply, params, batch, rng, teacher):
  """Every exit learns the labels."""
  output, found = logits_of(apply, params, batch, rng)
  loss = sum(label_losses(found, batch))
  return loss + output.loss, {'exit_loss': loss}


def exits_sum(apply, params, batch, rng, teacher):
  """Every exit and the last classifier learn the labels."""
  output, found = logits_of(apply, params, batch, rng)
  loss, task = sum(label_losses(found, batch)), classification_loss(output.logits, batch)
  return loss + task + output.loss, {'exit_loss': loss, 'task_loss': task}


def exits_joint(apply, params, batch, rng, teacher):
  """The same, the later the heavier."""
  output, found = logits_of(apply, params, batch, rng)
  task = classification_loss(output.logits, batch)
  losses = [*label_losses(found, batch), task]
  loss = sum(i * loss for i, loss in enumerate(losses, 1)) / sum(range(len(losses) + 1))
  return loss + output.loss, {'joint_loss': loss, 'task_loss': task}


OBJECTIVES = {
  'exits': exits,
  'exits_reverse': exits_reverse,
  'exits_labels': exits_labels,
  'exits_sum': exits_sum,
  'exits_joint': exits_joint,
}


# ------------------------------------------------------------------------------------------------ Calibration
def idle(fields: Mapping[str, Any]) -> dict[str, float]:
  """Nobody leaves."""
  return {'exit_threshold': NEVER[fields.get('criterion', Method.criterion)]}


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """The temperatures, where they are to be fitted, or else capacities, where `overflow_rate` asks for them."""
  if not fields.get('fit_temperatures'):
    return validation.calibrated(fields, lambda cost: cost.queries)
  earlier = np.array(fields.get('temperatures') or 1.0)[..., None]  # the logits come divided by these
  found: list[tuple] = []
  for output, batch in validation.controlled(idle(fields)):
    logits, labels, weight = jax.device_get((output.exits, batch['label'], batch['weight']))
    found.append((logits[weight > 0] * earlier, labels[weight > 0]))
  logits, labels = (np.concatenate(parts) for parts in zip(*found))
  return {'temperatures': tuple(temperature(logits[:, i], labels) for i in range(logits.shape[1]))}


def temperature(logits: Float[np.ndarray, 'N c'], labels: Int[np.ndarray, ' N']) -> float:
  """The T at which softmax(logits / T) gives the labels the highest likelihood."""

  def loss(log_t):
    log_p = jax.nn.log_softmax(logits.astype(np.float64) / np.exp(log_t))
    return -float(np.asarray(log_p)[np.arange(len(labels)), labels].mean())

  edge = np.log(HOTTEST)
  return float(np.exp(minimize_scalar(loss, bounds=(-edge, edge), method='bounded').x))


def spent(output: Any, layers: tuple[int, ...], head: str, encoder: Any) -> Float[Array, 'b e']:
  """Multiply-adds of examples that nobody let leave, had they left at each exit, or (the last) at none."""
  trace, labels = output.trace, output.logits.shape[-1]
  blocks = flops.block_macs(encoder, *(getattr(trace, name) for name in flops.COUNTS)) + trace.evidence
  places = np.array([*layers, encoder.depth]) - 1
  own = exit_heads.macs(head, encoder.width, labels, trace.rows[:, places]).at[:, -1].set(0)  # [b e]
  exits = trace.overhead['exits'][:, None] * jnp.cumsum(own, axis=-1) / own.sum(-1, keepdims=True)
  rest = output.macs - blocks.sum(-1) - trace.overhead['exits']
  return rest[:, None] + jnp.cumsum(blocks, axis=-1)[:, places] + exits


def cost_by_threshold(fields: Mapping[str, Any], validation: Any) -> Callable[[float], float]:
  """Threshold -> multiply-adds as a share of dense's, from one pass in which nobody leaves."""
  criterion, layers, head = (fields.get(n, getattr(Method, n)) for n in ('criterion', 'layers', 'head'))
  found: list[tuple] = []
  for output, batch in validation.controlled(idle(fields)):
    said = uncertainty(output.exits) if criterion == 'entropy' else -jax.nn.softmax(output.exits).max(-1)
    rows = said, spent(output, layers, head, validation.encoder), output.dense_macs
    rows, weight = jax.device_get((rows, batch['weight']))
    found.append(tuple(values[weight > 0] for values in rows))
  doubt, macs, dense = (np.concatenate(values) for values in zip(*found))

  def cost(threshold):
    sure = doubt < (threshold if criterion == 'entropy' else -threshold)
    left = np.where(sure.any(-1), sure.argmax(-1), len(layers))
    return float(np.take_along_axis(macs, left[:, None], axis=1).sum() / dense.sum())

  return cost


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The threshold at which validation costs it; capacities go with it."""
  found = threshold_for(fields, target, validation)
  controls = {'exit_threshold': found}
  return {'threshold': found, **validation.calibrated(fields, lambda cost: cost.queries, controls)}


def threshold_for(fields: Mapping[str, Any], target: float, validation: Any) -> float:
  """The threshold at which validation costs `target`. Raises UserError where none is that cheap."""
  criterion = fields.get('criterion', Method.criterion)
  dear, cheap = NEVER[criterion], EASIEST[criterion]

  def by_passes(threshold):
    return validation.mac_ratio({'exit_threshold': threshold})

  asks_once = criterion != 'patience' and fields.get('layers', Method.layers)
  cost = cost_by_threshold(fields, validation) if asks_once else by_passes
  if (least := cost(cheap)) > target:
    raise UserError(
      f'the budget is {target}, but on the validation split at least {least:.3f} of the dense multiply-adds are left, '
      'where all leave at the first exit. Ask for more, or put an exit behind a lower layer.'
    )
  if criterion != 'patience':
    return budget.bisect(cost, target, dear, cheap)
  layers = len(fields.get('layers', Method.layers))
  return max((float(p) for p in range(1, layers + 1) if cost(float(p)) <= target), default=1.0)


# ----------------------------------------------------------------------------------------------------- Method
MODULES: dict[str, Any] = {
  'linear': exit_heads.Linear,
  'pooled': exit_heads.Pooled,
  'attention': exit_heads.Attention,
  'mixed': exit_heads.Mixed,
}


class Method(Reducer):
  """Answers an example at the first layer that is sure of it."""

  layers: tuple[int, ...] = tuple(range(1, 12))  # with an exit, counted from 1; (): none
  head: str = 'linear'  # or 'pooled', 'attention', 'mixed'
  criterion: str = 'entropy'  # or 'max_probability', 'patience'
  # Entropy: 0 nobody leaves, 1 all at the first exit; max_probability: the reverse; patience: exits.
  threshold: float = 0.1
  temperatures: tuple[float, ...] = ()  # of the exits' logits; (): 1
  fit_temperatures: bool = False
  own_segment: bool = False  # while training an exit's gradient ends at the exit before it
  capacity_batch: int = 0  # examples, or more, that share capacities; 0: none has any
  batch_capacities: tuple[Any, ...] = ()  # these: as `costs.Validation.batch_capacities`
  # Share of batches that they may be too small for on validation; 0: none is found.
  overflow_rate: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    schedule.check_exits(self.layers, depth)
    for key, value, choices in (
      ('head', self.head, exit_heads.HEADS),
      ('criterion', self.criterion, tuple(NEVER)),
    ):
      if value not in choices:
        raise UserError(f'reducer.{key} is {value!r}; choose one of {", ".join(choices)}')
    schedule.check_capacities((), self.overflow_rate, depth)
    schedule.check_batch_capacities(self.batch_capacities, self.capacity_batch, depth)
    if self.overflow_rate and not self.capacity_batch:
      raise UserError(
        'reducer.overflow_rate goes with capacity_batch, how many examples share capacities: one leaves as a whole'
      )
    if self.overflow_rate and self.fit_temperatures:
      raise UserError(
        'reducer.fit_temperatures changes who leaves: find capacities (overflow_rate) in a stage after it, or by calibrate'
      )
    if self.criterion == 'patience':
      if self.threshold < 1 or self.threshold != int(self.threshold):
        raise UserError(
          f'reducer.threshold is {self.threshold}; with patience it is a number of exits, 1 or more'
        )
    elif not 0 <= self.threshold <= 1:
      raise UserError(f'reducer.threshold is {self.threshold}; it is a share from 0 to 1')
    if self.temperatures and (len(self.temperatures) != len(self.layers) or min(self.temperatures) <= 0):
      raise UserError(
        f'reducer.temperatures is {self.temperatures}; expected {len(self.layers)} numbers above 0, one an exit'
      )

  def setup(self):
    self.exit = {str(l): MODULES[self.head]() for l in self.layers}
    if self.head == 'mixed':
      self.pooler = exit_heads.Pooler()

  def readouts(self) -> tuple[str, ...]:
    return ('cls', 'mean')

  def shortens(self) -> bool:
    return False

  def exits(self) -> tuple[int, ...]:
    return self.layers

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, False) for l in self.layers if l < depth)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    if not self.layers:
      return tokens, {}
    b, given = inputs.ids.shape[0], jnp.full(inputs.ids.shape[0], self.threshold)
    # Exits are counted, and what they say is put in its place: they then have equal code, and share compiled programs.
    memory = {
      'exit_threshold': inputs.controls.get('exit_threshold', given),
      'exited': jnp.zeros(b, bool),
      'prediction': jnp.zeros((b, inputs.labels)),
      'macs_exits': jnp.zeros(b),
      'logits': jnp.zeros((b, len(self.layers), inputs.labels)),
      'exits_run': jnp.zeros(b, jnp.int32),
      'exit_streak': jnp.zeros(b, jnp.int32),
      'exit_reads_first': jnp.full(b, inputs.reads_first),
    }
    if self.temperatures:
      memory['exit_temperatures'] = jnp.broadcast_to(jnp.asarray(self.temperatures), (b, len(self.layers)))
    if self.head == 'mixed':
      memory['exit_pooled'] = jnp.zeros((b, max(self.layers), tokens.x.shape[2]))
    if self.head in exit_heads.READS_FIRST:
      tokens = tokens.replace(protected=tokens.protected | (tokens.position == 0))
    return tokens, memory

  def answer(self, tokens: Tokens, memory: Memory, layer: int) -> Float[Array, 'b c']:
    """The logits of a layer's exit."""
    labels, head = memory['prediction'].shape[1], self.exit[str(layer)]
    x = tokens.x.astype(jnp.float32)
    if self.head == 'attention':
      return head(x, live(tokens), labels)
    if self.head == 'mixed':
      return head(memory['exit_pooled'][:, :layer], labels)
    if self.head == 'pooled':
      return head(x[:, 0], labels)
    first, mean = (read_out(tokens, how) for how in ('cls', 'mean'))
    return head(jnp.where(memory['exit_reads_first'][:, None], first, mean), labels)

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if not self.layers:
      return tokens, memory
    staying, width = ~memory['exited'], tokens.x.shape[2]
    before = memory['prediction']  # what the last exit said, of those who stay too
    shares = bool(self.batch_capacities) and not train
    if shares:  # examples that there was no room for leave with that
      stopped = staying & (live(tokens) & (tokens.updated == 0)).any(-1)
      memory = {**memory, 'exited': memory['exited'] | stopped}
    if layer > max(self.layers):
      return tokens, memory
    if self.head == 'mixed':
      state = self.pooler(tokens.x[:, 0].astype(jnp.float32))
      memory = {
        **memory,
        'exit_pooled': memory['exit_pooled'].at[:, layer - 1].set(state),
        'macs_exits': memory['macs_exits']
        + staying * exit_heads.mixed_macs(width, layer * (layer in self.layers)),
      }
    if layer not in self.layers:
      return tokens, memory
    place = jax.nn.one_hot(memory['exits_run'], len(self.layers))  # [b e]
    logits = self.answer(tokens, memory, layer)
    if self.temperatures:
      logits = logits / (place * memory['exit_temperatures']).sum(-1, keepdims=True)
    same = (memory['exits_run'] > 0) & (before.argmax(-1) == logits.argmax(-1))
    streak = jnp.where(same, memory['exit_streak'] + 1, 0)
    now = is_sure(self.criterion, logits, memory['exit_threshold'], streak) & (not train)
    own = exit_heads.macs(self.head, width, logits.shape[1], live(tokens).sum(-1).astype(jnp.float32))
    memory = {
      **memory,
      'prediction': jnp.where(memory['exited'][:, None], before, logits),
      'exited': memory['exited'] | now,
      'macs_exits': memory['macs_exits'] + jnp.where(staying, own, 0),
      'logits': memory['logits'] + place[..., None] * logits[:, None],
      'exits_run': memory['exits_run'] + 1,
      'exit_streak': streak,
    }
    if train and self.own_segment:
      tokens = tokens.replace(x=jax.lax.stop_gradient(tokens.x))
      if self.head == 'mixed':
        memory['exit_pooled'] = jax.lax.stop_gradient(memory['exit_pooled'])
      return tokens, memory
    if train:
      return tokens, memory
    if shares:
      doubt = jnp.broadcast_to(uncertainty(logits)[:, None], tokens.updated.shape)
      together = schedule.shared(self, layer, tokens.batch, tokens.length)
      tokens = tokens.replace(score=doubt, capacity=tokens.capacity._replace(by_score=False, **together))
    return empty_rows(tokens, memory['exited']), memory
