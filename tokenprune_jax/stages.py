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

fields: the method's spec as the stage was trained. `apply(params, batch, rng)` is one forward pass
(`models.Output`), with dropout and noise where rng is not None; an objective may call it several times.
`teacher(batch)` is the forward pass of the stage's teacher, without gradient; None without a teacher. Losses
and metrics are means over the batch's rows by `batch['weight']`. There for every method: `default` (the task's loss),
`distil` (half of it, half a teacher's answers) and `distil_states` (that, and what the teacher's head reads).
"""

import importlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import reducers
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import Classifier, Output, whole_spec
from tokenprune_jax.tasks import Task, apart, label_weight, softened, weighted_mean

CAPACITIES = (
  'capacities',
  'capacity_batch',
  'batch_capacities',
  'overflow_rate',
)  # fields that `mask` does not read
SPANS = 8  # of lengths, at most, that batches may need capacities of their own in
SPAN_BATCHES = 8  # that there are of a span, at least: from fewer it would be known by chance
DISTILLATIONS = ('distil', 'distil_states')  # objectives that ask a teacher for its answers alone: `answers`

Apply = Callable[..., Output]  # (params, batch, rng=None)
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]  # (apply, params, batch, rng, teacher)


class Cost(NamedTuple):
  """What each example of a batch costs: multiply-adds [b], and tokens by layer [b L] as `encoder.Trace` counts them."""

  macs: jax.Array
  dense_macs: jax.Array
  keys: jax.Array
  widest: jax.Array
  queries: jax.Array
  rows: jax.Array


def cost_of(output: Output) -> Cost:
  """Without the answers. Under jit, what they alone need is not computed: of a plan made beforehand, all of the encoder."""
  trace = output.trace
  return Cost(output.macs, output.dense_macs, trace.keys, trace.widest, trace.queries, trace.rows)


def programs(model: Classifier) -> tuple[Callable[..., Output], Callable[..., Cost]]:
  """(forward pass, what it costs) of (params, batch), each under jit and compiled when first called."""
  apply = forward(model)
  return jax.jit(apply), jax.jit(lambda params, batch: cost_of(apply(params, batch)))


class Validation(NamedTuple):
  """What `finish` may look at: a forward pass of the trained model (jitted, no dropout) and the validation batches."""

  apply: Callable[..., Output]  # (batch)
  batches: Callable[[], Iterable[dict[str, jax.Array]]]
  reducer: Callable[[], Any] = dict  # () -> the trained parameters of the method that asks
  encoder: Any = None  # its `EncoderConfig`
  cost: Callable[..., Cost] | None = None  # (batch), where that is to be had for less than `apply`
  held: Mapping[str, float] = {}  # controls of all passes, but where a caller says otherwise

  def of(self, path: Sequence[str]) -> 'Validation':
    """As the method sees it whose parameters lie at `path` under the reducer's."""
    return self._replace(reducer=lambda: at(self.reducer(), path))

  def lengths(self) -> np.ndarray:
    """Real tokens of every example [N]."""
    found = [jax.device_get((batch['mask'].sum(-1), batch['weight'])) for batch in self.batches()]
    return np.concatenate([count[weight > 0] for count, weight in found])

  def controlled(self, controls: Mapping[str, float]) -> Iterator[tuple[Output, dict[str, jax.Array]]]:
    """(output, batch) of every batch, all examples with the same controls."""
    for batch in self.batches():
      yield self.apply(with_controls(batch, {**self.held, **controls})), batch

  def costs(self, controls: Mapping[str, float]) -> Iterator[tuple[Cost, dict[str, Any]]]:
    """(cost of the real examples, batch) of every batch, all with the same controls; on the host."""
    cost = self.cost or (lambda batch: cost_of(self.apply(batch)))
    for batch in self.batches():
      given = with_controls(batch, {**self.held, **controls})
      found, weight = jax.device_get((cost(given), batch['weight']))
      yield Cost(*(values[weight > 0] for values in found)), batch

  def mac_ratio(self, controls: Mapping[str, float]) -> float:
    """Multiply-adds of the split as a share of dense's."""
    total = np.zeros(2)
    for cost, _ in self.costs(controls):
      total += [cost.macs.sum(), cost.dense_macs.sum()]
    return float(total[0] / total[1])

  def capacities(
    self,
    column: Callable[[Cost], jax.Array],
    overflow_rate: float,
    controls: Mapping[str, float] | None = None,
  ) -> tuple[float, ...]:
    """By layer, the share of the padded length that holds all but `overflow_rate` of the examples.

    column: the counts [b L] that a capacity must hold.
    """
    shares = [column(cost) / batch['ids'].shape[1] for cost, batch in self.costs(controls or {})]
    found = np.quantile(np.concatenate(shares), 1 - overflow_rate, axis=0, method='higher')
    return tuple(np.clip(found, 1e-6, 1.0).tolist())

  def calibrated(
    self,
    fields: Mapping[str, Any],
    column: Callable[[Cost], jax.Array],
    controls: Mapping[str, float] | None = None,
  ) -> dict[str, Any]:
    """{'capacities': as above} where a method's `overflow_rate` asks for them; else nothing.

    With its `capacity_batch`: {'batch_capacities': as below}.
    """
    rate, size = fields.get('overflow_rate', 0.0), fields.get('capacity_batch', 0)
    if rate and size:
      return {'batch_capacities': self.batch_capacities(size, rate, controls)}
    return {'capacities': self.capacities(column, rate, controls)} if rate else {}

  def batch_capacities(
    self, size: int, overflow_rate: float, controls: Mapping[str, float] | None = None
  ) -> tuple[tuple[int, int, tuple[float, ...], tuple[float, ...]], ...]:
    """Entries (examples, length, shares by layer, shares by layer): what batches up to a length need together.

    Of the batch's slots: states that are updated; and of its examples: those in which any is. They hold what all but
    `overflow_rate` of the batches of an entry need (those longer than the entry before), when examples are batched with
    their neighbours in length. For batches of `size` examples, twice as many and so on, as far as the split tells: the
    larger a batch, the nearer it is to the mean.
    """
    found = [
      (batch['mask'].sum(-1)[batch['weight'] > 0], cost.queries) for cost, batch in self.costs(controls or {})
    ]
    lengths, rows = (np.concatenate(parts) for parts in zip(*jax.device_get(found)))
    order = np.argsort(lengths, kind='stable')
    counts = np.stack([rows, rows > 0], axis=1)[order]  # [N 2 L]
    total = np.cumsum(np.pad(counts.astype(np.float64), ((1, 0), (0, 0), (0, 0))), axis=0)
    sizes = [min(size, len(order))]
    while 2 * sizes[-1] <= len(order) / max(SPAN_BATCHES, 1):
      sizes.append(2 * sizes[-1])
    return tuple(entry for size in sizes for entry in shared_by(size, lengths[order], total, overflow_rate))


def shared_by(
  size: int, lengths: np.ndarray, total: np.ndarray, overflow_rate: float
) -> Iterator[tuple[int, int, tuple[float, ...], tuple[float, ...]]]:
  """The entries of `Validation.batch_capacities` for batches of `size` examples.

  lengths [N]: of the examples, in order; total [N+1 2 L]: slots, and examples, that the first of them need together.
  """
  widest = lengths[size - 1 :]  # of every run of `size` neighbours
  whole = size * np.stack([widest, np.ones_like(widest)], axis=1)
  needs = (total[size:] - total[:-size]) / whole[..., None]
  spans = min(max(int(len(lengths) / (SPAN_BATCHES * size)), 1), SPANS)
  bounds = np.unique([part[-1] for part in np.array_split(widest, spans)]).tolist()
  for shorter, bound in zip([0, *bounds], bounds):
    span = needs[(widest > shorter) & (widest <= bound)]
    shares = np.quantile(span, 1 - overflow_rate, axis=0, method='higher')
    slots, examples = np.clip(shares, 1e-6, 1.0).tolist()
    yield size, int(bound), tuple(slots), tuple(examples)


def with_controls(batch: Mapping[str, Any], controls: Mapping[str, float]) -> dict[str, Any]:
  """The batch with the same controls for all of its examples."""
  values = {name: np.full(len(batch['ids']), value, np.float32) for name, value in controls.items()}
  return {**batch, 'controls': values}


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
      fields[member['name']] = end(member, validation.of(path)._replace(held=held))
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
  able = [(path, member) for path, member in placed(spec) if hasattr(module(member['name']), 'at_budget')]
  if not able:
    raise UserError(f'{spec["name"]} cannot be set by a budget: it has no setting for its cost')
  path, member = able[-1]
  found = module(member['name']).at_budget(member, target, validation.of(path))
  return with_handed_on(spec, {member['name']: found})


def sharing(spec: Mapping[str, Any], size: int, overflow_rate: float) -> dict[str, Any]:
  """`spec` where batches of `size` examples or more share capacities, which setting it to a budget then finds.

  Raises UserError where no member's examples stop in numbers of their own.
  """
  able = sharers(spec)
  if not able:
    raise UserError(
      f'{spec["name"]} has no capacities that a batch could share: its examples do not stop by themselves'
    )
  fields = {'capacity_batch': size, 'overflow_rate': overflow_rate}
  return with_handed_on(spec, {able[-1]: fields})


def sharers(spec: Mapping[str, Any]) -> list[str]:
  """The methods of a spec whose examples stop by themselves, so that a batch can share capacities."""
  return [name for name in names(spec) if hasattr(module(name).Method, 'capacity_batch')]


def by_controls(
  spec: Mapping[str, Any], known: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, float]]:
  """(a spec, controls at which its program does what `spec` says): that of `known`, whose program is compiled already.

  (spec, {}) where the two differ in more than controls, or two members of a chain read the same one. For the executor
  `mask`, which does not read capacities.
  """
  ours, others = members(whole_spec(spec)), members(whole_spec(known))
  if [own['name'] for own in ours] != [other['name'] for other in others]:
    return spec, {}
  controls: dict[str, float] = {}
  for own, theirs in zip(ours, others):
    names = getattr(module(own['name']), 'CONTROLS', {})
    changed = {field for field in own if field != 'reducers' and own[field] != theirs[field]}
    if changed - {*names, *CAPACITIES} or set(controls) & set(names.values()):
      return spec, {}
    controls |= {control: own[field] for field, control in names.items()}
  return known, controls


def module(name: str) -> ModuleType:
  """The file of a method."""
  return importlib.import_module(f'{reducers.__name__}.{name}')


def placed(
  spec: Mapping[str, Any], path: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
  """(where its parameters lie, spec) of a reducer and, in a chain, of its members."""
  inside = enumerate(spec.get('reducers', ()))
  return [
    (path, spec),
    *(found for i, member in inside for found in placed(member, (*path, f'reducers_{i}'))),
  ]


def at(params: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
  """A part of a parameter tree; empty where there is none."""
  for name in path:
    params = params.get(name, {})
  return params


def members(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """A reducer's spec and, in a chain, those of its members."""
  return [member for _, member in placed(spec)]


def names(spec: Mapping[str, Any]) -> list[str]:
  """The methods of a reducer spec, a chain's members included."""
  return [member['name'] for member in members(spec)]


def with_fields(spec: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
  """`spec` with other fields: {field: value}, or {reducer: {field: value}} for members of a chain by name.

  Fields with a 'name' are a whole spec that takes the place of `spec`. Raises UserError for an unknown
  member.
  """
  if 'name' in fields:
    return dict(fields)
  if 'reducers' not in spec or 'reducers' in fields:
    return {**spec, **fields}
  members = [member['name'] for member in spec['reducers']]
  for name, value in fields.items():
    if name not in members or not isinstance(value, Mapping):
      raise UserError(
        f'stage reducer fields {name}={value!r}: config.reducer is a chain of {", ".join(members)}; '
        f"write {{'{members[0]}': {{field: value}}}}."
      )
  return {
    **spec,
    'reducers': tuple({**member, **fields.get(member['name'], {})} for member in spec['reducers']),
  }


def reducer_spec(
  spec: Mapping[str, Any], handed_on: Sequence[Mapping[str, Mapping[str, Any]]], stage: Mapping[str, Any]
) -> dict[str, Any]:
  """A stage's reducer: config.reducer, then what earlier stages handed on, then its own fields."""
  for fields in handed_on:
    spec = with_handed_on(spec, fields)
  return with_fields(spec, stage['reducer'])


def with_handed_on(spec: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """`spec` with what `finish` found."""
  for name in names(spec):
    if name in fields:
      spec = with_fields(spec, {name: fields[name]} if 'reducers' in spec else fields[name])
  return dict(spec)


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
