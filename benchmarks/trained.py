"""A finished run under other settings of its method: what curves of accuracy against cost are made of."""

import time
from collections.abc import Mapping
from typing import Any

from benchmarks import accuracy, report
from tokenprune_jax import evaluate
from tokenprune_jax.calibrate import BATCH, Calibration

LENGTHS = (35, 70, None)  # short, middle and long texts, as Magic Pyramid tells them apart
SCORES = ('accuracy', 'precision', 'recall', 'f1', 'macro_f1', 'micro_f1', 'macro_f1_batch16', 'loss')


class Trained(Calibration):
  """The model that a run left in its workdir, measured on its splits."""

  def evaluate(
    self, spec: Mapping[str, Any], split: str = 'test', params: Any = None, executor: str = 'mask'
  ) -> dict[str, Any]:
    """The measured part of a row of a result file; params: in place of the run's own."""
    start = time.monotonic()
    known, controls = self.program(spec) if executor == 'mask' else (spec, {})
    model, params = self.model(known).clone(executor=executor), self.params if params is None else params
    found, records = evaluate.evaluate(
      model, params, self.splits[split], self.task, batch_size=BATCH, buckets=self.buckets,
      pad_id=self.exported.config.pad_id, controls=controls,
    )  # fmt: skip
    return {
      **{key: found[key] for key in accuracy.KEPT},
      **report.correctness(records),
      **({'by_length': report.by_length(records, LENGTHS)} if self.splits[split].words is None else {}),
      'metrics': {score: found[score] for score in SCORES if score in found},
      'seconds': round(time.monotonic() - start, 1),
      'commit': report.commit(),
      'reason': None,
    }
