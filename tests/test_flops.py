import dataclasses

import jax
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, dot_macs, model_and_params, ragged_batch
from tokenprune_jax import flops
from tokenprune_jax.encoder_config import EncoderConfig


def test_published_reference_values():
  bert = EncoderConfig()

  def dense(length):
    return 12 * flops.block_macs(bert, length, length, length, length)

  assert abs(2 * dense(128) / 1e9 - 22.347) < 0.001  # GFLOPs at 128 tokens, two per MAC
  assert abs(2 * dense(26) / 1e9 - 4.45) < 0.01  # LTP's SST-2 at its mean length, rounded
  assert abs(dense(384) / 35_340_779_904 - 1) < 0.001  # LAT's, with a few extras
  linear = flops.block_parts(bert, 128, 128, 128, 128)
  fastbert = 12 * (linear['projections'] + linear['feed_forward']) + flops.fastbert_classifier_macs(
    bert, 2, 128
  )
  assert abs(2 * fastbert / 1e9 - 21.785) < 0.001


def test_conventions_on_a_trace():
  config = dataclasses.replace(TINY_CONFIG, width=8, hidden=32, depth=2, heads=2)
  model, params = model_and_params({'name': 'none'}, config)
  trace = apply(model, params, ragged_batch((10, 4), 10)).trace

  def block(n, attention=True):
    return 12 * n * 64 + (2 * 8 * n * n if attention else 0)

  def counted(name):
    return np.asarray(flops.by_convention(name, config, 3, 'linear', trace, 10)).tolist()

  assert counted('macs') == [2 * block(n) + 24 for n in (10, 4)]
  assert counted('ltp') == [2 * 2 * block(n) for n in (10, 4)]
  assert counted('lat') == [2 * block(10)] * 2
  assert counted('fastbert') == [2 * (2 * block(10, attention=False) + 24)] * 2


def test_what_a_method_computes_itself_is_itemised():
  spec = {'name': 'chain', 'reducers': ({'name': 'fuzzy', 'ratio': 0.7, 'rule': 'entropy'},
                                        {'name': 'combine', 'slots': 3, 'layer': 3})}  # fmt: skip
  model, params = model_and_params(spec)
  trace = apply(model, params, ragged_batch((9, 5), 9)).trace
  parts = flops.trace_parts(model.config, 3, 'linear', trace)
  assert list(parts) == ['projections', 'attention', 'feed_forward', 'head', 'evidence', 'combine']
  keys, queries = (np.asarray(x)[0] for x in (trace.keys, trace.queries))
  assert float(parts['evidence'][0]) == pytest.approx(2 * 4 * (keys * queries).sum())
  np.testing.assert_allclose(
    sum(parts.values()), flops.trace_macs(model.config, 3, 'linear', trace), rtol=1e-6
  )


def test_products_are_what_xla_counts():
  for spec in (
    {'name': 'none'},
    {'name': 'combine', 'slots': 3, 'layer': 3},
    {'name': 'topk', 'ratio': 0.75},
  ):
    model, params = model_and_params(spec, executor='compact')
    batch = ragged_batch((32,), 32)
    counted = jax.jit(lambda p, m=model, b=batch: apply(m, p, b).logits).lower(params).as_text(dialect='hlo')
    ours = flops.trace_macs(model.config, 3, 'linear', apply(model, params, batch).trace)[0]
    assert abs(dot_macs(counted) / float(ours) - 1) < 0.02
