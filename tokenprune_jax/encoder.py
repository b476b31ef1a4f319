"""One Transformer encoder for BERT, RoBERTa, DistilBERT and MPNet, in which tokens can leave.

The encoder names no method: it calls the reducer's hooks, gathers survivors where the executor is `compact`, and records
what every block computed. Shapes: b batch, n slots, h heads, d width, N input length, L layers (counted from 1).
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tokenprune_jax import attention, leaving
from tokenprune_jax import tokens as stream
from tokenprune_jax.attention import Evidence
from tokenprune_jax.grouping import group_rows, in_groups
from tokenprune_jax.layers import ACTIVATIONS, Dense, Dropout, Norm, joint
from tokenprune_jax.leaving import EVERYONE
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens

PASSES = {
  'received': 1,
  'entropy': 2,
  'first_row': 0,
  'own': 0,
  'weights': 0,
  'scores': 0,
  'magnitude': 0,
  'terms': 0,
  'map': 0,
}  # sums over an attention map that evidence takes


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
  kernel: str = 'plain'  # of attention; 'xla', 'cudnn': see `attention.fused`
  joint: bool = (
    False  # query, key and value in one product: faster where a matrix unit is hard to fill, slower on a CPU
  )
  group_slots: int = (
    -1
  )  # that half a block works on at a time at inference; 0: on all; -1: see `grouping.group_rows`

  @property
  def max_length(self) -> int:
    """The longest input in tokens."""
    return self.max_positions - self.position_offset


@struct.dataclass
class Trace:
  """What each block computed, per example and layer [b L] float32; 0 in a replaced block. The ground of every count."""

  slots: Array  # [b] slots before the first block: real tokens and what the method added
  tokens: Array  # [b] real tokens
  keys: Array  # keys of one head (mean over heads)
  widest: Array  # keys of the head that has most: what a capacity must hold
  key_rows: Array  # states projected to keys and values
  queries: Array
  rows: Array  # states through the feed-forward
  kept: Array  # [b L N] share of heads in which an input token is a key
  evidence: Array  # multiply-adds of what the method reads from the attention maps
  overhead: dict[str, Array]  # {item: [b]} multiply-adds of the method itself
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
    return Dropout(c.dropout)(x, train)


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
    return attention.relative_bias(table, position, position, tokens.length)


class Rows(NamedTuple):
  """The slots whose state a half-block computes; place and kept are None where that is all of them.

  Axis g is b, or 1 where the batch is one long row of m = b n slots (`together`); otherwise m = n.
  """

  x: Array  # [g q d]
  updated: Array  # [g q]
  place: Array | None  # [g q]
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
  index, kept, overflow = stream.select(updated > 0, capacity)  # `stream.fit` has chosen those that stay
  updated = jnp.take_along_axis(jnp.where(kept, updated, 0), index, axis=1)
  overflow = jnp.broadcast_to(overflow, b)
  return Rows(stream.gather_rows(x, index, kept), updated, index, kept, overflow, together)


def put_back(tokens: Tokens, rows: Rows, x: Float[Array, 'g q d']) -> Float[Array, 'b n d']:
  """The stream's states with the computed rows in their slots; all others keep theirs."""
  if rows.kept is None:
    return x
  placed, shape = stream.spread(x, rows.kept), tokens.x.shape
  return jnp.where(rows.kept.reshape(*shape[:2], 1), placed.reshape(shape), tokens.x)


def pick_bias(bias, queries: Array | None, keys: Array | None):
  """bias [#b h n n] at the query rows [b q] and key columns [b #h k] that were gathered."""
  if bias is None or (queries is None and keys is None):
    return bias
  if queries is not None:
    bias = jnp.take_along_axis(bias, queries[:, None, :, None], axis=2)
  if keys is not None:
    bias = jnp.take_along_axis(bias, keys[:, :, None, :], axis=3)
  return bias


def own_places(queries: Array | None, keys: Array | None, n: int) -> Array | None:
  """[b #h q k] bool: where a query row [b q] and a key column [b #h k] that were gathered are one slot of n; None: i is i."""
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

  def attend(
    self, tokens: Tokens, bias, reads: tuple[str, ...], train: bool
  ) -> tuple[Tokens, Evidence, Array]:
    """The first half. Returns (tokens, evidence, overflow [b])."""
    rows = group_rows(self.config.group_slots, tokens, train)
    if rows < tokens.x.shape[0]:
      x, evidence, overflow = in_groups(
        lambda block, *given: block.mixed(*given, reads, train), self, tokens, bias, rows
      )
    else:
      x, evidence, overflow = self.mixed(tokens, bias, reads, train)
    return tokens.replace(x=x), evidence, overflow

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
      pick_bias(bias, place, index),
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
    rows = group_rows(self.config.group_slots, tokens, train)
    if rows < tokens.x.shape[0]:
      x, overflow = in_groups(
        lambda block, given, _: block.fed_forward(given, train), self, tokens, None, rows
      )
    else:
      x, overflow = self.fed_forward(tokens, train)
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


class Encoder(nn.Module):
  """Embeddings and `depth` blocks with the reducer's hooks between them."""

  config: EncoderConfig
  reducer: Reducer
  executor: str = 'mask'  # or 'compact'; 'serve': keys and rows are gathered, the stream is the host's
  protect_first: bool = False  # the read-out needs slot 0 ([CLS])
  restore: bool = False  # the read-out needs every token: states of those that leave go to memory['board']

  def setup(self):
    c, compact = self.config, self.executor != 'mask'
    self.embeddings, self.relative_bias = Embeddings(c), RelativeBias(c)
    self.block = {str(l): Block(c, compact, self.reducer.soft()) for l in range(1, c.depth + 1)}

  def __call__(self, inputs: Inputs, train: bool = False) -> tuple[Tokens, Memory, Trace]:
    b, length = inputs.ids.shape
    tokens, memory = self.begin(inputs, train)
    real = inputs.mask.sum(-1, dtype=jnp.float32)
    slots = real + tokens.added
    overflow, counts, present = jnp.zeros(b, bool), {}, EVERYONE
    if self.executor == 'compact':
      tokens, overflow = stream.settled(tokens)
    bias = self.relative_bias(tokens)
    for half in self.halves():
      counts[half] = present.spread(self.count(tokens, half), b)
      tokens, memory, bias, present, lost = self.advance(tokens, memory, bias, half, train, present)
      overflow |= lost
    tokens, memory = present.spread(tokens, b), present.whole(memory)
    if self.is_initializing():  # a replaced block stays in the tree, so that one backbone fits every method
      for l in set(range(1, self.config.depth + 1)) - set(self.reducer.blocks(self.config.depth)):
        self.block[str(l)].feed_forward(self.block[str(l)].attend(tokens, None, (), False)[0], False)
    about = {'slots': slots, 'tokens': real, 'overflow': overflow}
    return tokens, memory, trace(counts, memory, about, self.config.depth, length)

  def halves(self) -> tuple[Half, ...]:
    """What runs, in order."""
    return tuple(Half(l, half) for l in self.reducer.blocks(self.config.depth) for half in (True, False))

  def begin(self, inputs: Inputs, train: bool = False, length: int = 0) -> tuple[Tokens, Memory]:
    """The stream before the first block. length: see `tokens.start`."""
    tokens = stream.start(self.embeddings(inputs, train), inputs.mask, self.protect_first, length)
    b, n, d = tokens.x.shape
    board = {'board': jnp.pad(tokens.x, ((0, 0), (0, tokens.length - n), (0, 0)))} if self.restore else {}
    tokens, memory = self.reducer.start(tokens, inputs, train)
    return tokens, {**memory, **board}

  def advance(self, tokens: Tokens, memory: Memory, bias, half: Half, train: bool = False, present=EVERYONE):
    """One half of a block, the method's hook and, under `compact`, removal.

    Returns (tokens, memory, bias, present, overflow [b]), all but the last of the examples that are `present` then.
    """
    block, slots, batch = self.block[str(half.layer)], tokens.x.shape[1], tokens.batch
    if half.attention:
      computed, evidence, overflow = block.attend(tokens, bias, self.reducer.reads(half.layer), train)
      tokens, memory = self.reducer.after_attention(computed, memory, evidence, half.layer)
    else:
      computed, overflow = block.feed_forward(tokens, train)
      computed = block.renormed(computed)
      tokens, memory = self.reducer.after_block(computed, memory, half.layer, train)
    memory, overflow = self.noted(memory, computed, tokens), present.spread(overflow, batch)
    # A decision states its capacity.
    if self.executor == 'compact' and tokens.capacity is not computed.capacity:
      here, (tokens, memory, present, lost) = present, leaving.depart(tokens, memory, present)
      overflow |= here.spread(lost, batch)
      before, (tokens, lost) = tokens, stream.settled(tokens)
      memory, overflow = self.noted(memory, before, tokens), overflow | present.spread(lost, batch)
    # A bias that all examples share stays as it is when some of them leave.
    same = tokens.x.shape[1] == slots and (bias is None or bias.shape[0] in (1, tokens.x.shape[0]))
    return tokens, memory, bias if same else self.relative_bias(tokens), present, overflow

  def noted(self, memory: Memory, before: Tokens, after: Tokens) -> Memory:
    """The memory with the states of slots that are lost between the two."""
    if not self.restore or before.x.shape == after.x.shape:
      return memory
    return {**memory, 'board': stream.restored(memory['board'], before)}

  def segment(self, tokens: Tokens, memory: Memory, halves: tuple[Half, ...]):
    """Several halves at inference: (tokens, memory, {half: counts})."""
    bias, counts = self.relative_bias(tokens), {}
    for half in halves:
      counts[half] = self.count(tokens, half)
      tokens, memory, bias, _, _ = self.advance(tokens, memory, bias, half)
    return tokens, memory, counts

  def count(self, tokens: Tokens, half: Half) -> dict[str, Array]:
    """What a half computes, as the columns of `Trace` that it fills."""
    if not half.attention:
      return {'rows': tokens.updated.sum(-1)}
    shared = tokens.seen.ndim == 2
    share = tokens.seen if shared else tokens.seen.mean(axis=1)
    keys, queries = share.sum(-1), tokens.updated.sum(-1)
    passes = sum(PASSES[name] for name in self.reducer.reads(half.layer))
    return {
      'keys': keys,
      'widest': keys if shared else tokens.seen.sum(-1).max(axis=1),
      # Where heads differ, every live slot is projected and each head then takes its own.
      'key_rows': keys if shared else stream.live(tokens).sum(-1).astype(jnp.float32),
      'queries': queries,
      'evidence': passes * self.config.heads * queries * keys,
      'kept': stream.scatter_to_input(share, tokens.position, tokens.length),
    }


def overheads(memory: Memory) -> dict[str, Array]:
  """What the method itself computed: {item: multiply-adds [b]}."""
  return {name.removeprefix('macs_'): macs for name, macs in memory.items() if name.startswith('macs_')}


def trace(
  counts: dict[Half, dict[str, Array]], memory: Memory, about: dict[str, Array], depth: int, length: int
) -> Trace:
  """What each block computed, from the counts of its halves; 0 for a block that does not run. about: fields [b]."""
  b = about['overflow'].shape[0]
  nothing = {name: jnp.zeros(b) for name in ('keys', 'widest', 'key_rows', 'queries', 'rows', 'evidence')}
  nothing['kept'] = jnp.zeros((b, length))
  blocks = [
    {**nothing, **counts.get(Half(l, True), {}), **counts.get(Half(l, False), {})}
    for l in range(1, depth + 1)
  ]
  return Trace(
    **{name: jnp.stack([block[name] for block in blocks], axis=1) for name in nothing},
    **about,
    overhead=overheads(memory),
    assignment=memory.get('assignment', jnp.full((b, length), -1, jnp.int32)),
  )
