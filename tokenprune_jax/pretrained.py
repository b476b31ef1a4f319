"""Pretrained encoders: read from a package, a folder or the hub, or made at random.

The parameters of a model, whatever its family or method (kernels [in out], tables [rows width]):

  encoder/embeddings/{word,position,type}/embedding, encoder/embeddings/norm/{scale,bias}
  encoder/relative_bias/embedding                      MPNet only; no `type` in DistilBERT and MPNet
  encoder/block_1 ... /{query,key,value,out,up,down}/{kernel,bias}, /{attention_norm,output_norm}/{scale,bias}
  head/dense/{kernel,bias}, head/out/{kernel,bias}     `dense` only in the family's own head
  reducer/...                                          the method's own; never in a pretrained model
"""

from dataclasses import dataclass, replace
from typing import Any

from tokenprune_jax import families, model_files, random_model, sources
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.export import Exported, alone, export, load_exported

__all__ = ['Exported', 'Pretrained', 'alone', 'depth_of', 'export', 'load', 'load_exported']

DEPTHS = {'minilm-l6': 6, 'mpnet-base': 12}  # of the packages, wherever they are not installed


@dataclass(frozen=True)
class Pretrained:
  """params: nested NumPy float32, {'encoder': …} and, where the checkpoint has one, 'head'.

  BERT's backbone brings `head/dense`, its pooler, without `head/out`.
  """

  config: EncoderConfig
  params: dict[str, Any]
  tokenizer: Any  # a transformers PreTrainedTokenizerFast
  source: str


def load(
  source: str,
  *,
  dropout: float | None = None,
  attention_dropout: float | None = None,
  dtype: str | None = None,
  depth: int | None = None,
) -> Pretrained:
  """The encoder, its parameters and its tokenizer.

  source: 'minilm-l6', 'mpnet-base', a Hugging Face folder, a hub name, or 'random:bert:layers=2,width=64,…'
  (`random_model`). dropout, attention_dropout, dtype (compute type): replace what config.json says; depth:
  how many of the layers to take, from the first. Raises UserError naming the file, tensor or key at fault.
  """
  if source.startswith('random:'):
    config, params, tokenizer = random_model.make(source)
  else:
    config, params, tokenizer = model_files.read(sources.locate(source))
  config = _override(config, dropout, attention_dropout, dtype)
  if depth is not None:
    config, params = _shorten(config, params, depth)
  return Pretrained(config, params, tokenizer, source)


def depth_of(source: str) -> int:
  """How many layers an encoder has, from its config.json alone; source: as for `load`. Raises UserError as that does."""
  if source in DEPTHS:
    return DEPTHS[source]
  if source.startswith('random:'):
    return random_model.parse(source)[1]['layers']
  file = sources.locate(source) / 'config.json'
  return families.read_config(model_files.read_json(file), str(file)).depth


def _override(config, dropout, attention_dropout, dtype):
  for name, value in (('dropout', dropout), ('attention_dropout', attention_dropout)):
    if value is not None:
      if not 0 <= value < 1:
        raise UserError(f'model.{name} is {value}; expected a probability from 0 up to, not including, 1')
      config = replace(config, **{name: float(value)})
  if dtype is not None:
    if dtype not in model_files.DTYPES:
      raise UserError(f'model.dtype is {dtype!r}; expected one of {", ".join(model_files.DTYPES)}')
    config = replace(config, dtype=dtype)
  return config


def _shorten(config, params, depth):
  if not 1 <= depth <= config.depth:
    raise UserError(f'model.depth is {depth}; expected 1 to {config.depth}, the layers of the weights')
  above = {f'block_{layer}' for layer in range(depth + 1, config.depth + 1)}
  encoder = {name: value for name, value in params['encoder'].items() if name not in above}
  return replace(config, depth=depth), {**params, 'encoder': encoder}
