"""What a method may do, and the neutral method that does nothing.

A method is one file in `reducers/`: a Linen module named `Method` that extends `Reducer` and overrides only the hooks it
needs. Decisions go into the stream (`seen`, `updated`, `score`, `capacity`), private state into `memory`, a dict of
arrays with leading axis b in original-position indexing. Entries of `memory` that the caller reads:

  loss scalar: added to the task's loss;  macs_NAME [b]: multiply-adds of the method itself, an item each;
  mac_target, mac_weight scalars: a budget, mac_weight (MACs / dense MACs - mac_target)^2 is added to the loss;
  assignment [b N] int32: the combination slot each input token went to;
  exited [b] bool, prediction [b c] (where tokens are read [b N c]): examples that are answered before the last layer, and
  their logits; a method that states `Capacity.examples` keeps there what each of the others would leave with;
  answered [b N] bool: where tokens are read, those that have their logits in `prediction` though their example goes on;
  logits [b e c]: of all exits, for a training objective.

The encoder's own entry, where the model reads every token: board [b N d], the last states of tokens that left the stream.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax.attention import Evidence
from tokenprune_jax.tokens import Tokens, presence, restored

Memory = dict[str, Any]  # arrays, or tuples of arrays


class Inputs(NamedTuple):
  """What a method may know of the raw input: ids [b n], mask [b n] bool, types [b n], controls {name: [b]}.

  controls: what may change from request to request without compiling again. labels: the number of classes c.
  encoder: its `EncoderConfig`. reads_first: whether the model's head reads [CLS] alone. words [b n] int32: the number of the
  word that a token is a piece of, from 0, and -1 for tokens of none; None where words are not told apart.
  """

  ids: Array
  mask: Array
  types: Array
  controls: dict[str, Array]
  labels: int = 0
  encoder: Any = None
  reads_first: bool = False
  words: Array | None = None

  @property
  def depth(self) -> int:
    """Layers of the encoder."""
    return self.encoder.depth


class Half(NamedTuple):
  """One half of a block and the hook after it: attention, or else the feed-forward."""

  layer: int  # from 1
  attention: bool


def read_out(tokens: Tokens, how: str, memory: Memory | None = None) -> Float[Array, 'b *N d']:
  """What a classifier reads. cls: slot 0. mean: over live slots; 0 where an example has none.

  tokens: the last state of every input token [b N d], those that are gone included, which lie on the board in `memory`.
  """
  if how == 'tokens':
    assert memory is not None  # the encoder writes the board where it is to `restore`
    return restored(memory['board'], tokens).astype(jnp.float32)
  if how == 'cls':
    return tokens.x[:, 0].astype(jnp.float32)
  weight = presence(tokens)[..., None]
  return (tokens.x.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1e-6)


class Reducer(nn.Module):
  """The identity: keeps every token. Layers count from 1."""

  def check(self, depth: int, heads: int) -> None:
    """Raises UserError where a setting does not fit an encoder of `depth` layers."""

  def readouts(self) -> tuple[str, ...]:
    """The read-outs that it leaves enough tokens for."""
    return ('cls', 'mean', 'tokens')

  def needs_words(self) -> bool:
    """Whether it has to know which word each token is a piece of: `Inputs.words`."""
    return False

  def copies(self) -> dict[str, str]:
    """Parts of its parameters that begin as another part of the model's where nothing that fits is given: {path: it}."""
    return {}

  def soft(self) -> str:
    """How masks act while they are soft and the task's gradient has to reach them; '': they are hard.

    stream: x + updated f(x), and `seen` in the attention: removal is the limit. inside: they also scale queries, keys,
    values and the hidden layer, and residual paths are whole.
    """
    return ''

  def blocks(self, depth: int) -> tuple[int, ...]:
    """The layers that run; a method that replaces one leaves it out."""
    return tuple(range(1, depth + 1))

  def exits(self) -> tuple[int, ...]:
    """The layers behind which it may answer."""
    return ()

  def decides(self, depth: int) -> tuple[Half, ...]:
    """Where examples of one length may differ in what is left of them: there `serve` counts and regroups.

    Half(0, False) stands for `start`. A chain cuts each layer once where it can.
    """
    return ()

  def shortens(self) -> bool:
    """Whether slots leave examples that go on; else `serve` finds each where it was."""
    return True

  def separates(self) -> tuple[str, ...]:
    """What may be fewer than the live slots: 'keys', where a slot may be updated and not seen; 'rows', for the reverse."""
    return ()

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
