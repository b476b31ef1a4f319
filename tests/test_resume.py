"""A run that is killed or told to stop ends with the numbers of one that was left alone, bit for bit."""

import json
import signal
import time

import numpy as np
import pytest

from tests.tiny_run import STEPS, config, lines, start
from tokenprune_jax import optim, pretrained, train
from tokenprune_jax.errors import UserError

TWO_STAGES = (
  {'name': 'first', 'epochs': 2},
  {'name': 'second', 'epochs': 1, 'init': 'first', 'reducer': {'ratio': 0.5}},
)
CHANGES = {'stages': TWO_STAGES, 'eval__every': 4, 'checkpoint__every': 3}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  process = start(folder, **CHANGES)
  assert process.wait(timeout=300) == 0, process.stderr.read()
  return folder


def stop_at(folder, step, number, **options):
  """Runs until `step` is written down, then sends the signal; returns (exit status, what it said)."""
  process = start(folder, pause=0.15, **CHANGES, **options)
  deadline = time.monotonic() + 300
  while process.poll() is None and time.monotonic() < deadline:
    if any(row['step'] >= step for row in lines_so_far(folder)):
      process.send_signal(number)
      break
    time.sleep(0.01)
  said = process.communicate(timeout=300)[1]
  return process.returncode, said


def lines_so_far(folder):
  try:
    return lines(folder)
  except ValueError:  # half a line is there
    return []


def assert_same_end(folder, undisturbed):
  ours, theirs = (json.loads((run / 'result.json').read_text()) for run in (folder, undisturbed))
  assert ours == theirs
  assert (folder / 'predictions_test.jsonl').read_text() == (
    undisturbed / 'predictions_test.jsonl'
  ).read_text()
  ours, theirs = (
    optim.flatten(pretrained.load_exported(run / 'model').params) for run in (folder, undisturbed)
  )
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  ours, theirs = (
    [{name: value for name, value in row.items() if name != 'examples_per_second'} for row in lines(run)]
    for run in (folder, undisturbed)
  )
  assert ours == theirs


def test_killed_and_stopped_at_any_moment_it_ends_the_same(undisturbed, tmp_path):
  # Before the first checkpoint; between two, after a validation; then told to stop in the second stage.
  assert stop_at(tmp_path, 2, signal.SIGKILL)[0] == -signal.SIGKILL
  assert stop_at(tmp_path, 8, signal.SIGKILL)[0] == -signal.SIGKILL
  status, said = stop_at(tmp_path, 2 * STEPS + 1, signal.SIGTERM)
  assert status == 128 + signal.SIGTERM
  step = max(row['step'] for row in lines(tmp_path))
  assert f'saved in {tmp_path / "checkpoints" / "second" / str(step)}; the same command goes on' in said
  assert 'Traceback' not in said
  train.run(config(**CHANGES), tmp_path)
  assert_same_end(tmp_path, undisturbed)


def test_a_cut_checkpoint_costs_steps_but_changes_nothing(undisturbed, tmp_path, capsys):
  assert stop_at(tmp_path, 8, signal.SIGTERM)[0] == 128 + signal.SIGTERM
  folder = tmp_path / 'checkpoints' / 'first'
  newest = max(folder.iterdir(), key=lambda path: int(path.name))
  file = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:100])
  train.run(config(**CHANGES), tmp_path)
  assert f'checkpoint {newest} is damaged' in capsys.readouterr().err
  assert_same_end(tmp_path, undisturbed)


def test_a_checkpoint_of_another_config_is_refused_even_without_config_json(tmp_path):
  assert stop_at(tmp_path, 4, signal.SIGTERM)[0] == 128 + signal.SIGTERM
  (tmp_path / 'config.json').unlink()
  with pytest.raises(UserError, match=r'config\.optimizer\.learning_rate was 0\.001 and is now 0\.002'):
    train.run(config(**CHANGES, optimizer__learning_rate=0.002), tmp_path)
  (tmp_path / 'config.json').unlink()
  wanted = config(**CHANGES, model__weights='random:bert:layers=2,width=48,heads=2,hidden=64,vocab=256')
  with pytest.raises(UserError, match=r'config\.model\.weights was'):
    train.run(wanted, tmp_path)
