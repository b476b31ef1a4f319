"""Magic Pyramid (arXiv 2111.00230) on IMDB reviews: LTP's learned thresholds and early exits, in four stages.

    python main.py --config=configs/imdb_pyramid.py --workdir=runs/imdb_pyramid --config.reducer.reducers[0].target_macs=0.5

Dense fine-tune; thresholds learned with soft masks; the model trained on under hard ones; then exits on its frozen states,
each to agree with its last classifier. `target_macs` is what pruning alone is to cost; `reducers[1].threshold` what exits
take off it. Variants and weights after a colon: `:fastbert` (default: exits with a self-attention each) or `:linear`, and
`:fastbert,mpnet-base`.
"""

import ml_collections

from configs import imdb_exits, imdb_ltp
from tokenprune_jax import pretrained, settings
from tokenprune_jax.errors import UserError

HEADS = {'fastbert': 'attention', 'linear': 'linear'}


def get_config(argument: str = 'fastbert') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in HEADS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(HEADS)}')
  weights = weights or 'minilm-l6'
  config = imdb_ltp.get_config(f'budget,{weights}')
  layers = tuple(range(1, pretrained.depth_of(weights)))
  exits = {**imdb_exits.EXITS, 'head': HEADS[variant], 'layers': layers}
  none = {'layers': ()}  # until they are trained
  tune, soft, hard = (dict(stage) for stage in config.stages)
  with config.unlocked():
    config.reducer = {'name': 'chain', 'reducers': (config.reducer.to_dict(), exits)}
    config.stages = (
      tune,
      {**soft, 'reducer': {'ltp': soft['reducer'], 'early_exit': none}},
      {**hard, 'reducer': {'ltp': hard['reducer'], 'early_exit': none}},
      settings.stage(
        name='exits', epochs=imdb_exits.EPOCHS, init='hard', train='reducer/reducers_1/.*', objective='exits',
        reducer={'ltp': {**hard['reducer'], 'target_macs': 0.0}},  # its thresholds stay as they are
        rate=imdb_exits.RATE / config.optimizer.learning_rate,
      ),
    )  # fmt: skip
  return config
