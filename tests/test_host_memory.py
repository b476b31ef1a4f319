"""Freed memory that stays with the process: in processes of their own, since it is for good."""

import os
import subprocess
import sys

import pytest

TAKES_AND_RETURNS = """
import resource, sys
import numpy as np
from tokenprune_jax import host_memory
print(host_memory.keep() if sys.argv[1] == 'keep' else None)
for turn in range(12):
  if turn == 2:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.ones(8_000_000)  # more than glibc would ever keep by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_taken(mode, **environment):
  """(what `keep` said, pages that the system handed out in ten turns)."""
  own = {name: value for name, value in os.environ.items() if name not in ('GLIBC_TUNABLES', 'LD_PRELOAD')}
  own = {name: value for name, value in own.items() if not name.startswith('MALLOC_')}
  command = [sys.executable, '-c', TAKES_AND_RETURNS, mode]
  run = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True, check=True)
  said, pages = run.stdout.split()
  return said, int(pages)


@pytest.mark.skipif(sys.platform != 'linux', reason='the allocator of glibc')
def test_what_is_freed_is_used_again():
  plain, kept = pages_taken('plain'), pages_taken('keep')
  if kept[0] == 'False':
    pytest.skip('this libc is not glibc')
  assert kept[1] < plain[1] / 20
  assert pages_taken('keep', MALLOC_ARENA_MAX='8')[0] == 'False'  # whoever sets it knows why
