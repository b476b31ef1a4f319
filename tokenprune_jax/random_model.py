"""A small random encoder of any family and a tokenizer made in code: for tests and short runs, from no file.

Written 'random:FAMILY' or 'random:FAMILY:key=number,…', with the keys of DEFAULTS.
"""

import itertools
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from tokenprune_jax import conversion, families
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError

DEFAULTS = {
  'layers': 2,
  'width': 64,
  'heads': 4,
  'hidden': 128,  # feed-forward width
  'vocab': 512,  # word pieces
  'length': 512,  # the longest input in tokens
  'seed': 0,
}
# Padding has id 0 in BERT and DistilBERT, 1 in RoBERTa and MPNet, as in the families' own vocabularies.
_SPECIAL = {
  'bert': {
    'pad_token': '[PAD]',
    'unk_token': '[UNK]',
    'cls_token': '[CLS]',
    'sep_token': '[SEP]',
    'mask_token': '[MASK]',
  },
  'roberta': {
    'cls_token': '<s>',
    'pad_token': '<pad>',
    'sep_token': '</s>',
    'unk_token': '<unk>',
    'mask_token': '<mask>',
  },
}
_SPECIAL |= {'distilbert': _SPECIAL['bert'], 'mpnet': _SPECIAL['roberta']}


def make(source: str) -> tuple[EncoderConfig, dict[str, Any], Any]:
  """(config, params, tokenizer) of a 'random:…' source, equal for equal text. UserError on a wrong one."""
  family, numbers = parse(source)
  special = _SPECIAL[family]
  pad_id = list(special).index('pad_token')
  offset = pad_id + 1 if family in ('roberta', 'mpnet') else 0
  config = EncoderConfig(
    family=family,
    vocab_size=numbers['vocab'],
    width=numbers['width'],
    depth=numbers['layers'],
    heads=numbers['heads'],
    hidden=numbers['hidden'],
    max_positions=numbers['length'] + offset,
    type_vocab={'bert': 2, 'roberta': 1}.get(family, 0),
    position_offset=offset,
    relative_buckets=32 if family == 'mpnet' else 0,
    pad_id=pad_id,
  )
  return (
    config,
    random_params(config, numbers['seed']),
    make_tokenizer(family, numbers['vocab'], numbers['length']),
  )


def parse(source: str) -> tuple[str, dict[str, int]]:
  """(family, the numbers of DEFAULTS) of a 'random:…' source. Raises UserError on a wrong one."""
  _, family, text = (*source.split(':', 2), '')[:3]
  if family not in families.FAMILIES:
    known = ', '.join(families.FAMILIES)
    raise UserError(f'model.weights is {source!r}: {family!r} is not a family; expected one of {known}')
  numbers = dict(DEFAULTS)
  for entry in filter(None, text.split(',')):
    key, _, value = entry.partition('=')
    if key not in DEFAULTS or not value.isdecimal() or (key != 'seed' and int(value) < 1):
      keys = ', '.join(DEFAULTS)
      raise UserError(f'model.weights is {source!r}: expected KEY=NUMBER with a KEY of {keys}, not {entry!r}')
    numbers[key] = int(value)
  if numbers['width'] % numbers['heads']:
    raise UserError(f'model.weights is {source!r}: the width is not a multiple of the number of heads')
  return family, numbers


def random_params(config: EncoderConfig, seed: int) -> dict[str, Any]:
  """{'encoder': …}: kernels of deviation 1 / sqrt(inputs), so that attention differs from token to token."""
  rng = np.random.default_rng(seed)
  params = {}
  for path, shape in conversion.expected_shapes(config).items():
    if path.endswith('bias'):
      params[path] = np.zeros(shape, np.float32)
    elif path.endswith('scale'):
      params[path] = np.ones(shape, np.float32)
    else:
      deviation = shape[0] ** -0.5 if path.endswith('kernel') else 0.02
      params[path] = rng.normal(0.0, deviation, shape).astype(np.float32)
  return unflatten_dict(params, sep='/')


def make_tokenizer(family: str, vocab: int, length: int):
  """Lower-case word pieces: every printable ASCII character, then syllables. A PreTrainedTokenizerFast.

  Raises UserError where `vocab` has no room for the characters.
  """
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
  from transformers import PreTrainedTokenizerFast  # not above: it takes a second

  special = _SPECIAL[family]
  pieces = [*special.values(), *_characters()]
  if vocab < len(pieces):
    raise UserError(f'model.weights: vocab={vocab} is too small; expected at least {len(pieces)}')
  pieces += itertools.islice(_syllables(), vocab - len(pieces))
  ids = {piece: i for i, piece in enumerate(pieces)}
  cls, sep = special['cls_token'], special['sep_token']
  tokenizer = Tokenizer(models.WordPiece(ids, unk_token=special['unk_token'], max_input_chars_per_word=100))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.decoder = decoders.WordPiece()
  double = family in ('roberta', 'mpnet')  # they part two texts by two separators and have no token types
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f'{cls} $A {sep}',
    pair=f'{cls} $A {sep} {sep} $B {sep}' if double else f'{cls} $A {sep} $B:1 {sep}:1',
    special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
  )
  names = ['input_ids', 'attention_mask'] + ['token_type_ids'] * (family == 'bert')
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, model_max_length=length, model_input_names=names, **special
  )


def _characters() -> Iterator[str]:
  yield from string.punctuation  # never inside a word
  for character in string.ascii_lowercase + string.digits:
    yield from (character, f'##{character}')


def _syllables() -> Iterator[str]:
  """ba, ##ba, be, … and, when these are used up, bab, ##bab, … and so on without end."""
  vowels, consonants = 'aeiou', 'bcdfghjklmnpqrstvwxyz'
  for size in itertools.count(2):
    letters = itertools.islice(itertools.cycle((consonants, vowels)), size)
    for syllable in itertools.product(*letters):
      yield from (''.join(syllable), '##' + ''.join(syllable))
