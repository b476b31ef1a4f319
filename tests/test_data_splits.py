"""Which documents are in which split: no text twice, classes in their shares, whatever the order of rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_jax.data import splits
from tokenprune_jax.errors import UserError

NAMES = ('train', 'valid', 'test')


def key(number):
  return splits.fingerprint(f'text {number}')


def test_texts_that_differ_in_white_space_or_case_count_as_equal():
  assert splits.fingerprint(' A  b\nC ', 'D') == splits.fingerprint('a B c', ' d')
  assert splits.fingerprint('ab', 'c') != splits.fingerprint('a', 'bc')
  assert splits.fingerprint('a b', '') != splits.fingerprint('a', 'b')


def test_of_equal_texts_one_stays_and_rather_in_test_than_in_train():
  kept = splits.drop_duplicates(
    {
      'train': [key(0), key(1), key(1), key(2), key(3)],
      'valid': [key(2), key(4)],
      'test': [key(3), key(5), key(5)],
    }
  )
  assert {split: part.tolist() for split, part in kept.items()} == {
    'test': [0, 1],
    'valid': [0, 1],
    'train': [0, 1],
  }


@settings(deadline=None, max_examples=100)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=8), total=st.integers(0, 200))
def test_places_are_shared_out_in_proportion(counts, total):
  places = splits.allocate(np.array(counts), total)
  assert places.sum() == min(total, sum(counts))
  assert (places >= 0).all() and (places <= counts).all()
  exact = np.array(counts) * places.sum() / max(sum(counts), 1)
  assert np.abs(places - exact).max() < 1


@settings(deadline=None, max_examples=40)
@given(
  labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), total=st.integers(1, 60), order=st.randoms()
)
def test_a_stratified_choice_depends_on_the_documents_and_the_salt_alone(labels, total, order):
  labels = np.array(labels)
  keys = [key(i) for i in range(len(labels))]
  chosen = splits.stratified(keys, labels, total, salt='a')
  assert len(chosen) == min(total, len(labels)) and len(set(chosen.tolist())) == len(chosen)
  shares = np.bincount(labels[chosen], minlength=4) - np.bincount(labels, minlength=4) * len(chosen) / len(
    labels
  )
  assert np.abs(shares).max() < 1
  mixed = list(range(len(labels)))
  order.shuffle(mixed)
  again = splits.stratified([keys[i] for i in mixed], labels[mixed], total, salt='a')
  # No tie between classes in what is left over.
  if len(set(np.bincount(labels[chosen]))) == len(np.unique(labels)):
    assert {mixed[i] for i in again} == set(chosen.tolist())


def test_a_larger_limit_holds_the_smaller_one_and_a_salt_another_choice():
  labels = np.arange(40) % 4
  keys = [key(i) for i in range(40)]
  few, many, others = (
    set(splits.stratified(keys, labels, total, salt=salt).tolist())
    for total, salt in ((8, 'a'), (20, 'a'), (8, 'b'))
  )
  assert few < many and few != others


def test_missing_splits_come_from_train_and_no_class_loses_its_last_document():
  labels = np.array([0] * 80 + [1] * 19 + [2])
  keys = [key(i) for i in range(100)]
  parts = splits.fill_in({'train': keys}, {'train': labels})
  assert {name: len(indices) for name, (_, indices) in parts.items()} == {
    'train': 60,
    'valid': 20,
    'test': 20,
  }
  assert sorted(np.concatenate([indices for _, indices in parts.values()]).tolist()) == list(range(100))
  assert np.bincount(labels[parts['test'][1]], minlength=3).tolist() == [16, 4, 0]
  assert 99 in parts['train'][1]
  given_test = {'train': keys, 'test': [key(1000)]}
  parts = splits.fill_in(given_test, {'train': labels, 'test': np.array([0])})
  assert [(parts[name][0], len(parts[name][1])) for name in NAMES] == [
    ('train', 90),
    ('train', 10),
    ('test', 1),
  ]
  with pytest.raises(UserError, match=r'valid split is empty: 3 different .* data\.valid'):
    splits.fill_in({'train': keys[:3], 'test': keys[3:]}, {'train': labels[:3], 'test': labels[3:]})
