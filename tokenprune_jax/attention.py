"""Attention as pure functions: one formula for soft masks, hard masks and removal, and what methods read from it.

weight = exp(score - max) * seen / (sum + eps), the maximum over seen keys and without gradient. A hard 0 equals
removal, and a soft mask has a gradient. Shapes: b batch, h heads, q queries, k keys, e width of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax.layers import dropped

LIGHT = {'received', 'first_row', 'magnitude'}  # evidence that needs no whole attention map
PASS = 128  # queries of one pass over the keys
EPSILON = 1e-9  # far below the smallest denominator of a row that sees anything hard, where it is at least 1


class Evidence(NamedTuple):
  """What attention hands a method, only what its `reads` names, before dropout, in the stream's coordinates.

  received [b h n]: weights summed over updated queries; 0 where unseen. own [b h n]: what a slot gives to itself.
  entropy [b h n]: entropy in nats of how that attention spreads over the queries. first_row [b h n]: the weights of
  query 0 ([CLS]). weights [b h n n]: all. scores [b h n n]: before the softmax. magnitude [b h]: of what a head puts
  out, absolute values summed over updated queries and features.
  """

  received: Array | None = None
  own: Array | None = None
  entropy: Array | None = None
  first_row: Array | None = None
  weights: Array | None = None
  scores: Array | None = None
  magnitude: Array | None = None


def soft_weights(scores: Float[Array, '*b q k'], seen: Float[Array, '*#b #q k']) -> Float[Array, '*b q k']:
  """Attention weights [… q k] in float32; rows that see nothing are 0. Differentiable in `scores` and in `seen`."""
  scores = scores.astype(jnp.float32)
  top = jax.lax.stop_gradient(jnp.max(jnp.where(seen > 0, scores, -jnp.inf), axis=-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  # An unseen key may score above the maximum: bounded, so that 0 * exp never is 0 * inf.
  weights = jnp.exp(jnp.minimum(scores - top, 30.0)) * seen
  return weights / (weights.sum(-1, keepdims=True) + EPSILON)


@jax.custom_vjp
def hard_weights(scores: Float[Array, '*b q k'], seen: Float[Array, '*#b #q k']) -> Float[Array, '*b q k']:
  """`soft_weights` with a constant `seen`: the same value, and a backward pass that keeps one map instead of three."""
  return soft_weights(scores, seen)


def _hard_weights_forward(scores, seen):
  weights = soft_weights(scores, seen)
  return weights, (weights, jnp.zeros((), scores.dtype))


def _hard_weights_backward(saved, gradient):
  weights, like = saved
  inner = jnp.sum(gradient * weights, axis=-1, keepdims=True)
  return (weights * (gradient - inner)).astype(like.dtype), None


hard_weights.defvjp(_hard_weights_forward, _hard_weights_backward)


def read(
  weights: Float[Array, '*b h q k'],
  updated: Float[Array, '*b q'],
  reads: tuple[str, ...],
  own: Bool[Array, '*b #h q k'] | None = None,
) -> dict[str, Array]:
  """The evidence named in `reads`, keys in the order of `weights`. updated: 1 at queries that count, 0 at padding.

  own: where query and key are the same slot; None: the i-th query is the i-th key.
  """
  found = {}
  if 'received' in reads or 'entropy' in reads:
    received = over_queries(weights, updated)
    found['received'] = received
  if 'entropy' in reads:
    surprise = over_queries(weights * jnp.log(weights + EPSILON), updated)
    total = received + EPSILON
    found['entropy'] = jnp.maximum(jnp.log(total) - surprise / total, 0.0)
  if 'own' in reads:
    if own is None:
      found['own'] = jnp.diagonal(weights, axis1=-2, axis2=-1) * updated[..., None, :]
    else:
      found['own'] = (weights * own * updated[..., None, :, None]).sum(-2)
  if 'first_row' in reads:
    found['first_row'] = weights[..., 0, :]
  if 'weights' in reads:
    found['weights'] = weights
  return {name: value for name, value in found.items() if name in reads}


def over_queries(values: Float[Array, '*b h q k'], updated: Float[Array, '*b q']) -> Float[Array, '*b h k']:
  """Sum over the queries, by `updated`: eight at a time where that divides them, which XLA fuses into one pass."""
  *outer, q, k = values.shape
  if q % 8:
    return jnp.einsum('...hqk,...q->...hk', values, updated)
  weighted = values * updated[..., None, :, None]
  # The barrier keeps XLA from making one sum of the two again, which it computes column by column.
  return jax.lax.optimization_barrier(weighted.reshape(*outer, q // 8, 8, k).sum(-2)).sum(-2)


def over_heads(values: Float[Array, '*b h q k']) -> Float[Array, '*b q k']:
  """Mean over the heads: as a sum of slices, which XLA fuses into one pass along the rows."""
  heads = values.shape[-3]
  return sum((values[..., head, :, :] for head in range(1, heads)), values[..., 0, :, :]) / heads


class Mixing(NamedTuple):
  """Static settings of `mix`. kernel: 'plain', or the fused one of `fused`: 'xla', 'cudnn'."""

  reads: tuple[str, ...] = ()
  soft: bool = False
  dropout: float = 0.0
  kernel: str = 'plain'


def mix(
  query: Float[Array, 'b h q e'],
  key: Float[Array, 'b h k e'],
  value: Float[Array, 'b h k e'],
  seen: Float[Array, 'b #h k'],
  updated: Float[Array, 'b q'],
  bias: Float[Array, '#b #h q k'] | None,
  rng: Array | None,
  how: Mixing,
  own: Bool[Array, 'b #h q k'] | None = None,
) -> tuple[Float[Array, 'b h q e'], dict[str, Array]]:
  """Scaled dot-product attention: (mixed values, the evidence that `how.reads` names).

  seen: how much each key is attended to; updated: 1 at queries that count in the evidence. bias: added to the scores.
  rng: key of the dropout on the weights, when `how.dropout` > 0; evidence comes before it. Evidence has a gradient
  where masks are soft. own: see `read`.
  """
  if (
    how.kernel != 'plain'
    and not how.soft
    and not (how.dropout and rng is not None)
    and set(how.reads) <= LIGHT
  ):
    mixed = fused(query, key, value, seen, bias, how.kernel)
    return mixed, {**light(query, key, seen, updated, bias, how.reads), **sized(mixed, updated, how.reads)}
  scores = scaled_scores(query, key, bias)
  weights = (soft_weights if how.soft else hard_weights)(scores, seen[..., None, :])
  found = read(weights if how.soft else jax.lax.stop_gradient(weights), updated, how.reads, own)
  if 'scores' in how.reads:
    found['scores'] = scores if how.soft else jax.lax.stop_gradient(scores)
  if how.dropout and rng is not None:
    weights = dropped(weights, how.dropout, rng)
  mixed = jnp.einsum(
    'bhqk,bhke->bhqe', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return mixed, {**found, **sized(mixed, updated, how.reads)}


def sized(
  mixed: Float[Array, 'b h q e'], updated: Float[Array, 'b q'], reads: tuple[str, ...]
) -> dict[str, Array]:
  """The evidence `magnitude`, where `reads` names it; without gradient."""
  if 'magnitude' not in reads:
    return {}
  sums = jnp.abs(jax.lax.stop_gradient(mixed).astype(jnp.float32)).sum(-1)
  return {'magnitude': (sums * updated[:, None]).sum(-1)}


def scaled_scores(
  query: Float[Array, 'b h q e'], key: Float[Array, 'b h k e'], bias
) -> Float[Array, 'b h q k']:
  """Scores in float32, bias included."""
  query = query * query.shape[-1] ** -0.5
  scores = jnp.einsum('bhqe,bhke->bhqk', query, key, preferred_element_type=jnp.float32)
  return scores if bias is None else scores + bias


def fused(
  query: Float[Array, 'b h q e'],
  key: Float[Array, 'b h k e'],
  value: Float[Array, 'b h k e'],
  seen: Float[Array, 'b #h k'],
  bias: Float[Array, '#b #h q k'] | None,
  kernel: str,
) -> Float[Array, 'b h q e']:
  """`mix` for a hard `seen`, by `jax.nn.dot_product_attention`: no attention map is handed on.

  Rows that see nothing are a mean of all values, not 0, where heads see the same. kernel: 'xla', or 'cudnn' (bfloat16 or
  float16 on a GPU).
  """
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
  mask = jnp.broadcast_to((seen > 0)[:, :, None, :], (*seen.shape[:2], query.shape[1], seen.shape[-1]))
  bias = None if bias is None else bias.astype(query.dtype)
  how: Any = kernel  # its type is a Literal
  mixed = jax.nn.dot_product_attention(query, key, value, bias, mask, implementation=how)
  mixed = mixed.swapaxes(1, 2).astype(jnp.float32)
  if seen.shape[1] == 1:
    return mixed
  return jnp.where(
    (seen > 0).any(-1)[:, :, None, None], mixed, 0
  )  # a head that was taken away puts out nothing


def light(
  query: Float[Array, 'b h q e'],
  key: Float[Array, 'b h k e'],
  seen: Float[Array, 'b #h k'],
  updated: Float[Array, 'b q'],
  bias: Float[Array, '#b #h q k'] | None,
  reads: tuple[str, ...],
) -> dict[str, Array]:
  """The evidence `reads` names, of LIGHT, in a second pass over a few queries at a time: no whole map is kept."""
  found = {}
  if 'first_row' in reads:
    row = soft_weights(
      scaled_scores(query[:, :, :1], key, None if bias is None else bias[:, :, :1]), seen[:, :, None]
    )
    found['first_row'] = row[:, :, 0]
  if 'received' in reads:
    b, h, q, _ = query.shape
    pad = -q % min(PASS, q)

    def cut(x, axis):  # [… q …] -> [passes … PASS …]
      x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
      x = x.reshape(*x.shape[:axis], -1, min(PASS, q), *x.shape[axis + 1 :])
      return jnp.moveaxis(x, axis, 0)

    def add(total, part):
      query, updated, bias = part
      weights = soft_weights(scaled_scores(query, key, bias), seen[:, :, None])
      return total + over_queries(weights, updated), None

    parts = cut(query, 2), cut(updated, 1), None if bias is None else cut(bias, 2)
    found['received'] = jax.lax.scan(add, jnp.zeros((b, h, key.shape[2])), parts)[0]
  return jax.lax.stop_gradient(found)


def relative_bucket(
  distance: Int[Array, '*shape'], buckets: int, furthest: int = 128
) -> Int[Array, '*shape']:
  """MPNet's (T5's bidirectional) bucket of `key position - query position`: exact when near, logarithmic when far."""
  half = buckets // 2
  exact = half // 2
  far = jnp.abs(distance)
  ratio = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / jnp.log(furthest / exact)
  large = jnp.minimum(exact + (ratio * (half - exact)).astype(jnp.int32), half - 1)
  return jnp.where(distance > 0, half, 0) + jnp.where(far < exact, far, large)


def relative_bias(
  table: Float[Array, 'buckets h'], queries: Int[Array, 'b q'], keys: Int[Array, 'b k'], length: int
) -> Float[Array, 'b h q k']:
  """Bias of each pair from their original positions, all below `length`; slots without one (-1, combined) get 0."""
  # By distance first: a bucket takes a logarithm, and there are far fewer distances than pairs. One gather a head, from
  # places that were computed before: XLA otherwise computes them anew for every head, which takes three times as long.
  by_distance = jnp.pad(
    table[relative_bucket(jnp.arange(1 - length, length), table.shape[0])].T, ((0, 0), (1, 0))
  )
  placed = (keys >= 0)[:, None, :] & (queries >= 0)[:, :, None]
  place = jnp.where(placed, keys[:, None, :] - queries[:, :, None] + length, 0)
  place = jax.lax.optimization_barrier(place)
  return jnp.stack([head.at[place].get(mode='promise_in_bounds') for head in by_distance], axis=1)
