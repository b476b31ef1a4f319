"""Attention as pure functions: one formula for soft masks, hard masks and removal, and what methods read from it.

weight = exp(score - max) * seen / (sum + eps), the maximum over seen keys and without gradient. A hard 0 equals
removal, and a soft mask has a gradient. Shapes: b batch, h heads, q queries, k keys, e width of a head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax.grouping import largest_divisor, on_one_cpu
from tokenprune_jax.layers import dropped

LIGHT = {'received', 'first_row', 'magnitude', 'terms'}  # evidence that needs no whole attention map
PASS_ENTRIES = 3 * 2**19  # of the attention maps that are worked on at a time: more leave the cache
PASS = 128  # queries of one pass beside a fused kernel
UNSEEN = -1e9  # added to a score whose key is not seen: its exponential is 0 to the bit
EPSILON = 1e-9  # far below the smallest denominator of a row that sees anything hard, where it is at least 1


class Terms(NamedTuple):
  """What scores are made of: query [b h q e], key [b h k e], bias [#b #h q k] or None. With their gradient."""

  query: Array
  key: Array
  bias: Array | None


class Evidence(NamedTuple):
  """What attention hands a method, only what its `reads` names, before dropout, in the stream's coordinates.

  received [b h n]: weights summed over updated queries; 0 where unseen. own [b h n]: what a slot gives to itself.
  entropy [b h n]: entropy in nats of how that attention spreads over the queries. first_row [b h n]: the weights of
  query 0 ([CLS]). weights [b h n n]: all. scores [b h n n]: before the softmax.
  magnitude [b h]: of what a head puts out, absolute values summed over updated queries and features. terms: what a method
  makes maps of itself, where no keys are gathered (the executor `mask`). Always there: projected [b], states that a layer
  projects, for queries and outputs and for keys and values; and how many layers have run, this one included.
  """

  received: Array | None = None
  own: Array | None = None
  entropy: Array | None = None
  first_row: Array | None = None
  weights: Array | None = None
  scores: Array | None = None
  magnitude: Array | None = None
  terms: Terms | None = None
  projected: Array | None = None
  layers: int | None = None


def soft_parts(
  scores: Float[Array, '*b q k'], seen: Float[Array, '*#b #q k']
) -> tuple[Float[Array, '*b q k'], Float[Array, '*b q 1']]:
  """(exps, share): attention weights in float32 before the division, and what each row is then multiplied by.

  Rows that see nothing are 0. Differentiable in `scores` and in `seen`.
  """
  scores = scores.astype(jnp.float32)
  top = jax.lax.stop_gradient(jnp.max(jnp.where(seen > 0, scores, -jnp.inf), axis=-1, keepdims=True))
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  # An unseen key may score far above the maximum. It counts as if it scored as much: seeing it would not move a row by more
  # than to its value, while the slope at 0 of the whole exponential explodes over a few layers.
  above = scores - top
  exps = jnp.exp(jnp.where(above > 0, 0, above)) * seen
  return exps, 1 / (exps.sum(-1, keepdims=True) + EPSILON)


def soft_weights(scores: Float[Array, '*b q k'], seen: Float[Array, '*#b #q k']) -> Float[Array, '*b q k']:
  """Attention weights [… q k] in float32; rows that see nothing are 0. Differentiable in `scores` and in `seen`."""
  exps, share = soft_parts(scores, seen)
  return exps * share


@jax.custom_vjp
def hard_parts(
  scores: Float[Array, '*b q k'], seen: Float[Array, '*#b #q k']
) -> tuple[Float[Array, '*b q k'], Float[Array, '*b q 1']]:
  """`soft_parts` with a constant `seen`, in three passes over the map, and a backward pass that keeps one map."""
  hidden = jnp.where(seen > 0, jnp.log(jnp.where(seen > 0, seen, 1)), UNSEEN)
  scores = scores.astype(jnp.float32) + hidden
  # The barrier keeps XLA from computing the exponentials again for their sums, which on a CPU costs more than reading them.
  exps = jax.lax.optimization_barrier(jnp.exp(scores - scores.max(-1, keepdims=True)))
  return exps, jnp.any(seen > 0, axis=-1, keepdims=True) / exps.sum(-1, keepdims=True)


def _hard_parts_forward(scores, seen):
  exps, share = hard_parts(scores, seen)
  return (exps, share), (exps, share, jnp.zeros((), scores.dtype))


def _hard_parts_backward(saved, gradients):
  exps, share, like = saved
  by_exps, by_share = gradients
  return (exps * (by_exps - by_share * share * share)).astype(like.dtype), None


hard_parts.defvjp(_hard_parts_forward, _hard_parts_backward)


def read(
  exps: Float[Array, '*b h q k'],
  share: Float[Array, '*b h q 1'],
  updated: Float[Array, '*b q'],
  reads: tuple[str, ...],
  own: Bool[Array, '*b #h q k'] | None = None,
) -> dict[str, Array]:
  """The evidence named in `reads` of the weights exps * share, keys in the order of these. updated: 1 at queries that count.

  own: where query and key are the same slot; None: the i-th query is the i-th key.
  """
  found = {}
  counted = updated[..., None, :] * share[..., 0]  # [… h q]
  if 'received' in reads or 'entropy' in reads:
    found['received'] = over_queries(exps, counted)
  if 'entropy' in reads:
    surprise = over_queries(exps * jnp.log(exps * share + EPSILON), counted)
    total = found['received'] + EPSILON
    found['entropy'] = jnp.maximum(jnp.log(total) - surprise / total, 0.0)
  if 'own' in reads:
    if own is None:
      found['own'] = jnp.diagonal(exps, axis1=-2, axis2=-1) * counted
    else:
      found['own'] = (exps * own * counted[..., None]).sum(-2)
  if 'first_row' in reads:
    found['first_row'] = exps[..., 0, :] * share[..., 0, :]
  if 'weights' in reads:
    found['weights'] = exps * share
  return {name: value for name, value in found.items() if name in reads}


def over_queries(values: Float[Array, '*b h q k'], counted: Float[Array, '*b h q']) -> Float[Array, '*b h k']:
  """Sum over the queries, each times `counted`: eight at a time where that divides them, which XLA fuses into one pass."""
  *outer, q, k = values.shape
  if q % 8:
    return jnp.einsum('...hqk,...hq->...hk', values, counted)
  weighted = values * counted[..., None]
  # The barrier keeps XLA from making one sum of the two again, which it computes column by column.
  return jax.lax.optimization_barrier(weighted.reshape(*outer, q // 8, 8, k).sum(-2)).sum(-2)


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
  own: Bool[Array, '#b #h q k'] | None = None,
) -> tuple[Float[Array, 'b h q e'], dict[str, Any]]:
  """Scaled dot-product attention: (mixed values, the evidence that `how.reads` names).

  seen: how much each key is attended to; updated: 1 at queries that count in the evidence. bias: added to the scores.
  rng: key of the dropout on the weights, when `how.dropout` > 0; evidence comes before it. Evidence has a gradient
  where masks are soft. own: see `read`.
  """
  drops = how.dropout and rng is not None
  if not how.soft and not drops and set(how.reads) <= LIGHT:
    if how.kernel == 'plain':
      mixed, found = in_passes(query, key, value, seen, updated, bias, how.reads)
    else:
      mixed = fused(query, key, value, seen, bias, how.kernel)
      found = light(query, key, seen, updated, bias, how.reads)
    terms = {'terms': Terms(query, key, bias)} if 'terms' in how.reads else {}
    return mixed, {**found, **sized(mixed, updated, how.reads), **terms}
  scores = scaled_scores(query, key, bias)
  exps, share = (soft_parts if how.soft else hard_parts)(scores, seen[..., None, :])
  parts = exps, share
  found = read(*(parts if how.soft else jax.lax.stop_gradient(parts)), updated, how.reads, own)
  if 'scores' in how.reads:
    found['scores'] = scores if how.soft else jax.lax.stop_gradient(scores)
  if drops:
    exps = dropped(exps, how.dropout, rng)
  mixed = mixture(exps, share, value)
  return mixed, {**found, **sized(mixed, updated, how.reads)}


def mixture(
  exps: Float[Array, 'b h q k'], share: Float[Array, 'b h q 1'], value: Float[Array, 'b h k e']
) -> Float[Array, 'b h q e']:
  """The values mixed by the weights exps * share, in float32."""
  return share * jnp.einsum(
    'bhqk,bhke->bhqe', exps.astype(value.dtype), value, preferred_element_type=jnp.float32
  )


def in_pass(b: int, h: int, entries: int) -> tuple[int, int]:
  """(examples, heads) of one pass, divisors of b and h: on one CPU device so few that their maps stay in the cache.

  entries: of one map. A batch that is spread over devices must not be walked through in order.
  """
  if not on_one_cpu() or b * h * entries <= PASS_ENTRIES:
    return b, h
  rows = largest_divisor(b, PASS_ENTRIES // (h * entries))
  return (rows, h) if rows else (1, largest_divisor(h, PASS_ENTRIES // entries) or 1)


def in_passes(
  query: Float[Array, 'b h q e'],
  key: Float[Array, 'b h k e'],
  value: Float[Array, 'b h k e'],
  seen: Float[Array, 'b #h k'],
  updated: Float[Array, 'b q'],
  bias: Float[Array, '#b #h q k'] | None,
  reads: tuple[str, ...],
) -> tuple[Float[Array, 'b h q e'], dict[str, Array]]:
  """`mix` for a hard `seen` and evidence of LIGHT, a few maps at a time: for inference they are not all kept."""

  def some(states, bias, updated):
    query, key, value, seen = states
    exps, share = hard_parts(scaled_scores(query, key, bias), seen[..., None, :])
    found = {}
    if 'received' in reads:  # as a product, which a CPU takes along with the pass
      found['received'] = jnp.einsum('bhqk,bhq->bhk', exps, updated[:, None] * share[..., 0])
    if 'first_row' in reads:
      found['first_row'] = exps[:, :, 0] * share[:, :, 0]
    return mixture(exps, share, value), jax.lax.stop_gradient(found)

  return by_passes(some, (query, key, value, seen), bias, updated)


def by_passes(
  some: Callable, states: tuple[Array, ...], bias: Float[Array, '#b #h q k'] | None, common: Array
) -> Any:
  """some(states, bias, common) -> arrays [b h …] of attention maps, a few of these at a time.

  states: query [b h q e], key [b h k e] and more [b #h …]; common [b …]: the same for all heads.
  """
  b, h, q, _ = states[0].shape
  rows, heads = in_pass(b, h, q * states[1].shape[2])
  if (rows, heads) == (b, h):
    return some(states, bias, common)

  def split(x, rows=rows):  # [b h …] -> [b / rows, h / heads, rows, heads, …]
    x = jnp.broadcast_to(x, (x.shape[0], h, *x.shape[2:]))
    return x.reshape(-1, rows, h // heads, heads, *x.shape[2:]).swapaxes(1, 2)

  shared = split(bias, 1)[0] if bias is not None and bias.shape[0] == 1 else None

  def examples(given):
    states, own, common = given
    parts = states, own if shared is None else shared
    return jax.lax.map(lambda part: some(*part, common), parts)

  own = split(bias) if bias is not None and shared is None else None
  parts = tuple(map(split, states)), own, common.reshape(-1, rows, *common.shape[1:])
  return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(b, -1, *x.shape[4:]), jax.lax.map(examples, parts))


def cut(x: Array, axis: int, count: int) -> Array:
  """[… q …] -> [count … ceil(q / count) …], the last one filled with zeros."""
  size = -(-x.shape[axis] // count)
  x = jnp.pad(x, [(0, count * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
  return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


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
  # A head that was taken away puts out nothing.
  return jnp.where((seen > 0).any(-1)[:, :, None, None], mixed, 0)


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
    count = -(-q // PASS)

    def add(total, part):
      query, updated, bias = part
      exps, share = hard_parts(scaled_scores(query, key, bias), seen[:, :, None])
      return total + over_queries(exps, updated[:, None] * share[..., 0]), None

    parts = cut(query, 2, count), cut(updated, 1, count), None if bias is None else cut(bias, 2, count)
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
