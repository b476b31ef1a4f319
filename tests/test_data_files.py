"""A user's files: what is read, and one clear error or a counted skip for whatever is wrong in them."""

import csv
import json
import os
import time

import numpy as np
import pytest

from tokenprune_jax import data
from tokenprune_jax.errors import UserError
from tokenprune_jax.random_model import make_tokenizer

GOOD = [(f'word{i} ba be bi', ('no', 'yes')[i % 2]) for i in range(20)]


@pytest.fixture(scope='module')
def tokenizer():
  return make_tokenizer('bert', 400, 64)


def write_csv(path, rows, header=('text', 'label'), **options):
  with open(path, 'w', encoding='utf-8', newline='') as file:
    csv.writer(file, **options).writerows([header, *rows])
  return str(path)


@pytest.fixture
def load(tmp_path, tokenizer):
  def load_file(train, max_length=32, **spec):
    spec = {'name': 'file', 'train': str(train), **spec}
    return data.load(spec, tokenizer, max_length, tmp_path / 'cache', seed=0)

  return load_file


def all_texts(dataset):
  return {(split.texts(i), dataset.labels[split.label[i]]) for split in dataset.splits.values()
          for i in range(len(split))}  # fmt: skip


def test_csv_tsv_and_jsonl_hold_the_same_documents(tmp_path, load):
  rows = [(f'{text}, "quoted"\nsecond line\t{i} £', label) for i, (text, label) in enumerate(GOOD)]
  write_csv(tmp_path / 'a.csv', rows)
  write_csv(tmp_path / 'a.tsv', rows, delimiter='\t')
  lines = [json.dumps({'text': text, 'label': label}) for text, label in rows]
  (tmp_path / 'a.jsonl').write_text('\n\n'.join(lines), encoding='utf-8')
  for name in ('a.csv', 'a.tsv', 'a.jsonl'):
    dataset = load(tmp_path / name)
    assert all_texts(dataset) == set(rows)
    assert dataset.labels == ('no', 'yes')
    assert [len(dataset.splits[name]) for name in ('train', 'valid', 'test')] == [12, 4, 4]


def test_named_columns_pairs_and_given_files(tmp_path, load):
  header = ('id', 'premise', 'gold', 'hypothesis')
  paths = {}
  for split, count in (('train', 8), ('valid', 4), ('test', 6)):
    rows = [(i, f'{split} ba {i}', i % 2, f'be {i}') for i in range(count)]
    paths[split] = write_csv(tmp_path / f'{split}.csv', rows, header)
  # Given order counts.
  dataset = load(**paths, text='premise', text_pair='hypothesis', label='gold', labels=('1', '0'))
  assert dataset.labels == ('1', '0')
  test = dataset.splits['test']
  assert len(dataset.splits['train']) == 8
  assert [(test.texts(i), test.pairs(i)) for i in range(2)] == [('test ba 0', 'be 0'), ('test ba 1', 'be 1')]
  np.testing.assert_array_equal(test.label, [1, 0, 1, 0, 1, 0])  # rows stay in the order of the file
  assert set(test.types(0).tolist()) == {0, 1}


def test_labels_are_sorted_numbers_by_value(tmp_path, load):
  rows = [{'text': f'ba {i}', 'label': [10, 9, '-1', True][i % 4]} for i in range(16)]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  assert load(path).labels == ('-1', '9', '10', 'true')


def test_changed_content_is_read_again_and_unchanged_content_is_not(tmp_path, load):
  path = tmp_path / 'a.csv'
  write_csv(path, GOOD)
  first = all_texts(load(path))
  before = {file: file.stat().st_mtime_ns for file in (tmp_path / 'cache').rglob('*.array_record*')}
  assert before and all_texts(load(path)) == first
  assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / 'cache').rglob('*.array_record*')}
  write_csv(path, [*GOOD, ('a new one', 'yes')])
  assert all_texts(load(path)) == first | {('a new one', 'yes')}


# What is wrong in line 3 of a file, and a piece of the message about it.
BAD_LINES = {
  'empty text.csv': ('  ,no', 'text is empty'),
  'no label.csv': ('some words,', 'label: there is no label'),
  'few cells.csv': ('some words', '1 cells where the header has 2'),
  'many cells.csv': ('some, words,no', '3 cells where the header has 2'),
  'stray quote.csv': ('"some" words,no', 'quotes inside quoted text must be doubled'),
  'latin-1.csv': ('some \udca3 words,no', 'text: invalid UTF-8 at character 5'),
  'not json.jsonl': ('{"text": "some words", ', 'not JSON'),
  'a list.jsonl': ('["some words", "no"]', 'expected a JSON object, found list'),
  'no key.jsonl': ('{"text": "some words"}', "no key 'label'"),
  'null.jsonl': ('{"text": null, "label": "no"}', 'text: expected a text, found NoneType'),
  'number.jsonl': ('{"text": 17, "label": "no"}', 'text: expected a text, found int'),
  'empty.jsonl': ('{"text": "", "label": "no"}', 'text is empty'),
  'half a character.jsonl': (r'{"text": "\ud83d", "label": "no"}', 'text: invalid UTF-8'),
  'label null.jsonl': ('{"text": "some words", "label": null}', 'label: expected text or a whole number'),
  'deep.jsonl': ('[' * 100_000, 'not JSON'),
}


@pytest.mark.parametrize('name', BAD_LINES)
def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, load, name):
  bad, message = BAD_LINES[name]
  if name.endswith('.csv'):
    lines = ['text,label', *(','.join(row) for row in GOOD)]
    line = 3
  else:
    lines = [json.dumps({'text': text, 'label': label}) for text, label in GOOD]
    line = 3
  lines.insert(line - 1, bad)
  path = tmp_path / name
  path.write_bytes('\n'.join(lines).encode('utf-8', 'surrogateescape'))
  with pytest.raises(UserError) as error:
    load(path)
  assert f'{path}:3: ' in str(error.value) and message in str(error.value)
  for _ in range(2):  # the second time from the cache
    dataset = load(path, on_bad_row='skip')
    assert dataset.skipped == 1
    assert all_texts(dataset) == set(GOOD)
    assert f'{path}:3: ' in dataset.describe() and '1 rows that cannot be used' in dataset.describe()


def test_an_unknown_label_is_named_or_skipped(tmp_path, load):
  path = write_csv(tmp_path / 'a.csv', [*GOOD, ('odd one', 'maybe')])
  with pytest.raises(UserError, match=r"a\.csv:22: 'maybe' is none of the classes no, yes"):
    load(path, labels=('no', 'yes'))
  assert load(path, labels=('no', 'yes'), on_bad_row='skip').skipped == 1
  test = write_csv(tmp_path / 'test.csv', [('unseen', 'perhaps')])
  with pytest.raises(UserError, match=r"test\.csv:2: 'perhaps' is none of the classes maybe, no, yes"):
    load(path, test=test)


def test_a_line_number_counts_lines_not_rows(tmp_path, load):
  rows = [('two\nlines', 'no'), ('', 'yes')]
  path = write_csv(tmp_path / 'a.csv', [*rows, *GOOD])
  with pytest.raises(UserError, match=r'a\.csv:4: the text is empty'):
    load(path)


FILES = {
  'no such column': (b'body,label\na,b\n', "has no column named 'text'; its header has .*body"),
  'column twice': (b'text,text,label\na,a,b\n', "has two columns named 'text'"),
  'empty file': (b'', 'is empty'),
  'blank file': (b'\n\n', 'is empty'),
  'header alone': (b'text,label\n', 'holds no rows'),
  'utf-16': ('text,label\na,b\n'.encode('utf-16'), r'a\.csv:1: the header is not UTF-8'),
  'open quote': (b'text,label\na,no\n"b,no\nc,yes\nd,yes\n', r'a\.csv:3: a quote opens here and never'),
  'one class': (b'text,label\na,no\nb,no\n', r"classes are \('no',\); expected two or more"),
  'all texts equal': (b'text,label\na,no\na,yes\n', r'\[1, 0\] documents of the classes'),
  'too few': (b'text,label\na,no\nb,no\nc,yes\n', 'split is empty: 3 different training documents'),
}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('policy', ['error', 'skip'])
def test_a_file_that_cannot_be_used_is_an_error_always(tmp_path, load, name, policy):
  content, message = FILES[name]
  (tmp_path / 'a.csv').write_bytes(content)
  with pytest.raises(UserError, match=message):
    load(tmp_path / 'a.csv', on_bad_row=policy)


def test_a_file_of_bad_rows_alone_is_an_error(tmp_path, load):
  path = tmp_path / 'a.jsonl'
  path.write_text('{}\n{}\n')
  with pytest.raises(
    UserError, match=r"none of its rows can be used; the first is .*a\.jsonl:1: no key 'text'"
  ):
    load(path, on_bad_row='skip')
  (tmp_path / 'a.csv').write_text('text,label\n ,no\n ,yes\n')
  with pytest.raises(UserError, match=r'a\.csv: none of its rows can be used.*a\.csv:2: the text is empty'):
    load(tmp_path / 'a.csv', on_bad_row='skip')


def test_paths_that_cannot_be_read(tmp_path, load):
  good = write_csv(tmp_path / 'a.csv', GOOD)
  with pytest.raises(UserError, match=r"data\.train='.*gone\.csv' cannot be read: No such file"):
    load(tmp_path / 'gone.csv')
  with pytest.raises(UserError, match=r"data\.valid='.*' cannot be read: Is a directory"):
    load(good, valid=str(tmp_path))
  (tmp_path / 'a.xlsx').write_bytes(b'PK')
  with pytest.raises(UserError, match=r"data\.train='.*a\.xlsx': expected a file that ends in \.csv, \.tsv"):
    load(tmp_path / 'a.xlsx')
  with pytest.raises(UserError, match=r"data\.name='file' needs a file in data\.train"):
    load('')
  with pytest.raises(UserError, match=r'data\.text and data\.label'):
    load(good, label='')
  with pytest.raises(UserError, match="on_bad_row='ignore'; expected 'error' or 'skip'"):
    load(good, on_bad_row='ignore')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read and write everything')
def test_files_without_permission(tmp_path, load):
  good = write_csv(tmp_path / 'a.csv', GOOD)
  os.chmod(good, 0)
  with pytest.raises(UserError, match='Permission denied'):
    load(good)


def test_a_document_of_100_000_words_is_cut_counted_and_quick(tmp_path, load):
  long = 'ba ' * 100_000
  path = write_csv(tmp_path / 'a.csv', [*GOOD, (long, 'yes')])
  started = time.perf_counter()
  dataset = load(path)
  assert time.perf_counter() - started < 10
  cut = np.concatenate([split.cut for split in dataset.splits.values()])
  assert cut.max() == 100_000 + 2 - 32 and np.count_nonzero(cut) == 1
  assert max(split.lengths.max() for split in dataset.splits.values()) == 32
  assert '1 (' in dataset.describe() and 'cut to 32 tokens: each loses 99,970' in dataset.describe()


def test_a_cell_longer_than_csv_allows_by_default(tmp_path, load):
  limit = csv.field_size_limit()
  assert ('be' * limit, 'no') in all_texts(load(write_csv(tmp_path / 'a.csv', [*GOOD, ('be' * limit, 'no')])))
  assert csv.field_size_limit() == limit


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, load):
  path = tmp_path / 'a.csv'
  write_csv(path, GOOD)
  path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  assert all_texts(load(path)) == set(GOOD)
