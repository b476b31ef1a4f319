"""A plain top-k schedule on IMDB reviews: each layer passes on a fixed share of a review's tokens.

    python main.py --config=configs/imdb_topk.py --workdir=runs/imdb_topk

Variants and weights after a colon: `:half` (default, about half of dense's multiply-adds) or `:third`, and
`:half,mpnet-base`. Counts are fixed, so tokens leave in training too (executor compact).
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax.errors import UserError

ENDS = {'half': (0.95, 0.05), 'third': (0.65, 0.02)}  # shares left after the first and the last layer


def get_config(argument: str = 'half') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in ENDS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(ENDS)}')
  weights = weights or 'minilm-l6'
  config = imdb_fuzzy.get_config(f'dense,{weights}')
  depth, (first, last) = imdb_fuzzy.DEPTH.get(weights, 12), ENDS[variant]
  shares = tuple(round(first + (last - first) * l / (depth - 1), 3) for l in range(depth))
  with config.unlocked():
    config.reducer = {'name': 'topk', 'ratio': 0.9, 'shares': shares, 'score': 'received', 'leavers': 'gone'}
  config.model.executor = 'compact'
  return config
