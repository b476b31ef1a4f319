"""PoWER-BERT: how many tokens each layer passes on is learned, and then the same for all texts (arXiv 2001.08950).

  sig_j   = mean over heads of sum over i != j of A_hij        (attention received from others)
  search  x_j <- r_l[rank of j] x_j between attention and feed-forward, r in [0, 1] and 1 at the start, ranks by sig;
          loss + penalty sum_l l sum_k r_l[k]                   (deeper layers are pressed harder)
  counts  l_l = max(1, floor(sum_k r_l[k])), never rising from layer to layer
  hard    [CLS] and the l_l - 1 best of those left go on

Stages: the model is fine-tuned; mode 'search' learns r with it; its end hands the counts on; mode 'hard' trains it again with
them. Ranks are over real tokens. In the search [CLS] is ranked like any token, as in the official code. Where that projects r
onto [0, 1] after each step, here what lies outside reads as the nearer end, with the gradient of the identity.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokenprune_jax import budget, schedule
from tokenprune_jax.attention import Evidence
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Half, Inputs, Memory, Reducer
from tokenprune_jax.reducers.topk import best
from tokenprune_jax.tokens import Tokens, descending_rank, leave

TINY: dict = {'counts': (10, 6, 6, 2)}
NEUTRAL: dict = {'counts': (10**6,) * 4}


def significance(received: Float[Array, 'b h n'], own: Float[Array, 'b h n']) -> Float[Array, 'b n']:
  """Attention that a token receives from others, mean over heads."""
  return (received - own).mean(axis=1)


def soft_extract(
  x: Float[Array, 'b n d'], score: Float[Array, 'b n'], live: Bool[Array, 'b n'], retain: Float[Array, ' k']
) -> Float[Array, 'b n d']:
  """x scaled by the retention of each token's rank among the live ones; the others stay as they are."""
  rank = descending_rank(jnp.where(live, score, -jnp.inf))
  return x * jnp.where(live, retain[rank], 1)[..., None]


def bounded(r: Float[Array, '*s']) -> Float[Array, '*s']:
  """r in [0, 1], with the gradient of the identity."""
  return r + jax.lax.stop_gradient(jnp.clip(r, 0, 1) - r)


def configuration(r: Float[np.ndarray, 'L k']) -> tuple[int, ...]:
  """The retention configuration of a search."""
  sums = np.floor(np.clip(r, 0, 1).sum(-1, dtype=np.float64) + 1e-6).astype(int)
  return tuple(int(n) for n in np.minimum.accumulate(np.maximum(sums, 1)))


def finish(fields: Mapping[str, Any], validation: Any) -> dict[str, Any]:
  """The counts that a search has found; times one factor, where a budget is asked for."""
  if fields.get('mode', 'hard') != 'search':
    return {}
  counts = configuration(np.asarray(validation.reducer()['retention']['r']))
  found = {'counts': counts, 'mode': 'hard'}
  target = fields.get('target_macs')
  return {**found, **scaled(counts, target, validation, True)} if target else found


def at_budget(fields: Mapping[str, Any], target: float, validation: Any) -> dict[str, Any]:
  """The counts times one factor, as `budget` asks for it."""
  return scaled(fields['counts'], target, validation, False)


def scaled(counts_given: Sequence[int], target: float, validation: Any, whole: bool) -> dict[str, Any]:
  """The counts times one factor. whole: nothing leaves the validated model, as in a search."""
  given = np.array(counts_given)

  def counts(factor):
    return np.maximum(np.floor(factor * given + 1e-6), 1).astype(int)

  def left(lengths, factor):
    return np.minimum(lengths[:, None], counts(factor))

  most = float(validation.lengths().max() / given.min())
  found = budget.fixed_counts(target, validation, left, most, most if whole else 1.0)
  return {'counts': tuple(counts(found).tolist())}


def least(fields: Mapping[str, Any], config: EncoderConfig, lengths: np.ndarray) -> float:
  """MACs as a share of dense's where one token is left behind each layer of texts of these lengths [N]."""
  return budget.of_counts(config, lengths, np.ones((len(lengths), config.depth)))


def check_length(fields: Mapping[str, Any], length: int) -> None:
  """Raises UserError where a search has fewer ranks than texts have tokens."""
  slots = fields.get('slots', Method.slots)
  if fields.get('mode', Method.mode) == 'search' and length > slots:
    raise UserError(
      f'reducer.slots is {slots}, but texts have up to {length} tokens; set it to data.max_length'
    )


def expected(fields: Mapping[str, Any], depth: int) -> dict[str, Any]:
  """A stand-in for what a search will hand on, by which later stages can be checked."""
  return {'counts': (1,) * depth} if fields.get('mode', 'hard') == 'search' else {}


class Retention(nn.Module):
  """r [L slots]."""

  @nn.compact
  def __call__(self, depth: int, slots: int) -> Float[Array, 'L k']:
    return self.param('r', nn.initializers.ones, (depth, slots))


class Method(Reducer):
  """Keeps a learned number of tokens after each layer."""

  counts: tuple[int, ...] = ()  # tokens that stay, by layer; (): those that a search hands on
  mode: str = 'hard'  # or 'search'
  penalty: float = 1e-4  # on the retention of the search
  slots: int = 512  # ranks that the search learns a retention for: the longest text in tokens
  # Share of dense's multiply-adds that the counts of a search are scaled to; 0: as found.
  target_macs: float = 0.0

  def check(self, depth: int, heads: int) -> None:
    if self.mode not in ('hard', 'search'):
      raise UserError(f'reducer.mode is {self.mode!r}; choose one of hard, search')
    if self.penalty < 0 or self.slots < 1:
      raise UserError(
        f'reducer.penalty is {self.penalty} and slots is {self.slots}; expected 0 or more, and 1 or more'
      )
    if self.mode == 'hard' and not self.counts:
      raise UserError(
        "reducer.counts is empty: name the tokens that stay by layer, or put a stage with reducer.mode='search' before"
      )
    if self.target_macs:
      schedule.check_budget('reducer.target_macs', self.target_macs, 1 / 3 / depth)
    if self.counts and (len(self.counts) != depth or min(self.counts) < 1):
      raise UserError(f'reducer.counts needs {depth} numbers of 1 or more, one a layer, got {self.counts}')
    if any(low > high for high, low in zip(self.counts, self.counts[1:])):
      raise UserError(
        f'reducer.counts is {self.counts}; a token that left never returns, so they cannot rise'
      )

  def setup(self):
    if self.mode == 'search':
      self.retention = Retention()

  def falls(self, layer: int) -> bool:
    """Whether fewer tokens may go on than came."""
    return layer == 1 or self.counts[layer - 1] < self.counts[layer - 2]

  def decides(self, depth: int) -> tuple[Half, ...]:
    return tuple(Half(l, True) for l in range(1, depth + 1) if self.mode == 'hard' and self.falls(l))

  def reads(self, layer: int) -> tuple[str, ...]:
    return ('received', 'own') if self.mode == 'search' or self.falls(layer) else ()

  def start(self, tokens: Tokens, inputs: Inputs, train: bool) -> tuple[Tokens, Memory]:
    if self.mode == 'hard':
      return tokens.replace(protected=tokens.protected | (tokens.position == 0)), {}
    check_length({'mode': self.mode, 'slots': self.slots}, inputs.ids.shape[1])
    r = bounded(self.retention(inputs.depth, self.slots))
    pressed = (jnp.arange(1, inputs.depth + 1)[:, None] * r).sum()
    rows = jnp.broadcast_to(r, (inputs.ids.shape[0], *r.shape))  # all of memory has an axis b
    return tokens, {'retain': rows, 'loss': self.penalty * pressed}

  def after_attention(
    self, tokens: Tokens, memory: Memory, evidence: Evidence, layer: int
  ) -> tuple[Tokens, Memory]:
    n = tokens.x.shape[1] - tokens.added
    if n == 0 or evidence.own is None:  # `reads` did not ask for it
      return tokens, memory
    assert evidence.received is not None
    score, live = significance(evidence.received, evidence.own)[:, :n], tokens.updated[:, :n] > 0
    if self.mode == 'search':
      retain = memory['retain'][0, layer - 1]
      x = soft_extract(tokens.x[:, :n], score, live, retain)
      return tokens.replace(x=jnp.concatenate([x, tokens.x[:, n:]], axis=1)), memory
    wanted = jnp.full(len(score), self.counts[layer - 1])
    stay = best(score, live, tokens.protected[:, :n], wanted)
    return leave(tokens, stay, score, 'gone', min(self.counts[layer - 1], tokens.length)), memory
