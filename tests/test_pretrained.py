"""Pretrained weights: the same numbers as transformers, from every source, and one clear error a bad file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tests.golden_models import FAMILIES, GOLDEN, folder_of, installed, same
from tokenprune_jax import conversion, families, models, pretrained, random_model, sources
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs, Reducer

TOLERANCE = 1e-5  # largest absolute difference of a hidden state in float32


class Recorder(Reducer):
  """Keeps every token, and what each layer made of it."""

  def start(self, tokens, inputs, train):
    return tokens, {'layer_0': tokens.x}

  def after_block(self, tokens, memory, layer, train):
    return tokens, {**memory, f'layer_{layer}': tokens.x}


def hidden_states(weights, ids, mask, types):
  """[layer_0 (embeddings), layer_1, …], each [b n d]."""
  encoder = Encoder(weights.config, Recorder())
  inputs = Inputs(jnp.asarray(ids, jnp.int32), jnp.asarray(mask, bool), jnp.asarray(types, jnp.int32), {})
  _, memory, _ = jax.jit(encoder.apply)({'params': weights.params['encoder']}, inputs)
  return [np.asarray(memory[f'layer_{l}']) for l in range(weights.config.depth + 1)]


def rewrite(folder, change):
  """Replaces the tensors of a folder by what `change` makes of them."""
  tensors = dict(load_file(folder / 'model.safetensors'))
  save_file(change(tensors) or tensors, folder / 'model.safetensors')


# --- parity


@pytest.mark.parametrize('family', FAMILIES)
def test_every_layer_and_the_logits_equal_the_golden_ones_of_transformers(family, tmp_path):
  weights = pretrained.load(str(folder_of(family, tmp_path / 'model')))
  golden = load_file(GOLDEN / family / 'expected.safetensors')
  for l, state in enumerate(hidden_states(weights, golden['ids'], golden['mask'], golden['types'])):
    np.testing.assert_allclose(
      state[golden['mask']], golden[f'layer_{l}'][golden['mask']], atol=TOLERANCE, rtol=0
    )
  model = models.Classifier(weights.config, Reducer(), 3, readout='cls', head='family')
  batch = {name: jnp.asarray(golden[name]) for name in ('ids', 'mask', 'types')}
  logits = jax.jit(model.apply)({'params': weights.params}, batch).logits
  np.testing.assert_allclose(logits, golden['logits'], atol=TOLERANCE, rtol=0)


TEXTS = (
  'The score is lovely. The rest of it, from the wooden dialogue to a third act that nobody seems to have '
  'read before filming it, is the kind of thing one watches on an aeroplane and forgets by the baggage belt.',
  'Go and see it!',
  'I took my daughter (8) and my father (81); both laughed, at different places, for an hour and a half.',
)


@pytest.mark.torch
@pytest.mark.weights
@pytest.mark.parametrize(
  'source, packages', [('minilm-l6', (sources.MINILM,)), ('mpnet-base', sources.MPNET)]
)
def test_every_layer_equals_transformers_on_real_weights(source, packages):
  """Padded rows. In one token of some thousands, the middle layers of MPNet magnify rounding so far that
  torch itself is 2e-5 away from its own float64, and nothing could keep to 1e-5; these texts hold none."""
  torch = pytest.importorskip('torch', reason='needs torch, the peer that is compared with')
  if missing := [name for name in packages if not installed(name)]:
    pytest.skip(f'needs the weights of {", ".join(missing)}')
  from transformers import AutoModel

  weights = pretrained.load(source)
  inputs = weights.tokenizer(list(TEXTS), padding=True, return_tensors='np')
  mask = inputs['attention_mask'].astype(bool)
  states = hidden_states(
    weights, inputs['input_ids'], mask, inputs.get('token_type_ids', np.zeros_like(mask))
  )
  peer = AutoModel.from_pretrained(sources.locate(source), attn_implementation='eager').eval()
  with torch.inference_mode():
    inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    expected = peer(**inputs, output_hidden_states=True).hidden_states
  assert len(states) == len(expected) == weights.config.depth + 1
  for state, reference in zip(states, expected):
    np.testing.assert_allclose(state[mask], reference.numpy()[mask], atol=TOLERANCE, rtol=0)


# --- the table of rules


@pytest.mark.parametrize('family', FAMILIES)
def test_each_tensor_matches_one_rule_and_the_tree_is_the_models(family):
  for name in load_file(GOLDEN / family / 'model.safetensors'):
    assert sum(bool(rule.pattern.fullmatch(name)) for rule in families.rules(family, families.TEXTS)) == 1, (
      name
    )
  config = random_model.make(f'random:{family}:layers=3,width=16,heads=2,hidden=24')[0]
  model = models.Classifier(config, Reducer(), 4, head='family')
  tree = flatten_dict(jax.eval_shape(model.init_params, jax.random.key(0))['encoder'], sep='/')
  assert {f'encoder/{path}': leaf.shape for path, leaf in tree.items()} == conversion.expected_shapes(config)


@pytest.mark.parametrize('family', FAMILIES)
def test_old_names_no_prefix_buffers_and_other_heads_change_nothing(family, tmp_path):
  folder = folder_of(family, tmp_path / 'model')
  before = pretrained.load(str(folder)).params

  def age(tensors):
    old = {}
    for name, tensor in tensors.items():
      if 'LayerNorm' in name:
        name = name.replace('.weight', '.gamma').replace('.bias', '.beta')
      old[name.removeprefix(f'{family}.')] = tensor
    old['embeddings.position_ids'] = np.arange(20)[None]
    others = {
      'bert': ('cls.predictions.bias', 'cls.seq_relationship.weight'),
      'roberta': ('lm_head.dense.weight', 'roberta.pooler.dense.weight'),
      'distilbert': ('vocab_projector.bias', 'vocab_layer_norm.weight'),
      'mpnet': ('lm_head.bias', 'pooler.dense.bias'),
    }
    return old | dict.fromkeys(others[family], np.ones(5, np.float32))

  rewrite(folder, age)
  assert same(pretrained.load(str(folder)).params, before)


def test_a_backbone_has_no_head_and_bert_only_its_pooler(tmp_path):
  for family, expected in (('roberta', None), ('mpnet', None), ('distilbert', None), ('bert', {'dense'})):
    folder = folder_of(family, tmp_path / family)
    rewrite(folder, lambda tensors: {name: t for name, t in tensors.items() if 'classifier' not in name})
    head = pretrained.load(str(folder)).params.get('head')
    assert head is None if expected is None else set(head) == expected


def test_the_head_of_another_task_is_left_out(tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  set_config(folder, architectures=['BertForMultipleChoice'])
  assert set(pretrained.load(str(folder)).params['head']) == {'dense'}
  set_config(folder, architectures=['BertForTokenClassification'])  # an older one, with a pooler
  assert set(pretrained.load(str(folder)).params['head']) == {'out'}


WORD = 'bert.embeddings.word_embeddings.weight'
KEY = 'bert.encoder.layer.1.attention.self.key.bias'


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda t: t.pop(KEY) is None, f"tensor '{KEY}' is missing"),
    (lambda t: t.pop('classifier.bias') is None, "tensor 'classifier.bias' is missing"),
    (lambda t: t.update(surplus=t[KEY]), "bert has no tensor 'surplus'"),
    (lambda t: t.update({KEY.replace('.1.', '.2.'): t[KEY]}), 'is of layer 3; config.json has 2 layers'),
    (lambda t: t.update({KEY.removeprefix('bert.'): t[KEY]}), 'both hold encoder/block_2/key/bias'),
    (lambda t: t.update({WORD: t[WORD][:-1]}), rf'{WORD}. has the shape \[111, 8\]; expected \[112, 8\]'),
    (lambda t: t.update({KEY: t[KEY][None]}), r'has the shape \[1, 8\]; expected \[8\]'),
    (lambda t: t.update({'classifier.weight': t['classifier.weight'][:2]}), 'different numbers of labels'),
    (lambda t: t.update({KEY: t[KEY].astype(np.int8)}), 'has the type int8'),
    (lambda t: t.update({KEY: t[KEY] * np.nan}), 'holds NaN or infinite numbers'),
  ],
)
def test_a_wrong_tensor_is_an_error_that_names_it_and_the_file(change, message, tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  rewrite(folder, lambda tensors: change(tensors) and None)
  with pytest.raises(UserError, match=message) as caught:
    pretrained.load(str(folder))
  assert str(folder) in str(caught.value)


# --- files


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
  folder = folder_of('distilbert', tmp_path / 'model')
  before = pretrained.load(str(folder)).params
  rewrite(folder, lambda tensors: {name: tensor.astype(dtype) for name, tensor in tensors.items()})
  after = pretrained.load(str(folder)).params
  assert same(after, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), before))


def shard(folder):
  """Splits the weights into two files and an index; returns the index's content."""
  tensors = load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  placed = {name: f'model-0000{i % 2 + 1}-of-00002.safetensors' for i, name in enumerate(tensors)}
  for file in set(placed.values()):
    save_file({name: tensor for name, tensor in tensors.items() if placed[name] == file}, folder / file)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': placed}))
  return placed


def test_shards_are_read_and_checked_against_their_index(tmp_path):
  folder = folder_of('mpnet', tmp_path / 'model')
  before = pretrained.load(str(folder)).params
  placed = shard(folder)
  assert same(pretrained.load(str(folder)).params, before)
  index = folder / 'model.safetensors.index.json'
  name = next(iter(placed))
  for wrong, message in (
    ({**placed, 'more': placed[name]}, "disagree about the tensor 'more'"),
    ({**placed, name: '../elsewhere.safetensors'}, 'expected the name of a file in the same folder'),
    ({}, 'has no weight_map'),
  ):
    index.write_text(json.dumps({'weight_map': wrong}))
    with pytest.raises(UserError, match=message):
      pretrained.load(str(folder))
  index.write_text(json.dumps({'weight_map': placed}))
  (folder / placed[name]).unlink()
  with pytest.raises(UserError, match=placed[name]):
    pretrained.load(str(folder))


def test_a_cut_file_is_an_error_that_names_it(tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for cut in (
    b'',
    whole[:5],
    whole[:200],
    whole[: len(whole) // 2],
    whole[:-1],
    b'not tensors' * 9,
    whole + b'x',
  ):
    file.write_bytes(cut)
    with pytest.raises(UserError, match='model.safetensors cannot be read as safetensors'):
      pretrained.load(str(folder))


def test_pickled_weights_are_not_read_and_the_way_out_is_named(tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(UserError, match=r'pytorch_model.bin only(.|\n)*save_pretrained'):
    pretrained.load(str(folder))
  (folder / 'pytorch_model.bin').unlink()
  with pytest.raises(UserError, match='neither model.safetensors nor model.safetensors.index.json'):
    pretrained.load(str(folder))


def set_config(folder, **changes):
  raw = json.loads((folder / 'config.json').read_text()) | changes
  (folder / 'config.json').write_text(
    json.dumps({key: value for key, value in raw.items() if value != 'gone'})
  )


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model_type': 'gpt2'}, "model_type is 'gpt2'; expected one of bert, roberta, distilbert, mpnet"),
    ({'num_attention_heads': 'gone'}, "the key 'num_attention_heads' is missing"),
    ({'num_attention_heads': 3}, 'width 8 is not a multiple of the 3 heads'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ({'hidden_size': '8'}, "hidden_size is '8'; expected a whole number"),
    ({'hidden_act': 'swish'}, "hidden_act is 'swish'"),
    ({'is_decoder': True}, 'is a decoder'),
    ({'position_embedding_type': 'relative_key'}, "'relative_key'; only absolute positions"),
  ],
)
def test_a_config_that_this_encoder_cannot_be_is_refused(changes, message, tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  set_config(folder, **changes)
  with pytest.raises(UserError, match=message) as caught:
    pretrained.load(str(folder))
  assert 'config.json' in str(caught.value)


def test_configuration_files_are_read_as_transformers_means_them(tmp_path):
  folder = folder_of('roberta', tmp_path / 'model')
  set_config(folder, pad_token_id=3, layer_norm_eps=1e-6, hidden_act='gelu_new', type_vocab_size=1)
  config = pretrained.load(str(folder)).config
  assert (config.position_offset, config.pad_id, config.norm_eps) == (4, 3, 1e-6)
  assert (config.activation, config.type_vocab, config.max_length) == ('gelu_tanh', 1, 18)
  folder = folder_of('mpnet', tmp_path / 'mpnet')
  config = pretrained.load(str(folder)).config
  assert (config.position_offset, config.relative_buckets, config.type_vocab) == (2, 32, 0)
  set_config(folder, relative_attention_num_buckets=16)
  with pytest.raises(UserError, match='relative_attention_num_buckets is 16; expected 32'):
    pretrained.load(str(folder))


@pytest.mark.parametrize('content', [b'', b'{"model_type": ', b'[1]', b'\xff\xfe'])
def test_a_broken_json_file_is_named(content, tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  (folder / 'config.json').write_bytes(content)
  with pytest.raises(UserError, match='config.json'):
    pretrained.load(str(folder))


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  random_model.make_tokenizer('bert', 113, 20).save_pretrained(folder)
  with pytest.raises(UserError, match='ids up to 112, but config.json has vocab_size 112'):
    pretrained.load(str(folder))
  (folder / 'tokenizer.json').write_text('{"model": 1}')
  with pytest.raises(UserError, match='tokenizer'):
    pretrained.load(str(folder))
  (folder / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='holds no tokenizer'):
    pretrained.load(str(folder))


def test_a_vocabulary_file_alone_makes_a_tokenizer_that_knows_words(tmp_path):
  folder = folder_of('bert', tmp_path / 'model')
  vocab = pretrained.load(str(folder)).tokenizer.get_vocab()
  for file in folder.glob('*token*'):
    file.unlink()
  (folder / 'vocab.txt').write_text('\n'.join(sorted(vocab, key=vocab.get)))
  tokenizer = pretrained.load(str(folder)).tokenizer
  assert tokenizer.convert_ids_to_tokens(tokenizer('Ab!')['input_ids']) == ['[CLS]', 'a', '##b', '!', '[SEP]']


# --- overrides and random models


def test_overrides_replace_what_the_file_says(tmp_path):
  folder = str(folder_of('bert', tmp_path / 'model'))
  whole = pretrained.load(folder)
  weights = pretrained.load(folder, dropout=0.0, attention_dropout=0.25, dtype='bfloat16', depth=1)
  expected = dataclasses.replace(whole.config, dropout=0.0, attention_dropout=0.25, dtype='bfloat16', depth=1)
  assert weights.config == expected
  assert set(whole.params['encoder']) - set(weights.params['encoder']) == {'block_2'}
  for wrong in (
    {'dropout': 1.0},
    {'attention_dropout': -0.1},
    {'dtype': 'float16'},
    {'depth': 3},
    {'depth': 0},
  ):
    with pytest.raises(UserError, match=f'model.{next(iter(wrong))} is'):
      pretrained.load(folder, **wrong)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_random_model_is_whole_and_the_same_each_time(family):
  source = f'random:{family}:layers=3,width=32,heads=4,hidden=48,vocab=200,length=40,seed=7'
  weights, again = pretrained.load(source), pretrained.load(source)
  config = weights.config
  assert (config.depth, config.width, config.heads, config.hidden, config.vocab_size) == (3, 32, 4, 48, 200)
  assert config.max_length == 40
  assert same(weights.params, again.params)
  assert not same(weights.params, pretrained.load(source.replace('seed=7', 'seed=8')).params)
  found = {path: leaf.shape for path, leaf in flatten_dict(weights.params, sep='/').items()}
  assert found == conversion.expected_shapes(config)
  defaults = pretrained.load(f'random:{family}').config
  offset = 2 if family in ('roberta', 'mpnet') else 0
  assert (defaults.depth, defaults.position_offset, defaults.pad_id) == (2, offset, offset // 2)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_random_models_tokenizer_knows_all_ascii_text(family):
  weights = pretrained.load(f'random:{family}')
  tokenizer = weights.tokenizer
  text = 'A 7-year-old "critic" wrote: bananas & kiwis, ~100%!'
  ids = tokenizer(text)['input_ids']
  assert tokenizer.unk_token_id not in ids
  assert max(ids) < weights.config.vocab_size
  assert tokenizer.decode(ids, skip_special_tokens=True).replace(' ', '') == text.lower().replace(' ', '')
  assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
  assert tokenizer.pad_token_id == weights.config.pad_id
  pair = tokenizer('bad', 'film', padding='max_length', max_length=12)
  if family == 'bert':
    assert set(pair['token_type_ids']) == {0, 1}
  else:
    assert 'token_type_ids' not in pair
  assert len(pair['input_ids']) == 12


@pytest.mark.parametrize(
  'source, message',
  [
    ('random:gpt', "'gpt' is not a family; expected one of bert, roberta, distilbert, mpnet"),
    ('random:bert:depth=2', "expected KEY=NUMBER with a KEY of layers, .* not 'depth=2'"),
    ('random:bert:layers=two', "not 'layers=two'"),
    ('random:bert:layers=0', "not 'layers=0'"),
    ('random:bert:width=10,heads=4', 'the width is not a multiple of the number of heads'),
    ('random:bert:vocab=10', 'vocab=10 is too small; expected at least 109'),
  ],
)
def test_a_wrong_random_source_says_what_is_expected(source, message):
  with pytest.raises(UserError, match=message):
    pretrained.load(source)


def test_the_depth_of_any_source_is_known_without_its_weights(tmp_path):
  raw = {
    'model_type': 'distilbert',
    'n_layers': 3,
    'dim': 16,
    'n_heads': 2,
    'hidden_dim': 32,
    'vocab_size': 50,
    'max_position_embeddings': 64,
  }
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  given = ('minilm-l6', 'mpnet-base', 'random:bert:layers=5', str(tmp_path))
  assert [pretrained.depth_of(source) for source in given] == [6, 12, 5, 3]
  with pytest.raises(UserError, match='no folder'):
    pretrained.depth_of('no such/folder at all')
