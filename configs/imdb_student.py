"""A student of half the depth on IMDB reviews, distilled from a dense fine-tune: the baseline without any pruning.

    python main.py --config=configs/imdb_student.py --workdir=runs/imdb_student

Variants and weights after a colon: `:half` (default) or `:third` of the layers, spread from the first to the last, and
`:half,mpnet-base`.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import pretrained, settings
from tokenprune_jax.errors import UserError

PARTS = {'half': 2, 'third': 3}


def get_config(argument: str = 'half') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in PARTS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(PARTS)}')
  weights = weights or 'minilm-l6'
  config = imdb_fuzzy.get_config(f'dense,{weights}')
  depth = pretrained.depth_of(weights)
  count = max(depth // PARTS[variant], 1)
  layers = tuple(1 + round(i * (depth - 1) / max(count - 1, 1)) for i in range(count))
  with config.unlocked():
    config.reducer = {'name': 'student', 'layers': layers}
    config.stages = (
      settings.stage(name='tune', epochs=2, reducer={'name': 'none'}),
      settings.stage(name='distil', epochs=2, init='tune', teacher='tune', objective='distil'),
    )
  return config
