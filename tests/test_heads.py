"""Cascade head pruning: its rule, its counts, and what a head that left still does: nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch
from tokenprune_jax import attention, models
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducers import heads

LENGTHS = (14, 9, 5, 2, 1)
BATCH = ragged_batch(LENGTHS, 14)
SHARES = (1.0, 0.75, 0.5, 0.25)


def test_the_most_important_of_those_left_stay():
  importance = np.random.default_rng(0).random((5, 6)).astype(np.float32)
  left = np.random.default_rng(1).random((5, 6)) < 0.7
  found = np.asarray(heads.kept_heads(jnp.asarray(importance), jnp.asarray(left), 3))
  for row in range(5):
    best = sorted(np.flatnonzero(left[row]), key=lambda h: -importance[row, h])[:3]
    assert set(np.flatnonzero(found[row])) == set(best)


def test_magnitude_is_the_sum_of_absolute_outputs():
  rng = np.random.default_rng(0)
  query, key, value = (jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32) for _ in range(3))
  seen, updated = jnp.ones((2, 1, 5)), jnp.asarray(np.arange(5)[None] < [[5], [3]], jnp.float32)
  for kernel in ('plain', 'xla'):
    mixed, found = attention.mix(
      query, key, value, seen, updated, None, None, attention.Mixing(('magnitude',), kernel=kernel)
    )
    expected = [[np.abs(mixed[b, h, :n]).sum() for h in range(3)] for b, n in enumerate((5, 3))]
    np.testing.assert_allclose(found['magnitude'], expected, rtol=1e-5)


def test_heads_leave_as_scheduled_and_their_products_are_taken_off():
  model, params = model_and_params({'name': 'heads', 'shares': SHARES})
  output, config = apply(model, params, BATCH), model.config
  kept = np.asarray(output.trace.kept)
  d, f = config.width, config.hidden
  for row, n in enumerate(LENGTHS):
    before = (1.0, *SHARES[:-1])  # what layer l runs with is what the layers below decided
    np.testing.assert_allclose(kept[row, :, :n], np.repeat(np.array(before)[:, None], n, 1))
    blocks = [share * (4 * d * d * n + 2 * d * n * n) + 2 * d * f * n for share in before]
    assert float(output.macs[row]) == pytest.approx(sum(blocks) + d * 3, rel=1e-5)


def test_a_head_that_left_puts_out_nothing():
  """Values that only such a head reads change no answer, under either executor."""
  model, params = model_and_params({'name': 'heads', 'shares': (0.5, 0.5, 0.5, 0.5)})
  one = {name: values[:1] for name, values in BATCH.items()}
  before = apply(model, params, one)
  width, changed = model.config.width // 4, []
  for head in range(4):
    kernel = np.array(params['encoder']['block_4']['value']['kernel'])
    kernel[:, head * width : (head + 1) * width] += 1.0
    encoder = {
      **params['encoder'],
      'block_4': {
        **params['encoder']['block_4'],
        'value': {**params['encoder']['block_4']['value'], 'kernel': kernel},
      },
    }
    after = apply(model, {**params, 'encoder': encoder}, one)
    changed.append(float(np.abs(after.logits - before.logits).max()) > 1e-6)
  assert sum(changed) == 2


def test_spattens_cascade_of_tokens_and_heads():
  tokens = {'name': 'topk', 'shares': (1.0, 0.8, 0.5, 0.3), 'score': 'cumulative'}
  both = {'name': 'chain', 'reducers': (tokens, {'name': 'heads', 'shares': SHARES})}
  model, params = model_and_params(both)
  masked, compact = (apply(model.clone(executor=way), params, BATCH) for way in ('mask', 'compact'))
  np.testing.assert_allclose(masked.logits, compact.logits, atol=1e-4)
  np.testing.assert_allclose(masked.macs, compact.macs, rtol=1e-5)
  alone = apply(model_and_params(tokens)[0], {k: v for k, v in params.items() if k != 'reducer'}, BATCH)
  assert (np.asarray(masked.macs)[:3] < np.asarray(alone.macs)[:3]).all()


def test_settings_out_of_range_are_refused():
  for shares, words in (((0.5, 1.0, 0.5, 0.5), 'cannot rise'), ((0.5,), 'needs 4 shares')):
    with pytest.raises(UserError, match=words):
      models.make_reducer({'name': 'heads', 'shares': shares}).check(4, 4)
