"""Top-k schedule: after the attention of layer l the best share of an example's tokens goes on (as in arXiv 2001.08950).

  score    a_j = mean over heads of sum_i A_hij (received), or of A_h0j (cls: the attention of [CLS]);
           the sum of the former over all layers so far (cumulative: SpAtten, arXiv 2012.09852); or random, the floor
  counts   k_l = floor(share_l * t) of the example's t real tokens, at least 1; or rounded to the nearest, as LTP's code has
           SpAtten's cascade
  kept     the k_l best of those left; the others leave between attention and feed-forward, and never return

PoWER-BERT learns its counts (power.py); here they are given: `shares` by layer, or `ratio`, the share of each
layer's tokens that the next one gets (share_l = ratio^l). What happens to a token that leaves is a field.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import budget, lottery, schedule
from tokenprune_jax.attention import Evidence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tokens import LEAVERS, Tokens, highest, leave, scatter_to_input

TINY: dict = {'shares': (0.8, 0.6, 0.6, 0.3)}
NEUTRAL: dict = {'ratio': 1.0}
SCORES = {
  'received': 'received',
  'cls': 'first_row',
  'cumulative': 'received',
  'random': '',
}  # -> the evidence it reads


ROUNDINGS = ('down', 'nearest')


def best(
  score: Float[Array, 'b n'], left: Bool[Array, 'b n'], protected: Bool[Array, 'b n'], counts: Int[Array, 'b']
) -> Bool[Array, 'b n']:
  """The `counts` best of the slots that are `left`; protected ones are the first to be chosen."""
  ranked = jnp.where(left, jnp.where(protected, jnp.inf, score), -jnp.inf)
  return left & (highest(ranked, counts[:, None]) | protected)


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The shares times one factor, as `budget` asks for it. Raises UserError where tokens stay in part."""
  method = Method(**{key: value for key, value in fields.items() if key != 'name'})
  if method.leavers != 'gone':
    raise UserError(f"a budget needs reducer.leavers='gone', but it is {method.leavers!r}")
  given = np.array([method.share(l) for l in range(1, validation.encoder.depth + 1)])

  def shares(factor):
    return np.clip(np.round(factor * given, 6), 1e-6, 1.0)

  whole = np.round if method.rounding == 'nearest' else np.floor

  def left(lengths, factor):
    return np.maximum(whole(lengths[:, None] * shares(factor)), 1)

  found = budget.fixed_counts(target, validation, left, 1 / given.min(), 1.0)
  return {'shares': tuple(shares(found).tolist())}


class Method(Reducer):
  """Keeps a fixed number of tokens after each layer."""

  ratio: float = 0.9  # share of a layer's tokens that the next one gets
  shares: tuple[
    float, ...
  ] = ()  # by layer, share of the example's tokens that stay: takes the place of `ratio`
  score: str = 'received'  # or 'cls', 'cumulative', 'random'
  seed: int = 0  # of the score `random`
  rounding: str = 'down'  # of counts, or 'nearest'
  # Or 'frozen': still attended to, no longer updated; 'unseen': updated, not attended to.
  leavers: str = 'gone'

  def check(self, depth: int, heads: int) -> None:
    if not 0 < self.ratio <= 1:
      raise UserError(f'reducer.ratio is {self.ratio}; it is the share kept per layer, above 0 and at most 1')
    if self.shares:
      schedule.check_shares('reducer.shares', self.shares, depth)
      if any(low > high for high, low in zip(self.shares, self.shares[1:])):
        raise UserError(
          f'reducer.shares is {self.shares}; a token that left never returns, so they cannot rise'
        )
    for key, value, choices in (
      ('score', self.score, SCORES),
      ('leavers', self.leavers, LEAVERS),
      ('rounding', self.rounding, ROUNDINGS),
    ):
      if value not in choices:
        raise UserError(f'reducer.{key} is {value!r}; choose one of {", ".join(choices)}')

  def decides(self, depth: int) -> tuple[Half, ...]:
    falls = [l for l in range(1, depth + 1) if self.share(l) < (self.share(l - 1) if l > 1 else 1)]
    return tuple(Half(l, True) for l in falls)

  def separates(self) -> tuple[str, ...]:
    return {'gone': (), 'frozen': ('rows',), 'unseen': ('keys',)}[self.leavers]

  def reads(self, layer: int) -> tuple[str, ...]:
    if self.score == 'random' or (self.share(layer) == 1 and self.score != 'cumulative'):
      return ()
    return (SCORES[self.score],)

  def share(self, layer: int) -> float:
    """Share of an example's tokens that stay after a layer."""
    return self.shares[layer - 1] if self.shares else max(round(self.ratio**layer, 9), 1e-9)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    first = tokens.position == 0  # it is asked for its attention
    tokens = tokens.replace(protected=tokens.protected | first) if self.score == 'cls' else tokens
    memory = {'topk_length': inputs.mask.sum(-1, dtype=jnp.int32)}
    if self.score == 'random':
      memory['topk_seed'] = lottery.seeds(inputs.ids, inputs.mask, self.seed)
    if self.score == 'cumulative':
      memory['topk_sum'] = jnp.zeros((inputs.ids.shape[0], tokens.length))
    return tokens, memory

  def scored(self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int) -> tuple[Array, Memory]:
    """(score [b n] of the input slots, memory)."""
    n = tokens.x.shape[1] - tokens.added
    position = tokens.position[:, :n]
    if self.score == 'random':
      return lottery.draw(memory['topk_seed'], layer, position), memory
    found = getattr(evidence, SCORES[self.score]).mean(axis=1)[:, :n]
    if self.score != 'cumulative':
      return found, memory
    total = memory['topk_sum'] + scatter_to_input(found, position, tokens.length)
    score = jnp.take_along_axis(total, jnp.maximum(position, 0), axis=1)
    return score, {**memory, 'topk_sum': total}

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    n = tokens.x.shape[1] - tokens.added
    if n == 0 or (self.share(layer) == 1 and self.score != 'cumulative'):
      return tokens, memory
    score, memory = self.scored(tokens, memory, evidence, layer)
    if self.share(layer) == 1:
      return tokens, memory
    counts = schedule.next_counts(self.share(layer), tokens.length, self.rounding)
    seen = tokens.seen if tokens.seen.ndim == 2 else tokens.seen.max(axis=1)
    left = (seen if self.leavers == 'unseen' else tokens.updated) > 0
    wanted = jnp.asarray(counts)[memory['topk_length']]
    stay = best(score, left[:, :n], tokens.protected[:, :n], wanted)
    return leave(tokens, stay, score, self.leavers, counts[tokens.length]), memory
