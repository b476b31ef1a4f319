"""The token stream: one struct that every block, method and executor passes on.

A method *decides* by writing `seen`, `updated` and `score`; an executor *removes* by gathering the whole struct, so that
no field can be forgotten. Shapes: b batch, n slots of the stream, h heads, d width, N original input length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

VECTOR = 8  # a CPU's loops are slower where a length is no multiple of it
LEAVERS = ('gone', 'frozen', 'unseen')  # still attended to and no longer updated: frozen; the reverse: unseen
MANY = 64  # below so many slots a few more would cost more than that


class Capacity(NamedTuple):
  """Static numbers of slots that survivors fit into; None = not known, keep them all.

  keys: key/value slots of one head in the next attention. rows: slots whose state the next blocks update.
  slots: slots of the whole stream (a slot that is neither seen nor updated may leave). batch_rows: in place of `rows`, for
  all examples of the batch together, however they share them. examples: of the batch, that are not answered yet.
  by_score: at this decision and at all later ones those of the highest `score` survive, so that the stream may be put in its
  order once and from then on be cut.
  """

  keys: int | None = None
  rows: int | None = None
  slots: int | None = None
  batch_rows: int | None = None
  examples: int | None = None
  by_score: bool = False


class Tokens(struct.PyTreeNode):
  """The stream between two half-blocks. Masks are floats in [0, 1]: hard 0/1, or between while a method trains softly.

  Fields are arrays of the shapes given, or their `ShapeDtypeStruct`s.
  """

  x: Any  # [b n d] states
  seen: Any  # [b n], or [b h n] where heads differ: how much a slot is attended to
  updated: Any  # [b n] how much a slot's state is recomputed
  protected: Any  # [b n] bool: no decision may drop it
  position: Any  # [b n] int32 index in the original input; -1 for combined and merged slots
  size: Any  # [b n] float: input tokens that a slot stands for
  score: Any = None  # like seen: when a capacity is too small, the lowest-scored leave
  carry: dict = struct.field(default_factory=dict)  # {name: [b n …]} a method's own per-slot state
  length: int = struct.field(pytree_node=False, default=0)  # N, what `position` counts up to
  # Examples it began with; 0 where they are regrouped.
  batch: int = struct.field(pytree_node=False, default=0)
  added: int = struct.field(pytree_node=False, default=0)  # trailing slots that are not input tokens
  moved: bool = struct.field(pytree_node=False, default=False)  # slot i is no longer input token i
  ranked: bool = struct.field(pytree_node=False, default=False)  # slots stand by falling score
  capacity: Capacity = struct.field(pytree_node=False, default=Capacity())


def start(x: Float[Array, 'b n d'], mask: Bool[Array, 'b n'], protect_first: bool, length: int = 0) -> Tokens:
  """A fresh stream over embedded input. mask: True at real tokens. protect_first: the read-out needs slot 0 ([CLS]).

  length: N where that is more than n, as for rows of different n that are to share a batch later.
  """
  b, n, _ = x.shape
  alive = mask.astype(jnp.float32)
  position = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
  return Tokens(
    x, seen=alive, updated=alive, protected=(position == 0) & protect_first, position=position, size=alive,
    length=length or n, batch=b,
  )  # fmt: skip


def presence(tokens: Tokens) -> Float[Array, 'b n']:
  """How much a slot is there: as much as the head that sees most of it, or as it is updated."""
  seen = tokens.seen if tokens.seen.ndim == 2 else tokens.seen.max(axis=1)
  return jnp.maximum(seen, tokens.updated)


def live(tokens: Tokens) -> Bool[Array, 'b n']:
  """Slots that are seen by any head or updated. All others are gone: padding, or removed by a decision."""
  return presence(tokens) > 0


def select(
  keep: Bool[Array, '*batch n'], capacity: int, score: Num[Array, '*batch n'] | None = None
) -> tuple[Int[Array, '*batch k'], Bool[Array, '*batch n'], Bool[Array, '*batch']]:
  """Slots that go into `capacity` places, in their original order.

  Kept slots come first; places left over hold dropped slots, which stay masked. Where more are kept than fit, the
  lowest-scored leave (without a score: the last). Returns (index [… capacity], the slots that got a place as a mask
  [… n], overflow […]).
  """
  n = keep.shape[-1]
  if not 0 < capacity <= n:
    raise ValueError(f'capacity {capacity} does not lie between 1 and the {n} slots of the stream')
  overflow = keep.sum(-1) > capacity
  if score is not None:
    keep = keep & highest(jnp.where(keep, score, -jnp.inf), capacity)
  slot = jnp.arange(n, dtype=jnp.int32)
  # Whole numbers that differ: sorting them takes half as long as a stable sort by `keep` does.
  order = jnp.sort(jnp.where(keep, slot, slot + n), axis=-1)[..., :capacity] % n
  fits = keep & (jnp.cumsum(keep, axis=-1) <= capacity)
  return order, fits, overflow


def highest(score: Num[Array, '*batch n'], count: int | Int[Array, '*#batch 1']) -> Bool[Array, '*batch n']:
  """The `count` highest scores, of equal ones the first: `descending_rank(score) < count` in a tenth of the time.

  The least of them is found bit by bit, the highest first: the largest number that at least `count` are not below.
  """
  key = in_bits(score)

  def with_bit(i, least):
    more = least | (jnp.uint32(1 << 31) >> i)
    return jnp.where((key >= more).sum(-1, keepdims=True) >= count, more, least)

  least = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros_like(key[..., :1]))
  above, ties = key > least, key == least
  return above | (ties & (jnp.cumsum(ties, axis=-1) <= count - above.sum(-1, keepdims=True)))


def in_bits(score: Num[Array, '*shape']) -> UInt32[Array, '*shape']:
  """Whole numbers in the order of the scores as float32; 0 for no number."""
  score = score.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.uint32)  # -0 is 0
  sign = jnp.uint32(1 << 31)
  return jnp.where(jnp.isnan(score), 0, jnp.where(bits >= sign, ~bits, bits | sign))


def descending_rank(score: Num[Array, '*batch n']) -> Int[Array, '*batch n']:
  """0 for the highest score; equal scores rank in slot order. What top-k keeps is `highest`."""
  order = jnp.argsort(-score, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


@jax.custom_vjp
def gather_rows(x: Num[Array, '*batch n d'], index: Int[Array, '*batch k'], kept: Bool[Array, '*batch n']):
  """x[…, index, :], where `index, kept` come from `select`; rows of index that are not `kept` get no gradient.

  The transpose of a gather is a scatter-add, which is slow on every backend. Here each slot has at most one place, so
  the gradient is a gather too.
  """
  del kept
  return jnp.take_along_axis(x, index[..., None], axis=-2)


def _gather_rows_forward(x, index, kept):
  return gather_rows(x, index, kept), kept


def _gather_rows_backward(kept, gradient):
  return spread(gradient, kept), None, None


gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def spread(rows: Num[Array, '*batch k d'], kept: Bool[Array, '*batch n']) -> Num[Array, '*batch n d']:
  """Undoes `gather_rows`: the i-th kept slot gets rows[…, i, :], all others 0."""
  place = jnp.clip(jnp.cumsum(kept, axis=-1) - 1, 0, rows.shape[-2] - 1)
  return jnp.where(kept[..., None], jnp.take_along_axis(rows, place[..., None], axis=-2), 0)


def room(capacity: int | None, n: int) -> int | None:
  """How many of n slots an executor gathers for a capacity: whole vectors; None where that is all of them."""
  if capacity is None or capacity >= n:
    return None
  whole = -(-capacity // VECTOR) * VECTOR if n >= MANY else capacity
  return whole if whole < n else None


def settled(tokens: Tokens) -> tuple[Tokens, Bool[Array, 'b']]:
  """What a decision leaves, in the room that it states: `compress` and `fit`. Returns (tokens, overflow [b])."""
  tokens, lost = compress(tokens)
  tokens, stopped = fit(tokens)
  return tokens, lost | stopped


def compress(tokens: Tokens) -> tuple[Tokens, Bool[Array, 'b']]:
  """Gathers the stream into `capacity.slots`, if the last decision stated it. Returns (tokens, overflow [b])."""
  slots = room(tokens.capacity.slots, tokens.x.shape[1])
  if slots is None:
    return tokens, jnp.zeros(tokens.x.shape[0], bool)
  if not tokens.capacity.by_score or tokens.added:
    return gather_live(tokens, slots)
  if tokens.ranked:
    return cut(tokens, slots), live(tokens)[:, slots:].any(-1)
  return in_order(tokens, slots), live(tokens).sum(-1) > slots


def in_order(tokens: Tokens, slots: int) -> Tokens:
  """The first `slots` by falling score, of equal ones as they stand; those that are not live come last and become empty."""
  order = jnp.argsort(jnp.where(live(tokens), -score_of(tokens), jnp.inf), axis=-1, stable=True)
  tokens = gathered(tokens, order[:, :slots]).replace(moved=True, ranked=True)
  return emptied(tokens, live(tokens))


def cut(tokens: Tokens, slots: int) -> Tokens:
  """The first slots; those that are not live become empty."""
  tokens = sliced(tokens, 0, slots)
  return emptied(tokens, live(tokens))


def leading(tokens: Tokens) -> bool:
  """Whether the slots that a capacity keeps are the first ones."""
  alone = tokens.capacity.batch_rows is None and not tokens.added
  return tokens.ranked and tokens.capacity.by_score and alone


def fit(tokens: Tokens) -> tuple[Tokens, Bool[Array, 'b']]:
  """The stream whose rows fit `capacity.rows` or `.batch_rows`: (tokens, overflow [b], of examples that lose some).

  The lowest-scored (without a score: the last) are no longer updated; they keep the states that they have.
  """
  (b, n), capacity = tokens.updated.shape, tokens.capacity
  together = capacity.batch_rows is not None
  shape, wanted = ((1, b * n), capacity.batch_rows) if together else ((b, n), capacity.rows)
  slots = room(wanted, shape[1])
  if slots is None:
    return tokens, jnp.zeros(b, bool)
  updated = tokens.updated
  if leading(tokens):
    stay = jnp.arange(n) < slots
  else:
    stay = highest(jnp.where(updated > 0, score_of(tokens), -jnp.inf).reshape(shape), slots).reshape(b, n)
  return tokens.replace(updated=updated * stay), ((updated > 0) & ~stay).any(-1)


def score_of(tokens: Tokens) -> Float[Array, 'b n']:
  """By which slots leave where there is too little room: the largest of all heads; 0 without any."""
  if tokens.score is None:
    return jnp.zeros(tokens.updated.shape)
  return tokens.score if tokens.score.ndim == 2 else tokens.score.max(axis=1)


def gather_live(tokens: Tokens, slots: int) -> tuple[Tokens, Bool[Array, 'b']]:
  """Live slots in their order, then empty ones, then the added slots: (tokens [b slots], overflow [b])."""
  inputs, added = tokens.x.shape[1] - tokens.added, tokens.added
  front = sliced(tokens, 0, inputs)
  score = front.score
  if score is not None and score.ndim == 3:
    score = score.max(axis=1)
  index, kept, overflow = select(live(front), slots - added, score)
  front = take(front, index, kept)
  if not added:
    return front, overflow
  back = sliced(tokens, inputs, None)
  return slotwise(lambda a, b, axis: jnp.concatenate([a, b], axis=axis), front, back), overflow


def sliced(tokens: Tokens, start: int, stop: int | None) -> Tokens:
  """The slots from `start` to before `stop`."""
  return slotwise(lambda field, axis: jax.lax.slice_in_dim(field, start, stop, axis=axis), tokens)


def slotwise(function: Callable[..., Array], *streams: Tokens) -> Tokens:
  """`function(field of each stream …, axis=its axis n)` for every field that has one; the rest is the first stream's."""

  def mapped(*fields):
    return function(*fields, axis=1)

  def mask(*fields):
    return function(*fields, axis=fields[0].ndim - 1)

  first = streams[0]
  plain = {
    name: mapped(*(getattr(s, name) for s in streams))
    for name in ('x', 'updated', 'protected', 'position', 'size')
  }
  return first.replace(
    **plain,
    seen=mask(*(s.seen for s in streams)),
    score=None if first.score is None else mask(*(s.score for s in streams)),
    carry=jax.tree.map(mapped, *(s.carry for s in streams)),
  )


def leave(
  tokens: Tokens,
  stay: Bool[Array, 'b *h k'],
  score: Float[Array, 'b *h k'],
  leavers: str,
  capacity: int | None,
) -> Tokens:
  """A decision in the stream. stay, score: of the k input slots; the added ones behind them stay, whatever the room.

  leavers: what the others become, one of LEAVERS. With an axis of heads they can only be unseen. capacity: how many
  input slots may stay; None: not known. Where it is too small protected slots are the last to leave.
  """
  added = [(0, 0)] * (stay.ndim - 1) + [(0, tokens.added)]
  guarded = tokens.protected[:, : score.shape[-1]]
  score = jnp.where(guarded if score.ndim == 2 else guarded[:, None], jnp.inf, score)
  stay = jnp.pad(stay, added, constant_values=True).astype(tokens.updated.dtype)
  tokens = tokens.replace(
    score=jnp.pad(score, added, constant_values=jnp.inf),
    ranked=False,
    capacity=tokens.capacity._replace(by_score=False),
  )
  room = None if capacity is None else capacity + tokens.added
  if leavers != 'unseen':
    tokens = tokens.replace(updated=tokens.updated * stay, capacity=tokens.capacity._replace(rows=room))
  if leavers != 'frozen':
    seen, ranks = tokens.seen, max(tokens.seen.ndim, stay.ndim)
    seen, stay = (x[:, None] if x.ndim < ranks else x for x in (seen, stay))
    tokens = tokens.replace(seen=seen * stay, capacity=tokens.capacity._replace(keys=room))
  return tokens.replace(capacity=Capacity(slots=room)) if leavers == 'gone' else tokens


def empty_rows(tokens: Tokens, left: Bool[Array, 'b']) -> Tokens:
  """The stream in which all slots of the examples that `left` are gone."""
  stay = (~left).astype(tokens.updated.dtype)[:, None]
  seen = tokens.seen * (stay if tokens.seen.ndim == 2 else stay[..., None])
  return tokens.replace(seen=seen, updated=tokens.updated * stay)


def take(tokens: Tokens, index: Int[Array, 'b k'], kept: Bool[Array, 'b n']) -> Tokens:
  """Every field gathered at `index`; slots that are not `kept` become empty."""
  taken = gathered(tokens, index).replace(x=gather_rows(tokens.x, index, kept), moved=True, ranked=False)
  return emptied(taken, jnp.take_along_axis(kept, index, axis=1))


def gathered(tokens: Tokens, index: Int[Array, 'b k']) -> Tokens:
  """Every field at `index`."""

  def pick(field, axis):
    shape = [1] * field.ndim
    shape[0], shape[axis] = index.shape
    return jnp.take_along_axis(field, index.reshape(shape), axis=axis)

  return slotwise(pick, tokens)


def emptied(tokens: Tokens, filled: Bool[Array, 'b k']) -> Tokens:
  """The stream in which slots that are not `filled` are empty: unseen, not updated, no input token's."""

  def masked(mask):
    return mask * (filled if mask.ndim == 2 else filled[:, None])

  return tokens.replace(
    seen=masked(tokens.seen),
    updated=masked(tokens.updated),
    protected=tokens.protected & filled,
    position=jnp.where(filled, tokens.position, -1),
    size=masked(tokens.size),
    score=None if tokens.score is None else masked(tokens.score),
  )


def restored(board: Float[Array, 'b _ d'], tokens: Tokens) -> Float[Array, 'b N d']:
  """The board [b N d] with the state of every slot that stands for an input token written to that token's place.

  Where every slot is still in its place the board is not read, and may be empty.
  """
  inputs = tokens.x.shape[1] - tokens.added
  if not tokens.moved and inputs == tokens.length:
    return tokens.x[:, :inputs]
  rows = jnp.arange(board.shape[0])[:, None]
  place = jnp.where(tokens.position < 0, tokens.length, tokens.position)
  return board.at[rows, place].set(tokens.x.astype(board.dtype), mode='drop')


def scatter_to_input(
  values: Num[Array, 'b n'], position: Int[Array, 'b n'], length: int
) -> Num[Array, 'b N']:
  """values laid out by original position [b N]; slots with position -1 are left out, absent tokens are 0."""
  rows = jnp.arange(values.shape[0])[:, None]
  target = jnp.where(position < 0, length, position)
  return jnp.zeros((values.shape[0], length), values.dtype).at[rows, target].add(values, mode='drop')
