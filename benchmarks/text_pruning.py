"""Methods on texts, all on one footing: learned pruning (LTP, STTABT, PoWER-BERT, top-k, …), or exits and both.

    python benchmarks/text_pruning.py [--study=text_pruning|exits] [--data=data] [--runs=runs] [--rows=N] [--results=results]
                                      [--datasets=DATASETS] [--train_only=DATASETS] [--measure_only]

One dense MiniLM-L6 a dataset and seed, which every method starts from (configs/prune.py); what takes a budget is trained at
about 0.4 of dense's multiply-adds, and then set to others on the validation split, without training. The test split only
reports. `--data` holds sst2/ and ag_news/, each with train, valid and test.jsonl.gz: lines {"text": …, "label": …}. The
queue goes on with the same command after any stop, needs no run again of what it has measured, and writes
results/STUDY.json, its table and its plots. `--datasets` runs and measures those alone, and a second process may train
the runs of others beside it (`--train_only=ag_news,pooled`), which the queue later only measures; `--measure_only` trains
nothing.

The study of pruning asks besides: what a dense checkpoint loses without any training, on these and BBC News; how near a
distilled ApproxNet comes to the true attention, one of all texts pooled and one that went on from there on the dataset's own
dense run; and how methods trained on the shortest half of the texts do on longer ones.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import accuracy, report, speed, text_page
from benchmarks.studies import Row
from benchmarks.text_runs import (
  CORPORA,
  KEEP,
  MIXES,
  PLANS,
  UNTRAINED,
  Plan,
  approx_row,
  dense_row,
  own_approx_row,
  placed,
  rows,
  write_corpora,
)
from benchmarks.trained import Trained
from tokenprune_jax import workdir
from tokenprune_jax.errors import UserError

QUARTERS = 4  # of the test texts, by length
FOUND_ON = 256  # validation documents that a budget is met on
UNTRAINED_ON = ('sst2', 'ag_news', 'bbc')  # whose dense runs are pruned without training
FIXED = (
  'dense',
  'dense_cls',
  'dense_more',
  'dense_states',
  'student',
  'student_third',
)  # whose cost cannot be set


# ------------------------------------------------------------------------------------------------------ Points
def empty(row: Row, budget: float | None) -> dict[str, Any]:
  """A point that was not measured. budget: None as trained."""
  model = CORPORA[row.dataset].weights if row.dataset in CORPORA else accuracy.MODEL
  return {
    'dataset': row.dataset, 'model': model, 'method': row.name, 'variant': 'trained' if budget is None else 'set',
    'name': row.name, 'seed': row.seed, 'split': 'test', 'budget': budget, 'reducer': None, 'valid': None, 'reachable': True,
    'reason': report.NOT_RUN, **dict.fromkeys(accuracy.MEASURED),
  }  # fmt: skip


def settled(point: Mapping[str, Any]) -> bool:
  """Whether nothing is left to do: measured, or a budget that no setting meets."""
  return bool(point['metrics']) or not point['reachable']


def key(point: Mapping[str, Any]) -> tuple:
  """What tells points apart."""
  return tuple(point[name] for name in ('dataset', 'name', 'variant', 'seed', 'budget'))


def points_of(row: Row, plan: Plan) -> list[dict[str, Any]]:
  """The points of a run, not measured."""
  if row.name == 'approx':
    return []
  budgets = () if row.name in FIXED or row.dataset not in plan.seeds else plan.budgets_of(row.name)
  return [empty(row, None), *(empty(row, budget) for budget in budgets)]


def measured(point: dict[str, Any], trained: Trained, **fields: Any) -> dict[str, Any]:
  """A point of a finished run with its numbers, or the reason why there are none. fields: of its method, changed."""
  from tokenprune_jax import stages

  spec = {**trained.exported.reducer_spec, **fields}
  if point['budget'] is not None:
    try:
      spec = stages.at_budget(spec, point['budget'], trained.validation(spec))
    except UserError as error:
      return {**point, 'reason': str(error), 'reachable': False}
  valid = trained.evaluate(spec, 'valid')
  return {
    **point, **trained.evaluate(spec), 'reducer': spec,
    'valid': {**valid['metrics'], 'mac_ratio': valid['mac_ratio']},
  }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Untrained
def untrained_points() -> Iterator[dict[str, Any]]:
  """Every setting without training, not measured: dense checkpoints of seed 0."""
  for dataset in UNTRAINED_ON:
    for keep in KEEP:
      for name in UNTRAINED:
        yield {**empty(Row(dataset, name, '', 0), keep), 'variant': 'untrained', 'mix': None}
      for mix in MIXES if keep == KEEP[1] else ():
        yield {**empty(Row(dataset, f'abt {mix}', '', 0), keep), 'variant': 'untrained', 'mix': mix}


def untrained(
  point: dict[str, Any], dense: Trained, approx: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """A point of a dense checkpoint under a method that it was not trained with.

  approx: parameters of the 'distilled' ApproxNet, the dataset's own, and of the 'pooled' one.
  """
  from tokenprune_jax import schedule

  name, keep = point['name'].split()[0], point['budget']
  _, spec = UNTRAINED[name]
  spec, depth = dict(spec), dense.exported.config.depth
  if spec['name'] == 'topk':
    spec['shares'] = tuple(round(share, 4) for share in schedule.manual(keep, depth))
  else:
    spec |= {'keep': keep, 'mix': 0.1 if point['mix'] is None else point['mix']}
  params = with_approx(dense, spec, approx['pooled' if name == 'pooled' else 'distilled'])
  return {**point, **dense.evaluate(spec, params=params), 'reducer': spec}


def with_approx(dense: Trained, spec: Mapping[str, Any], approx: Mapping[str, Any]) -> Any:
  """The dense parameters with the ApproxNet that `spec` needs: the given one, or the encoder itself.

  Its own classifier, which a plan does not read, is empty: it was trained for other labels.
  """
  if spec['name'] != 'sttabt':
    return dense.params
  import jax.numpy as jnp
  from jax import tree

  from tokenprune_jax import initial

  shapes = initial.param_shapes(dense.model(spec))['reducer']['approx']
  encoder = dense.params['encoder'] if spec.get('factor', 4) == 1 else approx['approx']['encoder']
  rest = {name: part for name, part in shapes.items() if name != 'encoder'}
  return {
    **dense.params,
    'reducer': {'approx': {**tree.map(lambda x: jnp.zeros(x.shape), rest), 'encoder': encoder}},
  }


def divergences(dense: Trained, approx: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """KL(true attention || ApproxNet's), mean over rows, heads, layers and validation texts, of each; and at random."""
  import jax

  from tokenprune_jax import approx_net
  from tokenprune_jax.attention import soft_weights
  from tokenprune_jax.encoder import Encoder
  from tokenprune_jax.reducer import Inputs
  from tokenprune_jax.reducers import sttabt

  config = dense.exported.config
  method = sttabt.Method(mode='topk')
  narrow = method.narrow(config)
  sttabt_model = dense.model({'name': 'sttabt', 'mode': 'topk'})
  fresh = jax.jit(lambda key: sttabt_model.init_params(key)['reducer'])(jax.random.key(1))

  def maps(config, params, batch):
    inputs = Inputs(batch['ids'], batch['mask'], batch['types'], {}, 2, config)
    memory = Encoder(config, approx_net.Watcher()).apply({'params': params}, inputs)[1]
    seen = batch['mask'][:, None, None].astype(np.float32)
    return [soft_weights(memory[f'scores_{l}'], seen) for l in range(1, config.depth + 1)]

  @jax.jit
  def apart(batch, student):
    valid = batch['mask'].astype(np.float32)
    pairs = zip(
      maps(config, dense.params['encoder'], batch), maps(narrow, student['approx']['encoder'], batch)
    )
    return sum(approx_net.map_divergence(a, b, valid) for a, b in pairs) / config.depth

  found = {}
  for name, student in (*approx.items(), ('random', fresh)):
    batches = dense.validation({'name': 'none'}).batches()
    found[name] = float(np.mean([float(apart(batch, student)) for batch in batches]))
  return found


def quartiles(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Accuracy and cost by quartile of length, of a run's own test predictions."""
  lines = (folder / 'predictions_test.jsonl').read_text(encoding='utf-8').splitlines()
  records = [json.loads(line) for line in lines]
  lengths = sorted(record['length'] for record in records)
  return report.by_length(records, [int(part[-1]) for part in np.array_split(lengths, QUARTERS)])


# -------------------------------------------------------------------------------------------------------- Queue
class Study:
  """The result file as it grows."""

  def __init__(self, options: argparse.Namespace, command: str):
    self.options, self.plan = options, PLANS[options.study]
    self.path = pathlib.Path(options.results) / f'{options.study}.json'
    self.runs = [placed(row, options) for row in rows(self.plan)]
    points = [point for row in self.runs for point in points_of(row, self.plan)]
    points += list(untrained_points()) if self.plan.extras else []
    before = report.read(self.path)
    known = {key(point): point for point in before['rows'] if settled(point)}
    self.document = {
      **report.header(command), 'rows': [self.kept(known.get(key(point), point)) for point in points],
      'divergences': before.get('divergences', {}), 'quartiles': before.get('quartiles', {}),
    }  # fmt: skip

  def kept(self, point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as the file has it: with its parts by length only where the study tells gains by these."""
    return {name: value for name, value in point.items() if name != 'by_length' or self.plan.lengths}

  def put(self, place: int, point: Mapping[str, Any]) -> None:
    """Writes a measured point down."""
    self.document['rows'][place] = self.kept(point)
    tell(point)
    report.write(self.path, self.document)

  def save(self) -> None:
    """The file, its table and its plots."""
    report.write(self.path, self.document)
    name = self.options.study
    workdir.write_text(self.path.with_suffix('.md'), text_page.page(self.document, self.plan, name))
    for dataset in self.plan.seeds:
      text_page.plots(self.path.with_name(f'{name}_{dataset}.png'), self.document, self.plan, dataset)

  def missing(self, row: Row) -> list[int]:
    """Places of a run's points that are not measured."""
    own = row.dataset, row.name, row.seed
    return [
      place for place, point in enumerate(self.document['rows'])
      if (point['dataset'], point['name'], point['seed']) == own and not settled(point) and point['variant'] != 'untrained'
    ]  # fmt: skip

  def folder(self, row: Row) -> pathlib.Path:
    """A run's workdir."""
    return pathlib.Path(accuracy.workdir_of(row, self.options.runs))

  def done(self, row: Row) -> bool:
    """Whether a run is trained."""
    return (self.folder(row) / 'result.json').exists()

  def waiting(self) -> list[Row]:
    """The runs to train or to measure, in order. A run whose points are all there is only needed by those it begins."""
    needed = set()
    if self.plan.extras:
      for dataset in UNTRAINED_ON:
        if self.untrained_places(dataset) or dataset not in self.document['divergences']:
          asked = dense_row(dataset, 0), approx_row(), own_approx_row(dataset, 0)
          needed |= {self.folder(placed(row, self.options)) for row in asked}
    found = []
    for row in reversed(self.runs):  # a run stands behind those that it starts from
      told = row.dataset != 'ag_short' or row.name in self.document['quartiles']
      if self.missing(row) or not told or (self.folder(row) in needed and not self.done(row)):
        found.append(row)
        if not self.done(row):
          needed |= {pathlib.Path(folder) for folder in row.variant.split(',')[1:]}
    return found[::-1]

  def train(self, datasets: list[str]) -> None:
    """Runs the rows of these datasets that are not finished."""
    for row in self.waiting():
      if row.dataset in datasets and not self.done(row):
        print(f'{row.dataset} {row.name} seed {row.seed}', flush=True)
        accuracy.run(row, self.options.runs)

  def finish(self, row: Row) -> None:
    """Runs a row where it is not finished, and measures its points."""
    places = self.missing(row)
    if not self.done(row):
      made = accuracy.run(row, self.options.runs)
      if not made['metrics']:
        for place in places:
          self.document['rows'][place]['reason'] = made['reason']
        return
    trained = Trained(self.folder(row), FOUND_ON) if places else None
    for place in places:
      self.put(place, measured(self.document['rows'][place], trained))
    if row.dataset == 'ag_short' and row.name not in self.document['quartiles']:
      self.document['quartiles'][row.name] = quartiles(self.folder(row))

  def untrained_places(self, dataset: str) -> list[int]:
    """Places of the points without training that are not measured."""
    return [
      place for place, point in enumerate(self.document['rows'])
      if point['variant'] == 'untrained' and point['dataset'] == dataset and not point['metrics']
    ]  # fmt: skip

  def without_training(self, datasets: Collection[str]) -> None:
    """Dense checkpoints of these datasets under methods that they were not trained with."""
    for dataset in (name for name in UNTRAINED_ON if name in datasets):
      row = dense_row(dataset, 0)
      students = {'distilled': own_approx_row(dataset, 0), 'pooled': approx_row()}
      places = self.untrained_places(dataset)
      ready = all(map(self.done, (row, *students.values())))
      if not ready or not (places or dataset not in self.document['divergences']):
        continue
      dense = Trained(self.folder(row), FOUND_ON)
      approx = {name: Trained(self.folder(found)).params['reducer'] for name, found in students.items()}
      for place in places:
        self.put(place, untrained(self.document['rows'][place], dense, approx))
      if dataset not in self.document['divergences']:
        self.document['divergences'][dataset] = divergences(dense, approx)


def tell(point: Mapping[str, Any]) -> None:
  """One line about a point."""
  where = (
    f'{point["dataset"]} {point["name"]} seed {point["seed"]} {point["variant"]} {point["budget"] or ""}'
  )
  said = point['reason'] or (
    f'accuracy {point["metrics"]["accuracy"]:.4f}, MACs {point["mac_ratio"]:.3f}, keys {point["keep_ratio"]:.3f}'
  )
  print(f'{where}: {said}', flush=True)


def main() -> None:
  """Runs and points that are missing, in order."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--study', default='text_pruning', choices=sorted(PLANS))
  parser.add_argument('--data', default='data', help='folder of the datasets')
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--rows', type=int, default=10**6, help='stop after this many runs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  parser.add_argument(
    '--datasets', type=speed.words, default=[], help='run and measure the rows of these alone'
  )
  parser.add_argument(
    '--train_only', type=speed.words, default=[], help='train the runs of these datasets and measure nothing'
  )
  parser.add_argument(
    '--measure_only', action='store_true', help='measure what is trained, and train nothing'
  )
  options = parser.parse_args()
  try:
    write_corpora(options)
  except UserError as error:
    raise SystemExit(f'error: {error}') from error
  study = Study(options, f'python benchmarks/text_pruning.py --study={options.study}')
  datasets = {row.dataset for row in study.runs}
  for flag, named in (('datasets', options.datasets), ('train_only', options.train_only)):
    if unknown := set(named) - datasets:
      parser.error(f'--{flag}: the study has no runs on {", ".join(sorted(unknown))}')
  if options.train_only:
    study.train(options.train_only)
    return
  chosen = options.datasets or datasets
  waiting = [
    row for row in study.waiting() if row.dataset in chosen and (study.done(row) or not options.measure_only)
  ]
  for number, row in enumerate(waiting[: options.rows], 1):
    print(f'[{number}/{len(waiting)}] {row.dataset} {row.name} seed {row.seed}', flush=True)
    study.finish(row)
    study.save()
  if study.plan.extras:
    study.without_training(chosen)
  study.save()
  print(study.path.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
