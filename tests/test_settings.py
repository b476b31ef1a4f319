"""The config check: what is wrong is named, what is left out gets its default."""

import json
import pathlib

import pytest

from tokenprune_jax import settings, workdir
from tokenprune_jax.errors import UserError


def test_an_empty_config_is_the_default_one():
  config = settings.check({})
  assert config['optimizer'] == settings.DEFAULTS['optimizer']
  assert config['stages'][0] == {**settings.STAGE, 'name': 'finetune', 'epochs': 2}


def test_given_values_replace_defaults_and_defaults_stay_unchanged():
  config = settings.check({'seed': 3, 'optimizer': {'learning_rate': 1}, 'data': {'buckets': [8, 16]}})
  assert config['seed'] == 3
  assert config['optimizer']['learning_rate'] == 1.0 and isinstance(
    config['optimizer']['learning_rate'], float
  )
  assert config['data']['buckets'] == (8, 16)
  config['optimizer']['learning_rate'] = 5.0
  assert settings.check({})['optimizer']['learning_rate'] == 5e-5


@pytest.mark.parametrize(
  'given, words',
  [
    ({'sead': 1}, ['config.sead', "'seed'"]),
    ({'optimizer': {'learningrate': 1e-4}}, ['config.optimizer.learningrate', "'learning_rate'"]),
    ({'stages': ({'nam': 'a'},)}, ['config.stages[0].nam', "'name'"]),
    ({'zzz': 1}, ['config.zzz', 'seed', 'optimizer']),
    ({'optimizer': 3}, ['config.optimizer', 'dict']),
    ({'seed': 'x'}, ['config.seed', "'x'", 'whole number']),
    ({'seed': True}, ['config.seed']),
    ({'seed': -1}, ['config.seed is -1', '0 to 2147483647']),
    ({'eval': {'timing': 1}}, ['config.eval.timing', 'True or False']),
    ({'optimizer': {'learning_rate': -0.1}}, ['config.optimizer.learning_rate']),
    ({'optimizer': {'learning_rate': float('nan')}}, ['config.optimizer.learning_rate']),
    ({'optimizer': {'warmup': 1.5}}, ['config.optimizer.warmup', '0 to 1']),
    ({'optimizer': {'groups': (('head(', 2.0),)}}, ['config.optimizer.groups']),
    ({'optimizer': {'groups': ('head',)}}, ['config.optimizer.groups']),
    ({'optimizer': {'batch_size': 6, 'accumulate': 4}}, ['config.optimizer.accumulate', '4', '6']),
    ({'model': {'dtype': 'float16'}}, ['config.model.dtype', 'bfloat16']),
    ({'model': {'dropout': 1.0}}, ['config.model.dropout']),
    ({'data': {'buckets': (64, 32)}}, ['config.data.buckets', 'increasing']),
    ({'data': {'buckets': ()}}, ['config.data.buckets']),
    ({'data': {'on_bad_row': 'drop'}}, ['config.data.on_bad_row', "'skip'"]),
    ({'stages': ()}, ['config.stages', 'at least one']),
    ({'stages': ({'name': 'a'}, {'name': 'a'})}, ['config.stages', 'different']),
    ({'stages': ({'name': 'a/b'},)}, ['config.stages[0].name']),
    ({'stages': ({'train': '('},)}, ['config.stages[0].train']),
    ({'stages': ({'epochs': 0},)}, ['config.stages[0].epochs']),
    ({'parallel': {'processes': 2, 'process': 2}}, ['config.parallel.process', '0 to 1']),
    ({'parallel': {'processes': 2}}, ['config.parallel.coordinator', 'HOST:PORT']),
    ({'checkpoint': {'keep': 0}}, ['config.checkpoint.keep']),
  ],
)
def test_a_wrong_config_is_refused_by_the_name_of_its_key(given, words):
  with pytest.raises(UserError) as error:
    settings.check(given)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_a_seed_fits_what_it_is_used_as():
  with pytest.raises(
    UserError, match='config.seed is 2147483648; expected a whole number from 0 to 2147483647'
  ):
    settings.check({'seed': 2**31})


def test_a_config_equals_itself_read_back_from_json():
  config = settings.check({'reducer': {'name': 'chain', 'reducers': ({'name': 'fuzzy', 'ratio': 0.9},)}})
  assert settings.differences(config, json.loads(json.dumps(config))) == {}


def test_a_config_of_an_earlier_version_gets_the_defaults_of_new_keys():
  config = settings.check({'seed': 3, 'stages': ({'name': 'a'}, {'name': 'b', 'init': 'a'})})
  older = json.loads(json.dumps(config))
  del older['checkpoint'], older['stages'][1]['rate']
  assert settings.differences(settings.filled_in(older), config) == {}
  older['sead'] = 1
  assert 'sead' in settings.differences(settings.filled_in(older), config)


def test_a_run_of_an_earlier_version_goes_on_where_its_method_has_gained_a_field():
  member = {'name': 'fuzzy', 'ratio': 0.8}
  config = settings.check(
    {'reducer': {'name': 'chain', 'reducers': ({**member, 'seed': 0, 'capacities': ()}, {'name': 'combine'})}}
  )
  older = json.loads(json.dumps(config))
  older['reducer']['reducers'][0] = member
  del older['eval']
  place = pathlib.Path('config.json')
  workdir.refuse_differences(place, older, config)
  member['seed'] = 1
  with pytest.raises(UserError, match=r'config\.reducer\.reducers\[0\]\.seed was 1 and is now 0\. Choose'):
    workdir.refuse_differences(place, older, config)
  # A method that there is no more: all differences are told.
  older['reducer'] = {
    'name': 'gone',
    'ratio': 0.5,
  }
  with pytest.raises(UserError, match="config.reducer.name was 'gone' and is now 'chain'"):
    workdir.refuse_differences(place, older, config)


def test_differences_name_nested_keys():
  first = settings.check({'reducer': {'name': 'chain', 'reducers': ({'name': 'fuzzy', 'ratio': 0.9},)}})
  second = settings.check(
    {'reducer': {'name': 'chain', 'reducers': ({'name': 'fuzzy', 'ratio': 0.8},)}, 'seed': 4}
  )
  assert settings.differences(first, second) == {'reducer.reducers[0].ratio': (0.9, 0.8), 'seed': (0, 4)}
  longer = settings.check({'stages': ({'name': 'finetune'}, {'name': 'more'})})
  assert 'stages[1].name' in settings.differences(settings.check({}), longer)


def test_only_keys_that_change_nothing_learned_are_harmless():
  harmless = ['predict', 'eval.timing', 'parallel.fsdp', 'checkpoint.every']
  assert all(settings.is_harmless(key) for key in harmless)
  assert not any(
    settings.is_harmless(key) for key in ['seed', 'eval.every', 'optimizer.batch_size', 'predictor']
  )
