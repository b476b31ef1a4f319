"""Whole runs in this process: what they leave, what is trained, which checkpoint wins, how they stop."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tokenprune_jax
from tests.tiny_run import STEPS, config, lines
from tokenprune_jax import models, optim, pretrained, reducers, result, settings, stages, tasks, train
from tokenprune_jax.errors import UserError

ONE_LAYER = 'random:bert:layers=1,width=32,heads=2,hidden=64,vocab=256'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir, result) of one run that several tests look at."""
  folder, wanted = tmp_path_factory.mktemp('run'), config(eval__timing=True)
  return wanted, folder, train.run(wanted, folder)


def exported(folder):
  return optim.flatten(pretrained.load_exported(folder / 'model').params)


# ------------------------------------------------------------------------------------------- What is left
def test_a_run_leaves_what_its_design_says(finished):
  wanted, folder, outcome = finished
  assert json.loads((folder / 'result.json').read_text()) == json.loads(json.dumps(outcome))
  assert settings.differences(json.loads((folder / 'config.json').read_text()), settings.check(wanted)) == {}
  assert set(outcome['metrics']) >= {'accuracy', 'macro_f1', 'micro_f1', 'macro_f1_batch16', 'loss'}
  assert 0 < outcome['keep_ratio'] < 1 and outcome['macs_per_example'] < outcome['dense_macs_per_example']
  assert outcome['seconds_per_example'] > 0 and outcome['dense_seconds_per_example'] > 0
  timing = outcome['timing']
  assert timing['batch_size'] == 8 and timing['lengths'] and timing['device']
  assert (outcome['executor'], outcome['dtype'], outcome['split']) == ('mask', 'float32', 'test')
  records = [json.loads(line) for line in (folder / 'predictions_test.jsonl').read_text().splitlines()]
  assert [record['index'] for record in records] == list(range(24))
  right = np.mean([record['label'] == record['prediction'] for record in records])
  assert right == pytest.approx(outcome['metrics']['accuracy'])


def test_metrics_hold_each_step_once_and_each_epoch_s_validation(finished):
  _, folder, outcome = finished
  rows = lines(folder)
  assert [row['step'] for row in rows if row['split'] == 'train'] == list(range(1, 2 * STEPS + 1))
  assert [row['step'] for row in rows if row['split'] == 'valid'] == [STEPS, 2 * STEPS]
  assert [row['step'] for row in rows if row['split'] == 'test'] == [2 * STEPS]
  assert {'loss', 'grad_norm', 'learning_rate', 'examples_per_second'} <= set(rows[0])
  train_losses = [row['loss'] for row in rows if row['split'] == 'train']
  assert np.mean(train_losses[-3:]) < np.mean(train_losses[:3])
  assert outcome['stages']['tune']['best_loss'] == min(row['loss'] for row in rows if row['split'] == 'valid')


def test_what_was_exported_is_what_was_tested(finished):
  _, folder, outcome = finished
  predictor = tokenprune_jax.load(folder)
  assert predictor.labels == tuple(outcome['labels'])
  assert predictor.predict(['bees and honey'])[0]['label'] in outcome['labels']


def test_a_finished_run_is_not_repeated_but_labels_a_file(finished, tmp_path):
  wanted, folder, outcome = finished
  before = (folder / 'result.json').stat().st_mtime_ns
  (tmp_path / 'texts.txt').write_text('cats purr\ndogs bark\n')
  again = train.run(wanted | {'predict': str(tmp_path / 'texts.txt')}, folder)
  assert again['metrics'] == outcome['metrics']
  assert (folder / 'result.json').stat().st_mtime_ns == before
  assert len((folder / 'predicted.jsonl').read_text().splitlines()) == 2


def test_another_config_in_the_same_folder_is_refused(finished):
  wanted, folder, _ = finished
  with pytest.raises(UserError, match=r'config\.reducer\.ratio was 0\.6 and is now 0\.5'):
    train.run(wanted | {'reducer': {'name': 'fuzzy', 'ratio': 0.5}}, folder)


# ---------------------------------------------------------------------------------------- What is trained
def test_frozen_parameters_get_neither_gradient_nor_optimizer_state(tmp_path):
  wanted = config(
    stages=({'name': 'tune', 'epochs': 1, 'train': 'head/.*|encoder/block_.*'},),
    reducer={'name': 'combine', 'slots': 2, 'layer': 2},
  )
  train.run(wanted, tmp_path)
  start = optim.flatten(pretrained.load(wanted['model']['weights']).params)
  end = exported(tmp_path)
  moved = {path for path in start if not np.array_equal(start[path], end[path])}
  assert moved == {path for path in start if path.startswith('encoder/block_1/')}
  (newest,) = (tmp_path / 'checkpoints' / 'tune').glob(str(STEPS))
  saved = (newest / 'state' / '_METADATA').read_text()
  assert saved.count('block_2') and "'mu', 'encoder', 'block_1'" in saved
  assert "'mu', 'encoder', 'block_2'" not in saved and "'mu', 'encoder', 'embeddings'" not in saved


def test_accumulating_trains_the_same_model(tmp_path):
  losses = []
  for parts in (1, 4):
    wanted = config(optimizer__accumulate=parts, model__dropout=0.0, model__weights=ONE_LAYER)
    wanted['stages'] = ({'name': 'tune', 'epochs': 1},)
    train.run(wanted, tmp_path / str(parts))
    losses.append([row['loss'] for row in lines(tmp_path / str(parts), 'train')])
  np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)


def test_a_stage_starts_from_another_run(finished, tmp_path):
  _, folder, _ = finished
  wanted = config(optimizer__learning_rate=0.0)
  wanted['stages'] = ({'name': 'again', 'epochs': 1, 'init': str(folder)},)
  train.run(wanted, tmp_path / 'run')
  ours, theirs = exported(tmp_path / 'run'), exported(folder)
  assert ours.keys() == theirs.keys()
  assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
  wanted['stages'] = ({'name': 'again', 'epochs': 1, 'init': str(tmp_path)},)
  with pytest.raises(UserError, match='neither'):
    train.run(wanted, tmp_path / 'other')
  wanted['stages'] = ({'name': 'again', 'epochs': 1, 'init': str(folder)},)
  wanted['model']['weights'] = 'random:bert:layers=2,width=32,heads=4,hidden=64,vocab=256'
  with pytest.raises(UserError, match='its heads is 2, here 4'):
    train.run(wanted, tmp_path / 'third')


def test_dense_is_one_of_the_methods_and_bfloat16_one_of_the_types(tmp_path):
  wanted = config(
    reducer={'name': 'none'}, model__dtype='bfloat16', eval__timing=True, model__weights=ONE_LAYER
  )
  outcome = train.run(wanted, tmp_path)
  assert outcome['dtype'] == 'bfloat16' and outcome['keep_ratio'] == pytest.approx(1.0)
  assert outcome['seconds_per_example'] == outcome['dense_seconds_per_example']
  assert all(value.dtype == np.float32 for value in exported(tmp_path).values())


# ------------------------------------------------------------------------------------------- Which one wins
def test_the_best_validation_wins_and_patience_ends_a_stage(tmp_path, monkeypatch):
  losses, evaluated = iter([1.0, 0.5, 0.7, 0.6, 0.4]), result.evaluated
  seen = []

  def scripted(session, model, params, split):
    values, records = evaluated(session, model, params, split)
    seen.append({path: np.array(leaf) for path, leaf in optim.flatten(params).items()})
    return values | ({'loss': next(losses)} if split == 'valid' else {}), records

  monkeypatch.setattr(result, 'evaluated', scripted)
  outcome = train.run(config(eval__every=2, optimizer__patience=2, checkpoint__keep=1), tmp_path)
  stage = outcome['stages']['tune']
  assert (stage['best_step'], stage['best_loss'], stage['step']) == (4, 0.5, 8)
  assert len(seen) == 5  # four validations and the test
  for path, leaf in exported(tmp_path).items():
    np.testing.assert_array_equal(leaf, seen[1][path])
    np.testing.assert_array_equal(seen[4][path], seen[1][path])


# ------------------------------------------------------------------------------------- A method's own stages
METHOD = """
import jax.numpy as jnp
from tokenprune_jax.reducer import Reducer

class Method(Reducer):
  level: float = 1.0

def match(apply, params, batch, rng, teacher):
  mine, first = apply(params, batch, rng), apply(params, batch)
  distance = jnp.mean(jnp.square(mine.logits - teacher(batch).logits))
  return distance + 0.1 * jnp.mean(jnp.square(first.logits)), {'distance': distance}

def broken(apply, params, batch, rng, teacher):
  loss, _ = jnp.mean(apply(params, batch, rng).logits), None
  return loss + jnp.sqrt(0.0 * jnp.sum(params['head']['out']['bias'])), {}

OBJECTIVES = {'match': match, 'broken': broken}

def finish(fields, validation):
  batches = list(validation.batches())
  return {'level': float(sum(batch['weight'].sum() for batch in batches))}
"""


@pytest.fixture
def method(tmp_path, monkeypatch):
  folder = tmp_path / 'methods'
  folder.mkdir()
  (folder / 'testmethod.py').write_text(METHOD)
  monkeypatch.setattr(reducers, '__path__', [*reducers.__path__, str(folder)])
  return {'name': 'testmethod', 'level': 2.0}


def test_a_method_brings_objective_teacher_and_what_it_hands_on(method, tmp_path):
  wanted = config(reducer=method, model__weights=ONE_LAYER)
  wanted['stages'] = (
    {'name': 'first', 'epochs': 1},
    {
      'name': 'second',
      'epochs': 2,
      'init': 'first',
      'teacher': 'first',
      'objective': 'match',
      'train': 'head/.*',
    },
  )
  outcome = train.run(wanted, tmp_path / 'run')
  assert outcome['stages']['first']['reducer'] == method
  assert outcome['stages']['first']['fields'] == {'testmethod': {'level': 24.0}}
  assert outcome['stages']['second']['reducer'] == {'name': 'testmethod', 'level': 24.0}
  rows = lines(tmp_path / 'run', 'train')
  assert [row['step'] for row in rows] == list(range(1, 3 * STEPS + 1))
  second = [row for row in rows if row['stage'] == 'second']
  assert 'distance' in second[0] and 'distance' not in rows[0]
  assert second[0]['distance'] < 1e-6 + second[0]['loss']
  wanted['stages'] = ({'name': 'first', 'objective': 'matches'},)
  with pytest.raises(UserError, match='there is: default, distil, distil_states, match, broken'):
    train.run(wanted, tmp_path / 'other')


def test_exits_are_trained_on_frozen_states_and_capacities_found_on_validation(tmp_path):
  pyramid = {
    'name': 'chain',
    'reducers': (
      {'name': 'threshold', 'threshold': 0.01, 'overflow_rate': 0.2},
      {'name': 'early_exit', 'layers': (1,), 'threshold': 0.98},
    ),
  }
  wanted = config(reducer=pyramid, model__executor='serve', eval__timing=True)
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1},
    {'name': 'exits', 'epochs': 1, 'init': 'tune', 'train': 'reducer/.*', 'objective': 'exits'},
  )
  outcome = train.run(wanted, tmp_path)
  rows = [row for row in lines(tmp_path, 'train') if row['stage'] == 'exits']
  assert rows[-1]['exit_loss'] < rows[0]['exit_loss']
  capacities = outcome['stages']['exits']['fields']['threshold']['capacities']
  assert len(capacities) == 2 and all(0 < share <= 1 for share in capacities)
  exported = pretrained.load_exported(tmp_path / 'model')
  assert tuple(exported.reducer_spec['reducers'][0]['capacities']) == tuple(capacities)
  assert 0 < outcome['mac_ratio'] < 1
  assert outcome['executor'] == outcome['timing']['models']['model']['executor'] == 'serve'
  assert outcome['seconds_per_example'] > 0


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(method, tmp_path):
  wanted = config(reducer=method, model__weights=ONE_LAYER)
  wanted['stages'] = ({'name': 'bad', 'objective': 'broken'},)
  with pytest.raises(UserError, match=r"step 1 of stage 'bad': the gradient of head/out/bias is not finite"):
    train.run(wanted, tmp_path / 'run')


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
  wanted = config(eval__every=100)
  real = train.make_step

  def poisoned(*arguments):
    step = real(*arguments)

    def take(state, frozen, teacher, batch, seed, number):
      batch = batch | {'weight': batch['weight'] * (jnp.nan if number == 4 else 1.0)}
      return step(state, frozen, teacher, batch, seed, number)

    return take

  monkeypatch.setattr(train, 'make_step', poisoned)
  with pytest.raises(UserError) as error:
    train.run(wanted, tmp_path)
  assert "step 5 of stage 'tune': the loss is not finite" in str(error.value)
  assert f'The last good checkpoint is {tmp_path / "checkpoints" / "tune" / "4"}' in str(error.value)
  assert [row['step'] for row in lines(tmp_path, 'train')] == [1, 2, 3, 4]
  monkeypatch.setattr(train, 'make_step', real)
  train.run(wanted, tmp_path)  # and that checkpoint is good


# ------------------------------------------------------------------------------------------ One train step
def test_a_step_equals_the_same_step_written_out():
  weights = pretrained.load(ONE_LAYER, dropout=0.0, attention_dropout=0.0)
  model = models.Classifier(weights.config, models.make_reducer({'name': 'none'}), 3)
  params, task = model.init_params(jax.random.key(0)), tasks.make('classify')
  rng = np.random.default_rng(0)
  batch = {
    'ids': jnp.asarray(rng.integers(5, 200, (4, 16)), jnp.int32),
    'mask': jnp.arange(16)[None] < jnp.array([[16], [9], [12], [16]]),
    'types': jnp.zeros((4, 16), jnp.int32),
    'label': jnp.array([0, 2, 1, 0], jnp.int32),
    'weight': jnp.array([1.0, 1.0, 1.0, 0.0]),
    'index': jnp.array([0, 1, 2, -1], jnp.int32),
  }

  def loss(params):
    logits = model.apply({'params': params}, batch).logits
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), batch['label'][:3]])

  expected, grads = jax.jit(jax.value_and_grad(loss))(params)
  optimizer = optax.sgd(0.5)
  trained, frozen = optim.split(params, optim.trainable(params, '.*', ()))
  step = train.make_step(stages.default_objective(task), model, optimizer, None, 1, None)
  state = {'trained': jax.tree.map(jnp.copy, trained), 'optimizer': optimizer.init(trained)}
  state, metrics = step(state, frozen, None, batch, np.int32(0), np.int32(0))
  assert float(metrics['loss']) == pytest.approx(float(expected), rel=1e-5)
  assert float(metrics['grad_norm']) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
  assert float(metrics['examples']) == 3
  assert metrics['squares'].shape == (len(optim.flatten(params)),)
  for path, gradient in optim.flatten(grads).items():
    new, old = optim.flatten(state['trained'])[path], optim.flatten(params)[path]
    np.testing.assert_allclose(new, old - 0.5 * gradient, atol=2e-6)


def test_the_folder_may_be_given_as_text(tmp_path):
  with pytest.raises(UserError, match='config.sead'):
    train.run({'sead': 1}, str(pathlib.Path(tmp_path) / 'run'))


SOFT = {'mode': 'soft'}
LTP = {'name': 'ltp', 'target_macs': 0.8, 'first_layer': True}
SHORT = [{'text': f'{a} {b}', 'label': 'xy'[ord(b) % 2]} for a in 'abcdefgh' for b in 'klmnopqr']


@pytest.mark.parametrize(
  ('second', 'changes', 'words'),
  [
    ({'init': 'A'}, {}, "stage 'b': init is 'A', which is neither 'pretrained', nor an earlier stage"),
    ({'init': 'a', 'train': 'encodr/.*'}, {}, "train='encodr/.\\*' matches none"),
    (
      {'init': 'a', 'reducer': SOFT},
      {'reducer': LTP},
      "stage 'b' has ltp in mode 'soft', but the stage 'a' before it in 'hard'",
    ),
    (
      {'init': 'a', 'reducer': {'name': 'power', 'mode': 'search', 'slots': 16}},
      {},
      'slots is 16, but texts have up to 32',
    ),
    (
      {'init': 'a', 'reducer': {'name': 'sttabt', 'mode': 'distil', 'factor': 3}},
      {},
      '2 heads cannot share a width of 32 / 3',
    ),
  ],
)
def test_a_later_stage_s_mistake_is_found_before_the_first_one_runs(second, changes, words, tmp_path):
  wanted = config(stages=({'name': 'a', 'epochs': 1}, {'name': 'b', 'epochs': 1, **second}), **changes)
  with pytest.raises(UserError, match=words):
    train.run(wanted, tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.parametrize(
  'spec', [LTP, {'name': 'power', 'mode': 'search', 'slots': 32}, {'name': 'sttabt', 'factor': 2}]
)
def test_a_budget_that_these_texts_cannot_meet_is_refused_before_training(spec, tmp_path):
  (tmp_path / 'short.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in SHORT))
  stage = {'name': 'a', 'reducer': {**spec, 'target_macs': 0.26}}
  wanted = config(
    data__name='file', data__train=str(tmp_path / 'short.jsonl'), stages=(stage,), task__readout='cls'
  )
  wanted['reducer'] = {'name': 'none'}
  if spec['name'] == 'sttabt':
    wanted['stages'] = (
      {**stage, 'objective': 'distil_approx', 'reducer': {**stage['reducer'], 'mode': 'distil'}},
    )
  with pytest.raises(UserError, match='target_macs is 0.26, which this method cannot reach'):
    train.run(wanted, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_a_best_checkpoint_that_is_gone_is_followed_by_the_best_of_what_is_left(tmp_path):
  wanted = config(checkpoint__keep=3)
  outcome = train.run(wanted, tmp_path)
  best = outcome['stages']['tune']['best_step']
  left = sorted(int(path.name) for path in (tmp_path / 'checkpoints' / 'tune').glob('[0-9]*'))
  shutil.rmtree(tmp_path / 'checkpoints' / 'tune' / str(best))
  (tmp_path / 'stages' / 'tune.json').unlink()
  (tmp_path / 'result.json').unlink()
  again = train.run(wanted, tmp_path)
  assert len(left) > 1 and again['stages']['tune']['step'] == 2 * STEPS
  assert (tmp_path / 'checkpoints' / 'tune' / str(again['stages']['tune']['best_step'])).is_dir()


def test_what_a_method_learns_to_prune_by_does_not_decay():
  assert optim.decays('encoder/block_1/up/kernel') and optim.decays('encoder/embeddings/word/embedding')
  for path in ('learned/delta', 'thresholds/theta', 'retention/r', 'exit/bias'):
    assert not optim.decays(f'reducer/{path}')
