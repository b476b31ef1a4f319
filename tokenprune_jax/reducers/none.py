"""No reduction: the dense encoder that every method is compared with."""

from tokenprune_jax.reducer import Reducer

TINY: dict = {}  # what the shared tests run
NEUTRAL: dict = {}  # the setting at which the method is the plain encoder


class Method(Reducer):
  """Keeps every token."""
