"""Tagging words end to end: the loss and scores against loops, a whole run, its records, and the trained model in use."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import tokenprune_jax
from tests.tiny_run import config, lines
from tokenprune_jax import (
  data,
  evaluate,
  metrics,
  models,
  pretrained,
  serve,
  settings,
  stages,
  tagger,
  tasks,
  train,
)
from tokenprune_jax.data import windows
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.errors import UserError

NAMES = ('B-LOC', 'B-PER', 'I-PER', 'O')
MEANT = {'bako': 'B-PER', 'dice': 'I-PER', 'fumo': 'B-LOC'}
TAGGING = settings.DEFAULTS['data']['tagging']


def sentences(count, seed):
  """CoNLL lines whose tags follow from the words, those of `dice` from the word before."""
  random, text = np.random.default_rng(seed), ''
  for _ in range(count):
    words = random.choice(['bako', 'bako dice', 'fumo', 'gilu', 'hape', 'jeko'], size=random.integers(2, 9))
    for word in ' '.join(words).split():
      text += f'{word} {MEANT.get(word, "O")}\n'
    text += '\n'
  return text


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """(workdir, result) of a run whose last valid sentence is longer than the model, with top-k and `compact`."""
  folder = tmp_path_factory.mktemp('tagging')
  long = '\n'.join([sentences(1, 7).strip()] * 6) + '\n'
  (folder / 'train.conll').write_text(sentences(64, 0))
  (folder / 'test.conll').write_text(sentences(20, 1) + long)
  (folder / 'words.txt').write_text('bako dice hape\nfumo gilu\n')
  wanted = config(
    task__name='tag', task__readout='tokens', data__name='file', data__max_length=24, data__buckets=(24,),
    data__train=str(folder / 'train.conll'), data__valid=str(folder / 'test.conll'), data__test=str(folder / 'test.conll'),
    data__train_limit=0, data__valid_limit=0, data__test_limit=0,
    model__executor='compact', reducer={'name': 'topk', 'ratio': 0.8}, stages=({'name': 'tune', 'epochs': 4},),
    optimizer__learning_rate=4e-3, predict=str(folder / 'words.txt'),
  )  # fmt: skip
  return folder / 'run', train.run(wanted, folder / 'run')


def read(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_ends_with_scores_of_spans_and_a_record_a_sentence(run):
  folder, result = run
  records = read(folder / 'predictions_test.jsonl')
  scores = metrics.span_scores([r['tags'] for r in records], [r['predicted'] for r in records])
  assert {name: result['metrics'][name] for name in scores} == pytest.approx(scores)
  right = [tag == said for r in records for tag, said in zip(r['tags'], r['predicted'])]
  assert result['metrics']['accuracy'] == pytest.approx(np.mean(right)) and result['words'] == len(right)
  assert result['metrics']['f1'] > 0.5 and result['labels'] == list(NAMES)
  assert result['sentences'] == len(records) == 21 < result['examples']
  assert sum(r['macs'] for r in records) == pytest.approx(
    result['macs_per_example'] * result['examples'], rel=1e-5
  )
  assert 0 < result['mac_ratio'] < 1 and all(0 < r['keep_ratio'] < 1 for r in records)
  assert len(records[-1]['words']) > 24 and sum(r['length'] for r in records) > result['words']
  best = min(lines(folder, 'valid'), key=lambda row: row['loss'])
  # Valid is test here: the best checkpoint was kept.
  assert best['f1'] == pytest.approx(result['metrics']['f1'])


def test_the_trained_model_tags_words_strings_and_files(run):
  folder, _ = run
  model, records = tokenprune_jax.load(folder), read(folder / 'predictions_test.jsonl')
  found = model.predict([record['words'] for record in records])
  for ours, record in zip(found, records):
    assert list(ours['tags']) == record['predicted'] and list(ours['words']) == record['words']
    np.testing.assert_allclose(ours['probabilities'], record['probabilities'], atol=1e-4)
    for span in ours['spans']:
      assert span['text'] == ' '.join(record['words'][span['start'] : span['stop']])
      assert record['predicted'][span['start']].endswith(span['kind'])
  assert [record['words'] for record in read(folder / 'predicted.jsonl')] == [
    ['bako', 'dice', 'hape'],
    ['fumo', 'gilu'],
  ]
  alone = model.predict(['bako dice hape', ['fumo', 'gilu']], batch_size=1)
  assert json.loads(json.dumps(alone)) == [{**r, 'probabilities': pytest.approx(r['probabilities'], abs=1e-4)}
                                           for r in read(folder / 'predicted.jsonl')]  # fmt: skip


def test_sentences_that_overflow_are_tagged_again(run):
  exported = pretrained.load_exported(run[0] / 'model')
  capacities = (1.0, *[0.2] * (exported.config.depth - 1))
  exported = dataclasses.replace(
    exported, reducer_spec={'name': 'threshold', 'threshold': 0.0, 'capacities': capacities}
  )
  given = ['bako dice hape gilu fumo jeko', 'fumo', 'gilu bako dice ' * 10]
  tight, exact = (tagger.Tagger(exported, executor) for executor in ('compact', 'mask'))
  flags = [bool(result['overflow']) for _, result in sorted(tight.results(tight.split(given), 4))]
  assert flags[0] and not flags[1]
  for found, expected in zip(tight.tagged(given), exact.tagged(given)):
    assert found[:2] == expected[:2]
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)


def test_a_server_answers_as_predict_does(run):
  model = tokenprune_jax.load(run[0])
  given = [['bako', 'dice'], 'hape', 'fumo bako dice ' * 20, ['gilu']]
  with model.serve(ladder=serve.Ladder((24,))) as server:
    answers = list(server.map(given))
    found = server.map(['gilu', ' ', 'dice'])
    assert next(found)[:2] == answers[3][:2]  # what came before is answered
    with pytest.raises(UserError, match='sentence number 2: the sentence is empty'):
      next(found)
  for answer, expected in zip(answers, model.tagged(given)):
    assert answer[:2] == expected[:2]
    np.testing.assert_allclose(answer.probabilities, expected.probabilities, atol=1e-5)


@pytest.mark.parametrize(
  'given, message',
  [
    ('bako', 'one string; expected a list of sentences'),
    ([], 'no sentences to tag'),
    (['bako', ' '], 'sentence number 2: the sentence is empty'),
    ([['bako', '']], 'sentence number 1: word 2: it is empty'),
    ([['bako\ud800']], 'word 1: invalid UTF-8'),
    ([3], 'sentence number 1 is 3; expected a list of words'),
  ],
)
def test_bad_sentences(run, given, message):
  with pytest.raises(UserError, match=message):
    tokenprune_jax.load(run[0]).predict(given)


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('a.txt', b'bako\n\n', r'a\.txt:2: the sentence is empty'),
    ('a.txt', b'bako\n\xff\n', r'a\.txt:2: invalid UTF-8'),
    ('a.txt', b'', 'holds no sentences'),
    ('a.conll', b'bako O\ndice\n', r'a\.conll:2: 1 columns where the lines before have 2'),
    ('a.jsonl', b'{"words": ["bako"]}\n{"words": []}\n', r'a\.jsonl:2: the sentence is empty'),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    tagger.read_sentences(tmp_path / name, settings.DEFAULTS['data'])


@pytest.mark.parametrize('name, content', [
  ('a.txt', 'bako dice\n fumo\n'),
  ('a.conll', '# a comment\nbako\ndice\n\nfumo\n'),
  ('a.tsv', 'bako\tX\tO\ndice\tX\tO\n\nfumo\tX\tB-LOC\n'),
  ('a.jsonl', '{"words": ["bako", "dice"]}\n{"words": ["fumo"], "tags": ["O"]}\n'),
])  # fmt: skip
def test_files_of_sentences(tmp_path, name, content):
  (tmp_path / name).write_text(content)
  assert tagger.read_sentences(tmp_path / name, settings.DEFAULTS['data']) == [('bako', 'dice'), ('fumo',)]


def test_the_loss_is_the_mean_over_labelled_words_by_weight_in_parts_too():
  random = np.random.default_rng(0)
  logits = random.normal(size=(4, 5, 3)).astype(np.float32)
  label, weight = random.integers(-1, 3, size=(4, 5)), np.array([1, 2, 0, 1], np.float32)
  label[3] = -1  # a row of which nothing is asked
  logits[2] = logits[label < 0] = np.nan  # must not count, whatever it is
  total = share = 0.0
  for row in range(4):
    for token in range(5):
      if label[row, token] >= 0 and weight[row]:
        odds = np.exp(logits[row, token].astype(np.float64))
        total -= weight[row] * np.log(odds[label[row, token]] / odds.sum())
        share += weight[row]
  batch = {'label': jnp.asarray(label), 'weight': jnp.asarray(weight)}
  loss = tasks.make('tag').loss
  assert float(loss(jnp.asarray(logits), batch)) == pytest.approx(total / share, rel=1e-5)
  assert float(loss(jnp.asarray(logits), {**batch, 'weight': jnp.zeros(4)})) == 0

  def gradient(batch, key):
    return jax.value_and_grad(lambda scale: loss(scale * batch['logits'], batch))(1.0)

  whole, parts = (
    train.accumulated(gradient, {**batch, 'logits': jnp.nan_to_num(logits)}, jax.random.key(0), n)
    for n in (1, 2)
  )
  np.testing.assert_allclose(whole, parts, rtol=1e-5)


def test_evaluation_matches_a_loop_over_windows_and_batches_change_nothing():
  source = pretrained.load('random:bert:layers=2,width=16,heads=2,hidden=32,length=64')
  model = models.Classifier(source.config, models.make_reducer({'name': 'none'}), 4, readout='tokens')
  params = jax.device_get(model.init_params(jax.random.key(2)))
  params['head']['out']['kernel'] = 20 * params['head']['out']['kernel']
  random = np.random.default_rng(0)
  given = [
    Sentence(tuple(random.choice(['bako', 'dicefumo', 'gilu'], n)), tuple(random.choice(NAMES, n)), 'f', 1)
    for n in (3, 1, 30, 7, 2)
  ]
  encoder = windows.WordEncoder(source.tokenizer, 20)
  split = windows.encode_sentences([[sentence] for sentence in given], encoder, NAMES, 'bio', TAGGING)
  assert len(split) > 7
  forward, answers, losses = jax.jit(model.apply), [], []
  for i in range(len(split)):
    ids = np.pad(split.ids(i), (0, 20 - split.lengths[i]))[None]
    batch = {'ids': ids, 'mask': np.arange(20)[None] < split.lengths[i], 'types': np.zeros_like(ids)}
    logits = np.asarray(forward({'params': params}, batch).logits[0], np.float64)
    for token, label in enumerate(split.tags[split.place(i)]):
      if label >= 0:
        answers.append(NAMES[int(logits[token].argmax())])
        losses.append(np.log(np.exp(logits[token]).sum()) - logits[token, label])
  task = tasks.make('tag')
  found, records = evaluate.evaluate(model, params, split, task, batch_size=4, buckets=(10, 20), pad_id=0)
  assert [tag for record in records for tag in record['predicted']] == answers
  assert [tuple(record['tags']) for record in records] == [sentence.tags for sentence in given]
  assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-4) and found['words'] == len(answers) == 43
  assert found['accuracy'] == np.mean(
    [tag == said for s, r in zip(given, records) for tag, said in zip(s.tags, r['predicted'])]
  )
  other, others = evaluate.evaluate(model, params, split, task, batch_size=3, buckets=(20,), pad_id=0)
  assert [r['predicted'] for r in others] == [r['predicted'] for r in records]
  assert other['loss'] == pytest.approx(found['loss'], rel=1e-5)
  plain = data.Words(NAMES, 'plain', split.words.sentences, split.words.example)
  assert set(task.scores(np.eye(4)[[0, 1]], np.array([0, 0]), plain)) == {'accuracy'}


def test_settings_that_do_not_belong_together():
  for key, value, message in (
    ('task__name', 'tag', "'tag' and 'tokens' belong together"),
    ('task__readout', 'tokens', "'tag' and 'tokens' belong together"),
    ('data__tagging', {'overlap': 0.7}, 'config.data.tagging.overlap is 0.7; expected a share from 0 to 0.5'),
    ('data__tagging', {'scheme': 'iob'}, "expected one of 'as_given', 'bio', 'bioes', 'plain'"),
    ('data__tagging', {'window': 3}, 'unknown key config.data.tagging.window'),
    ('task__constrained', True, "constrained is True; it goes with config.task.name='tag'"),
  ):
    with pytest.raises(UserError, match=message):
      settings.check(config(**{key: value}))


def test_a_student_is_distilled_on_labelled_words_alone():
  random = np.random.default_rng(0)
  mine, theirs = random.normal(size=(2, 3, 4, 3)).astype(np.float32)
  label = random.integers(-1, 3, size=(3, 4))
  batch = {'label': jnp.asarray(label), 'weight': jnp.ones(3)}

  def output(logits):
    return SimpleNamespace(logits=jnp.where((label >= 0)[..., None], logits, np.inf), loss=0.0)

  distil = stages.distillation(tasks.make('tag'))
  loss, found = distil(lambda *_: output(mine), None, batch, None, lambda _: output(theirs))
  at = label >= 0
  task = -np.mean(np.log(softmax(mine[at], 1)[np.arange(at.sum()), label[at]]))
  p, q = softmax(theirs[at] / 2, 1), softmax(mine[at] / 2, 1)
  assert float(found['task_loss']) == pytest.approx(task, rel=1e-5)
  assert float(loss) == pytest.approx(0.5 * (task + 4 * np.mean((p * np.log(p / q)).sum(1))), rel=1e-4)


def test_a_loaded_tagger_reads_long_sentences_as_its_run_does(run, tmp_path):
  folder, _ = run
  long = ['gilu ' * 60]
  assert len(tokenprune_jax.load(folder).predict(long)[0]['tags']) == 60
  shutil.copytree(folder / 'model', tmp_path / 'run' / 'model')
  wanted = json.loads((folder / 'config.json').read_text())
  wanted['data']['tagging']['long'] = 'error'
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(wanted))
  with pytest.raises(UserError, match='data.tagging.long'):
    tokenprune_jax.load(tmp_path / 'run').predict(long)
