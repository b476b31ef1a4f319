"""Exits for tagging: a sentence (SENTEE) or each word (TOKEE) stops at the first layer that is sure of it.

Li, Shao, Sun, Yan, Qiu, Huang: Accelerating BERT Inference for Sequence Labeling via Early-Exit, ACL 2021, arXiv
2105.13878. Behind each of `layers` stands a classifier of words; what it is unsure of (`word_exit`) decides:

  token     a word exits where the largest uncertainty of a window around it is below delta_l; its tag is then fixed and
            its pieces halt: they are no longer updated, and later layers attend to the state that they have
  sentence  all words exit where the largest (or mean) uncertainty of the sentence is below delta_l, or where
            the smallest probability of a best tag is above it

delta_l = threshold in the lower half of the encoder and `upper` times as much above, at most `cap`. An example leaves when
all of its words have exited; [CLS] and [SEP] never halt before. While training nothing exits, unless the layers at which
words are to exit are given (control `exit_layers`).

Two stages train it. `tags_joint`: all exits and the last classifier learn the tags, the i-th weighted by i. `tags_sampled`,
with the first stage as its teacher: each example draws a window and a delta, its words halt where the teacher would have
exited under them, and each layer learns the words that are still there, by how far their losses are from the teacher's.

Controls of a request: `exit_threshold`, `exit_window` [b], in place of the fields.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import budget, word_exit
from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Dense
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.reducers.early_exit import uncertainty
from tokenprune_jax.tasks import cross_entropy, weighted_mean
from tokenprune_jax.tokens import Tokens, empty_rows

TINY: dict = {'layers': (1, 2), 'threshold': 0.9, 'window': 3}
NEUTRAL: dict = {'layers': (1, 2), 'threshold': 0.0}
LEVELS = ('token', 'sentence')
CRITERIA = ('entropy', 'max_probability')
POOLS = ('max', 'mean')
COPIED = ('all', 'first')
SURE_OF_ALL = 1.1  # a threshold above every uncertainty
WINDOWS = (5, 7, 9, 11, 13, 15)  # that training samples
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
  word = batch['words']
  first, count = word_exit.first_pieces(word), word.shape[1]
  last = word_exit.of_words(output.logits, first, word, count)
  tags = word_exit.of_words(batch['label'] + 1, first, word, count) - 1  # -1: no word, or one without a tag
  return (
    jnp.concatenate([output.exits.swapaxes(0, 1), last[None]]),
    tags,
    (tags >= 0) * batch['weight'][:, None],
  )


def tags_joint(apply, params, batch, rng, teacher):
  """All exits learn the tags, the later the heavier."""
  output = apply(params, batch, rng)
  logits, tags, weight = by_words(output, batch)
  losses = [weighted_mean(cross_entropy(layer, tags), weight) for layer in logits]
  loss = sum(i * loss for i, loss in enumerate(losses, 1)) / sum(range(len(losses) + 1))
  return loss + output.loss, {'joint_loss': loss, 'task_loss': losses[-1]}


def tags_sampled(apply, params, batch, rng, teacher):
  """Words halt where the teacher would have let them exit, under settings drawn for each example."""
  if teacher is None:
    raise UserError(
      "the objective 'tags_sampled' needs a teacher: the stage that was trained by 'tags_joint'."
    )
  own, sampling = jax.random.split(rng)
  old = teacher({**batch, 'controls': {'exit_threshold': jnp.zeros(len(batch['ids']))}})
  before, tags, weight = by_words(old, batch)
  depth = old.trace.keys.shape[1]
  if len(before) != depth:
    raise UserError(
      f"the objective 'tags_sampled' needs an exit behind each layer: set reducer.layers to 1, …, {depth - 1}"
    )
  leaving = sampled_exits(sampling, uncertainty(before), tags >= 0)
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
  factors = jnp.asarray(word_exit.thresholds(1.0, depth))[:, None]
  found = word_exit.exit_layers(doubt, valid, window, jnp.minimum(factors * delta, SAMPLED_CAP))
  return jnp.where(exits[:, None], found, depth)


OBJECTIVES = {'tags_joint': tags_joint, 'tags_sampled': tags_sampled}


# ------------------------------------------------------------------------------------------------ Calibration
def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The threshold at which validation costs it."""

  def cost(threshold):
    return validation.mac_ratio({'exit_threshold': threshold})

  if (least := cost(SURE_OF_ALL)) > target:
    raise UserError(
      f'the budget is {target}, but on the validation split at least {least:.3f} of the dense multiply-adds are left, '
      'where all exit at the first layer with an exit. Ask for more, or put an exit behind a lower layer.'
    )
  return {'threshold': budget.bisect(cost, target, 0.0, SURE_OF_ALL)}


# ----------------------------------------------------------------------------------------------------- Method
class Method(Reducer):
  """Tags words at the first layer that is sure of them."""

  layers: tuple[int, ...] = tuple(range(1, 12))  # with an exit, counted from 1
  level: str = 'token'  # or 'sentence'
  threshold: float = 0.1  # of the lower half: 0 nothing exits, above 1 all does
  upper: float = word_exit.UPPER  # factor of the threshold in the upper half
  cap: float = 1.1  # of the threshold, after that
  window: int = 15  # words, odd
  criterion: str = 'entropy'  # or 'max_probability', of a sentence
  pool: str = 'max'  # or 'mean', of a sentence
  copied: str = 'all'  # pieces of a word that halt; or 'first'
  keep_norm: bool = False  # a halted state goes through the output norm of each layer that it passes
  dropout: float = 0.3  # before an exit's classifier

  def check(self, depth: int, heads: int) -> None:
    if not self.layers or not all(1 <= l < depth for l in self.layers):
      raise UserError(
        f'reducer.layers is {self.layers}; an exit stands behind one of the layers 1 to {depth - 1}'
      )
    for key, value, choices in (
      ('level', self.level, LEVELS),
      ('criterion', self.criterion, CRITERIA),
      ('pool', self.pool, POOLS),
      ('copied', self.copied, COPIED),
    ):
      if value not in choices:
        raise UserError(f'reducer.{key} is {value!r}; choose one of {", ".join(choices)}')
    if self.level == 'token' and self.criterion != 'entropy':
      raise UserError("reducer.criterion goes with level='sentence'; words exit by entropy")
    if self.window < 1 or self.window % 2 == 0:
      raise UserError(f'reducer.window is {self.window}; expected an odd number of words, 1 or more')
    for key, value in (('threshold', self.threshold), ('upper', self.upper), ('cap', self.cap)):
      if value < 0:
        raise UserError(f'reducer.{key} is {value}; expected a number from 0')

  def setup(self):
    self.exit = {str(l): WordHead(self.dropout) for l in self.layers}

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, False) for l in self.layers)

  def separates(self) -> bool:
    return self.level == 'token'

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    b, n = inputs.ids.shape
    exits, given = len(self.layers), inputs.controls
    factors = jnp.asarray([1.0 if l <= inputs.depth // 2 else self.upper for l in self.layers])
    delta = given.get('exit_threshold', jnp.full(b, self.threshold))
    memory = {
      'exit_limits': jnp.minimum(delta[:, None] * factors, self.cap),
      'exit_window': given.get('exit_window', jnp.full(b, float(self.window))),
      'exited': jnp.zeros(b, bool),
      'exits_run': jnp.zeros(b, jnp.int32),
      'word_valid': jnp.arange(n) <= inputs.words.max(-1, keepdims=True),
      'word_done': jnp.zeros((b, n), bool),
      'word_exit': jnp.zeros((b, n), jnp.int32),
      'answered': jnp.zeros((b, n), bool),
      'prediction': jnp.zeros((b, n, inputs.labels)),
      'logits': jnp.zeros((b, exits, n, inputs.labels)),
      'macs_exits': jnp.zeros(b),
    }
    if 'exit_layers' in given:
      memory['exit_layers'] = given['exit_layers']
    carry = {'word': inputs.words, 'first': word_exit.first_pieces(inputs.words)}
    if self.keep_norm:
      carry['halted'] = jnp.zeros_like(tokens.x)
    return tokens.replace(carry={**tokens.carry, **carry}), memory

  def now(self, logits: Float[Array, 'b w c'], memory: Memory, layer: int, train: bool) -> Bool[Array, 'b w']:
    """The words that are sure at a layer, whether or not they have exited before."""
    valid = memory['word_valid']
    if 'exit_layers' in memory:
      return valid & (memory['exit_layers'] <= layer)
    if train:
      return jnp.zeros_like(valid)
    place = jax.nn.one_hot(memory['exits_run'], len(self.layers))
    limit = (place * memory['exit_limits']).sum(-1, keepdims=True)
    if self.level == 'sentence':
      doubt = sentence_doubt(logits, valid, self.criterion, self.pool)[:, None]
      return valid & (doubt < (limit if self.criterion == 'entropy' else 1 - limit))
    return valid & (word_exit.window_max(uncertainty(logits), valid, memory['exit_window']) < limit)

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if layer not in self.layers:
      return tokens, memory
    word, done = tokens.carry['word'], memory['word_done']
    first = tokens.carry['first'] & (tokens.position >= 0)  # a place left over may hold what was dropped
    length, labels = memory['prediction'].shape[1:]
    pieces = self.exit[str(layer)](tokens.x.astype(jnp.float32), labels, train)
    logits = word_exit.of_words(pieces, first, word, length)
    new = self.now(logits, memory, layer, train) & ~done
    done |= new
    rows = jnp.arange(done.shape[0])[:, None]
    answered = jnp.where(first & word_exit.to_pieces(new, word, False), tokens.position, length)
    place = jax.nn.one_hot(memory['exits_run'], len(self.layers))
    asked = (memory['word_valid'] & ~memory['exited'][:, None]).sum(-1)
    memory = {
      **memory,
      'exited': (done | ~memory['word_valid']).all(-1) & (not train),
      'exits_run': memory['exits_run'] + 1,
      'word_done': done,
      'word_exit': jnp.where(new, layer, memory['word_exit']),
      'answered': memory['answered'].at[rows, answered].set(True, mode='drop'),
      'prediction': memory['prediction'].at[rows, answered].set(pieces, mode='drop'),
      'logits': memory['logits'] + place[..., None, None] * logits[:, None],
      'macs_exits': memory['macs_exits'] + asked * tokens.x.shape[-1] * labels,
    }
    halted = word_exit.to_pieces(done, word, False) & (first | (self.copied == 'all'))
    if self.level == 'token':
      tokens = tokens.replace(updated=tokens.updated * ~halted)
    return (tokens if train else empty_rows(tokens, memory['exited'])), memory


class WordHead(nn.Module):
  """A linear classifier of every slot."""

  dropout: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d'], labels: int, train: bool) -> Float[Array, 'b n c']:
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return Dense(labels, 'float32', name='out')(x)
