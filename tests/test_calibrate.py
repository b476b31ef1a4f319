"""A trained model set to a budget or an accuracy."""

import dataclasses
import re

import numpy as np
import pytest

import tokenprune_jax
from tests.tiny_run import config as tiny_config
from tokenprune_jax import calibrate, pretrained, train
from tokenprune_jax.errors import UserError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('calibrated') / 'run'
  wanted = tiny_config(reducer={'name': 'topk', 'shares': (0.9, 0.5)}, data__valid_limit=48)
  wanted['stages'] = ({'name': 'tune', 'epochs': 6},)
  train.run(wanted, folder)
  return folder


@pytest.fixture(scope='module')
def calibration(run):
  return calibrate.Calibration(run)


def test_a_model_is_set_to_a_budget_and_written_beside_the_run(run, capsys):
  before = pretrained.load_exported(run / 'model')
  assert calibrate.main([f'--run={run}', '--macs=0.6']) == 0
  [macs] = re.findall(r'MACs ([\d.]+)  accuracy', capsys.readouterr().err)
  assert float(macs) == pytest.approx(0.6, abs=0.01)
  found = pretrained.load_exported(run / 'calibrated')
  assert found.reducer_spec['shares'] != before.reducer_spec['shares']
  np.testing.assert_array_equal(
    found.params['encoder']['block_1']['value']['kernel'],
    before.params['encoder']['block_1']['value']['kernel'],
  )
  assert pretrained.load_exported(run / 'model').reducer_spec == before.reducer_spec
  assert tokenprune_jax.load(run / 'calibrated').predict(['some text'])[0]['label'] in before.labels


def test_capacities_that_batches_share_are_found_with_the_setting(run, tmp_path, capsys):
  exits = {'name': 'early_exit', 'layers': (1,), 'threshold': 0.5}
  wanted = tiny_config(reducer=exits, data__valid_limit=48)
  wanted['stages'] = ({'name': 'exits', 'epochs': 1, 'objective': 'exits_joint'},)
  train.run(wanted, tmp_path / 'run')
  assert calibrate.main([f'--run={tmp_path / "run"}', '--macs=0.8', '--batch=4', '--overflow=0.6']) == 0
  found = pretrained.load_exported(tmp_path / 'run' / 'calibrated').reducer_spec
  [(size, longest, slots, examples)] = found['batch_capacities']
  assert found['capacity_batch'] == size == 4 and longest <= 32 and max(slots[1], examples[1]) < 0.9
  texts = [f'some text of {i} words' for i in range(8)]
  model = tokenprune_jax.load(tmp_path / 'run' / 'calibrated')
  shared, alone = (model.predict(texts, batch_size=size) for size in (8, 1))
  for one, other in zip(shared, alone):  # what there is no room for is computed again
    assert one['probabilities'] == pytest.approx(other['probabilities'], abs=1e-4)
  calibration = calibrate.Calibration(tmp_path / 'run')
  for given, said in (
    ('threshold', "--with is 'threshold'; expected FIELD=VALUE"),
    ('ltp.scale=2', "--with is 'ltp.scale=2'; expected FIELD=VALUE"),
    ('name=topk', "--with is 'name=topk'; expected FIELD=VALUE"),
    ('threshold={[1]: 2}', r"threshold is '\{\[1\]: 2\}', a str; a float was expected"),
    ('thresold=0.2', "has no setting 'thresold'.*did you mean 'threshold'"),
    ('threshold=2', 'reducer.threshold is 2.0; it is a share'),
    (
      'head=attention',
      r'--with head=attention: reducer/exit_1/.*run has not learned that: choose what needs no training',
    ),
  ):
    with pytest.raises(UserError, match=said):
      calibration.change([given])
  other = calibrate.Calibration(tmp_path / 'run')
  other.change(['criterion=max_probability', 'threshold=0.5'])
  spec = other.at(0.8).spec
  assert spec['criterion'] == 'max_probability' and other.at(0.8).mac_ratio == pytest.approx(0.8, abs=0.05)
  # A setting of the method, as it is: all leave at the first exit. A request can have it too.
  all_leave = calibration.with_setting('threshold=1')
  assert all_leave.spec['threshold'] == 1.0 and all_leave.mac_ratio < 0.6
  for given in ('threshold', 'threshold=x', 'head=2'):
    with pytest.raises(UserError, match='expected NAME=NUMBER, and of early_exit one of threshold'):
      calibration.with_setting(given)
  plain = tokenprune_jax.load(tmp_path / 'run')
  calibration.export(all_leave, tmp_path / 'leaving')
  set_to, asked = (
    tokenprune_jax.load(tmp_path / 'leaving'),
    plain.predict(texts, controls={'exit_threshold': 1.0}),
  )
  assert asked == set_to.predict(texts) and asked != plain.predict(texts, controls={'exit_threshold': 0.0})
  with pytest.raises(UserError, match="unknown control 'threshold'; this method has: exit_threshold"):
    plain.predict(texts, controls={'threshold': 1.0})
  with pytest.raises(UserError, match='the control exit_threshold is 1.5'):
    plain.predict(texts, controls={'exit_threshold': 1.5})
  whole = calibration.whole()
  # Nobody leaves, though exits cost something.
  assert whole.spec['threshold'] == 0.0 and whole.mac_ratio >= 1
  capsys.readouterr()
  assert calibrate.main([f'--run={run}', '--macs=0.6', '--batch=4']) == 2
  assert 'topk has no capacities that a batch could share' in capsys.readouterr().err


def test_the_cheapest_setting_that_is_good_enough(calibration, monkeypatch, capsys):
  monkeypatch.setattr(calibrate, 'GRID', (0.05, 0.5, 0.8))
  settings = {0.5: 0.6, 0.8: 0.9, 1.0: 0.95}

  def at(budget):
    if budget not in settings:
      raise UserError('nothing is that cheap')
    return calibrate.Setting({'name': 'topk'}, settings[budget], budget)

  monkeypatch.setattr(calibration, 'at', at)
  assert [calibration.cheapest(goal).mac_ratio for goal in (0.5, 0.7, 0.9, 0.92)] == [0.5, 0.8, 0.8, 1.0]
  tried = capsys.readouterr().err.count('MACs')
  assert tried <= 4 * 2
  with pytest.raises(UserError, match=r'no setting reaches 99.0%.*the best there is 95.0%, at 1.00'):
    calibration.cheapest(0.99)


def test_what_less_alone_reaches_is_found(calibration, monkeypatch):
  accuracies = {0.2: 0.5, 0.4: 0.9, 0.6: 0.5, 0.8: 0.6, 1.0: 0.7}
  monkeypatch.setattr(calibrate, 'GRID', (0.2, 0.4, 0.6, 0.8))
  monkeypatch.setattr(calibration, 'at', lambda b: calibrate.Setting({}, accuracies[b], b))
  assert calibration.cheapest(0.85).mac_ratio == 0.4
  with pytest.raises(UserError, match='no setting reaches 95.0% accuracy.*the best there is 90.0%, at 0.40'):
    calibration.cheapest(0.95)


def test_nothing_removed_is_the_dense_model(calibration):
  whole = calibration.at(1.0)
  assert whole.mac_ratio == pytest.approx(1.0, abs=0.05)  # evidence is read all the same
  plain = calibration.measured({'name': 'none'})
  assert whole.accuracy == plain.accuracy and plain.mac_ratio == 1


def test_settings_that_are_controls_share_a_program(run):
  specs = [{'name': 'threshold', 'threshold': threshold} for threshold in (0.01, 0.03, 0.06)]
  one, before = calibrate.Calibration(run), calibrate.compiled.cache_info().misses
  together = [one.measured(spec) for spec in specs]
  assert calibrate.compiled.cache_info().misses == before + 1
  apart = [calibrate.Calibration(run).measured(spec) for spec in specs]
  assert together == apart and len({setting.mac_ratio for setting in apart}) == 3


def at_cost(calibration, monkeypatch, least=0.0):
  """Has `calibration` set at any budget from `least` on, without a look at the documents."""

  def at(budget):
    if budget < least:
      raise UserError(f'at least {least} are left')
    return calibrate.Setting({'budget': budget}, 0.9, budget)

  monkeypatch.setattr(calibration, 'at', at)


@pytest.mark.parametrize('share', [0.3, 0.5, 0.9])
def test_a_setting_for_a_time(calibration, monkeypatch, share, capsys):
  at_cost(calibration, monkeypatch)
  monkeypatch.setattr(calibration, 'time_of', lambda spec: 0.15 + spec['budget'])  # a part that stays
  setting = calibration.in_time(share)
  assert setting.time_ratio == pytest.approx(share, abs=calibrate.NEAR)
  assert setting.time_ratio == 0.15 + setting.mac_ratio
  assert f'time {setting.time_ratio:.3f} of dense' in capsys.readouterr().err


def test_a_time_that_nothing_needs_is_met_by_all(calibration, monkeypatch):
  at_cost(calibration, monkeypatch)
  monkeypatch.setattr(calibration, 'time_of', lambda spec: 0.5 * spec['budget'])
  assert calibration.in_time(0.9).mac_ratio == 1


def test_a_time_out_of_reach_names_the_fastest(calibration, monkeypatch):
  at_cost(calibration, monkeypatch, least=0.25)
  monkeypatch.setattr(calibration, 'time_of', lambda spec: 0.4 + spec['budget'])
  with pytest.raises(
    UserError, match=r'takes 0.40 of the time.*takes 0.65, at 0.25 of.*at least 0.25 are left'
  ):
    calibration.in_time(0.4)
  with pytest.raises(UserError, match='^at least 0.25 are left'):
    calibration.in_time(0.2)
  for share in (0.0, 1.1):
    with pytest.raises(UserError, match=f'the time is {share}'):
      calibration.in_time(share)


@pytest.mark.parametrize('executor', ['compact', 'serve'])
def test_the_clock_decides(run, monkeypatch, executor):
  calibration, asked = calibrate.Calibration(run), []
  assert calibration.executor == 'serve'  # the run only masks
  calibration.executor = executor
  beside = calibrate.timing.beside_dense

  def watched(models, batches, served):
    asked.append((models['model'][0].executor, tuple(served), sum(len(batch['ids']) for batch in batches)))
    return beside(models, batches, served=served)

  monkeypatch.setattr(calibrate.timing, 'beside_dense', watched)
  assert 0 < calibration.time_of(calibration.exported.reducer_spec) < 100
  assert asked[0][:2] == (executor, ('model',) if executor == 'serve' else ()) and asked[0][2] >= 48


def test_settings_are_found_on_documents_at_random(run, calibration):
  """Not on batches at random, of which a few hold a few lengths."""
  few, valid = calibrate.Calibration(run, limit=20, buckets=(8, 12, 16, 24)), calibration.splits['valid']
  rows = [valid.texts(i) for i in range(len(valid))]
  drawn = [few.sample.texts(i) for i in range(len(few.sample))]
  assert len(drawn) == 20 < len(rows) and drawn == [text for text in rows if text in set(drawn)]
  for i, text in enumerate(drawn):
    place = rows.index(text)
    np.testing.assert_array_equal(few.sample.ids(i), valid.ids(place))
    np.testing.assert_array_equal(few.sample.types(i), valid.types(place))
    assert (few.sample.label[i], few.sample.cut[i]) == (valid.label[place], valid.cut[place])
  seen = [batch['index'][batch['weight'] > 0] for batch in few.validation({'name': 'none'}).batches()]
  assert sorted(np.concatenate(seen).tolist()) == list(range(20))
  assert 0 < few.at(0.6).mac_ratio < 1
  assert len(calibrate.Calibration(run, limit=100).sample) == len(valid)


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--macs=0.01'], 'the budget is 0.01'),
    (['--macs=2'], 'the budget is 2.0'),
    (['--time=0'], 'the time is 0.0'),
    (['--accuracy=100'], 'no setting reaches 100.0% accuracy'),
    (['--accuracy=101'], 'the accuracy to reach is 101%'),
    (['--accuracy=nan'], 'the accuracy to reach is nan%'),
    (['--macs=0.5', '--documents=-3'], '--documents is -3'),
    (['--setting=threshold=0.3'], 'of topk one of none'),
  ],
)
def test_what_cannot_be_reached_is_told_in_one_line(run, options, words, capsys, monkeypatch):
  monkeypatch.setattr(calibrate, 'GRID', (0.5,))
  assert calibrate.main([f'--run={run}', f'--out={run}/none', *options]) == 2
  said = capsys.readouterr().err
  error = said.splitlines()[-1]
  assert words in error and error.startswith('error: ') and 'Traceback' not in said
  assert not (run / 'none').exists()


def test_where_nothing_is_cheap_enough_the_reason_is_told(calibration, monkeypatch):
  def at(budget):
    raise UserError('no method here can be set')

  monkeypatch.setattr(calibration, 'at', at)
  with pytest.raises(UserError, match='no method here can be set'):
    calibration.cheapest(0.5)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='no workdir of a finished run'):
    calibrate.Calibration(tmp_path)
  (tmp_path / 'model').mkdir()
  with pytest.raises(UserError, match='there is no config.json in it'):
    calibrate.Calibration(tmp_path)


def test_data_with_other_labels_are_refused(run):
  calibration = calibrate.Calibration(run)
  calibration.exported = dataclasses.replace(calibration.exported, labels=('a', 'b', 'c'))
  with pytest.raises(UserError, match='its model has a, b, c'):
    len(calibration.sample)


def test_other_data_than_the_run_s_are_refused(run):
  calibration = calibrate.Calibration(run)
  calibration.data['train_limit'] = 30
  with pytest.raises(UserError, match='data.json is of other data: train was'):
    len(calibration.sample)
