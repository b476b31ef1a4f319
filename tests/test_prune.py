"""From a finished dense run: configs/prune.py, what a stage may start from, and what is refused before any step."""

import json
import sys

import jax
import numpy as np
import pytest

from tests.tiny_run import config as tiny_config
from tokenprune_jax import export, initial, models, optim, session, settings, specs, tasks, train
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer

sys.path.insert(0, '.')  # configs is no part of the installed package

from configs import imdb_exits, prune

WEIGHTS = 'random:bert:layers=4,width=32,heads=2,hidden=64,vocab=256'
APPROX = {'name': 'sttabt', 'factor': 4}
TAGGERS = ('tokee', 'sentee')  # see test_tokee_run.py


def stage(name, **fields):
  return {'name': name, 'epochs': 1, **fields}


def tiny(reducer, *stages):
  found = tiny_config(reducer=reducer, model__weights=WEIGHTS, task__readout='cls')
  found['stages'] = stages
  return found


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Workdirs of a dense run and of one that trained an ApproxNet, with other labels."""
  folder = tmp_path_factory.mktemp('runs')
  train.run(tiny({'name': 'none'}, stage('tune')), folder / 'dense')
  distil = stage('approx', train='reducer/.*', objective='distil_approx', reducer={'mode': 'distil'})
  pooled = folder / 'pooled.jsonl'
  pooled.write_text(
    ''.join(json.dumps({'text': f'word{i} again', 'label': f'from{i % 2}'}) + '\n' for i in range(40))
  )
  config = tiny({**APPROX, 'mode': 'distil'}, distil)
  config['data'] |= {'name': 'file', 'train': str(pooled)}
  train.run(config, folder / 'approx')
  return folder


def given(method, *folders):
  """A checked config of configs/prune.py, an epoch a stage."""
  config = prune.get_config(','.join([method, *map(str, folders)])).to_dict()
  for found in config['stages']:
    found['epochs'] = 1
  config['eval'] |= {'timing': False}
  return settings.check(config)


@pytest.fixture(scope='module')
def pruned(runs):
  """(workdir, result) of a run that learned thresholds, from both."""
  config = given('sttabt', runs / 'dense', runs / 'approx')
  assert [found['name'] for found in config['stages']] == ['soft', 'hard']
  config['reducer'] |= {'target_macs': 0.6}
  return runs / 'pruned', train.run(config, runs / 'pruned')


def test_thresholds_are_learned_from_two_runs(pruned):
  _, result = pruned
  assert result['mac_ratio'] == pytest.approx(0.6, abs=0.08)
  for stage in ('soft', 'hard'):
    found = result['stages'][stage]['fields']['sttabt']
    assert found['shift'] != 0 and len(found['capacities']) == 4


def test_exits_are_trained_behind_a_run_that_prunes(pruned, tmp_path):
  folder, result = pruned
  config = given('exits', folder)
  assert config['stages'][0]['init'] == str(folder)
  config['reducer']['reducers'][1].update(head='linear', threshold=0.0)  # cheap, and nobody leaves
  found = train.run(config, tmp_path)
  before, after = (export.load_exported(place / 'model') for place in (folder, tmp_path))
  pruning, exits = after.reducer_spec['reducers']
  assert exits['name'] == 'early_exit' and set(after.params['reducer']['reducers_1']) == {
    f'exit_{l}' for l in (1, 2, 3)
  }
  assert pruning == {**before.reducer_spec, 'target_macs': 0.0}
  for own, theirs in (
    (after.params['reducer']['reducers_0'], before.params['reducer']),
    (after.params['encoder'], before.params['encoder']),
  ):
    jax.tree.map(np.testing.assert_array_equal, own, theirs)
  assert found['mac_ratio'] == pytest.approx(result['mac_ratio'], abs=0.02)
  assert found['metrics']['accuracy'] == result['metrics']['accuracy']
  with pytest.raises(UserError, match='has exits already'):
    given('exits', tmp_path)
  with pytest.raises(UserError, match='is a run of early_exit, sttabt, which ltp would leave out'):
    given('ltp', tmp_path)


def test_exits_stand_behind_layers_that_run():
  config = imdb_exits.get_config(f'exits,{WEIGHTS}')
  prune.chained(config.unlock(), ({'name': 'student', 'layers': (1, 3, 4)},))
  assert config.reducer.reducers[1]['layers'] == (1, 3)


def test_the_oracle_begins_as_a_copy_of_the_encoder_that_it_then_keeps(runs):
  config = given('oracle', runs / 'dense')
  [found] = config['stages']
  model = session.classifier(config, session.load_weights(config), config['reducer'], labels=2)
  dense = export.load_exported(runs / 'dense' / 'model').params
  params = initial.graft(model, jax.random.key(0), dense, 'the dense run')
  jax.tree.map(np.testing.assert_array_equal, params['reducer']['approx']['encoder'], dense['encoder'])
  trained = optim.trainable(initial.param_shapes(model), found['train'], model.unused_blocks())
  assert {path.split('/')[0] for path in trained} == {'encoder', 'head'}
  narrow = {**config['reducer'], 'factor': 4}
  narrow = session.classifier(config, session.load_weights(config), narrow, labels=2).init_params(
    jax.random.key(1)
  )
  params = initial.graft(
    model, jax.random.key(0), {**narrow, 'encoder': dense['encoder']}, 'a run of another factor'
  )
  jax.tree.map(np.testing.assert_array_equal, params['reducer']['approx']['encoder'], dense['encoder'])
  inside = initial.copied(
    make_reducer({'name': 'chain', 'reducers': ({'name': 'none'}, config['reducer'])}), {'encoder/a': 1}
  )
  assert inside == {'reducer/reducers_1/approx/encoder/a': 1}


def test_an_approx_net_goes_on_from_other_texts(runs, tmp_path):
  config = given('approx', runs / 'dense', runs / 'approx')
  [found] = config['stages']
  assert (found['init'], found['init_reducer']) == (str(runs / 'dense'), str(runs / 'approx'))
  found['rate'] = 0.0  # so that what it begins with is what it ends with
  train.run(config, tmp_path)
  before, after, dense = (
    export.load_exported(folder / 'model').params for folder in (runs / 'approx', tmp_path, runs / 'dense')
  )
  jax.tree.map(np.testing.assert_array_equal, *(p['reducer']['approx']['encoder'] for p in (before, after)))
  jax.tree.map(np.testing.assert_array_equal, after['encoder'], dense['encoder'])


def test_a_student_learns_from_another_run(runs, tmp_path):
  config = given('student', runs / 'dense')
  assert config['stages'][0]['teacher'] == config['stages'][0]['init'] == str(runs / 'dense')
  config['reducer'] |= {'layers': (1, 4)}
  assert train.run(config, tmp_path)['mac_ratio'] == pytest.approx(0.5, abs=0.01)


def test_every_setting_of_a_method_can_be_given_on_the_command_line():
  by_the_run = {'tags'}  # what only its data say
  for recipe, variant in prune.RECIPES.values():
    listed = recipe.get_config(f'{variant},{WEIGHTS}').reducer.to_dict()
    for own, whole in zip(*(specs.members(spec) for spec in (listed, models.whole_spec(listed)))):
      assert set(whole) - set(own) <= by_the_run, (variant, own['name'])


@pytest.mark.parametrize('method', [name for name in prune.RECIPES if name not in TAGGERS])
def test_every_recipe_is_sound(runs, method):
  config = given(method, runs / 'dense')
  assert config['stages'][0]['init'] == str(runs / 'dense')  # nothing is fine-tuned again
  assert config['data']['train_limit'] == 48 and config['task']['readout'] == 'cls'
  if 'pf' in method or method == 'dense':
    config['task']['readout'] = 'mean'  # combining leaves no [CLS]
  checked(config)


def checked(config):
  config = settings.check(config)
  session.check_stages(config, session.load_weights(config), tasks.make('classify'))


SOFT, HARD = (
  stage('soft', init='approx', reducer={'mode': 'soft'}),
  stage('hard', init='soft', reducer={'mode': 'hard'}),
)
DISTIL = stage('approx', objective='distil_approx', reducer={'mode': 'distil'})


@pytest.mark.parametrize(
  ('reducer', 'stages', 'words'),
  [
    (APPROX, (HARD | {'init': 'pretrained'},), "'hard': sttabt starts from 'pretrained'.*no reducer/approx"),
    (APPROX, (stage('tune', reducer={'name': 'none'}), SOFT | {'init': 'tune'}), "'soft'.*from 'tune'"),
    (APPROX, (SOFT, DISTIL), "init is 'approx', which is neither"),
    ({'name': 'power'}, (stage('retrain'),), "counts is empty.*'search' before"),
    ({'name': 'power'}, (stage('retrain'), stage('search', reducer={'mode': 'search'})), 'counts is empty'),
    ({'name': 'power', 'mode': 'search', 'target_macs': 0.01}, (stage('search'),), 'cannot reach.*at least 0.08'),
    ({**APPROX, 'target_macs': 0.05}, (DISTIL, SOFT), 'cannot reach'),
    ({**APPROX, 'target_macs': 1.5}, (DISTIL, SOFT), 'target_macs is 1.5'),
    ({**APPROX, 'mix': 1.5}, (DISTIL, SOFT), 'mix is 1.5'),
    (
      {'name': 'student', 'layers': (1, 4)},
      (
        stage('small', reducer={'layers': (1,)}),
        stage('tune', init='small', teacher='small', objective='distil'),
      ),
      "the student runs 2 layers, its teacher 'small' only 1",
    ),
    ({'name': 'topk', 'shares': (0.9,) * 6}, (stage('tune'),), 'needs 4 shares'),
    ({'name': 'student'}, (stage('tune', teacher='nobody', objective='distil'),), "teacher is 'nobody'"),
  ],
)  # fmt: skip
def test_stages_that_cannot_follow_each_other_are_refused(reducer, stages, words, tmp_path):
  with pytest.raises(UserError, match=words):
    train.run(tiny(reducer, *stages), tmp_path)


def test_any_method_may_learn_from_the_dense_runs_answers(runs):
  dense = str(runs / 'dense')
  config = given('sttabt+distil', dense, runs / 'approx')
  soft, hard = config['stages']
  assert soft['teacher'] == hard['teacher'] == dense and hard['init'] == 'soft'
  assert soft['objective'] == hard['objective'] == 'distil'
  checked(config)
  assert {stage['objective'] for stage in given('topk+states', dense)['stages']} == {'distil_states'}
  stages = prune.get_config(f'ltp+states,{dense}').stages
  assert [stage['epochs'] for stage in stages] == [1, 5]  # thresholds, then what is left learns for longer
  with pytest.raises(UserError, match='no ltp\\+dist; after the plus is one of distil, states'):
    given('ltp+dist', dense)


@pytest.mark.parametrize('method', TAGGERS)
def test_methods_that_tag_words_do_not_start_from_a_classifier_of_texts(runs, method):
  config = given(method, runs / 'dense')
  config['reducer']['layers'] = (1, 2)
  with pytest.raises(UserError, match="task.readout is 'cls', but this method tags words"):
    checked(config)


def test_a_run_that_is_named_for_a_methods_parameters_has_some(runs):
  dense = str(runs / 'dense')
  with pytest.raises(
    UserError, match="stage 'soft': sttabt starts from '.*dense', which has no reducer/approx/"
  ):
    checked(given('sttabt', dense, dense))
  goes_on = DISTIL | {'init': dense, 'init_reducer': dense}
  with pytest.raises(UserError, match="stage 'approx': sttabt starts from '.*dense', which has no reducer/"):
    checked(tiny(APPROX, goes_on))


def test_other_encoders_are_refused(runs):
  config = given('sttabt', runs / 'dense', runs / 'approx')
  config['model']['weights'] = 'random:bert:layers=2,width=32,heads=2,hidden=64,vocab=256'
  with pytest.raises(UserError, match='its depth is 4, here 2'):
    checked(config)


@pytest.mark.parametrize(
  ('argument', 'words'),
  [
    ('', "no method ''"),
    ('ltp', 'workdir of a finished dense run'),
    ('ltp,runs/nowhere', 'there is no runs/nowhere'),
  ],
)
def test_a_config_without_its_run_says_so(argument, words):
  with pytest.raises(UserError, match=words):
    prune.get_config(argument)
