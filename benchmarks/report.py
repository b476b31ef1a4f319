"""What studies leave in results/: NAME.json, and the table and plots NAME* that are made from it alone."""

import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import pictures
from benchmarks.studies import METHODS, Paper, Study
from tokenprune_jax import metrics, workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'transformers', 'numpy')
NOT_RUN = 'not run yet'


# ------------------------------------------------------------------------------------------------------- JSON
def header(command: str) -> dict[str, Any]:
  """How a result came about: command, commit, machine, versions."""
  return {'command': command, 'commit': commit(), 'machine': machine(), 'versions': versions()}


def commit() -> str | None:
  """The commit that is checked out, '+' where files of it were changed since; None outside a repository."""
  git = ['git', '-C', str(ROOT)]
  found = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True)
  if found.returncode:
    return None
  # What a number depends on; results/ changes while a study runs.
  source = ['tokenprune_jax', 'configs', 'main.py']
  changed = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', *source], capture_output=True)
  return found.stdout.strip() + ('+' if changed.returncode else '')


def command() -> str:
  """What was called, from the root of the repository; where the runs lie is told as their default."""
  given = ['--runs=runs' if argument.startswith('--runs=') else argument for argument in sys.argv[1:]]
  return shlex.join(['python', f'benchmarks/{pathlib.Path(sys.argv[0]).name}', *given])


def made_by() -> dict[str, str | None]:
  """Commit, command and processor of a number that is written now."""
  return {'commit': commit(), 'command': command(), 'cpu': processor()}


# Widest first.
UNITS = {
  'amx_tile': 'AMX',
  'avx512_bf16': 'AVX-512, bfloat16',
  'avx512f': 'AVX-512',
  'avx2': 'AVX2',
}


def machine() -> dict[str, Any]:
  """Processor, cores this process may use, memory in GiB, system and settings of the allocator."""
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
  return {'cpu': processor(), 'cores': cores(), 'memory_gib': round(memory, 1), 'system': platform.platform(),
          'allocator': allocator()}  # fmt: skip


def allocator() -> dict[str, str]:
  """What the environment says about memory: on a CPU a training step depends on how freed memory is kept."""
  found = {name: os.environ[name] for name in ('GLIBC_TUNABLES', 'MALLOC_CONF') if os.environ.get(name)}
  preloaded = [os.path.basename(path) for path in os.environ.get('LD_PRELOAD', '').split(':') if path]
  return {**found, 'LD_PRELOAD': ' '.join(preloaded)} if preloaded else found


def processor() -> str:
  """The processor's name and its widest units for products, where the system lists them: a name may hide generations."""
  listing = pathlib.Path('/proc/cpuinfo')  # Linux; elsewhere platform knows
  lines = listing.read_text(encoding='utf-8').splitlines() if listing.exists() else []
  found = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
  name = found.get('model name') or platform.processor() or platform.machine()
  flags = found.get('flags', '').split()
  widest = next((unit for flag, unit in UNITS.items() if flag in flags), '')
  return f'{name} ({widest})' if widest else name


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def versions() -> dict[str, str]:
  """Python and the packages that numbers depend on."""
  found = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {'python': platform.python_version(), **found}


def read(path: pathlib.Path) -> dict[str, Any]:
  """A result file; an empty one where there is none."""
  return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {'rows': []}


def write(path: pathlib.Path, document: Mapping[str, Any]) -> None:
  """Writes a study's file at once, each of its `rows` in one line: so it stays small, and a new row is one line more."""
  rows = ',\n'.join('    ' + json.dumps(row) for row in document['rows'])
  around = json.dumps({**document, 'rows': []}, indent=2)
  workdir.write_text(path, around.replace('"rows": []', f'"rows": [\n{rows}\n  ]', 1) + '\n')


def resumed(
  path: pathlib.Path, command: str, key: Callable[[dict[str, Any]], Any], wanted: Sequence[Any]
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any]]:
  """(how the result comes about, rows that the same command has measured before, which of `wanted` they lack).

  key: what a row is the result of. Where nothing is missing, the file is as it was; rows of several commits say their own.
  """
  before = read(path)
  rows = before['rows'] if before.get('command') == command else []
  missing = [item for item in wanted if item not in set(map(key, rows))]
  return header(command) if missing else before, rows, missing


# ------------------------------------------------------------------------------------------------ Correctness
def correctness(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Which documents, or whole sentences, a run got right, short enough for a result file, and a digest of the test set.

  Returns {'examples', 'correct' (hex digits, a bit a document in the split's order), 'split_digest' (of the
  labels; of tagged sentences their numbers of words)}.
  """
  if records and 'tags' in records[0]:
    right = np.array([record['tags'] == record['predicted'] for record in records])
    labels = np.array([len(record['tags']) for record in records])
  else:
    labels = np.array([record['label'] for record in records])
    right = labels == np.array([record['prediction'] for record in records])
  digest = f'{zlib.crc32(labels.astype("<i4").tobytes()):08x}'
  return {'examples': len(records), 'correct': np.packbits(right).tobytes().hex(), 'split_digest': digest}


def by_length(records: Sequence[Mapping[str, Any]], limits: Sequence[int | None]) -> list[dict[str, Any]]:
  """Accuracy and mean multiply-adds of the texts up to each length in tokens, and above the one before (None: all above).

  Classes alone, no tags; both are null where no text is that long.
  """
  length, macs = (np.array([record[key] for record in records]) for key in ('length', 'macs'))
  hit = np.array([record['label'] == record['prediction'] for record in records])
  found, below = [], 0
  for limit in limits:
    inside = (length > below) & (length <= (np.inf if limit is None else limit))
    below = limit or below
    some = bool(inside.any())
    found.append({
      'longest': limit, 'examples': int(inside.sum()), 'accuracy': float(hit[inside].mean()) if some else None,
      'macs': float(macs[inside].mean()) if some else None,
    })  # fmt: skip
  return found


def right(correct: str, examples: int) -> np.ndarray:
  """[N] bool of `correctness`."""
  bits = np.unpackbits(np.frombuffer(bytes.fromhex(correct), np.uint8))
  return bits[:examples].astype(bool)


def difference(
  rows: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]]
) -> metrics.Difference | None:
  """Paired bootstrap of rows against dense rows of the same seeds and documents; None without a pair."""
  by_seed = {row['seed']: row for row in dense}
  pairs = [(row, by_seed[row['seed']]) for row in rows if row['seed'] in by_seed]
  if not pairs:
    return None
  digests = {row['split_digest'] for pair in pairs for row in pair}
  if len(digests) > 1:
    raise SystemExit(
      f'error: the runs were tested on different documents (digests {", ".join(sorted(digests))}); '
      'their difference means nothing. Run them again with one data setting.'
    )
  own, theirs = (tuple((row['correct'], row['examples']) for row in side) for side in zip(*pairs))
  return between(own, theirs)


@functools.lru_cache(maxsize=4096)
def between(own: Sequence[tuple[str, int]], theirs: Sequence[tuple[str, int]]) -> metrics.Difference:
  """Paired bootstrap of (which answers are right, of how many), a pair a seed; a page asks for the same one several times."""
  return metrics.paired_bootstrap(*(np.stack([right(*one) for one in side]) for side in (own, theirs)))


# ---------------------------------------------------------------------------------------------------- Summary
def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """One dict a name, in the rows' order: means over the seeds that ran, as shares; None where none did."""
  found = []
  for name in dict.fromkeys(row['name'] for row in rows):
    ran = [row for row in rows if row['name'] == name and row['metrics']]
    dense = [row for row in rows if row['name'] == 'dense' and row['metrics']]
    gain = difference(ran, dense) if name != 'dense' else None
    found.append({
      'name': name,
      'seeds': [row['seed'] for row in ran],
      **{metric: mean_std([row['metrics'][metric] for row in ran])
         for metric in ('accuracy', 'macro_f1', 'macro_f1_batch16')},
      'difference': gain and {**gain._asdict(), 'no_worse': gain.no_worse},
      'keep_ratio': mean([row['keep_ratio'] for row in ran]),
      'mac_ratio': mean([row['mac_ratio'] for row in ran]),
      'time_ratio': mean([row['time_ratio'] for row in ran]),
    })  # fmt: skip
  return found


def mean_std(values: Sequence[float]) -> dict[str, float | None] | None:
  """{'mean', 'std'} over seeds; None where nothing ran."""
  return dict(zip(('mean', 'std'), metrics.mean_and_std(values))) if values else None


def mean(values: Sequence[float | None]) -> float | None:
  """Mean of the values that were measured."""
  known = [value for value in values if value is not None]
  return float(np.mean(known)) if known else None


# ------------------------------------------------------------------------------------------------------ Table
def percent(value: Mapping[str, float | None] | None) -> str:
  """mean ± std in percent."""
  if value is None:
    return '–'
  return f'{100 * value["mean"]:.1f}' + (f' ± {100 * value["std"]:.1f}' if value['std'] is not None else '')


def number(value: float | None) -> str:
  """Two decimals, or a dash for what was not measured."""
  return '–' if value is None else f'{value:.2f}'


def points(gain: Mapping[str, Any] | None) -> str:
  """A difference in points with its interval."""
  return f'{100 * gain["mean"]:+.2f} [{100 * gain["low"]:+.2f}, {100 * gain["high"]:+.2f}]' if gain else '–'


def table(lines: Sequence[Sequence[str]]) -> str:
  """Markdown; the first line is the head, and all columns but the first are aligned right."""
  head, *body = (' | '.join(line) for line in lines)
  rule = ' | '.join(['---'] + ['---:'] * (len(lines[0]) - 1))
  return '\n'.join(f'| {line} |' for line in (head, rule, *body)) + '\n'


def origin(document: Mapping[str, Any]) -> str:
  """One paragraph: where the numbers come from, with the commits of rows that were measured before."""
  at = document['machine']
  commits = {row.get('commit') for row in document.get('rows', ())} - {document['commit'], None}
  earlier = f' (other rows at {", ".join(sorted(commit[:12] for commit in commits))})' if commits else ''
  packages = ', '.join(f'{name} {version}' for name, version in document['versions'].items())
  times = [row.get(name) or {} for row in document.get('rows', ()) for name in ('time', 'compact')]
  cpus = sorted({time['cpu'] for time in times if time.get('cpu')} - {at['cpu']})
  elsewhere = f' Times in part on {", ".join(cpus)}.' if cpus else ''
  return (
    f'Made by `{document["command"]}` at commit {(document["commit"] or "none")[:12]}{earlier}, on {at["cpu"]}, '
    f'{at["cores"]} cores, {at["memory_gib"]} GiB; {packages}.{elsewhere}\n'
  )


def not_run(rows: Sequence[Mapping[str, Any]]) -> str:
  """What the table does not show, with the reason."""
  missing = [f'- {row["name"]}, seed {row["seed"]}: {row["reason"]}' for row in rows if not row['metrics']]
  return '\nRows without a number:\n\n' + '\n'.join(missing) + '\n' if missing else ''


def accuracy_table(summary: Sequence[Mapping[str, Any]], paper: Mapping[str, Paper]) -> str:
  """The study's table, ours beside the paper's."""
  head = ['', 'seeds', 'accuracy', 'macro F1', 'batch F1', 'accuracy − dense [95%]', 'no worse']
  lines = [head + ['keys kept', 'MACs', 'paper: accuracy', 'paper: batch F1']]
  for row in summary:
    gain, theirs = row['difference'], paper.get(row['name'])
    lines.append([
      METHODS[row['name']][1], str(len(row['seeds'])),
      *(percent(row[metric]) for metric in ('accuracy', 'macro_f1', 'macro_f1_batch16')),
      points(gain), ('yes' if gain['no_worse'] else 'no') if gain else '–',
      number(row['keep_ratio']), number(row['mac_ratio']),
      *((f'{value:.1f}' for value in theirs) if theirs else ('–', '–')),
    ])  # fmt: skip
  return table(lines)


ACCURACY_NOTE = """
Mean ± standard deviation over seeds, in percent. Batch F1: macro F1 of batches of 16, averaged, as
in the paper. `accuracy − dense` is in points, with the 95% interval of the paired bootstrap over
test documents and seeds; "no worse" means that all of it lies above −0.5. Keys kept: share of the
tokens that a head still attends to, mean over layers. MACs: share of dense, at each document's real
length. The paper's figures are of BERT-base at 512 tokens with all training data: they show what to
expect, not what to match.
"""


def accuracy_page(name: str, study: Study, document: Mapping[str, Any]) -> str:
  """results/NAME.md."""
  plots = f'![Accuracy against multiply-adds]({name}_accuracy.png)\n![Keys kept by layer]({name}_keep.png)\n'
  parts = (
    f'# {study.title}\n\n{study.setting}\n',
    accuracy_table(document['summary'], study.paper) + ACCURACY_NOTE + not_run(document['rows']),
    plots,
    origin(document),
  )
  return '\n'.join(parts)


def render(name: str, study: Study, folder: pathlib.Path) -> None:
  """NAME.md and the plots from NAME.json in `folder`."""
  document = read(folder / f'{name}.json')
  (folder / f'{name}.md').write_text(accuracy_page(name, study, document), encoding='utf-8')
  pictures.accuracy(folder / f'{name}_accuracy.png', study.title, document['summary'])
  pictures.keep(
    folder / f'{name}_keep.png', 'Keys kept by layer, ' + study.title.rpartition(' on ')[2], document['rows']
  )
