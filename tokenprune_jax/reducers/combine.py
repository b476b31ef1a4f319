"""Token combining: all tokens are assigned to a few combination tokens, which go on alone (arXiv 2406.01283, section 3.3).

  Sim_ij = softmax over i of (W_q LN(c_i) . W_k LN(e_j) * scale + noise g_i),  g ~ Gumbel(0, 1) in training only
  HA     = onehot(argmax_i Sim) + Sim - stop_gradient(Sim)               (hard, straight-through)
  c_i    = c_i + W_o (sum_j HA_ij W_v e_j) / (sum_j HA_ij)

The module replaces block `layer`; combination tokens are carried from the embeddings on and read and are read by all
tokens in the blocks before. Reconstructed here, as the paper leaves it open: combination tokens join after the embedding
LayerNorm; padding is assigned to nothing; an empty slot keeps its state; `spread`, `scale`, `identity` and `noise` (see
the fields).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Norm
from tokenprune_jax.reducer import Inputs, Memory, Reducer
from tokenprune_jax.tokens import Capacity, Tokens, presence, scatter_to_input

TINY: dict = {'slots': 3, 'layer': 3}
NEUTRAL: dict = {'slots': 0}
NORM_EPSILON = 1e-12  # BERT's


def hard_assignment(logits: Float[Array, 'b m n'], mask: Float[Array, 'b n']) -> Float[Array, 'b m n']:
  """HA: each token's one-hot slot, with the gradient of the softmax over slots; 0 for tokens not in the mask."""
  soft = jax.nn.softmax(logits, axis=1)
  hard = jax.nn.one_hot(soft.argmax(axis=1), logits.shape[1], axis=1, dtype=soft.dtype)
  return (hard + (soft - jax.lax.stop_gradient(soft))) * mask[:, None, :]


def assigned_mean(assignment: Float[Array, 'b m n'], x: Float[Array, 'b n d']) -> Float[Array, 'b m d']:
  """Mean of the tokens in each slot; an empty slot gives 0, and no gradient either.

  A linear W_v may come after the mean: it then acts on m rows, not n. (An epsilon in the denominator instead would let the
  straight-through gradient of an empty slot grow to 1 / epsilon.)
  """
  count = assignment.sum(-1, keepdims=True)
  filled = count > 0.5  # counts are whole numbers, but for rounding
  total = jnp.einsum('bmn,bnd->bmd', assignment, x)
  return jnp.where(filled, total / jnp.where(filled, count, 1), 0)


class CombinationTokens(nn.Module):
  """The learned starting states [m d]."""

  slots: int
  spread: float

  @nn.compact
  def __call__(self, width: int) -> Float[Array, 'm d']:
    return self.param('embedding', nn.initializers.normal(self.spread), (self.slots, width))


class Assign(nn.Module):
  """One assignment step. Returns (combined [b m d], assignment [b m n])."""

  scale: bool
  identity: bool
  noise: float

  @nn.compact
  def __call__(
    self, slots: Float[Array, 'b m d'], x: Float[Array, 'b n d'], mask: Float[Array, 'b n'], train: bool
  ):
    width = x.shape[-1]

    def project(name, values):
      init = (lambda key, shape: jnp.eye(*shape)) if self.identity else nn.initializers.normal(0.02)
      return values @ self.param(name, init, (width, width))

    query = project('query', Norm(NORM_EPSILON, name='slot_norm')(slots))
    key = project('key', Norm(NORM_EPSILON, name='token_norm')(x))
    logits = jnp.einsum('bmd,bnd->bmn', query, key) * (width**-0.5 if self.scale else 1.0)
    if train and self.noise:
      logits = logits + self.noise * jax.random.gumbel(self.make_rng('reduce'), logits.shape)
    assignment = hard_assignment(logits, mask)
    return slots + project('out', project('value', assigned_mean(assignment, x))), assignment


class Method(Reducer):
  """Carries `slots` combination tokens, and combines all others into them in place of block `layer`."""

  slots: int = 8  # m
  # The block that combining replaces, counted from 1; the paper's best of 12 is 11, its fastest 7.
  layer: int = 11
  # Standard deviation of the combination tokens' first states; 1: as wide as the states they join.
  spread: float = 1.0
  # Logits / sqrt(d), as in the module's ancestor (GroupViT); the paper's equation has no scale.
  scale: bool = True
  noise: float = 1.0  # factor of the Gumbel noise in training; the paper's is 1
  # Start W_q, W_k, W_v, W_o at the identity, so that slots start as means of pretrained states.
  identity: bool = True

  def check(self, depth: int, heads: int) -> None:
    if self.slots < 0:
      raise UserError(
        f'reducer.slots is {self.slots}; it is the number of combination tokens, 0 (off) or more'
      )
    if self.noise < 0:
      raise UserError(f'reducer.noise is {self.noise}; it is a factor, 0 or more')
    if self.spread < 0:
      raise UserError(f'reducer.spread is {self.spread}; it is a standard deviation, 0 or more')
    if self.slots and not 2 <= self.layer <= depth:
      raise UserError(
        f'reducer.layer is {self.layer}; combining replaces a block after the first, so choose 2 to {depth}'
      )

  def readouts(self) -> tuple[str, ...]:  # of a token that was combined the layers above have nothing to say
    return ('cls', 'mean') if self.slots else super().readouts()

  def setup(self):
    self.tokens = CombinationTokens(self.slots, self.spread)
    self.assign = Assign(self.scale, self.identity, self.noise)

  def blocks(self, depth: int) -> tuple[int, ...]:
    return tuple(l for l in range(1, depth + 1) if l != self.layer or not self.slots)

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    if not self.slots:
      return tokens, {}
    b, _, d = tokens.x.shape
    states = jnp.broadcast_to(self.tokens(d).astype(tokens.x.dtype), (b, self.slots, d))
    nowhere = jnp.full((b, tokens.length), -1, jnp.int32)
    return append(tokens, states), {'macs_combine': jnp.zeros(b), 'assignment': nowhere}

  def after_block(self, tokens: Tokens, memory: Memory, layer: int, train: bool) -> tuple[Tokens, Memory]:
    if not self.slots or layer != self.layer - 1:
      return tokens, memory
    n, width = tokens.x.shape[1] - self.slots, tokens.x.shape[-1]
    mask = presence(tokens)[:, :n]
    combined, assignment = self.assign(tokens.x[:, n:], tokens.x[:, :n], mask, train)
    count = mask.sum(-1)
    # W_k on each token, logits and means over tokens; W_q, W_v, W_o on each slot
    here = tokens.updated[:, n:]  # not of examples that have left
    macs = count * width * (width + 2 * self.slots) + 3 * here.sum(-1) * width**2
    slot = (assignment.argmax(1) + 1) * (mask > 0)
    where = scatter_to_input(slot, tokens.position[:, :n], tokens.length) - 1
    return only(combined, assignment.sum(-1), here, tokens), {
      **memory,
      'macs_combine': macs,
      'assignment': where,
    }


def append(tokens: Tokens, states: Float[Array, 'b m d']) -> Tokens:
  """The stream with protected slots behind the input tokens."""
  b, m, _ = states.shape
  ones = jnp.ones((b, m))
  seen, score = ones if tokens.seen.ndim == 2 else jnp.ones((b, tokens.seen.shape[1], m)), tokens.score
  if score is not None:  # the last to leave
    score = jnp.pad(score, [(0, 0)] * (score.ndim - 1) + [(0, m)], constant_values=jnp.inf)
  return tokens.replace(
    x=jnp.concatenate([tokens.x, states], axis=1),
    seen=jnp.concatenate([tokens.seen, seen], axis=-1),
    updated=jnp.concatenate([tokens.updated, ones], axis=1),
    protected=jnp.concatenate([tokens.protected, jnp.ones((b, m), bool)], axis=1),
    position=jnp.concatenate([tokens.position, jnp.full((b, m), -1, jnp.int32)], axis=1),
    size=jnp.concatenate([tokens.size, jnp.zeros((b, m))], axis=1),
    score=score,
    capacity=widened(tokens.capacity, m, b),
    added=tokens.added + m,
  )


def widened(capacity: Capacity, count: int, batch: int) -> Capacity:
  """What was stated, for so many slots more of each example."""
  more = {'slots': count, 'keys': count, 'rows': count, 'batch_rows': count * batch}
  stated = {name: getattr(capacity, name) for name in more}
  return capacity._replace(**{name: room + more[name] for name, room in stated.items() if room is not None})


def only(
  combined: Float[Array, 'b m d'], size: Float[Array, 'b m'], here: Float[Array, 'b m'], before: Tokens
) -> Tokens:
  """A stream of nothing but combined slots, in place of the one before. here: 1 where they are still computed."""
  b, m, _ = combined.shape
  nowhere = jnp.full((b, m), -1, jnp.int32)
  return Tokens(
    combined, here, here, jnp.ones((b, m), bool), nowhere, size, length=before.length, batch=before.batch, added=m,
    moved=True,
  )  # fmt: skip
