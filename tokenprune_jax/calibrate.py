"""Sets a trained model to a budget, a time or an accuracy, on the validation split of its run, without training.

    python -m tokenprune_jax.calibrate --run=runs/mine --macs=0.3      # 30% of the dense multiply-adds
    python -m tokenprune_jax.calibrate --run=runs/mine --time=0.3      # 30% of the time that dense takes on this machine
    python -m tokenprune_jax.calibrate --run=runs/mine --loss=0.5      # the cheapest that loses at most half a point
    python -m tokenprune_jax.calibrate --run=runs/mine --accuracy=93   # the cheapest with at least 93%
    python -m tokenprune_jax.calibrate --run=runs/mine --setting=threshold=0.3   # what that does, whatever it is

Writes the model with its new settings into RUN/calibrated (or --out), for `tokenprune_jax.load`; the run itself is left
alone. `--time` measures: the dense model in batches by length and this one as its run is executed (by `serve`, where that
only masks), in turns on the same documents; keep the machine idle. `--loss` counts points of accuracy against the same
model where the method that is set removes nothing (in a chain the others go on as trained), not against the dense run that
it began from: that one's accuracy can be asked for by `--accuracy`. Of a tagger whose tags mark spans, accuracy is the F1 of
spans. What can be set is what the method has one number for: see `at_budget` in its file.

`--with FIELD=VALUE` first changes what needs no training in the method: of a tagger `--with window=1 --with
transitions=both`, in a chain `--with ltp.first_layer=True`.

With `--batch=16` a method whose examples, or words, exit by themselves also gets capacities that batches of 16 or more share:
its savings then show in one compiled program, by the executor `compact`, and not under `serve` alone.
"""

import argparse
import ast
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import (
  compile_cache,
  costs,
  data,
  evaluate,
  initial,
  models,
  pretrained,
  specs,
  stages,
  tasks,
  timing,
  workdir,
  writer,
)
from tokenprune_jax.errors import UserError

GRID = tuple(np.round(np.arange(0.1, 1.0, 0.05), 2).tolist())  # budgets that an accuracy is looked for at
BATCH = 32
TIMED_BATCHES = 8
TRIES = 5  # settings that are timed before the nearest is taken
NEAR = 0.02  # of dense's time


class Setting(NamedTuple):
  """A reducer's spec and what it does to the validation split: accuracy or F1 of spans, and MACs as a share of dense's."""

  spec: Mapping[str, Any]
  accuracy: float
  mac_ratio: float
  metric: str = 'accuracy'
  time_ratio: float | None = None  # seconds an example, as a share of dense's; None: not timed


@functools.lru_cache(maxsize=8)
def compiled(model: models.Classifier) -> tuple[Callable, Callable]:
  """The forward pass, and what it costs, under jit: compiled once a setting and bucket, however many budgets are tried."""
  return stages.programs(model)


class Calibration:
  """A finished run's model, and the splits that it was validated and tested on.

  limit: documents, or sentences, of the validation split that settings are found on, at random; 0: all. changes: of the
  run's data settings.
  """

  def __init__(self, run: str | pathlib.Path, limit: int = 0, **changes: Any):
    self.folder, self.limit = pathlib.Path(run), limit
    if not (self.folder / 'model').is_dir():
      raise UserError(f'{self.folder} is no workdir of a finished run: there is no model/ in it')
    config = workdir.read_json(self.folder / 'config.json')
    if config is None:
      raise UserError(f'{self.folder} is no workdir of a finished run: there is no config.json in it')
    self.data, self.seed = {**config['data'], **changes}, config['seed']
    self.executor = 'serve' if config['model']['executor'] == 'mask' else config['model']['executor']
    self.task = tasks.make(config['task']['name'], config['task'].get('constrained', False))
    if limit and self.task.name == 'tag':  # whole sentences, for spans
      self.limit, self.data['valid_limit'] = 0, min(limit, self.data['valid_limit'] or limit)
    self.same_data = self.data == config['data']
    self.exported = pretrained.load_exported(self.folder / 'model')
    self.wanted = self.exported.reducer_spec  # before it is set
    self.known: list[Mapping[str, Any]] = [self.exported.reducer_spec]
    self.params = jax.device_put(self.exported.params)
    longest = self.data['max_length']
    self.buckets = (*(slots for slots in self.data['buckets'] if slots < longest), longest)

  @functools.cached_property
  def splits(self) -> Mapping[str, data.Split]:
    """Read when first asked for."""
    tokenizer, length = self.exported.tokenizer, self.data['max_length']
    found = data.LOADERS[self.task.name](self.data, tokenizer, length, data.cache_dir(), seed=self.seed)
    if tuple(found.labels) != tuple(self.exported.labels):
      raise UserError(
        f'the data of {self.folder} have the labels {", ".join(found.labels)} now; its model has '
        f'{", ".join(self.exported.labels)}. Put the files back that it was trained on.'
      )
    if self.same_data:
      workdir.refuse_data(self.folder, found.identity())
    return found.splits

  @functools.cached_property
  def sample(self) -> data.Split:
    """What settings are found on. Drawn before it is batched: a few batches hold a few lengths, and costs go by these."""
    valid = self.splits['valid']
    if not 0 < self.limit < len(valid):
      return valid
    return valid.at(np.sort(np.random.default_rng(0).permutation(len(valid))[: self.limit]))

  def model(self, spec: Mapping[str, Any]) -> models.Classifier:
    """The classifier with a method, by the executor `mask`."""
    e = self.exported
    return models.Classifier(e.config, models.make_reducer(spec), len(e.labels), e.readout, e.head).check()

  def program(self, spec: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, float]]:
    """(spec, controls) that do the same by the executor `mask`: a spec that was asked for before, where one can."""
    for known in self.known:
      found = specs.by_controls(spec, known)
      if found[0] is known:
        return found
    self.known.append(spec)
    return spec, {}

  def batches(self) -> data.BatchPlan:
    """The sample by length."""
    return data.batches(
      self.sample, batch_size=BATCH, buckets=self.buckets, seed=0, epoch_shuffle=False,
      pad_id=self.exported.config.pad_id,
    )  # fmt: skip

  def validation(self, spec: Mapping[str, Any], params: Any = None) -> costs.Validation:
    """The sample of the validation split under a method; params: in place of the run's own."""
    params = self.params if params is None else params
    forward, cost = compiled(self.model(spec))
    plan = self.batches()
    return costs.Validation(
      lambda batch: forward(params, batch),
      lambda: (jax.device_put(plan.batch(step)) for step in range(plan.steps_per_epoch)),
      lambda: params.get('reducer', {}),
      self.exported.config,
      lambda batch: cost(params, batch),
    )

  def measured(self, spec: Mapping[str, Any]) -> Setting:
    """What a setting does."""
    words, found = self.sample.words, []
    known, controls = self.program(spec)
    for output, batch in self.validation(known).controlled(controls):
      own = {name: getattr(output, name) for name in ('logits', 'macs', 'dense_macs')}
      result = jax.device_get({**own, **{name: batch[name] for name in ('index', 'label', 'weight')}})
      found.append(result if words is None else evaluate.words_alone(result))
    rows = evaluate.in_order(found)
    logits, label = (
      rows[name] if words is None else np.concatenate(rows[name]) for name in ('logits', 'label')
    )
    scores = self.task.scores(logits, label, words)
    metric = 'f1' if words is not None and 'f1' in scores else 'accuracy'
    ratio = rows['macs'].sum(dtype=np.float64) / rows['dense_macs'].sum(dtype=np.float64)
    return Setting(spec, float(scores[metric]), float(ratio), metric)

  def change(self, given: Sequence[str]) -> None:
    """From here on settings are of the method with other fields: 'FIELD=VALUE', of a chain's member 'METHOD.FIELD=VALUE'.

    Raises UserError where it has no such field or cannot have that value, or where its parameters would have to be others.
    """
    spec, names = self.wanted, specs.names(self.wanted)
    for text in given:
      place, _, value = text.partition('=')
      method, _, field = place.rpartition('.')
      method = method or names[0]
      if field in ('', 'name') or not value or method not in names or method == 'chain':
        chained = f'METHOD.FIELD=VALUE, a method being one of {", ".join(names[1:])}'
        raise UserError(f'--with is {text!r}; expected {"FIELD=VALUE" if len(names) == 1 else chained}')
      spec = specs.with_handed_on(spec, {method: {field: literal(value)}})
    spec = specs.labelled(spec, self.exported.labels, self.splits['valid'].words)
    remedy = f'{self.folder} has not learned that: choose what needs no training'
    initial.check_reducer(self.model(spec), self.params, f'--with {" --with ".join(given)}', remedy)
    self.wanted, self.known = spec, [spec]

  def share(self, size: int, overflow_rate: float) -> None:
    """From here on settings have capacities that batches of `size` share, and are timed by `compact`.

    Raises UserError where the method has none.
    """
    self.wanted, self.executor = specs.sharing(self.wanted, size, overflow_rate), 'compact'

  def at(self, budget: float) -> Setting:
    """The setting that costs `budget`. Raises UserError where none is that cheap."""
    return self.measured(stages.at_budget(self.wanted, budget, self.validation(self.wanted)))

  def whole(self) -> Setting:
    """The setting at which the method that a budget sets does nothing. Raises UserError where there is no such method."""
    _, member = stages.settable(self.wanted)
    file = specs.module(member['name'])
    if not hasattr(file, 'idle'):
      return self.at(1.0)
    idle = file.idle(member)
    fields = {field: idle[control] for field, control in file.CONTROLS.items() if control in idle}
    return self.measured(specs.with_handed_on(self.wanted, {member['name']: fields}))

  def with_setting(self, text: str) -> Setting:
    """What NAME=NUMBER does, which a request could set too. Raises UserError where the method has none of that name."""
    name, _, value = text.partition('=')
    _, member = stages.settable(self.wanted)
    known = getattr(specs.module(member['name']), 'CONTROLS', {})
    if name not in known or not is_number(value):
      raise UserError(
        f'the setting is {text!r}; expected NAME=NUMBER, and of {member["name"]} one of {", ".join(known) or "none"}'
      )
    kind = type(getattr(specs.module(member['name']).Method, name))
    return self.measured(specs.with_handed_on(self.wanted, {member['name']: {name: kind(float(value))}}))

  def time_of(self, spec: Mapping[str, Any]) -> float:
    """Seconds an example as a share of dense's, on some of the sample's batches, in turns."""
    plan = self.batches()
    every = max(plan.steps_per_epoch // TIMED_BATCHES, 1)
    some = [plan.batch(step) for step in range(0, plan.steps_per_epoch, every)]
    own = self.model(spec).clone(executor=self.executor)
    pair = {'dense': (self.model({'name': 'none'}), self.params), 'model': (own, self.params)}
    served = ('model',) if self.executor == 'serve' else ()
    return 1 / timing.beside_dense(pair, some, served=served)['models']['model']['time_ratio']

  def in_time(self, share: float) -> Setting:
    """The dearest setting tried that takes at most `share` of dense's time, give or take NEAR.

    Time follows multiply-adds nearly in proportion: each try moves the budget by what the last one was off, and between
    one that is refused and the cheapest that was not. Raises UserError where the share is not above 0 and at most 1, or no
    try is that fast, naming the fastest.
    """
    if not 0 < share <= 1:
      raise UserError(f"the time is {share}; it is a share of the dense model's, above 0 and at most 1")
    found: list[tuple[float, Setting]] = []
    tried: list[float] = []
    budget, floor, refused = share, 0.0, ''
    for _ in range(TRIES):
      if budget <= floor:
        budget = (floor + min(tried)) / 2
      try:
        setting = self.at(budget)
      except UserError as error:
        if not found:
          raise
        floor, refused = budget, f' ({error})'
        continue
      tried.append(budget)
      took = self.time_of(setting.spec)
      found.append((took, setting._replace(time_ratio=took)))
      tell(found[-1][1])
      if abs(took - share) <= NEAR or (took < share and budget == 1):
        break
      budget = min(budget * share / took, 1.0)
    fast = [setting for took, setting in found if took <= share + NEAR]
    if not fast:
      took, best = min(found, key=lambda pair: pair[0])
      raise UserError(
        f'no setting was found that takes {share:.2f} of the time of dense; the fastest that was tried takes '
        f'{took:.2f}, at {best.mac_ratio:.2f} of the multiply-adds{refused}'
      )
    return max(fast, key=lambda setting: setting.mac_ratio)

  def cheapest(self, accuracy: float) -> Setting:
    """The cheapest setting on the grid with at least this accuracy, a share, found by halving: what costs more is as good.

    Where that finds none, the whole grid is tried. Raises UserError where all of it falls short, naming the best.
    """
    if not 0 < accuracy <= 1:
      raise UserError(
        f'the accuracy to reach is {100 * accuracy:g}%; expected a number above 0 and at most 100'
      )
    budgets = (*GRID, 1.0)
    found: dict[int, Setting] = {}
    refused: UserError | None = None

    def good(place: int) -> bool:
      nonlocal refused
      try:
        setting = self.at(budgets[place])
      except UserError as error:
        refused = error  # nothing is that cheap
        return False
      tell(setting)
      found[place] = setting
      return setting.accuracy >= accuracy - 1e-9

    low, high = 0, len(budgets)
    while low < high:
      middle = (low + high) // 2
      low, high = (low, middle) if good(middle) else (middle + 1, high)
    if high == len(budgets):  # not even the dearest; less may be better
      high = next((place for place in range(len(budgets)) if place not in found and good(place)), high)
    if high < len(budgets):
      return found[high]
    if refused and not found:
      raise refused
    best = max(found.values(), key=lambda setting: setting.accuracy)
    raise UserError(
      f'no setting reaches {accuracy:.1%} {best.metric} on the validation split; the best there is {best.accuracy:.1%}, at '
      f'{best.mac_ratio:.2f} of the dense multiply-adds'
    )

  def export(self, setting: Setting, folder: pathlib.Path) -> None:
    """The model with a setting, as `pretrained.export` writes one."""
    e = self.exported
    pretrained.export(
      folder, e.config, e.params, e.tokenizer, e.labels, readout=e.readout, head=e.head, reducer_spec=setting.spec,
      max_length=e.max_length, constrained=e.constrained,
    )  # fmt: skip


def literal(text: str) -> Any:
  """A number, truth value, or list as Python writes it; anything else as it stands."""
  try:
    return ast.literal_eval(text)
  except (SyntaxError, TypeError, ValueError):
    return text


def is_number(text: str) -> bool:
  """Whether it reads as a finite number."""
  try:
    return bool(np.isfinite(float(text)))
  except ValueError:
    return False


def tell(setting: Setting) -> None:
  """One line about a setting."""
  time = '' if setting.time_ratio is None else f'  time {setting.time_ratio:.3f} of dense'
  writer.say(f'MACs {setting.mac_ratio:.3f}{time}  {setting.metric} {setting.accuracy:.2%}')


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit status: 0 done, 2 wrong input or an accuracy out of reach."""
  parser = argparse.ArgumentParser(
    prog='python -m tokenprune_jax.calibrate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--run', required=True, help='workdir of a finished run')
  goal = parser.add_mutually_exclusive_group(required=True)
  goal.add_argument('--macs', type=float, help="share of the dense model's multiply-adds")
  goal.add_argument('--time', type=float, help='share of the time that the dense model takes on this machine')
  goal.add_argument(
    '--loss', type=float, help='points of accuracy (of F1, where spans are tagged) that may be lost'
  )
  goal.add_argument('--accuracy', type=float, help='percent that are to be right')
  goal.add_argument('--setting', help="NAME=NUMBER, one of the method's own settings, as it is")
  parser.add_argument('--documents', type=int, default=0, help='of the validation split; 0: all')
  parser.add_argument(
    '--with',
    action='append',
    default=[],
    dest='changes',
    metavar='FIELD=VALUE',
    help='of the method, first of all',
  )
  parser.add_argument(
    '--batch', type=int, default=0, help='examples, or more, that share capacities; 0: as the run has it'
  )
  parser.add_argument(
    '--overflow', type=float, default=0.25, help='share of such batches that these may be too small for'
  )
  parser.add_argument('--out', default='', help='folder of the new model; RUN/calibrated where none is named')
  options = parser.parse_args(arguments)
  compile_cache.turn_on()
  try:
    if options.documents < 0:
      raise UserError(f'--documents is {options.documents}; expected a number of documents, or 0 for all')
    calibration = Calibration(options.run, options.documents)
    if options.changes:
      calibration.change(options.changes)
    if options.batch:
      calibration.share(options.batch, options.overflow)
    if options.macs is not None:
      setting = calibration.at(options.macs)
    elif options.time is not None:
      setting = calibration.in_time(options.time)
    elif options.setting is not None:
      setting = calibration.with_setting(options.setting)
    elif options.loss is not None:
      whole = calibration.whole()
      writer.say(f'nothing removed: {whole.metric} {whole.accuracy:.2%}')
      setting = calibration.cheapest(whole.accuracy - options.loss / 100)
    else:
      setting = calibration.cheapest(options.accuracy / 100)
    out = pathlib.Path(options.out or pathlib.Path(options.run) / 'calibrated')
    with workdir.storage_errors(out):
      calibration.export(setting, out)
  except UserError as error:
    writer.say(f'error: {error}')
    return 2
  tell(setting)
  writer.say(f'written to {out}: {json.dumps(setting.spec)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
