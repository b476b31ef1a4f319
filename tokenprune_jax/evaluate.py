"""Evaluation over a whole split.

Shapes: b batch, n slots, l layer (all blocks; a replaced block holds 0), c classes, N examples of the split.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tokenprune_jax import data, decoding, flops
from tokenprune_jax.costs import with_controls
from tokenprune_jax.models import Classifier
from tokenprune_jax.tasks import Task

Batch = Mapping[str, Any]


def measure(model: Classifier, params: Any, batch: Batch) -> dict[str, jax.Array]:
  """One forward pass without dropout: logits [b c], keep_ratio [b l], and what a batch row cost [b]."""
  output = model.apply({'params': params}, batch)
  length = batch['mask'].sum(-1)
  return {
    'logits': output.logits,
    'keep_ratio': flops.keep_ratio(output.trace),
    'macs': output.macs,
    'dense_macs': output.dense_macs,
    'overflow': output.trace.overflow,
    'length': length,
    'slots': jnp.full_like(length, batch['mask'].shape[1]),
    **{name: batch[name] for name in ('index', 'label', 'weight')},
  }


@functools.lru_cache(maxsize=8)
def compiled(model: Classifier, sharding: NamedSharding | None):
  """`measure` under jit: compiled once for each model and bucket, however often a run evaluates.

  sharding: of a batch; the results are whole on every device. Under `compact` each device gathers among its own examples: no
  token goes to another, and what a batch shares is shared by a device's part of it.
  """
  forward = functools.partial(measure, model)
  if sharding is None:
    return jax.jit(forward)
  if model.executor == 'compact' and sharding.mesh.size > 1:
    whole, parts = PartitionSpec(), sharding.spec
    forward = jax.shard_map(
      forward, mesh=sharding.mesh, in_specs=(whole, parts), out_specs=parts, check_vma=False
    )
  return jax.jit(forward, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


def evaluate(
  model: Classifier,
  params: Any,
  split: data.Split,
  task: Task,
  *,
  batch_size: int,
  buckets: tuple[int, ...],
  pad_id: int,
  sharding: NamedSharding | None = None,
  rerun: bool = False,
  controls: Mapping[str, float] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Evaluates every example of `split` once. Returns (metrics, records), both ready for JSON.

  metrics: the task's scores and `loss` over the whole split; `keep_ratio_by_layer` (executed layers, weighted
  by real tokens) and its mean `keep_ratio`; `macs_per_example`, `dense_macs_per_example`, `mac_ratio`;
  `padding_share` of the slots; `overflow`, the number of examples that a capacity was too small for;
  `examples`. rerun: whether those that overflowed are computed again, by the executor `mask`.
  records: one dict an example in the split's order (index, label, prediction, probabilities,
  length, keep_ratio, macs); of a tagger one dict a sentence (`sentence_records`).

  batch_size: rows of a global batch. sharding: of a batch over the mesh's data axis; None on one device. With
  several processes all of them call this, and all get the same answer. controls: of every example alike.
  """
  forward = compiled(model, sharding)
  plan = data.batches(
    split,
    batch_size=batch_size,
    buckets=buckets,
    seed=0,
    epoch_shuffle=False,
    pad_id=pad_id,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  # What comes back is small: nothing is fetched before the end, so that the device never waits for the host.
  made = (with_controls(batch, controls or {}) for batch in plan.iterator(0))
  results = jax.device_get([forward(params, place(batch, sharding)) for batch in made])
  if rerun:
    again = compiled(model.clone(executor='mask'), sharding)
    for number in [i for i, result in enumerate(results) if result['overflow'].any()]:
      batch = with_controls(plan.batch(number), controls or {})
      fresh = jax.device_get(again(params, place(batch, sharding)))
      results[number] = replaced(results[number], fresh)
  rows = in_order([words_alone(result) if split.words else result for result in results])
  slots = sum(int(result['slots'].sum()) for result in results)
  if split.words is None:
    return summary(rows, model, task, slots), records(rows, executed(model))
  records_ = sentence_records(rows, executed(model), split.words, task.constrained)
  return summary(rows, model, task, slots, split.words), records_


def replaced(result: Mapping[str, np.ndarray], fresh: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`result` with the rows that overflowed from `fresh`; they stay flagged."""
  lost = result['overflow']
  rows = {name: np.where(lost.reshape(-1, *[1] * (x.ndim - 1)), fresh[name], x) for name, x in result.items()}
  return {**rows, 'overflow': lost}


def place(batch: Batch, sharding: NamedSharding | None) -> Batch:
  """A process's rows of a batch as global arrays."""
  if sharding is None:
    return dict(batch)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), dict(batch))


def in_order(results: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """All examples in the split's order without filler: nothing below depends on how they were batched."""
  rows = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
  order = np.argsort(rows['index'], kind='stable')
  order = order[rows['weight'][order] > 0]
  return {name: values[order] for name, values in rows.items()}


def words_alone(result: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A tagger's result, in which each row has an array of its own for the logits [k c] and labels [k] of its k words."""
  labelled = result['label'] >= 0
  rows = {name: np.empty(len(labelled), object) for name in ('logits', 'label')}
  for name, values in rows.items():
    for row, places in enumerate(labelled):
      values[row] = result[name][row, places]
  return {**result, **rows}


def executed(model: Classifier) -> list[int]:
  """Places of the layers that run, in the trace's axis l."""
  return [l - 1 for l in range(1, model.config.depth + 1) if l not in model.unused_blocks()]


def summary(
  rows: Mapping[str, np.ndarray],
  model: Classifier,
  task: Task,
  slots: int,
  words: data.Words | None = None,
) -> dict[str, Any]:
  """The metrics of `evaluate` from per-example rows; slots: all that were computed, padding included."""
  logits, label = (
    rows[name] if words is None else np.concatenate(rows[name]) for name in ('logits', 'label')
  )
  weight = np.ones(len(label), np.float32)
  loss = task.loss(jnp.asarray(logits), {'label': jnp.asarray(label), 'weight': jnp.asarray(weight)})
  by_layer = np.average(rows['keep_ratio'].astype(np.float64), axis=0, weights=rows['length'])[
    executed(model)
  ]
  macs, dense = (float(rows[name].mean(dtype=np.float64)) for name in ('macs', 'dense_macs'))
  return {
    **task.scores(logits, label, words),
    'loss': float(loss),
    'keep_ratio': float(by_layer.mean()),
    'keep_ratio_by_layer': by_layer.tolist(),
    'macs_per_example': macs,
    'dense_macs_per_example': dense,
    'mac_ratio': macs / dense,
    'padding_share': 1 - int(rows['length'].sum()) / slots,
    'overflow': int(rows['overflow'].sum()),
    'examples': len(rows['index']),
    **({} if words is None else {'sentences': len(words.sentences), 'words': len(label)}),
  }


def records(rows: Mapping[str, np.ndarray], layers: Sequence[int]) -> list[dict[str, Any]]:
  """One dict an example; label and prediction are class numbers, keep_ratio the mean over `layers`."""
  logits = rows['logits'].astype(np.float64)
  odds = np.exp(logits - logits.max(-1, keepdims=True))
  columns = {
    'index': rows['index'],
    'label': rows['label'],
    'prediction': logits.argmax(-1),
    'probabilities': np.round(odds / odds.sum(-1, keepdims=True), 6),
    'length': rows['length'],
    'keep_ratio': np.round(rows['keep_ratio'][:, layers].mean(-1, dtype=np.float64), 6),
    'macs': rows['macs'],
  }
  lists = [values.tolist() for values in columns.values()]
  return [dict(zip(columns, row)) for row in zip(*lists)]


def sentence_records(
  rows: Mapping[str, np.ndarray], layers: Sequence[int], words: data.Words, constrained: bool = False
) -> list[dict[str, Any]]:
  """One dict a sentence: index, words, tags, predicted, and probabilities of the predicted tags, in the split's order.

  Where inputs hold several sentences, or parts of one, their `length` and `macs` are shared out evenly over the words that
  they answer, so that sums over sentences are those over inputs; keep_ratio is the mean over words.
  """
  logits = np.concatenate(rows['logits']).astype(np.float64)
  odds = np.exp(logits - logits.max(-1, keepdims=True))
  best = decoding.best_tags(logits, words, constrained)
  sure = np.round(odds[np.arange(len(best)), best] / odds.sum(-1), 6)
  share = 1 / np.bincount(words.example)[words.example]  # of each word in its input
  kept = rows['keep_ratio'][:, layers].mean(-1, dtype=np.float64)
  columns = {
    'words': [sentence.words for sentence in words.sentences],
    'tags': words.tags(np.concatenate(rows['label'])),
    'predicted': words.tags(best),
    'probabilities': words.cut(sure.tolist()),
    'length': [sum(values) for values in words.cut((rows['length'][words.example] * share).tolist())],
    'keep_ratio': [float(np.mean(values)) for values in words.cut(kept[words.example].tolist())],
    'macs': [sum(values) for values in words.cut((rows['macs'][words.example] * share).tolist())],
  }
  for name in ('length', 'keep_ratio', 'macs'):
    columns[name] = np.round(columns[name], 6).tolist()
  return [{'index': i, **dict(zip(columns, row))} for i, row in enumerate(zip(*columns.values()))]
