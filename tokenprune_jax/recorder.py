"""Reading what the steps report, one step late, so that the device never waits for the host."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokenprune_jax.checkpoint import Checkpoints
from tokenprune_jax.errors import UserError
from tokenprune_jax.writer import MetricsWriter, Progress


class Recorder:
  """Writes each step of a stage to metrics.jsonl and the live line; stops where a number is not finite."""

  def __init__(
    self,
    out: MetricsWriter | None,
    stage: str,
    start: int,
    steps: int,
    paths: Sequence[str],
    rate: Callable[[Any], Any],
    checkpoints: Checkpoints,
  ):
    """out: None on all processes but the first. start: step of the run at which the stage of `steps` began.

    paths: of the tensors whose squares the metrics hold. rate: step of the stage -> learning rate.
    """
    self.out, self.stage, self.start, self.paths = out, stage, start, paths
    self.rate, self.checkpoints = rate, checkpoints
    self.progress = Progress(stage, steps)
    self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
    self.shapes: set[tuple[int, ...]] = set()
    # When the step before was read; None where the time between means nothing.
    self.since: float | None = None

  def push(self, step: int, metrics: Mapping[str, jax.Array], shape: tuple[int, ...]) -> None:
    """Takes the metrics of `step` (of the stage), just dispatched, and reads those of the one before."""
    if shape not in self.shapes:
      self.shapes.add(shape)
      self.since = None  # this step was compiled
    self.read()
    self.pending = step, metrics

  def settle(self) -> None:
    """Reads what is pending. The clock then starts anew: validating and saving are no part of a step."""
    self.read()
    self.since = None

  def read(self) -> None:
    if self.pending is None:
      return
    step, metrics = self.pending
    values = jax.device_get(metrics)
    self.pending = None
    squares = values.pop('squares')
    self.refuse_infinite(step, values['loss'], squares)
    values = {name: float(value) for name, value in values.items()}
    now = time.monotonic()
    seconds = None if self.since is None else now - self.since
    self.since = now
    self.progress.update(step, values['loss'], values['examples'], seconds)
    values |= {'learning_rate': float(self.rate(step - 1)), 'examples_per_second': self.progress.rate()}
    self.write(step, 'train', values)

  def refuse_infinite(self, step: int, loss: Any, squares: np.ndarray) -> None:
    if np.isfinite(loss) and np.all(np.isfinite(squares)):
      return
    tensor = 'the loss' if not np.isfinite(loss) else None
    tensor = tensor or f'the gradient of {self.paths[int(np.argmin(np.isfinite(squares)))]}'
    self.stop(step, tensor)

  def stop(self, step: int, tensor: str) -> None:
    """Raises UserError for a number that is not finite."""
    self.checkpoints.wait()
    steps = self.checkpoints.steps()
    good = (
      f'The last good checkpoint is {self.checkpoints.path(steps[-1])}' if steps else 'None was saved before'
    )
    raise UserError(
      f'step {self.start + step} of stage {self.stage!r}: {tensor} is not finite. {good}. Use a lower '
      'config.optimizer.learning_rate or clip, or model.dtype=float32, in a new --workdir.'
    )

  def validated(self, step: int, values: Mapping[str, Any]) -> None:
    """One line for a validation after `step`. Raises UserError where its loss is not finite."""
    if not np.isfinite(values['loss']):
      self.stop(step, 'the validation loss')
    self.progress.note(f'{self.stage}  step {step}  valid  ' + '  '.join(
      f'{name} {values[name]:.4f}' for name in ('loss', 'accuracy', 'f1', 'keep_ratio') if name in values
    ))  # fmt: skip
    self.write(step, 'valid', {name: value for name, value in values.items() if name != 'confusion'})
    self.since = None

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    if self.out is not None:
      self.out.write(self.start + step, self.stage, split, values)

  def close(self) -> None:
    self.settle()
    self.progress.close()
