"""Learned token pruning (LTP, arXiv 2107.00910) on IMDB reviews: a dense fine-tune, thresholds learned softly, a hard finish.

    python main.py --config=configs/imdb_ltp.py --workdir=runs/imdb_ltp --config.reducer.target_macs=0.4

A budget (a share of dense MACs, 0.5 by default) is what thresholds are trained for, and what the model costs on the
validation split. Variants and weights after a colon: `:budget` (default), `:l1` (no budget; `reducer.weight` pushes masks
down) or `:official` (the released code's normalisation and soft masks, for 128 tokens), and `:budget,mpnet-base`.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import settings
from tokenprune_jax.errors import UserError

LTP = {
  'name': 'ltp',
  'threshold': 0.01,
  'mode': 'hard',
  'temperature': 1e-3,
  'weight': 0.1,
  'target_macs': 0.0,
  'score_gradient': 0.3,
  'floor': 0.0,
  'scale': 1.0,
  'score_norm': 'received',
  'soft_form': 'stream',
  'protect': True,
  'first_layer': False,
  'capacities': (),
  'overflow_rate': 0.01,
}
VARIANTS = {
  'budget': {'target_macs': 0.5, 'weight': 10.0, 'first_layer': True},
  'l1': {},
  'official': {'score_norm': 'per_padded_token', 'soft_form': 'output', 'protect': False},
}


def get_config(argument: str = 'budget') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in VARIANTS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
  config = imdb_fuzzy.get_config(f'dense,{weights or "minilm-l6"}')
  with config.unlocked():
    config.reducer = {**LTP, **VARIANTS[variant]}
    config.stages = (
      settings.stage(name='tune', epochs=2, reducer={'name': 'none'}),
      settings.stage(name='soft', epochs=1, init='tune', reducer={'mode': 'soft'}),
      settings.stage(
        name='hard', epochs=1, init='soft', train='encoder/.*|head/.*', reducer={'mode': 'hard'}
      ),
    )
    config.model.executor = 'serve'
  return config
