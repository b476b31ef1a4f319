"""Methods of a chain that meet: what one takes out the others leave out, whoever runs, and all of it is counted."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch, requests
from tokenprune_jax import costs, serve, stages
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducer import Half

LENGTHS = (14, 9, 5, 2, 1)
BATCH = ragged_batch(LENGTHS, 14)
HALF = {'name': 'topk', 'shares': (0.5, 0.5, 0.5, 0.5)}
RANKED = {'name': 'fuzzy', 'ratio': 0.9, 'rule': 'rank'}
PLANNED = {'name': 'sttabt', 'mode': 'topk', 'keep': 0.8}
FEW = {**PLANNED, 'keep': 0.15}  # so that there is something to gather
AT_ONCE = {'name': 'early_exit', 'layers': (1,), 'threshold': 1.0}
COMBINED = {'name': 'combine', 'slots': 3, 'layer': 3}
HEADS = {'name': 'heads', 'shares': (0.5, 0.5, 0.25, 0.25)}


def chain(*members):
  return {'name': 'chain', 'reducers': members}


def student(*layers):
  return {'name': 'student', 'layers': layers}


CHAINS = {
  'counts of a stream that another has shortened': (chain(HALF, RANKED), 'mean'),
  'in the other order': (chain(RANKED, HALF), 'mean'),
  'a plan and thresholds': (chain(PLANNED, {'name': 'threshold', 'threshold': 0.012}), 'cls'),
  'a plan and exits': (chain(PLANNED, AT_ONCE), 'cls'),
  'a plan and keys of each head': (chain(FEW, RANKED), 'cls'),
  'a plan and what stays in part': (chain(FEW, {**HALF, 'leavers': 'frozen'}), 'cls'),
  'a plan and combining': (chain(FEW, COMBINED), 'cls'),
  'combining and a plan': (chain(COMBINED, FEW), 'cls'),
  'exits and combining': (chain(AT_ONCE, COMBINED), 'mean'),
  'counts where a layer is left out': (chain(student(1, 3, 4), {**RANKED, 'ratio': 0.7}), 'mean'),
  'learned counts where layers are left out': (
    chain(student(2, 4), {'name': 'power', 'counts': (6, 6, 2, 2)}),
    'mean',
  ),
}


@pytest.mark.parametrize('name', CHAINS)
def test_executors_agree(name):
  spec, readout = CHAINS[name]
  model, params = model_and_params(spec, readout=readout)
  masked = apply(model, params, BATCH)
  compact = apply(model.clone(executor='compact'), params, BATCH)
  assert not np.asarray(compact.trace.overflow).any()
  np.testing.assert_allclose(masked.logits, compact.logits, atol=1e-4)
  np.testing.assert_allclose(masked.trace.keys, compact.trace.keys, atol=1e-5)
  with serve.Server(model, params, ladder=serve.Ladder((16,), batch_tokens=96)) as server:
    answers = list(server.map(requests(BATCH)))
  np.testing.assert_allclose([answer.logits for answer in answers], masked.logits, atol=1e-4)
  np.testing.assert_allclose([answer.macs for answer in answers], masked.macs, rtol=1e-5)


def test_who_has_left_does_not_come_back():
  for name in ('a plan and exits', 'exits and combining'):
    spec, readout = CHAINS[name]
    trace = apply(*model_and_params(spec, readout=readout), BATCH).trace
    for column in (trace.keys, trace.queries, trace.rows):
      assert (np.asarray(column)[:, 1:] == 0).all(), name
  spec, readout = CHAINS['learned counts where layers are left out']
  rows = np.asarray(apply(*model_and_params(spec, readout=readout), BATCH).trace.rows)
  np.testing.assert_array_equal(rows[0], (0, 6, 0, 2))


def test_combined_examples_leave_a_batch_that_shares_capacities():
  shared = {
    **AT_ONCE,
    'capacity_batch': 4,
    'batch_capacities': ((4, 14, (1.0,) + (0.5,) * 3, (1.0,) + (0.5,) * 3),),
  }
  model, params = model_and_params(chain(shared, COMBINED), executor='compact')
  found = apply(model, params, BATCH)
  expected = apply(*model_and_params(chain(AT_ONCE, COMBINED)), BATCH)
  np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_protected_slots_are_the_last_to_leave():
  spec = {'name': 'threshold', 'threshold': 0.001, 'capacities': (1.0, 0.1, 0.1, 0.1)}
  trace = apply(*model_and_params(spec, readout='cls', executor='compact'), BATCH).trace
  assert np.asarray(trace.overflow)[0]  # there is room for two
  assert (np.asarray(trace.kept)[:, 2:, 0] == 1).all()


def test_heads_cost_the_same_wherever_they_stand_in_a_chain():
  tokens = {'name': 'topk', 'shares': (0.6, 0.4, 0.3, 0.2), 'score': 'cumulative'}
  before, after = (
    apply(*model_and_params(chain(*members)), BATCH) for members in ((tokens, HEADS), (HEADS, tokens))
  )
  np.testing.assert_array_equal(before.logits, after.logits)
  np.testing.assert_array_equal(before.macs, after.macs)


@pytest.mark.parametrize('others', [(HEADS,), (student(1, 3),)])
def test_a_budget_is_that_of_the_whole_chain(others):
  lengths = np.arange(20, 40, 2)
  batch = {**ragged_batch(tuple(lengths.tolist()), 40), 'weight': np.ones(len(lengths), np.float32)}
  batch = {name: jnp.asarray(values) for name, values in batch.items()}
  spec = chain({'name': 'topk', 'shares': (0.9, 0.7, 0.5, 0.3)}, *others)
  model, params = model_and_params(spec)
  forward = stages.forward(model)
  validation = costs.Validation(lambda b: forward(params, b), lambda: [batch], encoder=model.config)
  settled = stages.at_budget(spec, 0.33, validation)
  output = apply(model_and_params(settled)[0], params, batch)
  assert float(output.macs.sum() / output.dense_macs.sum()) == pytest.approx(0.33, abs=0.03), settled


def test_a_layer_that_is_left_out_has_the_capacity_of_the_next():
  model, params = model_and_params(chain(student(1, 3, 4), {**HALF, 'shares': (0.8, 0.8, 0.5, 0.3)}))
  batch = {**BATCH, 'weight': np.ones(5, np.float32)}
  validation = costs.Validation(lambda b: apply(model, params, b), lambda: [batch], encoder=model.config)
  found = validation.capacities(lambda cost: cost.keys, 0.0)
  np.testing.assert_allclose(found, np.array((14, 11, 11, 7)) / 14)


def test_exits_behind_layers_that_do_not_run_are_refused():
  spec = chain({'name': 'early_exit', 'layers': (1, 2, 3)}, {**COMBINED, 'layer': 2})
  with pytest.raises(UserError, match=r'exits behind the layers \[2\].*there run 1, 3, 4'):
    make_reducer(spec).check(4, 4)
  with pytest.raises(UserError, match='different layers in their order'):
    make_reducer({'name': 'early_exit', 'layers': (3, 1)}).check(4, 4)


def test_what_a_batch_shares_is_refused_beside_slots_that_are_seen_alone():
  with pytest.raises(UserError, match=r'reducers\[1\].capacity_batch .* set it to 0'):
    make_reducer(chain(PLANNED, {**AT_ONCE, 'capacity_batch': 8})).check(4, 4)


def test_served_examples_are_regrouped_once_a_layer():
  """What attention prunes waits where the same layer's exit cuts; elsewhere it does not."""

  def cuts(*reducers):
    return make_reducer({'name': 'chain', 'reducers': reducers}).decides(4)

  ltp, exits = {'name': 'ltp'}, {'name': 'early_exit', 'layers': (1, 3)}
  assert cuts(ltp, exits) == (Half(1, False), Half(2, True), Half(3, False), Half(4, True))
  # Of three layers the last one's feed-forward has no cut behind it.
  assert Half(3, True) in cuts(ltp, exits, {'name': 'student', 'layers': (1, 2, 3)})
  # A feed-forward that gathers rows needs their count.
  plan = {'name': 'sttabt', 'mode': 'topk'}
  assert {Half(2, True), Half(2, False)} <= set(cuts(ltp, plan))
