"""Reading a model's folder in Hugging Face's layout: config.json, safetensors whole or in shards, tokenizer.

Files are only ever read as safetensors and JSON; nothing is unpickled, and no code of a model is run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tokenprune_jax import conversion, families
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
DTYPES = ('float32', 'bfloat16')  # that a model can compute in, whatever its file holds


def read(folder: Path) -> tuple[EncoderConfig, dict[str, Any], Any]:
  """(config, nested parameters, tokenizer). Raises UserError naming the file, tensor or key at fault."""
  raw = read_json(folder / 'config.json')
  config = families.read_config(raw, str(folder / 'config.json'))
  tensors, files = read_tensors(folder)
  params = conversion.to_params(config, tensors, files, str(folder), families.kind_of(raw))
  return config, params, read_tokenizer(folder, config)


def read_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises UserError naming the file where it is absent or something else."""
  try:
    content = json.loads(file.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise UserError(
      f'{file} is missing; expected a folder as transformers saves it, with {file.name}'
    ) from error
  except (OSError, ValueError) as error:  # JSON and UTF-8 errors are ValueErrors
    raise UserError(f'{file} cannot be read as JSON: {error}') from error
  if not isinstance(content, dict):
    raise UserError(f'{file} holds a {type(content).__name__}; expected an object')
  return content


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """(name -> array, name -> file) of model.safetensors, whole or in shards."""
  if (folder / SINGLE).exists():
    tensors = read_safetensors(folder / SINGLE)
    return tensors, dict.fromkeys(tensors, str(folder / SINGLE))
  if not (folder / INDEX).exists():
    raise _no_weights(folder)
  shards = _shards(folder)
  tensors = {}
  files: dict[str, str] = {}
  for file, names in shards.items():
    found = read_safetensors(folder / file)
    if set(found) != names:
      name = min(set(found) ^ names)
      raise UserError(
        f'{folder / file} and {folder / INDEX} disagree about the tensor {name!r}; get both again'
      )
    tensors |= found
    files |= dict.fromkeys(found, str(folder / file))
  return tensors, files


def _shards(folder: Path) -> dict[str, set[str]]:
  """File -> tensors, as the index says."""
  placed = read_json(folder / INDEX).get('weight_map')
  if not isinstance(placed, Mapping) or not placed:
    raise UserError(f'{folder / INDEX} has no weight_map; get it again')
  shards: dict[str, set[str]] = {}
  for name, file in placed.items():
    if not isinstance(file, str) or Path(file).name != file:
      raise UserError(
        f'{folder / INDEX}: {name!r} lies in {file!r}; expected the name of a file in the same folder'
      )
    shards.setdefault(file, set()).add(name)
  return shards


def _no_weights(folder: Path) -> UserError:
  pickled = sorted(
    file.name for pattern in ('*.bin', '*.pt', '*.h5', '*.msgpack') for file in folder.glob(pattern)
  )
  if not pickled:
    return UserError(f'{folder} holds neither {SINGLE} nor {INDEX}; expected the weights as safetensors')
  return UserError(
    f'{folder} holds its weights as {pickled[0]} only. Reading such a file can run code, so it is not read. '
    'Convert one that you trust where torch is installed: python -c "from transformers import AutoModel; '
    f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')\""
  )


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
  """Every tensor of a file. Raises UserError naming it where it is absent, cut short or something else."""
  try:
    # NumPy knows bfloat16 here because importing jax has registered it.
    with safe_open(file, framework='numpy') as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
  except (SafetensorError, OSError, TypeError) as error:
    raise UserError(
      f'{file} cannot be read as safetensors: {error}. It may be cut short or half written; get it again.'
    ) from error


def read_tokenizer(folder: Path, config: EncoderConfig):
  """The folder's tokenizer, checked against the encoder it is to feed."""
  from transformers import AutoTokenizer  # not above: it takes a second, and only reading a folder needs it

  if not any((folder / name).exists() for name in ('tokenizer.json', 'vocab.txt', 'vocab.json')):
    raise UserError(f'{folder} holds no tokenizer; expected tokenizer.json, or vocab.txt, beside config.json')
  try:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  except Exception as error:
    raise UserError(f'the tokenizer in {folder} cannot be read: {error}') from error
  if not tokenizer.is_fast:
    raise UserError(f'the tokenizer in {folder} has no fast form; save it once with a tokenizer.json')
  if tokenizer.pad_token_id is None:
    raise UserError(
      f'the tokenizer in {folder} has no padding token; expected pad_token in tokenizer_config.json'
    )
  if max(tokenizer.get_vocab().values()) >= config.vocab_size:
    raise UserError(
      f'the tokenizer in {folder} makes ids up to {max(tokenizer.get_vocab().values())}, but config.json has '
      f'vocab_size {config.vocab_size}; expected the tokenizer that the model was trained with'
    )
  return tokenizer
