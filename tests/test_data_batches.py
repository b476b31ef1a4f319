"""Batch plans: each example once an epoch, few shapes, equal for any number of processes, after any stop."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_jax import data
from tokenprune_jax.data.tokenise import Encoded
from tokenprune_jax.errors import UserError

BUCKETS = (8, 16, 24)


def make_split(lengths):
  """Example i holds the tokens 10 + i, with types 1 after the first token and label i % 3."""
  starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  tokens = np.repeat(10 + np.arange(len(lengths)), lengths).astype(np.int32)
  types = np.ones(len(tokens), np.int8)
  types[starts[:-1]] = 0
  encoded = Encoded(tokens, types, starts, np.zeros(len(lengths), np.int32))
  return data.Split(encoded, np.arange(len(lengths)) % 3, lambda i: (f'text {i}', ''))


def make_plan(lengths, batch_size=4, seed=0, shuffle=True, process=(0, 1), buckets=BUCKETS):
  return data.batches(
    make_split(lengths), batch_size=batch_size, buckets=buckets, seed=seed, epoch_shuffle=shuffle,
    process_index=process[0], process_count=process[1], pad_id=7,
  )  # fmt: skip


def lengths_of(count, seed=0):
  return np.random.default_rng(seed).integers(1, 25, count)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def assert_equal(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@settings(deadline=None, max_examples=60)
@given(
  lengths=st.lists(st.integers(1, 24), min_size=1, max_size=60),
  batch_size=st.integers(1, 9),
  epoch=st.integers(0, 3),
  shuffle=st.booleans(),
)
def test_an_epoch_holds_each_example_once_in_the_fewest_steps(lengths, batch_size, epoch, shuffle):
  plan = make_plan(lengths, batch_size, shuffle=shuffle)
  steps = math.ceil(len(lengths) / batch_size)
  assert plan.steps_per_epoch == steps
  rows, widths = plan.epoch(epoch).rows, plan.epoch(epoch).widths
  assert rows.shape == (steps, batch_size)
  assert sorted(rows[rows >= 0].tolist()) == list(range(len(lengths)))
  assert ((rows < 0).any(axis=1)).sum() <= 1  # one batch at most is not full
  assert set(widths.tolist()) <= set(BUCKETS)
  longest = np.where(rows >= 0, np.array(lengths)[rows], 0).max(axis=1)
  assert (longest <= widths).all()


def test_a_batch_is_laid_out_as_documented():
  plan = make_plan([3, 5, 1], batch_size=4, shuffle=False)
  (batch,) = plan.iterator()
  assert {name: array.dtype.name for name, array in batch.items()} == {
    'ids': 'int32', 'mask': 'bool', 'types': 'int32', 'label': 'int32', 'weight': 'float32', 'index': 'int32',
  }  # fmt: skip
  assert batch['ids'].shape == (4, 8)
  np.testing.assert_array_equal(batch['index'], [0, 1, 2, -1])
  np.testing.assert_array_equal(batch['weight'], [1, 1, 1, 0])
  np.testing.assert_array_equal(batch['label'], [0, 1, 2, 0])
  np.testing.assert_array_equal(batch['mask'].sum(1), [3, 5, 1, 0])
  np.testing.assert_array_equal(batch['ids'][1], [11] * 5 + [7] * 3)
  np.testing.assert_array_equal(batch['types'][1], [0, 1, 1, 1, 1, 0, 0, 0])
  assert (batch['ids'][3] == 7).all()


def test_leftovers_move_to_the_next_bucket_and_the_last_batch_is_no_longer_than_it_must_be():
  plan = make_plan([4] * 5 + [12] * 3 + [20] * 4, batch_size=4, shuffle=False)
  np.testing.assert_array_equal(plan.epoch(0).widths, [8, 16, 24])
  np.testing.assert_array_equal(plan.epoch(0).rows[1], [4, 5, 6, 7])  # one of 4 tokens among those of 12
  plan = make_plan([4] * 5 + [20] * 4, batch_size=4, shuffle=False)
  np.testing.assert_array_equal(plan.epoch(0).widths, [8, 24, 24])
  plan = make_plan([20] * 4 + [4], batch_size=4, shuffle=False)
  np.testing.assert_array_equal(plan.epoch(0).rows[-1], [3, -1, -1, -1])
  assert make_plan([4] * 6, batch_size=4, buckets=(8, 512)).epoch(0).widths.tolist() == [8, 8]


@pytest.mark.parametrize('shuffle', [True, False])
def test_rows_of_two_processes_make_the_batch_of_one(shuffle):
  lengths = lengths_of(45)
  whole = make_plan(lengths, 6, shuffle=shuffle).iterator()
  parts = [make_plan(lengths, 6, shuffle=shuffle, process=(i, 2)).iterator() for i in range(2)]
  for _ in range(8):  # 45 examples in batches of 6
    batch, *halves = next(whole), *map(next, parts)
    joined = {name: np.concatenate([half[name] for half in halves]) for name in batch}
    assert_equal([batch], [joined])


def test_epochs_are_shuffled_by_seed_and_epoch_alone():
  lengths = lengths_of(50)
  epochs = [make_plan(lengths, seed=3).epoch(e).rows for e in range(3)]
  np.testing.assert_array_equal(epochs[1], make_plan(lengths, seed=3).epoch(1).rows)
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(epochs[1], epochs[2])
  assert not np.array_equal(epochs[0], make_plan(lengths, seed=4).epoch(0).rows)
  assert (np.diff(make_plan(lengths, seed=3).epoch(0).widths) < 0).any()  # batch order is shuffled too
  still = make_plan(lengths, seed=3, shuffle=False)
  np.testing.assert_array_equal(still.epoch(0).rows, still.epoch(1).rows)
  assert (np.diff(still.epoch(0).widths) >= 0).all()


@pytest.mark.parametrize('stop', [0, 3, 13, 29])  # 13 steps an epoch
def test_an_iterator_goes_on_from_its_saved_state(stop):
  lengths = lengths_of(50)
  iterator = make_plan(lengths).iterator()
  take(iterator, stop)
  state = iterator.get_state()
  expected = take(iterator, 6)
  resumed = make_plan(lengths).iterator()
  resumed.set_state(state)
  assert_equal(take(resumed, 6), expected)
  started = make_plan(lengths).iterator(start_step=stop)
  assert started.get_state() == state
  assert_equal(take(started, 6), expected)
  other = make_plan(lengths).iterator(start_step=5)  # states count from step 0, wherever an iterator began
  other.set_state(state)
  assert_equal(take(other, 1), expected[:1])


def test_training_never_ends_and_evaluation_ends_after_one_pass():
  lengths = lengths_of(10)
  seen = np.concatenate([batch['index'] for batch in make_plan(lengths, shuffle=False).iterator()])
  assert sorted(seen[seen >= 0].tolist()) == list(range(10))
  counts = np.zeros(10, int)
  for batch in take(make_plan(lengths).iterator(), 30):  # 10 epochs of 3 steps
    np.add.at(counts, batch['index'][batch['index'] >= 0], 1)
  np.testing.assert_array_equal(counts, 10)


def test_padding_share_counts_the_slots_without_a_token():
  plan = make_plan(lengths_of(50), batch_size=4)
  for epoch in (0, 1):
    batches = [plan.batch(step) for step in range(epoch * 13, (epoch + 1) * 13)]
    slots = sum(batch['mask'].size for batch in batches)
    tokens = sum(int(batch['mask'].sum()) for batch in batches)
    assert plan.padding_share(epoch) == pytest.approx(1 - tokens / slots)
  assert plan.padding_share(0) < make_plan(lengths_of(50), batch_size=4, buckets=(24,)).padding_share(0)


def test_wrong_plans_are_refused():
  with pytest.raises(UserError, match=r'data\.buckets=\(8, 16\) .* 20 tokens'):
    make_plan([4, 20], buckets=(8, 16))
  with pytest.raises(UserError, match='no example'):
    make_plan([])
  with pytest.raises(UserError, match='batch of 5 .* 2 processes'):
    make_plan([4, 20], batch_size=5, process=(0, 2))
