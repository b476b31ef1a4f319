"""Checkpoints: what is saved comes back bit for bit, what is damaged is never used, the best one stays."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenprune_jax import sharding
from tokenprune_jax.checkpoint import Checkpoints, Damaged
from tokenprune_jax.errors import UserError

CONFIG = {'a': [1, None]}


def make_state(seed):
  params = {'block': {'kernel': jax.random.normal(jax.random.key(seed), (64, 48)), 'bias': jnp.ones(3)}}
  return {'params': params, 'optimizer': optax.adamw(1e-3).init(params)}


def like(state):
  places = sharding.state_shardings(sharding.make_mesh(1), state)
  return sharding.placed(state, places)


def assert_equal(first, second):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), first, second)


def save(folder, seeds, keep=2, best=None):
  checkpoints = Checkpoints(folder, keep)
  for step, seed in seeds.items():
    checkpoints.save(step, make_state(seed), {'step': step, 'config': CONFIG}, best or step)
  checkpoints.close()


def biggest(folder):
  return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(bytes(content))


def test_what_is_saved_comes_back_bit_for_bit_even_if_the_arrays_are_donated_at_once(tmp_path):
  checkpoints, state = Checkpoints(tmp_path), make_state(0)
  expected = jax.tree.map(np.array, state)
  checkpoints.save(5, state, {'position': 3, 'config': CONFIG}, 5)
  change = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  for _ in range(20):
    state = change(state)
  checkpoints.close()
  found, record = Checkpoints(tmp_path).resume(like(state), CONFIG)
  assert_equal(found, expected)
  assert record['position'] == 3 and record['config'] == CONFIG
  assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_parameters_can_be_read_alone(tmp_path):
  save(tmp_path, {1: 0})
  state = make_state(0)
  found, _ = Checkpoints(tmp_path).load(1, like({'params': state['params']}))
  assert_equal(found, {'params': state['params']})


def test_the_newest_stay_and_the_best_of_each(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
    checkpoints.save(step, make_state(step), {}, best)
  checkpoints.wait()
  assert checkpoints.steps() == [5, 6]
  checkpoints.save(7, make_state(7), {}, 5)
  checkpoints.save(8, make_state(8), {}, 5)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [5, 7, 8]


def test_the_same_step_can_be_saved_again(tmp_path):
  save(tmp_path, {1: 0})
  save(tmp_path, {1: 9})
  assert_equal(Checkpoints(tmp_path).resume(like(make_state(0)), CONFIG)[0], make_state(9))


@pytest.mark.parametrize('damage', ['cut', 'bit', 'gone', 'metadata'])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_and_said(tmp_path, capsys, damage):
  folder = tmp_path / 'stage'
  save(folder, {1: 1, 2: 2})
  file = folder / '2' / '_CHECKPOINT_METADATA' if damage == 'metadata' else biggest(folder / '2')
  if damage == 'bit':
    flip_a_bit(file)
  elif damage == 'gone':
    file.unlink()
  else:
    os.truncate(file, file.stat().st_size // 2)
  found, record = Checkpoints(folder).resume(like(make_state(0)), CONFIG)
  assert_equal(found, make_state(1))
  assert record['step'] == 1
  assert f'{folder / "2"} is damaged' in capsys.readouterr().err
  assert (tmp_path / 'stage-2.damaged').is_dir() and not (folder / '2').exists()
  save(folder, {2: 5})


def test_where_all_are_damaged_the_run_stops_instead_of_starting_over(tmp_path):
  folder = tmp_path / 'stage'
  save(folder, {1: 1, 2: 2})
  for step in '12':
    flip_a_bit(biggest(folder / step))
  with pytest.raises(UserError, match='every checkpoint in .* was damaged'):
    Checkpoints(folder).resume(like(make_state(0)), CONFIG)


def test_a_damaged_best_checkpoint_is_not_used(tmp_path):
  save(tmp_path, {1: 1})
  flip_a_bit(biggest(tmp_path / '1'))
  with pytest.raises(Damaged, match='block/kernel'):
    Checkpoints(tmp_path).load(1, like(make_state(0)))


def test_another_model_is_an_error_that_names_the_tensor(tmp_path):
  save(tmp_path, {1: 1})
  other = make_state(0)
  other['params']['block']['kernel'] = jnp.ones((64, 50))
  with pytest.raises(UserError, match=r'params/block/kernel is \(64, 48\) there and \(64, 50\) here'):
    Checkpoints(tmp_path).resume(like(other), CONFIG)
  other['params']['block'] = {'weight': jnp.ones((64, 48))}
  with pytest.raises(UserError, match='params/block/weight is missing there'):
    Checkpoints(tmp_path).resume(like(other), CONFIG)
  with pytest.raises(UserError, match=r'config\.a was \(1, None\) and is now \(2,\)'):
    Checkpoints(tmp_path).resume(like(make_state(0)), {'a': [2]})
  assert Checkpoints(tmp_path).steps() == [1]


def test_a_half_written_checkpoint_is_not_there(tmp_path):
  save(tmp_path, {1: 1, 2: 2})
  os.rename(tmp_path / '2', tmp_path / '2.orbax-checkpoint-tmp')
  assert Checkpoints(tmp_path).resume(like(make_state(0)), CONFIG)[1]['step'] == 1
  assert not (tmp_path / '2.orbax-checkpoint-tmp').exists()


def test_an_empty_folder_is_a_fresh_start_and_a_wrong_one_an_error(tmp_path):
  assert Checkpoints(tmp_path / 'new').resume(like(make_state(0)), CONFIG) is None
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    Checkpoints(tmp_path / 'file' / 'stage')
