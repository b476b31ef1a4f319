"""Which rule picks the better tokens? All rules on the same dense checkpoints, without training.

    python benchmarks/selection_rules.py [--rows=N] [--runs=DIR] [--results=DIR]

The ratio p of the schedule t_{l+1} = floor(p t_l) is solved so that its mean over the layers is the nominal
keep ratio; three of the rules then keep more than that, so accuracy is drawn against what was measured.
Everything is read on the test split and nothing is chosen by it. Goes on with the same command after any
stop; makes the dense runs it needs.
"""

import argparse
import pathlib
import sys
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import accuracy, pictures, report
from benchmarks.studies import DATASETS, Row
from tokenprune_jax import workdir

NAME = 'selection_rules'
RULES = {
  'rank': 'fuzzy paper, rank', 'protect': 'fuzzy paper, protect', 'complement': 'fuzzy paper, complement',
  'magnitude': 'attention, mean over heads', 'entropy': 'entropy of attention', 'norm': 'norm of the state',
  'random': 'random',
}  # fmt: skip
COLOURS = dict(zip(RULES, ('#4477aa', '#228833', '#66ccee', '#ee6677', '#aa3377', '#b8860b', '#9aa0aa')))
KEEP = (0.7, 0.5, 0.3, 0.9)  # nominal, in the order in which they are worth having
TITLES = {'bbc': 'BBC News', 'imdb': 'IMDB'}
TEST_LIMIT = 1000  # documents of a dataset's test split


NOTE = """# Which rule picks the better tokens?

All rules on the same dense MiniLM-L6 checkpoint (seed 0), without any training with the rule. Columns:
nominal keep ratio, mean over layers. Cells: test accuracy in percent (keep ratio measured), and below it the
difference to dense in points, with the 95% interval of the paired bootstrap over at most 1,000 test documents.
"""


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
    'dataset': dataset,
    'model': DATASETS[dataset].model,
    'method': 'dense' if rule == 'dense' else 'fuzzy',
    'variant': rule,
    'name': f'{dataset} {rule} {keep}',
    'seed': 0,
    'split': 'test',
    'nominal_keep_ratio': keep,
    'ratio': None,
    'difference': None,
    'reason': report.NOT_RUN,
    **dict.fromkeys(accuracy.MEASURED),
  }


class Dense:
  """The dense checkpoint of a dataset and its test split, read once."""

  def __init__(self, dataset: str, runs: str):
    from benchmarks.trained import Trained  # not above: --help needs no JAX

    folder = accuracy.workdir_of(Row(dataset, 'dense', 'dense', 0), runs)
    # Fewer documents make another sample of the same test split, which no run has trained on.
    self.trained = Trained(folder, test_limit=TEST_LIMIT)

  def evaluate(self, rule: str, keep: float) -> dict[str, Any]:
    """The measured part of a row."""
    ratio = schedule_ratio(keep, self.trained.exported.config.depth)
    spec = {'name': 'none'} if rule == 'dense' else {'name': 'fuzzy', 'rule': rule, 'ratio': ratio}
    return {**self.trained.evaluate(spec), 'ratio': ratio}


def table(document: dict[str, Any], dataset: str) -> str:
  """Rules by nominal keep ratio: accuracy (keep ratio measured), and the difference to dense."""
  places = {(row['dataset'], row['variant'], row['nominal_keep_ratio']): row for row in document['rows']}
  columns = sorted(KEEP, reverse=True)
  lines = [['', *(f'{keep:.0%}' for keep in columns)]]
  for rule, title in RULES.items():
    found = [places[dataset, rule, keep] for keep in columns]
    lines.append([title, *map(score, found)])
    lines.append(['− dense [95%]', *(report.points(row['difference']) for row in found)])
  return report.table(lines)


def score(row: dict[str, Any]) -> str:
  """A cell of the table."""
  return f'{100 * row["metrics"]["accuracy"]:.1f} ({row["keep_ratio"]:.0%})' if row['metrics'] else '–'


def page(document: dict[str, Any]) -> str:
  """results/selection_rules.md."""
  parts = [NOTE]
  for dataset, title in TITLES.items():
    dense = next(row for row in document['rows'] if row['name'] == f'{dataset} dense 1.0')
    level = f'{100 * dense["metrics"]["accuracy"]:.1f}%' if dense['metrics'] else 'not run yet'
    parts.append(f'## {title} (dense: {level})\n\n{table(document, dataset)}')
    parts.append(f'![{title}]({NAME}_{dataset}.png)\n')
  missing = sum(not row['metrics'] for row in document['rows'])
  parts += [f'{missing} cells are not run yet.\n'] if missing else []
  return '\n'.join([*parts, report.origin(document)])


def plot(path: pathlib.Path, document: dict[str, Any], dataset: str) -> None:
  """Accuracy against measured keep ratio: a line a rule."""
  ran = [row for row in document['rows'] if row['dataset'] == dataset and row['metrics']]
  drawing, axes = pictures.figure()
  for rule, title in RULES.items():
    line = sorted((row['keep_ratio'], row['metrics']['accuracy']) for row in ran if row['variant'] == rule)
    if line:
      x, y = zip(*line)
      axes.plot(
        [100 * value for value in x], [100 * value for value in y], 'o-', color=COLOURS[rule], label=title
      )
  for row in ran:
    if row['variant'] == 'dense':
      pictures.level(axes, 100 * row['metrics']['accuracy'])
  pictures.legend(axes)
  title = f'{TITLES[dataset]}: accuracy without training, by rule'
  pictures.titled(axes, title, 'Keys kept, mean over layers, %', 'Test accuracy in %')
  drawing.savefig(path)


def draw(path: pathlib.Path, document: dict[str, Any]) -> None:
  """The table and the plots beside the result file."""
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
  before = report.read(path)
  known = {row['name']: row for row in before['rows'] if row['metrics']}
  found = [known.get(row['name'], row) for row in rows()]
  missing = [place for place, row in enumerate(found) if not row['metrics']]
  # What is only drawn again comes from where it came from.
  drawn = known and not missing[: options.rows]
  document = {**(before if drawn else report.header(f'python benchmarks/{NAME}.py')), 'rows': found}
  checkpoints: dict[str, Dense] = {}
  for count, place in enumerate(missing[: options.rows], 1):
    row = document['rows'][place]
    if row['dataset'] not in checkpoints:
      checkpoints[row['dataset']] = checkpoint(row['dataset'], options.runs)
    row = document['rows'][place] = measured(row, document, checkpoints[row['dataset']])
    workdir.write_json(path, document)
    scores = f'accuracy {row["metrics"]["accuracy"]:.4f}, keep ratio {row["keep_ratio"]:.3f}'
    print(f'[{count}/{len(missing)}] {row["name"]}: {scores}', flush=True)
  draw(path, document)
  print(path.with_suffix('.md').read_text(encoding='utf-8'))


def checkpoint(dataset: str, runs: str) -> Dense:
  """The dataset's dense checkpoint; trains it, or goes on with it, where it is not finished."""
  made = accuracy.run(Row(dataset, 'dense', 'dense', 0), runs)
  if not made['metrics']:
    raise SystemExit(f'error: the dense run on {dataset} failed: {made["reason"]}')
  return Dense(dataset, runs)


if __name__ == '__main__':
  main()
