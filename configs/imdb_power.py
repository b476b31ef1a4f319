"""PoWER-BERT (arXiv 2001.08950) on IMDB reviews: a dense fine-tune, the search for counts, and training again with them.

    python main.py --config=configs/imdb_power.py --workdir=runs/imdb_power --config.reducer.penalty=1e-4

`penalty` says how hard the search presses, `target_macs` what the counts it finds are scaled to; retentions learn at 30
times the model's rate. Variant and weights after a colon: `:searched` (default; there is no other), and
`:searched,mpnet-base`.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import settings
from tokenprune_jax.errors import UserError


def get_config(argument: str = 'searched') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant != 'searched':
    raise UserError(f'the config has no variant {variant!r}; choose searched')
  config = imdb_fuzzy.get_config(f'dense,{weights or "minilm-l6"}')
  with config.unlocked():
    config.reducer = {
      'name': 'power',
      'counts': (),
      'mode': 'hard',
      'penalty': 1e-4,
      'target_macs': 0.0,
      'slots': config.data.max_length,
    }
    config.optimizer.groups = (('reducer/.*', 30.0), ('head/.*', 10.0))
    config.stages = (
      settings.stage(name='tune', epochs=2, reducer={'name': 'none'}),
      settings.stage(name='search', epochs=1, init='tune', reducer={'mode': 'search'}),
      settings.stage(name='retrain', epochs=2, init='tune'),
    )
    config.model.executor = 'compact'
  return config
