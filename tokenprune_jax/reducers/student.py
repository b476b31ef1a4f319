"""A shallower student: some of the layers, distilled from the whole model (DistilBERT; arXiv 1910.01108).

The student starts from the teacher's own layers and is trained with the objective `distil`. What DistilBERT does while
pretraining (masked words, cosine of states) is left out: this is its task-specific distillation. The fixed baseline that
every method of fewer tokens is compared with.
"""

from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Reducer

TINY: dict = {'layers': (1, 3)}
NEUTRAL: dict = {'layers': ()}


class Method(Reducer):
  """Runs some of the layers."""

  layers: tuple[int, ...] = ()  # that run, counted from 1; (): all

  def check(self, depth: int, heads: int) -> None:
    rising = all(low < high for low, high in zip(self.layers, self.layers[1:]))
    if not rising or not all(1 <= l <= depth for l in self.layers):
      raise UserError(
        f'reducer.layers is {self.layers}; a student runs layers of its teacher, which has 1 to {depth}, in their order'
      )

  def blocks(self, depth: int) -> tuple[int, ...]:
    return self.layers or tuple(range(1, depth + 1))
