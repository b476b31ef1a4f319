"""Programs timed beside each other in one process that cannot all be there at once.

A kernel of XLA's CPU code takes three of the 65,530 pieces of memory that Linux lets a process map, a program of 12 layers
about a thousand. So programs are made one after the other, timed in turns with those that stay, and given up.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from benchmarks import measure
from tokenprune_jax import timing

Program = Callable[[], object]
Makers = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass
class Turn:
  """A program, what it and those beside it took (as `timing.in_turns`), and the load of others.

  program: None once it is given up, so that whoever still holds the turn does not keep the code.
  pace: its seconds as a multiple of the first program's, by the turns that link them; a machine may be slower meanwhile.
  """

  name: str
  program: Any
  times: dict[str, dict[str, Any]]
  load: float | None
  pace: float = 1.0

  @property
  def own(self) -> dict[str, Any]:
    """What the program took."""
    return self.times[self.name]

  def seconds_of(self, other: 'Turn') -> float:
    """What another program would have taken in this turn, by their paces."""
    return self.own['seconds'] * other.pace / self.pace

  def give_up(self) -> None:
    """Ends what has a thread of its own, and gives back the code that nobody holds any more."""
    if isinstance(self.program, timing.Served):
      self.program.close()
    self.program = None
    jax.clear_caches()
    gc.collect()


def timed(
  name: str, make: Callable[[], Any], beside: Mapping[str, Program], repeats: int, allow_load: bool
) -> Turn:
  """A program, made and timed in turns with those in `beside`. Exits where the machine is not quiet."""
  program = make()
  load = measure.quiet(allow_load)
  return Turn(name, program, timing.in_turns({**beside, name: program}, repeats), load)


def one_by_one(
  makers: Makers, beside: Mapping[str, Program], repeats: int, allow_load: bool = False
) -> Iterator[Turn]:
  """Each program, timed in turns with those in `beside`; it is given up when the next is asked for."""
  for name, make in makers.items():
    turn = timed(name, make, beside, repeats, allow_load)
    yield turn
    turn.give_up()


def fastest(
  makers: Makers, repeats: int, allow_load: bool = False, seen: Callable[[Turn], object] = lambda turn: None
) -> Turn | None:
  """The turn of the fastest program, which stays: each is timed beside the best before it. None of no programs.

  seen: called with each turn while its program is there.
  """
  best: Turn | None = None
  for name, make in makers.items():
    turn = timed(name, make, {best.name: best.program} if best else {}, repeats, allow_load)
    if best is not None:
      turn.pace = best.pace * turn.own['seconds'] / turn.times[best.name]['seconds']
    seen(turn)
    if best is None:
      best = turn
    elif turn.pace < best.pace:
      best.give_up()
      best = turn
    else:
      best.times, best.load = turn.times, turn.load
      turn.give_up()
  return best


def compared(turn: Turn, dense_seconds: float, mac_ratio: float) -> dict[str, Any]:
  """What a program took, beside dense. mac_ratio: its multiply-adds as a share of dense's."""
  ratio = dense_seconds / turn.own['seconds']
  return {
    **turn.own, 'dense_seconds': dense_seconds, 'mac_ratio': mac_ratio, 'time_ratio': ratio, 'efficiency': ratio * mac_ratio,
    'load_of_others': turn.load,
  }  # fmt: skip
