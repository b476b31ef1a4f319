"""Attention back-tracking: which tokens each layer needs, walked from the last layer to the first (STTABT, ICLR 2023).

A plan says for each layer which tokens it takes in; the last entry is what is read out, [CLS] alone. A token that a layer
needs is needed by all layers below it, so plans shrink from the first layer to the last. Shapes: b batch, n tokens, h heads;
maps are lists by layer, the first layer first.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax.attention import over_heads
from tokenprune_jax.tokens import descending_rank

EPSILON = 1e-7
TEMPERATURE = 0.1
MIX = 0.1  # how much of an output's own score goes into what it asks of the layer below


def class_token(valid: Bool[Array, 'b n']) -> Float[Array, 'b n']:
  """What the read-out needs."""
  return (jnp.arange(valid.shape[1])[None] == 0) * jnp.ones(valid.shape)


def top_k(
  maps: Sequence[Float[Array, 'b n n']],
  valid: Bool[Array, 'b n'],
  counts: Sequence[Int[Array, 'b']],
  mix: float = MIX,
) -> Float[Array, 'b l n']:
  """The plan that asks each layer for the `counts` best keys of what the layer above needs, and for that itself.

  s_j = mean over needed i of A_ij (mix w_i + 1 - mix);  I = TopK(s) and all needed;  w_j = s_j / sum over I of s

  maps: attention, mean over heads. Returns masks of 0 and 1, l = layers + 1.
  """
  needed = impact = class_token(valid)
  plan = [needed]
  for weights, count in zip(reversed(maps), reversed(counts)):
    asked = needed * (mix * impact + 1 - mix)
    score = jnp.einsum('bi,bij->bj', asked, weights) / needed.sum(-1, keepdims=True)
    best = descending_rank(jnp.where(valid, score, -jnp.inf)) < count[:, None]
    needed = jnp.where((best & valid) | (needed > 0), 1.0, 0.0)
    impact = score * needed
    impact = impact / jnp.maximum(impact.sum(-1, keepdims=True), EPSILON)
    plan.append(needed)
  return jnp.stack(plan[::-1], axis=1)


def standing(scores: Float[Array, 'b h n n'], valid: Bool[Array, 'b n']) -> Float[Array, 'b n n']:
  """How a key stands among its row's, in [0, 1]: the normal CDF of standardised scores before softmax, mean over heads."""
  keys = valid[:, None, None, :].astype(scores.dtype)
  count = jnp.maximum(keys.sum(-1, keepdims=True), 1)
  mean = (scores * keys).sum(-1, keepdims=True) / count
  variance = (((scores - mean) * keys) ** 2).sum(-1, keepdims=True) / count
  deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1)) * (variance > 0)  # at 0 the root has no gradient
  return over_heads(jax.scipy.stats.norm.cdf((scores - mean) / (deviation + EPSILON)) * keys)


def logit(p: Float[Array, '*b']) -> Float[Array, '*b']:
  """log p / (1 - p), finite at 0 and 1."""
  return jnp.log(p + EPSILON) - jnp.log(1 - p + EPSILON)


def concrete(
  maps: Sequence[Float[Array, 'b n n']],
  valid: Bool[Array, 'b n'],
  theta: Float[Array, '*#b l'],
  mix: float = MIX,
) -> tuple[Float[Array, 'b m n'], Float[Array, 'b l n']]:
  """The soft plan of learned thresholds theta [layers]; a token is kept where it is at least 0.5.

  v_j = sum_i M_i U_ij (mix u_i + 1 - mix) / sum_i M_i, M and u those of the layer above;  u_j = 0.01 + 0.99 v_j / max v
  m_j = sigmoid((theta + logit u_j) / temperature), M_j = max(m_j, M_j of the layer above)

  Where what is above already keeps it, or u_j >= sigmoid(-theta). maps: U, by `standing`. Returns (plan, m = layers + 1; u by
  layer).
  """
  alive = valid.astype(jnp.float32)
  mask = score = class_token(valid)
  plan, ranks = [mask], []
  for layer in reversed(range(len(maps))):
    asked = mask * (mix * score + 1 - mix)
    found = jnp.einsum('bi,bij->bj', asked, maps[layer]) / (mask.sum(-1, keepdims=True) + EPSILON)
    top = (found * alive).max(-1, keepdims=True)
    score = (0.01 + 0.99 * found / (top + EPSILON)) * alive
    mask = jnp.maximum(jax.nn.sigmoid((theta[..., layer, None] + logit(score)) / TEMPERATURE) * alive, mask)
    plan.append(mask)
    ranks.append(score)
  return jnp.stack(plan[::-1], axis=1), jnp.stack(ranks[::-1], axis=1)
