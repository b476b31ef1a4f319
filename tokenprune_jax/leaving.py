"""Examples that leave a batch inside one program: those that stay are gathered, and all are put back at the end.

Shapes: b examples that the batch began with, e that are still computed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from tokenprune_jax import tokens as stream
from tokenprune_jax.reducer import Memory
from tokenprune_jax.tokens import Tokens


class Present(NamedTuple):
  """Who of a batch is still computed. place [e] int32: their rows in the batch; None: all are.

  memory: of the whole batch, with what others left as they left it.
  """

  place: Array | None = None
  memory: Memory = {}

  def spread(self, values: Any, batch: int) -> Any:
    """Arrays [e …] as [b …], 0 (False) for those who left."""
    if self.place is None:
      return values
    return jax.tree.map(lambda x: jnp.zeros((batch, *x.shape[1:]), x.dtype).at[self.place].set(x), values)

  def whole(self, memory: Memory) -> Memory:
    """The memory of the whole batch, from that of those who are still there."""
    if self.place is None:
      return memory

    def put(old, new):
      return old.at[self.place].set(new) if jnp.ndim(new) else new

    return jax.tree.map(put, self.memory, memory)


EVERYONE = Present()


def depart(
  tokens: Tokens, memory: Memory, present: Present
) -> tuple[Tokens, Memory, Present, Bool[Array, 'e']]:
  """Gathers the examples that have states to update into `capacity.examples`: (tokens, memory, present, lost [e]).

  Where these are too few those whose least sure slot has the lowest score leave too, as if they had exited, with the
  prediction that is in the memory; they are `lost`.
  """
  examples, room = tokens.x.shape[0], tokens.capacity.examples
  if room is None or room >= examples:
    return tokens, memory, present, jnp.zeros(examples, bool)
  going, score = tokens.updated > 0, stream.score_of(tokens)
  told = going & jnp.isfinite(score)  # a slot that has to stay says nothing of its example
  wanted = going.any(-1)
  index, stay, _ = stream.select(wanted, room, jnp.where(told, score, -jnp.inf).max(axis=1))
  lost = wanted & ~stay

  def take(values):
    return jax.tree.map(lambda x: x[index] if jnp.ndim(x) else x, values)

  everyone = present.whole({**memory, 'exited': memory['exited'] | lost})
  place = index if present.place is None else present.place[index]
  return take(tokens), take(memory), Present(place, everyone), lost
