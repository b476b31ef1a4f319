"""A trained model ready to run, on texts (`predict`) as on words (`tagger`). Shapes: b batch, n slots, L layers."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tokenprune_jax import costs, data, evaluate, initial, models, pretrained, specs

SHORTEST = 32  # slots of the smallest batch shape; the others double it


class Runner:
  """A model with its tokenizer; one compiled program for each batch shape, kept for later calls."""

  def __init__(self, exported: pretrained.Exported, executor: str = 'compact'):
    self.labels, self.max_length, self.tokenizer = exported.labels, exported.max_length, exported.tokenizer
    self.constrained = exported.constrained  # of a tagger
    doubled = (SHORTEST << i for i in range(exported.max_length.bit_length()))
    self.buckets = (*(slots for slots in doubled if slots < exported.max_length), exported.max_length)
    self.model = models.Classifier(
      exported.config, models.make_reducer(exported.reducer_spec), len(exported.labels), exported.readout,
      exported.head, executor,
    ).check()  # fmt: skip
    initial.check_reducer(self.model, exported.params, 'the exported model')
    self.params = jax.device_put(exported.params)
    self.forward = jax.jit(functools.partial(forward, self.model))
    self.masked = jax.jit(functools.partial(forward, self.model.clone(executor='mask')))

  def batches(self, split: data.Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Examples of like length together."""
    yield from data.batches(
      split, batch_size=batch_size, buckets=self.buckets, seed=0, epoch_shuffle=False,
      pad_id=self.model.config.pad_id,
    ).iterator()  # fmt: skip

  def results(
    self, split: data.Split, batch_size: int, controls: Mapping[str, Any] | None = None
  ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(example, what `forward` says of it). Raises UserError for a control that the method has not, or a wrong value."""
    given = specs.given_controls(self.model, controls or {})
    for batch in self.batches(split, batch_size):
      batch = costs.with_controls(batch, given)
      result = jax.device_get(self.forward(self.params, batch))
      if result['overflow'].any():  # a capacity was too small
        result = evaluate.replaced(result, jax.device_get(self.masked(self.params, batch)))
      for row in np.flatnonzero(batch['weight']):
        yield int(batch['index'][row]), {name: values[row] for name, values in result.items()}


def forward(model: models.Classifier, params: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
  """probabilities [b c], kept [b L n], assignment [b n] and overflow [b]."""
  output = model.apply({'params': params}, batch)
  found = {name: getattr(output.trace, name) for name in ('kept', 'assignment', 'overflow')}
  return {'probabilities': jax.nn.softmax(output.logits), **found}
