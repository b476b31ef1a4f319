"""Tagging words: named entities, parts of speech or chunks of CoNLL-2003, or a file of your own.

    python main.py --config=configs/conll.py:ner --workdir=runs/ner
    python main.py --config=configs/conll.py:file --workdir=runs/mine --config.data.train=mine.conll

Variants ner (default), pos, chunk, and file; weights follow the variant: `:ner,mpnet-base`. What a file may look like, and
what else can be set: docs/tagging.md.
"""

import ml_collections

from tokenprune_jax import settings
from tokenprune_jax.errors import UserError

VARIANTS = ('ner', 'pos', 'chunk', 'file')


def get_config(argument: str = 'ner') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  variant, _, weights = argument.partition(',')
  if variant not in VARIANTS:
    raise UserError(f'the config has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
  config = settings.defaults()
  config['task'] |= {'name': 'tag', 'readout': 'tokens', 'head': 'linear'}
  config['model'] |= {'weights': weights or 'minilm-l6'}
  config['data'] |= {'max_length': 128, 'buckets': (16, 32, 64, 128)}
  config['data'] |= {'name': 'file'} if variant == 'file' else {'name': 'conll2003', 'label': variant}
  config['optimizer'] |= {'learning_rate': 1e-4 if weights in ('', 'minilm-l6') else 2e-5}
  config['stages'] = (settings.stage(epochs=3),)
  return ml_collections.ConfigDict(config)
