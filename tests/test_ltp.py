"""LTP against NumPy loops and the official code's own numbers, and its budget."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch, requests
from tests.tiny_run import config as tiny_config
from tests.tiny_run import lines
from tokenprune_jax import (
  conversion,
  costs,
  families,
  flops,
  models,
  schedule,
  segments,
  serve,
  stages,
  train,
)
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs
from tokenprune_jax.reducers import ltp

GOLDEN = pathlib.Path(__file__).parent / 'golden'
OFFICIAL = {'score_norm': 'per_padded_token', 'soft_form': 'output', 'protect': False}
BATCH = ragged_batch((14, 9, 5, 2, 1), 14)
RNGS = {'dropout': jax.random.key(0), 'reduce': jax.random.key(1)}


def test_masks_are_those_of_the_official_pruner():
  g = np.load(GOLDEN / 'ltp_absolute_threshold.npz')
  valid = g['valid_mask'].astype(bool)
  received = (g['attention_probs'] * valid[:, None, :, None]).sum(2).mean(1)
  score = jnp.asarray(received / valid.shape[1])
  np.testing.assert_allclose(score, g['abs_scores'], atol=1e-6)
  for place, theta in enumerate(g['abs_threshold']):
    column = jnp.full((len(score), 1), theta)
    if place:  # the first layer's threshold is 0, and there the official pruner returns early
      np.testing.assert_array_equal(ltp.hard_mask(score, column) * valid, g['abs_keep'][place])
    for number, temperature in enumerate(g['temperatures']):
      soft = ltp.soft_mask(score, column, float(temperature))
      np.testing.assert_allclose(soft, g['abs_soft_mask'][place, number], atol=1e-5)


@pytest.fixture(scope='module')
def official():
  """(vectors, config, parameters, batch) of the official model."""
  g = np.load(GOLDEN / 'ltp_model.npz')
  tensors = {
    name.removeprefix('param.').replace('ibert.', 'roberta.'): g[name]
    for name in g.files
    if name.startswith('param.') and 'pruner' not in name
  }
  words, width = tensors['roberta.embeddings.word_embeddings.weight'].shape
  shape = EncoderConfig(
    family='roberta', vocab_size=words, width=width, depth=4, heads=int(g['num_heads']), hidden=64,
    max_positions=len(tensors['roberta.embeddings.position_embeddings.weight']),
    type_vocab=len(tensors['roberta.embeddings.token_type_embeddings.weight']), position_offset=2, pad_id=1,
    norm_eps=float(g['layer_norm_eps']), dropout=0.0, attention_dropout=0.0, group_slots=0,
  )  # fmt: skip
  params = conversion.to_params(shape, tensors, dict.fromkeys(tensors, 'golden'), 'golden', families.TEXTS)
  params = jax.tree.map(jnp.asarray, params)
  params['reducer'] = {'learned': {'delta': jnp.asarray(g['threshold_delta'] * 128)}}
  mask = g['attention_mask'].astype(bool)
  return g, shape, params, {'ids': g['input_ids'], 'mask': mask, 'types': np.zeros_like(g['input_ids'])}


def model_of(official, **fields):
  g, shape, *_ = official
  spec = {'name': 'ltp', 'threshold': float(g['final_token_threshold']), **OFFICIAL, **fields}
  return models.Classifier(shape, models.make_reducer(spec), 3, readout='cls', head='family')


def test_the_cascade_keeps_and_counts_what_the_official_model_does(official):
  _, shape, params, batch = official
  g = np.load(GOLDEN / 'ltp_topk.npz')
  spec = {'name': 'topk', 'shares': schedule.cascade(0.5, 4), 'score': 'cumulative', 'rounding': 'nearest'}
  model = models.Classifier(shape, models.make_reducer(spec), 3, readout='cls', head='family').check()
  output = apply(model, params, batch)
  np.testing.assert_allclose(output.logits, g['topk_eval.logits'], atol=1e-5)
  np.testing.assert_array_equal(np.asarray(output.trace.rows).T, g['topk_eval.n_ffn'])


def test_the_hard_model_keeps_and_counts_what_the_official_one_does(official):
  g, shape, params, batch = official
  plain = apply(model_of(official, threshold=0.0, scale=0.0), params, batch)
  np.testing.assert_allclose(plain.logits, g['noprune_eval.logits'], atol=1e-4)
  # A read-out of [CLS] would protect it; the official code computes an answer from a [CLS] that it has dropped.
  output = apply(model_of(official).clone(readout='mean'), params, batch)
  theirs = g['hard_eval.keep_after_layer']
  for layer in range(3):  # the trace has what a layer attends to: what the one before has left
    np.testing.assert_array_equal(np.asarray(output.trace.kept)[:, layer + 1], theirs[layer])
  np.testing.assert_array_equal(output.trace.queries.T, g['hard_eval.n_attn'])
  np.testing.assert_array_equal(output.trace.rows.T, g['hard_eval.n_ffn'])
  # Their counter takes it for granted, and says multiply-adds.
  wide = dataclasses.replace(shape, hidden=4 * shape.width)
  macs = flops.by_convention('ltp', wide, 3, 'family', output.trace, 12) / 2
  np.testing.assert_allclose(macs, g['hard_eval.macs'])


@pytest.mark.parametrize('temperature', [0.01, 0.05])
def test_the_soft_model_and_the_gradient_of_its_thresholds(official, temperature):
  g, _, params, batch = official
  batch = jax.tree.map(jnp.asarray, batch)
  tag = f'soft_train_T{temperature}'
  model = model_of(official, mode='soft', temperature=temperature, weight=float(g[f'{tag}.lambda']))

  def total(reducer):
    output = model.apply({'params': {**params, 'reducer': reducer}}, batch, train=True, rngs=RNGS)
    task = -jnp.take_along_axis(
      jax.nn.log_softmax(output.logits), jnp.asarray(g['labels'])[:, None], 1
    ).mean()
    return task + output.loss, output

  (loss, output), gradient = jax.value_and_grad(total, has_aux=True)(params['reducer'])
  np.testing.assert_allclose(output.logits, g[f'{tag}.logits'], atol=1e-4)
  np.testing.assert_allclose(output.loss, g[f'{tag}.regularizer'] * g[f'{tag}.lambda'], atol=1e-5)
  np.testing.assert_allclose(loss, g[f'{tag}.total_loss'], atol=1e-4)
  np.testing.assert_allclose(
    gradient['learned']['delta'] * 128, g[f'{tag}.grad_threshold_delta'], rtol=2e-3, atol=1e-3
  )


def kept_by_a_loop(received, thresholds):
  """Which tokens of one example a layer keeps; received: by token, mean over heads; the first one is protected."""
  return [j == 0 or score / 128 >= max(thresholds, 1e-5) for j, score in enumerate(received)]


@pytest.mark.parametrize('first', [False, True])
def test_a_layer_keeps_what_the_rule_says(first):
  model, params = model_and_params({'name': 'ltp', 'threshold': 0.015, 'first_layer': first})
  encoder = segments.make_encoder(model).clone(executor='mask')
  variables = {'params': segments.encoder_params(params)}
  inputs = Inputs(
    *(jnp.asarray(BATCH[name]) for name in ('ids', 'mask', 'types')), {}, labels=3, encoder=model.config
  )
  tokens, memory = encoder.apply(variables, inputs, method='begin')
  delta, left = np.asarray(params['reducer']['learned']['delta']) / 128, []
  for half in encoder.halves():
    before = np.asarray(tokens.updated)
    if half.attention:
      read = ('received',)
      _, evidence, _ = encoder.apply(
        variables,
        tokens,
        None,
        read,
        False,
        method=lambda e, *given, l=half.layer: e.block[str(l)].attend(*given),
      )
      received = np.asarray(evidence.received).mean(1)
    tokens, memory, *_ = encoder.apply(variables, tokens, memory, None, half, method='advance')
    if half.attention and (half.layer > 1 or first):
      theta = 0.015 * (half.layer - (not first)) / 4 + delta[half.layer - 1]
      for row in range(len(before)):
        alive = before[row] > 0
        expected = np.array(kept_by_a_loop(received[row], theta)) & alive
        np.testing.assert_array_equal(np.asarray(tokens.updated[row]) > 0, expected)
      left.append(float(tokens.updated.sum()))
  assert len(left) == 3 + first and BATCH['mask'].sum() >= left[0] > left[-1] > 0


def test_executors_agree_where_the_first_layer_prunes():
  model, params = model_and_params({'name': 'ltp', 'threshold': 0.03, 'first_layer': True})
  expected = apply(model, params, BATCH)
  assert (np.asarray(expected.trace.rows)[:, 0] < BATCH['mask'].sum(1)).any()
  compact = apply(model.clone(executor='compact'), params, BATCH)
  np.testing.assert_allclose(compact.logits, expected.logits, atol=1e-4)
  with serve.Server(model, params, ladder=serve.Ladder((8, 16), batch_tokens=32)) as server:
    answers = list(server.map(requests(BATCH)))
  np.testing.assert_allclose([answer.logits for answer in answers], expected.logits, atol=1e-4)
  np.testing.assert_allclose([answer.macs for answer in answers], expected.macs, rtol=1e-5)


def test_the_hard_mask_is_the_limit_of_the_soft_one():
  hard, params = model_and_params({'name': 'ltp', 'threshold': 0.015})
  soft, _ = model_and_params({'name': 'ltp', 'threshold': 0.015, 'mode': 'soft', 'temperature': 1e-9})
  expected = apply(hard, params, BATCH)
  trained = apply(soft, params, BATCH, train=True, rngs=RNGS)
  np.testing.assert_allclose(trained.logits, expected.logits, atol=1e-4)
  np.testing.assert_allclose(trained.macs, expected.macs, rtol=1e-5)
  outside = apply(soft.clone(reducer=soft.reducer.clone(temperature=0.1)), params, BATCH)
  np.testing.assert_allclose(outside.logits, expected.logits, atol=1e-4)  # validation sees hard masks


def test_masks_are_pushed_down_in_received_units_whatever_the_padding():
  model, params = model_and_params({'name': 'ltp', 'mode': 'soft', 'threshold': 0.015})
  loss = apply(model, params, BATCH, train=True, rngs=RNGS).loss
  wider = {name: np.pad(values, ((0, 0), (0, 6))) for name, values in BATCH.items()}
  np.testing.assert_allclose(apply(model, params, wider, train=True, rngs=RNGS).loss, loss, rtol=1e-5)
  assert 0 < float(loss) < 0.1 * 3


def test_a_budget_has_the_value_of_hard_masks_and_a_gradient_that_lowers_it():
  spec = {
    'name': 'ltp',
    'mode': 'soft',
    'target_macs': 0.4,
    'weight': 2.0,
    'temperature': 5e-3,
    'threshold': 0.01,
  }
  model, params = model_and_params(spec)

  def run(delta):
    given = {**params, 'reducer': {'learned': {'delta': delta}}}
    return apply(model, given, BATCH, train=True, rngs=RNGS)

  delta = params['reducer']['learned']['delta']
  output = run(delta)
  ratio = float(output.macs.sum() / output.dense_macs.sum())
  hard = apply(model, params, BATCH)
  assert ratio == pytest.approx(float(hard.macs.sum() / hard.dense_macs.sum()), rel=1e-5) and ratio > 0.5
  assert float(output.loss) == pytest.approx(2 * (ratio - 0.4) ** 2, rel=1e-4)
  for _ in range(60):
    delta = delta - 0.2 * jax.grad(lambda delta: run(delta).loss)(delta)
  found = run(delta)
  assert abs(float(found.macs.sum() / found.dense_macs.sum()) - 0.4) < 0.1


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_under_a_budget_scores_get_a_share_of_the_gradient(share):
  spec = {'name': 'ltp', 'mode': 'soft', 'target_macs': 0.4, 'threshold': 0.01, 'score_gradient': share}
  model, params = model_and_params(spec)
  slopes = jax.grad(lambda params: apply(model, params, BATCH, train=True, rngs=RNGS).loss)(params)
  assert np.asarray(slopes['reducer']['learned']['delta']).any()
  assert any(np.asarray(slope).any() for slope in jax.tree.leaves(slopes['encoder'])) == (share > 0)


@pytest.mark.parametrize('first_layer', [False, True])
def test_below_what_it_was_trained_for_the_first_layer_that_prunes_gives_more(first_layer):
  spec = {'name': 'ltp', 'threshold': 0.014, 'target_macs': 0.8, 'first_layer': first_layer}
  model, params = model_and_params(spec)
  batch = {**ragged_batch((30, 24, 20, 14), 30), 'weight': np.ones(4, np.float32)}
  forward = jax.jit(stages.forward(model))
  validation = costs.Validation(lambda batch: forward(params, batch), lambda: [batch], dict, model.config)
  trained = validation.mac_ratio({})
  cheaper = stages.at_budget(spec, trained - 0.1, validation)
  assert cheaper['floor'] > 0 and cheaper['scale'] == 1.0
  dearer = stages.at_budget(cheaper, trained + 0.05, validation)
  assert dearer['floor'] == 0.0 and dearer['scale'] < 1.0
  before, after = (
    np.asarray(forward(params, costs.with_controls(batch, {'floor': floor})).trace.keys.mean(0))
    for floor in (0.0, cheaper['floor'])
  )
  first = 1 if first_layer else 2  # layers that attend to all tokens
  np.testing.assert_array_equal(after[:first], before[:first])
  assert after[first] < before[first]
  # Without a budget of its own, a model is set by its scale alone.
  assert stages.at_budget({**spec, 'target_macs': 0.0}, trained - 0.1, validation)['floor'] == 0.0


def test_a_part_of_a_batch_that_is_all_filler_has_a_loss_and_a_gradient():
  model, params = model_and_params({'name': 'ltp', 'mode': 'soft', 'target_macs': 0.5})
  batch = {name: np.zeros_like(values) for name, values in ragged_batch((5, 3), 8).items()}

  def loss(params):
    return model.apply({'params': params}, jax.tree.map(jnp.asarray, batch), train=True, rngs=RNGS).loss

  value, slopes = jax.value_and_grad(loss)(params)
  assert np.isfinite(float(value)) and all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(slopes))


def test_a_budget_out_of_reach_leaves_the_model_as_it_was_trained(capsys):
  class Whole(costs.Validation):
    def mac_ratio(self, controls):
      return 0.9

    def calibrated(self, fields, count, controls):
      return {'capacities': (1.0,) * 4}

  spec = {'name': 'ltp', 'target_macs': 0.5, 'scale': 1.0}
  assert stages.finish(spec, Whole(lambda batch: None, list)) == {'ltp': {'capacities': (1.0,) * 4}}
  assert 'at least 0.900 of the dense' in capsys.readouterr().err


def test_three_stages_meet_the_budget_on_validation(tmp_path):
  wanted = tiny_config(
    reducer={'name': 'ltp', 'target_macs': 0.6, 'weight': 1.0, 'temperature': 5e-3},
    model__weights='random:bert:layers=4,width=32,heads=2,hidden=64,vocab=256',
  )
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1, 'reducer': {'name': 'none'}},
    {'name': 'soft', 'epochs': 1, 'init': 'tune', 'reducer': {'mode': 'soft'}},
    {'name': 'hard', 'epochs': 1, 'init': 'soft', 'train': 'encoder/.*|head/.*', 'reducer': {'mode': 'hard'}},
  )
  outcome = train.run(wanted, tmp_path)
  assert outcome['stages']['hard']['fields']['ltp']['scale'] > 0
  assert outcome['mac_ratio'] == pytest.approx(0.6, abs=0.06)  # on other documents than it was calibrated on
  assert {row['stage'] for row in lines(tmp_path, 'train')} == {'tune', 'soft', 'hard'}


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'target_macs': 1.2}, 'target_macs is 1.2'),
    ({'target_macs': -0.1}, 'target_macs is -0.1'),
    ({'target_macs': 0.1}, 'cannot reach.*at least 0.33'),
    ({'target_macs': 0.05, 'first_layer': True}, 'cannot reach.*at least 0.08'),
    ({'temperature': 0.0}, 'temperature is 0.0'),
    ({'mode': 'weak'}, "mode is 'weak'; choose one of hard, soft"),
    ({'score_norm': 'mean'}, "score_norm is 'mean'"),
    ({'soft_form': 'no'}, "soft_form is 'no'"),
    ({'scale': -1.0}, 'scale is -1.0'),
    ({'score_gradient': 1.5}, 'score_gradient is 1.5; expected a share'),
    ({'floor': -1.0}, 'floor is -1.0'),
    ({'capacities': (0.5,)}, 'capacities needs 4 shares'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    models.make_reducer({'name': 'ltp', **fields}).check(4, 4)
