"""The command line: a real run from the debug config, and one clear line for whatever is wrong."""

import json
import pathlib
import subprocess
import sys

import pytest
from absl.testing import flagsaver

import main
from tokenprune_jax import settings
from tokenprune_jax.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def command(*arguments):
  """(exit status, what it said) of main.py with these arguments."""
  line = [sys.executable, 'main.py', *map(str, arguments)]
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
  return done.returncode, done.stderr


def test_the_debug_config_trains_tests_and_exports(tmp_path):
  flags = ['--config=configs/debug.py', '--config.stages[0].epochs=1', '--config.data.train_limit=96']
  status, said = command(*flags, f'--workdir={tmp_path}')
  assert status == 0, said
  assert 'Traceback' not in said and 'test  accuracy' in said
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['mac_ratio'] < 1 and result['examples'] == 96
  assert (tmp_path / 'model' / 'model.safetensors').exists()
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['stages'][0]['epochs'] == 1 and config['reducer']['reducers'][1]['name'] == 'combine'


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], ['--config is missing', '--workdir is missing']),
    (['--config=configs/debug.py:big', '--workdir=x'], ["no variant 'big'", 'dense']),
    (['--config=configs/nothing.py', '--workdir=x'], ['configs/nothing.py', 'No such file']),
    (['--config=configs/debug.py', '--workdir=x', '--config.sead=1'], ["'sead'", '"seed"']),
    (['--config=configs/debug.py', '--workdir=x', '--config.stages[0].inti=a'], ['--config.stages[0].inti']),
    (['--config=configs/debug.py', '--workdir=x', '--config.seed=a'], ['--config.seed=a']),
    (['--config=configs/debug.py', '--workdir=x', '--wrkdir=y'], ["'wrkdir'", 'workdir']),
    (['--config=configs/debug.py', '--workdir=x', 'y'], ["'y' is no flag"]),
    (
      ['--config=configs/debug.py', '--workdir=x', '--config.optimizer.warmup=2'],
      ['config.optimizer.warmup'],
    ),
  ],
)
def test_wrong_flags_are_one_line_and_status_2(flags, words):
  status, said = command(*flags)
  assert status == 2
  assert said.startswith('error: ') and said.count('\n') == 1
  assert all(word in said for word in words), said


@pytest.mark.parametrize(
  ('wrong', 'words'),
  [
    ('return 1 +', ':2: invalid syntax'),
    ('return lerning', ":2: name 'lerning' is not defined"),
    ('import optaks', ":2: No module named 'optaks'"),
  ],
)
def test_a_config_file_that_is_wrong_python_is_one_line_with_its_place(wrong, words, tmp_path, monkeypatch):
  (tmp_path / 'mine.py').write_text(f'def get_config():\n  {wrong}\n')
  with pytest.raises(UserError, match=f'mine.py{words}'), flagsaver.flagsaver():
    main.parse(['main.py', f'--config={tmp_path / "mine.py"}', f'--workdir={tmp_path}'])


def test_what_only_the_run_can_find_is_one_line_too(tmp_path):
  (tmp_path / 'file').write_text('')
  status, said = command('--config=configs/debug.py', f'--workdir={tmp_path / "file"}')
  assert status == 2
  assert said.startswith('error: cannot write') and said.count('\n') == 1


def test_settings_of_reducers_and_stages_can_be_given_on_the_command_line(tmp_path):
  flags = ['--config=configs/debug.py', f'--workdir={tmp_path}']
  status, said = command(*flags, '--config.stages[0].init=/nowhere')
  assert status == 2 and "init is '/nowhere'" in said
  status, said = command(*flags, '--config.reducer.reducers[0].alpha_important=1.5')
  assert status == 2 and 'reducer.reducers[0].alpha_important is 1.5' in said


def test_every_variant_of_the_debug_config_is_sound():
  from configs import debug

  for variant in debug.REDUCERS:
    settings.check(debug.get_config(variant).to_dict())
