"""What a stage's parameters start from: everything that fits of a source, the rest fresh."""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokenprune_jax import optim, pretrained, specs, writer
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier
from tokenprune_jax.reducer import Reducer

# Parts of a model that a source need not have: they then keep their fresh values.
OPTIONAL = ('head/', 'reducer/')
# Fields of the encoder that parameters are tied to, beyond their shapes.
BACKBONE = ('family', 'vocab_size', 'depth', 'heads', 'position_offset', 'pad_id', 'norm_eps', 'activation')


def graft(model: Classifier, key: jax.Array, source: Mapping[str, Any], origin: str) -> dict[str, Any]:
  """The model's parameters: the tensors of `source`, and fresh ones where it has none; all on the host.

  The backbone must agree entirely. A head or reducer that differs in shape, or is on one side only, is
  made from `key` and that is said; origin: what to call the source then. Raises UserError naming the
  first tensor that does not fit.
  """
  here, there = optim.flatten(param_shapes(model)), optim.flatten(source)
  for path, value in copied(model.reducer, there).items():
    if path in here and (path not in there or there[path].shape != here[path].shape):
      there[path] = value
  taken, new = {}, []
  for path in sorted(here.keys() | there.keys()):
    shapes = [tuple(side[path].shape) if path in side else None for side in (here, there)]
    if shapes[0] == shapes[1]:
      taken[path] = np.asarray(there[path])
    elif not path.startswith(OPTIONAL):
      raise UserError(
        f'{origin} does not fit this model: {path} has shape {shapes[1]} there and {shapes[0]} here '
        '(None: missing). Check config.model.weights and the stage that it is taken from.'
      )
    elif path in here:
      new.append(path)
  if new:
    parts = sorted({'/'.join(path.split('/')[:2]) for path in new})
    writer.say(f'new, not from {origin}: {", ".join(parts)} ({len(new)} tensors)')

  def make_new(key):
    params = optim.flatten(model.init_params(key))
    return {path: params[path] for path in new}

  # Under jit, so that what is not new is not computed either.
  return optim.unflatten(taken | jax.device_get(jax.jit(make_new)(key)))


def copied(reducer: Reducer, params: Mapping[str, Any]) -> dict[str, Any]:
  """What a method's own parameters begin as where it copies others of the model; params: flat, by path."""
  found: dict[str, Any] = {}
  for own, other in reducer.copies().items():
    parts = (path.removeprefix(f'{other}/') for path in params if path.startswith(f'{other}/'))
    found |= {f'reducer/{own}/{part}': params[f'{other}/{part}'] for part in parts}
  return found


@functools.lru_cache(maxsize=16)
def param_shapes(model: Classifier) -> Any:
  """The model's parameters as abstract arrays."""
  return jax.eval_shape(model.init_params, jax.random.key(0))


def check_reducer(
  model: Classifier, params: Mapping[str, Any], source: str, remedy: str = 'export the model again'
) -> None:
  """Raises UserError where the method of a model has not the parameters that it needs; source: what names the method."""
  here = optim.flatten(param_shapes(model).get('reducer', {}))
  there = optim.flatten(params.get('reducer', {}))
  for path, wanted in here.items():
    found = tuple(there[path].shape) if path in there else None
    if found != wanted.shape:
      raise UserError(
        f'{source}: reducer/{path} has the shape {found}, but the method that is named there wants {wanted.shape} '
        f'(None: missing); {remedy}'
      )


def from_run(
  folder: str, config: EncoderConfig, labels: Sequence[str], readout: str, head: str, spec: Mapping[str, Any]
) -> dict[str, Any]:
  """The parameters that another run exported; those of the encoder alone where it was for other labels.

  Of a run that read something else into its head, or into another one, all but the head. spec: the method that they are
  for. Raises UserError where `folder` holds no finished run, or one with another encoder.
  """
  found = exported(folder, config)
  if tuple(found.labels) != tuple(labels):
    writer.say(f'{folder} has other labels ({", ".join(found.labels)}): its head is not used')
    return {'encoder': found.params['encoder']}
  theirs, ours = (found.readout, found.head), (readout, head)
  params = in_chain(found, spec)
  if theirs == ours:
    return params
  writer.say(
    f'{folder} has config.task readout and head {", ".join(theirs)}, here {", ".join(ours)}: its head is not used'
  )
  return {name: part for name, part in params.items() if name != 'head'}


def in_chain(found: pretrained.Exported, spec: Mapping[str, Any]) -> dict[str, Any]:
  """A run's parameters; where its method is a member of the chain `spec`, what it learned lies at that member's place."""
  places = {member['name']: path for path, member in specs.placed(spec)}
  learned = found.params.get('reducer', {})
  for name in reversed(places.get(found.reducer_spec['name'], ())):
    learned = {name: learned}
  return {**found.params, 'reducer': learned}


def teacher(folder: str, config: EncoderConfig, labels: Sequence[str]) -> pretrained.Exported:
  """The model of a finished run that others learn from. Raises UserError where it answers with other labels."""
  found = exported(folder, config, 'teacher')
  if tuple(found.labels) != tuple(labels):
    raise UserError(
      f'the teacher {folder} has the labels {", ".join(found.labels)}; here they are {", ".join(labels)}.'
    )
  return found


def exported(folder: str, config: EncoderConfig, key: str = 'init') -> pretrained.Exported:
  """The model of a finished run. key: that names it. Raises UserError where there is none, or one with another encoder."""
  model = pathlib.Path(folder) / 'model'
  if not model.is_dir():
    raise UserError(
      f"{key} is '{folder}', which is neither 'pretrained', nor an earlier stage, nor the workdir of a finished run (one has "
      'a folder model/ in it).'
    )
  found = pretrained.load_exported(model)
  for field in BACKBONE:
    theirs, ours = getattr(found.config, field), getattr(config, field)
    if theirs != ours:
      raise UserError(
        f'{model} was made from another encoder: its {field} is {theirs!r}, here {ours!r}. '
        'Set config.model.weights to what that run used.'
      )
  return found


def check_sources(stage: Mapping[str, Any], config: EncoderConfig, earlier: Mapping[str, Classifier]) -> None:
  """Raises UserError where a stage starts from what is neither an earlier stage nor a finished run of this encoder."""
  for key in ('init', 'init_reducer'):
    if stage[key] and stage[key] != 'pretrained' and stage[key] not in earlier:
      try:
        exported(stage[key], config, key)
      except UserError as error:
        raise UserError(f'stage {stage["name"]!r}: {error}') from error


def check_inherited(
  stage: Mapping[str, Any], spec: Mapping[str, Any], config: EncoderConfig, earlier: Mapping[str, Classifier]
) -> None:
  """Raises UserError where a stage starts without what an earlier one has to have learned (`stages`: inherits).

  What `init_reducer` names has some of a method's parameters, whether or not the method cannot start without them.
  earlier: the models of the stages before it.
  """
  source = stage['init_reducer'] or stage['init']
  wanted = []
  for path, member in specs.placed(spec):
    inherits = getattr(specs.module(member['name']), 'inherits', None)
    if inherits and inherits(member):
      wanted.append(('/'.join(('reducer', *path, inherits(member))), member['name']))
  if stage['init_reducer'] and not wanted:
    wanted = [('reducer/.*', spec['name'])]
  if not wanted:
    return
  if source == 'pretrained':
    there: set[str] = set()
  elif source in earlier:
    there = set(optim.flatten(param_shapes(earlier[source])))
  else:
    there = set(optim.flatten(in_chain(exported(source, config), spec)))
  for pattern, name in wanted:
    if not any(re.fullmatch(pattern, path) for path in there):
      raise UserError(
        f"stage {stage['name']!r}: {name} starts from '{source}', which has no {pattern} in it. Name a "
        "stage or a finished run that learned these, in the stage's init or init_reducer."
      )
