"""A student of half the depth on IMDB reviews, distilled from a dense fine-tune: the baseline without any pruning.

    python main.py --config=configs/imdb_student.py --workdir=runs/imdb_student

Weights after a colon: `:minilm-l6` (default) or `:mpnet-base`. The layers are spread from the first to the last.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import settings


def get_config(weights: str = 'minilm-l6') -> ml_collections.ConfigDict:
  """The config of these weights."""
  weights = weights or 'minilm-l6'
  config = imdb_fuzzy.get_config(f'dense,{weights}')
  depth = imdb_fuzzy.DEPTH.get(weights, 12)
  half = depth // 2
  layers = tuple(1 + round(i * (depth - 1) / (half - 1)) for i in range(half))
  with config.unlocked():
    config.reducer = {'name': 'student', 'layers': layers}
    config.stages = (
      settings.stage(name='tune', epochs=2, reducer={'name': 'none'}),
      settings.stage(name='distil', epochs=2, init='tune', teacher='tune', objective='distil'),
    )
  return config
