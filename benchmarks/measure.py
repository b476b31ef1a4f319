"""Timing in one process: several programs in turns, with the machine's load beside."""

import os
import time
from collections.abc import Callable, Mapping

import numpy as np


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
  """The machine's load of the last minute: above 0.3 something else is running, and ratios suffer."""
  return round(os.getloadavg()[0], 2)
