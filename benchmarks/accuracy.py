"""Accuracy studies: a queue of configs x seeds that can be stopped anywhere; the same command goes on.

    python benchmarks/accuracy.py --study=bbc_fuzzy [--rows=N] [--runs=DIR] [--results=DIR]

Each row is one run of main.py in its own workdir DIR/DATASET/NAME-seedS, which resumes by itself; all studies
share these folders, so a dense run serves every table. A finished row goes into results/NAME.json at once and
is not run again; the table and the plots are drawn from that file. To measure again what is already in it,
name another --results.
"""

import argparse
import json
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.studies import DATASETS, METHODS, STUDIES, Dataset, Row
from tokenprune_jax import workdir
from tokenprune_jax.errors import UserError

MODEL = 'minilm-l6'  # of datasets that no study of this file is about
KEPT = ('keep_ratio', 'keep_ratio_by_layer', 'mac_ratio', 'macs_per_example', 'dense_macs_per_example')
MEASURED = (
  'metrics', *KEPT, 'time_ratio', 'memory_ratio', 'seconds', 'examples', 'correct', 'split_digest', 'commit',
)  # fmt: skip


def dataset_of(row: Row) -> Dataset:
  """What all runs on the row's dataset share; nothing but the model where the row names its own config."""
  return DATASETS.get(row.dataset, Dataset(row.config, MODEL))


def arguments(row: Row, runs: str) -> list[str]:
  """The arguments of main.py that make this row."""
  dataset = dataset_of(row)
  # Time does not depend on the seed: one seed is enough.
  overrides = (
    *dataset.overrides,
    *row.overrides,
    f'seed={row.seed}',
    f'eval.timing={row.timed and row.seed == 0}',
  )
  return [f'--config={row.config or dataset.config}:{row.variant}', f'--workdir={workdir_of(row, runs)}',
          *(f'--config.{override}' for override in overrides)]  # fmt: skip


def workdir_of(row: Row, runs: str) -> str:
  """Where a row runs, whatever study asks for it."""
  return f'{runs}/{row.dataset}/{row.name}-seed{row.seed}'


def empty(row: Row, runs: str) -> dict[str, Any]:
  """A row that has not run: every key there is, null where nothing is measured."""
  return {
    'dataset': row.dataset,
    'model': dataset_of(row).model,
    'method': METHODS.get(row.name, (row.name,))[0],
    'variant': row.variant,
    'name': row.name,
    'seed': row.seed,
    'split': 'test',
    'command': shlex.join(['python', 'main.py', *arguments(row, runs)]),
    'reason': report.NOT_RUN,
    **dict.fromkeys(MEASURED),
  }


def merged(study: str, document: dict[str, Any], runs: str) -> dict[str, Any]:
  """The document with every row of the study in order; rows measured by the same command are kept."""
  known = {row['command']: row for row in document['rows'] if row['metrics']}
  fresh = [empty(row, runs) for row in STUDIES[study].rows]
  return {**document, 'rows': [known.get(row['command'], row) for row in fresh]}


def run(row: Row, runs: str) -> dict[str, Any]:
  """Runs one row, or goes on with it, and returns it measured, or with the reason why it is not."""
  folder = pathlib.Path(workdir_of(row, runs))
  wait_until_free(folder)
  start = time.monotonic()
  code, message = call([sys.executable, str(report.ROOT / 'main.py'), *arguments(row, runs)])
  if code:
    return {**empty(row, runs), 'reason': f'main.py ended with code {code}: {message}'}
  return {**collect(row, runs), 'seconds': round(time.monotonic() - start, 1)}


def wait_until_free(folder: pathlib.Path) -> None:
  """Returns when no run is live in the folder: a queue that was killed leaves its last one working on."""
  told = False
  while True:
    try:
      workdir.lock(folder).close()
      return
    except UserError as error:
      if not told:
        print(f'waiting: {error}', flush=True)
      told = True
      time.sleep(5)


def call(command: list[str]) -> tuple[int, str]:
  """Runs a command, its progress shown. Returns (exit code, last line); SIGTERM and Ctrl-C are passed on."""
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors='replace')
  stopped = []

  def stop(number: int, frame: Any) -> None:
    stopped.append(number)
    process.terminate()

  earlier = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
  last = ''
  for line in process.stderr or ():
    sys.stderr.write(line)
    last = line.strip() or last
  code = process.wait()
  for number, handler in earlier.items():
    signal.signal(number, handler)
  if stopped:
    raise SystemExit('stopped; the same command goes on.')
  return code, last


def collect(row: Row, runs: str) -> dict[str, Any]:
  """A row from what its finished run left in its workdir."""
  folder = pathlib.Path(workdir_of(row, runs))
  result = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
  lines = (folder / 'predictions_test.jsonl').read_text(encoding='utf-8').splitlines()
  timed = (result['timing'] or {}).get('models', {})
  bytes_of = {name: timed[name]['compiled_peak_bytes'] for name in timed}
  return {
    **empty(row, runs),
    **{key: result[key] for key in KEPT},
    'metrics': {name: value for name, value in result['metrics'].items() if name != 'confusion'},
    'time_ratio': ratio(result['dense_seconds_per_example'], result['seconds_per_example']),
    'memory_ratio': ratio(bytes_of.get('model'), bytes_of.get('dense')),
    **report.correctness([json.loads(line) for line in lines]),
    'commit': report.commit(),
    'reason': None,
  }  # fmt: skip


def ratio(above: float | None, below: float | None) -> float | None:
  """above / below where both were measured."""
  return above / below if above and below else None


def save(path: pathlib.Path, document: dict[str, Any], command: str) -> None:
  """Writes the result file whole, with its summary and where it comes from now."""
  workdir.write_json(path, {**report.header(command), 'rows': document['rows'],
                            'summary': report.summarise(document['rows'])})  # fmt: skip


def main() -> None:
  """Runs what is missing of a study, in order, and draws it."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--study', required=True, choices=sorted(STUDIES))
  parser.add_argument('--rows', type=int, default=10**6, help='stop after this many runs')
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  options = parser.parse_args()
  study, path = STUDIES[options.study], pathlib.Path(options.results) / f'{options.study}.json'
  command = f'python benchmarks/accuracy.py --study={options.study}'
  document = merged(options.study, report.read(path), options.runs)
  missing = [place for place, row in enumerate(document['rows']) if not row['metrics']]
  for count, place in enumerate(missing[: options.rows], 1):
    row = study.rows[place]
    print(f'[{count}/{len(missing)}] {row.dataset} {row.name} seed {row.seed}', flush=True)
    document['rows'][place] = run(row, options.runs)
    save(path, document, command)
    report.render(options.study, study, path.parent)
  if not missing or not options.rows:
    report.render(options.study, study, path.parent)
  print(path.with_suffix('.md').read_text(encoding='utf-8'))


if __name__ == '__main__':
  main()
