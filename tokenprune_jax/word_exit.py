"""When a tagger is sure of a word: the uncertainty of a window of words, and the layers that words would exit at.

Li, Shao, Sun, Yan, Qiu, Huang: Accelerating BERT Inference for Sequence Labeling via Early-Exit, ACL 2021, arXiv
2105.13878. A word j exits at the first layer l below the last at which

  max_{|k - j| <= w/2} u_k^l < delta_l,    u = -sum_c p_c log p_c / log C,    delta_l = delta below the middle, else 2 delta.

Shapes: b batch, n slots, w words, l layers. Word-level arrays have as many places as there are slots; words come first, in
order, and `valid` says which places hold one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

SURE = -1.0  # below every uncertainty
UPPER = 2.0  # factor of the thresholds of the upper half


def thresholds(delta: float, depth: int, cap: float = 1.0, upper: float = UPPER) -> tuple[float, ...]:
  """delta of each layer: `delta` in the lower half, `upper` times as much above, none more than `cap`."""
  return tuple(min(delta * (1.0 if l < depth // 2 else upper), cap) for l in range(depth))


def window_max(
  values: Float[Array, 'b w'], valid: Bool[Array, 'b w'], window: Num[Array, 'b'] | int
) -> Float[Array, 'b w']:
  """The largest value of the words at most `window` // 2 away; SURE at places without a word.

  window: odd; of each example, or of all. A window of at least 2 w - 1 takes the whole sentence.
  """
  place = jnp.arange(values.shape[1])
  reach = jnp.broadcast_to(jnp.asarray(window) // 2, values.shape[:1])
  near = jnp.abs(place[:, None] - place) <= reach[:, None, None]  # [b w w]
  found = jnp.where(near & valid[:, None], values[:, None], SURE).max(-1)
  return jnp.where(valid, found, SURE)


def exit_layers(
  uncertainty: Float[Array, 'l b w'],
  valid: Bool[Array, 'b w'],
  window: Num[Array, 'b'] | int,
  delta: Float[Array, 'l b'] | Float[Array, 'l 1'],
) -> Int[Array, 'b w']:
  """The layer, counted from 1, that each word would exit at, from what all layers say of it; the last where none is sure."""
  sure = jnp.stack([window_max(u, valid, window) < d[:, None] for u, d in zip(uncertainty, delta)])
  sure = sure.at[-1].set(True)
  return jnp.argmax(sure, 0) + 1


def barred(
  tag: Int[Array, 'b w'], fixed: Bool[Array, 'b w'], illegal: Bool[Array, 'c c']
) -> Bool[Array, 'b w c']:
  """Tags that a word cannot have beside the tags that its neighbours are `fixed` to; none where that would bar them all.

  illegal [i, j]: tag j cannot follow tag i.
  """

  def beside(shift, pairs):
    near = jnp.roll(fixed, shift, axis=1).at[:, 0 if shift > 0 else -1].set(False)
    return pairs[jnp.roll(tag, shift, axis=1)] & near[..., None]

  found = beside(1, illegal) | beside(-1, illegal.T)
  return found & ~found.all(-1, keepdims=True)


def clashing(
  tag: Int[Array, 'b w'], said: Bool[Array, 'b w'], illegal: Bool[Array, 'c c']
) -> Bool[Array, 'b w']:
  """Words whose tag cannot stand beside that of a neighbour; said: those that have one."""
  pair = illegal[tag[:, :-1], tag[:, 1:]] & said[:, :-1] & said[:, 1:]
  return jnp.pad(pair, ((0, 0), (0, 1))) | jnp.pad(pair, ((0, 0), (1, 0)))


def first_pieces(word: Int[Array, 'b n']) -> Bool[Array, 'b n']:
  """The pieces that a word begins with. word: the number of the word a piece belongs to, from 0; -1 for none."""
  before = jnp.pad(word, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return (word >= 0) & (word != before)


def places(word: Int[Array, 'b n'], mask: Bool[Array, 'b n']) -> Bool[Array, 'b w']:
  """Which of n places for words hold one."""
  return jnp.arange(word.shape[1]) <= jnp.where(mask, word, -1).max(-1, keepdims=True)


def of_words(
  values: Shaped[Array, 'b n *c'], first: Bool[Array, 'b n'], word: Int[Array, 'b n'], count: int
) -> Shaped[Array, 'b w *c']:
  """What stands at the first piece of each word, in `count` places by the words' numbers; 0 where there is none."""
  place = jnp.where(first & (word >= 0), word, count)  # out of range: dropped

  def scattered(values, place):
    return jnp.zeros((count, *values.shape[1:]), values.dtype).at[place].set(values, mode='drop')

  return jax.vmap(scattered)(values, place)


def put(
  board: Shaped[Array, 'b N *c'], at: Int[Array, 'b n'], values: Shaped[Array, 'b n *c']
) -> Shaped[Array, 'b N *c']:
  """The board with values written to their places; those at N are left out. Row by row: rows may be spread over devices."""
  return jax.vmap(lambda row, place, new: row.at[place].set(new, mode='drop'))(board, at, values)


def to_pieces(
  values: Shaped[Array, 'b w *c'], word: Int[Array, 'b n'], fill: float | bool | Array
) -> Shaped[Array, 'b n *c']:
  """The value [b w] of the word that each piece belongs to; `fill`, or [b 1] of each example, for pieces of none."""
  inner = [1] * (values.ndim - 2)
  found = jnp.take_along_axis(values, jnp.maximum(word, 0).reshape(*word.shape, *inner), axis=1)
  return jnp.where((word >= 0).reshape(*word.shape, *inner), found, fill)


def sampled_settings(
  key: Array, rows: int, windows: tuple[int, ...], deltas: tuple[float, ...]
) -> tuple[Int[Array, 'b'], Float[Array, 'b'], Bool[Array, 'b']]:
  """(window, delta, whether anything exits) of each example, for training with exits that it samples itself.

  Of ten rows four exit nowhere, one has the smallest window, one the largest delta, and four draw both evenly; of fewer, as
  many of them by lot.
  """
  window_key, delta_key, role_key, first_key = jax.random.split(key, 4)
  window = jax.random.choice(window_key, jnp.asarray(windows), (rows,))
  delta = jax.random.choice(delta_key, jnp.asarray(deltas, jnp.float32), (rows,))
  first = jax.random.randint(first_key, (), 0, 10)
  role = jax.random.permutation(role_key, (first + jnp.arange(rows)) % 10)
  window = jnp.where(role == 4, min(windows), window)
  delta = jnp.where(role == 5, max(deltas), delta)
  return window, delta, role >= 4
