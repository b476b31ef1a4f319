"""Fuzzy token pruning and token combining (arXiv 2406.01283) on IMDB reviews.

    python main.py --config=configs/imdb_fuzzy.py:pfc_early --workdir=runs/imdb_pfc_early

Variants: dense; p (keys and values of the best tokens by attention), pf (with the fuzzy selection); c_late, c_early
(combining alone); pfc_late, pfc_early (both; pfc_late is the default). Combining replaces the last layer but one (late: 11
of 12, 5 of 6) or one a little above the middle (early: 7 of 12, 4 of 6). Weights follow the variant, for their depth:
`:pfc_early,mpnet-base`; MiniLM-L6 is the default.

1,500 training reviews and 2 epochs take 6 minutes on 2 cores; all of them an hour (--config.data.train_limit=0).
"""

import ml_collections

from tokenprune_jax import pretrained, settings
from tokenprune_jax.errors import UserError

FUZZY = {
  'name': 'fuzzy',
  'ratio': 0.9,
  'rule': 'protect',
  'head_shared': False,
  'alpha_important': 0.01,
  'alpha_unimportant': 0.9,
  'capacities': (),
  'overflow_rate': 0.0,
  'seed': 0,
}
COMBINE = {'name': 'combine', 'slots': 8, 'spread': 1.0, 'noise': 1.0, 'scale': True, 'identity': True}
VARIANTS = ('dense', 'p', 'pf', 'c_late', 'c_early', 'pfc_late', 'pfc_early')


def reducer(variant: str, weights: str) -> dict:
  """The reducer of a variant. Raises UserError for one that does not exist."""
  if variant not in VARIANTS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
  if variant == 'dense':
    return {'name': 'none'}
  method, _, when = variant.partition('_')
  prune = {**FUZZY, 'rule': 'rank' if method == 'p' else 'protect'}
  if not when:
    return prune
  depth = pretrained.depth_of(weights)
  layer = depth - 1 if when == 'late' else round(7 / 12 * depth)
  combine = {**COMBINE, 'layer': max(layer, 2)}  # the first cannot be replaced
  return combine if method == 'c' else {'name': 'chain', 'reducers': (prune, combine)}


def learning_rate(variant: str, weights: str) -> float:
  """For MiniLM chosen on the validation split (docs/methods/fuzzy.md); for larger encoders the paper's."""
  if weights != 'minilm-l6':
    return 2e-5
  return 1e-4 if variant in ('dense', 'p', 'pf') else 2e-4


def get_config(argument: str = 'pfc_late') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  weights = weights or 'minilm-l6'
  config = settings.defaults()
  config['model'] |= {'weights': weights}
  config['data'] |= {
    'name': 'imdb',
    'max_length': 256,
    'buckets': (64, 128, 192, 256),
    'train_limit': 1500,
    'valid_limit': 500,
    'test_limit': 2000,
  }
  config['reducer'] = reducer(variant, weights)
  config['optimizer'] |= {
    'learning_rate': learning_rate(variant, weights),
    'groups': (('head/.*|reducer/.*', 10.0),),
  }
  config['stages'] = (settings.stage(epochs=2),)
  return ml_collections.ConfigDict(config)
