import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import attention_loop
from tokenprune_jax import attention
from tokenprune_jax.attention import Mixing


def mix(*arguments):
  """`attention.mix` of NumPy arrays."""
  return attention.mix(*(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments))


READS = ('received', 'entropy', 'first_row', 'weights')


def arrays(seen_per_head=False, b=3, h=2, n=7, e=4):
  rng = np.random.default_rng(0)
  query, key, value = (rng.normal(size=(b, h, n, e)).astype(np.float32) for _ in range(3))
  seen = (rng.random((b, h if seen_per_head else 1, n)) < 0.7).astype(np.float32)
  seen[..., 0] = 1
  updated = (np.arange(n)[None] < np.array([7, 5, 3])[:, None]).astype(np.float32)
  bias = rng.normal(size=(1, h, n, n)).astype(np.float32)
  return query, key, value, seen, updated, bias


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('per_head', [False, True])
def test_mix_equals_a_loop(soft, per_head):
  query, key, value, seen, updated, bias = arrays(per_head)
  mixed, found = mix(query, key, value, seen, updated, bias, None, Mixing(READS, soft))
  for b in range(3):
    for h in range(2):
      alive = seen[b, h if per_head else 0]
      expected, weights = attention_loop(query[b, h], key[b, h], value[b, h], alive, bias[0, h])
      np.testing.assert_allclose(mixed[b, h], expected, atol=1e-5)
      np.testing.assert_allclose(found['weights'][b, h], weights, atol=1e-6)
      np.testing.assert_allclose(found['first_row'][b, h], weights[0], atol=1e-6)
      received = (weights * updated[b][:, None]).sum(0)
      np.testing.assert_allclose(found['received'][b, h], received, atol=1e-5)
      for j in np.flatnonzero(received > 0):
        share = weights[updated[b] > 0, j] / received[j]
        np.testing.assert_allclose(found['entropy'][b, h, j], -(share * np.log(share)).sum(), atol=1e-4)


def test_unseen_equals_absent_bit_for_bit():
  query, key, value, _, updated, _ = arrays()
  seen = np.ones((3, 1, 7), np.float32)
  seen[..., 5:] = 0
  key[..., 5:, :], value[..., 5:, :] = 1e4, -1e4  # what a removed token holds must not matter
  masked, _ = mix(query, key, value, seen, updated, None, None, Mixing())
  absent, _ = mix(query, key[..., :5, :], value[..., :5, :], seen[..., :5], updated, None, None, Mixing())
  np.testing.assert_allclose(masked, absent, atol=1e-6)
  key[..., 5:, :], value[..., 5:, :] = -7.0, 3.0
  again, _ = mix(query, key, value, seen, updated, None, None, Mixing())
  np.testing.assert_array_equal(masked, again)


def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients():
  query, key, value, seen, updated, _ = arrays()
  for soft in (False, True):

    def total(query, seen, soft=soft):
      return mix(query, key, value, seen, updated, None, None, Mixing(soft=soft))[0].sum()

    assert total(query, seen * 0) == 0
    for gradient in jax.grad(total, (0, 1))(query, jnp.zeros_like(seen)):
      assert np.isfinite(gradient).all()


def test_hard_parts_have_the_gradient_of_soft_parts():
  scores = jax.random.normal(jax.random.key(0), (2, 3, 5, 6))
  seen = jnp.array([1.0, 0, 1, 1, 0, 1])[None, None, None]
  probe = jax.random.normal(jax.random.key(1), scores.shape)
  hard, soft = (
    jax.grad(lambda s, f=f: (jnp.multiply(*f(s, seen)) * probe).sum())(scores)
    for f in (attention.hard_parts, attention.soft_parts)
  )
  np.testing.assert_allclose(hard, soft, atol=1e-6)


def test_soft_seen_has_the_gradient_of_finite_differences():
  scores = jax.random.normal(jax.random.key(0), (1, 1, 3, 4))
  probe = jax.random.normal(jax.random.key(1), scores.shape)
  seen = jnp.array([0.9, 0.4, 0.6, 0.2])[None, None, None]

  def value(seen):
    return float((attention.soft_weights(scores, seen) * probe).sum())

  gradient = jax.grad(lambda s: (attention.soft_weights(scores, s) * probe).sum())(seen)
  for j in range(4):
    step = jnp.zeros_like(seen).at[..., j].set(1e-2)
    np.testing.assert_allclose(
      gradient[..., j].item(), (value(seen + step) - value(seen - step)) / 2e-2, atol=2e-3
    )


def test_dropout_is_of_the_stated_rate_and_leaves_evidence_alone():
  query, key, value, seen, updated, _ = arrays()
  ones = np.ones_like(seen)
  how = Mixing(('received',), dropout=0.5)
  mixed, found = mix(query * 0, key, np.ones_like(value), ones, updated, None, jax.random.key(0), how)
  plain, expected = mix(query * 0, key, np.ones_like(value), ones, updated, None, None, Mixing(('received',)))
  np.testing.assert_allclose(found['received'], expected['received'], atol=1e-6)
  assert abs(float(mixed.mean()) - 1) < 0.15 and float(mixed.std()) > 0.2 and float(plain.std()) < 1e-6


def test_relative_bucket_is_symmetric_exact_when_near_and_capped_when_far():
  distance = jnp.arange(-300, 301)
  bucket = np.asarray(attention.relative_bucket(distance, 32))
  assert bucket[300] == 0 and (bucket[300 + 1 : 300 + 8] == 16 + np.arange(1, 8)).all()
  np.testing.assert_array_equal(bucket[:300][::-1] + 16, bucket[301:])
  assert bucket.max() == 31 and (np.diff(bucket[301:]) >= 0).all()


@pytest.mark.parametrize('queries', [7, 5])
@pytest.mark.parametrize('per_head', [False, True])
def test_the_fused_kernel_and_its_light_evidence_equal_the_plain_ones(per_head, queries, monkeypatch):
  monkeypatch.setattr(attention, 'PASS', 3)  # several passes, the last one not full
  query, key, value, seen, updated, bias = arrays(per_head)
  query, updated, bias = query[:, :, :queries], updated[:, :queries], bias[:, :, :queries]
  reads = ('received', 'first_row')
  plain = mix(query, key, value, seen, updated, bias, None, Mixing(reads))
  fused = mix(query, key, value, seen, updated, bias, None, Mixing(reads, kernel='xla'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, fused)
  whole = Mixing(('weights',), kernel='xla')  # needs the map, which the fused kernel does not give
  assert mix(query, key, value, seen, updated, bias, None, whole)[1]['weights'].shape == (3, 2, queries, 7)


@pytest.mark.parametrize(
  ('limit', 'examples', 'heads', 'per_head', 'biases'),
  [(4, 2, 2, True, 4), (2, 1, 2, False, 1), (1, 1, 1, True, 1), (1, 1, 1, False, 4), (0, 1, 1, True, 0)],
)
def test_passes_equal_one_pass_in_values_evidence_and_gradient(
  limit, examples, heads, per_head, biases, monkeypatch
):
  *states, bias = arrays(per_head)
  query, key, value, seen, updated = (x[[0, 1, 2, 1]] for x in states)
  bias = np.concatenate([(row + 1) * bias for row in range(biases)]) if biases else None
  how = Mixing(('received', 'first_row'))

  def total(query, key, value, bias=bias):
    mixed, _ = mix(query, key, value, seen, updated, bias, None, how)
    return (mixed * jnp.arange(mixed.size).reshape(mixed.shape)).sum()

  def found():
    values = mix(query, key, value, seen, updated, bias, None, how)
    return values, jax.grad(total, (0, 1, 2, 3) if biases else (0, 1, 2))(query, key, value, bias)

  whole = found()
  monkeypatch.setattr(attention, 'PASS_ENTRIES', limit * 7 * 7)
  assert attention.in_pass(4, 2, 7 * 7) == (examples, heads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), whole, found())


@pytest.mark.parametrize('reads', [(), ('first_row',), ('received',)])
def test_inference_keeps_no_whole_map(reads):
  b, h, n, e = 2, 12, 512, 32
  states = jax.ShapeDtypeStruct((b, h, n, e), jnp.float32)
  masks = jax.ShapeDtypeStruct((b, 1, n), jnp.float32), jax.ShapeDtypeStruct((b, n), jnp.float32)

  def mixed(*given):
    return attention.mix(*given, None, None, Mixing(reads))

  compiled = jax.jit(mixed).lower(states, states, states, *masks).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * b * h * n * n / 2


def test_the_slope_of_an_unseen_key_is_what_seeing_it_can_do():
  scores, seen, values = (
    jnp.array([[0.0, 1.0, 60.0]]),
    jnp.array([[1.0, 1.0, 0.0]]),
    jnp.array([1.0, 2.0, 5.0]),
  )
  slope = np.asarray(jax.grad(lambda seen: (attention.soft_weights(scores, seen) * values).sum())(seen))
  exps = np.exp([-1.0, 0.0, 0.0])
  row = (exps[:2] @ values[:2]) / exps[:2].sum()
  np.testing.assert_allclose(slope[0], exps / exps[:2].sum() * (np.asarray(values) - row), rtol=1e-5)
  # The key that scores highest among the seen ones keeps the whole slope of its score.
  by_score = np.asarray(jax.grad(lambda s: (attention.soft_weights(s, seen) * values).sum())(scores))
  share = exps[:2] / exps[:2].sum()
  np.testing.assert_allclose(by_score[0, :2], share * (np.asarray(values[:2]) - row), rtol=1e-5)
