"""Serving real documents: the executor `serve` beside the strongest dense baselines, everything on the host included.

    python benchmarks/serving.py [--model=base|minilm] [--datasets=bbc,imdb] [--documents=64] [--methods=…] [--repeats=3]
                                 [--out=results/serve.json]

Writes results/serve.json and .md. Documents come at their real lengths, cut to what the model reads. Dense baselines,
in the same run and with the same attention: padded (batches of 8 as documents come, all as long as the longest),
bucketed (sorted by length into the ladder's shapes), each on whole batches and on groups of rows that stay in the
cache, and served. What a method has to set is found on other documents, for `--budget` of dense's multiply-adds (half of
them by default); exits read random classifiers, wide enough that some examples leave at every layer. This is about speed
alone: what a setting costs in accuracy, studies of trained models tell.

Then documents arrive one by one, at 95% and at 70% of the rate at which they were served all at once, for at least 45
seconds: throughput and latency; and `--requests` of random lengths all at once, for which nothing may be compiled any
more. The same command goes on with the datasets that are not measured yet.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import pictures, report, speed, turns
from tokenprune_jax import data, pretrained, serve, timing, workdir
from tokenprune_jax.models import Classifier

WEIGHTS = {'base': 'mpnet-base', 'minilm': 'minilm-l6'}
BATCH = 8
TUNING = 32  # documents that thresholds and capacities are found on
ARRIVALS = (0.95, 0.7)  # of the offline throughput
SUSTAINED = 45.0  # seconds of arrivals: those in flight at the end, whom no company joins any more, are not to weigh much


def documents(dataset: str, weights: Any, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """(those to serve, those to find thresholds on), as token ids."""
  length = weights.config.max_length
  spec = {
    'name': dataset,
    'max_length': length,
    'on_bad_row': 'skip',
    'valid_limit': TUNING,
    'test_limit': count,
  }
  splits = data.load({**spec, 'train_limit': 20}, weights.tokenizer, length, data.cache_dir(), seed=0).splits
  order = np.random.default_rng(0).permutation(len(splits['test']))
  return [splits['test'].ids(int(i)) for i in order], [
    splits['valid'].ids(i) for i in range(len(splits['valid']))
  ]


def batch_of(rows: Sequence[Any], slots: int, count: int, pad: int) -> dict[str, np.ndarray]:
  """Documents side by side, `count` rows of `slots`: token ids, or requests {'ids', 'words'} as a server takes them."""
  ids, mask = np.full((count, slots), pad, np.int32), np.zeros((count, slots), bool)
  for i, tokens in enumerate(map(timing.tokens_of, rows)):
    ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, True
  batch = {'ids': ids, 'mask': mask, 'types': np.zeros_like(ids)}
  if isinstance(rows[0], Mapping):
    batch['words'] = np.full_like(ids, -1)
    for i, row in enumerate(rows):
      batch['words'][i, : len(row['words'])] = row['words']
  return batch


def arriving(served: timing.Served, rate: float, at_least: float = SUSTAINED) -> dict[str, float]:
  """Documents one by one, `rate` a second, again and again: {throughput, p50, p99} in documents a second and seconds.

  The throughput counts the time until the last is answered.
  """
  latency, futures, start = [], [], time.perf_counter()
  rounds = math.ceil(at_least * rate / len(served.rows))
  for number, row in enumerate(list(served.rows) * rounds):
    due = start + number / rate
    time.sleep(max(0.0, due - time.perf_counter()))
    future = served.server.submit(row, wait=True)
    future.add_done_callback(lambda _, due=due: latency.append(time.perf_counter() - due))
    futures.append(future)
  for future in futures:
    future.result()
  seconds = time.perf_counter() - start
  p50, p99 = np.quantile(latency, (0.5, 0.99)).tolist()
  return {'throughput': len(futures) / seconds, 'p50': p50, 'p99': p99}


def random_requests(served: timing.Served, count: int) -> dict[str, Any]:
  """`count` requests of random lengths at once: {requests, seconds, recompiled}, the last of programs."""
  random, before = np.random.default_rng(0), len(served.server.programs)
  longest, vocabulary = served.server.ladder.lengths[-1], served.server.model.config.vocab_size
  requests = [random.integers(5, vocabulary, random.integers(1, longest + 1)) for _ in range(count)]
  start = time.perf_counter()
  answered = len(list(served.server.map(requests)))
  return {
    'requests': answered,
    'seconds': time.perf_counter() - start,
    'recompiled': len(served.server.programs) - before,
  }


def dense_batches(
  rows: Sequence[Any], ladder: serve.Ladder, pad: int, size: int = BATCH
) -> dict[str, list[dict]]:
  """{padded, bucketed}: the documents (see `batch_of`) in batches of at most `size`."""
  longest = ladder.slots(max(len(timing.tokens_of(row)) for row in rows))
  padded = [batch_of(rows[i : i + size], longest, size, pad) for i in range(0, len(rows), size)]
  bucketed = []
  for slots in ladder.lengths:
    members = [row for row in rows if ladder.slots(len(timing.tokens_of(row))) == slots]
    while members:  # the last batch of a bucket is as small as it can be
      count = min(size, 1 << (len(members).bit_length() - 1))
      bucketed.append(batch_of(members[:count], slots, count, pad))
      members = members[count:]
  return {'padded': padded, 'bucketed': bucketed}


def dense_ways(
  model: Classifier, params: Any, shapes: dict[str, list[dict]], rows: Sequence[np.ndarray]
) -> turns.Makers:
  """The ways to run a dense model: on each layout, whole batches and groups of rows that stay in the cache; and served."""

  def forward(batches: list[dict], slots: int) -> timing.Forward:
    return timing.Forward(speed.with_config(model, group_slots=slots), params, batches)

  found: dict[str, Any] = {
    f'dense_{shape}_{way}': functools.partial(forward, batches, slots)
    for shape, batches in shapes.items()
    for way, slots in (('whole', 0), ('grouped', -1))
  }
  return {**found, 'dense_served': lambda: timing.Served(model, params, rows)}


def made(spec: dict[str, Any], weights: Any) -> tuple[Classifier, Any]:
  """(a classifier of that method, parameters): a pretrained encoder, and what belongs to the method at random."""
  model = speed.made(spec, weights.config)
  return model, jax.device_put({**speed.random_params(model), 'encoder': weights.params['encoder']})


def measured(options: argparse.Namespace, dataset: str) -> list[dict[str, Any]]:
  """The rows of one dataset."""
  weights = pretrained.load(
    WEIGHTS[options.model], dropout=0.0, attention_dropout=0.0, dtype=options.dtype[0]
  )
  rows, tuning = documents(dataset, weights, options.documents)
  ladder, pad = serve.Ladder().settled(weights.config.max_length), weights.config.pad_id
  shapes, wanted = dense_batches(rows, ladder, pad), speed.specs(weights.config.depth)
  # By length, as they will be used: capacities are shares of what a batch is padded to.
  others = dense_batches(tuning, ladder, pad)['bucketed']
  macs: dict[str, float] = {}

  def program(name: str) -> timing.Forward | timing.Served:
    given, executor = wanted[name]
    _, params = made(given, weights)
    spec, _ = speed.settled(given, weights.config, params, others, options.budget)
    model = speed.made(spec, weights.config)
    found: timing.Forward | timing.Served
    if executor == 'compact':
      model = model.clone(executor='compact')
      found = timing.Forward(model, params, shapes['bucketed'])
      # By the same executor: what there was no room for is not counted.
      macs[name] = speed.validation_of(model, params, shapes['bucketed']).mac_ratio({})
    else:
      found = timing.Served(model, params, rows, {})
      macs[name] = found.macs
    print(f'{name}: compiled in {found.compile_seconds:.0f} s, {spec}', flush=True)
    return found

  seen: dict[str, turns.Turn] = {}
  found: dict[str, dict[str, Any]] = {}

  def see(turn: turns.Turn) -> None:
    served = isinstance(turn.program, timing.Served)
    executor = 'serve' if served else wanted.get(turn.name, ('', 'mask'))[1]
    seen[turn.name] = dataclasses.replace(turn, program=None)
    found[turn.name] = {
      'model': options.model, 'dataset': dataset, 'documents': len(rows), 'method': turn.name, 'dtype': options.dtype[0],
      'executor': executor, 'batch': None, 'length': None, 'torch_sdpa_seconds': None, 'programs': None, 'arriving': None,
      'compile_seconds': turn.program.compile_seconds, 'peak_bytes': turn.program.peak_bytes,
      'commit': report.commit(), **(requests(turn.program, turn.own['seconds'], options.requests) if served else {}),
    }  # fmt: skip

  def compare(name: str, dense: str, seconds: float) -> None:
    found[name] |= {'dense': dense, **turns.compared(seen[name], seconds, macs.get(name, 1.0))}
    print(line(found[name]), flush=True)

  ways = dense_ways(*made({'name': 'none'}, weights), shapes, rows)
  dense = turns.fastest(ways, options.repeats, options.allow_load, see)
  assert dense is not None
  for name in ways:
    compare(name, dense.name, seen[name].seconds_of(dense))
  makers = {
    name: functools.partial(program, name) for name in options.methods or ('threshold', 'early_exit', 'topk')
  }
  beside = {dense.name: dense.program}
  for turn in turns.one_by_one(makers, beside, options.repeats, options.allow_load):
    see(turn)
    compare(turn.name, dense.name, turn.times[dense.name]['seconds'])
  dense.give_up()
  return list(found.values())


def requests(served: timing.Served, seconds: float, count: int) -> dict[str, Any]:
  """What a server does with documents that arrive one by one, and with random ones; seconds: that it takes offline."""
  compiled, offline = len(served.server.programs), len(served.rows) / seconds
  rates = [{'share': share, **arriving(served, share * offline)} for share in ARRIVALS]
  recompiled = len(served.server.programs) - compiled
  return {
    'programs': compiled,
    'arriving': {'offline_throughput': offline, 'rates': rates},
    'recompiled': recompiled,
    'random': random_requests(served, count),
  }


def line(row: dict[str, Any]) -> str:
  """A row as it is printed."""
  text = f'{row["dataset"]:<5} {row["method"]:<24} {row["seconds"]:7.2f} s  {row["time_ratio"]:5.2f} times the best dense at '
  text += f'{row["mac_ratio"]:.2f} of its MACs: {row["efficiency"]:.2f}'
  if row['arriving']:
    for share in ARRIVALS:
      kept, p50, p99 = arrived(row['arriving'], share)
      text += f'  arriving at {share}: {kept}, p50 {p50} s, p99 {p99} s'
    text += f'  {row["random"]["requests"]} of random lengths: {row["random"]["recompiled"]} recompiled'
  return text


def arrived(arriving: dict[str, Any] | None, share: float) -> tuple[str, str, str]:
  """Cells of the table: throughput as a share of the offline one, p50 and p99, at that rate."""
  for one in arriving['rates'] if arriving else ():
    if one['share'] == share:
      kept = one['throughput'] / arriving['offline_throughput']
      return f'{kept:.2f}', f'{one["p50"]:.2f}', f'{one["p99"]:.2f}'
  return '–', '–', '–'


def page(rows: Sequence[dict[str, Any]]) -> str:
  """The table."""
  heads = [name for share in ARRIVALS for name in (f'arriving at {share}', 'p50, s', 'p99, s')]
  lines = [('documents', 'method', 's', 'MACs', 'times the best dense', 'removal efficiency', 'programs', 'compiling, s',
            *heads, 'recompiled')]  # fmt: skip
  for row in rows:
    lines.append((
      f'{row["documents"]} {row["dataset"]}', row['method'], f'{row["seconds"]:.2f}', f'{row["mac_ratio"]:.2f}',
      f'{row["time_ratio"]:.2f}', f'{row["efficiency"]:.2f}', f'{row["programs"] or "–"}', f'{row["compile_seconds"]:.0f}',
      *(cell for share in ARRIVALS for cell in arrived(row['arriving'], share)),
      f'{row["recompiled"] + row["random"]["recompiled"]}' if row['arriving'] else '–',
    ))  # fmt: skip
  return report.table(lines)


def main() -> None:
  """Measures, writes and prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='base', choices=tuple(WEIGHTS))
  parser.add_argument('--datasets', type=speed.words, default=['bbc', 'imdb'])
  parser.add_argument('--documents', type=int, default=64)
  parser.add_argument('--methods', type=speed.words, default=[])
  parser.add_argument(
    '--budget', type=float, default=0.5, help="share of dense's MACs, for methods that take one"
  )
  parser.add_argument(
    '--requests', type=int, default=1000, help='of random lengths, after which compiled programs are counted'
  )
  parser.add_argument('--dtype', type=speed.words, default=['float32'])
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/serve.json')
  options = parser.parse_args()
  speed.check_methods(parser, options)
  path = pathlib.Path(options.out)
  command = report.command()
  header, rows, missing = report.resumed(path, command, lambda row: row['dataset'], options.datasets)
  for dataset in missing:
    rows += measured(options, dataset)
    workdir.write_json(path, {**header, 'rows': rows})
  workdir.write_text(path.with_suffix('.md'), f'{page(rows)}\n{report.origin({**header, "rows": rows})}')
  title = f'Real documents through serve, {WEIGHTS[options.model]}'
  pictures.savings(path.with_suffix('.png'), title, rows, lambda row: row['dataset'])


if __name__ == '__main__':
  main()
