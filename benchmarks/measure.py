"""Timing in one process: several programs in turns, with the machine's load beside."""

import os
import pathlib
import time
from collections.abc import Callable, Mapping

import numpy as np

ALLOWED = 0.3  # cores that other programs may use; above it ratios are not worth writing down


def in_turns(programs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
  """Seconds of each program, A A B B C C A A …, the second of each pair timed: {name: {seconds (median), quartiles}}.

  A program returns when its work is done; a slow spell of the machine then falls on all of them alike. The first of a
  pair brings back the memory that the system took away during the others' turns, which would be charged to the largest.
  """
  rounds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      program()
      start = time.perf_counter()
      program()
      rounds[name].append(time.perf_counter() - start)
  return {name: summary(seconds) for name, seconds in rounds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
  """Median and quartiles."""
  low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
  return {'seconds': median, 'quartiles': [low, high]}


def load_before() -> float:
  """The machine's load of the last minute, this process included."""
  return round(os.getloadavg()[0], 2)


def others_load(seconds: float = 2.0) -> float | None:
  """Cores that other programs use, over some seconds in which this one sleeps; None where the system does not tell."""
  listing = pathlib.Path('/proc/stat')
  if not listing.exists():
    return None

  def busy() -> float:
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, listing.read_text().split('\n')[0].split()[1:])
    return (user + nice + system + irq + soft + steal) / os.sysconf('SC_CLK_TCK')

  before, own, start = busy(), time.process_time(), time.monotonic()
  time.sleep(seconds)
  used = busy() - before - (time.process_time() - own)
  return round(max(used, 0.0) / (time.monotonic() - start), 2)


def quiet(allow: bool = False) -> float | None:
  """`others_load`. Exits where it is above ALLOWED, unless that is allowed."""
  load = others_load()
  if load is not None and load > ALLOWED and not allow:
    raise SystemExit(
      f'error: other programs use {load} cores; stop them, or pass --allow_load to measure all the same.'
    )
  return load
