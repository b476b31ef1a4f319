"""The persistent compilation cache goes on even after something was compiled, and never against the caller's choice."""

import os
import subprocess
import sys

from tokenprune_jax import compile_cache

CODE = """
import jax, jax.numpy as jnp
from tokenprune_jax import compile_cache
compile_cache.WORTH_KEEPING = 0.0
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
compile_cache.turn_on()
jax.jit(lambda x: jnp.sin(x) * 2)(1.0).block_until_ready()
print(jax.config.values['jax_compilation_cache_dir'])
"""


def folder_used(tmp_path, **chosen):
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  settings = {name: value for name, value in os.environ.items() if not name.startswith('JAX_')}
  settings |= {'TOKENPRUNE_CACHE': str(tmp_path / 'ours'), **chosen}
  done = subprocess.run([sys.executable, '-c', CODE], cwd=root, env=settings, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout.strip()


def test_on_after_the_first_program(tmp_path):
  assert folder_used(tmp_path) == str(tmp_path / 'ours' / 'xla')
  assert list((tmp_path / 'ours' / 'xla').iterdir())


def test_the_callers_choice_stays(tmp_path):
  assert folder_used(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'theirs')) == str(tmp_path / 'theirs')
  assert not (tmp_path / 'ours').exists()


def test_programs_that_were_not_read_for_longest_leave_a_full_cache(tmp_path):
  for age, name in enumerate('abcd'):
    (tmp_path / name).write_bytes(bytes(100))
    os.utime(tmp_path / name, (1000 - age, 1000))
  compile_cache.sweep(tmp_path, 300)
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b', 'c']
  compile_cache.sweep(tmp_path, 300)
  assert len(list(tmp_path.iterdir())) == 3
  compile_cache.sweep(tmp_path / 'none', 300)


def test_a_full_cache_is_swept_when_it_is_turned_on(tmp_path):
  (tmp_path / 'ours' / 'xla').mkdir(parents=True)
  old = tmp_path / 'ours' / 'xla' / 'old'
  with open(old, 'wb') as file:
    file.truncate(compile_cache.LARGEST + 1)  # takes no place
  folder_used(tmp_path)
  assert not old.exists()
