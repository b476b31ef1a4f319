"""The half-depth student: its loss against a loop, its two stages, and what is refused."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_run import config as tiny_config
from tests.tiny_run import lines
from tokenprune_jax import answers, initial, models, predict, session, settings, stages, tasks, train
from tokenprune_jax.errors import UserError


def test_divergence_is_that_of_softened_logits():
  rng = np.random.default_rng(0)
  teacher, pupil = rng.normal(size=(2, 3, 4)).astype(np.float32)
  for row, found in enumerate(tasks.softened(jnp.asarray(teacher), jnp.asarray(pupil))):
    p, q = (np.exp(x[row] / 2) / np.exp(x[row] / 2).sum() for x in (teacher, pupil))
    assert float(found) == pytest.approx(4 * sum(a * math.log(a / b) for a, b in zip(p, q)), rel=1e-4)


def test_states_are_apart_by_their_angle_whatever_their_lengths():
  rng = np.random.default_rng(0)
  teacher, pupil = rng.normal(size=(2, 3, 4)).astype(np.float32)
  for row, found in enumerate(tasks.apart(jnp.asarray(teacher), jnp.asarray(5 * pupil))):
    a, b = teacher[row].tolist(), pupil[row].tolist()
    cosine = sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
    assert float(found) == pytest.approx(1 - cosine, rel=1e-4)
  same, nothing = jnp.asarray(teacher), jnp.zeros((3, 4))
  assert np.allclose(tasks.apart(same, same), 0, atol=1e-6) and np.all(tasks.apart(same, nothing) == 1)


@pytest.mark.parametrize('labels', ['of rows', 'of words'])
def test_states_count_where_labels_do(labels):
  rng = np.random.default_rng(0)
  shape = (3,) if labels == 'of rows' else (3, 4)
  label = np.maximum(rng.integers(-1, 3, size=shape), -1 if labels == 'of words' else 0)
  batch = {'label': jnp.asarray(label), 'weight': jnp.asarray([1.0, 1.0, 0.0])}
  logits, states = rng.normal(size=(2, *shape, 3)), rng.normal(size=(2, *shape, 5))
  mine, theirs = (
    SimpleNamespace(logits=jnp.asarray(a), read=jnp.asarray(b), loss=0.25) for a, b in zip(logits, states)
  )
  task = tasks.make('classify' if labels == 'of rows' else 'tag')

  def loss(states):
    return stages.distillation(task, states)(lambda *_: mine, None, batch, None, lambda _: theirs)

  counts = (label >= 0) & (np.arange(3) < 2).reshape(-1, *[1] * (label.ndim - 1))
  far = np.asarray(tasks.apart(theirs.read, mine.read))[counts].mean()
  assert float(loss(True)[1]['states_loss']) == pytest.approx(far, rel=1e-5)
  assert float(loss(True)[0] - loss(False)[0]) == pytest.approx(far, rel=1e-4)


def distilled(**changes):
  wanted = tiny_config(
    reducer={'name': 'student', 'layers': (1, 4)},
    model__weights='random:bert:layers=4,width=32,heads=2,hidden=64,vocab=256',
    **changes,
  )
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1, 'reducer': {'name': 'none'}},
    {'name': 'distil', 'epochs': 2, 'init': 'tune', 'teacher': 'tune', 'objective': 'distil_states'},
  )
  return wanted


def test_a_student_is_distilled_from_the_stage_before(tmp_path):
  wanted = distilled(task__readout='cls', task__head='family')
  outcome = train.run(wanted, tmp_path)
  assert outcome['mac_ratio'] == pytest.approx(0.5, abs=0.01)
  # Its own layers alone are a model of the family, with the same answers.
  raw = json.loads((tmp_path / 'student' / 'config.json').read_text())
  assert raw['num_hidden_layers'] == 2 and raw['architectures'] == ['BertForSequenceClassification']
  assert not (tmp_path / 'student' / 'tokenprune.safetensors').exists()
  texts = ['a slow start', 'but what an ending it had']
  whole, own = (predict.load(tmp_path / name).predict(texts) for name in ('model', 'student'))
  for reading, other in zip(whole, own, strict=True):
    assert list(reading['probabilities'].values()) == pytest.approx(
      list(other['probabilities'].values()), abs=1e-6
    )
  rows = [row for row in lines(tmp_path, 'train') if row['stage'] == 'distil']
  assert rows[-1]['distil_loss'] < rows[0]['distil_loss'] and rows[-1]['states_loss'] < rows[0]['states_loss']


def test_a_teacher_of_another_run_answers_as_it_was_trained(tmp_path):
  train.run(
    tiny_config(task__readout='cls', task__head='family', stages=({'name': 'tune', 'epochs': 1},)),
    tmp_path / 'a',
  )
  wanted = settings.check(
    tiny_config(stages=({'name': 'own', 'teacher': str(tmp_path / 'a'), 'objective': 'distil'},))
  )
  prepared = session.prepare(wanted, tmp_path / 'b')
  model, params = train.teacher_of(prepared, str(tmp_path / 'a'), {})
  assert (model.readout, model.head) == ('cls', 'family') and 'dense' in params['head']
  batch = next(iter(session.batches(prepared, 'test', 8).iterator(0)))
  odds = jax.nn.softmax(model.apply({'params': params}, jax.tree.map(jnp.asarray, batch)).logits)
  records = [
    json.loads(line) for line in (tmp_path / 'a' / 'predictions_test.jsonl').read_text().splitlines()
  ]
  told = [list(records[index]['probabilities']) for index in batch['index']]
  np.testing.assert_allclose(odds, told, atol=1e-4)
  with pytest.raises(UserError, match='has the labels bees, cats, dogs; here they are x, y'):
    initial.teacher(str(tmp_path / 'a'), model.config, ('x', 'y'))
  # A head that has learned to read something else is not taken.
  found = initial.from_run(
    str(tmp_path / 'a'), model.config, prepared.dataset.labels, 'mean', 'linear', {'name': 'none'}
  )
  assert 'encoder' in found and set(found) <= {'encoder', 'reducer'}


# Texts of several lengths, and a batch with a filler.
def test_a_teacher_asked_once_says_what_it_says_at_every_step(tmp_path, monkeypatch, capsys):
  wanted = distilled(data__buckets=(16, 32), data__train_limit=45)
  train.run(wanted, tmp_path / 'once')
  assert capsys.readouterr().err.count('the teacher answers 45 texts, once') == 1
  monkeypatch.setattr(answers, 'MOST_BYTES', 0)
  train.run(wanted, tmp_path / 'anew')
  assert 'the teacher answers' not in capsys.readouterr().err
  once, anew = (lines(tmp_path / name, 'train') for name in ('once', 'anew'))
  for name in ('distil_loss', 'states_loss', 'loss', 'grad_norm'):
    values = [[row[name] for row in rows if row['stage'] == 'distil'] for rows in (once, anew)]
    assert len(values[0]) == 12 and np.allclose(*values, rtol=2e-3), name


def test_without_a_teacher_it_is_refused(tmp_path):
  wanted = tiny_config(reducer={'name': 'student', 'layers': (1,)})
  wanted['stages'] = ({'name': 'distil', 'objective': 'distil'},)
  with pytest.raises(UserError, match="'distil' needs a teacher"):
    train.run(wanted, tmp_path)


@pytest.mark.parametrize('layers', [(0, 1), (2, 1), (1, 7), (1, 1)])
def test_layers_that_the_teacher_has_not_are_refused(layers):
  with pytest.raises(UserError, match='which has 1 to 4'):
    models.make_reducer({'name': 'student', 'layers': layers}).check(4, 4)
