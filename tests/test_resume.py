"""A run that is killed or told to stop ends with the numbers of one that was left alone, bit for bit."""

import json
import signal
import time

import numpy as np
import pytest

from tests.tiny_run import STEPS, config, ended, lines, start
from tokenprune_jax import optim, pretrained, train
from tokenprune_jax.errors import UserError

CHANGES = {
  'stages': (
    {'name': 'first', 'epochs': 2},
    {'name': 'second', 'epochs': 1, 'init': 'first', 'reducer': {'ratio': 0.5}},
  ),
  'eval__every': 4,
  'checkpoint__every': 3,
}


def stop_at(folder, step, number):
  """Runs until `step` is written down, then sends the signal; returns (exit status, what it said)."""
  run = start(folder, pause=0.15, **CHANGES)
  process, deadline = run[0], time.monotonic() + 300
  while process.poll() is None and time.monotonic() < deadline:
    if any(row['step'] >= step for row in lines_so_far(folder)):
      process.send_signal(number)
      break
    time.sleep(0.01)
  return ended(run)


def lines_so_far(folder):
  try:
    return lines(folder)
  except ValueError:  # half a line is there
    return []


def newest_checkpoint(folder):
  finished = [path for path in folder.iterdir() if path.name.isdigit()]  # a kill leaves half of one behind
  return max(finished, key=lambda path: int(path.name))


def outcome(folder):
  """All numbers that a run ends with; speeds are left out."""
  rows = [
    {name: value for name, value in row.items() if name != 'examples_per_second'} for row in lines(folder)
  ]
  result = json.loads((folder / 'result.json').read_text())
  params = optim.flatten(pretrained.load_exported(folder / 'model').params)
  return rows, result, (folder / 'predictions_test.jsonl').read_text(), params


def assert_same_end(folder, other):
  ours, theirs = outcome(folder), outcome(other)
  assert ours[:3] == theirs[:3]
  assert ours[3].keys() == theirs[3].keys()
  for path, leaf in ours[3].items():
    np.testing.assert_array_equal(leaf, theirs[3][path], err_msg=path)


def test_killed_damaged_and_stopped_it_ends_as_if_left_alone(tmp_path):
  undisturbed, folder = tmp_path / 'undisturbed', tmp_path / 'run'
  train.run(config(**CHANGES), undisturbed)
  # Killed before the first checkpoint, and again between two, after a validation.
  assert stop_at(folder, 2, signal.SIGKILL)[0] == -signal.SIGKILL
  assert stop_at(folder, 8, signal.SIGKILL)[0] == -signal.SIGKILL
  # The newest checkpoint was cut on the disk: an older one costs steps, but changes nothing.
  newest = newest_checkpoint(folder / 'checkpoints' / 'first')
  file = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:100])
  # Told to stop in the second stage.
  status, said = stop_at(folder, 2 * STEPS + 1, signal.SIGTERM)
  assert status == 128 + signal.SIGTERM
  assert f'checkpoint {newest} is damaged' in said and 'Traceback' not in said
  step = max(row['step'] for row in lines(folder))
  assert f'saved in {folder / "checkpoints" / "second" / str(step)}; the same command goes on' in said
  # Another config is refused, even where only the checkpoint knows of the first one.
  (folder / 'config.json').rename(tmp_path / 'config.json')
  with pytest.raises(UserError, match=r'config\.optimizer\.learning_rate was 0\.001 and is now 0\.002'):
    train.run(config(**CHANGES, optimizer__learning_rate=0.002), folder)
  (tmp_path / 'config.json').rename(folder / 'config.json')
  train.run(config(**CHANGES), folder)
  assert_same_end(folder, undisturbed)
