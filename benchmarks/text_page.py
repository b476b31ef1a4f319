"""Tables and plots of the studies of methods on texts, from their result files alone."""

import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import pictures, report, shared
from benchmarks.text_runs import (
  CORPORA,
  KEEP,
  LONG,
  METHODS,
  MIXES,
  PAPERS,
  TRAINED_AT,
  UNTRAINED,
  Plan,
  dense_row,
)
from tokenprune_jax import metrics

NOT_RUN = 'Not run yet.\n'
SHOWN = 15  # points below dense that a plot goes down to
APART = 0.01  # MACs of what was timed, from those of all, that are told

DENSE = 'dense'  # as a table calls it

Points = Sequence[Mapping[str, Any]]
Cost = Callable[[Points], float | None]


class Setting(NamedTuple):
  """A method as trained, or set to a budget, and its measured points of all seeds."""

  title: str
  budget: float | None
  points: list[dict[str, Any]]

  @property
  def asked(self) -> str:
    """What it was set to."""
    return 'as trained' if self.budget is None else f'{self.budget}'


def of(
  document: Mapping[str, Any], dataset: str, name: str, variant: str, budget: float | None
) -> list[dict[str, Any]]:
  """The measured points of all seeds."""
  wanted = dataset, name, variant, budget
  return [
    row for row in document['rows']
    if (row['dataset'], row['name'], row['variant'], row['budget']) == wanted and row['metrics']
  ]  # fmt: skip


def dense_points(document: Mapping[str, Any], dataset: str) -> list[dict[str, Any]]:
  """Those that all others are compared with."""
  return of(document, dataset, dense_row(dataset, 0).name, 'trained', None)


def settings(document: Mapping[str, Any], plan: Plan, dataset: str, name: str) -> Iterator[Setting]:
  """Those of a method that were measured: as trained, then the dearest first."""
  for budget in (None, *sorted(plan.budgets_of(name), reverse=True)):
    points = of(document, dataset, name, 'trained' if budget is None else 'set', budget)
    if points:
      yield Setting(METHODS[name].title, budget, points)


def best_on_validation(document: Mapping[str, Any], plan: Plan, dataset: str) -> str | None:
  """The method with the highest validation accuracy as trained, mean over seeds, of those that all seeds ran."""
  found = {
    name: np.mean([row['valid']['accuracy'] for row in points])
    for name in plan.methods(dataset)
    if len(points := of(document, dataset, name, 'trained', None)) == len(plan.seeds[dataset])
  }  # fmt: skip
  return max(found, key=lambda name: found[name]) if found else None


def line_of(points: Points, dense: Points) -> list[str]:
  """Seeds, accuracy, difference to dense, verdict, keep ratio, MACs and speed of some points."""
  gain: metrics.Difference | None = report.difference(points, dense) if points is not dense else None
  accuracies = report.mean_std([row['metrics']['accuracy'] for row in points])
  return [
    str(len(points)), report.percent(accuracies), report.points(gain and gain._asdict()),
    ('yes' if gain.no_worse else 'no') if gain else '–',
    *(report.number(report.mean([row[column] for row in points])) for column in ('keep_ratio', 'mac_ratio')),
    speed_cell(points),
  ]  # fmt: skip


def speed_of(points: Points) -> float | None:
  """Throughput, times that of dense; None where no time was taken."""
  return report.mean([row['time']['time_ratio'] for row in points if row.get('time')])


def speed_cell(points: Points) -> str:
  """`speed_of`, and what the texts that were timed cost where that is not what all do."""
  timed = [row for row in points if row.get('time')]
  cost = report.mean([row['time']['mac_ratio'] for row in timed])
  apart = timed and abs(cost - report.mean([row['mac_ratio'] for row in timed])) > APART
  return report.number(speed_of(points)) + (f' at {cost:.2f}' if apart else '')


def trained_table(document: Mapping[str, Any], plan: Plan, dataset: str) -> str:
  """Every method as trained, then at the budgets that it was set to."""
  by_compact = any(row.get('compact') for row in document['rows'])
  head = ['', 'budget', 'seeds', 'accuracy', 'accuracy − dense [95%]', 'no worse', 'keys kept', 'MACs', 'times dense',
          *(['by compact', 'accuracy'] if by_compact else []), 'the paper']  # fmt: skip
  dense = dense_points(document, dataset)
  lines, chosen = [head], best_on_validation(document, plan, dataset)

  def cells(points):
    return shared.cells(points) if by_compact else ()

  lines += [[DENSE, '–', *line_of(dense, dense), *cells(dense), '']] if dense else []
  for name in METHODS:
    for setting in settings(document, plan, dataset, name):
      first = setting.budget is None
      title = setting.title + (' *chosen on validation*' if name == chosen and first else '')
      paper = PAPERS.get((dataset, name), '') if first else ''
      points = setting.points
      lines.append([title, setting.asked, *line_of(points, dense), *cells(points), paper])
  return report.table(lines)


def front(document: Mapping[str, Any], plan: Plan, dataset: str, cost: Cost) -> list[Setting]:
  """The Pareto front, the cheapest first: settings, dense among them, that nothing as cheap equals on validation.

  Of those that all seeds ran. What falls behind dense by more than a plot shows is left out.
  """
  dense = dense_points(document, dataset)
  every = [Setting(DENSE, None, dense)]
  every += [setting for name in METHODS for setting in settings(document, plan, dataset, name)]
  sign = -1 if cost is speed_of else 1
  known = [
    (sign * x, -on_validation(setting.points, dense), place)
    for place, setting in enumerate(every)
    if len(setting.points) == len(plan.seeds[dataset]) and (x := cost(setting.points)) is not None
  ]
  found, best = [], -float(SHOWN)
  for _, loss, place in sorted(known):
    if -loss > best:
      best = -loss
      found.append(every[place])
  return found


def on_validation(points: Points, dense: Points) -> float:
  """Accuracy on the validation split less that of the dense runs of the same seeds, in points."""
  known = {row['seed']: row['valid']['accuracy'] for row in dense}
  return 100 * float(np.mean([row['valid']['accuracy'] - known[row['seed']] for row in points]))


def front_table(document: Mapping[str, Any], plan: Plan, dataset: str, cost: Cost) -> str:
  """What stands on the front, and what that is on the test split."""
  dense = dense_points(document, dataset)
  trained = of(document, dataset, 'dense_states', 'trained', None)  # a stronger dense model, where it was run
  last = [f'test − {METHODS["dense_states"].title} [95%]'] if trained else []
  lines = [['', 'budget', 'seeds', 'MACs', 'times dense', 'valid − dense', 'test − dense [95%]', *last]]
  for setting in front(document, plan, dataset, cost):
    points, asked, beside = setting.points, setting.asked, ['–', '–']
    if setting.title == DENSE:
      asked = '–'
    elif gain := report.difference(points, dense):
      beside = [f'{on_validation(points, dense):+.2f}', report.points(gain._asdict())]
    if trained:
      gain = report.difference(points, trained)
      beside.append(report.points(gain and gain._asdict()))
    lines.append([
      setting.title, asked, str(len(points)), report.number(macs_of(points)), speed_cell(points), *beside
    ])  # fmt: skip
  return report.table(lines)


def untrained_table(document: Mapping[str, Any], dataset: str) -> str:
  """Test accuracy (keys kept) by method and share that a layer is asked for."""
  lines = [['', *(f'{keep:.0%}' for keep in KEEP)]]
  for name, (title, _) in UNTRAINED.items():
    found = [of(document, dataset, name, 'untrained', keep) for keep in KEEP]
    lines.append([title, *(
      f'{100 * points[0]["metrics"]["accuracy"]:.1f} ({points[0]["keep_ratio"]:.0%})' if points else '–' for points in found
    )])  # fmt: skip
  return report.table(lines)


def mixes_line(document: Mapping[str, Any], dataset: str) -> str:
  """Accuracy of back-tracking by p."""
  found = []
  for name, mix in (('abt', 0.1), *((f'abt {mix}', mix) for mix in MIXES)):
    points = of(document, dataset, name, 'untrained', KEEP[1])
    found += [(mix, points[0])] if points else []
  cells = ', '.join(
    f'p = {mix}: {100 * row["metrics"]["accuracy"]:.1f} ({row["keep_ratio"]:.0%})'
    for mix, row in sorted(found, key=lambda f: f[0])
  )
  return f'Back-tracking at {KEEP[1]:.0%} a layer by p: {cells or "not run yet"}.\n'


def quartile_table(document: Mapping[str, Any]) -> str:
  """Trained on the shorter half: accuracy (MACs / dense's there) by quartile of length."""
  found = document.get('quartiles') or {}
  if 'dense' not in found:
    return NOT_RUN
  lines = [['', *(f'up to {part["longest"]} tokens' for part in found['dense'])]]
  for name, parts in found.items():
    cells = [share_of(part, dense) for part, dense in zip(parts, found['dense'])]
    lines.append(['dense' if name == 'dense' else METHODS[name].title, *cells])
  return report.table(lines)


def length_table(document: Mapping[str, Any], dataset: str) -> str:
  """Accuracy (multiply-adds beside dense's on the same texts) by length, at about the cost that was trained for."""
  [dense] = [point['by_length'] for point in dense_points(document, dataset) if not point['seed']]
  limits, head = [part['longest'] for part in dense], []
  for below, limit, part in zip([0, *limits], limits, dense):
    head.append(f'{below + 1} to {limit} tokens' if limit else f'more than {below} tokens')
    head[-1] += f' ({part["examples"]})'
  lines = [['', 'MACs', *head]]
  for name, method in METHODS.items():
    for variant, budget in (('set', TRAINED_AT), ('trained', None)):
      points = [point for point in of(document, dataset, name, variant, budget) if not point['seed']]
      if points:
        parts = zip(points[0]['by_length'], dense)
        lines.append(
          [method.title, report.number(points[0]['mac_ratio']), *(share_of(*pair) for pair in parts)]
        )
        break
  return report.table(lines)


def share_of(part: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
  """Accuracy (share of dense's multiply-adds) of the texts of some length."""
  if not part['examples']:
    return '–'
  return f'{100 * part["accuracy"]:.1f} ({part["macs"] / dense["macs"]:.2f})'


def not_measured(document: Mapping[str, Any]) -> str:
  """Points without a number: how many of each method, by reason."""
  counts: dict[tuple, int] = {}
  for row in document['rows']:
    if not row['metrics']:
      place = CORPORA[row['dataset']].title, row['name'], row['variant'], row['reason']
      counts[place] = counts.get(place, 0) + 1
  lines = [
    f'- {title}, {name}, {variant}: {count} ({reason})'
    for (title, name, variant, reason), count in counts.items()
  ]
  return '## Points without a number\n\n' + '\n'.join(lines) + '\n' if lines else ''


def page(document: Mapping[str, Any], plan: Plan, name: str) -> str:
  """results/NAME.md."""
  parts = [
    f'# {plan.title}\n\nMiniLM-L6 (6 x 384) where no other is named, [CLS] read-out; all start from the same dense '
    'fine-tunes. Accuracy on the test split, in percent; MACs and keys kept count real tokens. *times dense* (*at* what '
    'the timed texts cost): throughput of one seed on the clock, beside the fastest dense; where counts depend on the text '
    'by `serve`, and *by compact*: in batches by length within capacities, which change the accuracy where tokens find no '
    'room, and which a batch shares where examples exit. *the paper*: its accuracy (and dense beside it) at its share of '
    'the cost, of a model twice as deep and twice as wide. *Distilled with states*, as '
    'students are: the last '
    f"stage of the encoder has {LONG} epochs, where the methods' own recipes have 1 or 2; so distilled Magic Pyramid has "
    "FastBERT's exits. *Self-distilled*: the dense run learned so from itself. *Light* top-k takes about 0.62 of the "
    'multiply-adds. *Brief exits*, and those of rows without a word on it, were trained for 1 epoch, in Magic Pyramid for '
    '2, on MPNet-base for 3.\n'
  ]
  for dataset in plan.seeds:
    title = CORPORA[dataset].title
    if not dense_points(document, dataset):  # which comes before all others
      parts.append(f'## {title}\n\n{NOT_RUN}')
      continue
    table = trained_table(document, plan, dataset)
    parts += [f'## {title}\n\n{table}', f'![{title}]({name}_{dataset}.png)\n']
    told = 'settings of all seeds that nothing as cheap equals on the validation split (rings in the plot)'
    parts.append(f'Pareto front by multiply-adds, {told}:\n\n{front_table(document, plan, dataset, macs_of)}')
    if any(row.get('time') for row in document['rows'] if row['dataset'] == dataset):
      parts.append(f'![{title}, on the clock]({name}_{dataset}_time.png)\n')
      parts.append(f'By throughput, of what was timed:\n\n{front_table(document, plan, dataset, speed_of)}')
    if plan.lengths:
      told = "Accuracy and share of dense's multiply-adds by length (number of texts), seed 0:"
      parts.append(f'{told}\n\n{length_table(document, dataset)}')
  parts += [extra_page(document)] if plan.extras else []
  return '\n'.join([*parts, not_measured(document), report.origin(document)])


def extra_page(document: Mapping[str, Any]) -> str:
  """Without training, the ApproxNet's attention, and longer texts."""
  parts = ['## Without training\n\nCells: accuracy (keys kept), by the share that each layer is asked for.\n']
  for dataset in ('sst2', 'ag_news', 'bbc'):
    table = untrained_table(document, dataset)
    parts += [f'### {CORPORA[dataset].title}\n\n{table}', mixes_line(document, dataset)]
  kl = ''.join(
    f'- {CORPORA[dataset].title}: distilled {found["distilled"]:.3f}, of all texts pooled {found["pooled"]:.3f}, '
    f'random {found["random"]:.3f}\n'
    for dataset, found in (document.get('divergences') or {}).items()
  )
  parts.append(f'### ApproxNet\n\nKL of its attention from the true one, nats:\n\n{kl or NOT_RUN}')
  parts.append(
    '## Longer than what it was trained on\n\nTrained on the shorter half of AG News; accuracy (MACs as a share of '
    f"dense's) by quartile of the test texts' length.\n\n{quartile_table(document)}"
  )
  return '\n'.join(parts)


def plots(path: pathlib.Path, document: Mapping[str, Any], plan: Plan, dataset: str) -> None:
  """Accuracy against MACs into `path`, and against time beside it where times were taken."""
  dense = dense_points(document, dataset)
  if not dense:
    return
  title = f'{CORPORA[dataset].title}: accuracy and cost'
  plot(path, document, plan, dataset, macs_of, title, 'Multiply-adds, share of dense')
  if any(row.get('time') for row in document['rows'] if row['dataset'] == dataset):
    path = path.with_name(f'{path.stem}_time.png')
    title = f'{CORPORA[dataset].title}: accuracy and throughput'
    plot(path, document, plan, dataset, speed_of, title, 'Texts a second, times dense')


def plot(
  path: pathlib.Path,
  document: Mapping[str, Any],
  plan: Plan,
  dataset: str,
  cost: Cost,
  title: str,
  label: str,
) -> None:
  """Accuracy against a cost: a line a method; bars are the 95% interval of the difference to dense."""
  drawing, axes = pictures.figure()
  dense = dense_points(document, dataset)
  level = 100 * np.mean([row['metrics']['accuracy'] for row in dense])
  placed: dict[tuple, tuple] = {}  # by title and budget: cost, difference to dense and its interval
  studied = {row['name'] for row in document['rows']}  # whether measured or not: a method keeps its colour
  for place, name in enumerate(name for name in METHODS if name in studied):
    own = list(settings(document, plan, dataset, name))
    placed |= {
      (setting.title, setting.budget): (x, *gain_of(setting.points, dense))
      for setting in own
      if (x := cost(setting.points)) is not None
    }
    spots = sorted(placed[one.title, one.budget] for one in own if (one.title, one.budget) in placed)
    if cost is speed_of:
      # Lines stand at what they differ from their dense runs.
      shifts = {row['seed']: level - 100 * row['metrics']['accuracy'] for row in dense}
      shared.line(
        axes, [setting.points for setting in own], METHODS[name].title, pictures.look(place), shifts
      )
    if spots:
      x, mean, low, high = (np.array(column) for column in zip(*spots))
      axes.errorbar(x, level + mean, yerr=[mean - low, high - mean], linestyle='-', elinewidth=0.9, capsize=2, markersize=5,
                    linewidth=1.4, label=METHODS[name].title, **pictures.look(place))  # fmt: skip
  best = [placed[one.title, one.budget] for one in front(document, plan, dataset, cost) if one.title != DENSE]
  pictures.rings(axes, [(x, level + mean) for x, mean, *_ in best], 'Pareto front')
  pictures.level(axes, level)
  # What has broken down would take the scale from all others; the table has it.
  axes.set_ylim(bottom=max(axes.get_ylim()[0], level - SHOWN))
  pictures.legend(axes)
  pictures.titled(axes, title, label, 'Test accuracy in %')
  drawing.savefig(path)


def macs_of(points: Points) -> float | None:
  """Multiply-adds as a share of dense's, mean over seeds."""
  return report.mean([row['mac_ratio'] for row in points])


def gain_of(points: Points, dense: Points) -> tuple[float, float, float]:
  """(difference to dense in points, its interval)."""
  gain = report.difference(points, dense)
  assert gain is not None  # dense runs come before all others of their seed
  return 100 * gain.mean, 100 * gain.low, 100 * gain.high
