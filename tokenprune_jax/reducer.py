"""What a method may do, and the neutral method that does nothing.

A method is one file in `reducers/`: a Linen module named `Method` that extends `Reducer` and overrides only the hooks it
needs. Decisions go into the stream (`seen`, `updated`, `score`, `capacity`), private state into `memory`, a dict of
arrays with leading axis b in original-position indexing. Entries of `memory` that the caller reads:

  loss scalar: added to the task's loss;  overhead_macs [b]: multiply-adds of the method itself;
  assignment [b N] int32: the combination slot each input token went to.
"""

from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array

from tokenprune_jax.attention import Evidence
from tokenprune_jax.tokens import Tokens

Memory = dict[str, Array]


class Inputs(NamedTuple):
  """What a method may know of the raw input: ids [b N], mask [b N] bool, types [b N], controls {name: [b]}."""

  ids: Array
  mask: Array
  types: Array
  controls: dict[str, Array]


class Reducer(nn.Module):
  """The identity: keeps every token. Layers count from 1."""

  def check(self, depth: int, heads: int) -> None:
    """Raises UserError where a setting does not fit an encoder of `depth` layers."""

  def soft(self) -> bool:
    """True while masks are soft and the task's gradient has to reach them."""
    return False

  def blocks(self, depth: int) -> tuple[int, ...]:
    """The layers that run; a method that replaces one leaves it out."""
    return tuple(range(1, depth + 1))

  def reads(self, layer: int) -> tuple[str, ...]:
    """The evidence that `after_attention` reads at this layer: names of `attention.Evidence`."""
    return ()

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    """Before the first block: may add slots, plan ahead, and opens the method's memory."""
    return tokens, {}

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    """Between attention and feed-forward of a layer."""
    return tokens, memory

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    """After a layer's feed-forward."""
    return tokens, memory
