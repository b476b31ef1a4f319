"""A shallower student: some of the layers, distilled from the whole model (DistilBERT; arXiv 1910.01108).

  objective `distil`:  T^2 KL(teacher || student) of logits / T, T = 2, half and half with the task's cross-entropy

The student starts from the teacher's own layers. What DistilBERT does while pretraining (masked words, cosine of states) is
left out: this is its task-specific distillation. The fixed baseline that every method of fewer tokens is compared with.
"""

from jaxtyping import Array, Float

from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Reducer
from tokenprune_jax.tasks import classification_loss, divergence, label_weight, weighted_mean

TINY: dict = {'layers': (1, 3)}
NEUTRAL: dict = {'layers': ()}
TEMPERATURE = 2.0


def softened(
  teacher: Float[Array, '*b c'], student: Float[Array, '*b c'], temperature: float = TEMPERATURE
) -> Float[Array, '*b']:
  """T^2 KL(teacher || student) of softened logits: its gradient does not shrink with T."""
  return temperature**2 * divergence(teacher / temperature, student / temperature)


def distil(apply, params, batch, rng, teacher):
  """Half the teacher's answers, half the labels; means over the batch's labels by weight."""
  if teacher is None:
    raise UserError(
      "the objective 'distil' needs a teacher: name the stage that trained it in the stage's `teacher`."
    )
  logits = apply(params, batch, rng).logits
  soft = weighted_mean(softened(teacher(batch).logits, logits), label_weight(batch))
  task = classification_loss(logits, batch)
  return 0.5 * (soft + task), {'task_loss': task, 'distil_loss': soft}


OBJECTIVES = {'distil': distil}


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
