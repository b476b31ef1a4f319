"""Taggers that stop early, on CoNLL-2003: F1 of spans against cost for SENTEE and TOKEE, beside dense and smaller students.

    python benchmarks/tagging.py [--runs=runs] [--rows=N] [--results=results]
    python benchmarks/tagging.py --times [--budgets=0.5,0.33,0.25] [--executors=compact,serve] [--documents=2048]
                                 [--curves=sentee,tokee_15,tokee_5,tokee_1] [--repeats=5]

One dense MiniLM-L6 a seed, which all start from (configs/prune.py): SENTEE's run trains all exits together, TOKEE's goes on
from it with exits that it samples itself. Each is then set to budgets from 1.5 to 4 times fewer multiply-adds than dense on
validation sentences, without training; the test split only reports. The queue goes on with the same command after any stop,
and writes results/tagging.json, its table and its plots. `--times` trains nothing: it measures the models of seed 0 that
there are, in batches of 32 by length (`compact`) and by `serve`, beside dense in turns in one process. `--sentences`
trains on so many only, for a trial; name other folders for it.
"""

import argparse
import collections
import functools
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import accuracy, pictures, report, serving, shared, speed, text_pruning, text_times, turns
from benchmarks.studies import Row
from benchmarks.trained import Trained
from tokenprune_jax import ladder, serve, timing, workdir

DATASET = 'conll2003'
SEEDS = (0, 1, 2)
# Shares of dense's multiply-adds, in the order in which they are worth having.
BUDGETS = (0.5, 0.33, 0.25, 0.67, 0.4)
FOUND_ON = 512  # validation sentences that a budget is met on
SHARING = 8  # sentences, or more, that share capacities
STEP = 8  # of the lengths of batches


class Curve(NamedTuple):
  """A line of the plot: its title, the run it is made from, and what its points have: a window (0: none), transitions."""

  title: str
  run: str
  window: int = 0
  transitions: str = ''

  def fields(self, labels: Sequence[str]) -> dict[str, Any]:
    """What is changed of the run's method."""
    found: dict[str, Any] = {'window': self.window} if self.window else {}
    if self.transitions:
      found |= {'transitions': self.transitions, 'tags': tuple(labels)}
    return found


CURVES = {
  'dense': Curve('dense', 'dense'),
  'dense_more': Curve('dense, trained on', 'dense_more'),
  'sentee': Curve('SENTEE', 'sentee'),
  'tokee_15': Curve('TOKEE, window 15', 'tokee', 15),
  'tokee_5': Curve('TOKEE, window 5', 'tokee', 5),
  'tokee_1': Curve('TOKEE, window 1', 'tokee', 1),
  'tokee_1_mask': Curve('TOKEE, window 1, transitions: mask', 'tokee', 1, 'mask'),
  'tokee_1_refuse': Curve('TOKEE, window 1, transitions: refuse', 'tokee', 1, 'refuse'),
  'tokee_1_both': Curve('TOKEE, window 1, transitions: both', 'tokee', 1, 'both'),
  'student': Curve('student, half of the layers', 'student'),
  'student_third': Curve('student, a third of the layers', 'student_third'),
}
SET = ('sentee', 'tokee')  # whose cost can be set
# What transitions cost lies in their share of the multiply-adds.
TIMED = tuple(name for name, curve in CURVES.items() if curve.run in SET and not curve.transitions)
FIRST_SEED = ('dense_more', 'student', 'student_third')


# ------------------------------------------------------------------------------------------------------- Queue
def rows(runs: str, sentences: int) -> Iterator[Row]:
  """Every run: all of the first seed before any of the second."""
  few = tuple(f'data.{split}_limit={sentences}' for split in ('train', 'valid', 'test')) if sentences else ()
  for seed in SEEDS:
    dense, sentee = (f'{runs}/{DATASET}/{name}-seed{seed}' for name in ('dense', 'sentee'))
    yield Row(DATASET, 'dense', 'ner', seed, few, 'configs/conll.py', False)
    yield Row(DATASET, 'sentee', f'sentee,{dense}', seed, (), 'configs/prune.py', False)
    yield Row(DATASET, 'tokee', f'tokee,{dense},{sentee}', seed, (), 'configs/prune.py', False)
  for name in FIRST_SEED:
    recipe = 'dense' if name == 'dense_more' else name
    yield Row(DATASET, name, f'{recipe},{runs}/{DATASET}/dense-seed0', 0, (), 'configs/prune.py', False)


def points_of(row: Row) -> Iterator[dict[str, Any]]:
  """The points of a run, not measured."""
  for name, curve in CURVES.items():
    if curve.run == row.name:
      for budget in BUDGETS if row.name in SET else (None,):
        yield {**text_pruning.empty(row, budget), 'name': name, 'window': curve.window, 'time': None}


class Study:
  """The result file as it grows."""

  def __init__(self, options: argparse.Namespace):
    self.options, self.path = options, pathlib.Path(options.results) / 'tagging.json'
    self.runs = list(rows(options.runs, options.sentences))
    known = {
      text_pruning.key(point): point
      for point in report.read(self.path)['rows']
      if text_pruning.settled(point)
    }
    self.points = {
      (row.name, row.seed): [known.get(text_pruning.key(point), point) for point in points_of(row)]
      for row in self.runs
    }

  @property
  def document(self) -> dict[str, Any]:
    """What the result file holds."""
    points = [point for own in self.points.values() for point in own]
    return {**report.header('python benchmarks/tagging.py'), 'rows': points}

  def save(self) -> None:
    """The file, its table and its plots."""
    document = self.document
    report.write(self.path, document)
    workdir.write_text(self.path.with_suffix('.md'), page(document))
    plot(self.path.with_suffix('.png'), document['rows'], 'mac_ratio', 'Multiply-adds, share of dense')
    if any(point['time'] for point in document['rows']):
      plot(
        self.path.with_name('tagging_time.png'),
        document['rows'],
        'time_ratio',
        'Sentences a second, times dense',
      )

  def folder(self, row: Row) -> pathlib.Path:
    """A run's workdir."""
    return pathlib.Path(accuracy.workdir_of(row, self.options.runs))

  def waits(self, row: Row) -> bool:
    """Whether a run has points that are not measured."""
    return not all(map(text_pruning.settled, self.points[row.name, row.seed]))

  def finish(self, row: Row) -> None:
    """Runs a row where it is not finished, and measures its points."""
    points = self.points[row.name, row.seed]
    if not (self.folder(row) / 'result.json').exists():
      made = accuracy.run(row, self.options.runs)
      if not made['metrics']:
        points[:] = [{**point, 'reason': made['reason']} for point in points]
        return
    trained = Trained(self.folder(row), FOUND_ON)
    for place, point in enumerate(points):
      if not text_pruning.settled(point):
        fields = CURVES[point['name']].fields(trained.exported.labels)
        points[place] = text_pruning.measured(point, trained, **fields)
        print(told(points[place]), flush=True)
        self.save()


def told(point: Mapping[str, Any]) -> str:
  """One line about a point."""
  where = f'{point["name"]} seed {point["seed"]} {point["budget"] or ""}'
  return f'{where}: {point["reason"]}' if point['reason'] else (
    f'{where}: F1 {point["metrics"]["f1"]:.4f}, MACs {point["mac_ratio"]:.3f}'
  )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- Page
def seeds_of(points: Sequence[Mapping[str, Any]], name: str, budget: float | None) -> list[Mapping[str, Any]]:
  """The measured points of all seeds."""
  return [
    point for point in points if (point['name'], point['budget']) == (name, budget) and point['metrics']
  ]


def gains(points: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]]) -> list[float]:
  """F1 minus that of the dense run of the same seed."""
  base = {point['seed']: point['metrics']['f1'] for point in dense}
  return [point['metrics']['f1'] - base[point['seed']] for point in points if point['seed'] in base]


def page(document: Mapping[str, Any]) -> str:
  """results/tagging.md."""
  every = document['rows']
  dense = seeds_of(every, 'dense', None)
  lines = [
    ['', 'budget', 'seeds', 'F1', 'F1 − dense', 'precision', 'recall', 'MACs', 'times dense', 'by `compact`', 'its F1'],
  ]  # fmt: skip
  for name, curve in CURVES.items():
    for budget in sorted(BUDGETS, reverse=True) if curve.run in SET else (None,):
      if found := seeds_of(every, name, budget):
        apart = gains(found, dense)
        scores = [
          report.percent(report.mean_std([point['metrics'][score] for point in found]))
          for score in ('f1', 'precision', 'recall')
        ]
        lines.append([
          curve.title, '–' if budget is None else f'{budget}', str(len(found)), scores[0],
          f'{100 * np.mean(apart):+.2f}' if apart and name != 'dense' else '–', *scores[1:],
          report.number(report.mean([point['mac_ratio'] for point in found])), report.number(cost(found, 'time_ratio')),
          *shared.cells(found),
        ])  # fmt: skip
  missing = collections.Counter((point['name'], point['reason']) for point in every if not point['metrics'])
  absent = '\n'.join(f'- {name}: {count} ({reason})' for (name, reason), count in missing.items())
  return '\n'.join([
    '# Taggers that stop early\n\nCoNLL-2003, named entities, MiniLM-L6 (6 x 384), lower case. F1, precision and recall of '
    'spans on the test split in percent, mean ± deviation over seeds; *F1 − dense* in points, against the dense run of the '
    'same seed. MACs count real tokens, exits included. *times dense*: throughput of seed 0 by `serve`, beside the fastest '
    f'dense; *by `compact`*: in batches of {text_times.SIZE} by length that share capacities, which change F1 where words '
    'find no room.\n',
    report.table(lines),
    '![F1 against multiply-adds](tagging.png)\n',
    *(['![F1 against throughput](tagging_time.png)\n'] if any(point['time'] for point in every) else []),
    *(['## Points without a number\n\n' + absent + '\n'] if absent else []),
    report.origin(document),
  ])  # fmt: skip


def cost(points: Sequence[Mapping[str, Any]], name: str) -> float | None:
  """mac_ratio, or time_ratio where times were taken: mean over seeds."""
  places = [point['time'] for point in points if point['time']] if name == 'time_ratio' else points
  return report.mean([place[name] for place in places])


def plot(path: pathlib.Path, points: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
  """F1 against a cost: a line a curve; bars are the deviation over seeds."""
  drawing, axes = pictures.figure()
  for place, (key, curve) in enumerate(CURVES.items()):
    found = [seeds_of(points, key, budget) for budget in (None, *BUDGETS)]
    spots = sorted((x, found) for found in found if found and (x := cost(found, name)) is not None)
    if spots and key != 'dense':
      scores = [report.mean_std([point['metrics']['f1'] for point in found]) for _, found in spots]
      axes.errorbar(
        [x for x, _ in spots], [100 * score['mean'] for score in scores],
        yerr=[100 * (score['std'] or 0) for score in scores], linestyle='-', elinewidth=0.9, capsize=2, markersize=5,
        linewidth=1.4, label=curve.title, **pictures.look(place),
      )  # fmt: skip
    if name == 'time_ratio':
      shared.line(axes, found, curve.title, pictures.look(place))
  if dense := seeds_of(points, 'dense', None):
    pictures.level(axes, 100 * float(np.mean([point['metrics']['f1'] for point in dense])))
  pictures.legend(axes)
  pictures.titled(axes, 'CoNLL-2003: named entities and cost', label, 'Test F1 of spans in %')
  drawing.savefig(path)


# -------------------------------------------------------------------------------------------------------- Times
def fine(longest: int) -> tuple[int, ...]:
  """Lengths of batches of sentences, which are short: every eighth."""
  return tuple(range(STEP, longest + STEP, STEP))


def batched(requests: Sequence[Any], pad: int) -> dict[str, list[dict]]:
  """Sentences in batches by length, as the other studies make them and in finer steps."""
  longest = max(len(timing.tokens_of(request)) for request in requests)
  steps = {'bucketed': ladder.LENGTHS, 'bucketed_by_8': fine(longest)}
  return {
    name: serving.dense_batches(requests, ladder.Ladder(lengths).settled(longest), pad, text_times.SIZE)[
      'bucketed'
    ]
    for name, lengths in steps.items()
  }


def timed(study: Study, options: argparse.Namespace) -> None:
  """Writes times into the points of seed 0."""
  found = {
    row.name: row for row in study.runs if row.seed == 0 and (study.folder(row) / 'result.json').exists()
  }
  if 'dense' not in found:
    raise SystemExit(
      f'error: {options.runs} holds no finished dense run of seed 0; run this file without --times first'
    )
  trained = {name: Trained(study.folder(row)) for name, row in found.items()}
  dense = trained['dense']
  test, plain = dense.splits['test'], dense.model({'name': 'none'})
  chosen = np.random.default_rng(0).permutation(len(test))[: options.documents]
  requests = [{'ids': test.ids(int(i)), 'words': test.word_of[test.place(int(i))]} for i in chosen]
  rows = [request['ids'] for request in requests]
  ways = serving.dense_ways(plain, dense.params, batched(rows, plain.config.pad_id), rows)
  best = turns.fastest(ways, options.repeats, options.allow_load)
  assert best is not None

  for point in study.points['dense', 0]:
    if point['metrics']:
      text_times.write(study, point, best, best.name, 1.0, len(rows), DATASET)
  for name in SET:
    points = {
      f'{point["name"]} at {point["budget"]}': point
      for point in study.points.get((name, 0), ())
      if point['budget'] in options.budgets and point['metrics'] and point['name'] in options.curves
    }
    if name in trained and points:
      trained[name].buckets = fine(trained[name].buckets[-1])
      batches = batched(requests, plain.config.pad_id)['bucketed_by_8']
      by_compact = points if 'compact' in options.executors else {}
      for label, point in by_compact.items():
        shared.measure(
          label, point, trained[name], batches, SHARING, best, options.repeats, options.allow_load
        )
        study.save()
      if 'serve' in options.executors:
        time_served(study, points, trained[name], requests, best, options)
  best.give_up()


def time_served(
  study: Study,
  points: Mapping[str, dict[str, Any]],
  trained: Trained,
  requests: Sequence[Any],
  best: turns.Turn,
  options: argparse.Namespace,
) -> None:
  """Writes the throughput of a run's points by `serve`: one server, since thresholds and windows are controls."""
  first = next(iter(points.values()))
  served = timing.Served(trained.model(first['reducer']), trained.params, requests, controls_of(first))
  print(f'compiled in {served.compile_seconds:.0f} s', flush=True)
  makers = {
    label: functools.partial(functools.partial, answers, served.server, requests, controls_of(point))
    for label, point in points.items()
  }
  for turn in turns.one_by_one(makers, {best.name: best.program}, options.repeats, options.allow_load):
    given = turn.program()
    macs = sum(answer.macs for answer in given) / sum(answer.dense_macs for answer in given)
    text_times.write(study, points[turn.name], turn, best.name, macs, len(requests), DATASET)
  served.close()


def controls_of(point: Mapping[str, Any]) -> dict[str, float]:
  """What a request says to be answered at a point's setting."""
  spec = point['reducer']
  return {'exit_threshold': float(spec['threshold']), 'exit_window': float(spec['window'])}


def answers(server: serve.Server, requests: Sequence[Any], controls: Mapping[str, float]) -> list[Any]:
  """All requests, given at once."""
  return list(server.map(requests, controls))


def main() -> None:
  """Runs and points that are missing, in order; or times."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--rows', type=int, default=10**6, help='stop after this many runs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  parser.add_argument('--sentences', type=int, default=0, help='of each split, for a trial; 0: all')
  parser.add_argument('--times', action='store_true', help='measure throughput')
  parser.add_argument('--budgets', type=text_times.numbers, default=(0.5, 0.33, 0.25), help='that are timed')
  parser.add_argument(
    '--executors',
    type=speed.among(text_times.EXECUTORS),
    default=text_times.EXECUTORS,
    help='that are timed',
  )
  parser.add_argument('--curves', type=speed.among(TIMED), default=TIMED, help='that are timed')
  parser.add_argument('--documents', type=int, default=2048, help='that are timed')
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  options = parser.parse_args()
  study = Study(options)
  if options.times:
    timed(study, options)
  waiting = [] if options.times else [row for row in study.runs if study.waits(row)]
  for number, row in enumerate(waiting[: options.rows], 1):
    print(f'[{number}/{len(waiting)}] {row.name} seed {row.seed}', flush=True)
    study.finish(row)
    study.save()
  study.save()
  print(study.path.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
