"""Time taken in turns: what is timed, in which order, and per example."""

import json

import pytest

from tests.test_evaluate import CHAIN, COUNT, make_model
from tokenprune_jax import data, timing


def batches_of(split, **fields):
  plan = data.batches(
    split, **{'batch_size': 8, 'buckets': (16, 32), 'seed': 0, 'epoch_shuffle': False, 'pad_id': 0} | fields
  )
  return list(plan.iterator())


def test_two_models_and_a_server_beside_dense(monkeypatch):
  dense, params, split = make_model({'name': 'none'})
  pruned = make_model(CHAIN)
  clock = iter(range(1000))  # every look at the clock is one second later
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: float(next(clock)))
  exits = make_model({'name': 'early_exit', 'layers': (2,)})
  models = {'dense': (dense, params), 'pfc': pruned[:2], 'served': exits[:2]}
  found = timing.beside_dense(models, batches_of(split), served=('served',))
  assert found['examples'] == COUNT and found['repeats'] == 3 and found['batch_size'] == 8
  assert set(found['lengths']) <= {16, 32} and found['process_peak_bytes'] > 1e7 and found['device']
  for name, row in found['models'].items():
    assert row['seconds_per_example'] == pytest.approx(1 / COUNT)  # fillers are no examples
    assert row['quartiles'] == pytest.approx([1 / COUNT] * 2) and row['time_ratio'] == pytest.approx(1)
    assert row['executor'] == ('serve' if name == 'served' else 'mask') and row['dtype'] == 'float32'
    assert (row['compiled_peak_bytes'] is None) == (name == 'served')
  json.dumps(found)


def test_it_goes_in_turns_and_times_the_second_of_a_pair(monkeypatch):
  """A A B B A A B B: a machine that slows down meanwhile slows both, and nobody pays for the other's memory."""
  clock, order = [0.0], []
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: clock[0])

  def program(name, costs):
    def run():
      order.append(name)
      clock[0] += next(costs)

    return run

  programs = {'a': program('a', iter([9, 1, 9, 2, 9, 6])), 'b': program('b', iter([9, 5, 9, 5, 9, 5]))}
  found = timing.in_turns(programs, 3)
  assert order == ['a', 'a', 'b', 'b'] * 3
  assert found == {'a': {'seconds': 2, 'quartiles': [1.5, 4]}, 'b': {'seconds': 5, 'quartiles': [5, 5]}}


def test_without_dense_there_is_no_ratio():
  dense, params, split = make_model({'name': 'none'})
  found = timing.beside_dense({'a': (dense, params)}, batches_of(split)[:1], repeats=1)
  assert found['models']['a']['time_ratio'] is None and found['models']['a']['seconds_per_example'] > 0
