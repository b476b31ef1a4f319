"""Attention back-tracking (STTABT, ICLR 2023) on IMDB reviews: fine-tune, distil the ApproxNet, soft masks, hard masks.

    python main.py --config=configs/imdb_sttabt.py --workdir=runs/imdb_sttabt --config.reducer.theta=-1.0

`theta` is what keeps: sigmoid(theta) is about the share of tokens that a layer takes in. Variants and weights after a colon:
`:concrete` (default) or `:topk` (no thresholds: `--config.reducer.keep=0.35` of the tokens for each layer, nothing learned
after the ApproxNet), and `:concrete,mpnet-base`.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import settings
from tokenprune_jax.errors import UserError

STTABT = {
  'name': 'sttabt',
  'mode': 'hard',
  'factor': 4,
  'keep': 0.35,
  'theta': -1.0,
  'theta_weight': 1e-3,
  'mask_weight': 1e-3,
  'padding': False,
  'capacities': (),
  'overflow_rate': 0.01,
}


def get_config(argument: str = 'concrete') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in ('concrete', 'topk'):
    raise UserError(f'the config has no variant {variant!r}; choose one of concrete, topk')
  config = imdb_fuzzy.get_config(f'dense,{weights or "minilm-l6"}')
  tune = settings.stage(name='tune', epochs=2, reducer={'name': 'none'})
  approx = settings.stage(
    name='approx',
    epochs=5,
    init='tune',
    train='reducer/.*',
    objective='distil_approx',
    checkpoint='last',
    reducer={'mode': 'distil'},
  )
  concrete = (
    settings.stage(name='soft', epochs=1, init='approx', reducer={'mode': 'soft'}),
    settings.stage(name='hard', epochs=1, init='soft'),
  )
  # Nothing is left to learn, but capacities are found at the end of a stage.
  settled = (settings.stage(name='topk', epochs=1, init='approx', train='head/.*'),)
  with config.unlocked():
    config.reducer = {**STTABT, 'mode': 'topk' if variant == 'topk' else 'hard'}
    config.stages = (tune, approx, *(settled if variant == 'topk' else concrete))
    config.task.readout = 'cls'
    config.model.executor = 'compact'
  return config
