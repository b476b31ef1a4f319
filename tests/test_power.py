"""PoWER-BERT against the vectors of its official code's transcription, a NumPy loop, and its three stages."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch
from tests.tiny_run import config as tiny_config
from tokenprune_jax import attention, models, train
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducers import power
from tokenprune_jax.reducers.topk import best

GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'power.npz')
BATCH = ragged_batch((14, 9, 5, 2, 1), 14)


@pytest.fixture(scope='module')
def score():
  mask = jnp.asarray(GOLDEN['key_mask'])
  parts = attention.soft_parts(jnp.asarray(GOLDEN['scores']), mask[:, None, None])
  # theirs counts padded queries too
  found = attention.read(*parts, jnp.ones_like(mask), ('received', 'own'))
  return power.significance(found['received'], found['own'])


def test_significance(score):
  live = GOLDEN['key_mask'] > 0
  heads = GOLDEN['scores'].shape[1]
  theirs = GOLDEN['significance'] / (heads if GOLDEN['significance'][live].sum() > live.sum() else 1)
  np.testing.assert_allclose(np.asarray(score)[live], theirs[live], atol=2e-6)


def test_soft_extract(score):
  live = jnp.asarray(GOLDEN['key_mask'] > 0)
  found = power.soft_extract(jnp.asarray(GOLDEN['x']), score, live, jnp.asarray(GOLDEN['soft_r']))
  np.testing.assert_allclose(np.asarray(found)[live], GOLDEN['soft_out'][np.asarray(live)], atol=1e-6)


def test_hard_extract_and_the_configuration(score):
  live = jnp.asarray(GOLDEN['key_mask'] > 0)
  first = jnp.arange(live.shape[1])[None] == 0
  for count in GOLDEN['ell']:
    stay = np.asarray(best(score, live, jnp.broadcast_to(first, live.shape), jnp.full(len(live), count)))
    for row, index in enumerate(GOLDEN[f'hard_l{count}_idx']):
      wanted = [j for j in index if live[row, j]]  # where a text has fewer tokens, theirs takes padding
      np.testing.assert_array_equal(np.flatnonzero(stay[row]), wanted)
  assert power.configuration(GOLDEN['config_r']) == tuple(GOLDEN['config_ell'].tolist())


def test_the_penalty_presses_deeper_layers_harder():
  r = GOLDEN['config_r']
  spec = {'name': 'power', 'mode': 'search', 'penalty': 1.0, 'slots': 14}
  model, params = model_and_params(spec)
  params['reducer']['retention']['r'] = jnp.asarray(r[:4])
  expected = sum((l + 1) * r[l].sum() for l in range(4))
  output = apply(model, params, BATCH)
  assert float(output.loss) == pytest.approx(expected, rel=1e-5)
  gradient = jax.grad(lambda r: model.apply(
    {'params': {**params, 'reducer': {'retention': {'r': r}}}}, jax.tree.map(jnp.asarray, BATCH)).loss)(
    jnp.full((4, 14), 1.5))  # fmt: skip
  # Beyond 1 it can come back.
  np.testing.assert_allclose(gradient, np.arange(1, 5)[:, None] * np.ones((4, 14)))


def test_at_the_start_the_search_is_the_plain_encoder():
  plain, own = model_and_params({'name': 'none'})
  model, params = model_and_params({'name': 'power', 'mode': 'search', 'slots': 20})
  params['reducer']['retention']['r'] = jnp.ones((4, 20))
  both = {**params, **own}
  np.testing.assert_allclose(apply(plain, own, BATCH).logits, apply(model, both, BATCH).logits, atol=1e-6)


@pytest.mark.parametrize('executor', ['mask', 'compact'])
def test_counts_hold_whatever_the_length(executor):
  model, params = model_and_params({'name': 'power', 'counts': (10, 6, 6, 2)}, executor=executor)
  rows = np.asarray(apply(model, params, BATCH).trace.rows)
  for length, found in zip((14, 9, 5, 2, 1), rows):
    np.testing.assert_array_equal(found, [min(length, count) for count in (10, 6, 6, 2)])


def test_a_search_hands_its_counts_on(tmp_path):
  wanted = tiny_config(reducer={'name': 'power', 'slots': 32, 'penalty': 0.02})
  wanted['optimizer']['groups'] = (('head/.*|reducer/.*', 100.0),)
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1, 'reducer': {'name': 'none'}},
    {'name': 'search', 'epochs': 1, 'init': 'tune', 'reducer': {'mode': 'search'}},
    {'name': 'retrain', 'epochs': 1, 'init': 'tune'},
  )
  outcome = train.run(wanted, tmp_path)
  found = outcome['stages']['search']['fields']['power']
  assert (
    found['mode'] == 'hard'
    and len(found['counts']) == 2
    and 1 <= found['counts'][1] <= found['counts'][0] < 32
  )
  assert outcome['mac_ratio'] < 1


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'mode': 'soft'}, "mode is 'soft'"),
    ({}, 'counts is empty'),
    ({'counts': (3, 2)}, 'counts needs 4 numbers'),
    ({'counts': (3, 2, 0, 0)}, 'counts needs 4 numbers of 1 or more'),
    ({'counts': (3, 4, 2, 2)}, 'they cannot rise'),
    ({'penalty': -1.0}, 'penalty is -1.0'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    models.make_reducer({'name': 'power', **fields}).check(4, 4)


def test_a_text_longer_than_the_search_knows_is_refused():
  model, params = model_and_params({'name': 'power', 'mode': 'search', 'slots': 8})
  with pytest.raises(UserError, match='slots is 8.*14 tokens'):
    model.apply({'params': params}, jax.tree.map(jnp.asarray, BATCH))
