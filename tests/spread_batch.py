"""python -m tests.spread_batch: prints, of a batch on four devices that shares capacities, who overflows and the logits."""

import json

import jax
import numpy as np

from tests.reference import model_and_params, model_of, ragged_batch, settings
from tokenprune_jax import evaluate, sharding

LENGTHS = (9, 14, 7, 5, 9, 6, 14, 12)
SPEC = {
  **settings('early_exit', 'TINY'),
  'layers': (1, 2, 3),
  'threshold': 0.0,
  'capacity_batch': 2,
  'batch_capacities': ((2, 14, (1.0,) * 4, (1.0, 0.5, 0.5, 0.5)),),  # of every two examples one goes on
}


def batch_of_eight():
  """Eight documents, with what `evaluate.measure` reads of each."""
  rows = np.arange(len(LENGTHS))
  return {
    **ragged_batch(LENGTHS, 14),
    'index': rows,
    'label': rows % 2,
    'weight': np.ones(len(rows), np.float32),
  }


def model():
  """(model under `compact`, parameters)."""
  return model_of(SPEC).clone(executor='compact'), model_and_params(SPEC)[1]


def main():
  place = sharding.batch_sharding(sharding.make_mesh(2))
  shared, params = model()
  found = evaluate.compiled(shared, place)(params, evaluate.place(batch_of_eight(), place))
  print(json.dumps({name: np.asarray(found[name]).tolist() for name in ('overflow', 'logits')}))


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 4)
  main()
