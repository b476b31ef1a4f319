import numpy as np
import pytest

from tokenprune_jax import metrics


def example(seed=0, count=203, classes=5):
  random = np.random.default_rng(seed)
  labels = random.integers(classes, size=count)
  predictions = np.where(random.random(count) < 0.7, labels, random.integers(classes, size=count))
  return labels, predictions


def loop_f1(labels, predictions):
  """Macro F1 written out over the classes that occur."""
  scores = []
  for c in sorted(set(labels.tolist()) | set(predictions.tolist())):
    right = sum(1 for y, p in zip(labels, predictions) if y == c and p == c)
    said = sum(1 for p in predictions if p == c)
    true = sum(1 for y in labels if y == c)
    precision = right / said if said else 0.0
    recall = right / true if true else 0.0
    scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
  return sum(scores) / len(scores)


def test_confusion_counts_rows_by_label():
  counts = metrics.confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 4)
  assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('seed', range(4))
def test_scores_match_a_loop(seed):
  labels, predictions = example(seed)
  right = sum(int(y == p) for y, p in zip(labels, predictions)) / len(labels)
  assert metrics.accuracy(labels, predictions) == pytest.approx(right)
  assert metrics.micro_f1(labels, predictions, 5) == pytest.approx(right)
  assert metrics.macro_f1(labels, predictions, 5) == pytest.approx(loop_f1(labels, predictions))
  batches = [loop_f1(labels[i : i + 16], predictions[i : i + 16]) for i in range(0, len(labels), 16)]
  assert metrics.macro_f1_batch16(labels, predictions, 5) == pytest.approx(sum(batches) / len(batches))


def test_classes_that_do_not_occur_are_left_out():
  labels, predictions = np.array([0, 0, 3]), np.array([0, 1, 3])
  assert metrics.macro_f1(labels, predictions, 10) == pytest.approx((2 / 3 + 0 + 1) / 3)
  assert metrics.macro_f1(labels, labels, 10) == 1.0


def test_scores_match_sklearn():
  sklearn = pytest.importorskip('sklearn.metrics')
  labels, predictions = example(7, count=500, classes=9)
  assert metrics.accuracy(labels, predictions) == pytest.approx(sklearn.accuracy_score(labels, predictions))
  for average, score in (('macro', metrics.macro_f1), ('micro', metrics.micro_f1)):
    assert score(labels, predictions, 9) == pytest.approx(
      sklearn.f1_score(labels, predictions, average=average)
    )
  np.testing.assert_array_equal(
    metrics.confusion(labels, predictions, 9), sklearn.confusion_matrix(labels, predictions)
  )


def loop_bootstrap(method, dense, draws, seed):
  random = np.random.default_rng(seed)
  seeds, documents = method.shape
  found = []
  for _ in range(draws):
    rows, columns = random.integers(seeds, size=seeds), random.integers(documents, size=documents)
    found.append(np.mean([int(method[s, d]) - int(dense[s, d]) for s in rows for d in columns]))
  return np.quantile(found, (0.025, 0.975))


def test_bootstrap_matches_a_loop():
  random = np.random.default_rng(1)
  dense, method = random.random((3, 40)) < 0.8, random.random((3, 40)) < 0.9
  found = metrics.paired_bootstrap(method, dense, draws=200, seed=5)
  assert found.mean == pytest.approx(method.mean() - dense.mean())
  np.testing.assert_allclose((found.low, found.high), loop_bootstrap(method, dense, 200, 5), atol=1e-6)


def test_bootstrap_is_paired():
  """Two models that err on the same documents differ by nothing, however many documents are hard."""
  hard = np.random.default_rng(0).random((2, 400)) < 0.5
  same = metrics.paired_bootstrap(hard, hard, draws=500)
  assert (same.mean, same.low, same.high) == (0, 0, 0) and same.no_worse
  other = metrics.paired_bootstrap(hard, hard[:, ::-1].copy(), draws=500)
  assert other.low < -0.02 and other.high > 0.02 and not other.no_worse


def test_bootstrap_covers_the_truth():
  """About 95 in 100 intervals hold the true difference (binomial: 86 to 100 with certainty enough)."""
  random = np.random.default_rng(3)
  held = 0
  for trial in range(100):
    dense, method = random.random((1, 300)) < 0.8, random.random((1, 300)) < 0.85
    found = metrics.paired_bootstrap(method, dense, draws=300, seed=trial)
    held += found.low <= 0.05 <= found.high
  assert 86 <= held <= 100


def test_no_worse_needs_the_whole_interval():
  assert metrics.Difference(0.0, -0.0049, 0.01).no_worse
  assert not metrics.Difference(0.01, -0.0051, 0.03).no_worse


def test_mean_and_std():
  assert metrics.mean_and_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
  assert metrics.mean_and_std([0.5]) == (0.5, None)
