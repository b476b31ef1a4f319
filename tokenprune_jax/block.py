"""One layer of the encoder in two halves, over the rows and keys that a method has left (`tokens.Capacity`).

Shapes: b batch, n slots, q rows computed, k keys, h heads, d width, e width of a head.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax import attention
from tokenprune_jax import tokens as stream
from tokenprune_jax.attention import Evidence
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.grouping import group_rows, in_groups
from tokenprune_jax.layers import ACTIVATIONS, Dense, Dropout, Norm, joint
from tokenprune_jax.tokens import Tokens


class Rows(NamedTuple):
  """The slots whose state a half-block computes; place and kept are None where that is all of them, kept where the first.

  Axis g is b, or 1 where the batch is one long row of m = b n slots (`together`); otherwise m = n.
  """

  x: Array  # [g q d]
  updated: Array  # [g q]
  place: Array | None  # [#g q]
  kept: Array | None  # [g m]
  overflow: Array  # [b] bool
  together: bool = False


def updated_rows(tokens: Tokens, compact: bool) -> Rows:
  """The rows to compute: under the compact executor gathered into `capacity.rows` or `.batch_rows`, else all."""
  b, n, d = tokens.x.shape
  x, updated, wanted = tokens.x, tokens.updated, tokens.capacity.rows
  together = tokens.capacity.batch_rows is not None
  if together:
    x, updated, wanted = x.reshape(1, b * n, d), updated.reshape(1, b * n), tokens.capacity.batch_rows
  capacity = stream.room(wanted, x.shape[1])
  if not compact or capacity is None:
    return Rows(tokens.x, tokens.updated, None, None, jnp.zeros(b, bool))
  if stream.leading(tokens):
    return Rows(x[:, :capacity], updated[:, :capacity], jnp.arange(capacity)[None], None, jnp.zeros(b, bool))
  index, kept, overflow = stream.select(updated > 0, capacity)  # `stream.fit` has chosen those that stay
  updated = jnp.take_along_axis(jnp.where(kept, updated, 0), index, axis=1)
  overflow = jnp.broadcast_to(overflow, b)
  return Rows(stream.gather_rows(x, index, kept), updated, index, kept, overflow, together)


def put_back(tokens: Tokens, rows: Rows, x: Float[Array, 'g q d']) -> Float[Array, 'b n d']:
  """The stream's states with the computed rows in their slots; all others keep theirs."""
  if rows.place is None:
    return x
  if rows.kept is None:
    return jnp.concatenate([x, tokens.x[:, x.shape[1] :]], axis=1)
  placed, shape = stream.spread(x, rows.kept), tokens.x.shape
  return jnp.where(rows.kept.reshape(*shape[:2], 1), placed.reshape(shape), tokens.x)


def pick_bias(bias, rows: Rows, keys: Array | None):
  """bias [#b h n n] at the rows and the key columns [b #h k] that were gathered."""
  if bias is None:
    return None
  if rows.place is not None and not rows.together:
    if rows.kept is None:
      bias = bias[:, :, : rows.x.shape[1]]
    else:
      bias = jnp.take_along_axis(bias, rows.place[:, None, :, None], axis=2)
  if keys is not None:
    bias = jnp.take_along_axis(bias, keys[:, :, None, :], axis=3)
  return bias


def own_places(queries: Array | None, keys: Array | None, n: int) -> Array | None:
  """[#b #h q k] bool: where query rows [#b q] and key columns [b #h k] that were gathered are one slot of n; None: i is i."""
  if queries is None and keys is None:
    return None
  every = jnp.arange(n)[None]
  rows = (every if queries is None else queries)[:, None, :, None]
  columns = (every[:, None] if keys is None else keys)[:, :, None, :]
  return rows == columns


def in_stream(found: dict[str, Any], kept: Array | None) -> Evidence:
  """Evidence in the coordinates of the stream, whatever keys were gathered; keys without a place read 0."""
  if kept is None:
    return Evidence(**found)

  def columns(values):  # [b h … k] -> [b h … n]
    mask = jnp.broadcast_to(kept, values.shape[:2] + kept.shape[-1:])
    mask = mask.reshape(mask.shape[:2] + (1,) * (values.ndim - 3) + mask.shape[-1:])
    mask = jnp.broadcast_to(mask, values.shape[:-1] + mask.shape[-1:])
    return stream.spread(values[..., None], mask)[..., 0]

  return Evidence(**{name: columns(values) if values.ndim > 2 else values for name, values in found.items()})


class Block(nn.Module):
  """One post-LayerNorm layer, in two halves so that a method can decide between them."""

  config: EncoderConfig
  compact: bool = False
  soft: str = ''  # as `Reducer.soft`

  def setup(self):
    c = self.config
    for name in ('query', 'key', 'value', 'out'):
      setattr(self, name, Dense(c.width, c.dtype))
    self.up, self.down = Dense(c.hidden, c.dtype), Dense(c.width, c.dtype)
    self.attention_norm, self.output_norm = Norm(c.norm_eps), Norm(c.norm_eps)
    self.drop = Dropout(c.dropout)

  def at_a_time(self, tokens: Tokens, train: bool) -> int:
    """Examples that a half works on at a time: all, where a gradient has to keep everything or rows of all are gathered."""
    b, n = tokens.x.shape[:2]
    together = train or tokens.capacity.batch_rows is not None
    return b if together else group_rows(self.config.group_slots, b, n)

  def attend(
    self, tokens: Tokens, bias, reads: tuple[str, ...], train: bool
  ) -> tuple[Tokens, Evidence, Array]:
    """The first half. Returns (tokens, evidence, overflow [b])."""
    own = bias is not None and bias.shape[0] > 1

    def mixed(block, given):
      tokens, each = given
      return block.mixed(tokens, each if own else bias, reads, train)

    given = tokens, bias if own else None
    x, evidence, overflow = in_groups(mixed, self, given, self.at_a_time(tokens, train))
    projected = tokens.updated.sum(-1) + stream.live(tokens).sum(-1)
    return tokens.replace(x=x), evidence._replace(projected=projected), overflow

  def mixed(self, tokens: Tokens, bias, reads: tuple[str, ...], train: bool) -> tuple[Array, Evidence, Array]:
    """`attend` on all examples at once: (x, evidence, overflow)."""
    rows = updated_rows(tokens, self.compact)
    if (
      self.config.joint
      and rows.place is None
      and stream.room(tokens.capacity.keys, tokens.x.shape[1]) is None
    ):
      query, key, value = (self.heads(x) for x in joint((self.query, self.key, self.value), tokens.x))
      seen, index, kept = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None], None, None
      overflow = jnp.zeros(tokens.x.shape[0], bool)
    else:
      query = self.query(rows.x)
      if rows.together and rows.kept is not None:  # each example attends to its own keys, in its own slots
        query = stream.spread(query, rows.kept).reshape(tokens.x.shape)
      query = self.heads(query)
      key, value, seen, index, kept, overflow = self.keys_and_values(tokens)
    asked, place = (tokens.updated, None) if rows.together else (rows.updated, rows.place)
    dropout = self.config.attention_dropout if train else 0.0
    mixed, found = attention.mix(
      self.scaled(query, asked[:, None]),
      self.scaled(key, seen),
      self.scaled(value, seen),
      seen,
      asked,
      pick_bias(bias, rows, index),
      self.make_rng('dropout') if dropout else None,
      attention.Mixing(reads, bool(self.soft), dropout, self.config.kernel),
      own_places(place, index, tokens.x.shape[1]) if 'own' in reads else None,
    )
    mixed = mixed.swapaxes(1, 2)
    if rows.together and rows.kept is not None:
      mixed = stream.gather_rows(mixed.reshape(*rows.kept.shape, -1), rows.place, rows.kept)
    change = self.drop(self.out(mixed.reshape(rows.x.shape)), train)
    x = self.residual(rows, change, self.attention_norm)
    return put_back(tokens, rows, x), in_stream(found, kept), overflow | rows.overflow

  def keys_and_values(self, tokens: Tokens):
    """(key, value [b h k e], seen [b #h k], index [b #h k], kept [b #h n], overflow [b]).

    Under the compact executor only survivors of the last decision: gathered before the projections where all heads keep
    the same slots, after them where heads differ.
    """
    capacity = stream.room(tokens.capacity.keys, tokens.x.shape[1])
    seen = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None]
    if not self.compact or capacity is None:
      key, value = self.heads(self.key(tokens.x)), self.heads(self.value(tokens.x))
      return key, value, seen, None, None, jnp.zeros(seen.shape[0], bool)
    score = tokens.score[:, None] if tokens.score is not None and tokens.score.ndim == 2 else tokens.score
    index, kept, overflow = stream.select(seen > 0, capacity, score)
    if seen.shape[1] == 1:
      x = stream.gather_rows(tokens.x, index[:, 0], kept[:, 0])
      key, value = self.heads(self.key(x)), self.heads(self.value(x))
    else:
      key = stream.gather_rows(self.heads(self.key(tokens.x)), index, kept)
      value = stream.gather_rows(self.heads(self.value(tokens.x)), index, kept)
    seen = jnp.take_along_axis(jnp.where(kept, seen, 0), index, axis=-1)
    return key, value, seen, index, kept, overflow.any(-1)

  def feed_forward(self, tokens: Tokens, train: bool) -> tuple[Tokens, Array]:
    """The second half. Returns (tokens, overflow [b])."""
    rows = self.at_a_time(tokens, train)
    x, overflow = in_groups(lambda block, given: block.fed_forward(given, train), self, tokens, rows)
    return tokens.replace(x=x), overflow

  def fed_forward(self, tokens: Tokens, train: bool) -> tuple[Array, Array]:
    """`feed_forward` on all examples at once: (x, overflow)."""
    rows = updated_rows(tokens, self.compact)
    hidden = ACTIVATIONS[self.config.activation](self.scaled(self.up(rows.x), rows.updated))
    change = self.drop(self.down(hidden), train)
    return put_back(tokens, rows, self.residual(rows, change, self.output_norm)), rows.overflow

  def renormed(self, tokens: Tokens) -> Tokens:
    """After the second half: slots that are not updated go through this layer's output norm, by their standardised states.

    Where a method carries these: `halted` [b n d].
    """
    if 'halted' not in tokens.carry:
      return tokens
    ran = (tokens.updated > 0)[..., None]
    standard = jnp.where(ran, self.output_norm.standardised(tokens.x), tokens.carry['halted'])
    x = jnp.where(ran, tokens.x, self.output_norm.scaled(standard))
    return tokens.replace(x=x, carry={**tokens.carry, 'halted': standard})

  def heads(self, x):
    """[b n d] -> [b h n e]."""
    return x.reshape(x.shape[:-1] + (self.config.heads, -1)).swapaxes(1, 2)

  def scaled(self, x, mask):
    """x [… n d] by a soft mask [… n] where masks are inside the block; else x."""
    return x * mask[..., None].astype(x.dtype) if self.soft == 'inside' else x

  def residual(self, rows: Rows, change, norm):
    """norm(x + change) where updated; a slot that is not keeps its state bit for bit."""
    updated, new = rows.updated[..., None], norm(rows.x + self.scaled(change, rows.updated))
    if self.soft == 'inside':
      return new
    return rows.x + updated * (new - rows.x) if self.soft else jnp.where(updated > 0, new, rows.x)
