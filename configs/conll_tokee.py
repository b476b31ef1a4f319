"""SENTEE and TOKEE (arXiv 2105.13878) on CoNLL-2003: sentences, or single words, that are tagged before the last layer.

    python main.py --config=configs/conll_tokee.py --workdir=runs/conll_tokee --config.reducer.threshold=0.15

Dense fine-tune; then all exits and the encoder learn the tags together; then, for words, exits that training samples itself.
Variants, tags of CoNLL-2003 (or a file of your own) and weights after a colon: `:tokee` (default), `:sentee`,
`:tokee,pos`, `:tokee,ner,mpnet-base`, `:debug` (a random encoder of 3 layers, for a file in --config.data.train).

The paper's settings at 2, 3 and 4 times fewer multiply-adds are windows of 15, 5 and 5 words with thresholds 0.1, 0.15 and
0.25; `tokenprune_jax.calibrate` finds the threshold for a budget or for a span F1. Timed as it is served.
"""

import ml_collections

from configs import conll
from tokenprune_jax import pretrained, settings
from tokenprune_jax.errors import UserError

WORDS = {
  'name': 'tokee',
  'level': 'token',
  'threshold': 0.1,
  'upper': 2.0,
  'cap': 1.1,
  'window': 15,
  'criterion': 'entropy',
  'pool': 'max',
  'copied': 'all',
  'keep_norm': True,
  'dropout': 0.3,
  'transitions': 'free',
  'capacities': (),
  'capacity_batch': 0,
  'batch_capacities': (),
  'overflow_rate': 0.01,
}
VARIANTS = ('tokee', 'sentee', 'debug')
DEBUG = 'random:bert:layers=3,width=64,heads=4,hidden=128,vocab=512'


def get_config(argument: str = 'tokee') -> ml_collections.ConfigDict:
  """The config of 'variant', 'variant,tags' or 'variant,tags,weights'."""
  variant, tags, weights = (*argument.split(',', 2), '', '')[:3]
  if variant not in VARIANTS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
  if variant == 'debug':
    tags, weights = tags or 'file', weights or DEBUG
  config = conll.get_config(f'{tags or "ner"},{weights or "minilm-l6"}')
  reducer = {**WORDS, 'layers': tuple(range(1, pretrained.depth_of(config.model.weights)))}
  joint = settings.stage(name='joint', init='tune', objective='tags_joint', epochs=3, checkpoint='last')
  sampled = settings.stage(
    name='sampled',
    init='joint',
    teacher='joint',
    objective='tags_sampled',
    epochs=5,
    rate=0.5,
    checkpoint='last',
  )
  with config.unlocked():
    if variant == 'sentee':
      reducer |= {'level': 'sentence', 'upper': 1.0, 'overflow_rate': 0.0}
    config.reducer = reducer
    config.model.executor = 'serve'
    config.stages = (
      settings.stage(name='tune', epochs=3, reducer={'name': 'none'}),
      *((joint,) if variant == 'sentee' else (joint, sampled)),
    )
    if variant == 'debug':
      config.data.max_length, config.data.buckets = 64, (16, 32, 64)
      config.optimizer.learning_rate = 1e-3
  return config
