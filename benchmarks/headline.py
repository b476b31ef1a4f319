"""The headline: accuracy and throughput of fixed counts on real test documents, beside the fastest dense and torch.

    python benchmarks/headline.py [--datasets=bbc,imdb] [--points=…] [--documents=128] [--repeats=3] [--runs=DIR]
                                  [--no_timing] [--only_timing] [--out=results/headline.json]

Fine-tuned MiniLM-L6 (seed 0), float32, documents at their real lengths up to the 512 tokens that the model reads.
Curves: top-k (trained at two schedules, others as settings of the nearer one) and combining (one run a layer), each
starting from the dense run and learning half from its answers (configs/prune.py:topk+distil). The setting of the headline
is the fastest one within half a point of dense on the whole validation split, none of which any run was trained on; the
test split only reports. Dense is the fastest of five ways to run it, torch the faster of two, timed
beside that dense; since counts are fixed, what a setting takes does not depend on what was learned, and pretrained weights
are timed. Goes on with the same command after any stop; makes the runs it needs. `--no_timing` computes the accuracies
only, which other programs do not disturb; `--only_timing` times the settings whose accuracies are there; `--points` takes
the settings with one of these words in their names.
"""

import argparse
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import accuracy, pictures, report, serving, speed, turns
from benchmarks.selection_rules import TITLES
from benchmarks.studies import DATASETS, Row
from benchmarks.trained import Trained
from tokenprune_jax import ladder, metrics, pretrained, timing, workdir

LONGEST = 512  # tokens that the model reads
ALLOWED_LOSS = 0.005  # on the validation split
HALF = (0.95, 0.05)  # ends of the shares that top-k is trained with, at about that part of the cost
THIRD = (0.65, 0.02)
ENDS = {(0.95, 0.2): HALF, HALF: HALF, (0.9, 0.05): HALF, (0.8, 0.05): THIRD, THIRD: THIRD}
LAYERS = {3: 'c_third', 4: 'c_early', 5: 'c_late'}  # that combining replaces, and its runs
# As configs/bbc_fuzzy.py; others are trained as IMDB.
RECIPE = {'bbc': ('optimizer.learning_rate=1e-4', 'stages[0].epochs=3')}
COLOURS = {'dense': '#333840', 'topk': '#4477aa', 'combine': '#ee6677'}


class Setting(NamedTuple):
  """A point of a curve: a run, and what is changed of its reducer at inference."""

  method: str
  name: str
  row: Row
  spec: dict[str, Any]


def settings(dataset: str, runs: str = 'runs', depth: int = 6) -> Iterator[Setting]:
  """Dense, then the points of both curves."""
  dense = Row(dataset, 'dense', 'dense', 0)
  teacher = accuracy.workdir_of(dense, runs)

  def distilled(name: str, recipe: str, override: str) -> Row:
    overrides = (override, *RECIPE.get(dataset, ()))
    return Row(
      dataset, f'{name}_distil', f'{recipe}+distil,{teacher}', 0, overrides, 'configs/prune.py', timed=False
    )

  yield Setting('dense', 'dense', dense, {'name': 'none'})
  topk = {
    HALF: distilled('topk_half', 'topk', f'reducer.shares={speed.schedule(depth, *HALF)}'),
    THIRD: distilled('topk_third', 'topk', f'reducer.shares={speed.schedule(depth, *THIRD)}'),
  }
  for ends, nearest in ENDS.items():
    name = f'top-k, {ends[0]:.0%} to {ends[1]:.0%}'
    yield Setting('topk', name, topk[nearest], {'name': 'topk', 'shares': speed.schedule(depth, *ends)})
  for layer, name in LAYERS.items():
    row = distilled(name, 'c_early', f'reducer.layer={layer}')
    yield Setting(
      'combine', f'combining at layer {layer}', row, {'name': 'combine', 'slots': 8, 'layer': layer}
    )


def wanted(points: Sequence[str], dataset: str, runs: str) -> list[Setting]:
  """Those of `settings` with one of `points` in their names; all where there are none."""
  there = list(settings(dataset, runs))
  unknown = [point for point in points if not any(point in setting.name for setting in there)]
  if unknown:
    names = ', '.join(setting.name for setting in there)
    raise SystemExit(f'error: --points: no setting has {unknown[0]!r} in its name; there are {names}')
  return [setting for setting in there if not points or any(point in setting.name for point in points)]


def trained(setting: Setting, runs: str) -> Trained:
  """The run of a setting, on texts that are not cut to what it was trained on.

  Trains the run, or goes on with it, where it is not finished.
  """
  folder = pathlib.Path(accuracy.workdir_of(setting.row, runs))
  if not (folder / 'result.json').exists():
    made = accuracy.run(setting.row, runs)
    if not made['metrics']:
      raise SystemExit(f'error: {setting.row.name} on {setting.row.dataset}: {made["reason"]}')
  return Trained(folder, max_length=LONGEST, buckets=ladder.LENGTHS, valid_limit=0)


def scored(setting: Setting, run: Trained) -> dict[str, Any]:
  """Accuracy on both splits, and which test documents were right."""
  # Counts are fixed, so that `compact` answers as `mask` does, in less time.
  valid, test = (run.evaluate(setting.spec, split, executor='compact') for split in ('valid', 'test'))
  return {
    'dataset': setting.row.dataset, 'method': setting.method, 'name': setting.name, 'reducer': setting.spec,
    'run': accuracy.workdir_of(setting.row, 'runs'), 'valid': valid['metrics']['accuracy'],
    'test': test['metrics']['accuracy'], 'seed': setting.row.seed, 'seconds': None,
    **{key: test[key] for key in ('mac_ratio', 'examples', 'correct', 'split_digest', 'commit')},
  }  # fmt: skip


def torch_ways(rows: Sequence[np.ndarray], batches: Sequence[dict], shape: Any) -> turns.Makers:
  """torch SDPA on the bucketed batches, and on one document after the other without any padding."""
  if importlib.util.find_spec('torch') is None:
    return {}
  import torch

  peer = speed.torch_peer(shape)

  def way(inputs):
    tensors = [(torch.from_numpy(ids).long(), torch.from_numpy(mask)) for ids, mask in inputs]

    def run():
      with torch.inference_mode():
        for ids, mask in tensors:
          peer(input_ids=ids, attention_mask=mask)

    return run

  alone = [(row[None].astype(np.int64), np.ones((1, len(row)), bool)) for row in rows]
  return {
    'torch_bucketed': lambda: way([(batch['ids'], batch['mask']) for batch in batches]),
    'torch_alone': lambda: way(alone),
  }


def timed(options: argparse.Namespace, dataset: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows of a dataset with what they take on `--documents` test documents, each in turns with dense and torch."""
  weights = pretrained.load('minilm-l6', dropout=0.0, attention_dropout=0.0)
  rows, _ = serving.documents(dataset, weights, options.documents)
  dense, params = serving.made(found[0]['reducer'], weights)
  shapes = serving.dense_batches(rows, ladder.Ladder().settled(LONGEST), dense.config.pad_id)
  ways: dict[str, Any] = {}
  plain = serving.dense_ways(dense, params, shapes, rows)
  best = turns.fastest(
    plain, options.repeats, options.allow_load, lambda turn: ways.update({turn.name: turn.own})
  )
  assert best is not None
  beside = {best.name: best.program}
  peers: dict[str, float] = {}  # seconds, where dense takes one
  for turn in turns.one_by_one(
    torch_ways(rows, shapes['bucketed'], dense.config), beside, options.repeats, options.allow_load
  ):
    ways[turn.name], peers[turn.name] = turn.own, turn.own['seconds'] / turn.times[best.name]['seconds']
  peer = min(peers, key=peers.__getitem__, default=None)

  def program(row: dict[str, Any]) -> timing.Forward:
    model, params = serving.made(row['reducer'], weights)
    return timing.Forward(model.clone(executor='compact'), params, shapes['bucketed'])

  def written(row: dict[str, Any], turn: turns.Turn) -> dict[str, Any]:
    seconds = turn.times[best.name]['seconds']
    return {
      **row, **turn.own, 'dense': best.name, 'torch': peer, 'documents': len(rows), 'load_of_others': turn.load,
      'dense_seconds': seconds, 'torch_seconds': peers[peer] * seconds if peer else None,
      'ways': ways if row['method'] == 'dense' else None,
    }  # fmt: skip

  makers = {row['name']: functools.partial(program, row) for row in found if row['method'] != 'dense'}
  done = [written(found[0], best)]
  own = {row['name']: row for row in found}
  for turn in turns.one_by_one(makers, beside, options.repeats, options.allow_load):
    done.append(written(own[turn.name], turn))
    print(f'{dataset} {turn.name}: {1 / cost(done[-1]):.2f} times dense', flush=True)
  best.give_up()
  return done


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """The fastest setting that loses at most ALLOWED_LOSS on the validation split; None where none is that good."""
  dense = next(row for row in rows if row['method'] == 'dense')
  good = [row for row in rows[1:] if row['valid'] >= dense['valid'] - ALLOWED_LOSS - 1e-9]
  return min(good, key=cost, default=None)


def cost(row: dict[str, Any]) -> float:
  """What a setting takes, as a share of dense in the same turns (machines drift); of its MACs where no time was taken."""
  return row['seconds'] / row['dense_seconds'] if row['seconds'] else row['mac_ratio']


def rate(row: dict[str, Any], dense: dict[str, Any]) -> float:
  """Documents a second, at the pace at which `dense` was measured."""
  return dense['documents'] / dense['seconds'] / cost(row)


def drawn(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows of a dataset that have times; none where only dense has."""
  found = [row for row in rows if row['seconds']]
  return found if len(found) > 1 else []


def page(document: dict[str, Any]) -> str:
  """results/headline.md."""
  parts = [
    '# Accuracy and throughput on real documents\n\nMiniLM-L6, float32, up to 512 tokens. Times are of the same test '
    'documents, in turns; *chosen*: the fastest within half a point of dense on the validation split, by its MACs where no '
    'time was taken.\n'
  ]
  for dataset in dict.fromkeys(row['dataset'] for row in document['rows']):
    rows = [row for row in document['rows'] if row['dataset'] == dataset]
    picture = f'![{TITLES[dataset]}](headline_{dataset}.png)\n' if drawn(rows) else ''
    parts.append(f'## {TITLES[dataset]}\n\n{table(rows)}\n{picture}')
  return '\n'.join([*parts, report.origin(document)])


def table(rows: Sequence[dict[str, Any]]) -> str:
  """One dataset."""
  lines = [
    ['', 'valid', 'test', 'test − dense [95%]', 'MACs', 'documents/s', 'times dense', 'times torch SDPA']
  ]
  chosen = headline(rows)
  for row in rows:
    gain = report.difference([row], rows[:1]) if row is not rows[0] else None
    lines.append([
      row['name'] + (' *chosen*' if row is chosen else ''), f'{100 * row["valid"]:.1f}', f'{100 * row["test"]:.1f}',
      report.points(gain and gain._asdict()), f'{row["mac_ratio"]:.2f}', *throughput(row, rows[0]),
    ])  # fmt: skip
  there = {row['name'] for row in rows}
  lines += [
    [point.name, report.NOT_RUN, *['–'] * 6]
    for point in settings(rows[0]['dataset'])
    if point.name not in there
  ]
  return report.table(lines)


def throughput(row: dict[str, Any], dense: dict[str, Any]) -> tuple[str, str, str]:
  """(documents a second, times dense, times torch), dashes for what was not measured."""
  if not row['seconds'] or not dense['seconds']:
    return '–', '–', '–'
  torch = row['torch_seconds']
  return (
    f'{rate(row, dense):.1f}', f'{1 / cost(row):.2f}',
    f'{torch / row["seconds"]:.2f}' if torch else '–',
  )  # fmt: skip


def plot(path: pathlib.Path, dataset: str, rows: Sequence[dict[str, Any]]) -> None:
  """Test accuracy against throughput: a line a method; bars are 95% intervals of the difference to dense."""
  drawing, axes = pictures.figure()
  dense = rows[0]
  place = dense['documents'] / dense['seconds'], 100 * dense['test']
  axes.plot(*place, 'o', color=COLOURS['dense'], markersize=9, label='dense')
  for method in dict.fromkeys(row['method'] for row in rows[1:]):
    points = sorted((row for row in rows if row['method'] == method), key=lambda row: -cost(row))
    x = [rate(row, dense) for row in points]
    y = np.array([100 * row['test'] for row in points])
    gains: list[metrics.Difference | None] = [report.difference([row], [dense]) for row in points]
    bars = np.array([[100 * (g.mean - g.low), 100 * (g.high - g.mean)] for g in gains if g]).T
    axes.errorbar(x, y, yerr=bars, fmt='o-', color=COLOURS[method], elinewidth=1.2, capsize=3, label=method)
  if dense['torch_seconds']:
    axes.axvline(dense['documents'] / dense['torch_seconds'], color='#b8860b', label='torch SDPA, dense')
  pictures.level(axes, 100 * dense['test'])
  axes.set_xlim(left=0)
  pictures.legend(axes)
  pictures.titled(
    axes, f'{TITLES[dataset]}: accuracy and throughput', 'Documents a second', 'Test accuracy in %'
  )
  drawing.savefig(path)


def save(path: pathlib.Path, document: dict[str, Any]) -> None:
  """The result file, and the table and plots beside it."""
  workdir.write_json(path, document)
  workdir.write_text(path.with_suffix('.md'), page(document))
  for dataset in dict.fromkeys(row['dataset'] for row in document['rows']):
    rows = drawn([row for row in document['rows'] if row['dataset'] == dataset])
    if rows:
      plot(path.with_name(f'{path.stem}_{dataset}.png'), dataset, rows)


def main() -> None:
  """Accuracies that are missing, then the times."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--datasets', type=speed.words, default=['bbc', 'imdb'], help=f'of {", ".join(TITLES)}')
  parser.add_argument(
    '--points', type=speed.words, default=[], help='parts of names of settings; default: all'
  )
  parser.add_argument('--documents', type=int, default=128, help='that are timed')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--no_timing', action='store_true')
  parser.add_argument('--only_timing', action='store_true')
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/headline.json')
  options = parser.parse_args()
  unknown = [name for name in options.datasets if name not in TITLES or name not in DATASETS]
  if unknown:
    parser.error(f'--datasets: there is no {unknown[0]!r}; choose from {", ".join(TITLES)}')
  path = pathlib.Path(options.out)
  header = report.header(report.command())
  known = {(row['dataset'], row['name']): row for row in report.read(path)['rows']}
  for dataset in options.datasets:
    for setting in () if options.only_timing else wanted(options.points, dataset, options.runs):
      row = known.get((dataset, setting.name))
      if row is None:
        row = scored(setting, trained(setting, options.runs))
        scores = f'valid {row["valid"]:.4f}, test {row["test"]:.4f}, MACs {row["mac_ratio"]:.2f}'
        print(f'{dataset} {setting.name}: {scores}', flush=True)
      known[dataset, setting.name] = row
      workdir.write_json(path, {**header, 'rows': list(known.values())})
  for dataset in () if options.no_timing else options.datasets:
    names = ['dense', *(setting.name for setting in wanted(options.points, dataset, options.runs))]
    there = [
      known[dataset, setting.name]
      for setting in settings(dataset, options.runs)
      if setting.name in names and (dataset, setting.name) in known
    ]
    for row in timed(options, dataset, there) if there else ():
      known[dataset, row['name']] = row
    save(path, {**header, 'rows': list(known.values())})  # what was measured is kept
  save(path, {**header, 'rows': list(known.values())})
  print(path.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
