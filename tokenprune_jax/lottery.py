"""Random scores: the floor of every comparison. They depend on an example's text alone, never on padding or batch-mates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


def seeds(ids: Int[Array, 'b n'], mask: Bool[Array, 'b n'], seed: int) -> UInt32[Array, 'b']:
  """A number of each text."""
  weight = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.uint32)
  return (jnp.where(mask, ids, 0).astype(jnp.uint32) * weight).sum(-1) + jnp.uint32(seed)


def draw(seeds: UInt32[Array, 'b'], layer: int, position: Int[Array, 'b n']) -> Float[Array, 'b n']:
  """Uniform scores in [0, 1) by text, layer and position."""

  def row(seed, places):
    key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), layer)
    return jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place)))(places)

  return jax.vmap(row)(seeds, position)
