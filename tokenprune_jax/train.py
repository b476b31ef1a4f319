"""One run: every stage of a config in order, then the best model of the last one tested and exported.

Read top to bottom: `run` (the whole), `train_stage` (one stage with its loop), `make_step` (what is
compiled). What a run leaves in its folder: config.json, metrics.jsonl, tensorboard/,
checkpoints/STAGE/STEP, stages/STAGE.json, predictions_test.jsonl, model/ (for `tokenprune_jax.load`) and,
last of all, result.json.

Steps are counted through all stages. A run that was stopped anywhere goes on with the same command and
ends with the same numbers, bit for bit on the same machine: a step depends only on the checkpointed
state, on its own number (from which all its randomness is made) and on the data position.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenprune_jax import (
  answers,
  costs,
  initial,
  optim,
  result,
  settings,
  sharding,
  specs,
  stages,
  tasks,
  workdir,
  writer,
)
from tokenprune_jax.checkpoint import Checkpoints, Damaged
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier
from tokenprune_jax.recorder import Recorder
from tokenprune_jax.session import Session, batches, classifier, make_model, prepare
from tokenprune_jax.stopping import Interrupted, Stop, Stopped

PRNG = 'threefry2x32'  # its numbers do not depend on how an array is spread over devices


@dataclasses.dataclass
class Done:
  """A finished stage, as stages/NAME.json holds it."""

  step: int  # of the run, when the stage ended
  best_step: int  # of its best checkpoint
  best_loss: float | None  # of that one on the validation split
  reducer: dict[str, Any]  # the spec it was trained with
  fields: dict[str, dict[str, Any]]  # what its reducers hand on to later stages and to the finished model


@dataclasses.dataclass
class Position:
  """Where a stage stands: saved in each checkpoint beside the arrays."""

  start: int  # step of the run at which the stage began
  step: int = 0  # of the stage
  best_step: int = -1  # of the run; -1 before the first validation
  best_loss: float | None = None
  worse: int = 0  # validations since the best one
  validated: int = 0  # step of the stage at the last validation
  data: Any = None  # state of the batch iterator

  @property
  def total(self) -> int:
    """Step of the run."""
    return self.start + self.step

  def judge(self, loss: float, last: bool = False) -> None:
    """Takes note of a validation's loss. last: the newest checkpoint is taken for the best."""
    self.validated = self.step
    if last or self.best_loss is None or loss < self.best_loss:
      self.best_loss, self.best_step, self.worse = loss, self.total, 0
    else:
      self.worse += 1


def run(config: Mapping[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
  """Trains, tests and exports as `config` (see `settings`) says, in `folder`; returns what result.json holds.

  A finished run is not repeated. Raises UserError for what a user can mend, Stopped after SIGTERM or
  Ctrl-C.
  """
  config, folder = settings.check(config), pathlib.Path(folder)
  with workdir.storage_errors(folder), contextlib.ExitStack() as stack:
    # ------------------------------------------------------------------------------------------------ Folder
    def claim() -> bool:
      stack.enter_context(workdir.lock(folder))
      return workdir.is_finished(folder, config)

    if sharding.agreed(bool(sharding.on_first(claim))):
      writer.say(f'{folder} is finished: its result is in {folder / "result.json"}')
      result.label_file(config, folder)
      return workdir.read_json(folder / 'result.json')

    # ------------------------------------------------------------------------------------------------ Stages
    session = prepare(config, folder)
    sharding.on_first(lambda: workdir.begin(folder, config))
    if session.out is not None:
      stack.callback(session.out.close)
    done: dict[str, Done] = {}
    with Stop() as stop:
      for stage in config['stages']:
        record = workdir.read_json(folder / 'stages' / f'{stage["name"]}.json')
        done[stage['name']] = Done(**record) if record else train_stage(session, stage, done, stop)
      if stop.number:  # came while the last stage ended
        writer.say('stopped before the test; the same command goes on with it')
        raise Stopped(stop.number)

    # ------------------------------------------------------------------------------------------------ Test
    last = config['stages'][-1]['name']
    params = best_params(session, last, done[last])
    about = {'stages': {name: dataclasses.asdict(stage) for name, stage in done.items()}}
    spec = specs.with_handed_on(done[last].reducer, done[last].fields)
    found = result.test(session, spec, params, done[last].step, about)
    result.label_file(config, folder)
    return found


def train_stage(session: Session, stage: Mapping[str, Any], done: Mapping[str, Done], stop: Stop) -> Done:
  """Trains one stage, from its beginning or from its newest good checkpoint, and writes stages/NAME.json."""
  config, folder, name, mesh = session.config, session.folder, stage['name'], session.mesh
  seed, options = config['seed'], config['optimizer']

  # -------------------------------------------------------------------------------------------------- Model
  spec = stages.reducer_spec(config['reducer'], [earlier.fields for earlier in done.values()], stage)
  spec = specs.labelled(spec, session.dataset.labels, session.dataset.splits['train'].words)
  model = make_model(session, spec)
  objective = stages.find_objective(stage, spec, session.task)
  shapes = initial.param_shapes(model)
  trained = optim.trainable(shapes, stage['train'], model.unused_blocks())
  teacher_model, teacher_params = teacher_of(session, stage['teacher'], done)
  known = answers.collected(session, stage, teacher_model, teacher_params)
  if known is not None:
    teacher_model, teacher_params = None, None

  # -------------------------------------------------------------------------------------------------- Data
  plan = batches(session, 'train', options['batch_size'], seed=seed + len(done), shuffle=True)
  steps = stage['epochs'] * plan.steps_per_epoch
  validate_every = config['eval']['every'] or plan.steps_per_epoch

  # -------------------------------------------------------------------------------------------------- State
  rate = optim.schedule(options['learning_rate'] * stage['rate'], steps, options['warmup'])
  optimizer = optim.adamw(
    shapes,
    rate,
    groups=options['groups'],
    weight_decay=options['weight_decay'],
    clip=options['clip'],
  )
  trained_shapes = optim.split(shapes, trained)[0]
  like = {'params': shapes, 'optimizer': jax.eval_shape(optimizer.init, trained_shapes)}
  places = sharding.state_shardings(mesh, like)
  checkpoints = Checkpoints(folder / 'checkpoints' / name, config['checkpoint']['keep'])
  found = checkpoints.resume(sharding.placed(like, places), config)
  if found is None:
    position = Position(start=max((earlier.step for earlier in done.values()), default=0))
    params = sharding.put(initial_params(session, stage, spec, model, done), places['params'])
    moments = jax.jit(optimizer.init, out_shardings=places['optimizer'])(optim.split(params, trained)[0])
  else:
    saved, record = found
    position = Position(**record['position'])
    if position.best_step >= 0 and position.best_step not in checkpoints.steps():
      writer.say(
        f'{name}: its best checkpoint, {checkpoints.path(position.best_step)}, is gone: the best of what is left counts'
      )
      position = dataclasses.replace(position, best_step=-1, best_loss=None, worse=0, validated=0)
    params, moments = saved['params'], saved['optimizer']
    writer.say(f'{name}: going on after step {position.step} of {steps}')
  parts = optim.split(params, trained)
  state, frozen = {'trained': parts[0], 'optimizer': moments}, parts[1]

  # -------------------------------------------------------------------------------------------------- Step
  take_step = make_step(
    objective, model, optimizer, teacher_model, options['accumulate'],
    ({'trained': optim.split(places['params'], trained)[0], 'optimizer': places['optimizer']},
     sharding.replicated(mesh)),
  )  # fmt: skip
  batch_sharding = sharding.batch_sharding(mesh)
  iterator = plan.iterator(0)
  if position.data is not None:
    iterator.set_state(position.data)
  if session.out is not None:
    session.out.go_on_after(position.total)
  paths = list(optim.flatten(trained_shapes))
  recorder = Recorder(session.out, name, position.start, steps, paths, jax.jit(rate), checkpoints)

  def save() -> None:
    recorder.settle()  # no state is saved before its step is known to be finite and written down
    if session.out is not None:
      session.out.flush()
    position.data = iterator.get_state()
    epoch = position.step // plan.steps_per_epoch
    record = {'position': dataclasses.asdict(position), 'epoch': epoch, 'seed': seed, 'config': config}
    best = position.total if position.best_step < 0 else position.best_step
    kept = {'params': optim.merge(state['trained'], frozen), 'optimizer': state['optimizer']}
    checkpoints.save(position.total, kept, record, best)

  # -------------------------------------------------------------------------------------------------- Loop
  saved_step = -1 if found is None else position.step
  while True:
    boundary = position.step % validate_every == 0 or position.step >= steps
    if boundary and position.validated < position.step:
      recorder.settle()
      values = None
      with contextlib.suppress(Interrupted), stop.at_once():
        values, _ = result.evaluated(session, model, optim.merge(state['trained'], frozen), 'valid')
      if values is not None:
        recorder.validated(position.step, values)
        position.judge(values['loss'], stage['checkpoint'] == 'last')
        save()
        saved_step = position.step
    if stop.requested(position.total):
      if saved_step != position.step:
        save()
      checkpoints.wait()
      recorder.close()
      place = checkpoints.path(position.total)
      writer.say(f'stopped, and saved in {place}; the same command goes on from there')
      raise Stopped(stop.number)
    if position.step >= steps or 0 < options['patience'] <= position.worse:
      break
    if 0 < position.step != saved_step and position.step % config['checkpoint']['every'] == 0:
      save()
      saved_step = position.step
    batch = sharding.global_batch(answers.beside(next(iterator), known), batch_sharding)
    state, metrics = take_step(state, frozen, teacher_params, batch, np.int32(seed), np.int32(position.total))
    position.step += 1
    recorder.push(position.step, metrics, batch['ids'].shape)  # reads the step before, while this one runs

  # -------------------------------------------------------------------------------------------------- End
  recorder.close()
  checkpoints.close()
  outcome = Done(position.total, position.best_step, position.best_loss, spec, {})
  best = functools.cache(functools.partial(best_params, session, name, outcome))
  outcome.fields = stages.finish(spec, validation(session, model, best))
  record = dataclasses.asdict(outcome)
  sharding.on_first(lambda: workdir.write_json(folder / 'stages' / f'{name}.json', record))
  return outcome


def make_step(
  objective: stages.Objective,
  model: Classifier,
  optimizer: optax.GradientTransformation,
  teacher_model: Classifier | None,
  accumulate: int,
  out_shardings: Any,
) -> Callable:
  """step(state, frozen, teacher_params, batch, seed, number) -> (state, metrics), compiled once a bucket.

  state: {'trained', 'optimizer'}, donated. number: of the step in the run. metrics: scalars, and
  'squares' [leaves], the sum of squares of each trained tensor's gradient: one pass gives their norm and
  tells which one is not finite.
  """
  apply = stages.forward(model)
  teach = None if teacher_model is None else stages.forward(teacher_model)

  def loss_of(trained, frozen, teacher_params, batch, key):
    teacher: Callable | None = None if answers.given(batch) is None else answers.given
    if teach is not None:
      teacher = lambda batch: jax.lax.stop_gradient(teach(teacher_params, batch))  # noqa: E731
    return objective(apply, optim.merge(trained, frozen), batch, key, teacher)

  def step(state, frozen, teacher_params, batch, seed, number):
    key = jax.random.fold_in(jax.random.key(seed, impl=PRNG), number)

    def gradient(batch, key):
      grad = jax.value_and_grad(loss_of, has_aux=True)
      return grad(state['trained'], frozen, teacher_params, batch, key)

    (loss, metrics), grads = accumulated(gradient, batch, key, accumulate)
    updates, moments = optimizer.update(grads, state['optimizer'], state['trained'])
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in optim.flatten(grads).values()])
    metrics = {'loss': loss, **metrics, 'grad_norm': jnp.sqrt(squares.sum()), 'squares': squares}
    metrics['examples'] = batch['weight'].sum()
    return {'trained': optax.apply_updates(state['trained'], updates), 'optimizer': moments}, metrics

  return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def accumulated(gradient: Callable, batch: Mapping[str, jax.Array], key: jax.Array, parts: int) -> Any:
  """`gradient(batch, key)` as of the whole batch, computed in `parts`; each counts by its share of the labels."""
  if parts == 1:
    return gradient(batch, key)
  # Every parts-th row: the rows of a part then lie on the same devices as before.
  cut = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
  total = jnp.maximum(tasks.label_weight(batch).sum(), 1e-6)

  def add(sums, part):
    part, number = part
    share = tasks.label_weight(part).sum() / total
    found = gradient(part, jax.random.fold_in(key, number))
    return jax.tree.map(lambda a, b: a + share * b, sums, found), None

  first = {name: x[0] for name, x in cut.items()}
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first, key))
  return jax.lax.scan(add, zeros, (cut, jnp.arange(parts)))[0]


def initial_params(
  session: Session,
  stage: Mapping[str, Any],
  spec: Mapping[str, Any],
  model: Classifier,
  done: Mapping[str, Done],
) -> Any:
  """What a stage starts from, on the host: a fresh model with the weights of `init` in it, and of `init_reducer`."""
  weights, init, own = session.weights, stage['init'], stage['init_reducer']

  def of_stage(name):
    return sharding.to_host(best_params(session, name, done[name]), session.mesh)

  if init == 'pretrained':
    source, origin = weights.params, weights.source
  elif init in done:
    source, origin = of_stage(init), f'stage {init!r}'
  else:
    task = session.config['task']
    source = initial.from_run(
      init, weights.config, session.dataset.labels, task['readout'], task['head'], spec
    )
    origin = init
  if own:
    other = of_stage(own) if own in done else initial.in_chain(initial.exported(own, weights.config), spec)
    source, origin = {**source, 'reducer': other.get('reducer', {})}, f'{origin} and {own}'
  return initial.graft(model, jax.random.key(session.config['seed'], impl=PRNG), source, origin)


def teacher_of(session: Session, teacher: str, done: Mapping[str, Done]) -> tuple[Classifier | None, Any]:
  """(model, parameters) of a stage's teacher. Raises UserError where it answers with other labels."""
  if not teacher:
    return None, None
  if teacher in done:
    return make_model(session, done[teacher].reducer), best_params(session, teacher, done[teacher])
  found = initial.teacher(teacher, session.weights.config, session.dataset.labels)
  places = sharding.state_shardings(session.mesh, found.params)
  task = {**session.config['task'], 'readout': found.readout, 'head': found.head}  # its own
  model = classifier({**session.config, 'task': task}, session.weights, found.reducer_spec, len(found.labels))
  return model, sharding.put(found.params, places)


def best_params(session: Session, name: str, stage: Done) -> Any:
  """The parameters of a finished stage's best checkpoint. Raises UserError where its files are damaged."""
  model = make_model(session, stage.reducer)
  like = {'params': initial.param_shapes(model)}
  like = sharding.placed(like, sharding.state_shardings(session.mesh, like))
  with contextlib.closing(Checkpoints(session.folder / 'checkpoints' / name)) as checkpoints:
    try:
      return checkpoints.load(stage.best_step, like)[0]['params']
    except Damaged as damage:
      record = session.folder / 'stages' / f'{name}.json'
      raise UserError(
        f'{checkpoints.path(stage.best_step)} is damaged: {damage}. Remove {record} and that folder: the same command '
        'then goes on from the newest checkpoint that is left of the stage.'
      ) from damage


def validation(session: Session, model: Classifier, params: Callable[[], Any]) -> costs.Validation:
  """The validation split, as a method's `finish` sees it; params() is asked for at its first forward pass."""
  place = sharding.batch_sharding(session.mesh)
  # What a capacity is too small for is counted too.
  forward, cost = stages.programs(model.clone(executor='mask'))
  plan = batches(session, 'valid', session.config['eval']['batch_size'])
  return costs.Validation(
    lambda batch: forward(params(), batch),
    lambda: (sharding.global_batch(batch, place) for batch in plan.iterator(0)),
    lambda: sharding.to_host(params().get('reducer', {}), session.mesh),
    model.config,
    lambda batch: cost(params(), batch),
  )
