"""A finished run under other settings of its method: what curves of accuracy against cost are made of."""

import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import report

SCORES = ('accuracy', 'macro_f1', 'micro_f1', 'macro_f1_batch16', 'loss')
KEPT = ('keep_ratio', 'keep_ratio_by_layer', 'mac_ratio', 'macs_per_example', 'dense_macs_per_example')


class Trained:
  """The model that a run left in its workdir, and the splits that it was validated and tested on.

  changes: of its data settings, such as {'test_limit': 1000} (a sample of the same split) or {'max_length': 512}.
  """

  def __init__(self, folder: str | pathlib.Path, **changes: Any):
    import jax  # not above: --help needs no JAX

    from tokenprune_jax import pretrained

    self.folder, self.changes = pathlib.Path(folder), changes
    self.config = json.loads((self.folder / 'config.json').read_text(encoding='utf-8'))
    self.exported = pretrained.load_exported(self.folder / 'model')
    self.params = jax.device_put(self.exported.params)

  @functools.cached_property
  def splits(self) -> Mapping[str, Any]:
    """Tokenised; read when first asked for."""
    from tokenprune_jax import data

    spec = {**self.config['data'], **self.changes}
    tokenizer, seed = self.exported.tokenizer, self.config['seed']
    return data.load(spec, tokenizer, spec['max_length'], data.cache_dir(), seed=seed).splits

  @property
  def buckets(self) -> tuple[int, ...]:
    """Lengths that batches are filled up to."""
    longest = self.changes.get('max_length', self.config['data']['max_length'])
    return (*(slots for slots in self.config['data']['buckets'] if slots < longest), longest)

  def model(self, spec: Mapping[str, Any], executor: str = 'mask') -> Any:
    """The classifier with the method of `spec`."""
    from tokenprune_jax import models

    e = self.exported
    reducer = models.make_reducer(spec)
    return models.Classifier(e.config, reducer, len(e.labels), e.readout, e.head, executor).check()

  def evaluate(self, spec: Mapping[str, Any], split: str = 'test', params: Any = None) -> dict[str, Any]:
    """The measured part of a row of a result file; params: in place of the run's own."""
    from tokenprune_jax import evaluate, tasks

    start = time.monotonic()
    found, records = evaluate.evaluate(
      self.model(spec), self.params if params is None else params, self.splits[split], tasks.make('classify'),
      batch_size=32, buckets=self.buckets, pad_id=self.exported.config.pad_id,
    )  # fmt: skip
    return {
      **{key: found[key] for key in KEPT},
      **report.correctness(records),
      'metrics': {score: found[score] for score in SCORES},
      'seconds': round(time.monotonic() - start, 1),
      'commit': report.commit(),
      'reason': None,
    }

  def validation(self, spec: Mapping[str, Any], params: Any = None, limit: int = 256) -> Any:
    """What a method meets a budget with: up to `limit` documents of the validation split."""
    import jax

    from tokenprune_jax import data, stages

    forward, params = jax.jit(stages.forward(self.model(spec))), self.params if params is None else params
    plan = data.batches(
      self.splits['valid'], batch_size=32, buckets=self.buckets, seed=0, epoch_shuffle=True,
      pad_id=self.exported.config.pad_id,
    )  # fmt: skip

    def batches():
      for step in range(min(-(-limit // 32), plan.steps_per_epoch)):
        yield jax.device_put(plan.batch(step))

    return stages.Validation(
      lambda batch: forward(params, batch), batches, lambda: params.get('reducer', {}), self.exported.config
    )
