"""JAX's persistent compilation cache, so that a run or the ladder of a server compiles once a machine."""

import contextlib
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from tokenprune_jax.sources import cache_dir

WORTH_KEEPING = 0.1  # seconds of compiling; JAX's default of 1 would leave out most programs of a ladder
LARGEST = 2 * 1024**3  # bytes that stay on disk


def turn_on() -> None:
  """Keeps compiled programs in the cache folder, unless the caller (or $JAX_COMPILATION_CACHE_DIR) names another one."""
  if jax.config.values['jax_compilation_cache_dir']:
    return
  folder = cache_dir() / 'xla'
  with contextlib.suppress(OSError):  # another process is at it too, or the folder is not ours
    sweep(folder, LARGEST)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', WORTH_KEEPING)
  compilation_cache.reset_cache()  # it looks for a folder once, at the first program


def sweep(folder: Path, largest: int) -> None:
  """Removes the programs that were not read for longest, until `largest` bytes are left. Raises OSError.

  JAX's own limit (`jax_compilation_cache_max_size`) reads the whole folder at every program, and stores none any more once
  a process was killed while it wrote one.
  """
  held = 0
  found = [(file.stat(), file) for file in folder.iterdir()] if folder.is_dir() else []
  for about, file in sorted(found, key=lambda entry: entry[0].st_atime, reverse=True):
    held += about.st_size
    if held > largest:
      file.unlink(missing_ok=True)
