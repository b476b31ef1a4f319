"""Tasks: what the head's logits are trained for and scored by. A task is a pair of pure functions."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import metrics
from tokenprune_jax.errors import UserError


class Task(NamedTuple):
  """`loss(logits [b c], batch) -> scalar`, jittable; `scores(logits [N c], labels [N]) -> {name: value}`."""

  name: str
  loss: Callable[[Any, Mapping[str, Any]], Any]
  scores: Callable[[Any, Any], dict[str, Any]]


def cross_entropy(logits: Float[Array, 'b c'], label: Int[Array, 'b']) -> Float[Array, 'b']:
  """-log p(label) in nats, computed in float32 whatever the type of the logits."""
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_probabilities, label[:, None], axis=1)[:, 0]


def divergence(from_logits: Float[Array, '*#b c'], to_logits: Float[Array, '*#b c']) -> Float[Array, '*b']:
  """KL(from || to) of the softmax."""
  ours, theirs = jax.nn.log_softmax(from_logits), jax.nn.log_softmax(to_logits)
  return (jnp.exp(ours) * (ours - theirs)).sum(-1)


def weighted_mean(
  values: Float[Array, 'b'], weight: Float[Array, 'b'] | Bool[Array, 'b']
) -> Float[Array, '']:
  """Mean over rows by weight, 0 where all weights are; what a row of weight 0 holds does not count, NaN included."""
  weight = weight.astype(jnp.float32)
  return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.maximum(jnp.sum(weight), 1e-6)


def classification_loss(logits: Float[Array, 'b c'], batch: Mapping[str, Any]) -> Float[Array, '']:
  """Mean cross-entropy over the batch's rows by `weight`; filler rows (weight 0) do not count."""
  return weighted_mean(cross_entropy(logits, batch['label']), batch['weight'])


def classification_scores(logits: Float[np.ndarray, 'N c'], labels: Int[np.ndarray, 'N']) -> dict[str, Any]:
  """Accuracy, macro, micro and batch-wise F1, and the confusion matrix (nested lists, rows are labels)."""
  classes = logits.shape[1]
  predictions = np.argmax(logits, axis=1)
  # Splits often lie sorted by class, and batches of one class say little: batches of a fixed random order.
  order = np.random.default_rng(0).permutation(len(labels))
  return {
    'accuracy': metrics.accuracy(labels, predictions),
    'macro_f1': metrics.macro_f1(labels, predictions, classes),
    'micro_f1': metrics.micro_f1(labels, predictions, classes),
    'macro_f1_batch16': metrics.macro_f1_batch16(labels[order], predictions[order], classes),
    'confusion': metrics.confusion(labels, predictions, classes).tolist(),
  }


def make(name: str) -> Task:
  """The task of that name. Raises UserError for one that does not exist."""
  if name != 'classify':
    raise UserError(
      f"task.name is '{name}', which does not exist; expected 'classify'. Set task.name='classify'."
    )
  return Task(name, classification_loss, classification_scores)
