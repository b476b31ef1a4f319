"""Early exits on IMDB reviews: a dense fine-tune, then exits on its frozen states; with or without a threshold on attention.

    python main.py --config=configs/imdb_exits.py --workdir=runs/imdb_exits

Variants and weights after a colon: `:exits` (default), `:threshold` (tokens that receive too little attention leave, no
exits) or `:pyramid` (both, in a chain; imdb_pyramid.py learns the thresholds), and `:exits,mpnet-base`. What a request saves
depends on its content: such a model is timed as `tokenprune_jax.load(workdir).serve()` runs it.
"""

import ml_collections

from configs import imdb_fuzzy
from tokenprune_jax import pretrained, settings
from tokenprune_jax.errors import UserError

EXITS = {
  'name': 'early_exit',
  'head': 'attention',  # FastBERT's: linear exits are seldom sure
  'criterion': 'entropy',
  'threshold': 0.3,
  'temperatures': (),
  'fit_temperatures': False,
  'own_segment': False,
  'capacity_batch': 0,
  'batch_capacities': (),
  'overflow_rate': 0.0,
}
# FastBERT's. On 1,274 articles of BBC News exits have 98.1% at a quarter of dense's multiply-adds after five, 92.0% after 1.
EPOCHS = 5
# Of what is trained alone on frozen states, whatever suits the encoder; classifiers have ten times that.
RATE = 1e-4
THRESHOLD = {'name': 'threshold', 'threshold': 0.005, 'capacities': (), 'overflow_rate': 0.01}


def get_config(argument: str = 'exits') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  weights = weights or 'minilm-l6'
  config = imdb_fuzzy.get_config(f'dense,{weights}')
  layers = tuple(range(1, pretrained.depth_of(weights)))
  exits = {**EXITS, 'layers': layers}
  reducers = {
    'exits': exits,
    'threshold': THRESHOLD,
    'pyramid': {'name': 'chain', 'reducers': (THRESHOLD, exits)},
  }
  if variant not in reducers:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(reducers)}')
  tune = settings.stage(name='tune', epochs=2)
  fit = settings.stage(
    name='exits', init='tune', train='reducer/.*', objective='exits', epochs=EPOCHS,
    rate=RATE / config.optimizer.learning_rate,
  )  # fmt: skip
  with config.unlocked():
    config.reducer = reducers[variant]
    config.model.executor = 'serve'
    config.stages = (tune,) if variant == 'threshold' else (tune, fit)
  return config
