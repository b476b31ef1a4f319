"""The memory of a process on a CPU: what is freed stays, to be used again.

A training step takes and returns gigabytes. glibc gives large blocks back to the system at once, which hands them out anew
page by page, each filled with zeros: for MiniLM a quarter of a step's time. The peak of a process grows by what lies free.
"""

import ctypes
import os
import sys

# Of glibc's malloc.h: one heap for all threads, no blocks of their own, and nothing of it given back.
SETTINGS = {'M_ARENA_MAX': (-8, 1), 'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1)}


def keep() -> bool:
  """Keeps freed memory from here on; best before JAX starts its threads. Returns whether it does.

  It does nothing without glibc, or where the environment sets the allocator already: GLIBC_TUNABLES, MALLOC_*, LD_PRELOAD.
  """
  given = any(name in ('GLIBC_TUNABLES', 'LD_PRELOAD') or name.startswith('MALLOC_') for name in os.environ)
  if given or sys.platform != 'linux' or not hasattr(ctypes.CDLL(None), 'gnu_get_libc_version'):
    return False
  accepted = [ctypes.CDLL(None).mallopt(*setting) for setting in SETTINGS.values()]
  return all(accepted)
