"""Documents with labels: found, split, tokenised, cached and batched, without TensorFlow."""

from tokenprune_jax.data.batching import BatchPlan, batches
from tokenprune_jax.data.dataset import Dataset, cache_dir, load
from tokenprune_jax.data.tokenise import Encoder, Split, encode

__all__ = ['BatchPlan', 'Dataset', 'Encoder', 'Split', 'batches', 'cache_dir', 'encode', 'load']
