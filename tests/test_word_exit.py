"""Exits of words against the released code's vectors and NumPy loops."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenprune_jax import word_exit
from tokenprune_jax.reducers.early_exit import uncertainty

G = np.load(pathlib.Path(__file__).parent / 'golden' / 'tokee_windows.npz')


@pytest.mark.parametrize('window', [1, 5, 15])
def test_official_windows_and_exit_layers(window):
  logits = jnp.asarray(G['s0.cached_logits'])[:, None]  # [l b w c]
  found = uncertainty(logits)
  np.testing.assert_allclose(found[:, 0], G['s0.uncertainty'], atol=2e-6)
  padded = jnp.pad(found, ((0, 0), (0, 0), (0, 3)), constant_values=9.0)
  valid = jnp.arange(17)[None] < 14
  for layer, expected in zip(padded, G[f's0.pooled_w{window}']):
    pooled = word_exit.window_max(layer, valid, window)
    np.testing.assert_allclose(pooled[0, :14], expected, atol=2e-6)
    assert (np.asarray(pooled[0, 14:]) == word_exit.SURE).all()
  for delta, cap in ((0.05, 0.5), (0.15, 0.5), (0.25, 0.5), (0.25, 0.3)):
    limits = jnp.asarray(word_exit.thresholds(delta, 12, cap))[:, None]
    exits = word_exit.exit_layers(padded, valid, jnp.array([window]), limits)
    np.testing.assert_array_equal(exits[0, :14] - 1, G[f's0.exit_w{window}_d{delta}_cap{cap}'])


def test_each_example_has_its_own_window():
  random = np.random.default_rng(0)
  values, lengths, windows = random.random((3, 9)), (9, 4, 1), (3, 1, 5)
  valid = np.arange(9) < np.array(lengths)[:, None]
  found = word_exit.window_max(jnp.asarray(values, jnp.float32), jnp.asarray(valid), jnp.asarray(windows))
  for b, (length, window) in enumerate(zip(lengths, windows)):
    for j in range(length):
      near = values[b, max(0, j - window // 2) : min(length, j + window // 2 + 1)]
      np.testing.assert_allclose(found[b, j], near.max(), rtol=1e-6)


def test_tags_that_exited_neighbours_rule_out():
  """Against a loop over words and tags."""
  random = np.random.default_rng(1)
  b, w, c = 4, 7, 3
  tag, fixed = random.integers(0, c, (b, w)), random.random((b, w)) < 0.5
  illegal = random.random((c, c)) < 0.7
  found = np.asarray(word_exit.barred(jnp.asarray(tag), jnp.asarray(fixed), jnp.asarray(illegal)))
  clashing = np.asarray(word_exit.clashing(jnp.asarray(tag), jnp.asarray(fixed), jnp.asarray(illegal)))
  barred_all = 0
  for i, j in np.ndindex(b, w):
    row = [
      (j > 0 and fixed[i, j - 1] and illegal[tag[i, j - 1], t])
      or (j < w - 1 and fixed[i, j + 1] and illegal[t, tag[i, j + 1]])
      for t in range(c)
    ]
    barred_all += all(row)
    assert found[i, j].tolist() == ([False] * c if all(row) else row)
    pairs = [(k, k + 1) for k in (j - 1, j) if k >= 0 and k + 1 < w and fixed[i, k] and fixed[i, k + 1]]
    assert clashing[i, j] == any(illegal[tag[i, k], tag[i, l]] for k, l in pairs)
  assert barred_all  # some word has every tag ruled out, and then none


def test_words_to_pieces_and_back():
  word = jnp.array([[-1, 0, 0, 1, 2, 2, -1], [-1, 0, -1, -1, -1, -1, -1]])
  first = jnp.array([[0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]], bool)
  values = jnp.arange(14.0).reshape(2, 7)
  np.testing.assert_array_equal(word_exit.first_pieces(word), first)
  words = word_exit.of_words(values, first, word, 4)
  np.testing.assert_array_equal(words, [[1, 3, 4, 0], [8, 0, 0, 0]])
  pieces = word_exit.to_pieces(words, word, 0.5)
  np.testing.assert_array_equal(pieces, [[0.5, 1, 1, 3, 4, 4, 0.5], [0.5, 8, 0.5, 0.5, 0.5, 0.5, 0.5]])
  deep = word_exit.of_words(jnp.stack([values, -values], -1), first, word, 3)
  np.testing.assert_array_equal(deep[0, :3], [[1, -1], [3, -3], [4, -4]])
  pieces = word_exit.to_pieces(deep, word, 0.0)
  np.testing.assert_array_equal(pieces[0, :4], [[0, 0], [1, -1], [1, -1], [3, -3]])


def test_settings_that_training_samples():
  windows, deltas = (5, 7, 9), (0.01, 0.05, 0.25)
  for seed in range(5):
    window, delta, exits = word_exit.sampled_settings(jax.random.key(seed), 20, windows, deltas)
    assert set(np.asarray(window).tolist()) <= set(windows)
    assert set(np.asarray(delta).tolist()) <= set(np.float32(deltas).tolist())
    assert int(exits.sum()) == 12  # 4 of 10 exit nowhere
    assert int((window == 5).sum()) >= 2 and int((delta == np.float32(0.25)).sum()) >= 2
  few = [word_exit.sampled_settings(jax.random.key(seed), 2, windows, deltas)[2] for seed in range(20)]
  assert 0.4 < np.mean(few) < 0.8  # a batch of two is not always one of those that exit nowhere
