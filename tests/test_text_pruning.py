"""The study of learned token pruning, with stand-ins for runs and models: its queue, table and plots."""

import gzip
import json
import pathlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import (  # noqa: E402
  accuracy,
  measure,
  report,
  shared,
  text_page,
  text_pruning,
  text_runs,
  text_times,
)
from benchmarks.trained import SCORES  # noqa: E402
from tests.reference import TINY_CONFIG, model_and_params  # noqa: E402
from tests.test_accuracy_queue import fake_point, fake_result  # noqa: E402
from tokenprune_jax import models, stages, workdir  # noqa: E402
from tokenprune_jax.errors import UserError  # noqa: E402

PLAN = text_runs.PLANS['text_pruning']


def records(rate, seed):
  random, labels = np.random.default_rng(seed), np.random.default_rng(99).integers(5, size=120)
  right = random.random(120) < rate
  return [
    {'label': int(y), 'prediction': int(y if ok else (y + 1) % 5), 'length': 10 + i, 'macs': 100.0}
    for i, (y, ok) in enumerate(zip(labels, right))
  ]


class Trained:
  """A model whose accuracy falls with its budget."""

  def __init__(self, folder, limit=0):
    self.params = {'reducer': {'approx': {}}}
    self.exported = SimpleNamespace(
      reducer_spec={'name': 'topk', 'budget': 1.0}, config=SimpleNamespace(depth=6)
    )

  def validation(self, spec):
    return None

  def evaluate(self, spec, split='test', params=None, executor='mask'):
    share = spec.get('budget', spec.get('keep', 0.5))
    scores = dict.fromkeys(SCORES, 0.5 + 0.4 * share)
    found = records(0.5 + 0.4 * share, int(1000 * share))
    return {**fake_point(scores, share, found), 'by_length': report.by_length(found, (35, 70, None))}


@pytest.fixture
def study(monkeypatch, tmp_path):
  """run(*arguments) -> names of the runs that were started; `failing` names those that fail."""
  started, failing = [], set()
  for name in ('sst2', 'ag_news'):
    (tmp_path / 'data' / name).mkdir(parents=True)
    with gzip.open(tmp_path / 'data' / name / 'train.jsonl.gz', 'wt') as file:
      file.writelines(json.dumps({'text': 'word ' * (i + 1), 'label': i % 2}) + '\n' for i in range(8))

  def made(row, runs):
    name = f'{row.dataset}/{row.name}-seed{row.seed}'
    started.append(name)
    if name in failing:
      return {'metrics': None, 'reason': 'no room'}
    fake_result(pathlib.Path(accuracy.workdir_of(row, runs)), 0.9, len(started))
    lines = ''.join(json.dumps(record) + '\n' for record in records(0.9, len(started)))
    (pathlib.Path(accuracy.workdir_of(row, runs)) / 'predictions_test.jsonl').write_text(lines)
    return {'metrics': {}, 'reason': None} | {'metrics': {'accuracy': 1.0}}

  def at_budget(spec, target, validation):
    if target == 0.2:
      raise UserError('the budget is 0.2, ask for more')
    return {**spec, 'budget': target}

  def run(*arguments):
    started.clear()
    base = [
      'text_pruning.py',
      f'--data={tmp_path}/data',
      f'--runs={tmp_path}/runs',
      f'--results={tmp_path}',
    ]
    monkeypatch.setattr(sys, 'argv', [*base, *arguments])
    text_pruning.main()
    return list(started)

  monkeypatch.setattr(accuracy, 'run', made)
  monkeypatch.setattr(stages, 'at_budget', at_budget)
  monkeypatch.setattr(text_runs, 'bbc_texts', list)
  monkeypatch.setattr(text_pruning, 'Trained', Trained)
  monkeypatch.setattr(text_pruning, 'with_approx', lambda *_: None)
  monkeypatch.setattr(
    text_pruning, 'divergences', lambda *_: {'distilled': 0.2, 'pooled': 0.3, 'random': 1.6}
  )
  # As lines, which takes a tenth of the time: the file is written after every point.
  monkeypatch.setattr(workdir, 'write_json', lambda path, value: workdir.write_text(path, json.dumps(value)))
  bootstrap = report.metrics.paired_bootstrap
  monkeypatch.setattr(report.metrics, 'paired_bootstrap', lambda *given: bootstrap(*given, draws=50))
  run.failing = failing
  return run


def test_the_queue_goes_on_and_ends_with_every_point(study, tmp_path, monkeypatch):
  page, plots = text_page.page, text_page.plots
  monkeypatch.setattr(text_page, 'page', lambda *_: '')  # made and drawn once, below
  monkeypatch.setattr(text_page, 'plots', lambda *_: None)
  study.failing.add('sst2/ltp-seed0')
  assert study('--rows=3') == ['sst2/dense-seed0', 'sst2/topk-seed0', 'sst2/ltp-seed0']
  found = json.loads((tmp_path / 'text_pruning.json').read_text())
  assert [row['reason'] for row in found['rows'] if row['name'] == 'ltp'][0] == 'no room'
  study.failing.clear()
  place = next(i for i, row in enumerate(found['rows']) if row['name'] == 'topk' and row['budget'] == 0.3)
  assert found['rows'][place]['metrics']
  found['rows'][place]['metrics'] = None
  (tmp_path / 'text_pruning.json').write_text(json.dumps(found))
  assert study('--measure_only') == []  # ltp and all that follow wait for their training
  assert json.loads((tmp_path / 'text_pruning.json').read_text())['rows'][place]['metrics']
  first = study('--rows=1')
  assert first == ['sst2/ltp-seed0']
  assert study('--datasets=ag_news', '--rows=1') == ['ag_news/dense-seed0']  # though others come before it
  rest = study()
  assert len(rest) == len(list(text_runs.rows(PLAN))) - 4
  assert not set(rest) & {'sst2/dense-seed0', 'ag_news/dense-seed0', *first}
  assert study() == []
  shutil.rmtree(tmp_path / 'runs')  # what is measured needs no run any more
  assert study() == []
  before = (tmp_path / 'text_pruning.json').read_text()
  document = json.loads(before)
  point = next(row for row in document['rows'] if row['name'] == 'sttabt' and row['budget'] == 0.3)
  point['metrics'] = None
  (tmp_path / 'text_pruning.json').write_text(json.dumps(document))
  assert study('--rows=9') == [
    f'{name}-seed0' for name in ('sst2/dense', 'pooled/approx', 'sst2/approx', 'sst2/sttabt')
  ]
  document = json.loads((tmp_path / 'text_pruning.json').read_text())
  place = next(i for i, row in enumerate(document['rows']) if row['variant'] == 'untrained')
  assert document['rows'][place]['dataset'] == 'sst2'
  document['rows'][place]['metrics'] = None
  (tmp_path / 'text_pruning.json').write_text(json.dumps(document))
  for only, there in (('ag_news', False), ('sst2', True)):  # what needs no training keeps to the datasets too
    assert study(f'--datasets={only}') == []
    found = json.loads((tmp_path / 'text_pruning.json').read_text())['rows'][place]
    assert bool(found['metrics']) == there
  (tmp_path / 'text_pruning.json').write_text(before)
  document = json.loads((tmp_path / 'text_pruning.json').read_text())
  assert {row['reason'] for row in document['rows']} == {None, 'the budget is 0.2, ask for more'}
  assert set(document['divergences']) == {'sst2', 'ag_news', 'bbc'} and set(
    document['quartiles']['ltp'][0]
  ) >= {'accuracy'}
  text = page(document, PLAN, 'text_pruning')
  assert (
    'chosen on validation' in text
    and 'distilled 0.200, of all texts pooled 0.300, random 1.600' in text
    and 'up to 39 tokens' in text
  )
  assert {row['name'] for row in document['rows'] if row['budget'] == 0.35} == {'sttabt', 'sttabt_states'}
  assert '| STTABT, Concrete | 0.35 | 3 |' in text
  lines = [line for line in text.splitlines() if line.startswith(('| LTP |', '| LTP *'))]
  lines = [line for line in lines if line.count('|') != 8]  # the fronts' own
  assert len(lines) == 2 * (1 + len(PLAN.budgets) - 1) + 1
  plots(tmp_path / 'plot.png', document, PLAN, 'sst2')
  assert 10_000 < (tmp_path / 'plot.png').stat().st_size < 300_000


class Small(Trained):
  """A model that can be timed: top-k whatever the run, on two texts."""

  def __init__(self, folder):
    super().__init__(folder)
    self.exported.config = TINY_CONFIG
    self.splits = {'test': Texts()}
    self.made, self.params = model_and_params({'name': 'topk'})

  def model(self, spec):
    return self.made.clone(reducer=models.make_reducer({'name': spec['name']}))


class Texts:
  """A split of two texts as long as each other: one batch, so that each way to run it compiles one program."""

  def __len__(self):
    return 2

  def ids(self, place):
    return np.arange(5, 10)


def test_a_page_shows_pictures_of_what_was_measured_alone():
  document = {**report.header('python'), 'rows': [text_pruning.empty(text_runs.dense_row('sst2', 0), None)]}
  told = text_page.page(document, PLAN, 'text_pruning')
  assert '.png' not in told and f'## SST-2\n\n{text_page.NOT_RUN}' in told
  document['rows'][0] |= fake_point(dict.fromkeys(SCORES, 0.9), 1.0, records(0.9, 0))
  document['rows'][0]['valid'] = {'accuracy': 0.9}
  told = text_page.page(document, PLAN, 'text_pruning')
  assert 'text_pruning_sst2.png' in told and 'text_pruning_ag_news.png' not in told


def test_times_go_into_the_table_and_a_plot(study, tmp_path, monkeypatch, capsys):
  study('--rows=3')
  monkeypatch.setattr(text_times, 'Trained', Small)
  monkeypatch.setattr(measure, 'quiet', lambda _: 0.0)
  given = ['text_times.py', '--datasets=sst2', '--budgets=0.4', '--repeats=1', f'--results={tmp_path}']
  monkeypatch.setattr(sys, 'argv', [*given, f'--runs={tmp_path}/runs'])
  write = text_times.write

  def times():
    rows = json.loads((tmp_path / 'text_pruning.json').read_text())['rows']
    return {(row['name'], row['budget']): row['time'] for row in rows if row.get('time')}

  def stopped(study, point, *rest):
    if point['name'] == 'topk':
      raise KeyboardInterrupt
    write(study, point, *rest)

  monkeypatch.setattr(text_times, 'write', stopped)
  with pytest.raises(KeyboardInterrupt):
    text_times.main()
  assert set(times()) == {('dense', None)}  # what was taken outlives the stop
  monkeypatch.setattr(text_times, 'write', write)
  text_times.main()
  found = times()
  assert set(found) == {('dense', None), ('topk', None), ('topk', 0.4), ('ltp', None), ('ltp', 0.4)}
  assert all(time['documents'] == 2 and time['efficiency'] > 0 for time in found.values())
  assert found['dense', None]['time_ratio'] == 1.0 and found['topk', None]['mac_ratio'] < 1
  rows = json.loads((tmp_path / 'text_pruning.json').read_text())['rows']
  by_compact = {(row['name'], row['budget']): row['compact'] for row in rows if row.get('compact')}
  assert set(by_compact) == {('ltp', None), ('ltp', 0.4)}  # its counts depend on the text
  assert all(one['time_ratio'] > 0 and one['f1'] > 0.5 for one in by_compact.values())
  # A folder of one machine is not told.
  assert {time['command'] for time in found.values()} == {f'python benchmarks/{" ".join(given)} --runs=runs'}
  assert 'sst2_time.png' in (tmp_path / 'text_pruning.md').read_text()
  assert (tmp_path / 'text_pruning_sst2_time.png').stat().st_size > 10_000
  before = json.loads((tmp_path / 'text_pruning.json').read_text())
  assert study('--rows=0') == []
  assert json.loads((tmp_path / 'text_pruning.json').read_text())['rows'] == before['rows']
  monkeypatch.setattr(sys, 'argv', [*given, f'--runs={tmp_path}/runs', '--seed=1'])
  text_times.main()
  assert 'sst2: its dense run of seed 1 is not measured; nothing to time' in capsys.readouterr().out


def test_the_front_is_chosen_on_validation_among_what_all_seeds_ran():
  plan = PLAN._replace(seeds={'sst2': (0, 1)})

  def points(name, budget, valid, macs, speed, seeds=(0, 1)):
    row = text_runs.dense_row if name == 'dense' else text_runs.method_row
    for seed in seeds:
      made = row('sst2', seed) if name == 'dense' else row('sst2', name, seed)
      yield {
        **text_pruning.empty(made, budget), 'valid': {'accuracy': valid + 0.01 * seed},
        'time': {'time_ratio': speed, 'mac_ratio': macs}, **fake_point(dict.fromkeys(SCORES, 0.1), macs, records(0.9, 0)),
      }  # fmt: skip

  rows = [
    *points('dense', None, 0.90, 1.0, 1.0),
    *points('topk', None, 0.85, 0.4, 3.0),
    *points('topk', 0.55, 0.88, 0.55, 2.0),
    *points('ltp', None, 0.84, 0.45, 2.5),  # dearer than top-k and no better
    *points('ltp', 0.55, 0.89, 0.55, 1.1),  # as dear as top-k and better
    *points('ltp', 0.2, 0.60, 0.2, 4.0),  # broken down
    *points('power', None, 0.95, 0.3, 5.0, seeds=(1,)),  # one seed alone
  ]
  document = {'rows': rows}

  def stands(cost):
    return [(one.title, one.budget) for one in text_page.front(document, plan, 'sst2', cost)]

  ltp, topk, dense = ('LTP', 0.55), ('top-k', None), ('dense', None)
  assert stands(text_page.macs_of) == [topk, ltp, dense]
  assert stands(text_page.speed_of) == [topk, ('top-k', 0.55), ltp, dense]
  table = text_page.front_table(document, plan, 'sst2', text_page.macs_of).splitlines()
  assert table[2].startswith('| top-k | as trained | 2 | 0.40 | 3.00 | -5.00 | +0.00 [')
  assert table[-1] == '| dense | – | 2 | 1.00 | 1.00 | – | – |'


def test_of_several_seeds_the_one_that_was_timed_is_shown():
  timed = {'seed': 1, 'compact': {'time_ratio': 1.25, 'accuracy': 0.9}}
  assert shared.cells([{'seed': 0}, timed]) == ('1.25', '90.0') and shared.cells([{'seed': 0}]) == ('–', '–')


def test_exits_are_a_study_of_their_own(study, tmp_path, monkeypatch):
  monkeypatch.setattr(text_page, 'plots', lambda *_: None)
  assert study('--study=exits', '--rows=2') == ['ag_news/dense-seed0', 'ag_news/ltp-seed0']
  text = (tmp_path / 'exits.md').read_text()
  assert '## Rotten Tomatoes' in text and 'Without training' not in text and '| by compact |' not in text
  told = text.split('multiply-adds by length')[1]
  assert '1 to 35 tokens (26)' in told and 'more than 70 tokens (59)' in told
  assert told.splitlines()[4].startswith('| LTP | 0.40 |') and told.splitlines()[4].count('(1.00)') == 3
  document = json.loads((tmp_path / 'exits.json').read_text())
  point = next(row for row in document['rows'] if row['name'] == 'ltp' and row['budget'] == 0.4)
  point['compact'] = {'time_ratio': 3.25, 'accuracy': 0.875}
  lines = text_page.page(document, text_runs.PLANS['exits'], 'exits').splitlines()
  assert [line for line in lines if '| 3.25 | 87.5 |' in line][0].startswith('| LTP | 0.4 |')
  rows = list(text_runs.rows(text_runs.PLANS['exits']))
  large = [row for row in rows if row.dataset == 'ag_mpnet']
  assert [row.name for row in large] == ['dense', 'fastbert', 'pyramid_states'] and large[
    0
  ].variant == 'dense,mpnet-base'


def test_gains_by_length():
  lengths = [3, 35, 36, 70, 71]
  found = report.by_length(
    [{'length': n, 'macs': 2.0 * n, 'label': 1, 'prediction': n % 2} for n in lengths], (35, 70, 70, None)
  )
  assert [part['examples'] for part in found] == [2, 2, 0, 1]
  assert [part['accuracy'] for part in found] == [1.0, 0.0, None, 1.0]
  assert [part['macs'] for part in found] == [38.0, 106.0, None, 142.0]


def test_missing_data_is_told(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'argv', ['text_pruning.py', f'--data={tmp_path}'])
  with pytest.raises(SystemExit, match=r'sst2 holds no train.jsonl.gz.*--data'):
    text_pruning.main()


@pytest.mark.parametrize('study', text_runs.PLANS)
def test_every_run_comes_after_those_it_starts_from(study):
  seen = set()
  for row in text_runs.rows(text_runs.PLANS[study]):
    row = text_runs.placed(row, SimpleNamespace(data='data', runs='runs'))
    needed = [name for name in row.variant.split(',')[1:] if name.startswith('runs/')]
    assert set(needed) <= seen
    seen.add(accuracy.workdir_of(row, 'runs'))
    arguments = accuracy.arguments(row, 'runs')
    assert not any('{' in argument for argument in arguments)
    assert '--config.eval.timing=False' in arguments
