import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, fuzzy_loop, model_and_params, ragged_batch
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducers import fuzzy
from tokenprune_jax.schedule import next_counts

GOLDEN = jnp.array([
  [0.05, 0.30, 0.10, 0.08, 0.20, 0.02, 0.15, 0.10],
  [0.125, 0.12, 0.13, 0.11, 0.14, 0.115, 0.135, 0.125],
])[None]  # fmt: skip
EVERY = set(range(8))
BATCH = ragged_batch((12, 7, 2, 1), 12)


def kept(rule, scores=GOLDEN, ratio=0.9, count=None, valid=None):
  valid = jnp.ones(scores.shape, bool) if valid is None else valid
  table = jnp.asarray(next_counts(ratio, scores.shape[-1]))
  count = table[scores.shape[-1]] if count is None else count
  core = fuzzy.important(scores, valid, 0.01, 0.9)
  return fuzzy.keep(rule, scores, valid, core, jnp.full(scores.shape[:1], count), table)


def test_golden_memberships():
  core = np.asarray(fuzzy.important(GOLDEN, jnp.ones((1, 2, 8), bool), 0.01, 0.9))[0]
  assert set(np.flatnonzero(core[0])) == {1, 4, 6} and core[1].all()


@pytest.mark.parametrize(
  ('rule', 'first', 'second'),
  [
    ('rank', {0, 1, 2, 3, 4, 6, 7}, {0, 1, 2, 4, 5, 6, 7}),
    ('protect', {0, 1, 2, 3, 4, 6, 7}, EVERY),
    ('complement', None, EVERY),
  ],
)
def test_golden_selection(rule, first, second):
  stay = np.asarray(kept(rule))[0]
  assert set(np.flatnonzero(stay[1])) == second
  if first is None:  # 3 of the core and floor(0.9 * 5) of the candidates: all but the lowest
    assert set(np.flatnonzero(stay[0])) == EVERY - {5}
  else:
    assert set(np.flatnonzero(stay[0])) == first


def test_the_paper_schedule_is_exact_in_decimals():
  table, counts = next_counts(0.9, 512), [512]
  for _ in range(11):
    counts.append(table[counts[-1]])
  assert counts == [512, 460, 414, 372, 334, 300, 270, 243, 218, 196, 176, 158]
  assert next_counts(0.3, 5) == (0, 1, 1, 1, 1, 1)


@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 0.75, 1.0])
def test_quantile_equals_numpy_over_the_valid(share):
  rng = np.random.default_rng(0)
  scores, valid = rng.normal(size=(5, 9)).astype(np.float32), rng.random((5, 9)) < 0.6
  valid[3], valid[4] = False, np.arange(9) == 2
  found = fuzzy.quantile(jnp.asarray(scores), jnp.asarray(valid), share)[:, 0]
  for row, ok, value in zip(scores, valid, found):
    np.testing.assert_allclose(value, np.quantile(row[ok], share) if ok.any() else 0, atol=1e-6)


@pytest.mark.parametrize('rule', ['rank', 'protect', 'complement'])
def test_selection_equals_a_loop_on_random_scores(rule):
  rng = np.random.default_rng(1)
  for ratio in (0.9, 0.55):
    for _ in range(10):
      scores = rng.gamma(0.5, size=(1, 3, 11)).astype(np.float32)
      valid = rng.random((1, 3, 11)) < 0.8
      count = int(rng.integers(1, 9))
      ours = kept(rule, jnp.asarray(scores), ratio, count, jnp.asarray(valid))[0]
      np.testing.assert_array_equal(ours, fuzzy_loop(rule, scores[0], valid[0], ratio, 0.01, 0.9, count))


def test_equal_scores_are_all_kept():
  assert np.asarray(fuzzy.important(jnp.ones((1, 2, 5)), jnp.ones((1, 2, 5), bool), 0.01, 0.9)).all()


@pytest.mark.parametrize('rule', fuzzy.READINGS + fuzzy.SIMPLE)
def test_keys_shrink_and_never_return(rule):
  model, params = model_and_params({'name': 'fuzzy', 'ratio': 0.7, 'rule': rule})
  trace = apply(model, params, BATCH).trace
  kept = np.asarray(trace.kept)
  assert (kept[:, 0] == BATCH['mask']).all() and (np.diff(kept, axis=1) <= 1e-6).all()
  if rule in fuzzy.FIXED:
    assert np.asarray(trace.keys).tolist() == [[12, 8, 5, 3], [7, 4, 2, 1], [2, 1, 1, 1], [1, 1, 1, 1]]
  assert (np.asarray(trace.queries) == BATCH['mask'].sum(-1)[:, None]).all()


def test_heads_may_share_the_choice():
  model, params = model_and_params(
    {'name': 'fuzzy', 'ratio': 0.7, 'rule': 'rank', 'head_shared': True}, executor='compact'
  )
  trace = apply(model, params, BATCH).trace
  assert set(np.unique(trace.kept)) <= {0.0, 1.0}
  assert (np.asarray(trace.key_rows) == np.asarray(trace.keys)).all()


def test_random_depends_on_text_and_seed_only():
  first, params = model_and_params({'name': 'fuzzy', 'ratio': 0.5, 'rule': 'random'})
  other, _ = model_and_params({'name': 'fuzzy', 'ratio': 0.5, 'rule': 'random', 'seed': 1})
  kept = [np.asarray(apply(m, params, BATCH).trace.kept) for m in (first, first, other)]
  assert (kept[0] == kept[1]).all() and (kept[0] != kept[2]).any()


def test_calibrated_capacities_bound_the_keys_and_flag_overflow():
  spec = {'name': 'fuzzy', 'ratio': 0.7, 'rule': 'protect'}
  model, params = model_and_params(spec)
  wide, _ = model_and_params({**spec, 'capacities': (1.0, 1.0, 1.0, 1.0)}, executor='compact')
  tight, _ = model_and_params({**spec, 'capacities': (1.0, 0.5, 0.5, 0.5)}, executor='compact')
  expected = apply(model, params, BATCH)
  loose = apply(wide, params, BATCH)
  np.testing.assert_allclose(loose.logits, expected.logits, atol=1e-5)
  assert not np.asarray(loose.trace.overflow).any()
  overflow = np.asarray(apply(tight, params, BATCH).trace.overflow)
  assert overflow[0] and not overflow[3]


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'ratio': -0.5}, 'reducer.ratio is -0.5'),
    ({'ratio': 1.5}, 'at most 1'),
    ({'alpha_important': 1.5}, 'alpha_important is 1.5'),
    ({'alpha_unimportant': -0.1}, 'alpha_unimportant is -0.1'),
    ({'rule': 'best'}, "rule is 'best'"),
    ({'capacities': (0.5,)}, 'capacities needs 4'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    make_reducer({'name': 'fuzzy', **fields}).check(TINY_CONFIG.depth, TINY_CONFIG.heads)
