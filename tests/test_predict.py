"""Texts in, labels and kept words out, on a tiny random model that was exported and read back."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import tokenprune_jax
from tokenprune_jax import models, predict, pretrained
from tokenprune_jax.data.files import Columns
from tokenprune_jax.errors import UserError

COLUMNS = Columns('text')
WORDS = 'bako dice fumo gilu hape'
CHAIN = {
  'name': 'chain',
  'reducers': ({'name': 'fuzzy', 'ratio': 0.5, 'rule': 'rank'}, {'name': 'combine', 'slots': 3, 'layer': 3}),
}


def export(folder, spec, family='bert', max_length=24):
  source = pretrained.load(f'random:{family}:layers=3,width=16,heads=2,hidden=32,length=64')
  model = models.Classifier(source.config, models.make_reducer(spec), 3)
  params = jax.device_get(model.init_params(jax.random.key(1)))
  # So that labels differ from text to text.
  params['head']['out']['kernel'] = 20 * params['head']['out']['kernel']
  labels = ('bad', 'fair', 'good')
  pretrained.export(
    folder, source.config, params, source.tokenizer, labels,
    readout='mean', head='linear', reducer_spec=spec, max_length=max_length,
  )  # fmt: skip
  return folder


@pytest.fixture(scope='module')
def chained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')  # a workdir has the model in model/
  export(workdir / 'model', CHAIN)
  return workdir


@pytest.fixture(scope='module')
def predictor(chained):
  return tokenprune_jax.load(chained)


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  return tokenprune_jax.load(export(tmp_path_factory.mktemp('dense'), {'name': 'none'}))


def test_records(predictor):
  texts = [WORDS, 'gilu gilu fumo', 'hape, dice!']
  records = predictor.predict(texts)
  assert [record['text'] for record in records] == texts
  for record in records:
    assert list(record['probabilities']) == ['bad', 'fair', 'good']
    assert sum(record['probabilities'].values()) == pytest.approx(1, abs=1e-5)
    assert record['label'] == max(record['probabilities'], key=record['probabilities'].get)
    assert 'truncated' not in record
    assert {kept['word'] for kept in record['kept']} <= set(
      record['text'].replace(',', ' ,').replace('!', ' !').split()
    )
    assert all(0 < kept['share'] <= 1 for kept in record['kept'])
  json.dumps(records)


def test_batch_mates_and_padding_change_nothing(predictor):
  texts = [WORDS, 'a', 'gilu ' * 40, 'fumo dice']
  together = predictor.predict(texts)
  for record, other in zip(together, predictor.predict(texts, batch_size=1)):
    assert record['kept'] == other['kept'] and record['label'] == other['label']
    np.testing.assert_allclose(
      list(record['probabilities'].values()), list(other['probabilities'].values()), atol=2e-5
    )
  assert [predictor.predict([text])[0] for text in texts] == together


def test_dense_keeps_every_word(dense):
  record = dense.predict(['bako dice, fumo'])[0]
  assert record['kept'] == [{'word': word, 'share': 1.0} for word in ('bako', 'dice', ',', 'fumo')]


def test_kept_words_are_the_trace(predictor):
  """The shares of a word are the mean over its pieces of the trace, up to where tokens are combined."""
  text = 'bakozzz dice fumo gilu hape'
  reading = predictor.read(text)
  [(encoding, _)] = predictor.encode([text])
  ids = np.zeros((1, 24), int)
  ids[0, : len(encoding)] = encoding.ids
  batch = {'ids': ids, 'mask': np.arange(24)[None] < len(encoding), 'types': np.zeros_like(ids)}
  result = predictor.forward(predictor.params, batch)
  kept, assignment = np.asarray(result['kept'][0]), np.asarray(result['assignment'][0])
  assert not kept[2:].any() and kept[1].any()  # combined in place of layer 3
  pieces = [at for at, word in enumerate(encoding.word_ids) if word == 0]
  assert len(pieces) > 1 and reading.words[0].text == 'bakozzz'
  assert reading.words[0].shares == pytest.approx((1.0, kept[1, pieces].mean()))
  assert reading.words[0].slot == assignment[pieces[0]] and 0 <= reading.words[0].slot < 3
  assert any(word.shares[1] < 1 for word in reading.words)
  listed = {kept['word'] for kept in reading.record()['kept']}
  assert listed == {word.text for word in reading.words if word.shares[1] > 0}


def test_words_and_gaps_make_the_text(dense):
  text = 'Bako  dice,\nfumo\t(gilu)!'
  words = dense.read(text).words
  assert ''.join(word.gap + word.text for word in words) == text


def test_pairs(dense, tmp_path):
  roberta = predict.load(export(tmp_path / 'roberta', {'name': 'none'}, family='roberta'))
  for predictor in (dense, roberta):
    record = predictor.predict([('bako dice', 'fumo')])[0]
    assert record['text'] == ('bako dice', 'fumo')
    assert [kept['word'] for kept in record['kept']] == ['bako', 'dice', 'fumo']
    other = predictor.predict([('bako', 'dice fumo')])[0]
    assert other['probabilities'] != record['probabilities']
    swapped = predictor.predict([['fumo', 'bako dice']])[0]
    assert [kept['word'] for kept in swapped['kept']] == ['fumo', 'bako', 'dice']


def test_truncation_is_told(dense):
  record = dense.predict(['bako ' * 100])[0]
  pieces = len(dense.tokenizer('bako ' * 100, verbose=False)['input_ids'])
  assert record['truncated'] == pieces - 24
  assert sum(kept['word'] == 'bako' for kept in record['kept']) <= 22


def test_long_document(dense):
  record = dense.predict(['gilu ' * 100_000])[0]
  assert record['truncated'] > 100_000 and len(record['kept']) <= 22


@pytest.mark.parametrize('texts, message', [
  ([], 'no texts'),
  ('bako', 'one string'),
  (['bako', '  '], 'number 2 is empty'),
  (['bako', ('bako', 'dice')], 'two kinds'),
  ([('bako', '')], 'number 1 is empty'),
  ([3], 'expected a string'),
  ([('a', 'b', 'c')], 'expected a string'),
])  # fmt: skip
def test_bad_texts(dense, texts, message):
  with pytest.raises(UserError, match=message):
    dense.predict(texts)


def test_no_model(tmp_path):
  with pytest.raises(UserError, match='no trained model'):
    tokenprune_jax.load(tmp_path)


def test_light_import():
  """`import tokenprune_jax` brings neither JAX nor transformers."""
  code = "import sys, tokenprune_jax; print([m for m in ('jax', 'transformers', 'flax') if m in sys.modules])"
  assert (
    subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'
  )


@pytest.mark.parametrize('name, content', [
  ('texts.txt', 'bako dice\nfumo, gilu\n'),
  ('texts.csv', 'id,text\r\n1,bako dice\r\n2,"fumo, gilu"\r\n'),
  ('texts.tsv', 'text\tid\nbako dice\t1\nfumo, gilu\t2\n'),
  ('texts.jsonl', '{"text": "bako dice"}\n{"text": "fumo, gilu", "other": 1}\n'),
])  # fmt: skip
def test_formats(tmp_path, name, content):
  (tmp_path / name).write_bytes(b'\xef\xbb\xbf' + content.encode())  # with the mark that spreadsheets write
  assert predict.read_texts(tmp_path / name, COLUMNS) == ['bako dice', 'fumo, gilu']


def test_file_in_records_out(chained, predictor, tmp_path):
  (tmp_path / 'texts.txt').write_text('bako dice\nfumo, gilu\n')
  assert predict.predict_file(chained, tmp_path / 'texts.txt', tmp_path / 'out.jsonl') == 2
  records = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert records == predictor.predict(['bako dice', 'fumo, gilu'])


def test_pair_file_with_the_columns_of_the_run(chained, tmp_path):
  """A run on a user's file knows what its columns are called."""
  shutil.copytree(chained, tmp_path / 'run')
  (tmp_path / 'run' / 'config.json').write_text('{"data": {"text": "title", "text_pair": "body"}}')
  (tmp_path / 'pairs.csv').write_text('title,body\nbako,dice\nfumo,gilu\n')
  predict.predict_file(tmp_path / 'run', tmp_path / 'pairs.csv', tmp_path / 'out.jsonl')
  records = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert records[1]['text'] == ['fumo', 'gilu']


def test_odd_line_separators_do_not_split_a_text(tmp_path):
  file = tmp_path / 'texts.txt'
  file.write_text('bako\u2028dice\x0bfumo\ngilu\n')
  assert predict.read_texts(file, COLUMNS) == ['bako\u2028dice\x0bfumo', 'gilu']


@pytest.mark.parametrize('name, content, message', [
  ('a.txt', b'bako\n\ngilu\n', r'a\.txt:2: the text is empty'),
  ('a.txt', b'bako\ngi\xfflu\n', r'a\.txt:2: invalid UTF-8'),
  ('a.txt', b'', 'holds no texts'),
  ('a.csv', b'text\n', 'holds no rows'),
  ('a.csv', b'text,id\nbako,1\n  ,2\n', r'a\.csv:3: the text is empty'),
  ('a.csv', b'text\nbako\ngi\xfflu\n', r'a\.csv:3: text: invalid UTF-8'),
  ('a.csv', b'body\nbako\n', "no column named 'text'"),
  ('a.jsonl', b'{"text": "bako"}\n{"text": 3}\n', r'a\.jsonl:2: text: expected a text'),
  ('a.jsonl', b'{"text": "bako"\n', r'a\.jsonl:1: not JSON'),
  ('a.jsonl', b'[1]\n', r'a\.jsonl:1: expected a JSON object'),
  ('a.pdf', b'bako\n', 'expected a file that ends in'),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message):
    predict.read_texts(tmp_path / name, COLUMNS)


def test_missing_file(tmp_path):
  for name in ('nothing.txt', 'nothing.csv'):
    with pytest.raises(UserError, match='config.predict.*No such file'):
      predict.read_texts(tmp_path / name, COLUMNS)


def test_a_bad_file_leaves_the_earlier_output(chained, tmp_path):
  (tmp_path / 'a.txt').write_text('bako\n \n')
  (tmp_path / 'out.jsonl').write_text('earlier\n')
  with pytest.raises(UserError, match='empty'):
    predict.predict_file(chained, tmp_path / 'a.txt', tmp_path / 'out.jsonl')
  assert (tmp_path / 'out.jsonl').read_text() == 'earlier\n'


def test_a_server_answers_texts_and_pairs_as_predict_does(predictor):
  texts = [WORDS, 'gilu gilu fumo', ('hape', 'dice dice'), 'fumo ' * 100]
  plain = [predictor.predict([text])[0] for text in texts]
  with predictor.serve(queue=4) as server:
    answers = list(server.map(texts))
  assert [answer.label for answer in answers] == [record['label'] for record in plain]
  for answer, record in zip(answers, plain):
    np.testing.assert_allclose(answer.probabilities, list(record['probabilities'].values()), atol=1e-5)
    assert answer.truncated == record.get('truncated', 0)
  assert 0 < answers[-1].macs < answers[-1].dense_macs


def test_a_text_that_overflows_is_read_again_in_full(tmp_path):
  spec = {'name': 'threshold', 'threshold': 0.0, 'capacities': (1.0, 0.2, 0.2)}
  folder = export(tmp_path, spec)
  compact, exact = (
    tokenprune_jax.load(folder, executor).predict([WORDS * 3]) for executor in ('compact', 'mask')
  )
  assert compact[0]['probabilities'] == pytest.approx(exact[0]['probabilities'], abs=1e-5)
