import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, model_and_params, ragged_batch
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducers import combine

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'groupvit_assign.npz'
BATCH = ragged_batch((9, 6, 1), 9)


def linear(golden, name, x, bias=True):
  return x @ golden[f'w.{name}.weight'].T + (golden[f'w.{name}.bias'] if bias else 0)


def assign_as_in_groupvit(golden, query):
  """The ancestor's step, with its biases, from our pure functions: (out, assignment)."""
  key = jnp.asarray(golden['key'])
  logits = (
    jnp.einsum('bmd,bnd->bmn', linear(golden, 'q_proj', query), linear(golden, 'k_proj', key))
    * key.shape[-1] ** -0.5
  )
  assignment = combine.hard_assignment(logits, jnp.ones(key.shape[:2]))
  mixed = combine.assigned_mean(assignment, linear(golden, 'v_proj', key))
  return linear(golden, 'proj', mixed), assignment


def test_agrees_with_the_module_it_descends_from():
  golden = dict(np.load(GOLDEN))
  query = jnp.asarray(golden['query'])
  out, assignment = assign_as_in_groupvit(golden, query)
  np.testing.assert_allclose(assignment, golden['eps1e6_hard'][:, 0], atol=1e-5)
  np.testing.assert_allclose(out, golden['eps1e6_out'], atol=1e-4)
  probe = jnp.linspace(-1, 1, out.shape[-1])
  gradient = jax.grad(lambda q: (assign_as_in_groupvit(golden, q)[0] * probe).sum())(query)
  np.testing.assert_allclose(gradient, golden['eps1e6_grad_query'], atol=1e-4)


def test_ties_go_to_the_first_slot_and_an_empty_slot_stays_finite():
  golden = dict(np.load(GOLDEN))
  _, assignment = assign_as_in_groupvit(golden, jnp.asarray(golden['tie_query']))
  np.testing.assert_allclose(assignment, golden['tie_hard'][:, 0], atol=1e-5)
  np.testing.assert_array_equal(assignment[:, 1].sum(), 0)
  mean = combine.assigned_mean(assignment, jnp.asarray(golden['key']))
  assert np.isfinite(mean).all() and not np.asarray(mean[:, 1]).any()


def test_an_empty_slot_has_no_gradient():
  logits = jnp.array([[[3.0, 3.0], [1.0, 1.0], [-5.0, -5.0]]])  # all tokens go to the first of three slots

  def value(logits):
    return combine.assigned_mean(
      combine.hard_assignment(logits, jnp.ones((1, 2))), jnp.ones((1, 2, 4)) * 7
    ).sum()

  assert value(logits) == 28
  assert float(jnp.abs(jax.grad(value)(logits)).max()) < 100


def test_columns_sum_to_one_for_tokens_and_to_zero_for_padding():
  logits = jax.random.normal(jax.random.key(0), (2, 4, 6))
  mask = jnp.array([[1.0] * 6, [1.0] * 3 + [0.0] * 3])
  np.testing.assert_allclose(combine.hard_assignment(logits, mask).sum(1), mask, atol=1e-6)


def test_the_order_of_tokens_does_not_matter():
  x = jax.random.normal(jax.random.key(0), (1, 6, 5))
  slots = jax.random.normal(jax.random.key(1), (1, 3, 5))
  module = combine.Assign(scale=True, identity=False, noise=1.0)
  params = module.init(jax.random.key(2), slots, x, jnp.ones((1, 6)), False)
  order = jnp.array([3, 1, 5, 0, 2, 4])
  first, assignment = module.apply(params, slots, x, jnp.ones((1, 6)), False)
  second, shuffled = module.apply(params, slots, x[:, order], jnp.ones((1, 6)), False)
  np.testing.assert_allclose(first, second, atol=1e-6)
  np.testing.assert_array_equal(assignment[..., order], shuffled)


def test_without_noise_training_assigns_as_inference_does():
  x, slots = (jax.random.normal(jax.random.key(i), (2, n, 5)) for i, n in enumerate((30, 3)))
  found = {}
  for noise in (0.0, 5.0):
    module = combine.Assign(scale=True, identity=True, noise=noise)
    params = module.init(jax.random.key(2), slots, x, jnp.ones((2, 30)), False)
    rngs = {'reduce': jax.random.key(3)}
    quiet, trained = (
      module.apply(params, slots, x, jnp.ones((2, 30)), train, rngs=rngs)[1] for train in (False, True)
    )
    found[noise] = bool((quiet.argmax(1) == trained.argmax(1)).all())
  assert found == {0.0: True, 5.0: False}


@pytest.mark.parametrize('executor', ['mask', 'compact'])
def test_the_stream_shrinks_to_the_slots_and_every_token_is_assigned(executor):
  model, params = model_and_params({'name': 'combine', 'slots': 3, 'layer': 3}, executor=executor)
  trace = apply(model, params, BATCH).trace
  assert np.asarray(trace.queries).tolist() == [[12, 12, 0, 3], [9, 9, 0, 3], [4, 4, 0, 3]]
  assert np.asarray(trace.keys).tolist() == np.asarray(trace.queries).tolist()
  assert ((np.asarray(trace.assignment) >= 0) == BATCH['mask']).all()
  assert np.asarray(trace.overhead['combine'])[0] == 9 * 32 * (32 + 2 * 3) + 3 * 3 * 32**2


def test_the_task_reaches_all_parameters_through_the_hard_assignment():
  model, params = model_and_params({'name': 'combine', 'slots': 3, 'layer': 3})
  gradient = jax.grad(lambda p: (apply(model, p, BATCH).logits ** 2).sum())(params)
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient['reducer']))
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient['encoder']['block_3']))
  assert model.unused_blocks() == (3,)


def test_noise_is_drawn_in_training_only():
  model, params = model_and_params({'name': 'combine', 'slots': 3, 'layer': 3})
  still = [apply(model, params, BATCH).logits for _ in range(2)]
  np.testing.assert_array_equal(still[0], still[1])
  noisy = [
    apply(
      model, params, BATCH, train=True, rngs={'reduce': jax.random.key(k), 'dropout': jax.random.key(9)}
    ).trace.assignment
    for k in range(2)
  ]
  assert (np.asarray(noisy[0]) != np.asarray(noisy[1])).any()


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'layer': 1}, 'choose 2 to 4'),
    ({'layer': 5}, 'choose 2 to 4'),
    ({'slots': -1, 'layer': 3}, 'slots is -1'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    make_reducer({'name': 'combine', **fields}).check(TINY_CONFIG.depth, TINY_CONFIG.heads)
