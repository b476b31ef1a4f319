"""What all stages of a run share: config, devices, data, weights; and what is made from them."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import (
  data,
  initial,
  optim,
  predict,
  pretrained,
  schedule,
  sharding,
  specs,
  stages,
  tasks,
  workdir,
  writer,
)
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier, make_reducer


class Session(NamedTuple):
  """One run's config, devices, data and weights."""

  config: dict[str, Any]
  folder: pathlib.Path
  mesh: jax.sharding.Mesh
  task: tasks.Task
  weights: pretrained.Pretrained
  dataset: data.Dataset
  buckets: tuple[int, ...]
  out: writer.MetricsWriter | None  # process 0 alone


def prepare(config: dict[str, Any], folder: pathlib.Path) -> Session:
  """Everything before the first stage: what is wrong with a config is found before hours are spent."""
  stages.check(config['stages'])
  optimizer = config['optimizer']
  sharding.check_batch('optimizer.batch_size', optimizer['batch_size'], optimizer['accumulate'])
  sharding.check_batch('eval.batch_size', config['eval']['batch_size'])
  if config['predict']:
    predict.READERS[config['task']['name']](pathlib.Path(config['predict']), config['data'])
  mesh, task = (
    sharding.make_mesh(config['parallel']['fsdp']),
    tasks.make(config['task']['name'], config['task']['constrained']),
  )
  weights, max_length = load_weights(config), config['data']['max_length']
  check_stages(config, weights, task)
  load = data.LOADERS[task.name]
  dataset = load(config['data'], weights.tokenizer, max_length, data.cache_dir(), seed=config['seed'])
  words = dataset.splits['train'].words
  if task.constrained and words is not None and words.scheme == 'plain':
    raise UserError(
      f'config.task.constrained is True, but the tags of {dataset.name} mark no spans: {", ".join(dataset.labels[:8])}; '
      'set it to False.'
    )
  for stage in config['stages']:
    specs.labelled(stages.reducer_spec(config['reducer'], [], stage), dataset.labels, words)
  names = [stage['name'] for stage in config['stages']]
  for stage in config['stages']:
    if stage['teacher'] and stage['teacher'] not in names:
      initial.teacher(stage['teacher'], weights.config, dataset.labels)
  sharding.on_first(lambda: workdir.settle_data(folder, dataset.identity()))
  writer.say(dataset.describe())
  check_budgets(config, weights, dataset.splits['valid'].lengths)
  buckets = (*(length for length in config['data']['buckets'] if length < max_length), max_length)
  out = sharding.on_first(lambda: writer.MetricsWriter(folder))
  return Session(config, folder, mesh, task, weights, dataset, buckets, out)


def check_stages(config: Mapping[str, Any], weights: pretrained.Pretrained, task: tasks.Task) -> None:
  """Raises UserError for a wrong setting of any stage: the last one's is not to be found after the first has run."""
  earlier: dict[str, Classifier] = {}
  modes: dict[str, tuple[str, str]] = {}
  handed_on: list[dict[str, dict[str, Any]]] = []
  for stage in config['stages']:
    spec = stages.reducer_spec(config['reducer'], handed_on, stage)
    stages.find_objective(stage, spec, task)
    model = classifier(config, weights, spec, labels=2)
    check_modes(stage, spec, modes)
    for member in specs.members(spec):
      getattr(specs.module(member['name']), 'check_length', lambda *_: None)(
        member, config['data']['max_length']
      )
    optim.trainable(initial.param_shapes(model), stage['train'], model.unused_blocks())
    initial.check_sources(stage, weights.config, earlier)
    initial.check_inherited(stage, spec, weights.config, earlier)
    if stage['teacher']:
      check_teacher(stage, model, weights, earlier)
    earlier[stage['name']] = model
    handed_on.append(stages.expected(spec, weights.config.depth))
  optim.check_groups(config['optimizer']['groups'], map(initial.param_shapes, earlier.values()))


def check_modes(stage: Mapping[str, Any], spec: Mapping[str, Any], modes: dict[str, tuple[str, str]]) -> None:
  """Raises UserError where a method goes back to a mode that comes before that of an earlier stage (`stages`: MODE_ORDER).

  modes: {method: (its mode, stage) so far}, kept up.
  """
  for member in specs.members(spec):
    name, file = member['name'], specs.module(member['name'])
    order, mode = getattr(file, 'MODE_ORDER', ()), member.get('mode', getattr(file.Method, 'mode', ''))
    if mode not in order:
      continue
    before, where = modes.get(name, (mode, ''))
    if order.index(mode) < order.index(before):
      raise UserError(
        f'stage {stage["name"]!r} has {name} in mode {mode!r}, but the stage {where!r} before it in {before!r}; the order is '
        f'{", ".join(order)}.'
      )
    modes[name] = mode, stage['name']


def check_budgets(config: Mapping[str, Any], weights: pretrained.Pretrained, lengths: np.ndarray) -> None:
  """Raises UserError where a stage asks for a budget that its method cannot reach on texts of these lengths in tokens."""
  for stage in config['stages']:
    spec = stages.reducer_spec(config['reducer'], [], stage)
    if {'student', 'combine'} & set(specs.names(spec)):  # layers are left out
      continue
    for member in specs.members(spec):
      least = getattr(specs.module(member['name']), 'least', None)
      if least is not None and member.get('target_macs'):
        schedule.check_budget(
          'reducer.target_macs', member['target_macs'], least(member, weights.config, lengths)
        )


def check_teacher(
  stage: Mapping[str, Any],
  model: Classifier,
  weights: pretrained.Pretrained,
  earlier: Mapping[str, Classifier],
) -> None:
  """Raises UserError where a stage's teacher is of another encoder, or runs fewer layers than the student."""
  teacher, depth = stage['teacher'], weights.config.depth
  if teacher in earlier:
    reducer = earlier[teacher].reducer
  else:
    reducer = make_reducer(initial.exported(teacher, weights.config).reducer_spec)
  theirs, ours = len(reducer.blocks(depth)), len(model.reducer.blocks(depth))
  if ours > theirs:
    raise UserError(
      f'stage {stage["name"]!r}: the student runs {ours} layers, its teacher {teacher!r} only {theirs}; name a deeper '
      'teacher, or fewer layers.'
    )


def load_weights(config: Mapping[str, Any]) -> pretrained.Pretrained:
  """The encoder of config.model. Raises UserError where it cannot read config.data.max_length tokens."""
  model, max_length = config['model'], config['data']['max_length']
  weights = pretrained.load(
    model['weights'],
    dropout=model['dropout'],
    attention_dropout=model['attention_dropout'],
    dtype=model['dtype'],
  )
  if max_length > weights.config.max_length:
    raise UserError(
      f'config.data.max_length is {max_length}; {model["weights"]} reads at most {weights.config.max_length}.'
    )
  return weights


def make_model(session: Session, spec: Mapping[str, Any]) -> Classifier:
  """The model with the reducer of `spec`. Raises UserError where the two do not fit."""
  return classifier(session.config, session.weights, spec, len(session.dataset.labels))


def classifier(
  config: Mapping[str, Any], weights: pretrained.Pretrained, spec: Mapping[str, Any], labels: int
) -> Classifier:
  """As `make_model`, where the dataset is not there yet."""
  task, reducer = config['task'], make_reducer(spec)
  executor = config['model']['executor']
  if executor == 'serve':  # a host loop for trained models: training and counting go by the reference
    executor = 'mask'
  return Classifier(weights.config, reducer, labels, task['readout'], task['head'], executor).check()


def batches(session: Session, split: str, batch_size: int, *, seed: int = 0, shuffle: bool = False) -> Any:
  """This process's part of the batches of a split."""
  return data.batches(
    session.dataset.splits[split],
    batch_size=batch_size,
    buckets=session.buckets,
    seed=seed,
    epoch_shuffle=shuffle,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    pad_id=session.weights.config.pad_id,
  )
