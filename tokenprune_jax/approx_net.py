"""The ApproxNet of attention back-tracking: a narrow encoder that predicts attention maps, and its distillation.

What it is for, and the formulas: `reducers/sttabt.py`. Shapes: b batch, n tokens, d width, h heads, c classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax.attention import Evidence
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Dense
from tokenprune_jax.reducer import Inputs, Memory, Reducer
from tokenprune_jax.tasks import weighted_mean
from tokenprune_jax.tokens import Tokens

EPSILON = 1e-7


class Watcher(Reducer):
  """Removes nothing, and remembers of every layer the evidence that it keeps.

  keeps 'terms': what scores are made of; 'scores': those of every head, and states [b n d] (0: embeddings), from which
  there is something to learn.
  """

  keeps: str = 'scores'

  def soft(self) -> str:
    return 'stream' if self.keeps == 'scores' else ''  # they need a gradient

  def reads(self, layer: int) -> tuple[str, ...]:
    return (self.keeps,)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    return tokens, {'state_0': tokens.x} if self.keeps == 'scores' else {}

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    return tokens, {**memory, f'{self.keeps}_{layer}': getattr(evidence, self.keeps)}

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    return tokens, {**memory, f'state_{layer}': tokens.x} if self.keeps == 'scores' else memory


class ApproxNet(nn.Module):
  """A narrow encoder with a classifier of its own: what `Watcher` remembers, and logits [b c]."""

  @nn.compact
  def __call__(self, config: EncoderConfig, inputs: Inputs, keeps: str) -> tuple[Memory, Float[Array, 'b c']]:
    tokens, memory, _ = Encoder(config, Watcher(keeps), name='encoder')(inputs)
    hidden = jnp.tanh(Dense(config.width, 'float32', name='pooler')(tokens.x[:, 0]))
    return memory, Dense(inputs.labels, 'float32', name='out')(hidden)


class Widths(nn.Module):
  """The training-only projections to the big encoder's width."""

  @nn.compact
  def __call__(self, states: Memory, width: int, depth: int) -> Memory:
    found = {
      f'hidden_{l}': Dense(width, 'float32', name=f'hidden_{l}')(states[f'state_{l}']) for l in range(depth)
    }
    return {**found, 'embedding': Dense(width, 'float32', name='embedding')(states['state_0'])}


def map_divergence(
  teacher: Float[Array, 'b h n n'], student: Float[Array, 'b h n n'], valid: Float[Array, 'b n']
) -> Float[Array, '']:
  """KL(teacher || student) of attention rows: mean over real rows of an example, then over heads and examples."""
  rows = (teacher * (jnp.log(teacher + EPSILON) - jnp.log(student + EPSILON))).sum(-1)  # [b h n]
  real = valid.sum(-1)
  return weighted_mean((rows * valid[:, None]).sum(-1).mean(-1) / jnp.maximum(real, 1), real > 0)


def state_error(
  mine: Float[Array, 'b n d'], theirs: Float[Array, 'b n d'], weight: Float[Array, 'b n']
) -> Float[Array, '']:
  """Mean squared difference over the weighted tokens and all features."""
  squares = ((mine - jax.lax.stop_gradient(theirs)) ** 2).mean(-1)
  return (squares * weight).sum() / weight.sum()


def distil(apply, params, batch, rng, teacher):
  """The four parts of ApproxNet's distillation; nothing drops out, since the big encoder is its own teacher."""
  output = apply(params, batch)
  if output.exits is None:
    raise UserError("the objective 'distil_approx' needs reducer.mode='distil' in its stage.")
  theirs, mine = jax.lax.stop_gradient(jax.nn.softmax(output.logits)), jax.nn.softmax(output.exits[:, 0])
  answers = weighted_mean(((mine - theirs) ** 2).mean(-1), batch['weight'])
  return output.loss + answers, {'states_loss': output.loss, 'answers_loss': answers}
