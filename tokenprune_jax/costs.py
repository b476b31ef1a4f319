"""What examples cost under a method, and what the method may ask of the validation split (`stages.finish`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenprune_jax import specs
from tokenprune_jax.models import Output

SPANS = 8  # of lengths, at most, that batches may need capacities of their own in
SPAN_BATCHES = 8  # that there are of a span, at least: from fewer it would be known by chance


class Cost(NamedTuple):
  """What each example of a batch costs: multiply-adds [b], and tokens by layer [b L] as `encoder.Trace` counts them."""

  macs: jax.Array
  dense_macs: jax.Array
  keys: jax.Array
  widest: jax.Array
  queries: jax.Array
  rows: jax.Array


def cost_of(output: Output) -> Cost:
  """Without the answers. Under jit, what they alone need is not computed: of a plan made beforehand, all of the encoder."""
  trace = output.trace
  return Cost(output.macs, output.dense_macs, trace.keys, trace.widest, trace.queries, trace.rows)


class Validation(NamedTuple):
  """What `finish` may look at: a forward pass of the trained model (jitted, no dropout) and the validation batches."""

  apply: Callable[..., Output]  # (batch)
  batches: Callable[[], Iterable[dict[str, jax.Array]]]
  reducer: Callable[[], Any] = dict  # () -> the trained parameters of the method that asks
  encoder: Any = None  # its `EncoderConfig`
  cost: Callable[..., Cost] | None = None  # (batch), where that is to be had for less than `apply`
  held: Mapping[str, float] = {}  # controls of all passes, but where a caller says otherwise

  def of(self, path: Sequence[str]) -> 'Validation':
    """As the method sees it whose parameters lie at `path` under the reducer's."""
    return self._replace(reducer=lambda: specs.at(self.reducer(), path))

  def lengths(self) -> np.ndarray:
    """Real tokens of every example [N]."""
    found = [jax.device_get((batch['mask'].sum(-1), batch['weight'])) for batch in self.batches()]
    return np.concatenate([count[weight > 0] for count, weight in found])

  def controlled(self, controls: Mapping[str, float]) -> Iterator[tuple[Output, dict[str, jax.Array]]]:
    """(output, batch) of every batch, all examples with the same controls."""
    for batch in self.batches():
      yield self.apply(with_controls(batch, {**self.held, **controls})), batch

  def costs(self, controls: Mapping[str, float]) -> Iterator[tuple[Cost, dict[str, Any]]]:
    """(cost of the real examples, batch) of every batch, all with the same controls; on the host."""
    cost = self.cost or (lambda batch: cost_of(self.apply(batch)))
    for batch in self.batches():
      given = with_controls(batch, {**self.held, **controls})
      found, weight = jax.device_get((cost(given), batch['weight']))
      yield Cost(*(values[weight > 0] for values in found)), batch

  def measured(self, controls: Mapping[str, float]) -> tuple[np.ndarray, float]:
    """(which layers run [L] bool, multiply-adds of the split as a share of dense's)."""
    rows, total = np.zeros(()), np.zeros(2)
    for cost, _ in self.costs(controls):
      rows = rows + cost.rows.sum(0)
      total += [cost.macs.sum(), cost.dense_macs.sum()]
    return rows > 0, float(total[0] / total[1])

  def mac_ratio(self, controls: Mapping[str, float]) -> float:
    """Multiply-adds of the split as a share of dense's."""
    return self.measured(controls)[1]

  def capacities(
    self,
    column: Callable[[Cost], jax.Array],
    overflow_rate: float,
    controls: Mapping[str, float] | None = None,
  ) -> tuple[float, ...]:
    """By layer, the share of the padded length that holds all but `overflow_rate` of the examples.

    column: the counts [b L] that a capacity must hold.
    """
    measured = [
      (column(cost) / batch['ids'].shape[1], cost.rows) for cost, batch in self.costs(controls or {})
    ]
    shares, rows = (np.concatenate(parts) for parts in zip(*measured))
    found = np.quantile(shares, 1 - overflow_rate, axis=0, method='higher')
    for l in reversed(range(len(found) - 1)):  # a layer that does not run hands on what the next one takes in
      if not rows[:, l].any():
        found[l] = found[l + 1]
    return tuple(np.clip(found, 1e-6, 1.0).tolist())

  def calibrated(
    self,
    fields: Mapping[str, Any],
    column: Callable[[Cost], jax.Array],
    controls: Mapping[str, float] | None = None,
  ) -> dict[str, Any]:
    """{'capacities': as above} where a method's `overflow_rate` asks for them; else nothing.

    With its `capacity_batch`: {'batch_capacities': as below}.
    """
    rate, size = fields.get('overflow_rate', 0.0), fields.get('capacity_batch', 0)
    if rate and size:
      return {'batch_capacities': self.batch_capacities(size, rate, controls)}
    return {'capacities': self.capacities(column, rate, controls)} if rate else {}

  def batch_capacities(
    self, size: int, overflow_rate: float, controls: Mapping[str, float] | None = None
  ) -> tuple[tuple[int, int, tuple[float, ...], tuple[float, ...]], ...]:
    """Entries (examples, length, shares by layer, shares by layer): what batches up to a length need together.

    Of the batch's slots: states that are updated; and of its examples: those in which any is. They hold what all but
    `overflow_rate` of the batches of an entry need (those longer than the entry before), when examples are batched with
    their neighbours in length. For batches of `size` examples, twice as many and so on, as far as the split tells: the
    larger a batch, the nearer it is to the mean.
    """
    found = [
      (batch['mask'].sum(-1)[batch['weight'] > 0], cost.queries) for cost, batch in self.costs(controls or {})
    ]
    lengths, rows = (np.concatenate(parts) for parts in zip(*jax.device_get(found)))
    order = np.argsort(lengths, kind='stable')
    counts = np.stack([rows, rows > 0], axis=1)[order]  # [N 2 L]
    total = np.cumsum(np.pad(counts.astype(np.float64), ((1, 0), (0, 0), (0, 0))), axis=0)
    sizes = [min(size, len(order))]
    while 2 * sizes[-1] <= len(order) / max(SPAN_BATCHES, 1):
      sizes.append(2 * sizes[-1])
    return tuple(entry for size in sizes for entry in shared_by(size, lengths[order], total, overflow_rate))


def shared_by(
  size: int, lengths: np.ndarray, total: np.ndarray, overflow_rate: float
) -> Iterator[tuple[int, int, tuple[float, ...], tuple[float, ...]]]:
  """The entries of `Validation.batch_capacities` for batches of `size` examples.

  lengths [N]: of the examples, in order; total [N+1 2 L]: slots, and examples, that the first of them need together.
  """
  widest = lengths[size - 1 :]  # of every run of `size` neighbours
  whole = size * np.stack([widest, np.ones_like(widest)], axis=1)
  needs = (total[size:] - total[:-size]) / whole[..., None]
  spans = min(max(int(len(lengths) / (SPAN_BATCHES * size)), 1), SPANS)
  bounds = np.unique([part[-1] for part in np.array_split(widest, spans)]).tolist()
  for shorter, bound in zip([0, *bounds], bounds):
    span = needs[(widest > shorter) & (widest <= bound)]
    shares = np.quantile(span, 1 - overflow_rate, axis=0, method='higher')
    slots, examples = np.clip(shares, 1e-6, 1.0).tolist()
    yield size, int(bound), tuple(slots), tuple(examples)


def with_controls(batch: Mapping[str, Any], controls: Mapping[str, float]) -> dict[str, Any]:
  """The batch with the same controls for all of its examples."""
  values = {name: np.full(len(batch['ids']), value, np.float32) for name, value in controls.items()}
  return {**batch, 'controls': values}
