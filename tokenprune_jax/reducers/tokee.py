"""Exits for tagging: a sentence (SENTEE) or each word (TOKEE) stops at the first layer that is sure of it.

Li, Shao, Sun, Yan, Qiu, Huang: Accelerating BERT Inference for Sequence Labeling via Early-Exit, ACL 2021, arXiv
2105.13878. Behind each of `layers` stands a classifier of words; what it is unsure of (`word_exit`) decides:

  token     a word exits where the largest uncertainty of a window around it is below delta_l; its tag is then fixed and
            its pieces halt: they are no longer updated, and later layers attend to the state that they have
  sentence  all words exit where the largest (or mean) uncertainty of the sentence is below delta_l, or where
            the smallest probability of a best tag is above it

delta_l = threshold in the lower half of the encoder and `upper` times as much above, at most `cap` (a probability is the
same for all layers). An example leaves when all of its words have exited; [CLS] and [SEP] never halt before. While training
nothing exits, unless the layers at which words are to exit are given (control `exit_layers`). Words exit in numbers of their
own: `compact` gathers those that are left into capacities, found for `overflow_rate` when a stage ends: of each example, or
(`capacity_batch`) of a whole batch, which follow the mean, not the hardest. Where they are too small the surest words halt.

Two stages train it. `tags_joint`: all exits and the last classifier learn the tags, the i-th weighted by i. `tags_sampled`,
with the first stage as its teacher: each example draws a window and a delta, its words halt where the teacher would have
exited under them, and each layer learns the words that are still there, by how far their losses are from the teacher's.

Where tags mark spans, exits may keep to BIO or BIOES (`transitions`): under `mask` a word can only have tags that go with
those its neighbours have exited with; under `refuse` no word, or sentence, exits while its tags clash with those beside
them; or `both`. What the last classifier says is free: `task.constrained` decodes all at the end.

Controls of a request: `exit_threshold`, `exit_window` [b], in place of the fields.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import budget, decoding, schedule, word_exit
from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Dense, Dropout
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.reducers.early_exit import uncertainty
from tokenprune_jax.tasks import cross_entropy, weighted_mean
from tokenprune_jax.tokens import Tokens, empty_rows, live

READOUT = 'tokens'  # what the shared tests read out
TINY: dict = {'layers': (1, 2, 3), 'threshold': 0.95, 'upper': 1.02, 'window': 3}
NEUTRAL: dict = {'layers': (1, 2), 'threshold': 0.0}
CONTROLS = {'threshold': 'exit_threshold', 'window': 'exit_window'}
LEVELS = ('token', 'sentence')
POOLS = ('max', 'mean')
COPIED = ('all', 'first')
TRANSITIONS = ('free', 'mask', 'refuse', 'both')
REFUSING = ('refuse', 'both')
UNSAID = -1  # the tag of a word that no exit has told yet
BARRED = 30.0  # taken off the logit of a tag that cannot be
SURE_OF_ALL = 1.1  # a threshold above every uncertainty
LIMITS = {  # criterion -> thresholds at which nothing exits, and all does
  'entropy': (0.0, SURE_OF_ALL),
  'max_probability': (1.0, 0.0),
}
WINDOWS = (5, 7, 9, 11, 13, 15)  # that training samples
NEVER = 1 << 20  # a layer that no encoder has
DELTAS = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25)
SAMPLED_CAP = 0.5


def sentence_doubt(
  logits: Float[Array, 'b w c'], valid: Bool[Array, 'b w'], criterion: str, pool: str
) -> Float[Array, 'b']:
  """How unsure an exit is of a sentence: uncertainty, or 1 - the probability of the best tag, over its words."""
  doubt = uncertainty(logits) if criterion == 'entropy' else 1 - jax.nn.softmax(logits).max(-1)
  if pool == 'max':
    return jnp.where(valid, doubt, word_exit.SURE).max(-1)
  return (doubt * valid).sum(-1) / jnp.maximum(valid.sum(-1), 1)


# ------------------------------------------------------------------------------------------------- Objectives
def by_words(output: Any, batch: Mapping[str, Any]) -> tuple[Array, Array, Array]:
  """(logits of the exits and the last classifier [l b w c], tags [b w], weight [b w])."""
  word = jnp.where(batch['mask'], batch['words'], -1)
  first, count = word_exit.first_pieces(word), word.shape[1]
  last = word_exit.of_words(output.logits, first, word, count)
  tags = word_exit.of_words(batch['label'] + 1, first, word, count) - 1  # -1: no word, or one without a tag
  return (
    jnp.concatenate([output.exits.swapaxes(0, 1), last[None]]),
    tags,
    (tags >= 0) * batch['weight'][:, None],
  )


def tags_joint(apply, params, batch, rng, teacher):
  """All exits and the last classifier learn the tags, the later the heavier."""
  output = apply(params, batch, rng)
  logits, tags, weight = by_words(output, batch)
  losses = [weighted_mean(cross_entropy(layer, tags), weight) for layer in logits]
  loss = sum(i * loss for i, loss in enumerate(losses, 1)) / sum(range(len(losses) + 1))
  return loss + output.loss, {'joint_loss': loss, 'task_loss': losses[-1]}


def tags_sampled(apply, params, batch, rng, teacher):
  """Words halt where the teacher would have let them exit, under settings drawn for each example."""
  own, sampling = jax.random.split(rng)
  old = teacher({**batch, 'controls': {'exit_layers': jnp.full(batch['ids'].shape, NEVER)}})
  if old.exits is None:
    raise UserError(
      "the teacher of the objective 'tags_sampled' has no exits; name the stage that trained them"
    )
  before, tags, weight = by_words(old, batch)
  depth = old.trace.keys.shape[1]
  if len(before) != depth:
    raise UserError(
      f"the objective 'tags_sampled' needs an exit behind each layer: set reducer.layers to 1, …, {depth - 1}"
    )
  leaving = sampled_exits(sampling, uncertainty(before), word_exit.places(batch['words'], batch['mask']))
  output = apply(params, {**batch, 'controls': {'exit_layers': leaving}}, own)
  logits, _, _ = by_words(output, batch)
  losses = []
  for layer, (now, then) in enumerate(zip(logits, before), 1):
    apart = jnp.abs(cross_entropy(now, tags) - cross_entropy(then, tags))  # "flooding" at the teacher's loss
    losses.append(layer * weighted_mean(apart * (leaving >= layer), weight))
  loss = sum(losses) / sum(range(depth + 1))
  return loss + output.loss, {'sampled_loss': loss}


def sampled_exits(key: Array, doubt: Float[Array, 'l b w'], valid: Bool[Array, 'b w']) -> Int[Array, 'b w']:
  """The layer that each word exits at under a window and a delta drawn for its example; the last where nothing exits."""
  depth, rows = doubt.shape[:2]
  window, delta, exits = word_exit.sampled_settings(key, rows, WINDOWS, DELTAS)
  factors = jnp.asarray(word_exit.thresholds(1.0, depth, cap=word_exit.UPPER))[:, None]
  found = word_exit.exit_layers(doubt, valid, window, jnp.minimum(factors * delta, SAMPLED_CAP))
  return jnp.where(exits[:, None], found, depth)


OBJECTIVES = {'tags_joint': tags_joint, 'tags_sampled': tags_sampled}
TAUGHT = ('tags_sampled',)


# ------------------------------------------------------------------------------------------------ Calibration
def labelled(fields: Mapping[str, Any], labels: Sequence[str], scheme: str) -> dict[str, Any]:
  """The names of the tags, where exits are to keep to their scheme. Raises UserError where they mark no spans."""
  transitions = fields.get('transitions', Method.transitions)
  if transitions not in TRANSITIONS[1:]:
    return {}
  if scheme not in ('bio', 'bioes'):
    raise UserError(
      f'reducer.transitions is {transitions!r}, but the tags mark no spans: {", ".join(labels[:8])}; '
      f'set it to {Method.transitions!r}.'
    )
  return {'tags': tuple(labels)}


def idle(fields: Mapping[str, Any]) -> dict[str, float]:
  """Nothing exits."""
  return {'exit_threshold': LIMITS[fields.get('criterion', Method.criterion)][0]}


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """Capacities that hold all but `overflow_rate` of the validation sentences, where one is given."""
  return validation.calibrated(fields, lambda cost: cost.queries)


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The threshold at which validation costs it; capacities go with it."""
  found = threshold_for(fields, target, validation)
  controls = {'exit_threshold': found}
  return {'threshold': found, **validation.calibrated(fields, lambda cost: cost.queries, controls)}


def threshold_for(fields: Mapping[str, Any], target: float, validation: Any) -> float:
  """The threshold at which validation costs `target`. Raises UserError where none is that cheap."""
  dear, cheap = LIMITS[fields.get('criterion', Method.criterion)]

  def cost(threshold):
    return validation.mac_ratio({'exit_threshold': threshold})

  if target >= 1:  # exits that nothing takes cost a little more than that
    return dear
  if (least := cost(cheap)) > target:
    raise UserError(
      f'the budget is {target}, but on the validation split at least {least:.3f} of the dense multiply-adds are left, '
      'where all exit at the first layer with an exit'
      + (
        ', but words whose tags clash (reducer.transitions)' if fields.get('transitions') in REFUSING else ''
      )
      + '. Ask for more, or put an exit behind a lower layer.'
    )
  return budget.bisect(cost, target, dear, cheap)


# ----------------------------------------------------------------------------------------------------- Method
class Method(Reducer):
  """Tags words at the first layer that is sure of them."""

  layers: tuple[int, ...] = tuple(range(1, 12))  # with an exit, counted from 1
  level: str = 'token'  # or 'sentence'
  threshold: float = 0.1  # of the lower half: at 0 nothing exits, at 1.1 all (of a probability: at 1, at 0)
  upper: float = word_exit.UPPER  # factor of the threshold in the upper half
  cap: float = SURE_OF_ALL  # of the threshold, after that
  window: int = 15  # words, odd
  criterion: str = 'entropy'  # or 'max_probability', of a sentence
  pool: str = 'max'  # or 'mean', of a sentence
  copied: str = 'all'  # pieces of a word that halt; or 'first'
  keep_norm: bool = False  # a halted state goes through the output norm of each layer that it passes
  dropout: float = 0.3  # before an exit's classifier
  transitions: str = 'free'  # or 'mask', 'refuse', 'both': exits keep to the scheme of the tags
  tags: tuple[str, ...] = ()  # their names, as the run's data have them
  capacities: tuple[float, ...] = ()  # by layer, share of the padded length that words left are gathered into
  capacity_batch: int = 0  # sentences, or more, that share capacities; 0: each has its own
  batch_capacities: tuple[Any, ...] = ()  # these: as `costs.Validation.batch_capacities`
  # Share of sentences (or batches) that these may be too small for on validation; 0: none is found.
  overflow_rate: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    schedule.check_exits(self.layers, depth, least=1)
    for key, value, choices in (
      ('level', self.level, LEVELS),
      ('criterion', self.criterion, tuple(LIMITS)),
      ('pool', self.pool, POOLS),
      ('copied', self.copied, COPIED),
      ('transitions', self.transitions, TRANSITIONS),
    ):
      if value not in choices:
        raise UserError(f'reducer.{key} is {value!r}; choose one of {", ".join(choices)}')
    if self.level == 'token' and self.criterion != 'entropy':
      raise UserError("reducer.criterion goes with level='sentence'; words exit by entropy")
    if self.level == 'sentence' and self.masks:
      raise UserError(
        f"reducer.transitions is {self.transitions!r}, which goes with level='token': words of a sentence exit together; "
        "'refuse' goes with both"
      )
    schedule.check_capacities(self.capacities, self.overflow_rate, depth)
    schedule.check_batch_capacities(self.batch_capacities, self.capacity_batch, depth)
    if self.level == 'sentence' and (self.capacities or self.overflow_rate) and not self.capacity_batch:
      raise UserError(
        "reducer.capacities and overflow_rate go with level='token', or with capacity_batch: sentences exit as a whole"
      )
    if self.window < 1 or self.window % 2 != 1:
      raise UserError(f'reducer.window is {self.window}; expected an odd number of words, 1 or more')
    never, always = LIMITS[self.criterion]
    if not min(never, always) <= self.threshold <= max(never, always):
      raise UserError(
        f'reducer.threshold is {self.threshold}; expected a number between {never}, at which nothing exits, and {always}, '
        'at which all does'
      )
    for key, number, most in (
      ('upper', self.upper, math.inf),
      ('cap', self.cap, math.inf),
      ('dropout', self.dropout, 0.99),
    ):
      if not 0 <= number <= most:
        raise UserError(
          f'reducer.{key} is {number}; expected a number from 0' + f' to {most}' * (most < math.inf)
        )

  def setup(self):
    self.exit = {str(l): WordHead(self.dropout) for l in self.layers}

  @property
  def masks(self) -> bool:
    """Whether a word cannot have tags that those of its exited neighbours rule out."""
    return self.transitions in ('mask', 'both')

  @property
  def refuses(self) -> bool:
    """Whether words with tags that cannot stand side by side stay."""
    return self.transitions in REFUSING

  def readouts(self) -> tuple[str, ...]:
    return ('tokens',)

  def needs_words(self) -> bool:
    return True

  def exits(self) -> tuple[int, ...]:
    return self.layers

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, False) for l in self.layers)

  def shortens(self) -> bool:
    return False

  def separates(self) -> tuple[str, ...]:
    return ('rows',) if self.level == 'token' else ()

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    b, n = inputs.ids.shape[0], tokens.length
    exits, given = len(self.layers), inputs.controls
    upper = self.upper if self.criterion == 'entropy' else 1.0
    every = word_exit.thresholds(1.0, inputs.depth, math.inf, upper)
    factors = jnp.asarray([every[l - 1] for l in self.layers])
    delta = given.get('exit_threshold', jnp.full(b, self.threshold))
    assert inputs.words is not None  # `needs_words` asks for them
    word = jnp.where(inputs.mask, inputs.words, -1)
    memory = {
      'exit_limits': jnp.minimum(delta[:, None] * factors, self.cap),
      'exit_window': given.get('exit_window', jnp.full(b, float(self.window))),
      'exited': jnp.zeros(b, bool),
      'exits_run': jnp.zeros(b, jnp.int32),
      'word_valid': jnp.arange(n) <= word.max(-1, keepdims=True),
      'word_done': jnp.zeros((b, n), bool),
      'word_exit': jnp.zeros((b, n), jnp.int32),
      'answered': jnp.zeros((b, n), bool),
      'prediction': jnp.zeros((b, n, inputs.labels)),
      'logits': jnp.zeros((b, exits, n, inputs.labels)),
      'macs_exits': jnp.zeros(b),
    }
    if 'exit_layers' in given:
      memory['exit_layers'] = given['exit_layers']
    if self.transitions != 'free' and not (train or 'exit_layers' in given or self.is_initializing()):
      if len(self.tags) != inputs.labels:
        raise UserError(
          f'reducer.transitions is {self.transitions!r}, for which reducer.tags has to name the {inputs.labels} tags in '
          f'their order; it names {len(self.tags)}'
        )
      memory['word_tag'] = jnp.full((b, n), UNSAID)
    word = jnp.pad(word, ((0, 0), (0, tokens.added)), constant_values=-1)
    carry = {'word': word, 'first': word_exit.first_pieces(word)}
    if self.keep_norm:
      carry['halted'] = jnp.zeros_like(tokens.x)
    return tokens.replace(carry={**tokens.carry, **carry}), memory

  def now(
    self, logits: Float[Array, 'b w c'], valid: Bool[Array, 'b w'], memory: Memory, layer: int, train: bool
  ) -> Bool[Array, 'b w']:
    """The words that are sure at a layer, whether or not they have exited before. valid: places that hold a word."""
    if 'exit_layers' in memory:
      return valid & (memory['exit_layers'] <= layer)
    if train:
      return jnp.zeros_like(valid)
    place = jax.nn.one_hot(memory['exits_run'], len(self.layers))
    limit = (place * memory['exit_limits']).sum(-1, keepdims=True)
    if self.level == 'sentence':
      doubt = sentence_doubt(logits, valid, self.criterion, self.pool)[:, None]
      sure = doubt < (limit if self.criterion == 'entropy' else 1 - limit)
    else:
      sure = word_exit.window_max(uncertainty(logits), valid, memory['exit_window']) < limit
    return valid & sure & ~self.refused(memory)

  @property
  def illegal(self) -> Bool[Array, 'c c']:
    """[i, j]: tag j cannot follow tag i."""
    return jnp.asarray(decoding.illegal_transitions(self.tags))

  def barred(self, memory: Memory, fixed: Bool[Array, 'b w']) -> Float[Array, 'b w c']:
    """What is taken off the logits of words beside `fixed` ones."""
    if not self.masks:
      return jnp.zeros(memory['prediction'].shape)
    tag = memory['word_tag']
    return BARRED * word_exit.barred(tag, fixed & (tag != UNSAID), self.illegal)

  def refused(self, memory: Memory) -> Bool[Array, '#b #w']:
    """Words that have to stay, by the tags that all have by now."""
    if 'word_tag' not in memory or not self.refuses:
      return jnp.zeros((1, 1), bool)
    tag = memory['word_tag']
    found = word_exit.clashing(tag, tag != UNSAID, self.illegal)
    return found.any(-1, keepdims=True) if self.level == 'sentence' else found

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    word, done, length = tokens.carry['word'], memory['word_done'], memory['word_done'].shape[1]
    there = live(tokens) & (tokens.position >= 0)  # a place left over may hold what was dropped
    first = tokens.carry['first'] & there
    rooms = (self.capacities or self.batch_capacities) and not train and 'exit_layers' not in memory
    stopped = jnp.zeros_like(done)
    if rooms:  # words that there was none for keep what the exit before said of them
      ran = tokens.updated > 0
      stopped = word_exit.of_words(first & ~ran, first, word, length) & ~done
    if layer not in self.layers:
      if rooms:
        at = jnp.where(there & word_exit.to_pieces(stopped, word, False), tokens.position, length)
        memory = {**memory, 'answered': word_exit.put(memory['answered'], at, there)}
      return tokens, memory
    labels = memory['prediction'].shape[2]
    pieces = self.exit[str(layer)](tokens.x.astype(jnp.float32), labels, train)
    logits, valid = (word_exit.of_words(x, first, word, length) for x in (pieces, first))
    if 'word_tag' in memory:
      fixed = done | stopped
      off = self.barred(memory, fixed)
      logits, pieces = logits - off, pieces - word_exit.to_pieces(off, word, 0.0)
      memory = {**memory, 'word_tag': jnp.where(valid & ~fixed, logits.argmax(-1), memory['word_tag'])}
    sure = self.now(logits, valid, memory, layer, train)
    new = (sure | stopped) & ~done
    told = there & ran & ~word_exit.to_pieces(done, word, False) if rooms else None
    done |= new
    real, waited = memory['word_valid'], ~memory['exited']
    exited = (done | ~real).all(-1) & real.any(-1) & (not train)
    # Who leaves is answered: the pieces of its words and, when an example ends here, what belongs to none.
    leaving = there & word_exit.to_pieces(new, word, exited[:, None])
    at = jnp.where(leaving, tokens.position, length)
    said = at if told is None else jnp.where(told, tokens.position, length)
    place = jax.nn.one_hot(memory['exits_run'], len(self.layers))
    memory = {
      **memory,
      'exited': exited,
      'exits_run': memory['exits_run'] + 1,
      'word_done': done,
      'word_exit': jnp.where(new, layer, memory['word_exit']),
      'answered': word_exit.put(memory['answered'], at, leaving),
      'prediction': word_exit.put(memory['prediction'], said, pieces),
      'logits': memory['logits'] + place[..., None, None] * logits[:, None],
      'macs_exits': memory['macs_exits'] + (real & waited[:, None]).sum(-1) * tokens.x.shape[-1] * labels,
    }
    halted = word_exit.to_pieces(done, word, False) & (tokens.carry['first'] | (self.copied == 'all'))
    if self.level == 'token':
      tokens = tokens.replace(updated=tokens.updated * ~halted)
    if rooms:
      doubt = word_exit.to_pieces(uncertainty(logits), word, jnp.inf)  # of words; what belongs to none stays
      alone = schedule.places(self.capacities[layer], tokens.length) if self.capacities else None
      together = schedule.shared(self, layer, tokens.batch, tokens.length)
      tokens = tokens.replace(score=doubt, capacity=tokens.capacity._replace(rows=alone, **together))
    return (tokens if train else empty_rows(tokens, exited)), memory


class WordHead(nn.Module):
  """A linear classifier of every slot."""

  dropout: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d'], labels: int, train: bool) -> Float[Array, 'b n c']:
    x = Dropout(self.dropout)(x, train)
    return Dense(labels, 'float32', name='out')(x)
