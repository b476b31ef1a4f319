"""One Transformer encoder for BERT, RoBERTa, DistilBERT and MPNet, in which tokens can leave.

The encoder names no method: it calls the reducer's hooks, gathers survivors where the executor is `compact`, and records
what every block computed. Shapes: b batch, n slots, h heads, d width, N input length, L layers (counted from 1).
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tokenprune_jax import attention, leaving
from tokenprune_jax import tokens as stream
from tokenprune_jax.block import Block
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.layers import Dropout, Norm
from tokenprune_jax.leaving import EVERYONE
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.tokens import Tokens

# Sums over an attention map that evidence takes; the rest comes with the map or the states.
NO_PASS = ('first_row', 'own', 'weights', 'scores', 'magnitude', 'terms')
PASSES = {'received': 1, 'entropy': 2, **dict.fromkeys(NO_PASS, 0)}


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
    # Unmoved positions are the same in every row.
    position = tokens.position if tokens.moved else tokens.position[:1]
    return attention.relative_bias(table, position, position, tokens.length)


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
      evidence = evidence._replace(
        layers=sum(l <= half.layer for l in self.reducer.blocks(self.config.depth))
      )
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
