"""Checkpoints of one stage: complete or absent, checked when read, the best one among them.

A checkpoint is {'params', 'optimizer'} as arrays and a JSON dict with all else that the next step depends
on: step, data position, seed, best validation and config. Orbax writes it in the background into a
temporary folder that it renames when all is there, so a kill leaves no half checkpoint. What Orbax does
not notice is a file whose bytes changed later: a sum over the bits of every tensor is kept with the rest
and compared on reading.
"""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tokenprune_jax import workdir, writer
from tokenprune_jax.errors import UserError

# What Orbax and TensorStore raise for files that are missing, cut or changed.
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError)


class Damaged(ValueError):
  """A checkpoint's files do not hold what was saved."""


class KeepNewest:
  """Keeps the newest checkpoints, and the best that each of them knows: falling back never loses it."""

  def __init__(self, newest: int):
    self.newest = newest

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    newest = checkpoints[-self.newest :]
    kept = {info.step for info in newest} | {info.metrics['best_step'] for info in newest}
    return [info.step in kept for info in checkpoints]


class Checkpoints:
  """The checkpoints in `folder`, one subfolder a step. All processes call every method."""

  def __init__(self, folder: pathlib.Path, keep: int = 2):
    """keep: newest ones that stay. Raises UserError where the folder cannot be made."""
    self.folder = folder
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
      self.manager = ocp.training.Checkpointer(
        folder.absolute(),
        context=context,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=KeepNewest(keep),
        cleanup_tmp_directories=True,
      )
    except OSError as error:
      raise workdir.storage_error(error, folder) from error

  def path(self, step: int) -> pathlib.Path:
    return self.folder / str(step)

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return [info.step for info in self.manager.checkpoints]

  def save(self, step: int, state: Mapping[str, Any], record: Mapping[str, Any], best_step: int) -> None:
    """Starts to save; returns when `state` may be changed or donated. Waits for the save before this one.

    record: JSON values. best_step: the checkpoint that stays beside this one (this step, or an earlier
    one). Raises UserError where the disk is full.
    """
    self.wait()
    record = {**record, 'sums': bit_sums(state)}
    try:
      self.manager.save_checkpointables_async(
        step, {'state': dict(state)}, metrics={'best_step': best_step}, custom_metadata=record, overwrite=True
      )
    except (OSError, ValueError) as error:
      raise self.unsaved(error) from error

  def wait(self) -> None:
    """Returns when all is on the disk. Raises UserError where it is full."""
    try:
      self.manager.wait()
    except (OSError, ValueError) as error:
      raise self.unsaved(error) from error

  def unsaved(self, error: Exception) -> UserError:
    reason = 'no space left on device' if 'No space left' in str(error) else str(error).split('\n')[0][:300]
    good = [self.path(step) for step in self.steps() if self.path(step).exists()]
    return UserError(
      f'cannot save a checkpoint in {self.folder}: {reason}. Free some space; the same command then goes on '
      f'from {good[-1] if good else "the start"}.'
    )

  def record(self, step: int) -> dict[str, Any]:
    """The JSON dict of checkpoint `step`. Raises Damaged."""
    try:
      record = self.manager.checkpointables_metadata(step).custom_metadata
    except DAMAGE as error:
      raise Damaged(f'its metadata cannot be read ({type(error).__name__})') from error
    if not record or 'sums' not in record:
      raise Damaged('its metadata is cut')
    return record

  def load(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, record) of checkpoint `step`; like: shapes, types and shardings of all that is wanted.

    `like` may be a part of what was saved, such as {'params': …} alone. Raises Damaged, or a UserError
    that names the tensors that differ where the checkpoint is of another model.
    """
    record = self.record(step)
    self.refuse_shapes(step, like)
    state, problem = self.read(step, like)
    if state is None:
      raise Damaged(f'its tensors cannot be read ({problem})')
    for path, total in bit_sums(state).items():
      if record['sums'].get(path) != total:
        raise Damaged(f'the bytes of {path} have changed')
    return state, record

  def read(self, step: int, like: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """(state, '') or (None, what Orbax raised)."""
    undo = hush()
    try:
      state = self.manager.load_checkpointables(step, {'state': dict(like)})['state']
    except DAMAGE as error:
      return None, type(error).__name__
    undo()
    return state, ''

  def refuse_shapes(self, step: int, like: Mapping[str, Any]) -> None:
    try:
      saved = shapes(self.manager.checkpointables_metadata(step).metadata['state'])
    except DAMAGE as error:
      raise Damaged(f'its list of tensors cannot be read ({type(error).__name__})') from error
    wrong = [
      f'{path} is {saved.get(path, "missing")} there and {shape} here'
      for path, shape in sorted(shapes(like).items(), reverse=True)  # 'params' before 'optimizer'
      if saved.get(path) != shape
    ]
    if wrong:
      more = f' (and {len(wrong) - 3} more)' if len(wrong) > 3 else ''
      raise UserError(
        f'{self.path(step)} is of another model: {"; ".join(wrong[:3])}{more}. Choose another --workdir, or '
        'give the config it was made with.'
      )

  def resume(
    self, like: Mapping[str, Any], config: Mapping[str, Any]
  ) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(state, record) of the newest good checkpoint; None where there is none yet.

    A damaged one is moved beside the folder and said so. Raises UserError where all of them are, or where
    the config in the record is another one.
    """
    found = self.steps()
    for step in reversed(found):
      try:
        workdir.refuse_differences(self.path(step), self.record(step)['config'], config)
        return self.load(step, like)
      except Damaged as damage:
        aside = self.set_aside(step)
        writer.say(f'warning: checkpoint {self.path(step)} is damaged: {damage}. Moved to {aside}.')
    if found:
      raise UserError(
        f'every checkpoint in {self.folder} was damaged, and is now beside it. Run the same command again to '
        'start this stage from its beginning.'
      )
    return None

  def set_aside(self, step: int) -> pathlib.Path:
    aside = self.folder.with_name(f'{self.folder.name}-{step}.damaged')
    if jax.process_index() == 0:
      while aside.exists():
        aside = aside.with_name(f'{aside.name}.damaged')
      os.replace(self.path(step), aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'set aside {step}')
    self.manager.reload()
    return aside

  def close(self) -> None:
    self.wait()
    self.manager.close()


def hush() -> Callable[[], None]:
  """Keeps what Orbax leaves behind where a read fails off the screen, now and later.

  Its reads of the other tensors go on, then find their event loop gone and report that to the
  interpreter and to asyncio's log, from threads of their own and seconds later: tracebacks about a checkpoint that has long
  been set aside. Returns what ends it.
  """
  report, log = sys.unraisablehook, logging.getLogger('asyncio')

  def known(error: Any) -> bool:
    return any(text in str(error) for text in ('Event loop is closed', 'reading array index'))

  def hook(unraisable: Any) -> None:
    if not known(unraisable.exc_value):
      report(unraisable)

  def keep(record: logging.LogRecord) -> bool:
    return not (record.exc_info and known(record.exc_info[1]))

  def undo() -> None:
    sys.unraisablehook = report
    log.removeFilter(keep)

  sys.unraisablehook = hook
  log.addFilter(keep)
  return undo


def bit_sums(state: Any) -> dict[str, int]:
  """{path: sum of the tensor's 32-bit words modulo 2**32}: any one changed bit shows, in any order."""
  flat = named(state)
  sums = np.array([words_sum(leaf) for leaf in flat.values()], np.uint32)
  if jax.process_count() > 1:
    sums = multihost_utils.process_allgather(sums).sum(0, dtype=np.uint32)
  return dict(zip(flat, sums.tolist()))


def words_sum(leaf: jax.Array) -> int:
  """The sum over the part of a tensor that this process answers for, without compiling a program for it."""
  parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
  return sum(int(part.reshape(-1).view(np.uint32).sum(dtype=np.uint32)) for part in parts) % 2**32


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """{path: shape}."""
  return {path: tuple(leaf.shape) for path, leaf in named(tree).items()}


def named(tree: Any) -> dict[str, Any]:
  """{path: leaf}; list indices and field names alike are parts of it, so a tree read back has the same."""
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in paths}
