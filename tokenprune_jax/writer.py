"""What a run tells while it runs: metrics.jsonl, TensorBoard events and one live line."""

import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from tokenprune_jax import workdir
from tokenprune_jax.events import EventFile


class MetricsWriter:
  """Appends to metrics.jsonl and to the events in tensorboard/. Process 0 alone has one."""

  def __init__(self, folder: pathlib.Path):
    """Raises UserError where `folder` cannot be written."""
    self.path = folder / 'metrics.jsonl'
    try:
      self.file = open(self.path, 'ab', buffering=0)  # noqa: SIM115 (open as long as the run lives)
      self.events = EventFile(folder / 'tensorboard')
    except OSError as error:
      raise workdir.storage_error(error, self.path) from error

  def go_on_after(self, step: int) -> None:
    """Drops what a killed run has written of later steps, of the test split, or half."""
    kept = []
    for line in self.path.read_text(encoding='utf-8', errors='replace').splitlines():
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row['step'] <= step and row['split'] != 'test':
        kept.append(line + '\n')
    workdir.write_text(self.path, ''.join(kept))
    self.file.close()
    try:
      self.file = open(self.path, 'ab', buffering=0)  # noqa: SIM115
      self.events.restart(step + 1)
    except OSError as error:
      raise workdir.storage_error(error, self.path) from error

  def write(self, step: int, stage: str, split: str, values: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl, and an event for each number. Raises UserError where the disk is full."""
    line = json.dumps({'step': step, 'stage': stage, 'split': split, **values}) + '\n'
    try:
      self.file.write(line.encode())
      self.events.scalars(
        step, {f'{split}/{name}': value for name, value in values.items() if is_number(value)}
      )
    except OSError as error:
      raise workdir.storage_error(error, self.path) from error

  def flush(self) -> None:
    """Returns when everything written so far is on the disk."""
    try:
      os.fsync(self.file.fileno())
    except OSError as error:
      raise workdir.storage_error(error, self.path) from error

  def close(self) -> None:
    self.flush()
    self.events.close()
    self.file.close()


def is_number(value: Any) -> bool:
  """Whether TensorBoard can draw it."""
  return isinstance(value, (int, float)) and not isinstance(value, bool)


class Progress:
  """One live line on a terminal; elsewhere a line every `seconds`."""

  def __init__(self, stage: str, steps: int, stream: io.TextIOBase | None = None, seconds: float = 20.0):
    self.stage, self.steps, self.seconds = stage, steps, seconds
    self.stream = sys.stderr if stream is None else stream
    self.live = self.stream.isatty()
    self.silent = jax.process_index() > 0
    self.shown = -math.inf  # the clock may have begun at 0 just now
    self.examples, self.spent, self.done = 0.0, 0.0, 0

  def update(self, step: int, loss: float, examples: float, seconds: float | None) -> None:
    """After `step` of the stage; seconds: that it took, None where that says nothing about others."""
    if seconds is not None:
      self.examples, self.spent, self.done = self.examples + examples, self.spent + seconds, self.done + 1
    now = time.monotonic()
    if now - self.shown < (0.2 if self.live else self.seconds) and step < self.steps:
      return
    self.shown = now
    text = f'{self.stage}  step {step}/{self.steps}  loss {loss:.4f}'
    if self.done:
      left = clock((self.steps - step) * self.spent / self.done)
      text += f'  {self.rate():.1f} examples/s  {left} left'
    self.show(text)

  def rate(self) -> float:
    """Examples per second, compiling, validating and saving left out."""
    return self.examples / self.spent if self.spent else 0.0

  def show(self, text: str) -> None:
    if not self.silent:
      self.stream.write(f'\r{text}\x1b[K' if self.live else text + '\n')
      self.stream.flush()

  def note(self, text: str) -> None:
    """A line that stays, above the live one."""
    if not self.silent:
      self.stream.write(f'\r{text}\x1b[K\n' if self.live else text + '\n')
      self.stream.flush()

  def close(self) -> None:
    """Leaves the last line standing."""
    if self.live and not self.silent:
      self.stream.write('\n')


def say(text: str) -> None:
  """A message for the person who started the run, once however many processes there are."""
  if jax.process_index() == 0:
    sys.stderr.write(text + '\n')
    sys.stderr.flush()


def clock(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
