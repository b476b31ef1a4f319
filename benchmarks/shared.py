"""Models whose counts depend on the text, by `compact`, which bounds them: times and scores."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report, turns
from benchmarks.trained import Trained
from tokenprune_jax import specs, stages, timing

OVERFLOW = 0.25  # share of batches that a shared capacity may be too small for


def measure(
  name: str,
  point: dict[str, Any],
  trained: Trained,
  batches: Sequence[dict],
  size: int,
  best: turns.Turn,
  repeats: int,
  allow_load: bool,
) -> None:
  """Writes into a point, under 'compact', its throughput beside dense's and its score, which changes where no room is found.

  size: examples, or more, that share capacities: smaller batches are computed whole. best: the fastest dense.
  """
  spec = bounded(point['reducer'], size, trained)
  model = trained.model(spec).clone(executor='compact')
  make = functools.partial(timing.Forward, model, trained.params, batches)
  turn = turns.timed(name, make, {best.name: best.program}, repeats, allow_load)
  turn.give_up()
  scored = trained.evaluate(spec, executor='compact')
  score = score_of(scored['metrics'])
  compact = turns.compared(turn, turn.times[best.name]['seconds'], scored['mac_ratio'])
  point['compact'] = {
    **compact, score: scored['metrics'][score], 'documents': sum(len(batch['ids']) for batch in batches),
    'reducer': spec, **report.made_by(),
  }  # fmt: skip
  told = f'{score} {scored["metrics"][score]:.4f}, {compact["time_ratio"]:.2f} times dense'
  print(f'{name}, compact: {told} at {compact["mac_ratio"]:.2f} of its MACs', flush=True)


def bounded(spec: Mapping[str, Any], size: int, trained: Trained) -> Mapping[str, Any]:
  """The spec with capacities: what batches of `size` share, where examples or words stop by themselves; else its own."""
  if not specs.sharers(spec):
    return spec
  wanted = specs.sharing(spec, size, OVERFLOW)
  return specs.with_handed_on(wanted, stages.finish(wanted, trained.validation(wanted)))


def score_of(found: Mapping[str, Any]) -> str:
  """What a task is judged by: f1 of spans, where there is one, or accuracy."""
  return 'f1' if 'f1' in found else 'accuracy'


def taken(points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """Of a point's seeds the first that was measured by compact; None where there is none."""
  return next((point for point in points if point.get('compact')), None)


def cells(points: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
  """Throughput (times dense) and score in percent of a point, as cells of a table. points: its seeds."""
  if (point := taken(points)) is None:
    return '–', '–'
  found = point['compact']
  return f'{found["time_ratio"]:.2f}', f'{100 * found[score_of(found)]:.1f}'


def line(
  axes: Any,
  points: Sequence[Sequence[Mapping[str, Any]]],
  title: str,
  look: Mapping[str, Any],
  shifts: Mapping[int, float] | None = None,
) -> None:
  """A dashed line of scores against throughput, where there are any. points: seeds of each; shifts: what a seed's
  scores are moved by, in percent."""
  own = [point for seeds in points if (point := taken(seeds))]
  if own:
    spots = sorted(
      (found['time_ratio'], 100 * found[score_of(found)] + (shifts or {}).get(point['seed'], 0.0))
      for point in own for found in [point['compact']]
    )  # fmt: skip
    axes.plot(
      *zip(*spots), linestyle='--', linewidth=1.4, markersize=7, markerfacecolor='none',
      label=f'{title}, compact', **look,
    )  # fmt: skip
