"""The README's complete example of a method is run as it stands there."""

import importlib
import json
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch
from tokenprune_jax import flops, models, reducers, settings

README = pathlib.Path(__file__).parents[1] / 'README.md'
BATCH = ragged_batch((12, 7, 1), 12)


@pytest.fixture
def example(tmp_path, monkeypatch):
  """The example as a file that the finder sees; its module."""
  code = re.search(
    r'<!-- a test runs this example -->\n```python\n(.*?)```', README.read_text(encoding='utf-8'), re.S
  )[1]
  assert len(code.splitlines()) < 45
  (tmp_path / 'first.py').write_text(code, encoding='utf-8')
  monkeypatch.setattr(reducers, '__path__', [*reducers.__path__, str(tmp_path)])
  importlib.invalidate_caches()
  yield importlib.import_module('tokenprune_jax.reducers.first')
  sys.modules.pop('tokenprune_jax.reducers.first')


def test_the_example_is_found_removes_tokens_and_is_exact(example):
  assert 'first' in models.method_names()
  model, params = model_and_params({'name': 'first', **example.TINY})
  masked = apply(model, params, BATCH)
  compact = apply(model.clone(executor='compact'), params, BATCH)
  np.testing.assert_allclose(masked.logits, compact.logits, atol=1e-5)
  assert np.asarray(masked.trace.rows)[:, 0].tolist() == [8, 5, 1]
  assert (
    np.asarray(flops.trace_macs(model.config, 3, 'linear', masked.trace))[0]
    < flops.dense_macs(model.config, 3, 'linear', jnp.array([12]))[0]
  )


def test_its_neutral_setting_is_the_plain_encoder(example):
  plain, params = model_and_params({'name': 'none'})
  model, _ = model_and_params({'name': 'first', **example.NEUTRAL})
  np.testing.assert_allclose(
    apply(plain, params, BATCH).logits, apply(model, params, BATCH).logits, atol=1e-6
  )


def test_commands_name_files_and_variants_that_exist(tmp_path, monkeypatch):
  text = README.read_text(encoding='utf-8')
  root = README.parent
  for path in re.findall(r'(?:configs|benchmarks)/\w+\.py', text) + re.findall(
    r'\]\(((?:docs|results)/[^)#]+)\)', text
  ):
    assert (root / path).exists(), path
  for name in ('dense', 'ltp'):  # that configs/prune.py reads
    run = tmp_path / 'runs' / name
    run.mkdir(parents=True)
    (run / 'config.json').write_text(json.dumps(settings.defaults()), encoding='utf-8')
  monkeypatch.chdir(tmp_path)
  for config, variant in re.findall(r'--config=configs/(\w+)\.py:([\w,/+-]+)', text):
    importlib.import_module(f'configs.{config}').get_config(variant)
