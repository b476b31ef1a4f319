"""What a frozen teacher says of the training texts, asked once a stage: without dropout, no epoch changes it.

Shapes: b batch, c classes, d width, N texts of the training split.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from tokenprune_jax import sharding, stages, writer
from tokenprune_jax.evaluate import in_order
from tokenprune_jax.models import Classifier
from tokenprune_jax.session import Session, batches

MOST_BYTES = 2**30  # on each host; where there is more to say, the teacher is asked at every step


class Answers(NamedTuple):
  """The part of `models.Output` that distillation reads: logits [b c], and what the head read [b d]."""

  logits: Float[Array, 'b c']
  read: Float[Array, 'b d']


def collected(
  session: Session, stage: Mapping[str, Any], model: Classifier | None, params: Any
) -> dict[str, np.ndarray] | None:
  """{field of `Answers`: [N …]} of a stage's teacher, on every process.

  None where there is no teacher, where the stage's objective may ask it for more than that, where words are labelled
  (they are too many), or where it is more than MOST_BYTES.
  """
  texts, config = len(session.dataset.splits['train']), session.weights.config
  size = 4 * texts * (config.width + len(session.dataset.labels))
  known = stage['objective'] in stages.DISTILLATIONS and session.task.name == 'classify'
  if model is None or not known or size > MOST_BYTES:
    return None
  writer.say(f'{stage["name"]}: the teacher answers {texts:,} texts, once')
  forward, place = stages.forward(model), sharding.batch_sharding(session.mesh)

  def said(batch):
    output = forward(params, batch)
    own = {name: getattr(output, name) for name in Answers._fields}
    return {**own, 'index': batch['index'], 'weight': batch['weight']}

  said = jax.jit(said, out_shardings=sharding.replicated(session.mesh))
  plan = batches(session, 'train', session.config['eval']['batch_size'])
  rows = in_order([jax.device_get(said(sharding.global_batch(batch, place))) for batch in plan.iterator(0)])
  return {name: rows[name] for name in Answers._fields}


def beside(batch: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
  """A batch with the answers to its rows."""
  return {**batch, **{f'taught_{name}': values[batch['index']] for name, values in (known or {}).items()}}


def given(batch: Mapping[str, Array]) -> Answers | None:
  """The answers in a batch, if there are any."""
  if 'taught_logits' not in batch:
    return None
  return Answers(*(batch[f'taught_{name}'] for name in Answers._fields))
