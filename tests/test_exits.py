"""Early exits against the official classifiers and models, NumPy loops and their limits."""

import dataclasses
import pathlib
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, model_and_params, ragged_batch
from tests.tiny_run import config as tiny_config
from tests.tiny_run import lines
from tokenprune_jax import conversion, costs, exit_heads, families, models, stages, train
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducers import early_exit

sys.path.insert(0, '.')  # configs is no part of the installed package

from configs import imdb_exits, imdb_pyramid

GOLDEN = pathlib.Path(__file__).parent / 'golden'
LENGTHS = (14, 9, 5, 2, 1)
BATCH = {
  **ragged_batch(LENGTHS, 14),
  'label': np.arange(5, dtype=np.int32) % 3,
  'weight': np.ones(5, np.float32),
}
RNGS = {'dropout': jax.random.key(0), 'reduce': jax.random.key(1)}


def dense(g, name):
  return {'kernel': jnp.asarray(g[f'{name}.weight'].T), 'bias': jnp.asarray(g[f'{name}.bias'])}


# ------------------------------------------------------------------------------------------------- Official code
def test_fastberts_classifier():
  g = np.load(GOLDEN / 'fastbert.npz')
  names = ('query', 'key', 'value')
  params = {name: dense(g, f'param.self_atten.linear_layers.{i}') for i, name in enumerate(names)}
  params |= {'narrow': dense(g, 'param.output_layer_0'), 'output': dense(g, 'param.self_atten.final_linear')}
  params |= {'hidden': dense(g, 'param.output_layer_1'), 'out': dense(g, 'param.output_layer_2')}
  live = jnp.asarray(g['attention_mask'] > 0)
  logits = exit_heads.Attention().apply({'params': params}, jnp.asarray(g['hidden']), live, 4)
  np.testing.assert_allclose(logits, g['logits'], atol=1e-4)
  np.testing.assert_allclose(early_exit.uncertainty(logits), g['uncertainty'], atol=1e-5)
  found = early_exit.uncertainty(jnp.asarray(g['entropy_logits']))
  np.testing.assert_allclose(found, g['entropy_normalized'], atol=1e-5)


def test_fastberts_exits_by_speed():
  g = np.load(GOLDEN / 'fastbert.npz')
  logits = jnp.asarray(g['model.all_logits'])
  for speed, expected in zip(g['model.speeds'], g['model.exit_layer']):
    sure = [
      early_exit.is_sure('entropy', layer, jnp.full(3, speed), jnp.zeros(3, jnp.int32)) for layer in logits
    ]
    sure[-1] = jnp.ones(3, bool)
    np.testing.assert_array_equal(np.argmax(np.stack(sure), 0), expected)


@pytest.fixture(scope='module')
def official():
  """(name) -> (vectors, encoder's config, its parameters, batch)."""

  def read(name):
    g = np.load(GOLDEN / f'{name}.npz')
    prefix = 'param.bert_model.' if name == 'sledgehammer' else 'param.bert.'
    tensors = {
      'bert.' + key.removeprefix(prefix): g[key]
      for key in g.files if key.startswith(prefix) and 'highway' not in key and 'pooler' not in key
    }  # fmt: skip
    width = g[f'{prefix}embeddings.word_embeddings.weight'].shape[1]
    shape = EncoderConfig(
      vocab_size=len(g[f'{prefix}embeddings.word_embeddings.weight']), width=width, depth=4, heads=int(g['num_heads']),
      hidden=len(g[f'{prefix}encoder.layer.0.intermediate.dense.weight']), group_slots=0, dropout=0.0, attention_dropout=0.0,
      max_positions=len(g[f'{prefix}embeddings.position_embeddings.weight']), norm_eps=float(g['layer_norm_eps']),
    )  # fmt: skip
    found = conversion.to_params(shape, tensors, dict.fromkeys(tensors, name), name, families.BACKBONE)
    batch = {'ids': g['input_ids'], 'mask': g['attention_mask'] > 0, 'types': g['token_type_ids']}
    return g, shape, jax.tree.map(jnp.asarray, found['encoder']), jax.tree.map(jnp.asarray, batch)

  return read


def model_of(shape, **fields):
  spec = {'name': 'early_exit', 'layers': (1, 2, 3), 'threshold': 0.0, **fields}
  return models.Classifier(shape, models.make_reducer(spec), 3, readout='cls').check()


def test_deebert_leaves_where_the_official_model_does(official):
  g, shape, encoder, batch = official('deebert')
  ramps = {
    f'exit_{l}': {
      'pooler': dense(g, f'param.bert.encoder.highway.{l - 1}.pooler.dense'),
      'out': dense(g, f'param.bert.encoder.highway.{l - 1}.classifier'),
    }
    for l in (1, 2, 3)
  }
  model = model_of(shape, head='pooled')
  head = {'out': {'kernel': jnp.zeros((shape.width, 3)), 'bias': jnp.zeros(3)}}  # theirs reads a pooler
  params = {'encoder': encoder, 'reducer': ramps, 'head': head}
  output = apply(model, params, batch)
  np.testing.assert_allclose(output.exits.swapaxes(0, 1), g['all_highway_logits'][:3], atol=1e-4)
  np.testing.assert_allclose(
    early_exit.uncertainty(output.exits).T * np.log(3), g['all_highway_entropy'][:3], atol=1e-4
  )
  for threshold, layers, logits in zip(g['thresholds'], g['exit_layer_1based'], g['exit_logits']):
    if threshold < 0:
      continue
    controls = {'exit_threshold': jnp.full(3, threshold / np.log(3), jnp.float32)}
    found = apply(model, params, {**batch, 'controls': controls})
    ran = (np.asarray(found.trace.rows) > 0).sum(-1)
    np.testing.assert_array_equal(ran, layers)
    np.testing.assert_allclose(np.asarray(found.logits)[layers < 4], logits[layers < 4], atol=1e-4)


def test_sledgehammers_exits_read_all_layers_so_far(official):
  g, shape, encoder, batch = official('sledgehammer')
  exits = {
    f'exit_{l}': {
      'weights': 3.0 * jnp.asarray(g[f'param._sum_weights.{i}']),  # of any length: the norm is taken out
      'out': dense(g, f'param._classification_layers.{i}'),
    }
    for i, l in enumerate((1, 3))
  }
  reducer = {**exits, 'pooler': {'dense': dense(g, 'param.bert_model.pooler.dense')}}
  temperatures = tuple(g['temperatures'][:2].tolist())
  model = model_of(shape, head='mixed', layers=(1, 3), temperatures=temperatures, criterion='max_probability')
  head = {'out': {'kernel': jnp.zeros((shape.width, 3)), 'bias': jnp.zeros(3)}}
  params = {'encoder': encoder, 'reducer': reducer, 'head': head}
  controls = {'exit_threshold': jnp.ones(3)}
  output = apply(model, params, {**batch, 'controls': controls})
  by_exit = np.asarray(output.exits).swapaxes(0, 1)
  expected = g['all_logits_div_T'][:2]
  np.testing.assert_allclose(by_exit, expected, atol=1e-4)
  for threshold, exits_at in zip(g['thresholds'], g['exit_classifier_1based']):
    controls = {'exit_threshold': jnp.full(3, threshold)}
    ran = (np.asarray(apply(model, params, {**batch, 'controls': controls}).trace.rows) > 0).sum(-1)
    np.testing.assert_array_equal(ran, np.array([0, 1, 3, 4])[exits_at])


# ------------------------------------------------------------------------------------------------------ Rules
def test_patience_counts_answers_in_a_row():
  spec = {'name': 'early_exit', 'layers': (1, 2, 3, 4, 5), 'criterion': 'patience', 'threshold': 2.0}
  model, params = model_and_params(spec, dataclasses.replace(TINY_CONFIG, depth=6))
  begun_again = False
  for patience in (1.0, 2.0, 3.0):
    controls = {'exit_threshold': np.full(5, patience, np.float32)}
    output = apply(model, params, {**BATCH, 'controls': controls})
    never = apply(model, params, {**BATCH, 'controls': {'exit_threshold': np.full(5, 99, np.float32)}})
    answers = np.asarray(never.exits).argmax(-1)
    for row in range(5):
      same = answers[row, 1:] == answers[row, :-1]
      streak, left = 0, 6
      for l in range(1, 5):
        streak = streak + 1 if answers[row, l] == answers[row, l - 1] else 0
        if streak >= patience:
          left = l + 1
          break
      begun_again |= left == 6 and same.sum() >= patience
      assert (np.asarray(output.trace.rows)[row] > 0).sum() == left
  assert begun_again  # some agree often enough, but not in a row


@pytest.mark.parametrize('head', exit_heads.HEADS)
@pytest.mark.parametrize('criterion', early_exit.NEVER)
def test_limits(head, criterion):
  """Nobody leaves: the dense model. All leave: the first exit, and one layer."""
  spec = {'name': 'early_exit', 'layers': (1, 3), 'head': head, 'criterion': criterion, 'threshold': 1.0}
  model, params = model_and_params(spec, readout='cls')
  plain, _ = model_and_params({'name': 'none'}, readout='cls')
  never = {'exit_threshold': np.full(5, early_exit.NEVER[criterion], np.float32)}
  found = apply(model, params, {**BATCH, 'controls': never})
  expected = apply(plain, {k: v for k, v in params.items() if k != 'reducer'}, BATCH)
  np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
  overhead = np.asarray(found.macs - expected.macs)
  assert (overhead > 0).all()
  if criterion == 'patience':
    return  # the first exit has nothing to agree with
  always = {'exit_threshold': np.full(5, -1.0 if criterion == 'max_probability' else 1.1, np.float32)}
  output = apply(model, params, {**BATCH, 'controls': always})
  np.testing.assert_allclose(output.logits, output.exits[:, 0], atol=1e-6)
  np.testing.assert_array_equal((np.asarray(output.trace.rows) > 0).sum(-1), 1)


@pytest.mark.parametrize(
  'other',
  [
    {'name': 'fuzzy', 'ratio': 0.7},
    {'name': 'ltp', 'threshold': 0.015},
    {'name': 'sttabt', 'mode': 'topk', 'keep': 0.4},
  ],
  ids=lambda other: other['name'],
)
def test_exits_chain_with_what_prunes(other):
  """Both executors agree, and pruning and exits each save something."""
  spec = {'name': 'chain', 'reducers': (other, {'name': 'early_exit', 'layers': (1, 3), 'threshold': 0.9})}
  model, params = model_and_params(spec, readout='cls')

  def run(threshold, executor='mask'):
    controls = {'exit_threshold': np.full(5, threshold, np.float32)}
    return apply(model.clone(executor=executor), params, {**BATCH, 'controls': controls})

  never = run(0.0)
  middle = float(np.median(early_exit.uncertainty(never.exits[:, 0]))) + 1e-3
  masked, compact = run(middle), run(middle, 'compact')
  np.testing.assert_allclose(masked.logits, compact.logits, atol=1e-4)
  np.testing.assert_allclose(masked.macs, compact.macs, rtol=1e-5)
  assert (np.asarray(masked.macs < never.macs - 1)).sum() >= 3  # those that left at the first exit
  kept = np.asarray(never.trace.kept)[:3, 3].sum(-1)
  assert (kept < np.array(LENGTHS[:3])).all()


@pytest.mark.parametrize('pruned', [False, True], ids=['alone', 'behind ltp'])
@pytest.mark.parametrize('head', exit_heads.HEADS)
@pytest.mark.parametrize('criterion', ['entropy', 'max_probability'])
def test_thresholds_cost_what_a_pass_of_their_own_says(head, criterion, pruned):
  """Found from one pass in which nobody leaves."""
  spec = exits = {
    'name': 'early_exit',
    'layers': (1, 3),
    'head': head,
    'criterion': criterion,
    'threshold': 1.0,
  }
  if pruned:
    spec = {'name': 'chain', 'reducers': ({'name': 'ltp', 'threshold': 0.015}, exits)}
  model, params = model_and_params(spec, readout='cls')
  batch = {**BATCH, 'weight': np.array([1, 1, 0, 1, 1], np.float32)}  # one of them only fills
  forward = jax.jit(stages.forward(model))
  validation = costs.Validation(lambda b: forward(params, b), lambda: [batch], encoder=model.config)
  cost = early_exit.cost_by_threshold(exits, validation)
  never = {'exit_threshold': np.full(5, early_exit.NEVER[criterion], np.float32)}
  logits = forward(params, {**batch, 'controls': never}).exits
  said = early_exit.uncertainty(logits) if criterion == 'entropy' else jax.nn.softmax(logits).max(-1)
  thresholds = (np.quantile(np.asarray(said), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)) + 1e-5).tolist()
  reached = [cost(threshold) for threshold in thresholds]
  passes = [validation.mac_ratio({'exit_threshold': threshold}) for threshold in thresholds]
  np.testing.assert_allclose(reached, passes, rtol=0.02 if head == 'mixed' else 1e-4)
  assert len(set(np.round(reached, 4))) > 2


def test_without_exits_no_budget_is_met():
  spec = {'name': 'early_exit', 'layers': (), 'criterion': 'entropy', 'threshold': 0.0}
  model, params = model_and_params(spec, readout='cls')
  forward = jax.jit(stages.forward(model))
  batch = {**BATCH, 'weight': np.ones(5, np.float32)}
  validation = costs.Validation(lambda b: forward(params, b), lambda: [batch], encoder=model.config)
  with pytest.raises(UserError, match='the budget is 0.5, but'):
    early_exit.at_budget(spec, 0.5, validation)


def test_what_an_exit_costs():
  counts = jnp.array([7.0, 1.0])
  found = exit_heads.macs('attention', 32, 3, counts)
  w = exit_heads.WIDTH
  expected = [n * 32 * w + 2 * n * w * w + 2 * n * w + w * w + w * w + w * w + w * 3 for n in counts]
  np.testing.assert_allclose(found, expected)
  assert exit_heads.macs('pooled', 32, 3, counts)[0] == 32 * 32 + 32 * 3
  assert exit_heads.mixed_macs(32, 0) == 32 * 32


# --------------------------------------------------------------------------------------------------- Training
def loops(found, last, labels):
  """The objectives by loops: [exits, reverse, labels, sum, joint]."""
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (np.float64(last), np.float64(found)))
  b, e, _ = q.shape
  forward = np.mean([sum((p[i] * np.log(p[i] / q[i, j])).sum() for j in range(e)) for i in range(b)])
  reverse = np.mean([sum((q[i, j] * np.log(q[i, j] / p[i])).sum() for j in range(e)) for i in range(b)])
  cross = [-np.mean([np.log(q[i, j, labels[i]]) for i in range(b)]) for j in range(e)]
  task = -np.mean([np.log(p[i, labels[i]]) for i in range(b)])
  joint = sum((j + 1) * loss for j, loss in enumerate([*cross, task])) / sum(range(1, e + 2))
  return {
    'exits': forward,
    'exits_reverse': reverse,
    'exits_labels': sum(cross),
    'exits_sum': sum(cross) + task,
    'exits_joint': joint,
  }


def test_objectives():
  model, params = model_and_params({'name': 'early_exit', 'layers': (1, 3)})
  batch = jax.tree.map(jnp.asarray, BATCH)

  def forward(params, batch, rng=None):
    return model.apply({'params': params}, batch, train=True, rngs=RNGS)

  output = forward(params, batch)
  expected = loops(output.exits, output.logits, BATCH['label'])
  for name, objective in early_exit.OBJECTIVES.items():
    loss, _ = objective(forward, params, batch, None, None)
    assert float(loss) == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize('head', exit_heads.HEADS)
def test_an_exit_of_its_own_segment_leaves_lower_layers_alone(head):
  batch = jax.tree.map(jnp.asarray, BATCH)
  moved = {}
  for own in (False, True):
    spec = {'name': 'early_exit', 'head': head, 'layers': (1, 3), 'own_segment': own}
    model, params = model_and_params(spec)

    def loss(encoder, exit_=1, model=model, params=params):
      output = model.apply({'params': {**params, 'encoder': encoder}}, batch, train=True, rngs=RNGS)
      return output.exits[:, exit_].sum()

    slopes = jax.jit(jax.grad(loss))(params['encoder'])
    moved[own] = [float(jnp.abs(slopes[f'block_{l}']['value']['kernel']).max()) > 0 for l in (1, 2, 3, 4)]
  assert moved == {False: [True, True, True, False], True: [False, True, True, False]}


def test_a_temperature_is_the_most_likely_one():
  rng = np.random.default_rng(0)
  logits, truth = rng.normal(size=(4000, 3)), 2.5
  labels = np.array([rng.choice(3, p=np.exp(row / truth) / np.exp(row / truth).sum()) for row in logits * 3])
  assert early_exit.temperature(logits * 3, labels) == pytest.approx(truth, rel=0.15)


def test_temperatures_are_fitted_on_what_the_exits_said_without_them():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(64, 2, 3)), rng.integers(3, size=64)

  def controlled(controls, divided):
    assert controls == {'exit_threshold': 0.0}
    yield SimpleNamespace(exits=logits / divided[:, None]), {'label': labels, 'weight': np.ones(64)}

  found = [
    early_exit.finish({'fit_temperatures': True, 'temperatures': tuple(given)}, SimpleNamespace(
      controlled=lambda controls, given=given: controlled(controls, np.array(given or [1.0, 1.0]))))
    for given in ((), (2.0, 0.5))
  ]  # fmt: skip
  np.testing.assert_allclose(found[0]['temperatures'], found[1]['temperatures'], rtol=1e-3)
  assert early_exit.finish({}, costs.Validation(lambda batch: None, list)) == {}


@pytest.mark.parametrize('criterion', early_exit.NEVER)
def test_what_is_found_for_pruning_in_a_chain_holds_whoever_leaves(criterion):
  """A budget is of pruning alone: exits below it would else leave nothing to prune."""
  pruning = {'name': 'ltp', 'threshold': 0.01, 'first_layer': True, 'target_macs': 0.6, 'overflow_rate': 0.2}
  exits = {
    'name': 'early_exit',
    'layers': (1,),
    'criterion': criterion,
    'threshold': early_exit.EASIEST[criterion],
  }
  spec = {'name': 'chain', 'reducers': (pruning, exits)}
  model, params = model_and_params(spec, readout='cls')
  forward = jax.jit(stages.forward(model))
  batch = {**ragged_batch(range(3, 15), 14), 'weight': np.ones(12, np.float32)}
  validation = costs.Validation(lambda b: forward(params, b), lambda: [batch], encoder=model.config)
  found = stages.finish(spec, validation)['ltp']
  setting = {**early_exit.idle(exits), 'scale': found['scale']}
  assert validation.mac_ratio(setting) == pytest.approx(0.6, abs=0.03)
  if criterion != 'patience':  # one exit says nothing twice
    assert validation.mac_ratio({'scale': found['scale']}) < 0.4
  [(cost, _)] = validation.costs(setting)
  room = np.quantile(cost.rows / 14, 0.8, axis=0, method='higher')
  np.testing.assert_allclose(found['capacities'], room, rtol=1e-6)
  assert room[-1] > 0.05


def test_magic_pyramid_keeps_its_thresholds_when_exits_are_trained():
  config = imdb_pyramid.get_config('fastbert').to_dict()
  spec = {
    'reducers': [{**config['reducer']['reducers'][0], 'target_macs': 0.5}, config['reducer']['reducers'][1]]
  }
  asked = [
    stages.reducer_spec({'name': 'chain', **spec}, (), stage)['reducers'][0]['target_macs']
    for stage in config['stages'][1:]
  ]
  assert asked == [0.5, 0.5, 0.0]


def test_magic_pyramid_in_four_stages(tmp_path):
  pyramid = {
    'name': 'chain',
    'reducers': (
      {'name': 'ltp', 'threshold': 0.01, 'temperature': 5e-3},
      {'name': 'early_exit', 'layers': (1,), 'threshold': 0.98, 'fit_temperatures': True},
    ),
  }
  still = {'layers': (), 'fit_temperatures': False}
  wanted = tiny_config(reducer=pyramid)
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1, 'reducer': {'name': 'none'}},
    {'name': 'soft', 'epochs': 1, 'init': 'tune', 'reducer': {'ltp': {'mode': 'soft'}, 'early_exit': still}},
    {
      'name': 'hard',
      'epochs': 1,
      'init': 'soft',
      'train': 'encoder/.*|head/.*',
      'reducer': {'early_exit': still},
    },
    {'name': 'exits', 'epochs': 1, 'init': 'hard', 'train': 'reducer/reducers_1/.*', 'objective': 'exits'},
  )
  outcome = train.run(wanted, tmp_path)
  rows = [row for row in lines(tmp_path, 'train') if row['stage'] == 'exits']
  assert rows[-1]['exit_loss'] < rows[0]['exit_loss']
  assert outcome['mac_ratio'] < 1
  assert outcome['stages']['exits']['fields']['early_exit']['temperatures'][0] > 0


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'layers': (1, 4)}, 'stands behind one of the layers 1 to 3'),
    ({'threshold': 1.5}, 'threshold is 1.5.*from 0 to 1'),
    ({'threshold': -0.1}, 'threshold is -0.1'),
    ({'criterion': 'patience', 'threshold': 0.5}, 'a number of exits, 1 or more'),
    ({'criterion': 'hope'}, "criterion is 'hope'; choose one of entropy"),
    ({'head': 'big'}, "head is 'big'; choose one of linear"),
    ({'temperatures': (1.0,)}, 'expected 2 numbers above 0'),
    ({'temperatures': (1.0, 0.0)}, 'expected 2 numbers above 0'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    models.make_reducer({'name': 'early_exit', 'layers': (1, 2), **fields}).check(4, 4)


def test_an_objective_of_exits_needs_exits():
  model, params = model_and_params({'name': 'early_exit', 'layers': ()})
  with pytest.raises(UserError, match='the stage has none'):
    early_exit.exits(
      lambda p, b, r: model.apply({'params': p}, jax.tree.map(jnp.asarray, b)), params, BATCH, None, None
    )


@pytest.mark.parametrize(('recipe', 'variant'), [(imdb_exits, 'exits'), (imdb_pyramid, 'fastbert')])
def test_what_learns_on_frozen_states_has_one_rate_whatever_the_encoder(recipe, variant):
  rates = []
  for weights in ('minilm-l6', 'mpnet-base'):
    config = recipe.get_config(f'{variant},{weights}')
    assert config.stages[-1]['name'] == 'exits'
    rates.append(config.optimizer.learning_rate * config.stages[-1]['rate'])
  assert rates == pytest.approx([imdb_exits.RATE] * 2)
