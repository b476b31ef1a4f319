"""Capacities that the examples of a batch share, where examples or words stop in numbers of their own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, model_of, ragged_batch, settings
from tokenprune_jax import schedule, stages, word_exit
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
  'exits': {**EXITS, 'layers': (1, 2, 3), 'threshold': 0.95},
}


def close(a, b, tolerance=1e-4):
  np.testing.assert_allclose(a, b, atol=tolerance)


def shares(counts):
  """Of all slots, by layer."""
  return tuple((np.maximum(counts, 1) / (len(LENGTHS) * 14)).tolist())


def sharing(spec, rows):
  """The model under `compact` whose batches of 4 share so many slots by layer."""
  fields = {'batch_capacities': ((14, shares(rows)),), 'capacity_batch': 4}
  return model_of({**spec, **fields}).clone(executor='compact').check()


@pytest.mark.parametrize('name', SPECS)
def test_what_fits_changes_nothing_and_what_does_not_is_flagged(name):
  spec = SPECS[name]
  plain, params = model_and_params(spec)
  masked = apply(plain, params, BATCH)
  rows = np.asarray(masked.trace.rows).sum(0)
  assert 0 < rows[-1] < sum(LENGTHS)  # some have left
  found = apply(sharing(spec, rows), params, BATCH)
  close(masked.logits, found.logits)
  close(masked.trace.rows, found.trace.rows)
  assert not np.asarray(found.trace.overflow).any()
  tight = apply(sharing(spec, rows - [0, 1, 1, 1]), params, BATCH)
  lost = np.asarray(tight.trace.overflow)
  assert 0 < lost.sum() < len(LENGTHS)  # who has lost a row; the others do not notice
  close(masked.logits[~lost], tight.logits[~lost])
  assert (
    np.asarray(tight.trace.rows).sum(0) <= np.maximum(rows - [0, 1, 1, 1], 1)
  ).all()  # what stops is not counted


def test_what_has_left_is_not_computed():
  plain, params = model_and_params(TOKEE)
  rows = np.asarray(apply(plain, params, BATCH).trace.rows).sum(0)
  cost, whole = (
    jax.jit(model.apply).lower({'params': params}, BATCH).cost_analysis()['flops']
    for model in (sharing(TOKEE, rows), plain)
  )
  assert cost < 0.9 * whole


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
    'batch_capacities': ((14, (room,) * 4),),
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
  close(
    np.asarray(found.logits)[stopped], first_exit[stopped]
  )  # they have the tag of the exit that they were seen at
  going = np.asarray(found.trace.rows)
  assert (going[:, 0] == LENGTHS).all() and (going.sum(0)[1:] == 20).all()


def test_examples_that_there_is_no_room_for_have_the_answer_of_their_last_exit():
  plain, params = model_and_params({**SPECS['exits'], 'threshold': 0.0})
  whole = apply(plain, params, BATCH)
  room = 16 / (len(LENGTHS) * 14)
  fields = {'threshold': 0.0, 'batch_capacities': ((14, (1.0, room, room, room)),), 'capacity_batch': 4}
  found = apply(model_of({**SPECS['exits'], **fields}).clone(executor='compact'), params, BATCH)
  doubt = np.asarray(early_exit.uncertainty(whole.exits[:, 0]))
  left = 16 - np.cumsum(np.array(LENGTHS)[np.argsort(-doubt)])
  stay = np.argsort(-doubt)[left >= 0]
  for i in range(len(LENGTHS)):
    close(found.logits[i], whole.logits[i] if i in stay else whole.exits[i, 0])
  assert 0 < len(stay) < len(LENGTHS)


def test_shared_capacities_hold_what_neighbours_by_length_need():
  spec = {**TOKEE, 'overflow_rate': 0.5, 'capacity_batch': 2}
  model, params = model_and_params(spec)
  halves = [
    {**{name: values[i : i + 2] for name, values in BATCH.items()}, 'weight': np.array(weight, np.float32)}
    for i, weight in ((0, (1, 1)), (2, (1, 0)))
  ]
  validation = stages.Validation(
    lambda batch: apply(model, params, batch), lambda: iter(halves), encoder=model.config
  )
  [short, long] = validation.calibrated(spec, lambda cost: cost.rows)['batch_capacities']
  trace = apply(model, params, BATCH).trace
  assert (short[0], long[0]) == (9, 14)
  counts = np.asarray(trace.rows)
  np.testing.assert_allclose(short[1], np.maximum((counts[2] + counts[1]) / (2 * 9), 1e-6), rtol=1e-6)
  np.testing.assert_allclose(long[1], np.maximum((counts[1] + counts[0]) / (2 * 14), 1e-6), rtol=1e-6)


def test_a_batch_has_the_room_of_its_length():
  entries = ((8, (0.25,) * 4), (16, (0.5,) * 4))
  method = make_reducer({**TOKEE, 'capacity_batch': 4, 'batch_capacities': entries})
  for length, rows in ((6, 6), (8, 8), (9, 18), (40, 80)):
    assert schedule.batch_rows(method, 1, 4, length) == rows
  assert schedule.batch_rows(method, 1, 3, 8) is None
  read = make_reducer({**TOKEE, 'capacity_batch': 4, 'batch_capacities': json.loads(json.dumps(entries))})
  assert read == method and hash(read) == hash(method)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({**TOKEE, 'capacity_batch': -1}, 'capacity_batch is -1; it is how many examples share'),
    ({**TOKEE, 'capacity_batch': 2.5}, 'capacity_batch is 2.5'),
    ({**TOKEE, 'batch_capacities': ((8, (0.5,) * 4),)}, 'batch_capacities go with capacity_batch'),
    ({**TOKEE, 'batch_capacities': (0.5, 0.5), 'capacity_batch': 2}, r'expected entries \(length, shares by layer'),
    ({**TOKEE, 'batch_capacities': ((8, (0.5,)),), 'capacity_batch': 2}, 'batch_capacities needs 4 shares'),
    ({**EXITS, 'overflow_rate': 0.1}, 'overflow_rate goes with capacity_batch'),
    ({**EXITS, 'overflow_rate': 0.1, 'capacity_batch': 4, 'fit_temperatures': True}, 'in a stage after it'),
  ],
)  # fmt: skip
def test_settings_that_are_none(spec, message):
  with pytest.raises(UserError, match=message):
    model_of(spec).check()
