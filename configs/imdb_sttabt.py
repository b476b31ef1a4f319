"""Attention back-tracking (STTABT, ICLR 2023) on IMDB reviews: fine-tune, distil the ApproxNet, soft masks, hard masks.

    python main.py --config=configs/imdb_sttabt.py --workdir=runs/imdb_sttabt --config.reducer.theta=-1.0

`theta` is what keeps: sigmoid(theta) is about the share of tokens that a layer takes in, and `mask_weight` holds soft
training to it: with the paper's 1e-3, and a larger learning rate than the paper's, it learns to keep all it can. Variants
and weights after a colon: `:concrete` (default), `:topk` (no thresholds: `--config.reducer.keep=0.35` of the tokens for each
layer, nothing learned after the ApproxNet), `:approx` (the ApproxNet of the pretrained encoder alone) or `:oracle` (top-k by
the true attention of the dense run, which the encoder then learns to do with: what a perfect ApproxNet would reach, at more
than dense's cost), and `:concrete,mpnet-base`.
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
  'shift': 0.0,
  'mix': 0.1,
  'target_macs': 0.0,
  'theta_weight': 1e-3,
  'mask_weight': 10.0,
  'soft_form': 'stream',
  'padding': False,
  'capacities': (),
  'overflow_rate': 0.01,
}


MODES = {'concrete': 'hard', 'topk': 'topk', 'approx': 'distil', 'oracle': 'topk'}


def get_config(argument: str = 'concrete') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in MODES:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(MODES)}')
  config = imdb_fuzzy.get_config(f'dense,{weights or "minilm-l6"}')
  tune = settings.stage(name='tune', epochs=2, reducer={'name': 'none'})
  approx = settings.stage(
    name='approx',
    epochs=5,
    init='tune',
    train='reducer/.*',
    rate=10.0,  # it starts from nothing
    objective='distil_approx',
    checkpoint='last',
    reducer={'mode': 'distil'},
  )
  alone = settings.stage(**{**approx, 'init': 'pretrained'})
  concrete = (
    settings.stage(name='soft', epochs=1, init='approx', reducer={'mode': 'soft'}),
    # Nothing but the regulariser reaches the thresholds through hard masks.
    settings.stage(name='hard', epochs=1, init='soft', train='(?!reducer/).*'),
  )
  # Nothing is left to learn, but capacities are found at the end of a stage.
  settled = (settings.stage(name='topk', epochs=1, init='approx', train='head/.*'),)
  oracle = settings.stage(name='oracle', epochs=1, init='tune', train='(?!reducer/).*')
  with config.unlocked():
    config.reducer = {**STTABT, 'mode': MODES[variant]}
    config.stages = {
      'concrete': (tune, approx, *concrete), 'topk': (tune, approx, *settled), 'approx': (alone,),
      'oracle': (tune, oracle),
    }[variant]  # fmt: skip
    if variant == 'oracle':
      config.reducer.factor = 1
    config.optimizer.groups = (('head/.*|reducer/thresholds/.*', 10.0),)
    config.task.readout = 'cls'
    config.model.executor = 'compact'
  return config
