"""Encoders in which tokens can leave: fine-tune, prune, measure and serve text classifiers in JAX.

import tokenprune_jax
tokenprune_jax.load('runs/imdb').predict(['A fine film.'])
"""

import os


def load(folder: str | os.PathLike, executor: str = 'compact'):
  """A `predict.Predictor` or `tagger.Tagger` from a run's workdir or an exported model. Raises UserError where there is none.

  executor: 'compact', which removes tokens where counts or capacities are fixed, or 'mask', which computes everything.
  """
  # Not above: importing the package must not cost the seconds that jax takes.
  from tokenprune_jax import predict

  return predict.load(folder, executor)
