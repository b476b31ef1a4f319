"""What the models of a study of methods on texts take on the clock, beside the fastest dense.

    python benchmarks/text_times.py [--study=text_pruning|exits] [--datasets=…] [--methods=…] [--budgets=0.4,0.55]
                                    [--executors=compact,serve] [--seed=0] [--documents=256] [--repeats=5]
                                    [--runs=runs] [--results=results]

Runs of one seed, as trained and at some of the study's budgets, float32, on test texts at their real lengths: fixed counts by
the executor `compact` on batches by length, the others by `serve`, everything on the host included, and by `compact` too,
within capacities, which a batch shares where examples exit. Each runs in turns with dense, which is the fastest of three ways
to run it. The times go into the points of results/STUDY.json, and the table and plots are drawn again.
Training nothing: what benchmarks/text_pruning.py has not run is left out.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import report, serving, shared, speed, text_pruning, turns
from benchmarks.text_runs import METHODS, PLANS, dense_row
from benchmarks.trained import Trained
from tokenprune_jax import serve, timing

SIZE = 32  # rows of a batch
SHARING = 8  # texts, or more, that share capacities
EXECUTORS = ['compact', 'serve']


def chosen(
  study: text_pruning.Study, options: argparse.Namespace, dataset: str
) -> list[tuple[dict[str, Any], Trained]]:
  """The dense point, then those that are timed, each with its run."""
  points = {text_pruning.key(point): point for point in study.document['rows']}
  found = []
  for row in study.runs:
    methods = options.methods or METHODS
    wanted = row.dataset == dataset and row.seed == options.seed
    if not wanted or row.name not in (dense_row(dataset, 0).name, *methods):
      continue
    if row.name == 'dense_more':  # as fast as dense
      continue
    own = [points[text_pruning.key(point)] for point in text_pruning.points_of(row, study.plan)]
    own = [p for p in own if p['metrics'] and (p['budget'] is None or p['budget'] in options.budgets)]
    trained = Trained(study.folder(row)) if own else None
    found += [(point, trained) for point in own if trained]
  return found


def timed(study: text_pruning.Study, options: argparse.Namespace, dataset: str) -> None:
  """Writes the times of a dataset into its points."""
  waiting = chosen(study, options, dataset)
  if not waiting or waiting[0][0]['name'] != dense_row(dataset, 0).name:
    print(f'{dataset}: its dense run of seed {options.seed} is not measured; nothing to time', flush=True)
    return
  dense = waiting[0][1]
  plain, test = dense.model({'name': 'none'}), dense.splits['test']
  order = np.random.default_rng(0).permutation(len(test))[: options.documents]
  rows = [test.ids(int(place)) for place in order]
  ladder = serve.Ladder().settled(max(map(len, rows)))
  batches = serving.dense_batches(rows, ladder, plain.config.pad_id, SIZE)['bucketed']
  macs: dict[str, float] = {}

  def program(point: dict[str, Any], trained: Trained) -> timing.Forward | timing.Served:
    name, model = label(point), trained.model(point['reducer'])
    found: timing.Forward | timing.Served
    if METHODS[point['name']].executor == 'serve':
      found = timing.Served(model, trained.params, rows)
      macs[name] = found.macs
    else:
      found = timing.Forward(model.clone(executor='compact'), trained.params, batches)
      macs[name] = speed.validation_of(model, trained.params, batches).mac_ratio({})
    print(f'{dataset} {name}: compiled in {found.compile_seconds:.0f} s', flush=True)
    return found

  ways = serving.dense_ways(plain, dense.params, {'bucketed': batches}, rows)
  best = turns.fastest(ways, options.repeats, options.allow_load)
  assert best is not None
  write(study, waiting[0][0], best, best.name, 1.0, len(rows), dataset)
  points = {label(point): point for point, _ in waiting[1:]}
  makers = {
    label(point): functools.partial(program, point, trained) for point, trained in waiting[1:]
    if METHODS[point['name']].executor in options.executors
  }  # fmt: skip
  for turn in turns.one_by_one(makers, {best.name: best.program}, options.repeats, options.allow_load):
    write(study, points[turn.name], turn, best.name, macs[turn.name], len(rows), dataset)
  for point, trained in waiting[1:]:
    if 'compact' in options.executors and METHODS[point['name']].executor == 'serve':
      name = f'{dataset} {label(point)}'
      shared.measure(name, point, trained, batches, SHARING, best, options.repeats, options.allow_load)
      report.write(study.path, study.document)
  best.give_up()


def write(
  study: Any,
  point: dict[str, Any],
  turn: turns.Turn,
  dense: str,
  mac_ratio: float,
  documents: int,
  dataset: str,
) -> None:
  """Puts the time of a turn into a point of a study, says it and writes the study's file, so that it outlives a stop.

  dense: the program that it was timed beside, or itself.
  """
  point['time'] = {
    **turns.compared(turn, turn.times[dense]['seconds'], mac_ratio), 'documents': documents, 'dense': dense,
    **report.made_by(),
  }  # fmt: skip
  report.write(study.path, study.document)
  print(told(dataset, turn.name, point['time']), flush=True)


def label(point: Mapping[str, Any]) -> str:
  """A point's name among those of its dataset."""
  return point['name'] if point['budget'] is None else f'{point["name"]} at {point["budget"]}'


def told(dataset: str, name: str, time: Mapping[str, Any]) -> str:
  """One line about a time."""
  return (
    f'{dataset} {name:<22} {time["documents"] / time["seconds"]:8.1f} texts/s, {time["time_ratio"]:.2f} times dense at '
    f'{time["mac_ratio"]:.2f} of its MACs: {time["efficiency"]:.2f}'
  )


def numbers(text: str) -> Sequence[float]:
  """0.4,0.55 -> (0.4, 0.55)."""
  return tuple(float(part) for part in text.split(',') if part)


def main() -> None:
  """Times of the models that there are."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--study', default='text_pruning', choices=sorted(PLANS))
  parser.add_argument(
    '--datasets', type=speed.words, default=[], help='of the study; all where none is named'
  )
  parser.add_argument('--methods', type=speed.words, default=[], help='all where none is named')
  parser.add_argument('--budgets', type=numbers, default=(), help='beside the models as trained')
  parser.add_argument('--executors', type=speed.among(EXECUTORS), default=EXECUTORS, help='that are timed')
  parser.add_argument('--seed', type=int, default=0, help='whose runs are timed')
  parser.add_argument('--documents', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.set_defaults(data='')  # what runs are made from
  options = parser.parse_args()
  unknown = [name for name in options.methods if name not in METHODS]
  unknown += [name for name in options.datasets if name not in PLANS[options.study].seeds]
  if unknown:
    parser.error(f'the study {options.study} has no {unknown[0]!r}')
  study = text_pruning.Study(options, f'python benchmarks/text_pruning.py --study={options.study}')
  for dataset in options.datasets or study.plan.seeds:
    timed(study, options, dataset)
    study.save()


if __name__ == '__main__':
  main()
