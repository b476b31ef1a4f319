"""The last batch of an epoch has rows without an example: no method's training loss or gradient may feel them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import labels_for, model_and_params, ragged_batch
from tokenprune_jax import approx_net, stages, tasks
from tokenprune_jax.reducers import tokee

ROWS = ragged_batch((14, 9, 5), 14) | {'weight': np.ones(3, np.float32)}
default = stages.default_objective(tasks.make('classify'))


@pytest.mark.parametrize(
  ('spec', 'objective'),
  [
    ({'name': 'ltp', 'mode': 'soft'}, default),
    ({'name': 'ltp', 'mode': 'soft', 'target_macs': 0.5, 'weight': 5.0}, default),
    ({'name': 'sttabt', 'mode': 'distil'}, approx_net.distil),
    ({'name': 'sttabt', 'mode': 'distil', 'padding': True}, approx_net.distil),
    ({'name': 'sttabt', 'mode': 'soft', 'theta': -0.5}, default),
    ({'name': 'power', 'mode': 'search', 'slots': 20}, default),
    ({'name': 'tokee', 'layers': (1, 2, 3), 'dropout': 0.0}, tokee.tags_joint),
  ],
  ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '',
)
def test_filler_changes_neither_loss_nor_gradient(spec, objective):
  model, params = model_and_params(spec)
  apply, key = stages.forward(model), jax.random.key(0)
  rows = ROWS | {'label': labels_for(model, ROWS)}
  # Twice the same examples have the mean of one time: what feels filler differs, in one compiled program.
  full = {name: np.concatenate([values, values]) for name, values in rows.items()}
  filled = {name: np.concatenate([values, np.zeros_like(values)]) for name, values in rows.items()}

  @jax.jit
  def step(params, batch):
    return jax.value_and_grad(lambda params: objective(apply, params, batch, key, None)[0])(params)

  (loss, plain), (same, other) = (step(params, jax.tree.map(jnp.asarray, batch)) for batch in (full, filled))
  assert float(same) == pytest.approx(float(loss), rel=1e-5)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))
