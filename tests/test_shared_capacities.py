"""Capacities that the examples of a batch share, where examples or words stop in numbers of their own."""

import dataclasses
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, model_and_params, model_of, ragged_batch, settings
from tokenprune_jax import costs, schedule, specs, word_exit
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducers import early_exit

LENGTHS = (14, 9, 5, 7)
BATCH = ragged_batch(LENGTHS, 14)
FIRST = np.asarray(word_exit.first_pieces(jnp.asarray(BATCH['words'])))
TOKEE, EXITS = settings('tokee', 'TINY'), settings('early_exit', 'TINY')
SPECS = {
  'words': TOKEE,
  'sentences': {**TOKEE, 'level': 'sentence', 'threshold': 0.96},
  'exits': {**EXITS, 'layers': (1, 2, 3), 'threshold': 0.872},
  'pruned exits': {
    'name': 'chain',
    'reducers': (
      settings('topk', 'TINY'),
      {**EXITS, 'layers': (1, 2, 3), 'threshold': 0.95, 'head': 'mixed'},
    ),
  },
}


def close(a, b, tolerance=1e-4):
  np.testing.assert_allclose(a, b, atol=tolerance)


def shares(counts):
  """Of all slots, by layer."""
  return tuple((np.maximum(counts, 1) / (len(LENGTHS) * 14)).tolist())


# A bias for all, or where slots have moved for each.
RELATIVE = dataclasses.replace(TINY_CONFIG, relative_buckets=32)
CONFIGS = {'exits': RELATIVE, 'pruned exits': RELATIVE}


def sharing(spec, rows, examples=(4, 4, 4, 4), config=TINY_CONFIG):
  """The model under `compact` whose batches of 4 share so many slots, and examples, by layer."""
  fields = {'batch_capacities': ((4, 14, shares(rows), tuple(n / 4 for n in examples)),), 'capacity_batch': 4}
  spec = specs.with_handed_on(spec, dict.fromkeys(('tokee', 'early_exit'), fields))
  return model_of(spec, config).clone(executor='compact').check()


@pytest.mark.parametrize('name', SPECS)
def test_what_fits_changes_nothing_and_what_does_not_is_flagged(name):
  spec, config = SPECS[name], CONFIGS.get(name, TINY_CONFIG)
  plain, params = model_and_params(spec, config)
  masked = apply(plain, params, BATCH)
  rows = np.asarray(masked.trace.queries)
  rows, examples = rows.sum(0), np.maximum((rows > 0).sum(0), 1)
  assert 0 < rows[-1] < sum(LENGTHS) and examples[-1] < 4  # some have left
  found = apply(sharing(spec, rows, examples, config), params, BATCH)
  close(masked.logits, found.logits)
  for one, other in zip(jax.tree.leaves(masked.trace), jax.tree.leaves(found.trace)):
    np.testing.assert_allclose(one, other, 1e-5, 1e-5)
  tight = apply(sharing(spec, rows - [0, 1, 1, 1], config=config), params, BATCH)
  lost = np.asarray(tight.trace.overflow)
  assert 0 < lost.sum() < len(LENGTHS)  # who has lost a row; the others do not notice
  close(masked.logits[~lost], tight.logits[~lost])
  assert (
    np.asarray(tight.trace.rows).sum(0) <= np.maximum(rows - [0, 1, 1, 1], 1)
  ).all()  # what stops is not counted


def test_what_has_left_is_not_computed():
  plain, params = model_and_params(TOKEE)
  rows = np.asarray(apply(plain, params, BATCH).trace.rows).sum(0)
  models = plain, sharing(TOKEE, rows), sharing(TOKEE, rows, (4, 3, 2, 1))
  whole, cost, least = (
    jax.jit(model.apply).lower({'params': params}, BATCH).cost_analysis()['flops'] for model in models
  )
  assert cost < 0.9 * whole and least < 0.9 * cost  # of who leaves altogether no keys are computed either


def test_a_smaller_batch_is_computed_whole():
  plain, params = model_and_params(TOKEE)
  few = {name: values[:3] for name, values in BATCH.items()}
  found = apply(sharing(TOKEE, np.ones(4)), params, few)
  close(apply(plain, params, few).logits, found.logits)
  assert not np.asarray(found.trace.overflow).any()


def test_the_surest_words_halt_where_there_is_no_room():
  plain, params = model_and_params({**TOKEE, 'threshold': 0.0})  # nothing halts by itself
  whole = apply(plain, params, BATCH)
  room = 20 / (len(LENGTHS) * 14)
  spec = {
    **TOKEE,
    'threshold': 0.0,
    'batch_capacities': ((4, 14, (room,) * 4, (1.0,) * 4),),
    'capacity_batch': 4,
  }
  found = apply(model_of(spec).clone(executor='compact'), params, BATCH)
  doubt = np.asarray(early_exit.uncertainty(whole.exits[:, 0]))  # of words
  words, there = np.maximum(BATCH['words'], 0), BATCH['mask'] & (BATCH['words'] >= 0)
  pieces = np.where(there, np.take_along_axis(doubt, words, axis=1), np.inf)
  stopped = np.zeros(pieces.size, bool)
  stopped[np.argsort(pieces, axis=None, kind='stable')[: sum(LENGTHS) - 20]] = True
  stopped = stopped.reshape(pieces.shape) & (FIRST > 0)
  assert stopped.sum() > 5
  first_exit = np.take_along_axis(np.asarray(whole.exits[:, 0]), words[..., None], axis=1)
  # They have the tag of the exit that they were seen at.
  close(np.asarray(found.logits)[stopped], first_exit[stopped])
  going = np.asarray(found.trace.rows)
  assert (going[:, 0] == LENGTHS).all() and (going.sum(0)[1:] == 20).all()


@pytest.mark.parametrize(('rows', 'examples'), [(16, 4), (56, 2)])
def test_examples_that_there_is_no_room_for_have_the_answer_of_their_last_exit(rows, examples):
  spec = {**SPECS['exits'], 'threshold': 0.0}  # nobody exits by itself
  plain, params = model_and_params(spec)
  whole = apply(plain, params, BATCH)
  found = apply(sharing(spec, np.full(4, rows), (4, *[examples] * 3)), params, BATCH)
  doubt = np.asarray(early_exit.uncertainty(whole.exits[:, 0]))
  left = rows - np.cumsum(np.array(LENGTHS)[np.argsort(-doubt)])
  stay = np.argsort(-doubt)[left >= 0][:examples]
  for i in range(len(LENGTHS)):
    close(found.logits[i], whole.logits[i] if i in stay else whole.exits[i, 0])
  assert 0 < len(stay) < len(LENGTHS)
  np.testing.assert_array_equal(found.trace.overflow, ~np.isin(np.arange(4), stay))


def test_tags_of_a_sentence_that_there_is_no_room_for_are_those_of_its_last_exit():
  spec = {**TOKEE, 'threshold': 0.0}
  plain, params = model_and_params(spec)
  whole = apply(plain, params, BATCH)
  found = apply(sharing(spec, np.full(4, 56), (4, 3, 3, 3)), params, BATCH)
  [out] = np.flatnonzero(found.trace.overflow)
  tagged = np.asarray(whole.exits)[:, 0]  # of words, by the first exit
  for i in range(len(LENGTHS)):
    first = np.flatnonzero(FIRST[i])
    at_exit = tagged[i, BATCH['words'][i, first]]
    close(np.asarray(found.logits)[i, first], at_exit if i == out else np.asarray(whole.logits)[i, first])


def test_shared_capacities_hold_what_neighbours_by_length_need(monkeypatch):
  spec = {**TOKEE, 'overflow_rate': 0.5, 'capacity_batch': 2}
  model, params = model_and_params(spec)
  halves = [
    {**{name: values[i : i + 2] for name, values in BATCH.items()}, 'weight': np.array(weight, np.float32)}
    for i, weight in ((0, (1, 1)), (2, (1, 0)))
  ]
  validation = costs.Validation(
    lambda batch: apply(model, params, batch), lambda: iter(halves), encoder=model.config
  )
  queries = operator.attrgetter('queries')
  [whole] = validation.calibrated(spec, queries)['batch_capacities']
  assert whole[:2] == (2, 14)  # three examples are too few for spans of lengths
  monkeypatch.setattr(costs, 'SPAN_BATCHES', 0.75)
  short, long, *_ = validation.calibrated(spec, queries)['batch_capacities']
  trace = apply(model, params, BATCH).trace
  assert (short[:2], long[:2]) == ((2, 9), (2, 14))
  counts = np.asarray(trace.rows)
  np.testing.assert_allclose(short[2], np.maximum((counts[2] + counts[1]) / (2 * 9), 1e-6), rtol=1e-6)
  np.testing.assert_allclose(long[2], np.maximum((counts[1] + counts[0]) / (2 * 14), 1e-6), rtol=1e-6)
  np.testing.assert_allclose(long[3], np.maximum((counts[:2] > 0).mean(0), 1e-6), rtol=1e-6)


def test_larger_batches_need_a_smaller_share():
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 2, (200, 1)) * 10.0  # half of them have left
  cost = costs.Cost(*[rows] * 6)
  batch = {'ids': np.zeros((200, 10)), 'mask': np.ones((200, 10), bool), 'weight': np.ones(200)}
  validation = costs.Validation(None, lambda: [batch], cost=lambda _: cost)
  entries = validation.batch_capacities(4, 0.1)
  assert [entry[0] for entry in entries] == [4, 8, 16]  # of 32 there are not eight
  for size, length, (slots,), (examples,) in entries:
    parts = [rows[i : i + size].sum() for i in range(200 - size + 1)]
    assert length == 10 and slots == examples == pytest.approx(
      np.quantile(parts, 0.9, method='higher') / (10 * size)
    )
  assert entries[0][2][0] >= entries[1][2][0] > entries[2][2][0] > 0.5


def test_a_batch_has_the_room_of_its_length_and_size():
  entries = (
    (4, 8, (0.25,) * 4, (0.5,) * 4),
    (4, 16, (0.5,) * 4, (0.7,) * 4),
    (8, 16, (0.3,) * 4, (0.4,) * 4),
  )
  method = make_reducer({**TOKEE, 'capacity_batch': 4, 'batch_capacities': entries})
  for batch, length, rows, examples in (
    (4, 6, 6, 2), (4, 8, 8, 2), (4, 9, 18, 3), (4, 40, 80, 3), (7, 6, 11, 4), (8, 6, 15, 4), (20, 20, 120, 8),
  ):  # fmt: skip
    assert schedule.shared(method, 1, batch, length) == {'batch_rows': rows, 'examples': examples}
  assert schedule.shared(method, 1, 3, 8) == {}
  read = make_reducer({**TOKEE, 'capacity_batch': 4, 'batch_capacities': json.loads(json.dumps(entries))})
  assert read == method and hash(read) == hash(method)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({**TOKEE, 'capacity_batch': -1}, 'capacity_batch is -1; it is how many examples share'),
    ({**TOKEE, 'capacity_batch': 2.5}, 'capacity_batch is 2.5'),
    ({**TOKEE, 'batch_capacities': ((2, 8, (0.5,) * 4, (1.0,) * 4),)}, 'batch_capacities go with capacity_batch'),
    ({**TOKEE, 'batch_capacities': ((8, (0.5,) * 4),), 'capacity_batch': 2}, r'expected entries \(examples of a'),
    ({**TOKEE, 'batch_capacities': ((2, 8, (0.5,) * 4, (1.0,)),), 'capacity_batch': 2}, 'batch_capacities needs 4 shares'),
    ({**EXITS, 'overflow_rate': 0.1}, 'overflow_rate goes with capacity_batch'),
    ({**EXITS, 'overflow_rate': 0.1, 'capacity_batch': 4, 'fit_temperatures': True}, 'in a stage after it'),
  ],
)  # fmt: skip
def test_settings_that_are_none(spec, message):
  with pytest.raises(UserError, match=message):
    model_of(spec).check()
