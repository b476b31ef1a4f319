"""What is exported comes back bit for bit, and means the same to transformers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tokenprune_jax
from tests.golden_models import FAMILIES, same
from tokenprune_jax import export, models, pretrained
from tokenprune_jax.errors import UserError

LABELS = ('bad', 'naïve', 'good')
DENSE = {'name': 'none'}
CHAIN = {
  'name': 'chain',
  'reducers': ({'name': 'fuzzy', 'ratio': 0.5}, {'name': 'combine', 'slots': 3, 'layer': 2}),
}


def make(family, head, spec=DENSE):
  """(random weights, params of a whole classifier with every number different)."""
  weights = pretrained.load(f'random:{family}:layers=2,width=16,heads=2,hidden=24,vocab=150,length=40')
  model = models.Classifier(weights.config, models.make_reducer(spec), len(LABELS), head=head)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  return weights, jax.tree.map(lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes)


def write(folder, weights, params, head, readout, spec):
  pretrained.export(
    folder, weights.config, params, weights.tokenizer, LABELS,
    readout=readout, head=head, reducer_spec=spec, max_length=32,
  )  # fmt: skip


def batch_of(tokenizer):
  """(batch for our model, the same inputs by transformers' names); rows of different length."""
  inputs = dict(
    tokenizer(['A fine film!', 'No.', 'So bad it is good, almost.'], padding=True, return_tensors='np')
  )
  ids = inputs['input_ids']
  types = inputs.get('token_type_ids', np.zeros_like(ids))
  mask = inputs['attention_mask'].astype(bool)
  return {'ids': jnp.asarray(ids, jnp.int32), 'mask': mask, 'types': jnp.asarray(types, jnp.int32)}, inputs


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('head, readout, spec', [
  ('family', 'cls', DENSE),  # the family's own classifier
  ('family', 'mean', DENSE),
  ('linear', 'cls', DENSE),
  ('linear', 'tokens', DENSE),  # the family's own tagger
  ('linear', 'tokens', CHAIN),
  ('family', 'cls', CHAIN),
  ('linear', 'mean', CHAIN),
])  # fmt: skip
def test_both_forms_come_back_bit_for_bit(family, head, readout, spec, tmp_path):
  weights, params = make(family, head, spec)
  write(tmp_path / 'model', weights, params, head, readout, spec)
  found = pretrained.load_exported(tmp_path / 'model')
  assert same(found.params, params)
  assert found.config == weights.config
  assert (found.labels, found.readout, found.head, found.max_length) == (LABELS, readout, head, 32)
  assert found.reducer_spec == spec
  assert found.tokenizer('A fine film!')['input_ids'] == weights.tokenizer('A fine film!')['input_ids']
  assert found.tokenizer.get_vocab() == weights.tokenizer.get_vocab()
  dense = (head, readout) in (('family', 'cls'), ('linear', 'tokens')) and spec is DENSE
  assert (tmp_path / 'model' / export.OWN_WEIGHTS).exists() != dense


@pytest.mark.torch
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize(
  ('kind', 'head', 'readout'),
  [('SequenceClassification', 'family', 'cls'), ('TokenClassification', 'linear', 'tokens')],
)
def test_a_dense_model_with_the_familys_head_has_equal_logits_in_torch(kind, head, readout, family, tmp_path):
  torch = pytest.importorskip('torch', reason='needs torch, the peer that is compared with')
  import transformers

  weights, params = make(family, head)
  write(tmp_path / 'model', weights, params, head, readout, DENSE)
  batch, inputs = batch_of(weights.tokenizer)
  model = models.Classifier(weights.config, models.make_reducer(DENSE), 3, readout=readout, head=head)
  logits = jax.jit(model.apply)({'params': {k: params[k] for k in ('encoder', 'head')}}, batch).logits
  reader = getattr(transformers, f'AutoModelFor{kind}')
  peer, report = reader.from_pretrained(tmp_path / 'model', output_loading_info=True)
  assert not any(report.values()), report
  assert peer.config.id2label == dict(enumerate(LABELS))
  with torch.inference_mode():
    expected = peer.eval()(**{name: torch.tensor(values) for name, values in inputs.items()}).logits
  real = batch['mask'] if readout == 'tokens' else ...
  np.testing.assert_allclose(np.asarray(logits)[real], expected.numpy()[real], atol=1e-5, rtol=0)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  assert (
    tokenizer('So bad, so good', 'yes')['input_ids']
    == weights.tokenizer('So bad, so good', 'yes')['input_ids']
  )


@pytest.mark.torch
@pytest.mark.parametrize('family', FAMILIES)
def test_the_backbone_is_whole_to_automodel(family, tmp_path):
  torch = pytest.importorskip('torch', reason='needs torch, the peer that is compared with')
  from transformers import AutoModel

  weights, params = make(family, 'linear', CHAIN)
  write(tmp_path / 'model', weights, params, 'linear', 'mean', CHAIN)
  peer, report = AutoModel.from_pretrained(tmp_path / 'model', output_loading_info=True)
  assert {name.partition('.')[0] for name in report.pop('missing_keys')} <= {'pooler'}, report
  assert not any(report.values()), report
  if family != 'distilbert':  # the others can be asked for without the pooler, which no read-out of ours uses
    peer, report = AutoModel.from_pretrained(
      tmp_path / 'model', add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
  batch, inputs = batch_of(weights.tokenizer)
  model = models.Classifier(weights.config, models.make_reducer(DENSE), 3, readout='mean')
  logits = jax.jit(model.apply)({'params': {k: params[k] for k in ('encoder', 'head')}}, batch).logits
  with torch.inference_mode():
    states = peer.eval()(
      **{name: torch.tensor(values) for name, values in inputs.items()}
    ).last_hidden_state.numpy()
  mask = inputs['attention_mask'][..., None]
  mean = (states * mask).sum(1) / mask.sum(1)
  expected = mean @ params['head']['out']['kernel'] + params['head']['out']['bias']
  np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


def test_an_exported_folder_is_a_source_of_weights(tmp_path):
  weights, params = make('roberta', 'linear', CHAIN)
  write(tmp_path / 'model', weights, params, 'linear', 'mean', CHAIN)
  assert same(pretrained.load(str(tmp_path / 'model')).params, {'encoder': params['encoder']})


def test_an_earlier_export_is_replaced_and_nothing_else_is(tmp_path):
  weights, params = make('bert', 'linear')
  folder = tmp_path / 'model'
  write(folder, weights, params, 'linear', 'mean', DENSE)
  write(folder, *make('bert', 'family'), 'family', 'cls', DENSE)
  assert pretrained.load_exported(folder).head == 'family'
  assert not (folder / export.OWN_WEIGHTS).exists()
  assert [path.name for path in tmp_path.iterdir()] == ['model']
  for other in (tmp_path / 'photos', tmp_path / 'file'):
    other.mkdir() if other.name == 'photos' else other.write_text('')
    content = other / 'holiday.jpg' if other.is_dir() else other
    content.write_text('mine')
    with pytest.raises(UserError, match='exists and is no earlier export'):
      write(other, weights, params, 'linear', 'mean', DENSE)
    assert content.read_text() == 'mine'


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
  weights, params = make('bert', 'linear')
  folder = tmp_path / 'model'
  write(folder, weights, params, 'linear', 'mean', DENSE)
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def full(tensors, file, metadata):
    Path(file).write_bytes(b'half')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(export, 'save_file', full)
  for target in (folder, tmp_path / 'fresh'):
    with pytest.raises(UserError, match='cannot export to .*No space left on device'):
      write(target, weights, params, 'linear', 'mean', DENSE)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
  weights, params = make('bert', 'linear')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot export to'):
    write(tmp_path / 'file' / 'model', weights, params, 'linear', 'mean', DENSE)


def test_everyone_may_read_what_is_exported(tmp_path):
  weights, params = make('bert', 'linear')
  write(tmp_path / 'model', weights, params, 'linear', 'mean', DENSE)
  modes = {path.stat().st_mode for path in (tmp_path / 'model').iterdir()}
  (tmp_path / 'plain').write_text('')
  assert modes == {(tmp_path / 'plain').stat().st_mode}


def change_settings(folder, **changes):
  file = folder / export.SETTINGS
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def own_weights(change):
  def apply(folder):
    tensors = load_file(folder / export.OWN_WEIGHTS)
    save_file(change(dict(tensors)), folder / export.OWN_WEIGHTS)

  return apply


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda f: (f / export.SETTINGS).unlink(), 'tokenprune.json is missing'),
    (lambda f: (f / export.SETTINGS).write_text('{'), 'tokenprune.json cannot be read'),
    (lambda f: change_settings(f, format=2), 'format is 2; this version reads 1'),
    (lambda f: change_settings(f, labels=None), 'tokenprune.json: labels is None; expected a list'),
    (
      lambda f: change_settings(f, labels=['a', 'b']),
      r'head/out/bias has the shape \(3,\), but .* wants \(2,\)',
    ),
    (
      lambda f: change_settings(f, head='family'),
      r'head/dense/bias has the shape None, but .* wants \(16,\)',
    ),
    (lambda f: change_settings(f, dtype='float8'), "dtype is 'float8'"),
    (lambda f: (f / export.OWN_WEIGHTS).unlink(), 'head/out/bias has the shape None'),
    (lambda f: (f / export.OWN_WEIGHTS).write_bytes(b'\0' * 9), 'tokenprune.safetensors cannot be read'),
    (
      own_weights(lambda t: t | {'encoder/block_1/key/bias': t['head/out/bias']}),
      "'encoder/block_1/key/bias'",
    ),
    (own_weights(lambda t: t | {'head/out/bias': t['head/out/bias'] * np.nan}), "'head/out/bias' holds NaN"),
  ],
)
def test_a_damaged_export_is_an_error_that_names_the_file(damage, message, tmp_path, exported):
  folder = tmp_path / 'model'
  shutil.copytree(exported, folder)
  damage(folder)
  with pytest.raises(UserError, match=message):
    pretrained.load_exported(folder)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('export') / 'model'
  weights, params = make('bert', 'linear', CHAIN)
  write(folder, weights, params, 'linear', 'mean', CHAIN)
  return folder


def test_a_method_without_its_parameters_is_an_error_that_names_them(tmp_path, exported):
  folder = tmp_path / 'model'
  shutil.copytree(exported, folder)
  change_settings(folder, reducer={'name': 'ltp'})
  with pytest.raises(
    UserError, match=r'reducer/learned/delta has the shape None, but the method .* wants \('
  ):
    tokenprune_jax.load(folder)
