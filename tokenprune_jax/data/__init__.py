"""Documents with labels: found, split, tokenised, cached and batched, without TensorFlow."""

from tokenprune_jax.data.batching import BatchPlan, batches
from tokenprune_jax.data.dataset import Dataset, load
from tokenprune_jax.data.tagged import load_tagged
from tokenprune_jax.data.tokenise import Encoder, Split, Words, encode
from tokenprune_jax.sources import cache_dir

LOADERS = {'classify': load, 'tag': load_tagged}  # by config.task.name

__all__ = [
  'LOADERS', 'BatchPlan', 'Dataset', 'Encoder', 'Split', 'Words', 'batches', 'cache_dir', 'encode', 'load', 'load_tagged',
]  # fmt: skip
