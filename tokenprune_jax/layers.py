"""The encoder's products, activation and normalisation as functions with gradients of their own, dropout, and Linen shells.

Automatic differentiation gives the same numbers. Written out, each keeps for the backward pass only what that needs, and
a kernel's gradient comes from a product that transposes the narrower of its two factors: XLA otherwise transposes the
activations, which on a CPU can take longer than the product. Shapes: i features in, o features out, d width.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32


@jax.custom_vjp
def product(x: Float[Array, '*b i'], kernel: Float[Array, 'i o']) -> Float[Array, '*b o']:
  """x @ kernel, accumulated and returned in float32."""
  return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_forward(x, kernel):
  return product(x, kernel), (x, kernel)


def _product_backward(saved, gradient):
  x, kernel = saved
  gradient = gradient.astype(x.dtype)
  rows = tuple(range(x.ndim - 1))
  by_x = jnp.matmul(gradient, kernel.T, preferred_element_type=jnp.float32)
  narrow, wide = (x, gradient) if kernel.shape[0] <= kernel.shape[1] else (gradient, x)
  by_kernel = jax.lax.dot_general(narrow, wide, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
  if narrow is not x:  # the barrier keeps XLA from making one product of the two again
    by_kernel = jax.lax.optimization_barrier(by_kernel).T
  return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def gelu(x: Float[Array, '*b']) -> Float[Array, '*b']:
  """x Phi(x) with the error function (arXiv 1606.08415)."""
  return x * _normal_cdf(x)


def _normal_cdf(x):
  return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x):
  below = _normal_cdf(x)
  return x * below, below + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


gelu.defvjp(_gelu_forward, lambda slope, gradient: (slope * gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x: Float[Array, '*b d'], scale: Float[Array, ' d'], bias: Float[Array, ' d'], epsilon: float
) -> Float[Array, '*b d']:
  """LayerNorm (arXiv 1607.06450) with the two-pass variance, as the pretrained weights were made with."""
  return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
  centred = x - x.mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
  normed = centred * inverse
  return normed * scale + bias, (normed, inverse, scale)


def _layer_norm_backward(epsilon, saved, gradient):
  normed, inverse, scale = saved
  rows = tuple(range(gradient.ndim - 1))
  g = gradient * scale
  along = (g * normed).mean(-1, keepdims=True)
  by_x = inverse * (g - g.mean(-1, keepdims=True) - normed * along)
  return by_x, (gradient * normed).sum(rows), gradient.sum(rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def random_bits(rng: Array, shape: Sequence[int]) -> UInt32[Array, '...']:
  """32 bits for each place: its number, mixed with two words of the key `rng` by three multiplications (triple32).

  Takes about as long as a copy does on a CPU, where `jax.random.bits` takes several times as long. For masks; not meant for
  statistics.
  """
  first, second = jax.random.bits(rng, (2,), jnp.uint32)
  place, stride = jnp.zeros((), jnp.uint32), 1
  for axis in reversed(range(len(shape))):
    place += jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * jnp.uint32(stride % 2**32)
    stride *= shape[axis]
  bits = place ^ first
  bits = (bits ^ (bits >> 17)) * jnp.uint32(0xED5AD4BB)
  bits = (bits ^ (bits >> 11)) * jnp.uint32(0xAC4C1B51) + second
  bits = (bits ^ (bits >> 15)) * jnp.uint32(0x31848BAB)
  return bits ^ (bits >> 14)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropped(x: Float[Array, '*b'], rate: float, rng: Array) -> Float[Array, '*b']:
  """Dropout (JMLR 15:1929): x / (1 - rate) with probability 1 - rate, else 0, for each entry. rate: from 0, below 1."""
  return jnp.where(random_bits(rng, x.shape) >= jnp.uint32(rate * 2**32), x / (1 - rate), 0)


# Drawn again on the way back: cheaper than keeping what was drawn.
dropped.defvjp(
  lambda x, rate, rng: (dropped(x, rate, rng), rng),
  lambda rate, rng, gradient: (dropped(gradient, rate, rng), None),
)

ACTIVATIONS: dict[str, Callable] = {'gelu': gelu, 'gelu_tanh': nn.gelu, 'relu': nn.relu}


class Dropout(nn.Module):
  """`dropped` in training, by the rng named dropout; nothing at inference."""

  rate: float

  def __call__(self, x: Float[Array, '*b'], train: bool) -> Float[Array, '*b']:
    return dropped(x, self.rate, self.make_rng('dropout')) if train and self.rate else x


class Dense(nn.Module):
  """x @ kernel + bias with float32 accumulation, whatever the compute type."""

  features: int
  dtype: str

  def __call__(self, x: Float[Array, '*b i']) -> Float[Array, '*b o']:
    return joint((self,), x)[0]

  @nn.compact
  def weights(self, inputs: int) -> tuple[Float[Array, 'i o'], Float[Array, ' o']]:
    """(kernel, bias)."""
    kernel = self.param('kernel', nn.initializers.normal(0.02), (inputs, self.features))
    return kernel, self.param('bias', nn.initializers.zeros, (self.features,))


def joint(layers: Sequence[Dense], x: Float[Array, '*b i']) -> list[Float[Array, '*b o']]:
  """What each layer makes of `x`, all in one product."""
  dtype = layers[0].dtype
  kernels, biases = zip(*(layer.weights(x.shape[-1]) for layer in layers))
  kernel = kernels[0] if len(layers) == 1 else jnp.concatenate(kernels, axis=1)
  bias = biases[0] if len(layers) == 1 else jnp.concatenate(biases)
  y = (product(x.astype(dtype), kernel.astype(dtype)) + bias).astype(dtype)
  return jnp.split(y, len(layers), axis=-1) if len(layers) > 1 else [y]


class Norm(nn.Module):
  """LayerNorm in float32."""

  epsilon: float

  def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
    return layer_norm(x.astype(jnp.float32), *self.weights(x.shape[-1]), self.epsilon)

  def standardised(self, y: Float[Array, '*b d']) -> Float[Array, '*b d']:
    """What was scaled and shifted to `y`."""
    scale, bias = self.weights(y.shape[-1])
    return (y - bias) / scale

  def scaled(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
    """The norm of a state that is standardised already."""
    scale, bias = self.weights(x.shape[-1])
    return x * scale + bias

  @nn.compact
  def weights(self, width: int) -> tuple[Float[Array, ' d'], Float[Array, ' d']]:
    """(scale, bias)."""
    scale = self.param('scale', nn.initializers.ones, (width,))
    return scale, self.param('bias', nn.initializers.zeros, (width,))
