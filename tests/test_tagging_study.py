"""The study of taggers that stop early, with stand-ins for runs and models: its queue, table, plots and times."""

import json
import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import accuracy, measure, report, tagging  # noqa: E402
from tests.reference import TINY_CONFIG, model_and_params, ragged_batch, requests, settings  # noqa: E402
from tests.test_accuracy_queue import fake_point, fake_result  # noqa: E402
from tokenprune_jax import costs, models, stages  # noqa: E402
from tokenprune_jax.errors import UserError  # noqa: E402

GIVEN = requests(ragged_batch((14, 9, 11, 9), 14))  # of one bucket: most of the time is compiling


class Words:
  """A split of four sentences."""

  ids, word_of = staticmethod(lambda i: GIVEN[i]['ids']), [request['words'] for request in GIVEN]
  place = staticmethod(lambda i: i)

  def __len__(self):
    return len(GIVEN)


class Found(costs.Validation):
  """Tells what capacities were asked for."""

  def calibrated(self, fields, column, controls=None):
    return {'capacity_found': fields['overflow_rate']}


class Trained:
  """A tagger whose F1 falls with its budget, and which can be timed: by top-k, of which few programs are made."""

  def __init__(self, folder, limit=0):
    self.spec = {'name': 'none'} if 'dense' in str(folder) else settings('tokee', 'TINY')
    self.exported = SimpleNamespace(reducer_spec=self.spec, config=TINY_CONFIG, labels=('O', 'B-X', 'I-X'))
    self.buckets = (16, TINY_CONFIG.max_length)
    self.splits, self.params = {'test': Words()}, model_and_params({'name': 'none'}, readout='tokens')[1]

  def validation(self, spec):
    return Found(lambda batch: None, list)

  def model(self, spec):
    fields = {'name': 'none'} if spec['name'] == 'none' else {'name': 'topk', 'shares': (1.0, 0.5, 0.5, 0.5)}
    return models.Classifier(TINY_CONFIG, models.make_reducer(fields), 3, readout='tokens')

  def evaluate(self, spec, split='test', params=None, executor='mask'):
    assert ('capacity_found' in spec) == (executor == 'compact')
    share = spec.get('budget', 1.0)
    records = [{'tags': ['O'] * 3, 'predicted': ['O'] * 3}] * 8
    scores = dict.fromkeys(('accuracy', 'precision', 'recall', 'f1', 'loss'), 0.5 + 0.4 * share)
    return fake_point(scores, share, records)


@pytest.fixture
def study(monkeypatch, tmp_path):
  """run(*arguments) -> names of the runs that were started."""
  started = []

  def made(row, runs):
    started.append(f'{row.name}-seed{row.seed}')
    if row.name == 'student' and len(started) == 1:
      return {'metrics': None, 'reason': 'no room'}
    fake_result(pathlib.Path(accuracy.workdir_of(row, runs)), 0.9, 0)
    return {'metrics': {'accuracy': 1.0}, 'reason': None}

  def at_budget(spec, target, validation):
    if target == 0.25 and spec['window'] == 15:
      raise UserError('the budget is 0.25, ask for more')
    return {**spec, 'budget': target}

  def run(*arguments):
    started.clear()
    base = ['tagging.py', f'--runs={tmp_path}/runs', f'--results={tmp_path}']
    monkeypatch.setattr(sys, 'argv', [*base, *arguments])
    tagging.main()
    return list(started)

  monkeypatch.setattr(accuracy, 'run', made)
  monkeypatch.setattr(stages, 'at_budget', at_budget)
  monkeypatch.setattr(tagging, 'Trained', Trained)
  monkeypatch.setattr(measure, 'quiet', lambda _: 0.0)
  monkeypatch.setattr(tagging, 'controls_of', lambda _: {})  # what stands in has none
  return run


def test_the_queue_goes_on_and_times_go_into_the_table(study, tmp_path, monkeypatch):
  plot = tagging.plot
  monkeypatch.setattr(tagging, 'plot', lambda *_: None)  # drawn once, below
  with pytest.raises(SystemExit, match='holds no finished dense run of seed 0'):
    study('--times')
  assert study('--rows=3') == ['dense-seed0', 'sentee-seed0', 'tokee-seed0']
  assert study('--rows=1') == ['dense-seed1']
  study()
  assert study() == []
  rows = json.loads((tmp_path / 'tagging.json').read_text())['rows']
  assert {row['reason'] for row in rows} == {None, 'the budget is 0.25, ask for more'}
  assert {row['reducer'].get('window') for row in rows if row['name'] == 'tokee_5'} == {5}
  text = (tmp_path / 'tagging.md').read_text()
  assert '| TOKEE, window 5 | 0.33 | 3 | 63.2 ± 0.0 | -26.80 |' in text
  assert '- tokee_15: 3 (the budget is 0.25, ask for more)' in text
  assert study('--times', '--budgets=0.5', '--documents=4', '--repeats=1') == []
  rows = json.loads((tmp_path / 'tagging.json').read_text())['rows']
  times = {row['name']: row['time'] for row in rows if row['time']}
  assert set(times) == {'dense', 'sentee', 'tokee_15', 'tokee_5', 'tokee_1'}
  assert times['dense']['time_ratio'] == 1 and times['tokee_5']['mac_ratio'] < 1
  shared = {row['name']: row['compact'] for row in rows if row.get('compact')}
  assert set(shared) == set(times) - {'dense'} and all(one['time_ratio'] > 0 for one in shared.values())
  assert (
    shared['sentee']['f1'] == pytest.approx(0.7) and shared['sentee']['reducer']['capacity_found'] == 0.25
  )
  row = next(
    line for line in (tmp_path / 'tagging.md').read_text().splitlines() if line.startswith('| SENTEE | 0.5 ')
  )
  assert row.endswith(f'| {shared["sentee"]["time_ratio"]:.2f} | 70.0 |')
  assert 'tagging_time.png' in (tmp_path / 'tagging.md').read_text()
  for name in ('mac_ratio', 'time_ratio'):
    plot(tmp_path / f'{name}.png', rows, name, name)
    assert 10_000 < (tmp_path / f'{name}.png').stat().st_size < 300_000


def test_every_run_comes_after_those_it_starts_from():
  seen = set()
  for row in tagging.rows('runs', 100):
    assert {name for name in row.variant.split(',')[1:] if name} <= seen
    seen.add(accuracy.workdir_of(row, 'runs'))


def test_whole_sentences_are_right_or_wrong():
  right, wrong = {'tags': ['O', 'B-X'], 'predicted': ['O', 'B-X']}, {'tags': ['O'], 'predicted': ['B-X']}
  found = report.correctness([right, wrong])
  np.testing.assert_array_equal(report.right(found['correct'], found['examples']), [True, False])
