"""The folder of one run: its lock, its config and files that are either whole or not there."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from tokenprune_jax import settings
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import whole_spec

# What storage does to a run that began well, wherever it writes.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def storage_error(error: OSError, path: str | os.PathLike) -> UserError:
  """The UserError for a file that could not be written."""
  return UserError(
    f'cannot write {error.filename or path}: {error.strerror or error}. The workdir has to be writable '
    'and to have room; once it is, the same command goes on from the last checkpoint.'
  )


@contextlib.contextmanager
def storage_errors(folder: pathlib.Path) -> Iterator[None]:
  """Within, storage that is full or fails is a UserError, whichever library was writing."""
  try:
    yield
  except OSError as error:
    if error.errno not in STORAGE_ERRORS:
      raise
    raise storage_error(error, folder) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` to `path` at once: a kill leaves the old file or the new one. Raises UserError."""
  write_text(path, json.dumps(value, indent=2) + '\n')


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes `text` to `path` at once: a kill leaves the old file or the new one. Raises UserError."""
  partial = path.with_name(path.name + '.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    raise storage_error(error, path) from error


def read_json(path: pathlib.Path) -> Any:
  """What `write_json` wrote; None where there is no file. Raises UserError where it is not JSON."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(
      f'{path} is not valid JSON ({error}); restore it, or choose another --workdir.'
    ) from error


def lock(folder: pathlib.Path) -> TextIO:
  """Makes `folder` and takes its lock, held until the file is closed or the process ends, however it ends.

  Raises UserError, naming the other process, where a run is live in the folder, or it cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / 'lock', 'a+', encoding='utf-8')  # noqa: SIM115 (held as long as the run lives)
  except OSError as error:
    raise storage_error(error, folder) from error
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    owner = file.read().strip() or 'unknown'
    file.close()
    raise UserError(
      f'{folder} is in use by another run (process {owner}). Wait, stop it or choose another --workdir.'
    ) from error
  file.truncate(0)
  file.write(f'{os.getpid()}\n')
  file.flush()
  return file


def is_finished(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Whether there is the result of this config, of its `eval` too.

  Raises UserError naming the keys in which it differs from that of what is there, unless none of them changes what is
  learned, or nothing is there that was learned.
  """
  path = folder / 'config.json'
  earlier = read_json(path)
  if earlier is not None and is_learned(folder):
    refuse_differences(path, earlier, config)
    changed = settings.differences(settings.filled_in(earlier), config)
    if any(key.startswith('eval.') for key in changed):
      return False
  return (folder / 'result.json').exists()


def begin(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes config.json, of what comes now; a result that another `eval` gave is removed."""
  (folder / 'result.json').unlink(missing_ok=True)
  write_json(folder / 'config.json', config)


def settle_data(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Writes data.json (`data.Dataset.identity`), or compares with that of what is there.

  Raises UserError naming what differs, unless nothing is there that was learned.
  """
  if is_learned(folder):
    refuse_data(folder, identity)
  write_json(folder / 'data.json', identity)


def refuse_data(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
  """Raises UserError naming what differs from the data.json of a run, if there is one."""
  path = folder / 'data.json'
  earlier = read_json(path)
  if earlier is None:
    return
  if changed := [name for name in identity if earlier.get(name) != identity[name]]:
    rows = '; '.join(f'{name} was {earlier.get(name)} and is now {identity[name]}' for name in changed)
    raise UserError(
      f'{path} is of other data: {rows}. Put the files back that this run began with, or choose another --workdir.'
    )


def is_learned(folder: pathlib.Path) -> bool:
  """Whether a run has left anything that it would go on from."""
  return any(folder.glob('checkpoints/*/*')) or any(folder.glob('stages/*'))


def whole(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """A config with all that it leaves at its default, as far as its keys and its method are known."""
  config = settings.filled_in(config)
  with contextlib.suppress(UserError, KeyError):
    return {**config, 'reducer': whole_spec(config['reducer'])}
  return config


def refuse_differences(path: pathlib.Path, earlier: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Raises UserError naming the keys in which `config` differs from the one kept in `path`.

  Keys and fields of reducers that an earlier version did not know had their defaults.
  """
  changed = {
    key: values
    for key, values in settings.differences(whole(earlier), whole(config)).items()
    if not settings.is_harmless(key)
  }
  if changed:
    rows = '; '.join(f'config.{key} was {old!r} and is now {new!r}' for key, (old, new) in changed.items())
    raise UserError(f'{path} is of another run: {rows}. Choose another --workdir, or give the same config.')
