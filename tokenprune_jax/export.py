"""A trained model as a folder that others can read, and back.

A dense model with the family's own head becomes the family's ForSequenceClassification, a dense tagger its
ForTokenClassification. Any other becomes its backbone, which transformers' AutoModel reads, with head and
reducer in tokenprune.safetensors beside it. What transformers has no words for is in tokenprune.json. What is
read is what was written, bit for bit.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from tokenprune_jax import conversion, families, model_files
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import tuples

SETTINGS, OWN_WEIGHTS, FORMAT = 'tokenprune.json', 'tokenprune.safetensors', 1
OWN = ('head/', 'reducer/')  # the parameters in OWN_WEIGHTS


@dataclass(frozen=True)
class Exported:
  """A model as it was exported; `params` nested NumPy, `reducer_spec` as `models.make_reducer` takes it."""

  config: EncoderConfig
  params: dict[str, Any]
  tokenizer: Any
  labels: tuple[str, ...]
  readout: str
  head: str
  reducer_spec: dict[str, Any]
  max_length: int
  constrained: bool = False  # a tagger's tags keep to their scheme


def export(
  folder: str | Path,
  config: EncoderConfig,
  params: Mapping[str, Any],
  tokenizer: Any,
  labels: Sequence[str],
  *,
  readout: str,
  head: str,
  reducer_spec: Mapping[str, Any],
  max_length: int | None = None,
  constrained: bool = False,
) -> None:
  """Writes a model, whole or not at all; an earlier export in the same folder is replaced.

  params: as `Classifier.init_params`, on the host or one process's devices. max_length: tokens of the longest
  input, None = all the encoder takes. constrained: as `config.task.constrained`.
  Raises UserError where the folder holds something else or is read-only.
  """
  folder = Path(folder)
  _refuse_foreign(folder)
  own_head = {('family', 'cls'): families.TEXTS, ('linear', 'tokens'): families.TOKENS}
  kind = (
    own_head.get((head, readout), families.BACKBONE) if reducer_spec['name'] == 'none' else families.BACKBONE
  )
  settings = {
    'format': FORMAT,
    'labels': list(labels),
    'readout': readout,
    'head': head,
    'reducer': dict(reducer_spec),
    'max_length': max_length or config.max_length,
    'dtype': config.dtype,
    **({'constrained': True} if constrained else {}),
  }
  own = _own_weights(params) if kind == families.BACKBONE else {}
  tensors = conversion.to_tensors(config, params, kind)
  raw = families.write_config(config, tuple(labels), kind)
  unfinished = folder.with_name(f'.{folder.name}.{os.getpid()}')
  shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed and had this one's number
  try:
    unfinished.mkdir(parents=True)
    _write_json(unfinished / 'config.json', raw)
    _write_json(unfinished / SETTINGS, settings)
    _write_tensors(unfinished / model_files.SINGLE, tensors)
    if own:
      _write_tensors(unfinished / OWN_WEIGHTS, own)
    tokenizer.save_pretrained(unfinished)
    _put(unfinished, folder)
  except (OSError, SafetensorError) as error:
    raise UserError(
      f'cannot export to {folder}: {error}. Is the disk full, or the folder read-only?'
    ) from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def alone(
  config: EncoderConfig, params: Mapping[str, Any], layers: Sequence[int]
) -> tuple[EncoderConfig, dict[str, Any]]:
  """(config, params) of an encoder that has these layers and no others, counted from 1: a student without its teacher."""
  encoder = {name: part for name, part in params['encoder'].items() if not name.startswith('block_')}
  encoder |= {f'block_{i}': params['encoder'][f'block_{l}'] for i, l in enumerate(layers, start=1)}
  return replace(config, depth=len(layers)), {**params, 'encoder': encoder}


def _refuse_foreign(folder: Path) -> None:
  """Only a new folder, an empty one or an earlier export may be written to."""
  if folder.is_dir() and (not any(folder.iterdir()) or (folder / SETTINGS).exists()):
    return
  if folder.exists():
    raise UserError(f'{folder} exists and is no earlier export; expected a new folder to export to')


def _own_weights(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """What the backbone has no place for: path -> array of the head and of the reducer."""
  flat = flatten_dict(dict(params), sep='/')
  return {path: np.ascontiguousarray(value) for path, value in flat.items() if path.startswith(OWN)}


def _write_json(file: Path, content: dict[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
  save_file(tensors, file, {'format': 'pt'})  # transformers asks for the mark
  shutil.copymode(file.parent / SETTINGS, file)  # safetensors makes files that only their owner may read


def _put(unfinished: Path, folder: Path) -> None:
  """Renames into place. An earlier export steps aside first, for a folder cannot be replaced in one step."""
  earlier = folder.with_name(f'.{folder.name}.{os.getpid()}.earlier')
  shutil.rmtree(earlier, ignore_errors=True)
  if folder.exists():
    os.replace(folder, earlier)
  try:
    os.replace(unfinished, folder)
  except OSError:
    if earlier.exists():
      os.replace(earlier, folder)
    raise
  shutil.rmtree(earlier, ignore_errors=True)


def load_exported(folder: str | Path) -> Exported:
  """What `export` wrote. Raises UserError naming the file at fault."""
  folder = Path(folder)
  settings = _read_settings(folder / SETTINGS)
  config, params, tokenizer = model_files.read(folder)
  if (folder / OWN_WEIGHTS).exists():
    params = {'encoder': params['encoder'], **_read_own_weights(folder / OWN_WEIGHTS)}
  _check_head(params.get('head', {}), config, settings, folder)
  return Exported(
    config=replace(config, dtype=settings['dtype']),
    params=params,
    tokenizer=tokenizer,
    labels=tuple(settings['labels']),
    readout=settings['readout'],
    head=settings['head'],
    reducer_spec=_reducer_spec(settings),
    max_length=settings['max_length'],
    constrained=settings.get('constrained', False) is True,
  )


def load_reducer_spec(folder: str | Path) -> dict[str, Any]:
  """The method of what `export` wrote, without its weights. Raises UserError naming the file at fault."""
  return _reducer_spec(_read_settings(Path(folder) / SETTINGS))


def _reducer_spec(settings: dict[str, Any]) -> dict[str, Any]:
  return {key: tuples(value) for key, value in settings['reducer'].items()}


def _read_own_weights(file: Path) -> dict[str, Any]:
  tensors = model_files.read_safetensors(file)
  for path, value in tensors.items():
    if not path.startswith(OWN):
      raise UserError(f'{file}: unknown tensor {path!r}; expected those of head and reducer. Export again.')
    if not np.isfinite(value).all():
      raise UserError(f'{file}: the tensor {path!r} holds NaN or infinite numbers; export the model again')
  return unflatten_dict(tensors, sep='/')


def _read_settings(file: Path) -> dict[str, Any]:
  settings = model_files.read_json(file)
  if settings.get('format') != FORMAT:
    raise UserError(
      f'{file}: format is {settings.get("format")!r}; this version reads {FORMAT}. Export the model again.'
    )
  kinds = {'labels': list, 'readout': str, 'head': str, 'reducer': dict, 'max_length': int, 'dtype': str}
  for key, kind in kinds.items():
    if not isinstance(settings.get(key), kind):
      raise UserError(f'{file}: {key} is {settings.get(key)!r}; expected a {kind.__name__}. Export again.')
  if settings['dtype'] not in model_files.DTYPES:
    raise UserError(
      f'{file}: dtype is {settings["dtype"]!r}; expected one of {", ".join(model_files.DTYPES)}'
    )
  return settings


def _check_head(
  head: Mapping[str, Any], config: EncoderConfig, settings: dict[str, Any], folder: Path
) -> None:
  """The head is whole and fits the labels, so that nothing fails deep inside the model."""
  shapes = {'out/kernel': (config.width, len(settings['labels'])), 'out/bias': (len(settings['labels']),)}
  if settings['head'] == 'family':
    shapes |= {'dense/kernel': (config.width, config.width), 'dense/bias': (config.width,)}
  found = {path: value.shape for path, value in flatten_dict(dict(head), sep='/').items()}
  for path in sorted(set(shapes) | set(found)):
    if shapes.get(path) != found.get(path):
      both = f'{found.get(path)}, but {SETTINGS} wants {shapes.get(path)}'
      raise UserError(f'{folder}: head/{path} has the shape {both}; export the model again')
