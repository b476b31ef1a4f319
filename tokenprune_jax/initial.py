"""What a stage's parameters start from: a fresh model with everything that the source has put into it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenprune_jax import optim, pretrained, writer
from tokenprune_jax.encoder import EncoderConfig
from tokenprune_jax.errors import UserError

# Parts of a model that a source need not have: they then keep their fresh values.
OPTIONAL = ('head/', 'reducer/')
# Fields of the encoder that parameters are tied to, beyond their shapes.
BACKBONE = ('family', 'vocab_size', 'depth', 'heads', 'position_offset', 'pad_id', 'norm_eps', 'activation')


def graft(fresh: Mapping[str, Any], source: Mapping[str, Any], origin: str) -> dict[str, Any]:
  """`fresh` with the tensors of `source`; origin: what to call the source in a message.

  The backbone must agree entirely. A head or reducer that differs in shape, or is on one side only, stays
  fresh and that is said. Raises UserError naming the first tensor that does not fit.
  """
  here, there = optim.flatten(fresh), optim.flatten(source)
  result, kept = dict(here), []
  for path in sorted(here.keys() | there.keys()):
    shapes = [np.shape(side[path]) if path in side else None for side in (here, there)]
    if shapes[0] == shapes[1]:
      result[path] = np.asarray(there[path])
    elif not path.startswith(OPTIONAL):
      raise UserError(
        f'{origin} does not fit this model: {path} has shape {shapes[1]} there and {shapes[0]} here '
        '(None: missing). Check config.model.weights and the stage that it is taken from.'
      )
    elif path in here:
      kept.append(path)
  if kept:
    writer.say(f'new, not from {origin}: {", ".join(kept)}')
  return optim.unflatten(result)


def from_run(folder: str, config: EncoderConfig, labels: Sequence[str]) -> dict[str, Any]:
  """The parameters that another run exported. A head for other labels is left out.

  Raises UserError where `folder` holds no finished run, or one with another encoder.
  """
  model = pathlib.Path(folder) / 'model'
  if not model.is_dir():
    raise UserError(
      f"a stage's init is '{folder}', which is neither 'pretrained', nor an earlier stage, nor the "
      'workdir of a finished run (one has a folder model/ in it).'
    )
  exported = pretrained.load_exported(model)
  for field in BACKBONE:
    theirs, ours = getattr(exported.config, field), getattr(config, field)
    if theirs != ours:
      raise UserError(
        f'{model} was made from another encoder: its {field} is {theirs!r}, here {ours!r}. '
        'Set config.model.weights to what that run used.'
      )
  if tuple(exported.labels) == tuple(labels):
    return exported.params
  writer.say(f'{model} has other labels ({", ".join(exported.labels)}): its head is not used')
  return {'encoder': exported.params['encoder']}
