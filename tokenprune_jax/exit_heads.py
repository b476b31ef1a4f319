"""Classifiers that stand behind a layer, for early exits. All parameters and answers are float32.

  linear     W r: r is what the model's own head reads
  pooled     W tanh(P c): c is the state of [CLS], P a pooler of its own (DeeBERT; arXiv 2004.12993)
  attention  W tanh(B a): a is [CLS] after one self-attention of width 128 over tanh(A x) (FastBERT; arXiv 2004.02178)
  mixed      W sum_k w_k tanh(P c_k): [CLS] of all layers so far, one pooler for all, |w| = 1 (Sledgehammer; arXiv 2004.07453)

Of FastBERT's self-attention only the row of [CLS] is read, so only that is computed. Shapes: b batch, n slots, d width,
c classes, k layers so far.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokenprune_jax.attention import Mixing, mix
from tokenprune_jax.layers import Dense

HEADS = ('linear', 'pooled', 'attention', 'mixed')
READS_FIRST = ('pooled', 'attention', 'mixed')  # of these [CLS] must not leave
WIDTH, ATTENTION_HEADS = 128, 2  # of FastBERT's classifier
MIXING = Mixing()


class Linear(nn.Module):
  """One layer."""

  @nn.compact
  def __call__(self, read: Float[Array, 'b d'], labels: int) -> Float[Array, 'b c']:
    return Dense(labels, 'float32', name='out')(read)


class Pooled(nn.Module):
  """A tanh layer and a linear one."""

  @nn.compact
  def __call__(self, first: Float[Array, 'b d'], labels: int) -> Float[Array, 'b c']:
    hidden = jnp.tanh(Dense(first.shape[-1], 'float32', name='pooler')(first))
    return Dense(labels, 'float32', name='out')(hidden)


class Attention(nn.Module):
  """FastBERT's classifier."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b n d'], live: Bool[Array, 'b n'], labels: int) -> Float[Array, 'b c']:
    def dense(name):
      return Dense(WIDTH, 'float32', name=name)

    def heads(x):
      return x.reshape(*x.shape[:-1], ATTENTION_HEADS, -1).swapaxes(1, 2)

    narrow = jnp.tanh(dense('narrow')(x))
    query, key, value = (
      heads(dense('query')(narrow[:, :1])),
      heads(dense('key')(narrow)),
      heads(dense('value')(narrow)),
    )
    seen = live.astype(jnp.float32)[:, None]
    mixed, _ = mix(query, key, value, seen, jnp.ones(query.shape[:1] + (1,)), None, None, MIXING)
    read = dense('output')(mixed.swapaxes(1, 2).reshape(len(x), WIDTH))
    return Dense(labels, 'float32', name='out')(jnp.tanh(dense('hidden')(read)))


class Pooler(nn.Module):
  """The tanh layer of `mixed`, which all layers share."""

  @nn.compact
  def __call__(self, first: Float[Array, 'b d']) -> Float[Array, 'b d']:
    return jnp.tanh(Dense(first.shape[-1], 'float32', name='dense')(first))


class Mixed(nn.Module):
  """Sledgehammer's classifier on pooled states of the layers so far."""

  @nn.compact
  def __call__(self, pooled: Float[Array, 'b k d'], labels: int) -> Float[Array, 'b c']:
    weights = self.param('weights', nn.initializers.ones, pooled.shape[1:2])
    mean = jnp.einsum('bkd,k->bd', pooled, weights / jnp.maximum(jnp.linalg.norm(weights), 1e-9))
    return Dense(labels, 'float32', name='out')(mean)


def macs(head: str, width: int, labels: int, live: Float[Array, '*b']) -> Float[Array, '*b']:
  """Multiply-adds of one exit; live: slots that an attention reads."""
  if head == 'attention':
    w = WIDTH
    return live * (width * w + 2 * w * w + 2 * w) + 3 * w * w + w * labels
  return 0 * live + width * labels + (width * width if head == 'pooled' else 0)


def mixed_macs(width: int, layers: int) -> int:
  """Multiply-adds of a layer's share in `mixed`: its pooling, and its part of the exit behind it."""
  return width * width + layers * width
