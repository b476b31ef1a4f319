"""The smallest real run of everything: a random encoder of 3 layers learns 3 classes of generated text, offline.

    python main.py --config=configs/debug.py --workdir=runs/debug

Variants after a colon: pfc (default), pf, c, dense, two_stage. Most of its time on 2 cores is compiling.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import settings
from tokenprune_jax.errors import UserError

FUZZY = {**imdb_fuzzy.FUZZY, 'ratio': 0.7}
COMBINE = {**imdb_fuzzy.COMBINE, 'slots': 4, 'layer': 3}
REDUCERS = {
  'pfc': {'name': 'chain', 'reducers': (FUZZY, COMBINE)},
  'pf': FUZZY,
  'c': COMBINE,
  'dense': {'name': 'none'},
  'two_stage': FUZZY,
}


def get_config(variant: str = 'pfc') -> ml_collections.ConfigDict:
  """The config of a variant. Raises UserError for one that does not exist."""
  if variant not in REDUCERS:
    raise UserError(f"configs/debug.py has no variant '{variant}'; there is: {', '.join(REDUCERS)}.")
  config = settings.defaults()
  config['model'] |= {'weights': 'random:bert:layers=3,width=64,heads=4,hidden=128,vocab=512'}
  config['data'] |= {'name': 'synthetic', 'max_length': 64, 'buckets': (32, 64)}
  config['reducer'] = REDUCERS[variant]
  config['optimizer'] |= {'learning_rate': 1e-3}
  config['checkpoint'] |= {'every': 20}
  if variant == 'two_stage':  # dense first, then pruned
    config['stages'] = (
      settings.stage(name='dense', reducer={'name': 'none'}),
      settings.stage(name='pruned', init='dense'),
    )
  else:
    config['stages'] = (settings.stage(epochs=3),)
  return ml_collections.ConfigDict(config)
