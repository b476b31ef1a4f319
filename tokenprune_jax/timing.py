"""Time measured in one process, several programs in turns.

Shapes: b batch, n slots, c classes.
"""

import functools
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tokenprune_jax import buckets, ladder, serve
from tokenprune_jax.models import Classifier

Batch = Mapping[str, Any]


def in_turns(programs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, Any]]:
  """Seconds of each program, A A B B C C A A …, the second of each pair timed: {name: {seconds (median), quartiles}}.

  A program returns when its work is done; a slow spell of the machine then falls on all of them alike. The first of a
  pair brings back the memory that the system took away during the others' turns, which would be charged to the largest.
  """
  rounds: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(repeats):
    for name, program in programs.items():
      program()
      start = time.perf_counter()
      program()
      rounds[name].append(time.perf_counter() - start)
  return {name: summary(seconds) for name, seconds in rounds.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
  """Median and quartiles."""
  low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
  return {'seconds': median, 'quartiles': [low, high]}


def peak_rss() -> int:
  """The most memory that this process has held, in bytes."""
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compiled_bytes(program: Any) -> int | None:
  """Arguments, outputs and temporaries of a compiled program by XLA's analysis; None where there is none."""
  analysis = program.memory_analysis()
  if analysis is None:
    return None
  return analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def logits_only(model: Classifier, params: Any, batch: Batch) -> jax.Array:
  """What a user waits for: the trace is not computed."""
  return model.apply({'params': params}, batch).logits


class Forward:
  """A model over ready-made batches, compiled ahead of time and once for each shape.

  compile_seconds; peak_bytes: of the largest program, by XLA's analysis.
  """

  def __init__(self, model: Classifier, params: Any, batches: Sequence[Batch]):
    self.params, self.batches = jax.device_put((params, [dict(batch) for batch in batches]))
    forward, start = jax.jit(functools.partial(logits_only, model)), time.perf_counter()
    shapes = {batch['ids'].shape: batch for batch in self.batches}
    self.programs = {shape: forward.lower(self.params, batch).compile() for shape, batch in shapes.items()}
    self.compile_seconds = time.perf_counter() - start
    sizes = [size for size in map(compiled_bytes, self.programs.values()) if size is not None]
    self.peak_bytes = max(sizes, default=None)

  def __call__(self) -> None:
    jax.block_until_ready([self.programs[batch['ids'].shape](self.params, batch) for batch in self.batches])


class Served:
  """A server, with all that it may need compiled, and the requests, of token ids, that it is given at once.

  compile_seconds; macs: multiply-adds as a share of dense's.
  """

  peak_bytes = None

  def __init__(
    self,
    model: Classifier,
    params: Any,
    rows: Sequence[Any],
    controls: Mapping[str, float] | None = None,
  ):
    longest = max(len(tokens_of(row)) for row in rows)
    lengths = (*(n for n in buckets.lengths_of(model) if n < longest), longest)
    self.rows = rows
    self.server = serve.Server(model, params, ladder=ladder.Ladder(lengths), controls=controls)
    start = time.perf_counter()
    self.server.precompile()  # how rows come together differs from time to time
    self.compile_seconds = time.perf_counter() - start
    answers: list[Any] = list(self.server.map(rows))
    self.macs = sum(answer.macs for answer in answers) / sum(answer.dense_macs for answer in answers)

  def __call__(self) -> None:
    for _ in self.server.map(self.rows):
      pass

  def close(self) -> None:
    """Ends the server."""
    self.server.close()


def tokens_of(row: Any) -> Any:
  """The token ids of a request."""
  return row['ids'] if isinstance(row, Mapping) else row


def rows_of(batches: Sequence[Batch]) -> list[Any]:
  """Requests of all examples without padding, filler rows left out: token ids, with their words where batches have them."""
  found: list[Any] = []
  for batch in batches:
    mask, weight = np.asarray(batch['mask']), np.asarray(batch['weight'])
    fields = {name: np.asarray(batch[name]) for name in ('ids', 'words') if name in batch}
    rows = [{name: x[i, mask[i]] for name, x in fields.items()} for i in np.flatnonzero(weight > 0)]
    found += rows if 'words' in fields else [row['ids'] for row in rows]
  return found


def beside_dense(
  models: Mapping[str, tuple[Classifier, Any]],
  batches: Sequence[Batch],
  repeats: int = 3,
  served: Sequence[str] = (),
) -> dict[str, Any]:
  """Seconds per example of each model, in turns, all compiled before.

  models: name -> (model, params); the one named 'dense' is what the others are compared with. batches: as
  `data.batches` gives them; a round runs all of them through one model. served: names of models that get the same
  examples through the executor `serve`. Filler rows cost time but are not counted as examples. Returns {'models': {name:
  {seconds_per_example (median over rounds), quartiles, time_ratio (dense / this), compile_seconds, compiled_peak_bytes,
  executor, dtype}}, 'device', 'batch_size', 'lengths' (slots of each batch), 'examples', 'repeats', 'process_peak_bytes'}.
  """
  rows = rows_of(batches)
  programs: dict[str, Forward | Served] = {
    name: Served(*made, rows) if name in served else Forward(*made, batches) for name, made in models.items()
  }
  times, found = in_turns(programs, repeats), {}
  for name, (model, _) in models.items():
    found[name] = {
      'seconds_per_example': times[name]['seconds'] / len(rows),
      'quartiles': [seconds / len(rows) for seconds in times[name]['quartiles']],
      'time_ratio': times['dense']['seconds'] / times[name]['seconds'] if 'dense' in times else None,
      'compile_seconds': programs[name].compile_seconds,
      'compiled_peak_bytes': programs[name].peak_bytes,
      'executor': 'serve' if name in served else model.executor,
      'dtype': model.config.dtype,
    }
  for program in programs.values():
    if isinstance(program, Served):
      program.close()
  return {
    'models': found,
    'device': jax.devices()[0].device_kind,
    'batch_size': batches[0]['ids'].shape[0],
    'lengths': [batch['ids'].shape[1] for batch in batches],
    'examples': len(rows),
    'repeats': repeats,
    'process_peak_bytes': peak_rss(),
  }
