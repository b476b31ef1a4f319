"""Exits of words and sentences against the released model, and their limits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenprune_jax import conversion, families
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.reducer import Inputs
from tokenprune_jax.reducers import tokee
from tokenprune_jax.reducers.tokee import Method

G = np.load(pathlib.Path(__file__).parent / 'golden' / 'tokee_model.npz')
LABELS, DEPTH = int(G['num_tags']), 6


def shape():
  words, width = G['param.embeddings.word_embeddings.weight'].shape
  return EncoderConfig(
    vocab_size=words, width=width, depth=DEPTH, heads=int(G['num_heads']), group_slots=0, dropout=0.0,
    hidden=len(G['param.encoder.layer.0.intermediate.dense.weight']), attention_dropout=0.0,
    max_positions=len(G['param.embeddings.position_embeddings.weight']), norm_eps=float(G['layer_norm_eps']),
  )  # fmt: skip


def official(method):
  """(encoder, its parameters, weights of the last classifier)."""
  tensors = {
    'bert.' + key.removeprefix('param.'): G[key]
    for key in G.files if key.startswith('param.') and 'classifier' not in key
  }  # fmt: skip
  params = conversion.to_params(
    shape(), tensors, dict.fromkeys(tensors, 'tokee'), 'tokee', families.BACKBONE
  )['encoder']
  heads = [(G[f'param.classifier.{l}.w.weight'].T, G[f'param.classifier.{l}.w.bias']) for l in range(DEPTH)]
  params['reducer'] = {
    f'exit_{l}': {'out': {'kernel': kernel, 'bias': bias}} for l, (kernel, bias) in enumerate(heads[:-1], 1)
  }
  return Encoder(shape(), method), jax.tree.map(jnp.asarray, params), heads[-1]


def sentence():
  ids = G['s0.input_ids'][None]
  first = G['s0.first_word_pieces_pos']
  count = G['s0.word_piece_num']
  word = np.full(ids.shape, -1, np.int32)
  for j, (start, pieces) in enumerate(zip(first, count)):
    word[0, start : start + pieces] = j
  return ids, word, first


def answers(method, padding=0):
  """(logits of each word where it exited, exit layers from 0, logits of all exits [l w c])."""
  ids, word, first = sentence()
  encoder, params, (kernel, bias) = official(method)
  room = ((0, 0), (0, padding))
  mask = np.pad(np.ones_like(ids, bool), room)
  ids, word = np.pad(ids, room), np.pad(word, room, constant_values=-1)

  @jax.jit
  def run(ids, mask, word):
    inputs = Inputs(ids, mask, jnp.zeros_like(ids), {}, LABELS, shape(), words=word)
    return encoder.apply({'params': params}, inputs)

  tokens, memory, _ = run(ids, mask, word)
  last = tokens.x[0, first] @ kernel + bias
  count = len(first)
  done = memory['answered'][0, first]
  logits = jnp.where(done[:, None], memory['prediction'][0, first], last)
  layers = jnp.where(done, memory['word_exit'][0, :count] - 1, DEPTH - 1)
  return logits, layers, memory['logits'][0, :, :count]


@pytest.mark.parametrize('window', [1, 3, 5])
@pytest.mark.parametrize(
  ('keep_norm', 'copied', 'padding'), [(0, 'all', 0), (0, 'all', 4), (1, 'all', 0), (1, 'first', 4)]
)
def test_official_exits_of_words(window, keep_norm, copied, padding):
  name = f's0.t_level_win_ee_copy.w{window}.kns{keep_norm}.{copied}'
  lower, upper = G[f'{name}.threshold_per_layer'][[0, -1]]
  logits, layers, found = answers(Method(
    layers=tuple(range(1, DEPTH)), threshold=float(lower), upper=2.0, cap=float(upper), window=window, copied=copied,
    keep_norm=bool(keep_norm),
  ), padding)  # fmt: skip
  np.testing.assert_array_equal(layers, G[f'{name}.exit_layer'])
  np.testing.assert_allclose(logits, G[f'{name}.pred_logits'], atol=1e-4)
  executed = G[f'{name}.logits_per_executed_layer']
  for layer in range(min(len(executed), DEPTH - 1)):
    np.testing.assert_allclose(found[layer], executed[layer], atol=1e-4)


def test_the_upper_half_has_a_threshold_of_its_own():
  every, above = tuple(range(1, DEPTH)), tuple(range(DEPTH // 2 + 1, DEPTH))
  _, layers, _ = answers(Method(layers=every, threshold=1e-6, upper=2e6, window=1))
  assert set(layers.tolist()) == {DEPTH // 2}  # the first of the upper half, counted from 0
  _, layers, _ = answers(Method(layers=above, threshold=1.1, upper=0.0, window=1))
  assert set(layers.tolist()) == {DEPTH - 1}


@pytest.mark.parametrize(
  ('criterion', 'pool', 'delta'),
  [('entropy', 'max', 0.3), ('entropy', 'max', 0.6), ('entropy', 'max', 0.8), ('max_p', 'max', 0.5),
   ('entropy', 'avg', 0.3), ('entropy', 'avg', 0.6), ('entropy', 'avg', 0.8), ('max_p', 'avg', 0.5)],
)  # fmt: skip
def test_official_exits_of_sentences(criterion, pool, delta):
  name = f's0.s_level.{criterion}.{pool}.d{delta}'
  logits, layers, _ = answers(Method(
    layers=tuple(range(1, DEPTH)), level='sentence', threshold=delta, upper=1.0,
    criterion='entropy' if criterion == 'entropy' else 'max_probability', pool='max' if pool == 'max' else 'mean',
  ))  # fmt: skip
  assert set(layers.tolist()) == {int(G[f'{name}.exit_layer'])}
  expected = G[f'{name}.output']
  last = int(layers[0]) == DEPTH - 1
  found = jax.nn.softmax(logits) if criterion == 'max_p' and not last else logits
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_training_samples_twice_the_threshold_in_the_upper_half(monkeypatch):
  monkeypatch.setattr(tokee, 'DELTAS', (0.1,))
  doubt = jnp.full((6, 40, 3), 0.15)  # between one threshold and the other
  found = tokee.sampled_exits(jax.random.key(0), doubt, jnp.ones((40, 3), bool))
  assert np.unique(np.asarray(found)).tolist() == [4, 6]
  monkeypatch.setattr(tokee, 'DELTAS', (0.4,))  # twice that is above the cap
  found = tokee.sampled_exits(jax.random.key(0), jnp.full((6, 40, 3), 0.6), jnp.ones((40, 3), bool))
  assert np.unique(np.asarray(found)).tolist() == [6]
