"""The executor `serve`: a host loop over compiled segments, so that cost follows each example's own survivors.

After every segment the host reads how many slots of each example are left, and puts it into a pool with others of like
length; a full pool runs next. Examples that exit leave their place to waiting ones. Nothing is approximated: an answer is
that of the executor `mask`, whatever else is served beside it.

    with serve.Server(model, params) as server:
      server.precompile()
      future = server.submit([101, 2023, 102])           # token ids; texts where `encode` is given
      for answer in server.map(requests): ...
"""

import collections
import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import flops, specs
from tokenprune_jax.buckets import Buckets, Place, lengths_of
from tokenprune_jax.errors import UserError
from tokenprune_jax.ladder import Ladder
from tokenprune_jax.models import Classifier
from tokenprune_jax.request import Answer, Reader, Request
from tokenprune_jax.segments import Bucket, Programs, Report, State

STARTED = 2  # batches whose results were not read yet: the host works while the device does
HELD = 32  # full batches that pools may hold before new requests have to wait
PATIENCE = 1000  # batches that may start before those that wait for company go without


@dataclasses.dataclass
class Pool:
  """Rows that wait for one program, since so many batches were started. updated: slots of each that are."""

  place: Place
  state: Any
  requests: list[Request]
  since: int = 0
  updated: list[int] = dataclasses.field(default_factory=list)


class Started(NamedTuple):
  """A batch that a program was started on."""

  place: Place
  requests: list[Request]
  state: State | None
  report: Report


class Server:
  """Serves a classifier. One thread runs it; `submit` and `map` may be called from any.

  ladder: the shapes. queue: requests that may wait. encode: (texts, second texts or None) -> [(encoding, tokens cut off)],
  as `data.Encoder`; without it requests are token ids. controls: {name: default} of the method's controls that a request
  may set, by `submit(request, {name: value})`. labels: names of the classes. Where the method decides by words
  (`Reducer.needs_words`), a request is {'ids': …, 'words': the number of the word that each token is a piece of, or -1}.
  Raises UserError where the ladder is none, and for a control that the method has not, or a value that it cannot have.
  """

  def __init__(
    self,
    model: Classifier,
    params: Mapping[str, Any],
    *,
    ladder: Ladder | None = None,
    queue: int = 256,
    encode: Callable[..., Sequence[Any]] | None = None,
    controls: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
  ):
    if queue < 1:
      raise UserError(f'queue is {queue}; it is how many requests may wait, 1 or more.')
    config, controls = model.config, specs.given_controls(model, controls or {})

    @functools.lru_cache(maxsize=1024)
    def refuse(given: tuple[tuple[str, float], ...]) -> None:
      specs.check_controls(model.reducer, dict(given), config.depth, config.heads)

    self.labels = tuple(labels)
    self.model, self.queue, self.words = model, queue, model.reducer.needs_words()
    self.ladder = (ladder or Ladder(lengths_of(model))).settled(config.max_length)
    self.reader = Reader(self.ladder.lengths[-1], config.vocab_size, controls, encode, self.words, refuse)
    self.programs = Programs(model, params, self.ladder.lengths[-1], tuple(controls))
    self.buckets = Buckets(model, self.programs, self.ladder)
    self.waiting: collections.deque[Request] = collections.deque()
    self.pools: dict[Place, Pool] = {}  # none of them full; the oldest first
    self.full: list[Pool] = []
    self.started: collections.deque[Started] = collections.deque()
    self.hand: list[Request] = []  # about to start
    self.batches = 0  # started so far
    self.changed = threading.Condition()  # guards `waiting` and `closed`; the rest is the thread's own
    self.closed = False
    self.thread = threading.Thread(target=self.loop, name='serve', daemon=True)
    self.thread.start()

  # ------------------------------------------------------------------------------------------------ For callers
  def submit(
    self, request: Any, controls: Mapping[str, Any] | None = None, *, wait: bool = False
  ) -> concurrent.futures.Future:
    """A future of the request's Answer. request: token ids, a text or a pair of texts, or ids with their words (see above).

    wait: until there is room in the queue. Raises UserError for a request that cannot be served, for a full queue
    and for a closed server.
    """
    made = self.reader.read(request, controls or {})
    made.since = self.batches
    with self.changed:
      if wait:
        self.changed.wait_for(lambda: self.closed or len(self.waiting) < self.queue)
      if self.closed:
        raise UserError('the server is closed; it takes no more requests.')
      if len(self.waiting) >= self.queue:
        raise UserError(f'the queue is full: {self.queue} requests wait. Try again later, or make it longer.')
      self.waiting.append(made)
      self.changed.notify_all()
    return made.future

  def map(
    self, requests: Iterable[Any], controls: Mapping[str, Any] | None = None, *, on_error: str = 'raise'
  ) -> Iterator[Answer | UserError]:
    """The answers in the order of the requests, which are read as there is room.

    on_error: 'raise' what is wrong with a request when its turn comes (those behind it are given up), or 'return' the
    UserError in the place of its answer.
    """
    if on_error not in ('raise', 'return'):
      raise UserError(f"on_error is {on_error!r}; choose 'raise' or 'return'.")
    pending: collections.deque[concurrent.futures.Future] = collections.deque()

    def oldest() -> Answer | UserError:
      error = pending[0].exception()  # waits for it
      future = pending.popleft()
      return error if isinstance(error, UserError) and on_error == 'return' else future.result()

    try:
      for number, request in enumerate(requests, 1):
        try:
          pending.append(self.submit(request, controls, wait=True))
        except UserError as error:
          pending.append(concurrent.futures.Future())
          pending[-1].set_exception(UserError(f'request number {number}: {error}'))
        while pending and (pending[0].done() or len(pending) > 4 * self.queue):
          yield oldest()
      while pending:
        yield oldest()
    finally:
      for future in pending:  # the reader stopped early
        future.cancel()

  def precompile(self) -> int:
    """Compiles every program that a request can need; returns how many there are."""
    for index in range(len(self.programs.segments)):
      for bucket in self.buckets.of(index):
        for form in self.buckets.forms(index, bucket):
          self.programs.program(index, form)
        if index and bucket.rows > 1:
          self.alone(Pool(Place(index, bucket), self.programs.room(index, bucket), []), 0)
      for target, source in self.buckets.moves(index) if index else ():
        room = self.programs.room(index, target)
        self.programs.move(room, self.programs.room(index, source), np.zeros(target.rows, np.int32))
    return len(self.programs)

  def close(self, cancel: bool = False) -> None:
    """Answers what was submitted (or cancels what still waits), then ends the thread."""
    with self.changed:
      self.closed = True
      for request in self.waiting if cancel else ():
        request.future.cancel()
      self.changed.notify_all()
    self.thread.join()

  def __enter__(self) -> 'Server':
    return self

  def __exit__(self, kind, error, trace) -> None:
    self.close(cancel=error is not None)

  # ------------------------------------------------------------------------------------------------ The loop
  def loop(self) -> None:
    """Runs until the server is closed and everything is answered; should it fail, nobody waits for ever."""
    try:
      self.work()
    except Exception as error:  # noqa: BLE001
      with self.changed:
        self.closed = True
        pools: list[Pool | Started] = [*self.pools.values(), *self.full, *self.started]
        fail([*self.waiting, *self.hand, *(request for pool in pools for request in pool.requests)], error)
        self.changed.notify_all()

  def work(self) -> None:
    """The loop."""
    while True:
      oldest = next(iter(self.pools.values()), None)
      if oldest is not None and self.batches - oldest.since > PATIENCE:
        self.full.append(self.pools.pop(oldest.place))
      with self.changed:
        self.changed.wait_for(lambda: self.closed or self.waiting or self.busy())
        if not (self.waiting or self.busy()):
          return
        held = sum(len(pool.requests) / pool.place.bucket.rows for pool in self.pools.values())
        patient = not self.waiting or self.batches - self.waiting[0].since <= PATIENCE
        admitted = [] if self.full or held > HELD else self.admit(whole=patient)
        if not (admitted or self.busy()):  # who is on the way goes before new ones that fill no batch
          admitted = self.admit(whole=False)
      if self.full:
        self.full.sort(key=lambda pool: pool.place.segment)
        self.run(self.full.pop())
      elif admitted:
        self.begin(admitted)
      elif self.started:
        self.settle(self.started.popleft())
      elif self.pools:
        # From the front: what comes out of it may fill pools further on.
        self.run(self.pools.pop(min(self.pools, key=lambda place: (place.segment, -place.bucket.slots))))
      while len(self.started) > STARTED:
        self.settle(self.started.popleft())

  def busy(self) -> bool:
    """Whether any request is on its way."""
    return bool(self.started or self.full or self.pools)

  def admit(self, whole: bool) -> list[Request]:
    """Takes waiting requests of one bucket. whole: the first batch that is full, or none; else the oldest and its like."""
    groups: dict[int, list[Request]] = {}
    chosen: list[Request] = []
    for request in self.waiting:
      slots = self.ladder.slots(len(request.ids))
      group = groups.setdefault(slots, [])
      if len(group) < self.buckets.rows(slots):
        group.append(request)
      if whole and len(group) == self.buckets.rows(slots):
        chosen = group
        break
    if not whole:
      chosen = next(iter(groups.values()), [])
    taken = set(map(id, chosen))
    if taken:
      self.waiting = collections.deque(request for request in self.waiting if id(request) not in taken)
      self.changed.notify_all()
    return [request for request in chosen if request.future.set_running_or_notify_cancel()]

  def begin(self, requests: list[Request]) -> None:
    """Starts the first segment."""
    self.hand = requests
    slots = self.ladder.slots(max(len(request.ids) for request in requests))
    bucket = self.buckets.entry(slots)
    place = self.buckets.form(Place(0, bucket), [len(request.ids) for request in requests])
    if self.buckets.worth(place, len(requests)):
      self.start(place, self.batch(requests, bucket), requests)
      return
    for request in requests:
      alone = bucket._replace(rows=1)
      self.start(Place(0, alone), self.batch([request], alone), [request])

  def batch(self, requests: Sequence[Request], bucket: Bucket) -> dict[str, Any]:
    """Requests side by side; rows left over are empty."""
    ids = np.full((bucket.rows, bucket.slots), self.model.config.pad_id, np.int32)
    types, mask = np.zeros_like(ids), np.zeros(ids.shape, bool)
    words = {'words': np.full(ids.shape, -1, np.int32)} if self.words else {}
    controls = {name: np.full(bucket.rows, value, np.float32) for name, value in self.reader.controls.items()}
    for row, request in enumerate(requests):
      length = len(request.ids)
      ids[row, :length], types[row, :length], mask[row, :length] = request.ids, request.types, True
      if request.words is not None:
        words['words'][row, :length] = request.words
      for name, value in request.controls.items():
        controls[name][row] = value
    return {'ids': ids, 'mask': mask, 'types': types, **words, 'controls': controls}

  def run(self, pool: Pool) -> None:
    """Starts a pool's program; where most of its rows are empty, one row at a time."""
    self.hand = pool.requests
    place = self.buckets.form(pool.place, pool.updated)
    if self.buckets.worth(place, len(pool.requests)):
      self.start(place, pool.state, pool.requests)
      return
    for row, request in enumerate(pool.requests):
      place = pool.place._replace(bucket=pool.place.bucket._replace(rows=1))
      self.start(self.buckets.form(place, pool.updated[row : row + 1]), self.alone(pool, row), [request])

  def alone(self, pool: Pool, row: int) -> State:
    """One row of a pool."""
    room = self.programs.room(pool.place.segment, pool.place.bucket._replace(rows=1))
    return self.programs.move(room, pool.state, np.array([row], np.int32))

  def start(self, place: Place, given: Any, requests: list[Request]) -> None:
    """Starts a segment on a batch."""
    try:
      self.batches += 1
      state, report = self.programs.program(*place)(given)
      self.started.append(Started(place, requests, state, report))
    except Exception as error:  # noqa: BLE001 (these requests are lost and told so, the server is not)
      fail(requests, error)

  def settle(self, batch: Started) -> None:
    """Reads what a segment found: finished examples are answered, the others go into the pools of the next one."""
    try:
      report = jax.device_get(batch.report)
      segment = self.programs.segments[batch.place.segment]
      blocks = sum(half.attention for half in segment.halves)
      going: dict[Bucket, list[int]] = {}
      for row, request in enumerate(batch.requests):
        request.macs += float(report.macs[row])
        request.layers += blocks
        if segment.last or report.exited[row]:
          self.answer(request, report, row)
        else:
          going.setdefault(self.buckets.after(batch.place, report, row), []).append(row)
      for bucket, rows in going.items():
        self.pour(Place(batch.place.segment + 1, bucket), batch._replace(report=report), rows)
    except Exception as error:  # noqa: BLE001
      fail(batch.requests, error)

  def pour(self, place: Place, batch: Started, rows: Sequence[int]) -> None:
    """Rows of a batch into the pool of their place."""
    assert batch.state is not None  # only the last segment has none
    while rows:
      pool = self.pools.get(place) or Pool(place, self.programs.room(*place), [], self.batches)
      room = place.bucket.rows - len(pool.requests)
      which = np.full(place.bucket.rows, -1, np.int32)
      which[len(pool.requests) :][: len(rows)] = rows[:room]
      pool.state = self.programs.move(pool.state, batch.state, which)
      pool.requests += [batch.requests[row] for row in rows[:room]]
      pool.updated += [int(batch.report.updated[row]) for row in rows[:room]]
      rows = rows[room:]
      if len(pool.requests) == place.bucket.rows:
        self.pools.pop(place, None)
        self.full.append(pool)
      else:
        self.pools[place] = pool

  def answer(self, request: Request, report: Report, row: int) -> None:
    """Ends a request."""
    config, labels, head = self.model.config, self.model.labels, self.model.counted_head
    macs = (
      request.macs + float(report.overhead[row]) + flops.head_macs(config, labels, head, len(request.ids))
    )
    dense = flops.dense_macs(config, labels, head, len(request.ids))
    logits = np.asarray(report.answer[row])
    logits = logits[: len(request.ids)] if self.model.readout == 'tokens' else logits
    best = logits.argmax(-1).tolist()
    label = name_of(best, self.labels) if self.labels else best
    request.future.set_result(Answer(label, logits, request.layers, macs, dense, request.truncated))


def name_of(numbers: Any, labels: Sequence[str]) -> Any:
  """The name of a class, or a list of names."""
  return [labels[number] for number in numbers] if isinstance(numbers, list) else labels[numbers]


def fail(requests: Sequence[Request], error: Exception) -> None:
  """Hands an error to all of a batch."""
  for request in requests:
    request.fail(error)
