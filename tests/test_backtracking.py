"""Back-tracking against the official code's own numbers, and what holds for every plan."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenprune_jax import attention, backtracking
from tokenprune_jax.attention import Terms

G = np.load(pathlib.Path(__file__).parent / 'golden' / 'backtracking.npz')


def of_map(weights):
  """Answers from a map [b n n] that is there."""
  return lambda asked: jnp.einsum('bi,bij->bj', asked, weights[:, : asked.shape[1]])


def counts_of(values, rows=1):
  return [jnp.full(rows, int(value)) for value in values]


def test_the_golden_plan_of_top_k():
  layers = [of_map(jnp.asarray(weights)[None]) for weights in G['golden_abt.attn_mean']]
  plan = backtracking.top_k(
    layers, jnp.ones((1, 5), bool), counts_of(G['golden_abt.ks']), float(G['golden_abt.p'])
  )
  np.testing.assert_array_equal(plan[0, :2], G['golden_abt.keep_mask'])
  np.testing.assert_array_equal(plan[0, 2], [1, 0, 0, 0, 0])


@pytest.mark.parametrize(('tag', 'mix'), [('p01', 0.1), ('p00', 0.0), ('p05', 0.5), ('p10', 1.0)])
def test_top_k_is_the_official_plan(tag, mix):
  maps = [jnp.asarray(weights)[None] for weights in G['abt.attn_headmean']]
  every = jnp.ones((1, maps[0].shape[-1]), bool)  # the official function does not look at its mask
  plan = backtracking.top_k([of_map(weights) for weights in maps], every, counts_of(G['abt.kcount']), mix)
  np.testing.assert_array_equal(plan[0], G[f'abt.keep_mask_{tag}'])


def as_product(scores):
  """Terms of given scores before the softmax [b h n n]: they are the queries, and keys pick their entries."""
  n = scores.shape[-1]
  return Terms(scores * n**0.5, jnp.broadcast_to(jnp.eye(n), scores.shape), None)


def as_bias(scores):
  """The same, where they are all bias."""
  return Terms(jnp.zeros_like(scores), jnp.zeros_like(scores), scores)


def concrete(scores, valid, theta, terms=as_product):
  """The plan of scores before the softmax [b h n n]."""
  return backtracking.concrete(
    [backtracking.standings(terms(layer), valid) for layer in scores], valid, theta
  )


@pytest.mark.parametrize('terms', [as_product, as_bias])
@pytest.mark.parametrize('name', ['concrete_thetam0p5', 'concrete_thetam1p5'])
def test_the_golden_concrete_plan(name, terms):
  scores = [jnp.asarray(layer)[None, None] for layer in G[f'golden_{name}.scores']]
  theta = jnp.asarray(G[f'golden_{name}.theta'])
  plan, ranks = concrete(scores, jnp.ones((1, 5), bool), theta, terms)
  np.testing.assert_allclose(ranks[0], G[f'golden_{name}.u'], atol=2e-6)
  np.testing.assert_allclose(plan[0, :2], G[f'golden_{name}.mask_soft'], atol=1e-5)
  np.testing.assert_array_equal(plan[0, :2] >= 0.5, G[f'golden_{name}.mask_hard'] > 0)


@pytest.mark.parametrize('terms', [as_product, as_bias])
@pytest.mark.parametrize('tag', ['neg15', 'neg05', 'zero', 'mixed'])
def test_concrete_is_the_official_plan(tag, terms):
  scores, valid = (
    [jnp.asarray(layer) for layer in G['concrete.scores']],
    jnp.asarray(G['concrete.key_mask'] > 0),
  )
  theta = jnp.asarray(G[f'concrete.theta_{tag}'])
  plan, ranks = concrete(scores, valid, theta, terms)
  np.testing.assert_allclose(np.swapaxes(ranks, 0, 1), G[f'concrete.u_{tag}'], atol=2e-6)
  np.testing.assert_allclose(np.swapaxes(plan, 0, 1), G[f'concrete.mask_soft_{tag}'], atol=1e-5)
  hard = np.asarray(plan) >= 0.5
  np.testing.assert_array_equal(np.swapaxes(hard, 0, 1), G[f'concrete.mask_hard_{tag}'] > 0)
  for layer in range(len(scores)):  # in closed form: needed above, or ranked at least sigmoid(-theta)
    closed = hard[:, layer + 1] | (np.asarray(ranks[:, layer]) >= jax.nn.sigmoid(-theta[layer]))
    np.testing.assert_array_equal(hard[:, layer], closed & np.asarray(valid))


def random_maps(lengths, n, layers=3, heads=2):
  rng = np.random.default_rng(0)
  valid = np.arange(n)[None] < np.array(lengths)[:, None]
  scores = rng.normal(size=(layers, len(lengths), heads, n, n)).astype(np.float32) * 2
  return [jnp.asarray(layer) for layer in scores], jnp.asarray(valid)


def test_plans_shrink_upwards_and_hold_no_padding():
  scores, valid = random_maps((12, 7, 1), 12)
  weights = [jax.nn.softmax(jnp.where(valid[:, None, None], layer, -1e9), -1).mean(1) for layer in scores]
  counts = [jnp.array([5, 3, 1])] * 3
  for plan in (
    backtracking.top_k(list(map(of_map, weights)), valid, counts),
    concrete(scores, valid, jnp.zeros(3))[0],
  ):
    assert (np.diff(np.asarray(plan), axis=1) <= 1e-7).all()
    assert (np.asarray(plan) * ~np.asarray(valid)[:, None] == 0).all()
    np.testing.assert_array_equal(plan[:, -1], np.eye(1, 12).repeat(3, 0))
    assert (np.asarray(plan)[:, :, 0] == 1).all()


def test_batch_mates_and_padding_change_nothing():
  scores, valid = random_maps((12, 7), 12)
  plan, _ = concrete(scores, valid, jnp.full(3, -0.5))
  alone, _ = concrete([layer[1:, :, :7, :7] for layer in scores], valid[1:, :7], jnp.full(3, -0.5))
  np.testing.assert_allclose(plan[1, :, :7], alone[0], atol=1e-6)


def test_thresholds_have_a_gradient_everywhere():
  scores, valid = random_maps((12, 7, 1), 12)

  def kept(theta):
    return concrete(scores, valid, theta)[0].sum()

  gradient = jax.grad(kept)(jnp.full(3, -0.5))
  assert np.isfinite(gradient).all() and (np.asarray(gradient) >= 0).all() and float(gradient.sum()) > 0


@pytest.mark.parametrize('biases', [0, 1, 3])
def test_shares_are_the_mean_maps_and_only_rows_that_are_asked_for_are_made(biases, monkeypatch):
  rng = np.random.default_rng(2)
  query, key = (jnp.asarray(rng.normal(size=(3, 2, 21, 4)), jnp.float32) for _ in range(2))
  bias = jnp.asarray(rng.normal(size=(biases, 2, 21, 21)), jnp.float32) if biases else None
  valid = jnp.arange(21)[None] < jnp.array([21, 9, 1])[:, None]
  asked = jnp.asarray(rng.random((3, 21)) * (rng.random((3, 21)) < 0.4), jnp.float32) * valid
  asked = asked.at[0].set(jnp.arange(21.0)).at[2].set(0)  # all of a text, and nothing of another
  scores = jnp.einsum('bhqe,bhke->bhqk', query, key) / 2 + (0 if bias is None else bias)
  maps = jax.nn.softmax(jnp.where(valid[:, None, None], scores, -1e9), -1).mean(1)
  answer = backtracking.shares(Terms(query, key, bias), valid)
  for rows in (64, 4):
    monkeypatch.setattr(backtracking, 'ROWS', rows)
    for given in (asked, asked[:, :7], asked[:, :1]):
      np.testing.assert_allclose(answer(given), of_map(maps)(given), atol=1e-5)
  few, made = asked.at[0].set(asked[1]), []
  monkeypatch.setattr(
    backtracking, 'hard_parts', lambda *given: made.append(1) or attention.hard_parts(*given)
  )
  with jax.disable_jit():
    answer(few)
  assert len(made) == -(-int((few > 0).sum(1).max()) // 4) < 21 // 4


@pytest.mark.parametrize('biased', [False, True])
def test_standings_are_those_of_a_loop_over_rows(biased, monkeypatch):
  """In passes as all at once, value and gradient; asked by the first rows alone as by zeros behind them."""
  rng = np.random.default_rng(3)
  query, key = (jnp.asarray(rng.normal(size=(3, 2, 16, 4)), jnp.float32) for _ in range(2))
  bias = jnp.asarray(rng.normal(size=(1, 2, 16, 16)), jnp.float32) if biased else None
  valid = jnp.arange(16)[None] < jnp.array([16, 9, 1])[:, None]
  asked = jnp.asarray(rng.random((3, 16)), jnp.float32) * valid

  def answer(query, asked):
    return backtracking.standings(Terms(query, key, bias), valid)(asked)

  wanted = np.zeros((3, 16))
  for b, n in enumerate((16, 9, 1)):
    for h in range(2):
      for i in range(n):
        row = np.asarray(query[b, h, i] @ key[b, h, :n].T / 2 + (bias[0, h, i, :n] if biased else 0), float)
        found = jax.scipy.stats.norm.cdf((row - row.mean()) / (row.std() + backtracking.EPSILON))
        wanted[b, :n] += np.asarray(asked[b, i] * found) / 2
  np.testing.assert_allclose(answer(query, asked), wanted, atol=2e-5)
  np.testing.assert_allclose(answer(query, asked[:, :8]), answer(query, asked.at[:, 8:].set(0)), atol=1e-5)

  def total(query):
    return (answer(query, asked) ** 2).sum()

  whole = jax.value_and_grad(total)(query)
  monkeypatch.setattr(attention, 'in_pass', lambda b, h, entries: (1, 1))
  for one, other in zip(whole, jax.value_and_grad(total)(query)):
    assert np.isfinite(other).all()
    np.testing.assert_allclose(other, one, atol=1e-5)
