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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import requests
import tensorflow_datasets as tfds

from tokenprune_jax.data import datasets, files
from tokenprune_jax.data.tokenise import locked
from tokenprune_jax.errors import UserError

OWN = {builder.name: builder for builder in datasets.BUILDERS}
# Names of the one or two texts in tfds' classification datasets, those with two texts first.
TEXT_FIELDS = (
  ('premise', 'hypothesis'), ('sentence1', 'sentence2'), ('question1', 'question2'), ('question', 'sentence'),
  ('title', 'description'), ('text',), ('sentence',),
)  # fmt: skip
SPLIT_NAMES = {
  'train': ('train',),
  'valid': ('validation', 'valid', 'dev', 'validation_matched'),
  'test': ('test', 'test_matched'),
}
NETWORK_SECONDS = 5.0


class Documents(Protocol):
  """A tfds data source: examples by place, several at once faster."""

  def __len__(self) -> int: ...

  def __getitem__(self, place: int) -> Mapping[str, Any]: ...

  def __getitems__(self, places: Sequence[int]) -> Sequence[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents as they were found, nothing dropped yet."""

  name: str
  splits: Mapping[str, Documents]  # 'train', perhaps 'valid' and 'test'; random access
  columns: files.Columns  # names of the fields of an example
  labels: tuple[
    str, ...
  ]  # class names, which labels count from 0; () = labels are text, classes to be discovered
  paths: Mapping[str, str]  # of each split, for messages
  bad: files.BadRows

  def where(self, split: str, index: int, example: Mapping[str, Any]) -> str:
    """What a message calls an example."""
    line = f':{example["line"]}' if 'line' in example else f', example {index}'
    return self.paths[split] + line


def open_source(spec: Mapping[str, Any], cache_dir: Path) -> Source:
  """The dataset that config.data names, prepared if it has not been. spec: all keys of config.data. Raises
  UserError.
  """
  if spec['name'] == 'file':
    return open_files(spec, cache_dir)
  if spec['name'] in OWN:
    builder = OWN[spec['name']](data_dir=cache_dir / 'datasets', file_format='array_record')
    prepare_own(builder, cache_dir)
  else:
    builder = prepare_tfds(spec['name'])
  return describe_builder(spec, builder)


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
  with locked(cache_dir):
    if not builder.is_prepared():
      with quiet():
        try:
          builder.download_and_prepare()
        except (
          OSError,
          RuntimeError,
        ) as error:  # RuntimeError: what array_record's writer makes of a full disk
          raise UserError(
            f'cannot write the dataset to {builder.data_dir}: {error}. Free some space, or choose another '
            'folder in the environment variable TOKENPRUNE_CACHE'
          ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without tfds' words on downloading, where nothing is downloaded."""
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    yield


def prepare_tfds(name: str) -> tfds.core.DatasetBuilder:
  """Any dataset of tfds, downloaded where it is not on this machine yet. Raises UserError, offline within
  seconds.
  """
  # Without TensorFlow tfds does not import these itself, and then does not know glue, snli, conll2003, …
  importlib.import_module('tensorflow_datasets.text')
  folder = os.environ.get('TFDS_DATA_DIR')  # None: tfds' own default
  try:
    builder = tfds.builder(name, data_dir=folder, file_format='array_record')
  except Exception as error:
    raise UserError(unknown_name(name, error)) from error
  if isinstance(builder, tfds.core.ReadOnlyBuilder) or builder.is_prepared():
    return builder
  if not reachable(builder):
    raise UserError(
      f'data.name={name!r} is not in {builder.data_dir}, and the hosts that it is downloaded from cannot be '
      f'reached. Where there is a network, run: python -c "import tensorflow_datasets as tfds, '
      f'tensorflow_datasets.text; tfds.data_source({name!r})". Copy the folder here and name the one it lies in in TFDS_DATA_DIR. '
      f'Or use a dataset that needs no network ({", ".join(OWN)}), or files of your own (file)'
    )
  try:
    builder.download_and_prepare()
  except Exception as error:
    raise UserError(f'data.name={name!r} could not be prepared: {type(error).__name__}: {error}') from error
  return builder


def unknown_name(name: str, error: Exception) -> str:
  """The message for a name that tfds refused with `error`."""
  if not isinstance(error, tfds.core.DatasetNotFoundError):
    return f'data.name={name!r} cannot be opened: {type(error).__name__}: {error}'
  known = [*OWN, 'file', *tfds.list_builders(with_community_datasets=False)]
  near = difflib.get_close_matches(name, known, n=3)
  hint = f'did you mean {" or ".join(near)}?' if near else 'see tfds.list_builders() for those of tfds'
  return f'data.name={name!r} is no dataset of this project ({", ".join(OWN)}, file), nor of tfds; {hint}'


def reachable(builder: tfds.core.DatasetBuilder) -> bool:
  """Whether one of the hosts that the dataset is downloaded from answers; True if it names none."""
  urls = {urllib.parse.urlsplit(url)[:2] for url in builder.url_infos or ()}
  for scheme, host in sorted(urls)[:3]:
    try:
      requests.head(f'{scheme}://{host}', timeout=NETWORK_SECONDS)
      return True
    except requests.RequestException:
      continue
  return not urls


def describe_builder(spec: Mapping[str, Any], builder: tfds.core.DatasetBuilder) -> Source:
  """The fields and splits of a builder that config.data names, else those with usual names."""
  name, features = spec['name'], builder.info.features
  columns = find_columns(spec, features)
  available = set(builder.info.splits)
  splits, paths = {}, {}
  for split, names in SPLIT_NAMES.items():
    wanted = spec[split] or next((usual for usual in names if usual in available), '')
    if wanted:
      splits[split], paths[split] = read_split(builder, wanted, f'data.{split}'), f'{name}[{wanted}]'
  if 'train' not in splits:
    raise UserError(f'{name} has no split named train; name one in data.train: {sorted(available)}')
  if 'test' in splits and not spec['test'] and splits['test'][0][columns.label] < 0 and 'valid' in splits:
    # Competitions keep the labels of their test split: the validation split takes its place.
    splits['test'], paths['test'] = splits.pop('valid'), paths.pop('valid')
  labels = tuple(features[columns.label].names)
  return Source(name, splits, columns, labels, paths, files.BadRows(spec['on_bad_row']))


def read_split(builder: tfds.core.DatasetBuilder, split: str, key: str) -> Documents:
  """One split, by tfds' name or slice (train[:10%]). Raises UserError."""
  try:
    return builder.as_data_source(split=split)
  except (ValueError, KeyError, NotImplementedError) as error:
    raise UserError(f'{key}: {split!r} of {builder.info.name} cannot be read: {error}') from error


def find_columns(spec: Mapping[str, Any], features: tfds.features.FeaturesDict) -> files.Columns:
  """The features that hold text and label. Raises UserError where that is not plain."""
  texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
  classes = [name for name, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
  label = spec['label']
  if label not in classes and label == 'label' and len(classes) == 1:
    label = classes[0]
  if label not in classes:
    raise UserError(f'data.label={label!r} is no class of {spec["name"]}; it has {classes or "none"}')
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
