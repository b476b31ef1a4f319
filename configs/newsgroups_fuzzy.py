"""Fuzzy token pruning and token combining (arXiv 2406.01283) on 20 Newsgroups, at 128 tokens.

    python main.py --config=configs/newsgroups_fuzzy.py:pf --workdir=runs/newsgroups_pf

Variants and weights as in configs/imdb_fuzzy.py. 3 epochs of all training documents take 30 minutes on 2 cores.
"""

import ml_collections

from configs import imdb_fuzzy


def get_config(argument: str = 'pfc_late') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  config = imdb_fuzzy.get_config(argument)
  config.data.update(
    {
      'name': 'newsgroups',
      'max_length': 128,
      'buckets': (32, 64, 96, 128),
      'train_limit': 0,
      'valid_limit': 0,
      'test_limit': 0,
    }
  )
  config.stages[0]['epochs'] = 3
  if config.model.weights == 'minilm-l6':
    config.optimizer.learning_rate = 1e-4  # as on BBC News
  return config
