"""The benchmarks' own arithmetic: layouts, choices and tables, on made-up numbers."""

import argparse
import dataclasses
import sys
import time
import types
import weakref
from concurrent import futures

import numpy as np
import pytest

from benchmarks import dense_forward, headline, measure, packing, pictures, report, serving, speed, turns
from tokenprune_jax import ladder
from tokenprune_jax.models import make_reducer

SHAPES = ladder.Ladder(batch_tokens=512).settled(512)


@pytest.mark.parametrize('slots', [0, 128, 256, 512])
def test_every_survivor_has_one_place(slots):
  lengths = np.random.default_rng(slots).integers(1, 513, 40).tolist()
  layout = packing.packed(lengths, SHAPES, slots) if slots else packing.regrouped(lengths, SHAPES)
  rows = [(room, row) for room, rows in layout.batches for row in rows]
  assert sorted(n for _, row in rows for n in row) == sorted(lengths)
  assert all(sum(row) <= room for room, row in rows)
  held = sum(room for room, _ in rows)
  assert layout.padding() == pytest.approx(1 - sum(lengths) / held)
  if slots == 512:  # first fit leaves no two rows that would go into one
    sums = [sum(row) for _, row in rows if row]
    assert all(a + b > 512 for i, a in enumerate(sums) for b in sums[i + 1 :])


def test_segments_of_a_packed_row():
  found = packing.arrays(6, [[2, 3], [6], []], width=4)
  assert found['segments'].tolist() == [[1, 1, 2, 2, 2, 0], [1] * 6, [0] * 6]
  assert found['x'].shape == (3, 6, 4)


def test_a_packed_row_computes_what_its_examples_compute_alone():
  """The block on [2, 3] in one row equals the block on 2 and on 3."""
  config = speed.dataclasses.replace(speed.CONFIGS['minilm'], width=16, heads=2, hidden=32)
  run = packing.Run(config, packing.Layout([(5, [[2, 3]])]))
  [batch] = run.batches
  together, received = run.program(run.params, batch, True)
  for start, stop in ((0, 2), (2, 5)):
    part = {'x': batch['x'][:, start:stop], 'segments': batch['segments'][:, start:stop] * 0 + 1}
    alone, seen = run.program(run.params, part, False)
    np.testing.assert_allclose(together[:, start:stop], alone, atol=1e-5)
    np.testing.assert_allclose(received[..., start:stop], seen, atol=1e-5)


def point(method, batch, length, time_ratio, mac_ratio=0.5):
  return {
    'method': method,
    'dtype': 'float32',
    'batch': batch,
    'length': length,
    'time_ratio': time_ratio,
    'mac_ratio': mac_ratio,
    'efficiency': time_ratio * mac_ratio,
  }


def test_a_method_is_set_to_the_budget_it_is_timed_at():
  config = speed.dataclasses.replace(speed.CONFIGS['minilm'], width=16, heads=2, hidden=32, vocab_size=50)
  batch = speed.rows_of(2, 40, 50)
  given, _ = speed.specs(6)['topk']
  params = speed.random_params(speed.made(given, config))
  spec, macs = speed.settled(given, config, params, [batch], 0.4)
  assert spec != given and macs == pytest.approx(0.4, abs=0.03)


def test_speeds_are_drawn_by_length(tmp_path):
  rows = [
    point(name, 1, n, ratio) for name in ('dense_whole', 'a', 'b') for n, ratio in ((64, 1.2), (16, 0.9))
  ]
  pictures.lengths(tmp_path / 'plot.png', 'A title', rows)
  assert 10_000 < (tmp_path / 'plot.png').stat().st_size < 300_000


def test_break_even_is_the_length_from_which_on_a_method_stays_faster():
  rows = [point('a', 1, n, ratio) for n, ratio in ((16, 1.2), (32, 0.9), (64, 1.1), (128, 1.4))]
  rows += [point('b', 1, n, 0.8) for n in (16, 32)] + [point('dense_whole', 1, 16, 1.0), point('c', 8, 16, 2)]
  text = speed.break_even(rows)
  assert '| a | float32 | 0.50 to 0.50 | from 64 tokens on |' in text
  assert '| b | float32 | 0.50 to 0.50 | at none, not at 32 |' in text and '| c |' not in text
  assert speed.break_even([point('c', 8, 16, 2)]) == ''


def test_executors_that_were_asked_for():
  wanted = speed.specs(12)
  options = argparse.Namespace(methods=['topk', 'threshold'], executor=[])
  found = speed.chosen(options, wanted)
  assert found == {'topk': ('topk', 'compact'), 'threshold': ('threshold', 'serve')}
  options.executor = ['mask', 'compact']
  found = speed.chosen(options, wanted)
  assert list(found) == ['topk (mask)', 'topk', 'threshold (mask)']
  assert found['topk (mask)'] == ('topk', 'mask') and found['topk'] == ('topk', 'compact')


def test_speeds_go_on_with_the_rows_that_a_stopped_command_lacks(monkeypatch, tmp_path):
  asked = []

  def stopped(options, dtype, length, batch, missing):
    for method in [name for name in ('dense_whole', 'dense_grouped', 'topk', 'student') if name in missing]:
      asked.append((length, method))
      if asked == [(16, 'dense_whole'), (16, 'dense_grouped'), (16, 'topk')]:
        raise KeyboardInterrupt
      times = {'executor': 'mask', 'seconds': 1.0, 'efficiency': 1.0, 'torch_sdpa_ratio': None}
      yield {**point(method, batch, length, 1.0), 'dtype': dtype, **times}

  monkeypatch.setattr(speed, 'cell', stopped)
  out = tmp_path / 'speed.json'
  command = ['speed.py', '--batch=1', '--length=16,32', '--methods=topk,student', f'--out={out}']
  monkeypatch.setattr(sys, 'argv', command)
  with pytest.raises(KeyboardInterrupt):
    speed.main()
  assert [row['method'] for row in report.read(out)['rows']] == ['dense_whole', 'dense_grouped']
  speed.main()
  names = ['dense_whole', 'dense_grouped', 'topk', 'student']
  assert asked[3:] == [(16, 'topk'), (16, 'student'), *((32, name) for name in names)]
  assert [(row['length'], row['method']) for row in report.read(out)['rows']] == [
    (length, name) for length in (16, 32) for name in names
  ]


def test_the_headline_is_chosen_on_validation_and_never_on_test():
  rows = [
    {'method': 'dense', 'valid': 0.9, 'test': 0.9, 'seconds': 10.0},
    # Just good enough, and the fastest of those.
    {
      'method': 'topk',
      'valid': 0.895,
      'test': 0.1,
      'seconds': 5.0,
    },
    {'method': 'topk', 'valid': 0.894, 'test': 0.99, 'seconds': 1.0},
    # slower, on a machine that had become faster
    {'method': 'topk', 'valid': 0.9, 'test': 0.9, 'seconds': 4.0, 'dense_seconds': 7.0},
    {'method': 'combine', 'valid': 0.95, 'test': 0.99, 'seconds': 6.0},
  ]
  rows = [{'dense_seconds': 10.0, **row} for row in rows]
  assert headline.headline(rows) is rows[1]
  assert headline.headline([rows[0], rows[2]]) is None


def test_points_of_the_headline_are_chosen_by_a_part_of_their_name():
  names = [setting.name for setting in headline.wanted(['80%', 'layer 3'], 'imdb', 'runs')]
  assert names == ['top-k, 80% to 5%', 'combining at layer 3']
  assert headline.wanted([], 'imdb', 'runs') == list(headline.settings('imdb'))
  with pytest.raises(SystemExit, match="no setting has 'layer 9' in its name; there are dense, "):
    headline.wanted(['80%', 'layer 9'], 'imdb', 'runs')


def test_settings_of_the_headline_fit_the_model():
  for setting in headline.settings('bbc'):
    make_reducer(setting.spec).check(6, 12)
  assert [setting.method for setting in headline.settings('bbc')].count('topk') == len(headline.ENDS)


def test_programs_are_given_up_before_the_next_is_made(monkeypatch):
  monkeypatch.setattr(measure, 'others_load', lambda: 0.0)
  alive = []

  class Program:
    def __init__(self, seconds):
      self.seconds = seconds

    def __call__(self):
      time.sleep(self.seconds)

  def maker(seconds, most):
    def make():
      assert sum(ref() is not None for ref in alive) <= most
      alive.append(weakref.ref(program := Program(seconds)))
      return program

    return make

  ways = {'slow': maker(0.02, 0), 'fast': maker(0.002, 1), 'slower': maker(0.04, 1)}
  seen = []
  best = turns.fastest(ways, 1, seen=lambda turn: seen.append(dataclasses.replace(turn, program=None)))
  assert best.name == 'fast' and best.times.keys() == {'fast', 'slower'}
  took = [{name: time['seconds'] for name, time in turn.times.items()} for turn in seen]
  assert seen[0].pace == 1 and best.pace == pytest.approx(took[1]['fast'] / took[1]['slow'])
  assert seen[2].pace == pytest.approx(best.pace * took[2]['slower'] / took[2]['fast'])
  assert seen[0].seconds_of(best) == pytest.approx(took[0]['slow'] * best.pace)
  assert seen[1].seconds_of(best) == took[1]['fast']
  assert seen[2].seconds_of(best) == pytest.approx(took[2]['fast'])
  others = {'a': maker(0.001, 1), 'b': maker(0.001, 1)}
  names = []
  for turn in turns.one_by_one(others, {best.name: best.program}, 1):
    assert turn.times.keys() == {'fast', turn.name}
    names.append(turn.name)
  assert names == ['a', 'b'] and turn.program is None


def test_batches_of_documents_hold_each_document_once():
  random = np.random.default_rng(0)
  rows = [random.integers(5, 99, n) for n in random.integers(1, 513, 21)]
  for batches in serving.dense_batches(rows, SHAPES, 0).values():
    found = [
      tuple(ids[mask]) for batch in batches for ids, mask in zip(batch['ids'], batch['mask']) if mask.any()
    ]
    assert sorted(found) == sorted(map(tuple, rows))


def test_documents_arrive_at_a_rate_for_a_while():
  class Instant:
    """A server that answers at once."""

    def __init__(self):
      self.seen = []

    def submit(self, row, wait):
      self.seen.append((time.perf_counter(), row))
      future = futures.Future()
      future.set_result(None)
      return future

  server = Instant()
  served = types.SimpleNamespace(server=server, rows=['a', 'b', 'c'])
  found = serving.arriving(served, rate=100.0, at_least=0.1)
  assert [row for _, row in server.seen] == ['a', 'b', 'c'] * 4  # whole rounds, for at least 10 arrivals
  starts = np.array([seconds for seconds, _ in server.seen]) - server.seen[0][0]
  assert (starts >= np.arange(12) / 100 - 2e-3).all()
  assert found['throughput'] <= 12 / 0.11 and 0 <= found['p50'] <= found['p99']


def test_arrivals_in_the_table():
  came = {'offline_throughput': 10.0, 'rates': [{'share': 0.95, 'throughput': 9.3, 'p50': 0.25, 'p99': 1.5}]}
  assert serving.arrived(came, 0.95) == ('0.93', '0.25', '1.50')
  assert serving.arrived(came, 0.7) == serving.arrived(None, 0.95) == ('–', '–', '–')


def test_the_plot_of_savings(tmp_path):
  rows = [point('a', 1, 16, 1.2), point('b', 8, 16, 1.9), point('dense_whole', 1, 16, 1.0)]
  assert pictures.cost_of('a', rows) == 'a (0.50)'
  assert pictures.cost_of('a', [*rows, point('a', 8, 16, 1.2, 0.6)]) == 'a (0.50 to 0.60)'
  pictures.savings(tmp_path / 'a.png', 'Title', rows, lambda row: f'{row["batch"]}')
  pictures.savings(tmp_path / 'none.png', 'Title', [], str)
  assert (tmp_path / 'a.png').stat().st_size > 5000 < (tmp_path / 'none.png').stat().st_size


def test_load_of_others_is_refused(monkeypatch):
  monkeypatch.setattr(measure, 'others_load', lambda: 0.5)
  with pytest.raises(SystemExit, match='0.5 cores'):
    measure.quiet()
  assert measure.quiet(allow=True) == 0.5


@pytest.mark.torch
def test_dense_forward_stands_beside_torch_with_equal_numbers(monkeypatch, tmp_path):
  pytest.importorskip('torch', reason='needs torch, the peer that is compared with')
  small = speed.dataclasses.replace(speed.CONFIGS['minilm'], width=24, depth=1, hidden=48)
  monkeypatch.setattr(dense_forward, 'MODELS', {'small': small})
  monkeypatch.setattr(dense_forward, 'SHAPES', ((2, 16),))
  out = tmp_path / 'found.json'
  command = ['dense_forward.py', '--model=small', '--repeats=1', '--allow_load', f'--out={out}']
  monkeypatch.setattr('sys.argv', command)
  dense_forward.main()
  [row] = report.read(out)['rows']
  assert row['model'] == 'small 1 x 24' and row['max_difference'] < 1e-4
  assert row['seconds'] > 0 and row['throughput_ratio'] > 0


def test_a_page_names_the_commits_of_rows_that_were_measured_before():
  given = {**report.header('python x.py'), 'commit': 'a' * 40}
  rows = [{'commit': 'a' * 40}, {'commit': 'b' * 40}, {'commit': None}]
  assert f'at commit {"a" * 12}, on' in report.origin(given)
  assert f'at commit {"a" * 12} (other rows at {"b" * 12}), on' in report.origin({**given, 'rows': rows})
