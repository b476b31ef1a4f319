"""A run of seconds: a function for tests, and a program for tests that need a process of their own to kill.

  python -m tests.tiny_run WORKDIR '{"config": {key: value}, "devices": 1, "pause": 0}'

pause: seconds added to each step, so that a signal sent at a step arrives before the next ones are over.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

STEPS = 6  # an epoch


def config(**changes):
  """The config of a tiny run; changes: {'a__b': value} replaces config['a']['b']."""
  from tokenprune_jax import settings

  result = settings.defaults()
  result['model'] |= {'weights': 'random:bert:layers=2,width=32,heads=2,hidden=64,vocab=256'}
  result['data'] |= {'name': 'synthetic', 'max_length': 32, 'buckets': (32,)}
  result['data'] |= {'train_limit': 48, 'valid_limit': 24, 'test_limit': 24}
  result['reducer'] = {'name': 'fuzzy', 'ratio': 0.6}
  result['stages'] = ({'name': 'tune', 'epochs': 2},)
  result['optimizer'] |= {'learning_rate': 1e-3, 'batch_size': 8}
  result['eval'] |= {'batch_size': 8, 'timing': False}
  result['checkpoint'] |= {'every': 2}
  for key, value in changes.items():
    *outer, last = key.split('__')
    place = result
    for name in outer:
      place = place[name]
    place[last] = value
  return result


def lines(workdir, split=None):
  """The rows of metrics.jsonl, of one split where one is named."""
  path = workdir / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  return [row for row in rows if split in (None, row['split'])]


def start(workdir, *, devices=1, pause=0.0, **changes):
  """The run as a process, for `ended`."""
  request = json.dumps({'config': changes, 'devices': devices, 'pause': pause})
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  command = [sys.executable, '-m', 'tests.tiny_run', str(workdir), request]
  # A file, for a pipe that is full while another process is waited for would stop both.
  log = tempfile.TemporaryFile('w+', encoding='utf-8')  # noqa: SIM115 (`ended` closes it)
  return subprocess.Popen(command, cwd=root, stderr=log), log


def ended(run, seconds=300):
  """(exit status, what it said) of what `start` gave."""
  process, log = run
  try:
    process.wait(timeout=seconds)
  finally:
    process.kill()
    log.seek(0)
    said = log.read()
    log.close()
  return process.returncode, said


def main():
  workdir, request = sys.argv[1], json.loads(sys.argv[2])
  import jax

  jax.config.update('jax_num_cpu_devices', request['devices'])
  from tokenprune_jax import recorder, sharding, train
  from tokenprune_jax.errors import UserError

  push = recorder.Recorder.push

  def slow_push(self, *arguments):
    time.sleep(request['pause'])
    push(self, *arguments)

  recorder.Recorder.push = slow_push
  wanted = config(**request['config'])
  try:
    sharding.initialize(wanted['parallel'])
    train.run(wanted, workdir)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
