"""Early exit: an example leaves at the first layer whose own classifier is sure (FastBERT, DeeBERT; arXiv 2004.02178).

  u_l  = -sum_c p_c log p_c / log C, from p = softmax(exit_l(read-out of layer l))
  exit at the first l with u_l < threshold; its answer is exit_l's

Exits are one linear layer each, on the same read-out as the model's own head. The objective `exits` trains them on
frozen states (a stage with train='reducer/.*'), each to agree with the last classifier: sum over exits of
KL(last || exit), no label needed. FastBERT's exits have a small self-attention each, which costs 2.5% of a layer; here a
linear one, as in DeeBERT. While training nobody leaves.

Control of a request: `exit_threshold` [b], in place of the field.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Dense
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer, read_out
from tokenprune_jax.tasks import weighted_mean
from tokenprune_jax.tokens import Tokens, empty_rows

TINY: dict = {'layers': (1, 2), 'threshold': 0.95}
NEUTRAL: dict = {'threshold': 0.0}


def uncertainty(logits: Float[Array, '*b c']) -> Float[Array, '*b']:
  """Entropy of the softmax as a share of the largest there is; from log-probabilities, so it is never NaN."""
  log_p = jax.nn.log_softmax(logits)
  return -(jnp.exp(log_p) * log_p).sum(-1) / jnp.log(float(logits.shape[-1]))


def exits(apply, params, batch, rng, teacher):
  """KL(last || exit), the sum over exits and the mean over the batch's rows by weight."""
  output = apply(params, batch, rng)
  last = jax.lax.stop_gradient(jax.nn.log_softmax(output.logits))[:, None]
  divergence = (jnp.exp(last) * (last - jax.nn.log_softmax(output.exits))).sum(-1)  # [b e]
  loss = weighted_mean(divergence.sum(-1), batch['weight'])
  return loss, {'exit_loss': loss}


OBJECTIVES = {'exits': exits}


class Exit(nn.Module):
  """A classifier on one layer's read-out."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b d'], labels: int) -> Float[Array, 'b c']:
    return Dense(labels, 'float32', name='out')(x)


class Method(Reducer):
  """Answers an example at the first layer that is sure of it."""

  layers: tuple[int, ...] = tuple(range(1, 12))  # with an exit, counted from 1
  threshold: float = 0.1  # of the normalised entropy: 0 nobody leaves, above 1 all leave at the first exit
  readout: str = 'mean'  # or 'cls': the same as the task's

  def check(self, depth: int, heads: int) -> None:
    if self.threshold and not all(1 <= l < depth for l in self.layers):
      raise UserError(
        f'reducer.layers is {self.layers}; an exit stands behind one of the layers 1 to {depth - 1}'
      )
    if self.threshold < 0:
      raise UserError(
        f'reducer.threshold is {self.threshold}; it is a share of the largest entropy, 0 or more'
      )

  def setup(self):
    self.exit = {str(l): Exit() for l in self.layers}

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, False) for l in self.layers if l < depth)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    b = inputs.ids.shape[0]
    given = jnp.full(b, self.threshold)
    memory = {
      'exit_threshold': inputs.controls.get('exit_threshold', given),
      'exited': jnp.zeros(b, bool),
      'prediction': jnp.zeros((b, inputs.labels)),
      'macs_exits': jnp.zeros(b),
    }
    return tokens, memory

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if layer not in self.layers:
      return tokens, memory
    before, labels = memory['exited'], memory['prediction'].shape[1]
    state = read_out(tokens, self.readout)
    logits = self.exit[str(layer)](state, labels)
    if train:
      sofar = [memory['logits']] if 'logits' in memory else []
      return tokens, {**memory, 'logits': jnp.concatenate([*sofar, logits[:, None]], axis=1)}
    now = ~before & (uncertainty(logits) < memory['exit_threshold'])
    memory = {
      **memory,
      'exited': before | now,
      'prediction': jnp.where(now[:, None], logits, memory['prediction']),
      'macs_exits': memory['macs_exits'] + jnp.where(before, 0, state.shape[1] * labels),
    }
    return empty_rows(tokens, memory['exited']), memory
