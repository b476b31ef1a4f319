"""Scores of a classifier over a whole split as shares in [0, 1], and the paired bootstrap. NumPy only."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray as Array

NO_WORSE = -0.005  # half a point of accuracy: the margin of "no worse than dense"


def confusion(labels: Int[Array, 'N'], predictions: Int[Array, 'N'], classes: int) -> Int[Array, 'c c']:
  """Counts by true class (row) and predicted class (column)."""
  cells = np.asarray(labels, np.int64) * classes + np.asarray(predictions, np.int64)
  return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(labels: Int[Array, 'N'], predictions: Int[Array, 'N']) -> float:
  """Share of examples whose prediction is their label."""
  return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1_by_class(counts: Int[Array, 'c c']) -> Float[Array, 'c']:
  """2 tp / (2 tp + fp + fn) from a confusion matrix; NaN for a class that is neither label nor prediction."""
  occurrences = counts.sum(0) + counts.sum(1)
  return np.where(occurrences > 0, 2 * np.diag(counts) / np.maximum(occurrences, 1), np.nan)


def macro_f1(labels: Int[Array, 'N'], predictions: Int[Array, 'N'], classes: int) -> float:
  """Mean F1 over the classes that occur among the labels or the predictions (scikit-learn's default)."""
  return float(np.nanmean(f1_by_class(confusion(labels, predictions, classes))))


def micro_f1(labels: Int[Array, 'N'], predictions: Int[Array, 'N'], classes: int) -> float:
  """F1 of the counts summed over classes; with one label an example it equals accuracy."""
  counts = confusion(labels, predictions, classes)
  right = np.trace(counts)
  wrong = counts.sum() - right  # each error is one false positive and one false negative
  return float(2 * right / (2 * right + wrong + wrong))


def span_scores(tags: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
  """{'precision', 'recall', 'f1'} of the spans that sentences of BIO or BIOES tags mark, over all kinds (micro).

  By the seqeval library: a span counts where its kind, its beginning and its end are right, and tags against the scheme
  are read leniently, as conlleval does. 0 where there are no spans to find, or none were found.
  """
  from seqeval.metrics.sequence_labeling import precision_recall_fscore_support  # takes two seconds

  precision, recall, f1, _ = precision_recall_fscore_support(
    [list(sentence) for sentence in tags],
    [list(sentence) for sentence in predictions],
    average='micro',
    zero_division=0,
  )
  return {'precision': float(precision), 'recall': float(recall), 'f1': float(f1)}


def macro_f1_batch16(
  labels: Int[Array, 'N'], predictions: Int[Array, 'N'], classes: int, batch: int = 16
) -> float:
  """Mean over consecutive batches of 16 of the macro F1 of each: the F1 of the paper on fuzzy pruning.

  It depends on the order of the examples and lies below `macro_f1`: it serves to stand beside that paper,
  nothing else.
  """
  starts = range(0, len(labels), batch)
  return float(
    np.mean([macro_f1(labels[i : i + batch], predictions[i : i + batch], classes) for i in starts])
  )


class Difference(NamedTuple):
  """Accuracy of a method minus accuracy of dense, with its 95% interval, as shares (0.01 is one point)."""

  mean: float
  low: float
  high: float

  @property
  def no_worse(self) -> bool:
    """Whether the whole interval lies above minus half a point."""
    return self.low > NO_WORSE


def paired_bootstrap(
  method: Bool[Array, 's N'], dense: Bool[Array, 's N'], draws: int = 10_000, seed: int = 0
) -> Difference:
  """Paired bootstrap of the difference in accuracy; rows are seeds, columns the same test documents in order.

  A draw takes N documents with replacement, the same ones for every seed and for both models, and s seeds
  with replacement; the interval lies between the 2.5% and the 97.5% quantile of the draws.
  """
  gain = method.astype(np.float32) - dense.astype(np.float32)
  seeds, documents = gain.shape
  random = np.random.default_rng(seed)
  sums = np.empty(draws)
  for i in range(draws):  # one draw at a time: [draws documents] indices would take hundreds of megabytes
    by_document = gain[random.integers(seeds, size=seeds)].sum(0)
    sums[i] = by_document[random.integers(documents, size=documents)].sum()
  low, high = np.quantile(sums / gain.size, (0.025, 0.975))
  return Difference(float(gain.mean()), float(low), float(high))


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and sample standard deviation over seeds; no deviation (None) from one seed."""
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
