"""JAX's persistent compilation cache, so that a run or the ladder of a server compiles once a machine."""

import jax
from jax.experimental.compilation_cache import compilation_cache

from tokenprune_jax.sources import cache_dir

WORTH_KEEPING = 0.1  # seconds of compiling; JAX's default of 1 would leave out most programs of a ladder


def turn_on() -> None:
  """Keeps compiled programs in the cache folder, unless the caller (or $JAX_COMPILATION_CACHE_DIR) names another one."""
  if jax.config.values['jax_compilation_cache_dir']:
    return
  jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', WORTH_KEEPING)
  compilation_cache.reset_cache()  # it looks for a folder once, at the first program
