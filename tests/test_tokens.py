import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenprune_jax import tokens as stream
from tokenprune_jax.tokens import Capacity


def make(n=6, d=3, added=0):
  x = jnp.arange(2 * n * d, dtype=jnp.float32).reshape(2, n, d)
  mask = jnp.array([[True] * n, [True] * (n - 2) + [False] * 2])
  return stream.start(x, mask, protect_first=True).replace(carry={'age': x[..., :2]}, added=added)


def test_start_takes_padding_out_of_the_stream_and_protects_cls_only_when_asked():
  tokens = make()
  assert np.asarray(stream.live(tokens)).sum() == 10
  assert np.asarray(tokens.protected[:, 0]).all() and not np.asarray(tokens.protected[:, 1:]).any()
  assert not np.asarray(stream.start(tokens.x, tokens.seen > 0, False).protected).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_select_keeps_order_and_drops_the_lowest_scored_on_overflow(data):
  n = data.draw(st.integers(1, 12))
  keep = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
  score = np.array(data.draw(st.permutations(range(n))), np.float32)
  capacity = data.draw(st.integers(1, n))
  index, kept, overflow = stream.select(jnp.asarray(keep), capacity, jnp.asarray(score))
  wanted = sorted(sorted(np.flatnonzero(keep), key=lambda j: -score[j])[:capacity])
  assert np.flatnonzero(kept).tolist() == wanted
  assert np.asarray(index)[: len(wanted)].tolist() == wanted
  assert len(set(np.asarray(index).tolist())) == capacity
  assert bool(overflow) == (keep.sum() > capacity)


def test_select_without_scores_drops_the_last():
  _, kept, overflow = stream.select(jnp.array([True, True, False, True]), 2)
  assert np.asarray(kept).tolist() == [True, True, False, False] and bool(overflow)


def test_select_refuses_a_capacity_that_does_not_fit():
  for capacity in (0, 5, -1):
    with pytest.raises(ValueError, match=f'capacity {capacity}'):
      stream.select(jnp.ones(4, bool), capacity)


def test_gather_rows_has_the_gradient_of_a_scatter():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3))
  keep = jnp.array([[True, False, True, True, False], [False, False, True, False, False]])
  index, kept, _ = stream.select(keep, 3)
  probe = jax.random.normal(jax.random.key(1), (2, 3, 3))
  counts = jnp.take_along_axis(kept, index, 1)[..., None]
  ours = jax.grad(lambda x: (stream.gather_rows(x, index, kept) * probe * counts).sum())(x)
  autodiff = jax.grad(lambda x: (jnp.take_along_axis(x, index[..., None], 1) * probe * counts).sum())(x)
  np.testing.assert_allclose(ours, autodiff, atol=1e-6)


def test_take_gathers_every_field_and_empties_places_without_a_slot():
  tokens = make()
  keep = jnp.array([[True, False, False, True, False, False], [False] * 6])
  index, kept, _ = stream.select(keep, 3)
  taken = stream.take(tokens.replace(score=tokens.seen * 2), index, kept)
  assert np.asarray(taken.position).tolist() == [[0, 3, -1], [-1, -1, -1]]
  assert np.asarray(taken.seen).tolist() == [[1, 1, 0], [0, 0, 0]] == np.asarray(taken.updated).tolist()
  assert np.asarray(taken.score).tolist() == [[2, 2, 0], [0, 0, 0]]
  np.testing.assert_array_equal(taken.x[0, :2], tokens.x[0, jnp.array([0, 3])])
  np.testing.assert_array_equal(taken.carry['age'][0, :2], tokens.carry['age'][0, jnp.array([0, 3])])
  assert taken.moved and not np.asarray(taken.protected[1]).any()


def test_positions_compose_across_gathers():
  tokens = make()
  for keep in ([0, 1, 1, 0, 1, 1], [1, 0, 1, 1]):
    mask = jnp.array([keep, keep], bool)
    index, kept, _ = stream.select(mask, sum(keep))
    tokens = stream.take(tokens, index, kept)
  assert np.asarray(tokens.position[0]).tolist() == [1, 4, 5]
  laid_out = stream.scatter_to_input(jnp.ones((2, 3)), tokens.position, 6)
  assert np.asarray(laid_out[0]).tolist() == [0, 1, 0, 0, 1, 1]


def test_compress_follows_the_capacity_and_flags_overflow():
  tokens = make().replace(seen=jnp.array([[1.0, 0, 1, 0, 1, 0]] * 2), updated=jnp.zeros((2, 6)))
  same, overflow = stream.compress(tokens)
  assert same.x.shape[1] == 6 and not np.asarray(overflow).any()
  small, overflow = stream.compress(tokens.replace(capacity=Capacity(slots=3)))
  assert np.asarray(small.position).tolist() == [[0, 2, 4]] * 2 and not np.asarray(overflow).any()
  _, overflow = stream.compress(tokens.replace(capacity=Capacity(slots=2)))
  assert np.asarray(overflow).all()


def test_descending_rank_breaks_ties_by_position():
  assert np.asarray(stream.descending_rank(jnp.array([1.0, 3.0, 1.0, 3.0]))).tolist() == [2, 0, 3, 1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9), st.integers(-1, 10))
def test_highest_is_what_ranks_say(values, count):
  values = jnp.array([values, values[::-1]], jnp.float32)
  expected = np.asarray(stream.descending_rank(values)) < count
  assert np.asarray(stream.highest(values, count)).tolist() == expected.tolist()
  assert np.asarray(stream.highest(values, jnp.full((2, 1), count))).tolist() == expected.tolist()
