"""The layers' own gradients against automatic differentiation of the plain formulas, and against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenprune_jax import layers

EPSILON = 1e-12


def plain_gelu(x):
  return x * 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


def plain_norm(x, scale, bias):
  centred = x - x.mean(-1, keepdims=True)
  return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON) * scale + bias


def normals(seed, *shapes):
  keys = jax.random.split(jax.random.key(seed), len(shapes))
  return [2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


CASES = {
  'product': (layers.product, jnp.matmul, [(2, 3, 5), (5, 4)]),
  'product of one row': (layers.product, jnp.matmul, [(5,), (5, 4)]),
  'gelu': (layers.gelu, plain_gelu, [(2, 3, 5)]),
  'layer_norm': (lambda *a: layers.layer_norm(*a, EPSILON), plain_norm, [(2, 3, 5), (5,), (5,)]),
}


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_those_of_the_plain_formula(name):
  function, plain, shapes = CASES[name]
  inputs = normals(0, *shapes)
  (found, pull), (expected, plain_pull) = jax.vjp(function, *inputs), jax.vjp(plain, *inputs)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  (gradient,) = normals(1, expected.shape)
  for ours, theirs in zip(pull(gradient), plain_pull(gradient), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gelu_is_the_normal_distribution_function():
  x = np.linspace(-6, 6, 49, dtype=np.float32)
  expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6)


def test_a_row_without_spread_has_finite_gradients():
  x, scale, bias = jnp.full((2, 4), 3.0), jnp.ones(4), jnp.zeros(4)
  value, pull = jax.vjp(lambda *a: layers.layer_norm(*a, EPSILON), x, scale, bias)
  assert np.all(np.asarray(value) == 0)
  assert all(np.isfinite(g).all() for g in pull(jnp.ones((2, 4))))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dense_computes_in_its_type_and_keeps_gradients_in_float32(dtype):
  (x,) = normals(2, (2, 3, 8))
  module = layers.Dense(4, dtype)
  params = module.init(jax.random.key(0), x)['params']
  y = module.apply({'params': params}, x)
  assert y.dtype == jnp.dtype(dtype)
  gradient = jax.grad(lambda p: module.apply({'params': p}, x).astype('float32').sum())(params)
  assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}
  np.testing.assert_allclose(gradient['bias'], np.full(4, 6.0), rtol=1e-2)
  expected = np.asarray(x).reshape(-1, 8).sum(0)
  np.testing.assert_allclose(gradient['kernel'], np.stack([expected] * 4, 1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_scales_what_stays_and_its_gradient_has_the_same_holes(rate):
  (x,) = normals(0, (64, 100))
  found, pull = jax.vjp(lambda x: layers.dropped(x, rate, jax.random.key(1)), x)
  stays = np.asarray(found) != 0
  np.testing.assert_allclose(found, np.where(stays, np.asarray(x) / (1 - rate), 0), rtol=1e-6)
  np.testing.assert_allclose(pull(jnp.ones_like(x))[0], stays / (1 - rate), rtol=1e-6)
  assert abs(stays.mean() - (1 - rate)) < 0.02


def test_bits_are_those_of_the_hash_of_each_place():
  key, mask = jax.random.key(7), 2**32 - 1
  first, second = (int(word) for word in jax.random.bits(key, (2,), jnp.uint32))
  expected = []
  for place in range(6):
    h = place ^ first
    h = (h ^ (h >> 17)) * 0xED5AD4BB & mask
    h = ((h ^ (h >> 11)) * 0xAC4C1B51 + second) & mask
    h = (h ^ (h >> 15)) * 0x31848BAB & mask
    expected.append(h ^ (h >> 14))
  np.testing.assert_array_equal(layers.random_bits(key, (2, 3)), np.reshape(expected, (2, 3)))


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_masks_of_dropout_do_not_depend_on_neighbours_layers_or_steps(seed):
  shape, key = (8, 12, 64, 64), jax.random.key(seed)
  draws = [jax.random.fold_in(key, step) for step in range(2)]  # two steps
  one, other = (np.asarray(layers.random_bits(draw, shape)) < 2**32 * 0.1 for draw in draws)
  one, other = (x - 0.1 for x in (one, other))
  pairs = [
    (one[..., 1:], one[..., :-1]),
    (one[..., 1:, :], one[..., :-1, :]),
    (one[1:], one[:-1]),
    (one, other),
  ]
  for a, b in pairs:  # standard scores of the correlations
    assert abs((a * b).mean() / 0.09 * math.sqrt(a.size)) < 4
  assert abs(one.mean() / 0.3 * math.sqrt(one.size)) < 4
