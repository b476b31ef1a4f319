"""Attention back-tracking: which tokens each layer needs, walked from the last layer to the first (STTABT, ICLR 2023).

A plan says for each layer which tokens it takes in; the last entry is what is read out, [CLS] alone. A token that a layer
needs is needed by all layers below it, so plans shrink from the first layer to the last. Shapes: b batch, n tokens, h heads.

A walk asks each layer's map A (the mean over heads) what it gives to every key: asked [b q] of its first q queries ->
sum_i asked_i A_ij [b n]. What answers is a `Layer`; lists of them are by layer, the first layer first.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax.attention import Terms, by_passes, hard_parts, scaled_scores
from tokenprune_jax.grouping import on_one_cpu
from tokenprune_jax.tokens import highest, select

Layer = Callable[[Float[Array, 'b q']], Float[Array, 'b n']]
EPSILON = 1e-7
TEMPERATURE = 0.1
ROWS = 64  # of attention maps, that are made at a time
MIX = 0.1  # how much of an output's own score goes into what it asks of the layer below


def class_token(valid: Bool[Array, 'b n']) -> Float[Array, 'b n']:
  """What the read-out needs."""
  return (jnp.arange(valid.shape[1])[None] == 0) * jnp.ones(valid.shape)


def shares(terms: Terms, valid: Bool[Array, 'b n']) -> Layer:
  """Answers from attention weights, without gradient: a few rows at a time; on one CPU device those that are asked for."""

  def given(states, bias, asked):
    query, key, valid = states
    exps, share = hard_parts(scaled_scores(query, key, bias), valid[..., None, :])
    return jnp.einsum('bhqk,bhq->bhk', exps, share[..., 0] * asked[:, None]).mean(1)

  def answer(asked):
    (query, key, seen), bias = jax.lax.stop_gradient(rows_of(terms, valid, asked.shape[1]))
    size = min(ROWS, asked.shape[1])
    place, *_ = select(asked > 0, asked.shape[1])
    place, count = jnp.pad(place, ((0, 0), (0, -place.shape[1] % size))), (asked > 0).sum(-1)

    def step(i, total):
      at = jax.lax.dynamic_slice_in_dim(place, i * size, size, axis=1)
      left = i * size + jnp.arange(size) < count[:, None]
      here = jnp.where(left, jnp.take_along_axis(asked, at, axis=1), 0)
      rows = jnp.take_along_axis(query, at[:, None, :, None], axis=2)
      own = None if bias is None else jnp.take_along_axis(bias, at[:, None, :, None], axis=2)
      return total + given((rows, key, seen), own, here)

    # How far depends on the batch: where that is spread over devices these would have to agree on it.
    steps = -(-count.max() // size) if on_one_cpu() else place.shape[1] // size
    return jax.lax.fori_loop(0, steps, step, jnp.zeros(seen[:, 0].shape))

  return answer


def standings(terms: Terms, valid: Bool[Array, 'b n']) -> Layer:
  """Answers from how keys stand among their row's, in [0, 1]: the normal CDF of standardised scores before softmax.

  Made when asked, a few heads at a time.
  """

  def given(states, bias, asked):
    query, key, valid = states
    if bias is None:
      above = standard(query, key, valid)
    else:
      above = standardised(scaled_scores(query, key, bias), valid[..., None, :])
    # The normal CDF is 0.5 + 0.5 erf; as `norm.cdf`, good to the last tail, it takes four times as long. The barrier
    # keeps XLA from making one loop of it and the product, which a CPU takes longer for.
    sides = jax.lax.optimization_barrier(jax.lax.erf(above * 0.5**0.5))
    heads = jnp.broadcast_to(asked[:, None], sides.shape[:3])
    return 0.5 * valid * (jnp.einsum('bhqk,bhq->bhk', sides, heads) + heads.sum(-1, keepdims=True))

  return lambda asked: by_passes(given, *rows_of(terms, valid, asked.shape[1]), asked).mean(1)


def rows_of(
  terms: Terms, valid: Bool[Array, 'b n'], count: int
) -> tuple[tuple[Array, Array, Array], Array | None]:
  """What the first rows' scores are made of: ((query, key, valid [b 1 n]), bias)."""
  bias = None if terms.bias is None else terms.bias[:, :, :count]
  return (terms.query[:, :, :count], terms.key, valid[:, None].astype(jnp.float32)), bias


def standardised(scores: Float[Array, 'b h q n'], keys: Float[Array, 'b #h 1 n']) -> Float[Array, 'b h q n']:
  """Scores less their row's mean, over its deviation; 0 where all are the same. keys: 1 at those that count."""
  count = jnp.maximum(keys.sum(-1, keepdims=True), 1)
  mean = (scores * keys).sum(-1, keepdims=True) / count
  return (scores - mean) / deviation((((scores - mean) * keys) ** 2).sum(-1, keepdims=True) / count)


def standard(
  query: Float[Array, 'b h q e'], key: Float[Array, 'b h n e'], valid: Float[Array, 'b #h n']
) -> Float[Array, 'b h q n']:
  """`standardised` of the products of queries and keys, by one more product instead of passes over them.

  With the keys' mean m and covariance C, scores q k have the mean q m and the variance q C q.
  """
  query, keys = query * query.shape[-1] ** -0.5, valid[..., None]
  count = jnp.maximum(keys.sum(2, keepdims=True), 1)
  apart = (key - (key * keys).sum(2, keepdims=True) / count) * keys
  covariance = jnp.einsum('bhke,bhkf->bhef', apart, apart) / count
  variance = jnp.einsum('bhqe,bhef,bhqf->bhq', query, covariance, query)
  return jnp.einsum('bhqe,bhke->bhqk', query / deviation(variance[..., None]), apart)


def deviation(variance: Float[Array, '*b']) -> Float[Array, '*b']:
  """Its root and a little, which is never 0 and has a gradient everywhere."""
  return jnp.sqrt(jnp.where(variance > 0, variance, 1)) * (variance > 0) + EPSILON


def top_k(
  layers: Sequence[Layer],
  valid: Bool[Array, 'b n'],
  counts: Sequence[Int[Array, 'b']],
  mix: float = MIX,
) -> Float[Array, 'b l n']:
  """The plan that asks each layer for the `counts` best keys of what the layer above needs, and for that itself.

  s_j = mean over needed i of A_ij (mix w_i + 1 - mix);  I = TopK(s) and all needed;  w_j = s_j / sum over I of s

  layers: of attention weights, `shares`. Returns masks of 0 and 1, l = layers + 1.
  """
  needed = impact = class_token(valid)
  plan = [needed]
  for layer, count in zip(reversed(layers), reversed(counts)):
    asked = needed * (mix * impact + 1 - mix)
    found = layer(asked if plan[1:] else asked[:, :1])  # the read-out needs the first token alone
    score = found / needed.sum(-1, keepdims=True)
    best = highest(jnp.where(valid, score, -jnp.inf), count[:, None])
    needed = jnp.where((best & valid) | (needed > 0), 1.0, 0.0)
    impact = score * needed
    impact = impact / jnp.maximum(impact.sum(-1, keepdims=True), EPSILON)
    plan.append(needed)
  return jnp.stack(plan[::-1], axis=1)


def logit(p: Float[Array, '*b']) -> Float[Array, '*b']:
  """log p / (1 - p), finite at 0 and 1."""
  return jnp.log(p + EPSILON) - jnp.log(1 - p + EPSILON)


def concrete(
  layers: Sequence[Layer],
  valid: Bool[Array, 'b n'],
  theta: Float[Array, '*#b l'],
  mix: float = MIX,
) -> tuple[Float[Array, 'b m n'], Float[Array, 'b l n']]:
  """The soft plan of learned thresholds theta [layers]; a token is kept where it is at least 0.5.

  v_j = sum_i M_i U_ij (mix u_i + 1 - mix) / sum_i M_i, M and u those of the layer above;  u_j = 0.01 + 0.99 v_j / max v
  m_j = sigmoid((theta + logit u_j) / temperature), M_j = max(m_j, M_j of the layer above)

  Where what is above already keeps it, or u_j >= sigmoid(-theta). layers: of U, `standings`. Returns (plan, m = layers + 1; u
  by layer).
  """
  alive = valid.astype(jnp.float32)
  mask = score = class_token(valid)
  plan = [mask]
  ranks: list[jax.Array] = []
  for layer in reversed(range(len(layers))):
    asked = mask * (mix * score + 1 - mix)
    found = layers[layer](asked if ranks else asked[:, :1])  # the read-out needs the first token alone
    found = found / (mask.sum(-1, keepdims=True) + EPSILON)
    top = (found * alive).max(-1, keepdims=True)
    score = (0.01 + 0.99 * found / (top + EPSILON)) * alive
    mask = jnp.maximum(jax.nn.sigmoid((theta[..., layer, None] + logit(score)) / TEMPERATURE) * alive, mask)
    plan.append(mask)
    ranks.append(score)
  return jnp.stack(plan[::-1], axis=1), jnp.stack(ranks[::-1], axis=1)
