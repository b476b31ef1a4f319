"""Budgets: what each method that takes one would change, and that the model then costs it."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import model_and_params, ragged_batch
from tokenprune_jax import budget, costs, specs, stages
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer

LENGTHS = np.arange(10, 42, 2)
BATCH = {**ragged_batch(tuple(LENGTHS.tolist()), 40), 'weight': np.ones(len(LENGTHS), np.float32)}
EXITS = {'name': 'early_exit', 'layers': (1, 2, 3), 'threshold': 0.0}
SPECS = {
  'topk': {'name': 'topk', 'shares': (0.9, 0.8, 0.5, 0.2)},
  'topk by ratio': {'name': 'topk', 'ratio': 0.7},
  'power': {'name': 'power', 'counts': (24, 16, 16, 5)},
  'ltp': {'name': 'ltp', 'threshold': 0.01},
  'ltp below its budget': {'name': 'ltp', 'threshold': 0.005, 'target_macs': 0.8},
  'threshold': {'name': 'threshold', 'threshold': 0.01},
  'back-tracking': {'name': 'sttabt', 'mode': 'topk', 'factor': 4},
  'exits': EXITS,
  'exits by probability': {**EXITS, 'criterion': 'max_probability', 'threshold': 1.0},
  'thresholds': {'name': 'sttabt', 'mode': 'hard', 'factor': 4},
}


def validation_of(spec):
  """(Validation of a random model over one batch, its parameters)."""
  model, params = model_and_params(spec)
  batch = {name: jnp.asarray(values) for name, values in BATCH.items()}
  forward = jax.jit(stages.forward(model))
  found = costs.Validation(
    lambda batch: forward(params, batch), lambda: [batch], lambda: params.get('reducer', {}), model.config
  )
  return found, params


@pytest.mark.parametrize('name', SPECS)
def test_a_budget_is_met(name):
  spec = SPECS[name]
  validation, params = validation_of(spec)
  for target in (0.75, 0.5):
    settled = stages.at_budget(spec, target, validation)
    assert settled['name'] == spec['name'] and settled != spec
    changed, _ = model_and_params(settled)
    changed = changed.check()
    output = changed.apply({'params': params}, {k: jnp.asarray(v) for k, v in BATCH.items()})
    reached = float(output.macs.sum() / output.dense_macs.sum())
    assert reached == pytest.approx(target, abs=0.03), settled  # 16 short texts: a token is half a percent


CHAIN = {'name': 'chain', 'reducers': (SPECS['ltp'], EXITS)}
CHANGED = {
  'ltp': {'name': 'ltp', 'threshold': 0.02, 'scale': 0.7, 'capacities': (0.5,) * 4},
  'ltp below its budget': {**SPECS['ltp below its budget'], 'floor': 0.008},
  'threshold': {'name': 'threshold', 'threshold': 0.02},
  'back-tracking': {**SPECS['back-tracking'], 'keep': 0.2},
  'thresholds': {**SPECS['thresholds'], 'shift': -0.4},
  'exits': {**EXITS, 'threshold': 0.97},
  'chain': {'name': 'chain', 'reducers': ({**SPECS['ltp'], 'scale': 0.5}, {**EXITS, 'threshold': 0.97})},
}


@pytest.mark.parametrize('name', CHANGED)
def test_controls_do_what_other_fields_do(name):
  spec, changed = {**SPECS, 'chain': CHAIN}[name], CHANGED[name]
  known, controls = specs.by_controls(changed, spec)
  assert known == spec and controls
  model, params = model_and_params(spec)
  batch = {key: jnp.asarray(values) for key, values in BATCH.items()}
  plain, other = (
    jax.jit(model_and_params(each)[0].apply)({'params': params}, batch) for each in (spec, changed)
  )
  found = jax.jit(model.apply)({'params': params}, costs.with_controls(batch, controls))
  np.testing.assert_allclose(found.logits, other.logits, atol=1e-5)
  np.testing.assert_allclose(found.macs, other.macs, rtol=1e-6)
  assert abs(float(plain.macs.sum() / other.macs.sum()) - 1) > 0.01  # the setting does something


@pytest.mark.parametrize(
  ('changed', 'spec'),
  [
    (SPECS['power'], {'name': 'power', 'counts': (24, 16, 8, 5)}),  # counts are part of the program
    ({**EXITS, 'layers': (1, 2)}, EXITS),
    (SPECS['ltp'], SPECS['threshold']),
    (CHAIN, {**CHAIN, 'reducers': (SPECS['ltp'], EXITS, {'name': 'none'})}),
    *[({'name': 'chain', 'reducers': (SPECS['ltp'], SPECS['threshold'])},) * 2],  # which read one control
  ],
)
def test_what_is_no_control_needs_its_own_program(changed, spec):
  assert specs.by_controls(changed, spec) == (changed, {})


@pytest.mark.parametrize('name', SPECS)
def test_a_cost_is_that_of_the_whole_forward_pass(name):
  validation, params = validation_of(SPECS[name])
  whole = validation.mac_ratio({})
  model, _ = model_and_params(SPECS[name])
  cost = jax.jit(lambda batch: costs.cost_of(stages.forward(model)(params, batch)))
  alone = validation._replace(cost=cost)
  assert alone.mac_ratio({}) == whole
  for column in ('keys', 'widest', 'rows'):
    found = [v.capacities(operator.attrgetter(column), 0.1) for v in (validation, alone)]
    assert found[0] == found[1] and len(found[0]) == model.config.depth


def test_what_a_plan_costs_is_found_without_the_encoder():
  model, params = model_and_params(SPECS['thresholds'])
  batch, forward = {name: jnp.asarray(values) for name, values in BATCH.items()}, stages.forward(model)
  whole = jax.jit(forward).lower(params, batch).compile().cost_analysis()['flops']
  cost = jax.jit(lambda params, batch: costs.cost_of(forward(params, batch)))
  assert cost.lower(params, batch).compile().cost_analysis()['flops'] < 0.5 * whole


def test_counts_cost_what_the_model_says():
  """The count that needs no forward pass, against the trace; evidence and head apart."""
  validation, _ = validation_of(SPECS['power'])
  np.testing.assert_array_equal(validation.lengths(), LENGTHS)
  counted = budget.of_counts(validation.encoder, LENGTHS, np.minimum(LENGTHS[:, None], (24, 16, 16, 5)))
  assert counted == pytest.approx(validation.mac_ratio({}), rel=0.03)
  assert budget.of_counts(validation.encoder, LENGTHS, np.repeat(LENGTHS[:, None], 4, 1)) == pytest.approx(1)


def test_bisection_finds_the_setting_from_either_side():
  assert budget.bisect(lambda x: 1 / (1 + x), 0.25, 0.0, 10.0) == pytest.approx(3, abs=0.05)
  assert budget.bisect(lambda x: x, 0.3, 1.0, 0.0) == pytest.approx(0.3, abs=0.002)
  jumps = budget.bisect(lambda x: 0.9 if x < 2 else 0.1, 0.5, 0.0, 10.0)
  assert jumps >= 2  # where no setting costs it, one that costs less


def test_a_setting_is_searched_only_where_the_budget_is_missed():
  asked = []

  def cost(scale):
    asked.append(scale)
    return max(1 / (1 + scale), 0.3)

  assert budget.from_zero(cost, 0.5, 1.0) == 1.0 and asked == [1.0]
  assert cost(budget.from_zero(cost, 0.4, 1.0)) == pytest.approx(0.4, abs=0.005)
  assert cost(budget.from_zero(cost, 0.9, 1.0)) == pytest.approx(0.9, abs=0.005)
  with pytest.raises(UserError, match='0.2.*at least 0.3'):
    budget.from_zero(cost, 0.2, 1.0)


@pytest.mark.parametrize(
  ('spec', 'target', 'words'),
  [
    (SPECS['topk'], 0.0, 'the budget is 0.0'),
    (SPECS['topk'], 1.5, 'the budget is 1.5'),
    (SPECS['topk'], 0.05, 'the budget is 0.05.*one token left after the first layer'),
    (SPECS['power'], 0.05, 'the budget is 0.05.*Ask for more'),
    (SPECS['ltp'], 0.1, 'the budget is 0.1.*at least'),
    (SPECS['thresholds'], 0.05, 'the budget is 0.05.*ApproxNet'),
    ({'name': 'topk', 'leavers': 'frozen', 'ratio': 0.7}, 0.5, "leavers='gone'"),
    ({'name': 'none'}, 0.5, 'none cannot be set by a budget'),
    (EXITS, 0.2, 'the budget is 0.2.*all leave at the first exit'),
  ],
)
def test_a_budget_that_nothing_meets_is_refused(spec, target, words):
  with pytest.raises(UserError, match=words):
    stages.at_budget(spec, target, validation_of(spec)[0])


def test_the_last_member_of_a_chain_that_can_be_is_set():
  spec = {'name': 'chain', 'reducers': (SPECS['ltp'], EXITS, {'name': 'none'})}
  settled = stages.at_budget(spec, 0.6, validation_of(spec)[0])
  assert settled['reducers'][0] == SPECS['ltp'] and settled['reducers'][1]['threshold'] > 0
  make_reducer(settled)
