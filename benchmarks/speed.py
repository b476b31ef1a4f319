"""How fast each method is on full-length rows, in turns with the strongest dense baseline, and that with torch.

    python benchmarks/speed.py [--model=base|minilm] [--methods=…] [--batch=1,8,32] [--length=128,512] [--dtype=float32]
                               [--executor=…] [--budget=0.5] [--repeats=5] [--out=results/speed.json]

Writes results/speed.json and .md. Methods that take a budget are set to `--budget` of dense's multiply-adds. `dense` is the
faster of the plain program and the one that works on groups of rows that stay in the cache; a method is compared with it.
Methods whose counts depend on the data run under `serve`, everything on the host included, or within capacities
(`…_compact`), on random weights: for real documents see benchmarks/serving.py. torch is `transformers` at the
same shape, eager and SDPA; where it is not installed its columns are null. The same command goes on with the rows that are
not measured yet.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import pictures, report, turns
from tokenprune_jax import costs, stages, timing, workdir
from tokenprune_jax import schedule as fixed
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.models import Classifier, make_reducer
from tokenprune_jax.specs import module

LABELS = 2
EXECUTORS = ('mask', 'compact', 'serve')
DENSE = {'dense_whole': 0, 'dense_grouped': -1}  # the `group_slots` of dense
CONFIGS = {
  'base': EncoderConfig(dropout=0.0, attention_dropout=0.0),
  'minilm': EncoderConfig(width=384, depth=6, hidden=1536, dropout=0.0, attention_dropout=0.0),
}


def schedule(depth: int, first: float = 0.95, last: float = 0.05) -> tuple[float, ...]:
  """Shares of a top-k schedule that falls in a line, by default at about half of dense's MACs."""
  return tuple(np.round(np.linspace(first, last, depth), 3).tolist())


def specs(depth: int) -> dict[str, tuple[dict[str, Any], str]]:
  """method -> (reducer spec, executor)."""
  late, early = (
    {'name': 'combine', 'slots': 8, 'layer': at} for at in ({12: 11, 6: 5}[depth], {12: 7, 6: 4}[depth])
  )
  rank, shares = {'name': 'fuzzy', 'ratio': 0.9, 'rule': 'rank'}, schedule(depth)
  cascade = {'name': 'topk', 'shares': fixed.cascade(0.2, depth), 'score': 'cumulative'}
  counts = tuple(max(int(256 * share), 1) for share in shares)
  return {
    'topk': ({'name': 'topk', 'shares': shares}, 'compact'),
    'topk_cls': ({'name': 'topk', 'shares': shares, 'score': 'cls'}, 'compact'),
    'cascade': (cascade, 'compact'),
    'power': ({'name': 'power', 'counts': counts}, 'compact'),
    'fuzzy_p': (rank, 'compact'),
    'combine_late': (late, 'compact'),
    'combine_early': (early, 'compact'),
    'fuzzy_combine_early': ({'name': 'chain', 'reducers': (rank, early)}, 'compact'),
    'student': ({'name': 'student', 'layers': tuple(range(1, depth + 1, 2))}, 'compact'),
    'threshold': ({'name': 'threshold'}, 'serve'),
    'threshold_compact': ({'name': 'threshold', 'overflow_rate': 0.05}, 'compact'),
    'ltp': ({'name': 'ltp'}, 'serve'),
    'ltp_compact': ({'name': 'ltp', 'overflow_rate': 0.05}, 'compact'),
    'sttabt': ({'name': 'sttabt', 'mode': 'topk', 'overflow_rate': 0.05}, 'compact'),
    'sttabt_concrete': ({'name': 'sttabt', 'mode': 'hard', 'overflow_rate': 0.05}, 'compact'),
    'sttabt_served': ({'name': 'sttabt', 'mode': 'hard'}, 'serve'),
    'early_exit': ({'name': 'early_exit', 'layers': tuple(range(1, depth))}, 'serve'),
  }


def random_params(model: Classifier) -> Any:
  """Random weights; exits are wide enough that their entropies differ from example to example."""

  def widened(path, x):
    return x * 50 if any(str(key.key).startswith('exit_') for key in path) else x

  return jax.tree_util.tree_map_with_path(widened, model.init_params(jax.random.key(0)))


def made(spec: dict[str, Any], config: EncoderConfig) -> Classifier:
  """A classifier with a read-out that the method leaves tokens for, by the executor `mask`."""
  reducer = make_reducer(spec)
  return Classifier(config, reducer, LABELS, 'mean' if 'mean' in reducer.readouts() else 'cls').check()


def settled(
  spec: dict[str, Any], config: EncoderConfig, params: Any, batches: Sequence[dict], budget: float
) -> tuple[dict[str, Any], float]:
  """(`spec` with what a method's `at_budget` finds on these batches, MACs as a share of dense's).

  budget 0: `spec` as it is.
  """

  def validation(spec):
    return validation_of(made(spec, config), params, batches)

  if budget and hasattr(module(spec['name']), 'at_budget'):
    spec = stages.at_budget(spec, budget, validation(spec))
  return spec, validation(spec).mac_ratio({})


def validation_of(model: Classifier, params: Any, batches: Sequence[dict]) -> costs.Validation:
  """What a model, by the executor `mask`, does on ready-made batches."""
  weighted = [{**batch, 'weight': batch['mask'].any(-1).astype(np.float32)} for batch in batches]
  forward = jax.jit(stages.forward(model))
  return costs.Validation(
    lambda batch: forward(params, batch), lambda: weighted, lambda: params.get('reducer', {}), model.config
  )


def with_config(model: Classifier, **changes: Any) -> Classifier:
  """The model with other values in its encoder's config."""
  return model.clone(config=dataclasses.replace(model.config, **changes))


def rows_of(batch: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
  """Full-length random rows."""
  ids = np.random.default_rng(0).integers(5, vocabulary, (batch, length)).astype(np.int32)
  return {'ids': ids, 'mask': np.ones_like(ids, bool), 'types': np.zeros_like(ids)}


def torch_ways(config: EncoderConfig, batch: dict, dtype: str) -> turns.Makers:
  """`transformers` BERT of the same shape on the same rows, eager and SDPA; none where torch is not installed."""
  if importlib.util.find_spec('torch') is None:
    return {}
  import torch

  ids = torch.from_numpy(batch['ids']).long()
  mask = torch.ones_like(ids)

  def program(attention):
    peer = torch_peer(config, attention).to(getattr(torch, dtype))

    def run():
      with torch.inference_mode():
        peer(input_ids=ids, attention_mask=mask)

    return run

  return {f'torch_{name}': functools.partial(program, name) for name in ('eager', 'sdpa')}


def torch_peer(config: EncoderConfig, attention: str = 'sdpa') -> Any:
  """`transformers`' BERT of the shape of `config`, random weights, for inference. attention: 'sdpa' or 'eager'."""
  from transformers import BertConfig, BertModel

  shape = {'hidden_size': config.width, 'num_hidden_layers': config.depth, 'num_attention_heads': config.heads,
           'intermediate_size': config.hidden}  # fmt: skip
  return BertModel(BertConfig(**shape, attn_implementation=attention), add_pooling_layer=False).eval()


def chosen(options: argparse.Namespace, wanted: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
  """{name of the row: (method, executor)}, all that were asked for. Removing under `compact` needs counts that are fixed."""
  pairs = [
    (name, executor)
    for name in options.methods or wanted
    for executor in options.executor or (wanted[name][1],)
  ]
  return {
    name if executor == wanted[name][1] else f'{name} ({executor})': (name, executor)
    for name, executor in pairs
    if executor != 'compact' or wanted[name][1] == 'compact'
  }


def cell(
  options: argparse.Namespace, dtype: str, length: int, batch: int, missing: Collection[str]
) -> Iterator[dict[str, Any]]:
  """The rows of one shape named in `missing`, each when it is measured."""
  config = dataclasses.replace(CONFIGS[options.model], dtype=dtype)
  given = rows_of(batch, length, config.vocab_size)
  wanted, plain = specs(config.depth), make_reducer({'name': 'none'})
  macs: dict[str, float] = {}

  def dense_way(slots: int) -> timing.Forward:
    model = Classifier(dataclasses.replace(config, group_slots=slots), plain, LABELS)
    return timing.Forward(model, random_params(model), [given])

  def program(key: str, name: str, executor: str) -> timing.Forward | timing.Served:
    params = random_params(made(wanted[name][0], config))
    spec, macs[key] = settled(wanted[name][0], config, params, [given], options.budget)
    model = made(spec, config)
    if executor != 'serve':
      return timing.Forward(model.clone(executor=executor), params, [given])
    served = timing.Served(model, params, list(given['ids']))
    macs[key] = served.macs
    return served

  ways = {name: functools.partial(dense_way, slots) for name, slots in DENSE.items()}
  seen: list[tuple[turns.Turn, dict[str, Any]]] = []

  def about(turn: turns.Turn) -> dict[str, Any]:
    return {'compile_seconds': turn.program.compile_seconds, 'peak_bytes': turn.program.peak_bytes}

  def see(turn: turns.Turn) -> None:
    seen.append((dataclasses.replace(turn, program=None), about(turn)))

  dense = turns.fastest(ways, options.repeats, options.allow_load, see)
  assert dense is not None
  beside = {dense.name: dense.program}
  peers = {
    turn.name: turn.own['seconds'] / turn.times[dense.name]['seconds']
    for turn in turns.one_by_one(
      torch_ways(config, given, dtype), beside, options.repeats, options.allow_load
    )
  }
  torch = {name: peers.get(name) for name in ('torch_eager', 'torch_sdpa')}

  def row(turn: turns.Turn, more: dict[str, Any], executor: str, against: float) -> dict[str, Any]:
    times = turns.compared(turn, against, macs.get(turn.name, 1.0))
    return {
      'model': options.model, 'method': turn.name, 'executor': executor, 'batch': batch, 'length': length, 'dtype': dtype,
      **times, **{f'{name}_seconds': peer and peer * times['dense_seconds'] for name, peer in torch.items()},
      **{f'{name}_ratio': peer and peer * times['time_ratio'] for name, peer in torch.items()}, **more,
    }  # fmt: skip

  yield from (row(turn, more, 'mask', turn.seconds_of(dense)) for turn, more in seen if turn.name in missing)
  asked = {key: pair for key, pair in chosen(options, wanted).items() if key in missing}
  makers = {key: functools.partial(program, key, *pair) for key, pair in asked.items()}
  for turn in turns.one_by_one(makers, beside, options.repeats, options.allow_load):
    yield row(turn, about(turn), asked[turn.name][1], turn.times[dense.name]['seconds'])
  dense.give_up()


def line(row: dict[str, Any]) -> str:
  """A row as it is printed."""
  return (f'{row["batch"]:>3} x {row["length"]:<4} {row["dtype"]:<9} {row["method"]:<20} {1000 * row["seconds"]:8.1f} ms  '
          f'{row["time_ratio"]:5.2f} times dense at {row["mac_ratio"]:.2f} of its MACs: {row["efficiency"]:.2f}')  # fmt: skip


def page(rows: Sequence[dict[str, Any]]) -> str:
  """The table."""
  lines = [('batch x length', 'dtype', 'method', 'executor', 'ms', 'MACs', 'times as fast as dense', 'removal efficiency',
            'times torch SDPA')]  # fmt: skip
  for row in rows:
    torch = row['torch_sdpa_ratio']
    lines.append((
      f'{row["batch"]} x {row["length"]}', row['dtype'], row['method'], row['executor'], f'{1000 * row["seconds"]:.1f}',
      f'{row["mac_ratio"]:.2f}', f'{row["time_ratio"]:.2f}', f'{row["efficiency"]:.2f}',
      '–' if torch is None else f'{torch:.2f}',
    ))  # fmt: skip
  return report.table(lines)


def break_even(rows: Sequence[dict[str, Any]]) -> str:
  """The shortest length of batch 1 from which on a method is faster than dense, as a table."""
  alone = [row for row in rows if row['batch'] == 1 and not row['method'].startswith('dense')]
  if not alone:
    return ''
  lines = [('method', 'dtype', 'MACs', 'faster than dense at batch 1')]
  for method, dtype in dict.fromkeys((row['method'], row['dtype']) for row in alone):
    mine = sorted(
      (row for row in alone if (row['method'], row['dtype']) == (method, dtype)),
      key=lambda row: row['length'],
    )
    slow = [row['length'] for row in mine if row['time_ratio'] <= 1]
    fast = [row['length'] for row in mine if row['length'] > max(slow, default=0)]
    macs = f'{min(row["mac_ratio"] for row in mine):.2f} to {max(row["mac_ratio"] for row in mine):.2f}'
    some = ', '.join(str(row['length']) for row in mine if row['time_ratio'] > 1)
    told = f'from {fast[0]} tokens on' if fast else f'at {some or "none"}, not at {slow[-1]}'
    lines.append((method, dtype, macs, told))
  return f'\n{report.table(lines)}'


def words(text: str) -> list[str]:
  """A comma-separated list."""
  return text.split(',')


def among(known: Sequence[str]) -> Callable[[str], list[str]]:
  """A comma-separated list of these, as argparse's `type`, which tells of any other."""

  def read(text):
    found = words(text)
    if unknown := [name for name in found if name not in known]:
      raise argparse.ArgumentTypeError(f'{unknown[0]!r} is not there; choose from {", ".join(known)}')
    return found

  return read


def numbers(text: str) -> list[int]:
  """A comma-separated list of whole numbers."""
  return [int(word) for word in text.split(',')]


def check_methods(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
  """Ends the program where `--methods` names one that there is not."""
  known = specs(CONFIGS[options.model].depth)
  if unknown := [name for name in options.methods if name not in known]:
    parser.error(f'--methods: there is no {unknown[0]!r}; choose from {", ".join(known)}')


def main() -> None:
  """Measures, writes and prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='base', choices=tuple(CONFIGS))
  parser.add_argument('--methods', type=words, default=[])
  parser.add_argument('--batch', type=numbers, default=[1, 8, 32])
  parser.add_argument('--length', type=numbers, default=[128, 512])
  parser.add_argument('--dtype', type=words, default=['float32'])
  parser.add_argument(
    '--executor',
    type=words,
    default=[],
    help='mask, compact or serve; by default the one that suits a method',
  )
  parser.add_argument(
    '--budget', type=float, default=0.5, help="share of dense's MACs, for methods that take one"
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/speed.json')
  options = parser.parse_args()
  check_methods(parser, options)
  wrong = [name for name in options.executor if name not in EXECUTORS]
  if wrong:
    parser.error(f'--executor: there is no {wrong[0]!r}; choose from {", ".join(EXECUTORS)}')
  path = pathlib.Path(options.out)
  command = report.command()
  names = [*DENSE, *chosen(options, specs(CONFIGS[options.model].depth))]
  header, rows, missing = report.resumed(
    path,
    command,
    lambda row: (row['dtype'], row['length'], row['batch'], row['method']),
    list(itertools.product(options.dtype, options.length, options.batch, names)),
  )
  for shape, lacking in itertools.groupby(missing, lambda item: item[:3]):
    for row in cell(options, *shape, {item[3] for item in lacking}):
      print(line(row), flush=True)
      rows.append({**row, 'commit': header['commit']})
      workdir.write_json(path, {**header, 'rows': rows})  # what was measured is kept
  workdir.write_text(
    path.with_suffix('.md'), f'{page(rows)}{break_even(rows)}\n{report.origin({**header, "rows": rows})}'
  )
  title, plot = f'Speed on full rows, {options.model}', path.with_suffix('.png')
  if len(options.length) > 2 and len(options.batch) == len(options.dtype) == 1:
    pictures.lengths(plot, f'{title}, batch of {options.batch[0]}', rows)
  else:
    pictures.savings(plot, title, rows, lambda row: f'{row["batch"]} x {row["length"]} {row["dtype"]}')


if __name__ == '__main__':
  main()
