"""The queue of accuracy runs, with a stand-in for main.py: order, stopping, resuming, and what it leaves."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import accuracy, pictures, report, selection_rules  # noqa: E402
from benchmarks.studies import DATASETS, METHODS, STUDIES  # noqa: E402

STUDY = 'bbc_fuzzy'
DOCUMENTS = 120


def fake_point(scores, share, records):
  """What `Trained.evaluate` says of a model that keeps and costs a share of dense's."""
  found = {'metrics': scores, 'keep_ratio': share, 'mac_ratio': share, 'reason': None}
  return {**found, **report.correctness(records)}


def fake_result(folder: pathlib.Path, hit_rate: float, seed: int):
  """What main.py leaves in a finished workdir."""
  random = np.random.default_rng(seed)
  labels = np.random.default_rng(99).integers(5, size=DOCUMENTS)  # the same test split for all
  right = random.random(DOCUMENTS) < hit_rate
  predictions = np.where(right, labels, (labels + 1) % 5)
  records = [
    {'index': i, 'label': int(y), 'prediction': int(p)} for i, (y, p) in enumerate(zip(labels, predictions))
  ]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'predictions_test.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
  scores = {name: float(right.mean()) for name in ('accuracy', 'macro_f1', 'micro_f1', 'macro_f1_batch16')}
  result = {
    'metrics': {**scores, 'loss': 0.1, 'confusion': [[1]]},
    'keep_ratio': 0.8,
    'keep_ratio_by_layer': [1.0, 0.9, 0.8, 0.7, 0.6],
    'mac_ratio': 0.75,
    'macs_per_example': 75.0,
    'dense_macs_per_example': 100.0,
    'seconds_per_example': 0.5,
    'dense_seconds_per_example': 0.6,
    'timing': {'models': {'dense': {'compiled_peak_bytes': 100}, 'model': {'compiled_peak_bytes': 90}}},
  }
  (folder / 'result.json').write_text(json.dumps(result))


@pytest.fixture
def queue(monkeypatch, tmp_path):
  """run(*arguments) -> workdirs that main.py was started for; `failing` names those that fail."""
  failing, started = set(), []

  def call(command):
    folder = next(a for a in command if a.startswith('--workdir=')).removeprefix('--workdir=')
    name = '/'.join(pathlib.Path(folder).parts[-2:])
    started.append(name)
    if name in failing:
      return 2, 'error: no room'
    fake_result(pathlib.Path(folder), 0.9, len(started))
    return 0, ''

  def run(*arguments):
    started.clear()
    base = ['accuracy.py', f'--study={STUDY}', f'--runs={tmp_path}/runs', f'--results={tmp_path}/results']
    monkeypatch.setattr(sys, 'argv', [*base, *arguments])
    accuracy.main()
    return list(started)

  monkeypatch.setattr(accuracy, 'call', call)
  quick = functools.partial(report.metrics.paired_bootstrap, draws=100)
  monkeypatch.setattr(report.metrics, 'paired_bootstrap', quick)
  run.failing = failing
  return run


def document(tmp_path):
  return json.loads((tmp_path / 'results' / f'{STUDY}.json').read_text())


def test_rows_are_kept_at_once_and_the_same_command_goes_on(queue, tmp_path, monkeypatch):
  monkeypatch.setattr(pictures, 'accuracy', lambda *_: None)  # slow, and drawn in a test of its own
  monkeypatch.setattr(pictures, 'keep', lambda *_: None)
  assert queue('--rows=2') == ['bbc/dense-seed0', 'bbc/pfc_late-seed0']
  found = document(tmp_path)
  assert set(found) >= {'command', 'commit', 'machine', 'versions', 'rows'}
  assert len(found['rows']) == len(STUDIES[STUDY].rows)
  done, missing = found['rows'][:2], found['rows'][2:]
  assert all(row['metrics']['accuracy'] > 0.8 and row['reason'] is None for row in done)
  assert all(row['metrics'] is None and row['reason'] == 'not run yet' for row in missing)
  wanted = {'dataset', 'model', 'method', 'variant', 'seed', 'split', 'metrics', 'keep_ratio', 'mac_ratio',
            'time_ratio', 'memory_ratio'}  # fmt: skip
  assert all(wanted <= set(row) for row in found['rows'])
  assert done[0]['time_ratio'] == pytest.approx(1.2) and done[0]['memory_ratio'] == pytest.approx(0.9)
  rest = queue()
  assert rest[:2] == ['bbc/pf-seed0', 'bbc/pfc_early-seed0'] and len(rest) == len(missing)
  assert document(tmp_path)['rows'][:2] == done
  assert queue() == []


def test_a_failed_row_is_told_and_tried_again(queue, tmp_path):
  queue.failing.add('bbc/pfc_late-seed0')
  assert len(queue('--rows=3')) == 3
  row = document(tmp_path)['rows'][1]
  assert row['metrics'] is None and row['reason'] == 'main.py ended with code 2: error: no room'
  assert 'error: no room' in (tmp_path / 'results' / f'{STUDY}.md').read_text()
  queue.failing.clear()
  assert queue('--rows=1') == ['bbc/pfc_late-seed0']


def test_a_row_of_another_command_is_not_taken(queue, tmp_path, monkeypatch):
  queue('--rows=1')
  longer = DATASETS['bbc']._replace(overrides=(*DATASETS['bbc'].overrides, 'data.max_length=512'))
  monkeypatch.setitem(DATASETS, 'bbc', longer)
  assert queue('--rows=1') == ['bbc/dense-seed0']


def test_table_and_plots(queue, tmp_path):
  queue('--rows=9')
  image = pytest.importorskip('PIL.Image')
  for name in (f'{STUDY}_accuracy.png', f'{STUDY}_keep.png'):
    path = tmp_path / 'results' / name
    assert path.stat().st_size < 300_000 and image.open(path).size[0] > 800
  page = (tmp_path / 'results' / f'{STUDY}.md').read_text()
  lines = [line for line in page.splitlines() if line.startswith('| ')]
  assert len({line.count('|') for line in lines}) == 1
  assert any(line.startswith('| PFC, late') and '98.1' in line for line in lines)  # the paper's figure
  assert 'c_late, seed 0: not run yet' in page


def test_summary_is_the_paired_bootstrap(tmp_path):
  """Means over seeds and the interval against dense of the same seeds, from the result file alone."""
  rows = []
  for name, rate in (('dense', 0.95), ('pf', 0.6)):
    for seed in (0, 1):
      folder = tmp_path / f'{name}{seed}'
      fake_result(folder, rate, hash((name, seed)) % 1000)
      records = [json.loads(line) for line in (folder / 'predictions_test.jsonl').read_text().splitlines()]
      right = np.mean([r['label'] == r['prediction'] for r in records])
      kept = report.correctness(records)
      assert report.right(kept['correct'], kept['examples']).mean() == pytest.approx(right)
      metrics = dict.fromkeys(('accuracy', 'macro_f1', 'macro_f1_batch16'), float(right))
      rows.append({'name': name, 'seed': seed, 'metrics': metrics, 'keep_ratio': 1.0, 'mac_ratio': 1.0,
                   'time_ratio': None, **kept})  # fmt: skip
  dense, pf = report.summarise(rows)
  assert dense['difference'] is None and dense['time_ratio'] is None
  assert dense['accuracy']['mean'] == pytest.approx(np.mean([row['metrics']['accuracy'] for row in rows[:2]]))
  gain = pf['difference']
  assert gain['mean'] == pytest.approx(pf['accuracy']['mean'] - dense['accuracy']['mean'])
  assert gain['low'] < gain['mean'] < gain['high'] < 0 and not gain['no_worse']
  json.dumps([dense, pf])


def test_other_documents_are_not_compared():
  rows = [{'seed': 0, 'examples': 8, 'correct': 'ff', 'split_digest': digest} for digest in 'ab']
  with pytest.raises(SystemExit, match='different documents'):
    report.difference(rows[:1], rows[1:])
  assert report.difference(rows[:1], []) is None


def test_studies_are_in_priority_order_and_share_their_dense_runs():
  for study in STUDIES.values():
    assert study.rows[0].name == 'dense' and study.rows[0].seed == 0
    assert {row.dataset for row in study.rows} == {study.dataset}
    seeds = [row.seed for row in study.rows if row.name in ('dense', 'pf', 'pfc_late', 'pfc_early')]
    assert seeds == sorted(seeds)
    assert set(study.paper) <= set(METHODS) and {row.name for row in study.rows} <= set(METHODS)
    places = [accuracy.workdir_of(row, 'runs') for row in study.rows]
    assert len(set(places)) == len(places)
  dense = selection_rules.Row('imdb', 'dense', 'dense', 0)
  assert accuracy.workdir_of(dense, 'runs') == accuracy.workdir_of(STUDIES['imdb_fuzzy'].rows[0], 'runs')


def test_call_returns_code_and_last_line():
  code = "import sys; print('one\\nerror: two', file=sys.stderr); sys.exit(2)"
  assert accuracy.call([sys.executable, '-c', code]) == (2, 'error: two')


def test_sigterm_reaches_the_run_first(tmp_path):
  """The queue waits until the run has saved, and ends without taking the row."""
  child = f"""
import pathlib, signal, sys, time
def save(*_):
  time.sleep(0.3)
  pathlib.Path({str(tmp_path / 'saved')!r}).touch()
  sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / 'ready')!r}).touch()
time.sleep(60)
"""
  parent = f'from benchmarks import accuracy; import sys; accuracy.call([sys.executable, "-c", {child!r}])'
  process = subprocess.Popen([sys.executable, '-c', parent], cwd=ROOT, stderr=subprocess.PIPE, text=True)
  for _ in range(200):
    if (tmp_path / 'ready').exists():
      break
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGTERM)
  _, errors = process.communicate(timeout=20)
  assert (tmp_path / 'saved').exists() and process.returncode == 1 and 'the same command goes on' in errors


def test_a_live_run_is_waited_for(tmp_path, monkeypatch, capsys):
  held = accuracy.workdir.lock(tmp_path / 'a')
  monkeypatch.setattr(accuracy.time, 'sleep', lambda seconds: held.close())
  accuracy.wait_until_free(tmp_path / 'a')
  assert 'waiting' in capsys.readouterr().out


@pytest.mark.parametrize('keep', selection_rules.KEEP)
def test_schedule_hits_the_nominal_keep_ratio(keep):
  ratio = selection_rules.schedule_ratio(keep, 6)
  assert np.mean([ratio**l for l in range(6)]) == pytest.approx(keep, abs=3e-4) and 0 < ratio < 1


def test_selection_rules_resume(tmp_path, monkeypatch):
  """All rules at all ratios, dense first; a second start goes on where the first ended."""
  seen = []

  class Dense:
    def __init__(self, dataset, runs):
      self.dataset = dataset

    def evaluate(self, rule, keep):
      seen.append((self.dataset, rule, keep))
      fake_result(tmp_path / 'x', 0.9 if rule == 'dense' else keep, len(seen))
      records = [
        json.loads(line) for line in (tmp_path / 'x' / 'predictions_test.jsonl').read_text().splitlines()
      ]
      return {'metrics': {'accuracy': 0.5}, 'keep_ratio': keep, 'reason': None, **report.correctness(records)}

  monkeypatch.setattr(selection_rules, 'Dense', Dense)
  monkeypatch.setattr(
    accuracy, 'run', lambda row, runs: {'metrics': {}, 'reason': ''} | {'metrics': {'accuracy': 1}}
  )
  monkeypatch.setattr(selection_rules, 'KEEP', (0.5, 0.3))
  for rows in ('--rows=9', '--rows=1000'):
    monkeypatch.setattr(sys, 'argv', ['selection_rules.py', rows, f'--results={tmp_path}'])
    selection_rules.main()
  assert len(seen) == len(set(seen)) == 2 + 2 * 2 * 7
  assert seen[:2] == [('bbc', 'dense', 1.0), ('imdb', 'dense', 1.0)]
  found = json.loads((tmp_path / 'selection_rules.json').read_text())
  assert all(row['metrics'] and (row['difference'] or row['variant'] == 'dense') for row in found['rows'])
  assert (tmp_path / 'selection_rules_bbc.png').stat().st_size < 300_000
  assert 'not run yet' not in (tmp_path / 'selection_rules.md').read_text()
