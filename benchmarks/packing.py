"""Packing or regrouping? One encoder block on what is left of real documents, laid out both ways.

    python benchmarks/packing.py [--model=base|minilm] [--datasets=bbc,imdb] [--documents=64] [--repeats=5]
                                 [--out=results/packing.json]

Survivors of an example go either into a row of their own, in a batch with others of like length (regrouped: the executor
`serve`, its ladder), or beside other examples' survivors in one row of fixed length, first fit by decreasing length, with
an attention that stays inside each example (packed: segment ids). The block computes the same for each survivor; its sums
over attention maps are read, as a method with a threshold does. Numbers of survivors are a share of each document's real
length, spread as they are under a threshold: uniformly from 0.6 to 1.4 of that share. Moving rows is in neither time.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, report, serving, speed
from tokenprune_jax import ladder, pretrained, timing, tokens, workdir
from tokenprune_jax.block import Block
from tokenprune_jax.encoder_config import EncoderConfig

SHARES = (1.0, 0.5, 0.25)  # of a document's tokens that are left, on average
ROWS = (128, 256, 512)  # slots of a packed row
READS = ('received',)


class Layout(NamedTuple):
  """Batches of rows: each row is a list of lengths that lie side by side in `slots` places."""

  batches: list[tuple[int, list[list[int]]]]

  def padding(self) -> float:
    """Share of the slots that hold nothing."""
    slots = sum(slots * len(rows) for slots, rows in self.batches)
    return 1 - sum(sum(map(sum, rows)) for _, rows in self.batches) / slots


def survivors(lengths: Sequence[int], share: float) -> list[int]:
  """What is left of each document."""
  spread = np.random.default_rng(0).uniform(0.6, 1.4, len(lengths)) if share < 1 else np.ones(len(lengths))
  return [max(1, min(n, round(n * share * s))) for n, s in zip(lengths, spread)]


def regrouped(lengths: Sequence[int], shapes: ladder.Ladder) -> Layout:
  """Full batches of each bucket, as `serve` makes them; the last one of a bucket row by row where most of it is empty."""
  batches = []
  for slots in shapes.lengths:
    members = [[n] for n in lengths if shapes.slots(n) == slots]
    rows = shapes.rows(slots)
    while members:
      taken, members = members[:rows], members[rows:]
      if ladder.crowded(len(taken), slots, slots * rows):
        batches.append((slots, taken + [[]] * (rows - len(taken))))
      else:
        batches += [(slots, [row]) for row in taken]
  return Layout(batches)


def packed(lengths: Sequence[int], shapes: ladder.Ladder, slots: int) -> Layout:
  """Rows of `slots` by first fit, the longest first; what is longer than a row is regrouped."""
  rows: list[list[int]] = []
  for n in sorted((n for n in lengths if n <= slots), reverse=True):
    room = next((row for row in rows if sum(row) + n <= slots), None)
    rows.append([n]) if room is None else room.append(n)
  count = max(1, shapes.batch_tokens // slots)
  batches = [(slots, rows[i : i + count]) for i in range(0, len(rows), count)]
  batches = [(slots, batch + [[]] * (count - len(batch))) for slots, batch in batches]
  return Layout(batches + regrouped([n for n in lengths if n > slots], shapes).batches)


def arrays(slots: int, rows: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
  """States [b n d] and segment ids [b n], 0 at padding."""
  segments = np.zeros((len(rows), slots), np.int32)
  for row, lengths in enumerate(rows):
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    segments[row, : len(ids)] = ids
  x = np.random.default_rng(0).normal(size=(*segments.shape, width)).astype(np.float32)
  return {'x': x, 'segments': segments}


class Run:
  """One block over all batches of a layout."""

  def __init__(self, config: EncoderConfig, layout: Layout):
    block = Block(config)

    # separate: rows hold several examples, which must not see each other.
    def forward(params, batch, separate):
      segments = batch['segments']
      stream = tokens.start(batch['x'], segments > 0, False)
      same = (segments[:, :, None] == segments[:, None, :])[:, None]
      bias = jnp.where(same, 0.0, -1e9) if separate else None
      stream, evidence, _ = block.apply(params, stream, bias, READS, False, method='attend')
      stream, _ = block.apply(params, stream, False, method='feed_forward')
      return stream.x, evidence.received

    whole = tokens.start(jnp.zeros((1, 8, config.width)), jnp.ones((1, 8), bool), False)
    made = block.init(jax.random.key(0), whole, None, READS, False, method='attend')
    fed = block.init(jax.random.key(1), whole, False, method='feed_forward')
    self.params = {'params': {**fed['params'], **made['params']}}
    self.batches = jax.device_put([arrays(slots, rows, config.width) for slots, rows in layout.batches])
    self.separate = [any(len(row) > 1 for row in rows) for _, rows in layout.batches]
    self.program = jax.jit(forward, static_argnums=2)
    self()

  def __call__(self) -> None:
    given = zip(self.batches, self.separate)
    jax.block_until_ready([self.program(self.params, batch, separate) for batch, separate in given])


def measured(
  options: argparse.Namespace, config: EncoderConfig, lengths: Sequence[int]
) -> list[dict[str, Any]]:
  """Rows of one dataset: a share and a layout each."""
  shapes, found = ladder.Ladder().settled(config.max_length), []
  for share in SHARES:
    left = survivors(lengths, share)
    layouts = {'regrouped': regrouped(left, shapes)}
    layouts |= {f'packed, rows of {slots}': packed(left, shapes, slots) for slots in ROWS}
    runs = {name: Run(config, layout) for name, layout in layouts.items()}
    load = measure.quiet(options.allow_load)
    times = timing.in_turns(runs, options.repeats)
    for name, layout in layouts.items():
      found.append({
        'share': share, 'tokens': sum(left), 'layout': name, **times[name], 'padding': layout.padding(),
        'times_regrouped': times['regrouped']['seconds'] / times[name]['seconds'], 'load_of_others': load,
      })  # fmt: skip
      print({key: found[-1][key] for key in ('share', 'layout', 'seconds', 'padding')}, flush=True)
  return found


def page(rows: Sequence[dict[str, Any]]) -> str:
  """The table."""
  lines = [('documents', 'tokens left', 'layout', 'ms', 'padding', 'times as fast as regrouped')]
  for row in rows:
    lines.append((
      row['dataset'], f'{row["share"]:.0%}', row['layout'], f'{1000 * row["seconds"]:.0f}', f'{row["padding"]:.0%}',
      f'{row["times_regrouped"]:.2f}',
    ))  # fmt: skip
  return report.table(lines)


def main() -> None:
  """Measures, writes and prints."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='base', choices=tuple(serving.WEIGHTS))
  parser.add_argument('--datasets', type=speed.words, default=['bbc', 'imdb'])
  parser.add_argument('--documents', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/packing.json')
  options = parser.parse_args()
  header = report.header(report.command())
  weights = pretrained.load(serving.WEIGHTS[options.model])  # for its tokenizer
  rows, path = [], pathlib.Path(options.out)
  for dataset in options.datasets:
    given, _ = serving.documents(dataset, weights, options.documents)
    found = measured(options, speed.CONFIGS[options.model], [len(ids) for ids in given])
    rows += [{'dataset': dataset, 'documents': len(given), **row} for row in found]
    workdir.write_json(path, {**header, 'rows': rows})
  workdir.write_text(path.with_suffix('.md'), f'{page(rows)}\n{report.origin(header)}')
  print(page(rows))


if __name__ == '__main__':
  main()
