"""The model cut into segments at the points where examples start to differ, each compiled for every bucket.

A segment runs from one decision of the method to the next. It takes a stream and returns it with the live slots in front,
beside what the host needs to know: how many there are, and who has exited. Segments that lower to the same code share one
program, whatever layers they are. Shapes: b batch, n slots, c classes.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int

from tokenprune_jax import flops
from tokenprune_jax import tokens as stream
from tokenprune_jax.encoder import Encoder, overheads
from tokenprune_jax.ladder import QUARTERS
from tokenprune_jax.models import Classifier, Head, answered, encoder_of
from tokenprune_jax.reducer import Half, Inputs, Memory, read_out
from tokenprune_jax.tokens import Capacity, Tokens


class State(NamedTuple):
  """What goes from segment to segment, for b examples."""

  tokens: Tokens
  memory: Memory


class Bucket(NamedTuple):
  """The static shapes of a program: rows, and input slots of each; added ones come on top.

  keys, updated: quarters of the slots that the program gathers keys and rows into; None: it gathers none. length: N, the
  places of what is kept by input position; 0: as many as the longest request has. together: in place of `updated`, quarters
  of the slots of all rows.
  """

  rows: int
  slots: int
  keys: int | None = None
  updated: int | None = None
  length: int = 0
  together: int | None = None

  def capacity(self, added: int) -> Capacity:
    """The parts in slots."""
    total = self.slots + added

    def slots(share, total):
      return None if share is None else -(-share * total // QUARTERS)

    keys, rows = slots(self.keys, total), slots(self.updated, total)
    return Capacity(keys, rows, batch_rows=slots(self.together, self.rows * total))


class Segment(NamedTuple):
  """Halves of blocks that run in one program."""

  halves: tuple[Half, ...]
  first: bool
  last: bool


class Report(NamedTuple):
  """Per example [b], after a segment: what the host decides by.

  answer [b c], of a tagger [b N c]: where exited, or at the end.
  """

  live: Array  # input slots
  widest: Array  # keys of the head that has most, added slots included
  updated: Array  # rows, added slots included
  exited: Array  # bool
  answer: Array
  macs: Array  # multiply-adds of the segment's blocks, evidence included
  overhead: Array  # multiply-adds of the method itself, so far


def cut(model: Classifier) -> tuple[Segment, ...]:
  """The segments of a model, in order."""
  encoder = make_encoder(model)
  halves, cuts = encoder.halves(), set(model.reducer.decides(model.config.depth))
  pieces: list[list[Half]] = [[], []] if Half(0, False) in cuts else [[]]
  for half in halves:
    pieces[-1].append(half)
    if half in cuts and half != halves[-1]:
      pieces.append([])
  return tuple(Segment(tuple(p), i == 0, i == len(pieces) - 1) for i, p in enumerate(pieces))


def make_encoder(model: Classifier) -> Encoder:
  """The model's encoder, by itself."""
  return encoder_of(model, 'serve')


def encoder_params(params: Mapping[str, Any]) -> dict[str, Any]:
  """A classifier's parameters as `make_encoder` has them: the reducer's lie inside."""
  return {**params['encoder'], **({'reducer': params['reducer']} if 'reducer' in params else {})}


def run(model: Classifier, bucket: Bucket, segment: Segment, params: Mapping[str, Any], given: Any):
  """One segment: (State or None at the end, Report).

  given: a State, for the first segment a batch (ids, mask, types and, where the method asks for them, words [b n], controls
  {name: [b]}).
  """
  encoder = make_encoder(model)

  def call(method, *arguments):
    return encoder.apply({'params': encoder_params(params)}, *arguments, method=method)

  if segment.first:
    inputs = Inputs(
      given['ids'],
      given['mask'],
      given['types'],
      given['controls'],
      model.labels,
      model.config,
      model.readout == 'cls',
      given.get('words'),
    )
    tokens, memory = call('begin', inputs, False, bucket.length)
  else:
    tokens, memory = given
  if not segment.first or bucket.together is not None:  # else what the method starts with
    tokens = tokens.replace(capacity=bucket.capacity(tokens.added))
  tokens, memory, counts = call('segment', tokens, memory, segment.halves)
  b = tokens.x.shape[0]
  exited = memory.get('exited', jnp.zeros(b, bool))
  answer = memory.get('prediction', jnp.zeros((b, model.labels)))
  if segment.last:
    head = Head(model.config, model.labels, model.head)
    logits: Any = head.apply({'params': params['head']}, read_out(tokens, model.readout, memory), False)
    answer = answered(logits, memory)
  elif model.readout == 'tokens':  # the host takes away the slots that are gone, where any are
    board = memory['board']
    memory = {**memory, 'board': stream.restored(board, tokens) if model.reducer.shortens() else board[:, :0]}
  inputs = tokens.x.shape[1] - tokens.added
  seen = tokens.seen if tokens.seen.ndim == 3 else tokens.seen[:, None]
  report = Report(
    live=stream.live(tokens)[:, :inputs].sum(-1),
    widest=(seen > 0).sum(-1).max(axis=1),
    updated=(tokens.updated > 0).sum(-1),
    exited=exited,
    answer=answer,
    macs=sum((half_macs(model, columns) for columns in counts.values()), jnp.zeros(b)),
    overhead=sum(overheads(memory).values(), jnp.zeros(b)),
  )
  return (None if segment.last else State(counted(model, tokens), memory)), report


def half_macs(model: Classifier, columns: Mapping[str, Array]) -> Array:
  """Multiply-adds [b] of half a block, from what `Encoder.count` says of it."""
  block = flops.block_macs(model.config, *(columns.get(name, 0.0) for name in flops.COUNTS))
  return block + columns.get('evidence', 0.0)


def counted(model: Classifier, tokens: Tokens) -> Tokens:
  """Live slots in front, where any are gone, and the method's hints about counts forgotten: the host has counted."""
  if not model.reducer.shortens():
    return tokens.replace(score=None, batch=0, capacity=Capacity())
  if tokens.x.shape[1] > tokens.added:
    tokens, _ = stream.gather_live(tokens.replace(score=None), tokens.x.shape[1])
  return tokens.replace(score=None, moved=True, batch=0, capacity=Capacity())


def fill(room: State, source: State, which: Int[Array, 'b']) -> State:
  """`room` with row i taken from row which[i] of `source`; -1: row i stays. Slots that room lacks must be empty."""
  taken, place = which >= 0, jnp.maximum(which, 0)

  def rows(old, new):
    return jnp.where(taken.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  def slots(old, new, axis):
    new, added = new[place], room.tokens.added
    front = jax.lax.slice_in_dim(new, 0, old.shape[axis] - added, axis=axis)
    back = jax.lax.slice_in_dim(new, new.shape[axis] - added, None, axis=axis)
    return rows(old, jnp.concatenate([front, back], axis=axis))

  memory = jax.tree.map(lambda old, new: rows(old, new[place]), room.memory, source.memory)
  return State(stream.slotwise(slots, room.tokens, source.tokens), memory)


def room_for(source: State, bucket: Bucket) -> State:
  """An empty State of a bucket. source: any State after the same segment."""

  def resized(field, axis):
    shape = list(field.shape)
    shape[0], shape[axis] = bucket.rows, bucket.slots + source.tokens.added
    return jnp.zeros(shape, field.dtype)

  tokens = stream.slotwise(resized, source.tokens)
  return State(tokens, jax.tree.map(lambda x: jnp.zeros((bucket.rows, *x.shape[1:]), x.dtype), source.memory))


class Programs:
  """The compiled programs of a model. All that `program` and `move` need is compiled at their first use, and kept."""

  def __init__(self, model: Classifier, params: Mapping[str, Any], length: int, controls: Sequence[str]):
    self.model, self.length, self.controls = model, length, tuple(controls)
    self.segments = cut(model)
    self.leaves = flatten_dict(jax.device_put(params))
    self.used: dict[int, list[tuple[str, ...]]] = {}  # segment -> its parameters, by first use
    self.states: dict[tuple[int, int], State] = {}  # (segment, N) -> shapes of its results
    self.ready: dict[tuple[int, Bucket], Callable] = {}
    self.by_code: dict[str, Any] = {}
    self.moves: dict[Any, Any] = {}
    self.rooms: dict[tuple[int, Bucket], State] = {}
    self.empty: dict[Any, State] = {}  # by shapes: segments share them

  def __len__(self) -> int:
    """Programs compiled so far."""
    return len(self.by_code) + len(self.moves)

  def function(self, index: int, bucket: Bucket) -> Callable:
    """`run` of a segment, with parameters as a list in the order of `used`."""
    names, bucket = self.used[index], bucket._replace(length=bucket.length or self.length)

    def called(leaves, given):
      return run(self.model, bucket, self.segments[index], unflatten_dict(dict(zip(names, leaves))), given)

    return called

  def shapes(self, index: int, bucket: Bucket) -> Any:
    """What a segment takes in a bucket."""
    if index == 0:
      row = {'ids': jnp.int32, 'mask': bool, 'types': jnp.int32}
      if self.model.reducer.needs_words():
        row['words'] = jnp.int32
      batch: dict[str, Any] = {
        k: jax.ShapeDtypeStruct((bucket.rows, bucket.slots), t) for k, t in row.items()
      }
      names = self.controls
      return {**batch, 'controls': {k: jax.ShapeDtypeStruct((bucket.rows,), jnp.float32) for k in names}}
    return jax.eval_shape(functools.partial(room_for, bucket=bucket), self.result(index - 1, bucket.length))

  def result(self, index: int, length: int = 0) -> State:
    """The shapes of a segment's State, of one row in the longest bucket of a length."""
    if (index, length) not in self.states:
      inputs = index == 0 or self.has_inputs(index - 1)
      bucket = Bucket(1, (length or self.length) if inputs else 0, length=length)
      given = self.shapes(index, bucket)
      function = self.named(index, bucket, given)
      leaves = [self.leaves[name] for name in self.used[index]]
      self.states[index, length] = jax.eval_shape(function, leaves, given)[0]
    return self.states[index, length]

  def has_inputs(self, index: int) -> bool:
    """Whether there are input slots left after a segment; else all of them are combined."""
    tokens = self.result(index).tokens
    return tokens.x.shape[1] > tokens.added

  def named(self, index: int, bucket: Bucket, given: Any) -> Callable:
    """`function`, once it is known which parameters the segment reads, and in which order."""
    if index not in self.used:
      names = list(self.leaves)
      leaves = [self.leaves[name] for name in names]
      self.used[index] = names
      jaxpr = jax.make_jaxpr(self.function(index, bucket))(leaves, given).jaxpr
      place = {id(variable): i for i, variable in enumerate(jaxpr.invars[: len(names)])}
      read = [id(variable) for equation in jaxpr.eqns for variable in equation.invars]
      self.used[index] = [names[place[key]] for key in dict.fromkeys(read) if key in place]
    return self.function(index, bucket)

  def program(self, index: int, bucket: Bucket) -> Callable:
    """The compiled segment of a bucket, a function of what `shapes` describes."""
    if (index, bucket) not in self.ready:
      given = self.shapes(index, bucket)
      function = self.named(index, bucket, given)
      leaves = [self.leaves[name] for name in self.used[index]]
      lowered = jax.jit(function).lower(leaves, given)
      code = hashlib.sha256(f'{lowered.in_tree} {lowered.out_tree} {lowered.as_text()}'.encode()).hexdigest()
      if code not in self.by_code:
        self.by_code[code] = lowered.compile()
      compiled = self.by_code[code]
      self.ready[index, bucket] = lambda given: compiled(leaves, given)
    return self.ready[index, bucket]

  def room(self, index: int, bucket: Bucket) -> State:
    """An empty State for segment `index`, in memory."""
    if (index, bucket) not in self.rooms:
      shapes = self.shapes(index, bucket)
      leaves, structure = jax.tree.flatten(shapes)
      key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
      if key not in self.empty:
        self.empty[key] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      self.rooms[index, bucket] = self.empty[key]
    return self.rooms[index, bucket]

  def move(self, room: State, source: State, which) -> State:
    """`fill`, compiled."""
    key = tuple((jax.tree.structure(s), *map(jnp.shape, jax.tree.leaves(s))) for s in (room, source))
    if key not in self.moves:
      self.moves[key] = jax.jit(fill).lower(room, source, which).compile()
    return self.moves[key](room, source, which)
