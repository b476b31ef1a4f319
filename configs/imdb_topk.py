"""A plain top-k schedule on IMDB reviews: each layer passes on a fixed share of a review's tokens.

    python main.py --config=configs/imdb_topk.py --workdir=runs/imdb_topk

Variants and weights after a colon: `:half` (default, about half of dense's multiply-adds), `:third`, `:light` (about 0.6, for
exits to go on from: configs/prune.py), `:cascade` (SpAtten's schedule and score), `:spatten` (that with its cascade of heads,
which are masked and counted, not removed), `:manual` (the schedule that STTABT is compared with), and `:half,mpnet-base`.
`reducer.score` is one of received, cls, cumulative and random. Counts are fixed, so tokens leave in training too (executor
compact).
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import pretrained, schedule
from tokenprune_jax.errors import UserError

# Shares left after the first layer (1 at most) and the last.
ENDS = {'light': (1.1, 0.1), 'half': (0.95, 0.05), 'third': (0.65, 0.02)}
SCHEDULES = {'cascade': schedule.cascade, 'spatten': schedule.cascade, 'manual': schedule.manual}
KEEP = 0.4  # of all: at the end of a cascade, on average of the manual schedule
HEADS = 0.75  # at the end of the cascade of heads


def get_config(argument: str = 'half') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in (*ENDS, *SCHEDULES):
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join((*ENDS, *SCHEDULES))}')
  weights = weights or 'minilm-l6'
  config = imdb_fuzzy.get_config(f'dense,{weights}')
  depth = pretrained.depth_of(weights)
  score = 'cumulative' if variant in ('cascade', 'spatten') else 'received'
  if variant in ENDS:
    first, last = ENDS[variant]
    shares = [min(first + (last - first) * l / max(depth - 1, 1), 1.0) for l in range(depth)]
  else:
    shares = SCHEDULES[variant](KEEP, depth)
  shares = tuple(round(share, 3) for share in shares)
  with config.unlocked():
    config.reducer = {
      'name': 'topk',
      'ratio': 0.9,
      'shares': shares,
      'score': score,
      'seed': 0,
      'rounding': 'down',
      'leavers': 'gone',
    }
    if variant == 'spatten':
      heads = {'name': 'heads', 'shares': schedule.cascade(HEADS, depth)}
      config.reducer = {'name': 'chain', 'reducers': (config.reducer.to_dict(), heads)}
  config.model.executor = 'compact'
  return config
