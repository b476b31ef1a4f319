"""TOKEE from its config to a server: both stages of training, calibration, and the trained tagger in use."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

import tokenprune_jax
from tests.test_tagging import read, sentences
from tests.tiny_run import lines
from tokenprune_jax import calibrate, pretrained, serve, session, settings, tagger, tasks, train
from tokenprune_jax.errors import UserError

sys.path.insert(0, '.')  # configs is no part of the installed package

from configs import conll_tokee, prune

SMALL = 'random:bert:layers=3,width=32,heads=2,hidden=64,vocab=256'


def given(variant, folder, **changes):
  """A checked config of conll_tokee.py on generated sentences."""
  config = conll_tokee.get_config(f'{variant},file,{SMALL}').to_dict()
  config['data'] |= {split: str(folder / f'{split}.conll') for split in ('train', 'valid', 'test')}
  config['data'] |= {'max_length': 24, 'buckets': (24,)}
  config['reducer'] |= {'layers': (1, 2), 'window': 3, 'threshold': 0.3}
  config['optimizer'] |= {'learning_rate': 4e-3, 'batch_size': 8}
  config['eval'] |= {'batch_size': 8, 'timing': False}
  config['task'] |= {'constrained': True}
  for stage, epochs in zip(config['stages'], (2, 3, 2)):
    stage['epochs'] = epochs
  return settings.check({**config, **changes})


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokee')
  long = '\n'.join([sentences(1, 7).strip()] * 6) + '\n'
  for split, count in (('train', 64), ('valid', 20), ('test', 20)):
    (folder / f'{split}.conll').write_text(sentences(count, count) + long * (split == 'test'))
  return folder


@pytest.fixture(scope='module')
def run(data):
  """(workdir, result)."""
  return data / 'run', train.run(given('tokee', data), data / 'run')


def test_both_stages_train_and_the_tagger_exits(run):
  folder, result = run
  assert list(result['stages']) == ['tune', 'joint', 'sampled']
  by_stage = {row['stage']: row for row in lines(folder, 'train')}
  assert by_stage['joint']['joint_loss'] > 0 and np.isfinite(by_stage['sampled']['sampled_loss'])
  assert result['metrics']['f1'] > 0.8 and 0.3 < result['mac_ratio'] < 0.95
  legal = {('I-PER', before) for before in ('B-PER', 'I-PER')}
  for record in read(folder / 'predictions_test.jsonl'):
    for before, tag in zip(['O', *record['predicted']], record['predicted']):
      assert tag != 'I-PER' or (tag, before) in legal


def test_a_server_tags_sentences_as_predict_does(run):
  model = tokenprune_jax.load(run[0])
  wanted = [['bako', 'dice'], 'hape', 'fumo bako dice ' * 20, ['gilu']] * 3
  with model.serve(ladder=serve.Ladder((8, 24), batch_tokens=48), controls={'exit_threshold': 0.3}) as server:
    answers, first = list(server.map(wanted)), list(server.map(wanted, {'exit_threshold': 1.1}))
  for answer, expected in zip(answers, model.tagged(wanted)):
    assert answer[:2] == expected[:2]
    np.testing.assert_allclose(answer.probabilities, expected.probabilities, atol=1e-5)
  assert [len(answer.tags) for answer in first] == [len(answer.tags) for answer in answers]
  with pytest.raises(UserError, match="unknown control 'threshold'"):
    list(server.map(wanted, {'threshold': 1.0}))


def test_the_layers_that_words_exit_at(run):
  exported = pretrained.load_exported(run[0] / 'model')
  wanted = [['bako', 'dice', 'hape'], 'fumo gilu', 'fumo bako dice ' * 20]

  random = np.random.default_rng(0)  # trained exits are sure of all of these at the first layer
  other = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(x.dtype), exported.params['reducer'])

  def depths(threshold, given=wanted, **options):
    spec, params = (
      {**exported.reducer_spec, 'threshold': threshold, 'window': 1},
      {**exported.params, 'reducer': other},
    )
    return tagger.Tagger(dataclasses.replace(exported, reducer_spec=spec, params=params)).depths(
      given, **options
    )

  assert depths(0.0) == [(3,) * 3, (3,) * 2, (3,) * 60] and depths(1.1) == [(1,) * 3, (1,) * 2, (1,) * 60]
  found = depths(0.45)
  assert len({layer for layers in found for layer in layers}) > 1
  assert depths(0.45, wanted[:1], batch_size=1) == found[:1]


def test_calibration_goes_by_the_f1_of_spans(run, capsys, monkeypatch):
  folder, _ = run
  changed = ['--with', 'window=1', '--with', 'transitions=mask']
  assert calibrate.main([f'--run={folder}', '--macs=0.6', f'--out={folder}/cheap', *changed]) == 0
  said = capsys.readouterr().err
  assert 'f1' in said and 'accuracy' not in said
  cheap = pretrained.load_exported(folder / 'cheap')
  assert cheap.reducer_spec['threshold'] != 0.3 and cheap.constrained
  assert cheap.reducer_spec['tags'] == tuple(cheap.labels)  # what exits keep to is exported with them
  assert (cheap.reducer_spec['window'], cheap.reducer_spec['transitions']) == (1, 'mask')
  calibration = calibrate.Calibration(folder, limit=8)
  assert len(calibration.splits['valid'].words.sentences) == 8
  assert calibration.at(1.0).mac_ratio == pytest.approx(1, abs=0.02)
  assert calibration.at(1.0).spec['threshold'] == 0  # nothing removed is nothing, though exits cost a little
  with pytest.raises(
    UserError, match=r'the budget is 0.05, but .* where all exit at the first layer with an exit'
  ):
    calibration.at(0.05)
  monkeypatch.setattr(calibration, 'at', lambda budget: calibrate.Setting({}, 0.5, budget, 'f1'))
  with pytest.raises(
    UserError, match='no setting reaches 90.0% f1 on the validation split; the best there is'
  ):
    calibration.cheapest(0.9)


def test_sentences_from_another_run_and_what_cannot_be(run, data):
  folder, _ = run
  config = prune.get_config(f'sentee,{folder}').to_dict()
  config['reducer'] |= {'layers': (1, 2)}
  [joint] = config['stages']
  assert joint['init'] == str(folder) and joint['objective'] == 'tags_joint'
  assert config['task']['constrained'] and config['reducer']['level'] == 'sentence'
  plain = given('sentee', data)
  plain['data']['tagging']['scheme'] = 'plain'
  with pytest.raises(UserError, match='task.constrained is True, but the tags of file mark no spans'):
    train.run(plain, data / 'plain')
  plain['task']['constrained'], plain['reducer']['transitions'] = False, 'refuse'
  with pytest.raises(
    UserError, match="reducer.transitions is 'refuse', but the tags mark no spans: B-LOC, B-PER"
  ):
    train.run(plain, data / 'plain')
  with pytest.raises(UserError, match='an exit stands behind one of the layers 1 to 2'):
    train.run(given('sentee', data, reducer={'name': 'tokee', 'layers': (1, 5)}), data / 'none')
  words = settings.check(prune.get_config(f'tokee,{folder}').to_dict())
  assert [stage['teacher'] for stage in words['stages']] == ['', 'joint']
  words['reducer'] |= {'layers': (1, 2)}
  session.check_stages(words, session.load_weights(words), tasks.make('tag'))
