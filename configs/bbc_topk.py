"""A plain top-k schedule on BBC News: each layer passes on a fixed share of a document's tokens.

    python main.py --config=configs/bbc_topk.py --workdir=runs/bbc_topk

Variants and weights as in configs/imdb_topk.py; documents and epochs as in configs/bbc_fuzzy.py.
"""

import ml_collections

from configs import bbc_fuzzy, imdb_topk


def get_config(argument: str = 'half') -> ml_collections.ConfigDict:
  """The config of 'variant' or 'variant,weights'."""
  config = imdb_topk.get_config(argument)
  documents = bbc_fuzzy.get_config('dense')
  config.data.update(documents.data)
  config.stages = documents.stages
  return config
