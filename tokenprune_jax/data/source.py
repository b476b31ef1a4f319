"""Where documents come from: every dataset is a tfds builder read through `as_data_source`, without
TensorFlow.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
import tensorflow_datasets as tfds
from absl import logging

from tokenprune_jax.data import datasets, files
from tokenprune_jax.data.tokenise import locked
from tokenprune_jax.errors import UserError

OWN = {builder.name: builder for builder in datasets.BUILDERS}
# Names of the one or two texts in tfds' classification datasets, those with two texts first.
TEXT_FIELDS = (
  ('premise', 'hypothesis'), ('sentence1', 'sentence2'), ('question1', 'question2'), ('question', 'sentence'),
  ('context', 'hypothesis'), ('title', 'description'), ('text',), ('sentence',),
)  # fmt: skip
SPLIT_NAMES = {
  'train': ('train',),
  'valid': ('validation', 'valid', 'dev', 'validation_matched'),
  'test': ('test', 'test_matched'),
}
NETWORK_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents as they were found, nothing dropped yet."""

  name: str
  splits: Mapping[str, Any]  # name -> tfds data source: 'train', perhaps 'valid' and 'test'; random access
  columns: files.Columns  # names of the fields of an example
  labels: tuple[str, ...]  # classes, which labels count from 0; () = labels are text
  paths: Mapping[str, str]  # of each split, for messages
  bad: files.BadRows

  def where(self, split: str, index: int, example: Mapping[str, Any]) -> str:
    """What a message calls an example."""
    line = f':{example["line"]}' if 'line' in example else f', example {index}'
    return self.paths[split] + line


def open_source(spec: Mapping[str, Any], cache_dir: Path) -> Source:
  """The dataset that `spec`, config.data, names; prepared if it has not been. Raises UserError."""
  if spec['name'] == 'file':
    return open_files(spec, cache_dir)
  if spec['name'] in OWN:
    builder = OWN[spec['name']](data_dir=cache_dir / 'datasets', file_format='array_record')
    columns = find_columns(spec, builder.info.features)
    prepare_own(builder, cache_dir)
  else:
    builder = find_tfds(spec['name'])
    columns = find_columns(spec, builder.info.features)
    prepare_tfds(builder, spec['name'])
  return pick_splits(spec, builder, columns)


def open_files(spec: Mapping[str, Any], cache_dir: Path) -> Source:
  """name='file': the user's own CSV, TSV or JSONL."""
  if not spec['train']:
    raise UserError("data.name='file' needs a file in data.train")
  paths = {split: spec[split] for split in ('train', 'valid', 'test') if spec[split]}
  columns = files.Columns(spec['text'], spec['text_pair'], spec['label'])
  if not columns.text or not columns.label:
    raise UserError(
      'data.text and data.label name the columns of the text and the label; neither can be empty'
    )
  with quiet():
    builder = files.UserFiles(
      paths=paths, columns=columns, on_bad_row=spec['on_bad_row'], data_dir=cache_dir / 'datasets'
    )
  prepare_own(builder, cache_dir)
  metadata = builder.info.metadata
  bad = files.BadRows(spec['on_bad_row'], metadata['skipped'], list(metadata['examples']))
  sources = builder.as_data_source()
  own_names = files.Columns('text', 'text_pair' if columns.text_pair else '', 'label')
  return Source('file', {split: sources[split] for split in paths}, own_names, (), paths, bad)


def prepare_own(builder: tfds.core.DatasetBuilder, cache_dir: Path) -> None:
  """Writes the dataset of one of our builders, once; concurrent runs wait for each other."""
  with locked(cache_dir), quiet():
    if builder.is_prepared():
      return
    try:
      builder.download_and_prepare()
    except (OSError, RuntimeError) as error:  # array_record makes a RuntimeError of a full disk
      raise UserError(
        f'cannot write the dataset to {builder.data_dir}: {error}. Free some space, or choose another folder '
        'in the environment variable TOKENPRUNE_CACHE'
      ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without tfds' words on downloads that are none and files that nobody misses."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(verbosity)


def find_tfds(name: str) -> tfds.core.DatasetBuilder:
  """The builder of any dataset that tfds knows, by code or by its files. Raises UserError."""
  # Without TensorFlow tfds does not import these itself, and then does not know glue, snli, conll2003, …
  importlib.import_module('tensorflow_datasets.text')
  folder = os.environ.get('TFDS_DATA_DIR')  # None: tfds' own default
  try:
    return tfds.builder(name, data_dir=folder, file_format='array_record')
  except tfds.core.DatasetNotFoundError as error:
    near = difflib.get_close_matches(name, [*OWN, 'file'])
    near = near or difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
    hint = f'did you mean {" or ".join(near)}?' if near else 'tfds.list_builders() names those of tfds'
    raise UserError(
      f'data.name={name!r} is no dataset of this project ({", ".join(OWN)}, file), nor of tfds; {hint}'
    ) from error
  except Exception as error:
    raise UserError(f'data.name={name!r} cannot be opened: {brief(error)}') from error


def prepare_tfds(builder: tfds.core.DatasetBuilder, name: str) -> None:
  """Downloads a dataset if it is not on this machine. Raises UserError, offline within seconds."""
  with quiet():
    prepared = builder.is_prepared()
  if prepared:
    return
  if not reachable(builder):
    raise UserError(
      f'data.name={name!r} is not in {builder.data_dir}, and the hosts that it is downloaded from cannot be '
      'reached. Where there is a network, run: python -c "import tensorflow_datasets as tfds, '
      f'tensorflow_datasets.text; tfds.data_source({name!r})". Copy the folder here and name its parent in '
      f'TFDS_DATA_DIR. Or use a dataset that needs no network ({", ".join(OWN)}), or files of your own (file)'
    )
  try:
    builder.download_and_prepare()
  except Exception as error:
    raise UserError(f'data.name={name!r} could not be prepared: {brief(error)}') from error


def brief(error: Exception) -> str:
  """The kind of an error of tfds and the first line of its text, which may run to pages."""
  return f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'


def reachable(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether a host that the dataset is downloaded from answers; tfds itself would try for minutes."""
  urls = {'://'.join(urllib.parse.urlsplit(url)[:2]) for url in builder.url_infos or ()}
  if not urls and type(builder).__module__.startswith('tensorflow_datasets.'):
    urls = {'https://storage.googleapis.com'}  # tfds' own home, for datasets that do not list their files
  for url in sorted(urls)[:3]:
    try:
      requests.head(url, timeout=NETWORK_SECONDS)
      return True
    except requests.RequestException:
      continue
  return not urls  # a builder of the user's own may need no network


def pick_splits(spec: Mapping[str, Any], builder: tfds.core.DatasetBuilder, columns: files.Columns) -> Source:
  """The splits of a prepared builder that `spec` names, else those with usual names. Raises UserError."""
  name = spec['name']
  available = set(builder.info.splits)
  splits, paths = {}, {}
  for split, names in SPLIT_NAMES.items():
    wanted = spec[split] or next((usual for usual in names if usual in available), '')
    if wanted:
      splits[split], paths[split] = read_split(builder, wanted, f'data.{split}'), f'{name}[{wanted}]'
  if 'train' not in splits:
    raise UserError(f'{name} has no split named train; name one in data.train: {sorted(available)}')
  if 'test' in splits and not spec['test'] and splits['test'][0][columns.label] < 0:
    # Competitions keep the labels of their test split: the validation split, if any, takes its place.
    for part in (splits, paths):
      del part['test']
      part.update({'test': part.pop('valid')} if 'valid' in part else {})
  labels = tuple(builder.info.features[columns.label].names)
  return Source(name, splits, columns, labels, paths, files.BadRows(spec['on_bad_row']))


def read_split(builder: tfds.core.DatasetBuilder, split: str, key: str) -> Any:
  """A data source: one split, by tfds' name or slice (train[:10%]). Raises UserError."""
  try:
    return builder.as_data_source(split=split)
  except (ValueError, KeyError, RuntimeError) as error:
    raise UserError(f'{key}: {split!r} of {builder.info.name} cannot be read: {error}') from error


def find_columns(spec: Mapping[str, Any], features: tfds.features.FeaturesDict) -> files.Columns:
  """The features that hold text and label. Raises UserError where that is not plain."""
  texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
  classes = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
  label = spec['label']
  if label not in classes and label == 'label' and len(classes) == 1:
    label = classes[0]
  if label not in classes or not texts:
    raise UserError(
      f'data.name={spec["name"]!r} is not a text classification dataset with data.label={label!r}: it has '
      f'the texts {texts} and the classes {classes}'
    )
  named = (spec['text'], spec['text_pair'])
  if named == ('text', '') and 'text' not in texts:  # the defaults: look for what the dataset calls them
    usual = [fields for fields in TEXT_FIELDS if set(fields) <= set(texts)]
    if not usual:
      raise UserError(
        f'which of the texts {texts} of {spec["name"]} to read is not plain; name them in data.text and '
        'data.text_pair'
      )
    named = (*usual[0], '')[:2]
  for key, value in zip(('data.text', 'data.text_pair'), named):
    if value not in texts and (value or key == 'data.text'):
      raise UserError(f'{key}={value!r} is no text of {spec["name"]}; it has {texts}')
  return files.Columns(*named, label)
