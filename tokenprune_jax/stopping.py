"""Being told to stop: SIGTERM and Ctrl-C end a run at the next step, after it has been saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
  """The run was told to stop, has saved, and ends with the status of a process that the signal ended."""

  def __init__(self, number: int):
    super().__init__(128 + number)


class Interrupted(Exception):
  """Work that may be left half done was left half done."""


class Stop:
  """Watches the signals while it is entered. A second Ctrl-C or SIGTERM does what it did before."""

  def __init__(self):
    self.number = 0  # of the signal that came
    self.may_interrupt = False
    self.before: dict[int, Any] = {}

  def __enter__(self) -> 'Stop':
    # With several processes JAX catches SIGTERM itself, because all have to stop at the same step.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self.before = {number: signal.signal(number, self.caught) for number in SIGNALS}
    return self

  def __exit__(self, *_) -> None:
    self.restore()

  def restore(self) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)
    self.before = {}

  def caught(self, number: int, _frame) -> None:
    self.number = number
    self.restore()
    if self.may_interrupt:
      raise Interrupted

  def requested(self, step: int) -> bool:
    """Whether to save and stop now; every process is asked after every step and all get the same answer."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.number = signal.SIGTERM
    return self.number > 0

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Within, a signal raises Interrupted instead of waiting for the next step."""
    self.may_interrupt = True
    try:
      if self.number:
        raise Interrupted
      yield
    finally:
      self.may_interrupt = False
