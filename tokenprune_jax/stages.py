"""Stages and objectives: what a run trains, from what, and for what.

A method brings its own in `reducers/NAME.py`, beside its module, as plain values:

  OBJECTIVES = {'soft': soft, …}      soft(apply, params, batch, rng, teacher) -> (loss, {name: scalar})
  TAUGHT = ('soft', …)                those of them that need a teacher
  def finish(fields, validation)      -> {field: value}: calibrated capacities, …, for later stages and for use
  def at_budget(fields, target, validation)  -> {field: value}: settings at which it costs `target`, a share of dense's
                                                multiply-adds; raises UserError where none is that cheap
  def expected(fields, depth)         -> {field: value}: stand-ins for what `finish` will hand on: later stages are
                                         checked with them before the first one runs
  CONTROLS = {'threshold': 'exit_threshold', …}     fields that a request's control takes the place of: {field: control}
  def idle(fields)                    -> {control: value} at which the method does nothing: so the members before it in a
                                         chain find their own budgets and capacities, which hold whoever leaves
  def inherits(fields)                -> regex of the method's parameters that a stage cannot start without; '': none
  MODE_ORDER = ('soft', 'hard')       the order in which stages may have it in these modes
  def least(fields, encoder, lengths) -> share of dense's multiply-adds that is left of texts of these lengths, whatever it
                                         removes: a `target_macs` below that is refused before the first stage
  def labelled(fields, labels, scheme) -> {field: value}: what it has to know of the labels' names, tags of that scheme ('' of
                                         texts); raises UserError where these do not suit it
  def check_length(fields, length)    raises UserError for texts of up to so many tokens that the method cannot read

fields: the method's spec as the stage was trained. `apply(params, batch, rng)` is one forward pass
(`models.Output`), with dropout and noise where rng is not None; an objective may call it several times.
`teacher(batch)` is the forward pass of the stage's teacher, without gradient; None without a teacher. Losses
and metrics are means over the batch's rows by `batch['weight']`. There for every method: `default` (the task's loss),
`distil` (half of it, half a teacher's answers) and `distil_states` (that, and what the teacher's head reads).
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tokenprune_jax import budget, writer
from tokenprune_jax.costs import Cost, Validation, cost_of
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier, Output
from tokenprune_jax.specs import members, module, names, placed, with_fields, with_handed_on
from tokenprune_jax.tasks import Task, apart, label_weight, softened, weighted_mean

DISTILLATIONS = ('distil', 'distil_states')  # objectives that ask a teacher for its answers alone: `answers`

Apply = Callable[..., Output]  # (params, batch, rng=None)
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (apply, params, batch, rng, teacher)


def programs(model: Classifier) -> tuple[Callable[..., Output], Callable[..., Cost]]:
  """(forward pass, what it costs) of (params, batch), each under jit and compiled when first called."""
  apply = forward(model)
  return jax.jit(apply), jax.jit(lambda params, batch: cost_of(apply(params, batch)))


def default_objective(task: Task) -> Objective:
  """One forward pass: the task's loss plus what the method adds to it."""

  def objective(apply, params, batch, rng, teacher):
    output = apply(params, batch, rng)
    loss = task.loss(output.logits, batch)
    return loss + output.loss, {'task_loss': loss, 'reducer_loss': output.loss}

  return objective


def distillation(task: Task, states: bool = False) -> Objective:
  """Half the teacher's softened answers, half the labels, plus what the method adds; for every method.

  states: plus how far apart the directions are of what the two heads read (`tasks.apart`).
  """

  def distil(apply, params, batch, rng, teacher):
    output, taught, weight = apply(params, batch, rng), teacher(batch), label_weight(batch)
    soft = weighted_mean(softened(taught.logits, output.logits), weight)
    loss = task.loss(output.logits, batch)
    said = {'task_loss': loss, 'distil_loss': soft, 'reducer_loss': output.loss}
    total = 0.5 * (soft + loss) + output.loss
    if states:
      said['states_loss'] = weighted_mean(apart(taught.read, output.read), weight)
      total += said['states_loss']
    return total, said

  return distil


def find_objective(stage: Mapping[str, Any], spec: Mapping[str, Any], task: Task) -> Objective:
  """The stage's objective: the default one, distillation, or one that a reducer of `spec` brings. Raises UserError."""
  if stage['objective'] == 'default':
    if stage['teacher']:
      raise UserError(
        f'stage {stage["name"]!r} names a teacher, but its objective is the default one, without any.'
      )
    return default_objective(task)
  brought = {name: distillation(task, states) for name, states in zip(DISTILLATIONS, (False, True))}
  taught = set(brought)
  for name in names(spec):
    brought |= getattr(module(name), 'OBJECTIVES', {})
    taught |= set(getattr(module(name), 'TAUGHT', ()))
  if stage['objective'] not in brought:
    known = ', '.join(['default', *brought])
    raise UserError(f"stage {stage['name']!r}: objective is '{stage['objective']}'; there is: {known}.")
  if stage['objective'] in taught and not stage['teacher']:
    raise UserError(
      f"stage {stage['name']!r}: the objective '{stage['objective']}' needs a teacher: name in the stage's `teacher` an "
      'earlier stage, or the workdir of a finished run, whose answers it is to learn from.'
    )
  return brought[stage['objective']]


def finish(spec: Mapping[str, Any], validation: Validation) -> dict[str, dict[str, Any]]:
  """{reducer: fields} that the stage's reducers hand on, each while those behind it in a chain do nothing."""
  fields, every = {}, placed(spec)
  for place, (path, member) in enumerate(every):
    end = getattr(module(member['name']), 'finish', None)
    if end is not None:
      held: dict[str, float] = {}
      for _, later in every[place + 1 :] if path else ():
        held |= getattr(module(later['name']), 'idle', lambda _: {})(later)
      own = validation.of(path)._replace(held=held)
      try:
        fields[member['name']] = end(member, own)
      except budget.Unreachable as error:  # what was trained is not lost for that
        writer.say(f'warning: {error} The model stays as it was trained.')
        fields[member['name']] = end({**member, 'target_macs': 0.0}, own)
  return fields


def expected(spec: Mapping[str, Any], depth: int) -> dict[str, dict[str, Any]]:
  """{reducer: fields} of the kind that a stage's reducers will hand on."""
  found = {}
  for member in members(spec):
    foretell = getattr(module(member['name']), 'expected', None)
    if foretell is not None:
      found[member['name']] = foretell(member, depth)
  return found


def at_budget(spec: Mapping[str, Any], target: float, validation: Validation) -> dict[str, Any]:
  """`spec` with settings at which it costs `target` of dense on validation, which is of the model as trained.

  In a chain the last member is set that can be. Raises UserError where none can, or where no setting is that cheap.
  """
  if not 0 < target <= 1:
    raise UserError(
      f'the budget is {target}; it is a share of the dense multiply-adds, above 0 and at most 1'
    )
  path, member = settable(spec)
  found = module(member['name']).at_budget(member, target, validation.of(path))
  return with_handed_on(spec, {member['name']: found})


def settable(spec: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
  """(where its parameters lie, spec) of what a budget sets: in a chain the last member that can be. Raises UserError."""
  able = [(path, member) for path, member in placed(spec) if hasattr(module(member['name']), 'at_budget')]
  if not able:
    raise UserError(f'{spec["name"]} cannot be set by a budget: it has no setting for its cost')
  return able[-1]


def reducer_spec(
  spec: Mapping[str, Any], handed_on: Sequence[Mapping[str, Mapping[str, Any]]], stage: Mapping[str, Any]
) -> dict[str, Any]:
  """A stage's reducer: config.reducer, then what earlier stages handed on, then its own fields."""
  for fields in handed_on:
    spec = with_handed_on(spec, fields)
  return with_fields(spec, stage['reducer'])


def check(stages: Sequence[Mapping[str, Any]]) -> None:
  """Raises UserError where a teacher is neither an earlier stage nor another run."""
  earlier: list[str] = []
  for stage in stages:
    teacher = stage['teacher']
    if teacher and teacher not in earlier and not pathlib.Path(teacher, 'model').is_dir():
      raise UserError(
        f"stage {stage['name']!r}: teacher is '{teacher}'; expected an earlier stage"
        f' ({", ".join(earlier) or "there is none"}), or the workdir of a finished run.'
      )
    earlier.append(stage['name'])


def forward(model: Classifier) -> Apply:
  """`apply(params, batch, rng)` of a model."""

  def apply(params, batch, rng=None):
    if rng is None:
      return model.apply({'params': params}, batch)
    dropout, reduce = jax.random.split(rng)
    return model.apply({'params': params}, batch, train=True, rngs={'dropout': dropout, 'reduce': reduce})

  return apply
