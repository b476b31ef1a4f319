"""One run on one device, on several, and on several processes: the same losses, gradients and parameters."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests import spread_batch
from tests.tiny_run import STEPS, config, ended, lines, start
from tokenprune_jax import evaluate, optim, pretrained, sharding, train
from tokenprune_jax.errors import UserError

CHANGES = {
  'model__weights': 'random:bert:layers=2,width=32,heads=2,hidden=64,vocab=1024',  # a table worth splitting
  'reducer': {'name': 'combine', 'slots': 2, 'layer': 2},  # draws Gumbel noise beside the dropout
  'stages': ({'name': 'tune', 'epochs': 1},),
}
# What these add cancels in a softmax: their gradient is rounding, of which Adam makes whole steps.
WITHOUT_GRADIENT = ('/key/bias', '/slot_norm/bias')


def free_port():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def start_two(folder, **options):
  """Two processes of one run, on this machine."""
  parallel = {'parallel__processes': 2, 'parallel__coordinator': f'127.0.0.1:{free_port()}'}
  return [start(folder, parallel__process=i, **CHANGES, **parallel, **options) for i in range(2)]


def statuses(runs):
  return tuple(zip(*[ended(run) for run in runs]))


@pytest.fixture(scope='module')
def one(tmp_path_factory):
  folder = tmp_path_factory.mktemp('one')
  train.run(config(**CHANGES), folder)
  return folder


def assert_same(folder, one):
  for split, names in (('train', ('loss', 'grad_norm', 'examples')), ('valid', ('loss', 'accuracy'))):
    ours, theirs = lines(folder, split), lines(one, split)
    assert [row['step'] for row in ours] == [row['step'] for row in theirs]
    for name in names:
      np.testing.assert_allclose([r[name] for r in ours], [r[name] for r in theirs], rtol=2e-5, err_msg=name)
  ours, theirs = (optim.flatten(pretrained.load_exported(run / 'model').params) for run in (folder, one))
  for path in theirs:
    if not path.endswith(WITHOUT_GRADIENT):
      np.testing.assert_allclose(ours[path], theirs[path], atol=2e-5, err_msg=path)
  ours, theirs = (json.loads((run / 'result.json').read_text())['metrics'] for run in (folder, one))
  assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)


def test_four_devices_with_parameters_spread_over_two(one, tmp_path):
  status, said = statuses([start(tmp_path, devices=4, parallel__fsdp=2, **CHANGES)])
  assert status == (0,), said
  assert_same(tmp_path, one)
  saved = (tmp_path / 'checkpoints' / 'tune' / str(STEPS) / 'state' / '_sharding').read_text()
  assert 'fsdp' in saved.replace('"data", "fsdp"', '').replace('axis_names', '')


def test_two_processes_told_to_stop_and_started_again(one, tmp_path):
  runs = start_two(tmp_path, pause=0.5)
  deadline = time.monotonic() + 300
  while not lines(tmp_path) and runs[0][0].poll() is None and time.monotonic() < deadline:
    time.sleep(0.02)
  runs[1][0].send_signal(signal.SIGTERM)
  status, said = statuses(runs)
  assert status == (128 + signal.SIGTERM,) * 2, said
  assert 'the same command goes on' in said[0]
  status, said = statuses(start_two(tmp_path))
  assert status == (0, 0), said
  assert_same(tmp_path, one)


def test_large_tensors_are_split_along_their_largest_divisible_axis():
  mesh = AbstractMesh((2, 4), ('data', 'fsdp'))
  shapes = {'table': (1000, 128), 'odd': (1001, 402), 'wide': (64, 1024), 'bias': (1024,), 'step': ()}
  tree = {name: jax.ShapeDtypeStruct(shape, 'float32') for name, shape in shapes.items()}
  specs = {name: place.spec for name, place in sharding.state_shardings(mesh, tree).items()}
  assert specs['table'] == PartitionSpec('fsdp') and specs['wide'] == PartitionSpec(None, 'fsdp')
  assert specs['odd'] == specs['bias'] == specs['step'] == PartitionSpec()
  alone = sharding.state_shardings(AbstractMesh((8, 1), ('data', 'fsdp')), tree)
  assert all(place.spec == PartitionSpec() for place in alone.values())


def test_what_does_not_divide_is_an_error_by_the_name_of_its_key():
  with pytest.raises(UserError, match=r'config\.parallel\.fsdp is 3'):
    sharding.make_mesh(3)
  with pytest.raises(UserError, match=r'config\.optimizer\.batch_size is 7, .*multiple of 2'):
    sharding.check_batch('optimizer.batch_size', 7, 2)
  sharding.check_batch('eval.batch_size', 7)


def test_devices_gather_among_their_own_examples():
  command = [sys.executable, '-m', 'tests.spread_batch']
  told = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert told.returncode == 0, told.stderr
  found = json.loads(told.stdout.splitlines()[-1])
  (model, params), batch = spread_batch.model(), spread_batch.batch_of_eight()
  alone = evaluate.compiled(model, None)
  for device in range(4):
    own = slice(2 * device, 2 * device + 2)
    want = alone(params, {name: values[own] for name, values in batch.items()})
    np.testing.assert_allclose(found['logits'][own], want['logits'], atol=1e-4)
    assert (
      found['overflow'][own] == np.asarray(want['overflow']).tolist() and sum(found['overflow'][own]) == 1
    )
