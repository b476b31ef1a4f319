"""Your own documents: a CSV, TSV or JSONL file with a column of text and a column of labels.

    python main.py --config=configs/own_data.py:pfc_late --workdir=runs/mine --config.data.train=reviews.csv \
        --config.data.text=text --config.data.label=label

Without --config.data.valid and --config.data.test, both are split off from the training file, by class. A second text
column is --config.data.text_pair. Variants and weights as in configs/imdb_fuzzy.py. Start with `dense`: what a pruned
model loses is its accuracy against that one.
"""

import ml_collections

from configs import imdb_fuzzy


def get_config(argument: str = 'pfc_late') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  config = imdb_fuzzy.get_config(argument)
  config.data.update({'name': 'file', 'train_limit': 0, 'valid_limit': 0, 'test_limit': 0})
  config.stages[0]['epochs'] = 3
  return config
