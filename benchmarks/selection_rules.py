"""Which rule picks the better tokens? All rules on the same dense checkpoints, without training.

    python benchmarks/selection_rules.py [--rows=N] [--runs=DIR] [--results=DIR]

The ratio p of the schedule t_{l+1} = floor(p t_l) is solved so that its mean over the layers is the nominal
keep ratio; three of the rules then keep more than that, so accuracy is drawn against what was measured.
Everything is read on the test split and nothing is chosen by it. Goes on with the same command after any
stop; makes the dense runs it needs.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(
  0, str(pathlib.Path(__file__).resolve().parents[1])
)  # so that this file can be run by its path

from benchmarks import accuracy, report
from benchmarks.studies import DATASETS, Row
from tokenprune_jax import workdir

NAME = 'selection_rules'
RULES = {
  'rank': 'fuzzy paper, rank', 'protect': 'fuzzy paper, protect', 'complement': 'fuzzy paper, complement',
  'magnitude': 'attention, mean over heads', 'entropy': 'entropy of attention', 'norm': 'norm of the state',
  'random': 'random',
}  # fmt: skip
COLOURS = dict(zip(RULES, ('#4477aa', '#228833', '#66ccee', '#ee6677', '#aa3377', '#b8860b', '#9aa0aa')))
KEEP = (0.7, 0.5, 0.3, 0.9, 0.8, 0.6, 0.4)  # nominal, in the order in which they are worth having
TITLES = {'bbc': 'BBC News', 'imdb': 'IMDB'}


def schedule_ratio(keep: float, layers: int) -> float:
  """p with mean(1, p, …, p^(layers-1)) = keep, to four decimals."""
  low, high = 0.0, 1.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if sum(middle**l for l in range(layers)) / layers < keep else (low, middle)
  return round(high, 4)


def rows() -> list[dict[str, Any]]:
  """Every cell of the study, not run yet: dense, then the rules at each keep ratio."""
  found = [cell(dataset, 'dense', 1.0) for dataset in TITLES]
  return found + [cell(dataset, rule, keep) for keep in KEEP for dataset in TITLES for rule in RULES]


def cell(dataset: str, rule: str, keep: float) -> dict[str, Any]:
  """One row with nothing measured; its name tells it from all others."""
  return {
    'dataset': dataset, 'model': DATASETS[dataset].model, 'method': 'dense' if rule == 'dense' else 'fuzzy',
    'variant': rule, 'name': f'{dataset} {rule} {keep}', 'seed': 0, 'split': 'test', 'nominal_keep_ratio': keep,
    'ratio': None, 'reason': report.NOT_RUN, 'difference': None, **dict.fromkeys(accuracy.MEASURED),
  }  # fmt: skip


class Dense:
  """The dense checkpoint of a dataset and its test split, read once."""

  def __init__(self, dataset: str, runs: str):
    from tokenprune_jax import data, pretrained  # not above: --help needs no JAX

    folder = pathlib.Path(accuracy.workdir_of(Row(dataset, 'dense', 'dense', 0), runs))
    self.exported = pretrained.load_exported(folder / 'model')
    self.config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    length = self.config['data']['max_length']
    loaded = data.load(
      self.config['data'], self.exported.tokenizer, length, data.cache_dir(), seed=self.config['seed']
    )
    self.split = loaded.splits['test']
    self.buckets = (*(b for b in self.config['data']['buckets'] if b < length), length)

  def evaluate(self, rule: str, keep: float) -> dict[str, Any]:
    """The measured part of a row."""
    from tokenprune_jax import evaluate, models, tasks

    ratio, exported = schedule_ratio(keep, self.exported.config.depth), self.exported
    spec = {'name': 'none'} if rule == 'dense' else {'name': 'fuzzy', 'rule': rule, 'ratio': ratio}
    model = models.Classifier(exported.config, models.make_reducer(spec), len(exported.labels), exported.readout,
                              exported.head)  # fmt: skip
    found, records = evaluate.evaluate(
      model.check(), exported.params, self.split, tasks.make('classify'), batch_size=32, buckets=self.buckets,
      pad_id=exported.config.pad_id,
    )  # fmt: skip
    scores = ('accuracy', 'macro_f1', 'micro_f1', 'macro_f1_batch16', 'loss')
    kept = {key: value for key, value in found.items() if key in accuracy.MEASURED}
    return {**kept, 'metrics': {score: found[score] for score in scores}, 'ratio': ratio, 'commit': report.commit(),
            'reason': None, **report.correctness(records)}  # fmt: skip


def table(document: dict[str, Any], dataset: str) -> str:
  """Rules by nominal keep ratio: accuracy (keep ratio measured), and the difference to dense."""
  by_place = {(row['dataset'], row['variant'], row['nominal_keep_ratio']): row for row in document['rows']}
  columns = sorted(KEEP, reverse=True)
  lines = [['', *(f'{keep:.0%}' for keep in columns)]]
  for rule, title in RULES.items():
    found = [by_place[dataset, rule, keep] for keep in columns]
    lines.append([title, *(f'{100 * row["metrics"]["accuracy"]:.1f} ({row["keep_ratio"]:.0%})' if row['metrics'] else '–'
                           for row in found)])  # fmt: skip
    lines.append(['  − dense [95%]', *(report.points(row['difference']) for row in found)])
  return report.table(lines)


def page(document: dict[str, Any]) -> str:
  """results/selection_rules.md."""
  parts = ['# Which rule picks the better tokens?\n\nAll rules on the same dense MiniLM-L6 checkpoint (seed 0), without '
           'training on them. Columns: nominal keep ratio, mean over layers. Cells: test accuracy in percent (keep ratio '
           'measured), and below it the difference to dense in points with the 95% interval of the paired bootstrap over '
           'test documents.\n']  # fmt: skip
  for dataset, title in TITLES.items():
    dense = next(row for row in document['rows'] if row['dataset'] == dataset and row['variant'] == 'dense')
    level = f'{100 * dense["metrics"]["accuracy"]:.1f}%' if dense['metrics'] else 'not run yet'
    parts.append(
      f'## {title} (dense: {level})\n\n{table(document, dataset)}\n![{title}]({NAME}_{dataset}.png)\n'
    )
  missing = sum(not row['metrics'] for row in document['rows'])
  parts.append(f'{missing} cells are not run yet.\n' if missing else '')
  return '\n'.join(parts) + '\n' + report.origin(document)


def plot(path: pathlib.Path, document: dict[str, Any], dataset: str) -> None:
  """Accuracy against measured keep ratio: a line a rule."""
  ran = [row for row in document['rows'] if row['dataset'] == dataset and row['metrics']]
  drawing, axes = report.figure()
  for rule, title in RULES.items():
    line = sorted((row['keep_ratio'], row['metrics']['accuracy']) for row in ran if row['variant'] == rule)
    if line:
      x, y = zip(*line)
      axes.plot(
        [100 * value for value in x], [100 * value for value in y], 'o-', color=COLOURS[rule], label=title
      )
  for row in ran:
    if row['variant'] == 'dense':
      level = 100 * row['metrics']['accuracy']
      axes.axhline(level, color='#333840', linewidth=1, linestyle=(0, (4, 3)))
      axes.axhspan(level - 0.5, level, color='#333840', alpha=0.07, linewidth=0)
  if ran:
    axes.legend(frameon=False, fontsize=10, loc='center left', bbox_to_anchor=(1.01, 0.5))
  report.titled(axes, f'{TITLES[dataset]}: accuracy without training, by rule', 'Keys kept, mean over layers, %',
                'Test accuracy in %')  # fmt: skip
  drawing.savefig(path)


def save(path: pathlib.Path, document: dict[str, Any]) -> None:
  """The result file, its table and its plots."""
  header = report.header(f'python benchmarks/{NAME}.py')
  document = {**header, 'rows': document['rows']}
  workdir.write_json(path, document)
  workdir.write_text(path.with_suffix('.md'), page(document))
  for dataset in TITLES:
    plot(path.with_name(f'{NAME}_{dataset}.png'), document, dataset)


def measured(row: dict[str, Any], document: dict[str, Any], dense: Dense) -> dict[str, Any]:
  """The row with its numbers, and its difference to the dense row."""
  row = {**row, **dense.evaluate(row['variant'], row['nominal_keep_ratio'])}
  others = [
    r for r in document['rows'] if r['dataset'] == row['dataset'] and r['variant'] == 'dense' and r['metrics']
  ]
  gain = report.difference([row], others)
  return {**row, 'difference': gain and {**gain._asdict(), 'no_worse': gain.no_worse}}


def main() -> None:
  """Runs the missing cells in order."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, default=10**6, help='stop after this many cells')
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  options = parser.parse_args()
  path = pathlib.Path(options.results) / f'{NAME}.json'
  known = {row['name']: row for row in report.read(path)['rows'] if row['metrics']}
  document = {'rows': [known.get(row['name'], row) for row in rows()]}
  missing = [place for place, row in enumerate(document['rows']) if not row['metrics']]
  checkpoints: dict[str, Dense] = {}
  for count, place in enumerate(missing[: options.rows], 1):
    row = document['rows'][place]
    if row['dataset'] not in checkpoints:
      made = accuracy.run(Row(row['dataset'], 'dense', 'dense', 0), options.runs)
      if not made['metrics']:
        raise SystemExit(f'error: the dense run on {row["dataset"]} failed: {made["reason"]}')
      checkpoints[row['dataset']] = Dense(row['dataset'], options.runs)
    document['rows'][place] = row = measured(row, document, checkpoints[row['dataset']])
    print(f'[{count}/{len(missing)}] {row["name"]}: accuracy {row["metrics"]["accuracy"]:.4f}, '
          f'keep ratio {row["keep_ratio"]:.3f}', flush=True)  # fmt: skip
    save(path, document)
  save(path, document)
  print(path.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
