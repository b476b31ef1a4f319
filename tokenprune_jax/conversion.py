"""Tensors of a checkpoint <-> parameters of this encoder, by the rules in `families`.

A tensor that is missing, unknown, named twice or of the wrong shape is an error that names it and its file.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.families import BACKBONE, rules


def expected_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every encoder parameter that a pretrained model brings (no head, no reducer)."""
  shapes: dict[str, tuple[int, ...]] = {}
  for rule in rules(config.family, BACKBONE):
    if rule.target is not None and rule.target.startswith('encoder/'):
      shape = tuple(getattr(config, axis) for axis in rule.shape)
      layers = range(1, config.depth + 1) if '{l}' in rule.target else (0,)
      shapes |= {rule.target.format(l=layer): shape for layer in layers}
  return shapes


def to_params(
  config: EncoderConfig,
  tensors: Mapping[str, np.ndarray],
  files: Mapping[str, str],
  folder: str,
  kind: str,
) -> dict[str, Any]:
  """Nested parameters {'encoder': …, 'head': …} from a checkpoint's tensors.

  files: the file of each tensor, for messages; folder: where they lie. kind: what the checkpoint is for, of
  those in `families`; the head of another task is left out. `head` is there only where the checkpoint has
  one; BERT's backbone may bring `head/dense`, its pooler, alone. Raises UserError naming tensor and file.
  """
  found: dict[str, np.ndarray] = {}
  origin: dict[str, str] = {}
  for name, tensor in tensors.items():
    rule, target = _match(config, kind, name, files[name])
    if target is None or (kind == BACKBONE and not _in_backbone(config, rule)):
      continue
    if target in origin:
      both = f'{origin[target]!r} and {name!r}'
      raise UserError(f'{files[name]}: the tensors {both} both hold {target}; expected one of them')
    value = _fit(tensor, rule, config, f'{files[name]}: the tensor {name!r}')
    found[target], origin[target] = value, name
  _require(config, kind, found, folder)
  return unflatten_dict(found, sep='/')


def _in_backbone(config, rule):
  return rule.name.startswith(f'{config.family}.')


def _match(config, kind, name, file):
  """(rule, target path) of a tensor's name."""
  matches = [(rule, match) for rule in rules(config.family, kind) if (match := rule.pattern.fullmatch(name))]
  if not matches:
    raise UserError(f'{file}: {config.family} has no tensor {name!r}; expected the weights of config.json')
  (rule, match) = matches[0]
  if rule.target is None or not match.groups():
    return rule, rule.target
  layer = int(match[1]) + 1
  if layer > config.depth:
    raise UserError(f'{file}: the tensor {name!r} is of layer {layer}; config.json has {config.depth} layers')
  return rule, rule.target.format(l=layer)


def _fit(tensor, rule, config, where):
  """The tensor in our layout and float32."""
  # A head has as many as it says, along the first axis of theirs.
  labels = tensor.shape[0] if tensor.ndim else 0
  shape = tuple(labels if axis == 'labels' else getattr(config, axis) for axis in rule.shape)
  shape = shape[::-1] if rule.transpose else shape
  if tensor.shape != shape:
    raise UserError(f'{where} has the shape {list(tensor.shape)}; expected {list(shape)} by config.json')
  if tensor.dtype.kind != 'f' and tensor.dtype.name != 'bfloat16':
    raise UserError(f'{where} has the type {tensor.dtype.name}; expected floating-point numbers')
  value = np.ascontiguousarray(tensor.T if rule.transpose else tensor, dtype=np.float32)
  if not np.isfinite(value).all():
    raise UserError(f'{where} holds NaN or infinite numbers; the file is damaged, get it again')
  return value


def _require(config, kind, found, folder):
  """Every parameter of the encoder is there, and a head is whole."""
  names = {rule.target: rule for rule in rules(config.family, kind) if rule.target is not None}
  needed = set(expected_shapes(config))
  head = {target for target in names if target.startswith('head/')}
  pooler = config.family == 'bert' and not any(target.startswith('head/out') for target in found)
  if head & set(found):
    needed |= {target for target in head if not pooler or target.startswith('head/dense')}
  missing = sorted(needed - set(found))
  if missing:
    target = re.sub(r'block_\d+', 'block_{l}', missing[0])
    layer = re.search(r'block_(\d+)', missing[0])
    name = names[target].name.format(l=int(layer[1]) - 1 if layer else 0)
    raise UserError(
      f'{folder}: the tensor {name!r} is missing from its safetensors ({len(missing)} missing in all); '
      f'expected a whole {config.family} model. Get the file again, or correct config.json.'
    )
  if 'head/out/kernel' in found and found['head/out/kernel'].shape[1] != found['head/out/bias'].shape[0]:
    raise UserError(f'{folder}: weight and bias of the classifier are for different numbers of labels')


def to_tensors(config: EncoderConfig, params: Mapping[str, Any], kind: str) -> dict[str, np.ndarray]:
  """The inverse of `to_params`: the backbone without prefix or, for other kinds, with prefix and head.

  Entries of `params` that the family does not know (a reducer's) are left out; KeyError where one is missing.
  """
  flat = flatten_dict(dict(params), sep='/')
  tensors = {}
  for rule in rules(config.family, kind):
    if rule.target is None or (kind == BACKBONE and not rule.target.startswith('encoder/')):
      continue
    for layer in range(config.depth if '{l}' in rule.target else 1):
      value = np.asarray(flat[rule.target.format(l=layer + 1)], np.float32)
      name = rule.name.format(l=layer)
      name = name if kind != BACKBONE else name.removeprefix(f'{config.family}.')
      tensors[name] = np.ascontiguousarray(value.T if rule.transpose else value)
  return tensors
