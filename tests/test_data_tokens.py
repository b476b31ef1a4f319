"""Tokens: those of transformers, nothing cut unseen, and a cache that is right, whole or made again."""

import json
import resource
import signal
import sys
import threading
from concurrent import futures

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tokenprune_jax import data
from tokenprune_jax.data import tokenise
from tokenprune_jax.errors import UserError
from tokenprune_jax.random_model import make_tokenizer

TEXTS = ['ba be', 'bi ' * 40, 'bo, (bu) ' * 7, '', 'da de di do du ' * 5]
PAIRS = ['ca', 'ce ' * 9, 'ci ' * 50, 'co co', '']


@pytest.fixture(scope='module')
def tokenizer():
  return make_tokenizer('bert', 400, 512)


@pytest.mark.parametrize('family', ['bert', 'distilbert', 'roberta', 'mpnet'])
@pytest.mark.parametrize('pairs', [None, PAIRS])
def test_tokens_are_those_of_transformers(family, pairs):
  tokenizer = make_tokenizer(family, 400, 512)
  split = data.encode(TEXTS, tokenizer, 20, pairs)
  whole = tokenizer(TEXTS, pairs)['input_ids']
  expected = tokenizer(TEXTS, pairs, truncation='longest_first', max_length=20)
  types = expected.get('token_type_ids') or [[0] * len(ids) for ids in expected['input_ids']]
  for i, ids in enumerate(expected['input_ids']):
    np.testing.assert_array_equal(split.ids(i), ids)
    np.testing.assert_array_equal(split.types(i), types[i])
    assert (split.lengths[i], split.cut[i]) == (len(ids), len(whole[i]) - len(ids))
    assert (split.texts(i), split.pairs(i)) == (TEXTS[i], pairs[i] if pairs else '')


def test_truncation_and_padding_in_the_tokenizers_own_file_do_nothing(tmp_path, tokenizer):
  tokenizer.save_pretrained(tmp_path)
  path = tmp_path / 'tokenizer.json'
  stored = json.loads(path.read_text())
  stored['truncation'] = {'max_length': 8, 'strategy': 'LongestFirst', 'stride': 0, 'direction': 'Right'}
  stored['padding'] = {
    'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0, 'pad_type_id': 0,
    'pad_token': '[PAD]',
  }  # fmt: skip
  path.write_text(json.dumps(stored))
  trapped = PreTrainedTokenizerFast.from_pretrained(tmp_path)
  assert trapped.backend_tokenizer.truncation['max_length'] == 8
  split = data.encode(TEXTS, trapped, 20)
  np.testing.assert_array_equal(split.lengths, data.encode(TEXTS, tokenizer, 20).lengths)
  np.testing.assert_array_equal(split.cut, [0, 22, 17, 0, 7])
  assert trapped.backend_tokenizer.truncation['max_length'] == 8  # the object of the caller is left as it was


def test_order_and_result_do_not_depend_on_the_chunks(tokenizer, monkeypatch):
  whole = data.encode(TEXTS * 3, tokenizer, 20)
  monkeypatch.setattr(tokenise, 'CHUNK', 4)
  parts = data.encode(TEXTS * 3, tokenizer, 20)
  for name, array in vars(whole.encoded).items():
    np.testing.assert_array_equal(getattr(parts.encoded, name), array)


def test_what_cannot_be_encoded_is_refused(tokenizer):
  with pytest.raises(UserError, match='text 1: expected a text, found NoneType'):
    data.encode(['ba', None], tokenizer, 20)
  with pytest.raises(UserError, match='text 0: invalid UTF-8 at character 2'):
    data.encode(['ba\ud800'], tokenizer, 20)
  with pytest.raises(UserError, match='2 texts and 1 second'):
    data.encode(['ba', 'be'], tokenizer, 20, ['ca'])
  with pytest.raises(UserError, match=r'data\.max_length=3 leaves no room beside 3'):
    data.encode(['ba'], tokenizer, 3, ['ca'])
  with pytest.raises(UserError, match='not a fast tokenizer'):
    data.encode(['ba'], object(), 20)
  assert len(data.encode([], tokenizer, 20)) == 0


@pytest.fixture
def encode(tmp_path, tokenizer, monkeypatch):
  """encode(texts, max_length, …) through the cache; encode.calls counts the times something was tokenised."""
  original = tokenise.encode_all

  def counting(*args):
    through_cache.calls += 1
    return original(*args)

  def through_cache(texts=TEXTS, max_length=20, pairs=None, tokenizer=tokenizer):
    encoder = data.Encoder(tokenizer, max_length)
    return tokenise.encode_cached(encoder, texts, pairs, tmp_path / 'tokens', '')

  through_cache.calls = 0
  monkeypatch.setattr(tokenise, 'encode_all', counting)
  return through_cache


def cache_files(tmp_path):
  return sorted((tmp_path / 'tokens').glob('*.npz'))


def test_the_second_time_comes_from_the_cache(tmp_path, encode):
  first, second = encode(), encode()
  assert encode.calls == 1 and len(cache_files(tmp_path)) == 1
  for name, array in vars(first).items():
    np.testing.assert_array_equal(getattr(second, name), array)
    assert getattr(second, name).dtype == array.dtype


def test_whatever_the_tokens_depend_on_is_in_the_key(encode):
  encode()
  other = make_tokenizer('bert', 500, 512)
  untyped = make_tokenizer('bert', 400, 512)
  untyped.model_input_names = ['input_ids', 'attention_mask']
  variants = [
    {'texts': [*TEXTS[:-1], 'fa']}, {'texts': TEXTS[::-1]}, {'texts': TEXTS[:-1]}, {'texts': [*TEXTS, '']},
    {'texts': ['ba', ' be', *TEXTS[1:]]}, {'max_length': 21}, {'pairs': PAIRS}, {'pairs': PAIRS[::-1]},
    {'tokenizer': other}, {'tokenizer': untyped},
  ]  # fmt: skip
  for count, variant in enumerate(variants, 2):
    encode(**variant)
    assert encode.calls == count, variant
  tokenizer = make_tokenizer('bert', 400, 512)
  tokenizer('ba', truncation=True, max_length=5, padding='max_length')  # leaves its settings in the object
  encode(tokenizer=tokenizer)
  assert encode.calls == len(variants) + 1


def flip_a_bit(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
  'cut short': lambda content: content[: len(content) // 2],
  'empty': lambda content: b'',
  'not a zip file': lambda content: b'x' * len(content),
  'one bit': flip_a_bit,
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, encode, damage, capsys):
  texts = TEXTS * 40  # so that the middle of the file lies in an array
  good = encode(texts)
  (path,) = cache_files(tmp_path)
  path.write_bytes(DAMAGE[damage](path.read_bytes()))
  again = encode(texts)
  assert encode.calls == 2 and 'is damaged' in capsys.readouterr().err
  np.testing.assert_array_equal(again.tokens, good.tokens)
  encode(texts)
  assert encode.calls == 2  # and is whole now


def test_a_cache_of_other_arrays_is_made_again(tmp_path, encode):
  good = encode()
  (path,) = cache_files(tmp_path)
  arrays = vars(good)
  for wrong in (
    {**arrays, 'tokens': good.tokens[:-1]}, {**arrays, 'cut': good.cut[:-1]}, {'tokens': good.tokens},
    {**arrays, 'tokens': np.array([object()])},
  ):  # fmt: skip
    np.savez(path, **wrong)
    np.testing.assert_array_equal(encode().tokens, good.tokens)
  assert encode.calls == 5


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, encode):
  (tmp_path / 'tokens').write_text('a file where the folder should be')
  with pytest.raises(UserError, match='cannot write to the cache .*TOKENPRUNE_CACHE'):
    encode()


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path, encode):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(UserError, match='cannot write to the cache'):
      encode(TEXTS * 40)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert [path.name for path in (tmp_path / 'tokens').iterdir()] == ['.lock']
  assert len(encode(TEXTS * 40).cut) == 200


def test_two_runs_at_once_tokenise_once(encode, monkeypatch):
  counting, both_ready = tokenise.encode_all, threading.Barrier(2)
  read = tokenise.read_cache

  def read_together(*args):
    found = read(*args)
    if threading.current_thread() not in waited:
      waited.add(threading.current_thread())
      both_ready.wait(30)  # until both have seen that there is nothing yet
    return found

  waited = set()
  monkeypatch.setattr(tokenise, 'read_cache', read_together)
  with futures.ThreadPoolExecutor(2) as pool:
    first, second = [future.result(60) for future in [pool.submit(encode) for _ in range(2)]]
  assert tokenise.encode_all is counting and encode.calls == 1
  np.testing.assert_array_equal(first.tokens, second.tokens)


def test_threads_may_share_an_encoder(tokenizer):
  encoder, interval = data.Encoder(tokenizer, 8), sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    with futures.ThreadPoolExecutor(8) as pool:
      found = list(pool.map(lambda _: encoder(['ba be ' * 60]), range(200)))
  finally:
    sys.setswitchinterval(interval)
  assert {(len(encoding), cut) for [(encoding, cut)] in found} == {(8, 114)}
