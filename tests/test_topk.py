"""Top-k's scores and the schedules of others, against loops and the official numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch
from tokenprune_jax import conversion, families, schedule
from tokenprune_jax import tokens as stream
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.models import Classifier, make_reducer
from tokenprune_jax.reducer import read_out

GOLDEN = pathlib.Path(__file__).parent / 'golden'
BATCH = ragged_batch((14, 9, 5, 2, 1), 14)


def test_the_cascade_is_the_official_schedule():
  official = [1, 1, 1, 0.9444, 0.8889, 0.8333, 0.7778, 0.7222, 0.6667, 0.6111, 0.5556, 0.5]
  np.testing.assert_allclose(schedule.cascade(0.5, 12), official, atol=1e-4)
  assert schedule.cascade(0.5, 24)[4] == pytest.approx(0.975) and schedule.cascade(0.5, 24)[-1] == 0.5
  assert schedule.cascade(0.4, 2) == (1, 1)  # too shallow to prune


def test_the_cascade_s_counts_are_the_official_ones():
  g = np.load(GOLDEN / 'ltp_topk.npz')
  for rate, official in zip(g['token_keep_rates'], g['keep_tokens']):
    for share, counts in zip(schedule.cascade(float(rate), 12), official):
      found = schedule.next_counts(share, 12, 'nearest')
      assert [found[length] for length in g['lengths']] == counts.tolist()


def test_it_keeps_and_answers_what_the_official_model_does_on_the_way_up():
  g = np.load(GOLDEN / 'sttabt_forward.npz')
  depth, heads, width, hidden = g['cfg'].tolist()
  tensors = {f'bert.{name[2:]}': g[name] for name in g.files if name.startswith('w.')}
  words, places = (len(g[f'w.embeddings.{kind}_embeddings.weight']) for kind in ('word', 'position'))
  config = EncoderConfig(
    vocab_size=words, width=width, depth=depth, heads=heads, hidden=hidden, max_positions=places, dropout=0.0,
    attention_dropout=0.0, group_slots=0,
  )  # fmt: skip
  tensors |= {'classifier.weight': np.zeros((2, width)), 'classifier.bias': np.zeros(2)}
  params = conversion.to_params(config, tensors, dict.fromkeys(tensors, 'golden'), 'golden', families.TEXTS)
  shares = tuple(round(float(share), 4) for share in g['ks'])
  model = Classifier(config, make_reducer({'name': 'topk', 'shares': shares}), 2, 'cls', 'family').check()
  ids = g['input_ids']
  batch = {'ids': ids, 'mask': g['attention_mask'] > 0, 'types': np.zeros_like(ids)}
  output = apply(model, jax.tree.map(jnp.asarray, params), batch)
  np.testing.assert_array_equal(np.asarray(output.trace.kept)[0], g['keep_in'])
  # There the last feed-forward is of [CLS] alone.
  np.testing.assert_array_equal(np.asarray(output.trace.rows)[0, :-1], g['keep_out'].sum(-1)[:-1])
  np.testing.assert_allclose(output.read, g['cls_last_hidden'], atol=1e-5)


@pytest.mark.parametrize('keep', [0.2, 0.4, 0.666, 0.8])
def test_the_manual_schedule(keep):
  shares = schedule.manual(keep, 12)
  for l, share in enumerate(shares):
    expected = keep * (1.5 - l / 10) if keep <= 0.666 else (1 - l / 10) * (2 - 2 * keep) + 2 * keep - 1
    assert share == pytest.approx(min(max(expected, 0.01), 1))
  assert len(schedule.manual(keep, 6)) == 6 and list(shares) == sorted(shares, reverse=True)


@pytest.mark.parametrize('score', ['received', 'cls', 'cumulative', 'random'])
def test_every_score_keeps_the_scheduled_counts_under_both_executors(score):
  spec = {'name': 'topk', 'shares': (1.0, 0.6, 0.6, 0.3), 'score': score}
  model, params = model_and_params(spec)
  masked, compact = (apply(model.clone(executor=way), params, BATCH) for way in ('mask', 'compact'))
  np.testing.assert_allclose(masked.logits, compact.logits, atol=1e-4)
  for row, n in enumerate((14, 9, 5, 2, 1)):
    expected = [max(int(share * n + 1e-9), 1) for share in (1.0, 0.6, 0.6, 0.3)]
    np.testing.assert_array_equal(np.asarray(masked.trace.rows)[row], expected)
  wider = apply(model, params, {name: np.pad(values, ((0, 0), (0, 4))) for name, values in BATCH.items()})
  np.testing.assert_allclose(masked.logits, wider.logits, atol=1e-4)


def test_the_cumulative_score_remembers_lower_layers():
  """With all layers but the last whole, `received` reads that layer alone and `cumulative` the sum: they differ."""
  kept = {}
  for score in ('received', 'cumulative'):
    model, params = model_and_params({'name': 'topk', 'shares': (1.0, 1.0, 0.5, 0.5), 'score': score})
    kept[score] = np.asarray(apply(model, params, BATCH).trace.kept)[:, 3]
  assert (kept['received'].sum(-1) == kept['cumulative'].sum(-1)).all()
  assert (kept['received'] != kept['cumulative']).any()


def test_random_depends_on_the_seed():
  kept = []
  for seed in (0, 1):
    model, params = model_and_params({'name': 'topk', 'ratio': 0.5, 'score': 'random', 'seed': seed})
    kept.append(np.asarray(apply(model, params, BATCH).trace.kept))
  assert (kept[0] != kept[1]).any()


def test_frozen_tokens_are_read_out_too():
  """The mean is over all that are left, whether they are still updated or not."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 3)), jnp.float32)
  tokens = stream.start(x, jnp.arange(5)[None] < 4, protect_first=False)
  first = jnp.arange(5)[None] == 0
  for leavers, mean in (('frozen', x[:, :4].mean(1)), ('unseen', x[:, :4].mean(1)), ('gone', x[:, 0])):
    found = stream.leave(tokens, first, first * 1.0, leavers, None)
    np.testing.assert_allclose(read_out(found, 'mean'), mean, rtol=1e-6)


def test_a_ratio_that_leaves_next_to_nothing_in_a_deep_encoder():
  method = make_reducer({'name': 'topk', 'ratio': 0.4})
  assert all(method.share(layer) > 0 for layer in range(1, 25))
