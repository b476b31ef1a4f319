"""One Transformer encoder for BERT, RoBERTa, DistilBERT and MPNet, in which tokens can leave.

The encoder names no method: it calls the reducer's hooks, gathers survivors where the executor is `compact`, and records
what every block computed. Shapes: b batch, n slots, h heads, d width, N input length, L layers (counted from 1).
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tokenprune_jax import attention
from tokenprune_jax import tokens as stream
from tokenprune_jax.attention import Evidence
from tokenprune_jax.layers import ACTIVATIONS, Dense, Norm
from tokenprune_jax.reducer import Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Everything in which the families differ is data."""

  family: str = 'bert'
  vocab_size: int = 30522
  width: int = 768
  depth: int = 12
  heads: int = 12
  hidden: int = 3072  # feed-forward width
  max_positions: int = 512  # rows of the position table
  type_vocab: int = 2  # 0: the family has no token types
  position_offset: int = 0  # 2 in RoBERTa and MPNet, whose first rows belong to padding
  relative_buckets: int = 0  # 32 in MPNet
  pad_id: int = 0
  norm_eps: float = 1e-12
  activation: str = 'gelu'
  dropout: float = 0.1
  attention_dropout: float = 0.1
  dtype: str = 'float32'  # of the matrix products; parameters, softmax and LayerNorm stay in float32
  attention: str = 'auto'  # or 'plain', 'mapped': see `attention.is_mapped`

  @property
  def max_length(self) -> int:
    """The longest input in tokens."""
    return self.max_positions - self.position_offset


@struct.dataclass
class Trace:
  """What each block computed, per example and layer [b L] float32; 0 in a replaced block. The ground of every count."""

  slots: Array  # [b] slots before the first block: real tokens and what the method added
  keys: Array  # keys of one head (mean over heads)
  widest: Array  # keys of the head that has most: what a capacity must hold
  key_rows: Array  # states projected to keys and values
  queries: Array
  rows: Array  # states through the feed-forward
  kept: Array  # [b L N] share of heads in which an input token is a key
  overhead: Array  # [b] multiply-adds of the method itself
  overflow: Array  # [b] bool: a capacity was too small, so the result differs from `mask`
  assignment: Array  # [b N] int32 combination slot of each token; -1 none


class Embeddings(nn.Module):
  """Word, position and type embeddings, summed and normed."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, inputs: Inputs, train: bool) -> Float[Array, 'b n d']:
    c = self.config

    def table(rows, name):
      return nn.Embed(rows, c.width, embedding_init=nn.initializers.normal(0.02), name=name)

    position = jnp.arange(inputs.ids.shape[1]) + c.position_offset
    x = table(c.vocab_size, 'word')(inputs.ids) + table(c.max_positions, 'position')(position)[None]
    if c.type_vocab:
      x = x + table(c.type_vocab, 'type')(inputs.types)
    x = Norm(c.norm_eps, name='norm')(x)
    return nn.Dropout(c.dropout)(x, deterministic=not train)


class RelativeBias(nn.Module):
  """One table of attention biases by relative position, shared by all layers (MPNet)."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, tokens: Tokens) -> Float[Array, 'b h n n'] | None:
    c = self.config
    if not c.relative_buckets:
      return None
    table = self.param('embedding', nn.initializers.normal(0.02), (c.relative_buckets, c.heads))
    position = (
      tokens.position if tokens.moved else tokens.position[:1]
    )  # unmoved positions are the same in every row
    return attention.relative_bias(table, position, position)


class Rows(NamedTuple):
  """The slots whose state a half-block computes; place and kept are None where that is all of them."""

  x: Array  # [b q d]
  updated: Array  # [b q]
  place: Array | None  # [b q]
  kept: Array | None  # [b n]
  overflow: Array  # [b] bool


def updated_rows(tokens: Tokens, compact: bool) -> Rows:
  """The rows to compute: gathered into `capacity.rows` under the compact executor, else all."""
  capacity, n = tokens.capacity.rows, tokens.x.shape[1]
  if not compact or capacity is None or capacity >= n:
    return Rows(tokens.x, tokens.updated, None, None, jnp.zeros(tokens.x.shape[0], bool))
  score = tokens.score.max(1) if tokens.score is not None and tokens.score.ndim == 3 else tokens.score
  index, kept, overflow = stream.select(tokens.updated > 0, capacity, score)
  updated = jnp.take_along_axis(jnp.where(kept, tokens.updated, 0), index, axis=1)
  return Rows(stream.gather_rows(tokens.x, index, kept), updated, index, kept, overflow)


def put_back(tokens: Tokens, rows: Rows, x: Float[Array, 'b q d']) -> Tokens:
  """The stream with the computed rows in their slots; all others keep their state."""
  if rows.kept is None:
    return tokens.replace(x=x)
  return tokens.replace(x=jnp.where(rows.kept[..., None], stream.spread(x, rows.kept), tokens.x))


def pick_bias(bias, queries: Array | None, keys: Array | None):
  """bias [#b h n n] at the query rows [b q] and key columns [b #h k] that were gathered."""
  if bias is None or (queries is None and keys is None):
    return bias
  if queries is not None:
    bias = jnp.take_along_axis(bias, queries[:, None, :, None], axis=2)
  if keys is not None:
    bias = jnp.take_along_axis(bias, keys[:, :, None, :], axis=3)
  return bias


def in_stream(found: dict[str, Array], kept: Array | None) -> Evidence:
  """Evidence in the coordinates of the stream, whatever keys were gathered; keys without a place read 0."""
  if kept is None:
    return Evidence(**found)

  def columns(values):  # [b h … k] -> [b h … n]
    mask = jnp.broadcast_to(kept, values.shape[:2] + kept.shape[-1:])
    mask = mask.reshape(mask.shape[:2] + (1,) * (values.ndim - 3) + mask.shape[-1:])
    mask = jnp.broadcast_to(mask, values.shape[:-1] + mask.shape[-1:])
    return stream.spread(values[..., None], mask)[..., 0]

  return Evidence(**{name: columns(values) for name, values in found.items()})


class Block(nn.Module):
  """One post-LayerNorm layer, in two halves so that a method can decide between them."""

  config: EncoderConfig
  compact: bool = False
  soft: bool = False

  def setup(self):
    c = self.config
    for name in ('query', 'key', 'value', 'out'):
      setattr(self, name, Dense(c.width, c.dtype))
    self.up, self.down = Dense(c.hidden, c.dtype), Dense(c.width, c.dtype)
    self.attention_norm, self.output_norm = Norm(c.norm_eps), Norm(c.norm_eps)
    self.drop = nn.Dropout(c.dropout)

  def attend(
    self, tokens: Tokens, bias, reads: tuple[str, ...], train: bool
  ) -> tuple[Tokens, Evidence, Array]:
    """The first half. Returns (tokens, evidence, overflow [b])."""
    rows = updated_rows(tokens, self.compact)
    key, value, seen, index, kept, overflow = self.keys_and_values(tokens)
    dropout = self.config.attention_dropout if train else 0.0
    mixed, found = attention.mix(
      self.heads(self.query(rows.x)),
      key,
      value,
      seen,
      rows.updated,
      pick_bias(bias, rows.place, index),
      self.make_rng('dropout') if dropout else None,
      attention.Mixing(reads, self.soft, dropout, attention.is_mapped(self.config.attention, train)),
    )
    change = self.drop(self.out(mixed.swapaxes(1, 2).reshape(rows.x.shape)), deterministic=not train)
    x = self.residual(rows, change, self.attention_norm)
    return put_back(tokens, rows, x), in_stream(found, kept), overflow | rows.overflow

  def keys_and_values(self, tokens: Tokens):
    """(key, value [b h k e], seen [b #h k], index [b #h k], kept [b #h n], overflow [b]).

    Under the compact executor only survivors of the last decision: gathered before the projections where all heads keep
    the same slots, after them where heads differ.
    """
    capacity, n = tokens.capacity.keys, tokens.x.shape[1]
    seen = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None]
    if not self.compact or capacity is None or capacity >= n:
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
    rows = updated_rows(tokens, self.compact)
    hidden = ACTIVATIONS[self.config.activation](self.up(rows.x))
    change = self.drop(self.down(hidden), deterministic=not train)
    return put_back(tokens, rows, self.residual(rows, change, self.output_norm)), rows.overflow

  def heads(self, x):
    """[b n d] -> [b h n e]."""
    return x.reshape(x.shape[:-1] + (self.config.heads, -1)).swapaxes(1, 2)

  def residual(self, rows: Rows, change, norm):
    """norm(x + change) where updated; a slot that is not keeps its state bit for bit."""
    updated, new = rows.updated[..., None], norm(rows.x + change)
    return rows.x + updated * (new - rows.x) if self.soft else jnp.where(updated > 0, new, rows.x)


class Encoder(nn.Module):
  """Embeddings and `depth` blocks with the reducer's hooks between them."""

  config: EncoderConfig
  reducer: Reducer
  executor: str = 'mask'
  protect_first: bool = False  # the read-out needs slot 0 ([CLS])

  def setup(self):
    c, compact = self.config, self.executor == 'compact'
    self.embeddings, self.relative_bias = Embeddings(c), RelativeBias(c)
    self.block = {str(l): Block(c, compact, self.reducer.soft()) for l in range(1, c.depth + 1)}

  def __call__(self, inputs: Inputs, train: bool = False) -> tuple[Tokens, Memory, Trace]:
    c, length, compact = self.config, inputs.ids.shape[1], self.executor == 'compact'
    tokens = stream.start(self.embeddings(inputs, train), inputs.mask, self.protect_first)
    tokens, memory = self.reducer.start(tokens, inputs, train)
    slots = inputs.mask.sum(-1, dtype=jnp.float32) + tokens.added
    bias = self.relative_bias(tokens)
    overflow = jnp.zeros(inputs.ids.shape[0], bool)
    seen_by = {}
    for l in self.reducer.blocks(c.depth):
      block, before = self.block[str(l)], tokens
      tokens, evidence, lost = block.attend(tokens, bias, self.reducer.reads(l), train)
      overflow |= lost
      tokens, memory = self.reducer.after_attention(tokens, memory, evidence, l)
      tokens, bias, lost = self.shrink(tokens, bias) if compact else (tokens, bias, jnp.zeros_like(overflow))
      seen_by[l] = before, tokens.updated
      overflow |= lost
      tokens, lost = block.feed_forward(tokens, train)
      overflow |= lost
      width = tokens.x.shape[1]
      tokens, memory = self.reducer.after_block(tokens, memory, l, train)
      if tokens.x.shape[1] != width:
        bias = self.relative_bias(tokens)
      tokens, bias, lost = self.shrink(tokens, bias) if compact else (tokens, bias, jnp.zeros_like(overflow))
      overflow |= lost
    if self.is_initializing():  # a replaced block stays in the tree, so that one backbone fits every method
      for l in set(range(1, c.depth + 1)) - set(seen_by):
        self.block[str(l)].feed_forward(self.block[str(l)].attend(tokens, None, (), False)[0], False)
    return tokens, memory, trace(seen_by, memory, slots, overflow, c.depth, length)

  def shrink(self, tokens: Tokens, bias):
    """Gone slots leave the stream where the last decision stated how many stay."""
    slots = tokens.x.shape[1]
    tokens, overflow = stream.compress(tokens)
    return tokens, bias if tokens.x.shape[1] == slots else self.relative_bias(tokens), overflow


def trace(seen_by: dict, memory: Memory, slots: Array, overflow: Array, depth: int, length: int) -> Trace:
  """What each block computed. seen_by: layer -> (the stream that attention saw, `updated` at the feed-forward)."""
  b = overflow.shape[0]
  nothing, nowhere = jnp.zeros(b), jnp.zeros((b, length))
  columns = {name: [nothing] * depth for name in ('keys', 'widest', 'key_rows', 'queries', 'rows')}
  kept = [nowhere] * depth
  for l, (tokens, updated) in seen_by.items():
    shared = tokens.seen.ndim == 2
    share = tokens.seen if shared else tokens.seen.mean(axis=1)
    columns['keys'][l - 1] = share.sum(-1)
    columns['widest'][l - 1] = (
      tokens.seen if shared else tokens.seen.sum(-1).max(axis=1, keepdims=True)
    ).sum(-1)
    # Where heads differ, every live slot is projected and each head then takes its own.
    columns['key_rows'][l - 1] = share.sum(-1) if shared else stream.live(tokens).sum(-1).astype(jnp.float32)
    columns['queries'][l - 1] = tokens.updated.sum(-1)
    columns['rows'][l - 1] = updated.sum(-1)
    kept[l - 1] = stream.scatter_to_input(share, tokens.position, length)
  return Trace(
    **{name: jnp.stack(values, axis=1) for name, values in columns.items()},
    slots=slots,
    kept=jnp.stack(kept, axis=1),
    overhead=memory.get('overhead_macs', nothing),
    overflow=overflow,
    assignment=memory.get('assignment', jnp.full((b, length), -1, jnp.int32)),
  )
