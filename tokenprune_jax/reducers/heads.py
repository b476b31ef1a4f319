"""Cascade head pruning: the heads that put out least leave, and never return (SpAtten, arXiv 2012.09852).

  importance  I_h += sum over queries and features of |output of head h|, over all layers so far
  counts      k_l = round(share_l heads), at least 1
  kept        the k_l most important of those left run in the layers above

A mask and a count: a head that left attends to nothing, and its products are taken off the multiply-adds (`pruned_heads`, an
item below 0), but they are computed all the same. Heads differ from example to example; removing them would need weights
gathered for each. In a chain with `topk`, score `cumulative`, it is SpAtten's cascade of tokens and heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokenprune_jax import schedule
from tokenprune_jax.attention import Evidence
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens, highest

TINY: dict = {'shares': (1.0, 0.75, 0.5, 0.25)}
NEUTRAL: dict = {}


def kept_heads(importance: Float[Array, 'b h'], left: Bool[Array, 'b h'], count: int) -> Bool[Array, 'b h']:
  """The `count` most important of the heads that are left."""
  return left & highest(jnp.where(left, importance, -jnp.inf), count)


class Method(Reducer):
  """Masks a fixed number of heads above each layer."""

  shares: tuple[float, ...] = ()  # by layer, share of the heads that go on; (): all

  def check(self, depth: int, heads: int) -> None:
    if not self.shares:
      return
    schedule.check_shares('reducer.shares', self.shares, depth)
    if any(low > high for high, low in zip(self.shares, self.shares[1:])):
      raise UserError(f'reducer.shares is {self.shares}; a head that left never returns, so they cannot rise')

  def reads(self, layer: int) -> tuple[str, ...]:
    return ('magnitude',) if self.shares else ()

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    if not self.shares:
      return tokens, {}
    b, heads = inputs.ids.shape[0], inputs.encoder.heads
    memory = {'heads_sum': jnp.zeros((b, heads)), 'heads_left': jnp.ones((b, heads), bool)}
    return tokens, {**memory, 'macs_pruned_heads': jnp.zeros(b)}

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    if not self.shares:
      return tokens, memory
    assert evidence.magnitude is not None and evidence.projected is not None  # `reads` asked for the former
    importance, left = memory['heads_sum'] + evidence.magnitude, memory['heads_left']
    heads, width = left.shape[1], tokens.x.shape[2]
    spared = (1 - left.mean(-1)) * 2 * width**2 * evidence.projected
    left = kept_heads(importance, left, max(round(self.shares[layer - 1] * heads), 1))
    seen = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None]
    return tokens.replace(seen=seen * left[:, :, None]), {
      **memory,
      'heads_sum': importance,
      'heads_left': left,
      'macs_pruned_heads': memory['macs_pruned_heads'] - spared,
    }
