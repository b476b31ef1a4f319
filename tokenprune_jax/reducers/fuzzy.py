"""Fuzzy token pruning: keys and values of tokens that receive little attention leave (arXiv 2406.01283, section 3.2).

  importance  S_hj = sum_i A_hij over queries i, per head h (the mean differs by a factor, which nothing below sees)
  memberships Imp = clip((S - a) / (b - a), 0, 1), Unimp = 1 - Imp, with a, b the quartiles of S pooled over heads
  sets        I = {Imp >= alpha_important}, U = {Unimp >= alpha_unimportant}; candidates to prune = not (I and not U)
  counts      t_1 = n, t_{l+1} = floor(ratio * t_l): scores of layer l decide the keys and values of layer l + 1

Queries are never pruned: every token keeps its row until it is combined. A pruned key never returns.

The paper's selection rule can be read in three ways; which one is a field. Reconstructed here, as the paper leaves it
open: quartiles are pooled over heads and real tokens of one example; `protect` continues with the nominal counts; at
least one token is kept; counts follow each example's real length, capacities the padded one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import lottery
from tokenprune_jax.attention import Evidence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.schedule import check_capacities, next_counts, places
from tokenprune_jax.tokens import Tokens, highest, leave

TINY: dict = {'ratio': 0.7, 'rule': 'protect'}
NEUTRAL: dict = {'ratio': 1.0, 'rule': 'rank'}
READINGS = ('rank', 'protect', 'complement')  # of the paper's rule
SIMPLE = ('random', 'entropy', 'magnitude', 'norm')  # top-t by another score: the baselines
FIXED = ('rank', *SIMPLE)  # rules whose counts are the schedule's


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """Capacities that hold all but `overflow_rate` of the validation examples, where one is given."""
  return validation.calibrated(fields, lambda cost: cost.widest)


def quantile(scores: Float[Array, '*b n'], valid: Bool[Array, '*b n'], share: float) -> Float[Array, '*b 1']:
  """Quantile over the valid entries with linear interpolation, as numpy's default; 0 where none is valid."""
  ordered = jnp.sort(jnp.where(valid, scores, jnp.inf), axis=-1)
  place = share * jnp.maximum(valid.sum(-1, keepdims=True) - 1, 0).astype(scores.dtype)
  low = jnp.floor(place).astype(jnp.int32)
  high = jnp.ceil(place).astype(jnp.int32)
  below, above = (jnp.take_along_axis(ordered, at, axis=-1) for at in (low, high))
  value = below + (above - below) * (place - low)
  return jnp.where(valid.any(-1, keepdims=True), value, 0)


def important(
  scores: Float[Array, 'b h n'], valid: Bool[Array, 'b h n'], alpha_important: float, alpha_unimportant: float
) -> Bool[Array, 'b h n']:
  """I and not U (Eq. 6-7): the tokens that no ratio may prune. All of them where the quartiles coincide."""
  pooled, allowed = scores.reshape(scores.shape[0], -1), valid.reshape(valid.shape[0], -1)
  low = quantile(pooled, allowed, 0.25)[..., None]
  high = quantile(pooled, allowed, 0.75)[..., None]
  width = high - low
  importance = jnp.clip((scores - low) / jnp.where(width > 0, width, 1), 0, 1)
  unimportance = 1 - importance
  chosen = (importance >= alpha_important) & ~(unimportance >= alpha_unimportant)
  return valid & (chosen | (width <= 0))


def keep(
  rule: str,
  scores: Float[Array, 'b h n'],
  valid: Bool[Array, 'b h n'],
  core: Bool[Array, 'b h n'],
  counts: Int[Array, 'b'],
  table: Int[Array, 't'],
) -> Bool[Array, 'b h n']:
  """The keys that stay. valid: keys so far; core: `important`; counts: t_{l+1}; table: `next_counts`.

  protect: drops the candidates ranked below t_{l+1}. complement: keeps the core and floor(ratio * c) of c candidates.
  Any other rule: the t_{l+1} best.
  """
  if rule == 'complement':
    candidates = valid & ~core
    best = highest(jnp.where(candidates, scores, -jnp.inf), table[candidates.sum(-1, keepdims=True)])
    return core | (candidates & best)
  top = valid & highest(jnp.where(valid, scores, -jnp.inf), counts[:, None, None])
  return top | core if rule == 'protect' else top


class Method(Reducer):
  """Fuzzy token pruning, and simpler rules under the same schedule."""

  ratio: float = 0.9  # p: share of the keys that the next layer keeps
  rule: str = 'protect'  # READINGS or SIMPLE
  head_shared: bool = False  # all heads keep the same tokens, by mean attention: then projections shrink too
  alpha_important: float = 0.01
  alpha_unimportant: float = 0.9
  capacities: tuple[
    float, ...
  ] = ()  # per layer: share of the input's slots, where the rule does not fix the count
  # Share of examples that a capacity found on validation may be too small for; 0: none is.
  overflow_rate: float = 0.0
  seed: int = 0  # of the rule `random`

  def check(self, depth: int, heads: int) -> None:
    if not 0 < self.ratio <= 1:
      raise UserError(
        f'reducer.ratio is {self.ratio}; it is the share of tokens kept per layer, above 0 and at most 1'
      )
    for name in ('alpha_important', 'alpha_unimportant'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f'reducer.{name} is {getattr(self, name)}; an alpha-cut lies between 0 and 1')
    if self.rule not in READINGS + SIMPLE:
      raise UserError(f'reducer.rule is {self.rule!r}; choose one of {", ".join(READINGS + SIMPLE)}')
    check_capacities(self.capacities, self.overflow_rate, depth)

  def decides(self, depth: int) -> tuple[Half, ...]:
    fixed = self.rule in FIXED or self.ratio == 1
    return () if fixed else tuple(Half(l, True) for l in range(1, depth))

  def separates(self) -> tuple[str, ...]:
    return ('keys',)

  def reads(self, layer: int) -> tuple[str, ...]:
    if self.ratio == 1:
      return ()
    return {'entropy': ('entropy',), 'random': (), 'norm': ()}.get(self.rule, ('received',))

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    memory = {'fuzzy_count': inputs.mask.sum(-1, dtype=jnp.int32)}
    if self.rule == 'random':
      memory['fuzzy_seed'] = lottery.seeds(inputs.ids, inputs.mask, self.seed)
    return tokens, memory

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    n = tokens.x.shape[1] - tokens.added
    if n == 0 or self.ratio == 1:  # everything is combined, or nothing is to be pruned
      return tokens, memory
    scores = self.scores(tokens, memory, evidence, layer)[..., :n]
    seen = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None]
    valid = jnp.broadcast_to(seen[..., :n] > 0, scores.shape)
    table = jnp.asarray(next_counts(self.ratio, tokens.length))
    counts = table[memory['fuzzy_count']]
    core = important(scores, valid, self.alpha_important, self.alpha_unimportant)
    stay = keep(
      self.rule, jnp.where(tokens.protected[:, None, :n], jnp.inf, scores), valid, core, counts, table
    )
    stay |= valid & tokens.protected[:, None, :n]
    if stay.shape[1] == 1:
      stay, scores = stay[:, 0], scores[:, 0]
    assert evidence.layers is not None
    room = None if tokens.moved else self.capacity(layer, evidence.layers, n)
    return leave(tokens, stay, scores, 'unseen', room), {**memory, 'fuzzy_count': counts}

  def scores(self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int) -> Float[Array, 'b h n']:
    """What tokens are ranked by; h = 1 where all heads keep the same."""
    if self.rule == 'random':
      return lottery.draw(memory['fuzzy_seed'], layer, tokens.position)[:, None]
    if self.rule == 'norm':
      return jnp.linalg.norm(jax.lax.stop_gradient(tokens.x), axis=-1)[:, None]
    score = evidence.entropy if self.rule == 'entropy' else evidence.received
    assert score is not None  # `reads` asked for it
    return score.mean(1, keepdims=True) if self.head_shared or self.rule in SIMPLE else score

  def capacity(self, layer: int, run: int, n: int) -> int | None:
    """Input keys of one head in the next layer; None where the rule does not say. run: how many layers have."""
    if self.rule in FIXED:
      count = n
      for _ in range(run):
        count = next_counts(self.ratio, n)[count]
      return count
    return places(self.capacities[layer], n) if layer < len(self.capacities) else None
