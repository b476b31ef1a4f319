"""Tasks: what the head's logits are trained for and scored by. A task is a pair of pure functions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokenprune_jax import decoding, metrics
from tokenprune_jax.data import Words
from tokenprune_jax.errors import UserError

TEMPERATURE = 2.0  # that a teacher's answers are softened by


class Task(NamedTuple):
  """`loss(logits [b c], batch) -> scalar`, jittable; `scores(logits [N c], labels [N], words) -> {name: value}`.

  Where words are labelled, a batch has logits [b n c] and labels [b n], scores get those of a split's N words, and `words`
  (`data.Words`) says which words these are; else it is None.
  """

  name: str
  loss: Callable[[Any, Mapping[str, Any]], Any]
  scores: Callable[..., dict[str, Any]]
  constrained: bool = False  # tags keep to their scheme: `decoding`


def cross_entropy(logits: Float[Array, '*b c'], label: Int[Array, '*b']) -> Float[Array, '*b']:
  """-log p(label) in nats, computed in float32 whatever the type of the logits; of any class where label is negative."""
  log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(log_probabilities, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]


def divergence(from_logits: Float[Array, '*#b c'], to_logits: Float[Array, '*#b c']) -> Float[Array, '*b']:
  """KL(from || to) of the softmax."""
  ours, theirs = jax.nn.log_softmax(from_logits), jax.nn.log_softmax(to_logits)
  return (jnp.exp(ours) * (ours - theirs)).sum(-1)


def softened(
  teacher: Float[Array, '*b c'], student: Float[Array, '*b c'], temperature: float = TEMPERATURE
) -> Float[Array, '*b']:
  """T^2 KL(teacher || student) of softened logits: its gradient does not shrink with T (DistilBERT; arXiv 1910.01108)."""
  return temperature**2 * divergence(teacher / temperature, student / temperature)


def apart(teacher: Float[Array, '*b d'], student: Float[Array, '*b d']) -> Float[Array, '*b']:
  """1 - cosine of two states, 0 where they point the same way (DistilBERT; arXiv 1910.01108)."""
  teacher, student = (x.astype(jnp.float32) for x in (teacher, student))
  lengths = jnp.sum(jnp.square(teacher), -1) * jnp.sum(jnp.square(student), -1)
  return 1 - jnp.sum(teacher * student, -1) * jax.lax.rsqrt(jnp.maximum(lengths, 1e-12))


def weighted_mean(
  values: Float[Array, '*b'], weight: Float[Array, '*b'] | Bool[Array, '*b']
) -> Float[Array, '']:
  """Mean by weight, 0 where all weights are; what stands at a weight of 0 does not count, NaN included."""
  weight = weight.astype(jnp.float32)
  return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / jnp.maximum(jnp.sum(weight), 1e-6)


def label_weight(batch: Mapping[str, Any]) -> Float[Array, '*b']:
  """What each label counts: the `weight` of its row, and 0 for tokens without a label (-1)."""
  label, weight = batch['label'], batch['weight'].astype(jnp.float32)
  return weight if label.ndim == 1 else weight[:, None] * (label >= 0)


def classification_loss(logits: Float[Array, '*b c'], batch: Mapping[str, Any]) -> Float[Array, '']:
  """Mean cross-entropy over the batch's labels, of rows or of words, by weight; filler rows (weight 0) do not count."""
  return weighted_mean(cross_entropy(logits, batch['label']), label_weight(batch))


def classification_scores(
  logits: Float[np.ndarray, 'N c'], labels: Int[np.ndarray, 'N'], words: None = None
) -> dict[str, Any]:
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


def tag_scores(
  logits: Float[np.ndarray, 'N c'], labels: Int[np.ndarray, 'N'], words: Words, constrained: bool = False
) -> dict[str, Any]:
  """Accuracy over words and, where tags mark spans, precision, recall and F1 of whole spans of all kinds together."""
  predictions = decoding.best_tags(logits, words, constrained)
  found = {'accuracy': metrics.accuracy(labels, predictions)}
  if words.scheme == 'plain':
    return found
  return found | metrics.span_scores(words.tags(labels), words.tags(predictions))


SCORES: dict[str, Callable[..., dict[str, Any]]] = {'classify': classification_scores, 'tag': tag_scores}


def make(name: str, constrained: bool = False) -> Task:
  """The task of that name. constrained: of tags. Raises UserError for one that does not exist."""
  if name not in SCORES:
    raise UserError(
      f"task.name is '{name}', which does not exist; expected one of {', '.join(SCORES)}, such as task.name='classify'."
    )
  scores = functools.partial(tag_scores, constrained=True) if constrained else SCORES[name]
  return Task(name, classification_loss, scores, constrained)
