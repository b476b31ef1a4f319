"""Programs timed beside each other in one process that cannot all be there at once.

A kernel of XLA's CPU code takes three of the 65,530 pieces of memory that Linux lets a process map, a program of 12 layers
about a thousand. So programs are made one after the other, timed in turns with those that stay, and given up.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks import measure
from tokenprune_jax import timing

Program = Callable[[], object]
Makers = Mapping[str, Callable[[], Any]]


class Turn(NamedTuple):
  """A program, what it and those beside it took (as `timing.in_turns`), and the load of others."""

  name: str
  program: Any
  times: dict[str, dict[str, Any]]
  load: float | None

  @property
  def own(self) -> dict[str, Any]:
    """What the program took."""
    return self.times[self.name]


def one_by_one(
  makers: Makers, beside: Mapping[str, Program], repeats: int, allow_load: bool = False
) -> Iterator[Turn]:
  """Each program, timed in turns with those in `beside`; it is closed and its code given up when the next is asked for."""
  for name, make in makers.items():
    program = make()
    load = measure.quiet(allow_load)
    yield Turn(name, program, timing.in_turns({**beside, name: program}, repeats), load)
    given_up(program)
    del program
    freed()


def fastest(
  makers: Makers, repeats: int, allow_load: bool = False, seen: Callable[[Turn], object] = lambda turn: None
) -> Turn | None:
  """The turn of the fastest program, which stays: each is timed beside the best before it. None of no programs.

  seen: called with each turn while its program is there.
  """
  best: Turn | None = None
  for name, make in makers.items():
    program = make()
    load = measure.quiet(allow_load)
    beside = {best.name: best.program} if best else {}
    turn = Turn(name, program, timing.in_turns({**beside, name: program}, repeats), load)
    seen(turn)
    if best is None:
      best = turn
      continue
    faster = turn.own['seconds'] < turn.times[best.name]['seconds']
    given_up(best.program if faster else program)
    best = turn if faster else best._replace(times=turn.times, load=load)
    del turn, program, beside
    freed()
  return best


def given_up(program: Any) -> None:
  """Ends what has a thread of its own."""
  if isinstance(program, timing.Served):
    program.close()


def freed() -> None:
  """Gives back the code of programs that nobody holds any more."""
  jax.clear_caches()
  gc.collect()
