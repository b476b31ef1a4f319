"""Evaluation against a loop over single examples, and that how examples are batched changes nothing."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenprune_jax import data, evaluate, flops, metrics, models, pretrained, sharding, tasks
from tokenprune_jax.errors import UserError

COUNT, CLASSES = 27, 3
CHAIN = {
  'name': 'chain',
  'reducers': ({'name': 'fuzzy', 'ratio': 0.6}, {'name': 'combine', 'slots': 2, 'layer': 3}),
}
SOURCE = 'random:bert:layers=4,width=16,heads=2,hidden=32,length=64'


def make_split(tokenizer) -> data.Split:
  random = np.random.default_rng(0)
  words = np.array(['bako', 'dice', 'fumo', 'gilu', 'hape'])
  texts = [' '.join(random.choice(words, size=random.integers(1, 12))) for _ in range(COUNT)]
  split = data.encode(texts, tokenizer, 32)
  split.label = random.integers(CLASSES, size=COUNT).astype(np.int32)
  return split


def make_model(spec, **fields):
  source = pretrained.load(SOURCE)
  model = models.Classifier(source.config, models.make_reducer(spec), CLASSES, **fields)
  params = jax.device_get(model.init_params(jax.random.key(2)))
  params['head']['out']['kernel'] = 20 * params['head']['out']['kernel']
  return model, params, make_split(source.tokenizer)


@pytest.fixture(scope='module', params=[CHAIN, {'name': 'none'}], ids=['chain', 'dense'])
def case(request):
  model, params, split = make_model(request.param)
  return model, params, split, run(model, params, split)


def run(model, params, split, batch_size=8, buckets=(16, 32), mesh=None):
  place = None if mesh is None else sharding.batch_sharding(mesh)
  return evaluate.evaluate(
    model, params, split, tasks.make('classify'),
    batch_size=batch_size, buckets=buckets, pad_id=0, sharding=place,
  )  # fmt: skip


def one_by_one(model, params, split):
  """(output, real length) of each example by itself."""
  forward = jax.jit(model.apply)
  for i in range(COUNT):
    ids = jnp.asarray(np.pad(split.ids(i), (0, 32 - split.lengths[i])))[None]
    batch = {'ids': ids, 'mask': jnp.arange(32)[None] < split.lengths[i], 'types': jnp.zeros_like(ids)}
    yield forward({'params': params}, batch), split.lengths[i]


def test_matches_a_loop_over_single_examples(case):
  model, params, split, (found, records) = case
  outputs = list(one_by_one(model, params, split))
  logits = np.concatenate([output.logits for output, _ in outputs]).astype(np.float64)
  lengths = np.array([length for _, length in outputs])
  predictions = logits.argmax(-1)
  assert found['accuracy'] == np.mean(predictions == split.label)
  assert found['macro_f1'] == pytest.approx(metrics.macro_f1(split.label, predictions, CLASSES))
  assert np.sum(found['confusion']) == COUNT == found['examples']
  log_sum = np.log(np.exp(logits).sum(-1))
  assert found['loss'] == pytest.approx(np.mean(log_sum - logits[np.arange(COUNT), split.label]), rel=1e-4)

  ratios = np.stack([flops.keep_ratio(output.trace)[0] for output, _ in outputs])
  layers = [l - 1 for l in range(1, 5) if l not in model.unused_blocks()]
  by_layer = [sum(r * n for r, n in zip(ratios[:, l], lengths)) / lengths.sum() for l in layers]
  np.testing.assert_allclose(found['keep_ratio_by_layer'], by_layer, rtol=1e-5)
  assert found['keep_ratio'] == pytest.approx(np.mean(by_layer), rel=1e-5)

  def cost(output):
    return float(flops.trace_macs(model.config, CLASSES, model.head, output.trace)[0])

  assert found['macs_per_example'] == pytest.approx(
    np.mean([cost(output) for output, _ in outputs]), rel=1e-5
  )
  dense = np.mean(flops.dense_macs(model.config, CLASSES, model.head, jnp.asarray(lengths)))
  assert found['dense_macs_per_example'] == pytest.approx(float(dense), rel=1e-5)
  assert found['mac_ratio'] == pytest.approx(found['macs_per_example'] / found['dense_macs_per_example'])
  for i, record in enumerate(records):
    assert (record['index'], record['label'], record['length']) == (i, split.label[i], lengths[i])
    assert record['prediction'] == predictions[i]
    np.testing.assert_allclose(record['probabilities'], np.exp(logits[i] - log_sum[i]), atol=2e-5)
    assert record['keep_ratio'] == pytest.approx(ratios[i, layers].mean(), abs=1e-5)
    assert record['macs'] == pytest.approx(cost(outputs[i][0]), rel=1e-5)


def test_what_dense_and_pruned_report(case):
  model, _, _, (found, _) = case
  if model.unused_blocks():  # the chain
    assert len(found['keep_ratio_by_layer']) == 3
    assert found['keep_ratio_by_layer'][0] == 1 > found['keep_ratio_by_layer'][1] and found['mac_ratio'] < 1
  else:
    assert found['keep_ratio_by_layer'] == [1, 1, 1, 1] and found['mac_ratio'] == pytest.approx(1)
  assert found['overflow'] == 0


def test_batches_change_nothing(case):
  model, params, split, (found, records) = case
  for batch_size, buckets in ((5, (32,)), (40, (12, 32))):
    other, others = run(model, params, split, batch_size, buckets)
    for name in set(found) - {'padding_share', 'confusion'}:
      np.testing.assert_allclose(found[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert [record['prediction'] for record in records] == [record['prediction'] for record in others]


def test_padding_share_counts_every_slot(case):
  model, params, split, _ = case
  found, _ = run(model, params, split, 10, (32,))  # 3 batches of 10 x 32, 3 rows of filler
  assert found['padding_share'] == pytest.approx(1 - split.lengths.sum() / (3 * 10 * 32))


def test_ready_for_json(case):
  found, records = case[3]
  assert json.loads(json.dumps(found)) == found and json.loads(json.dumps(records)) == records


def test_compiled_once_for_each_bucket():
  evaluate.compiled.cache_clear()
  model, params, split = make_model({'name': 'fuzzy', 'ratio': 0.7})
  for _ in range(2):
    run(model, params, split, 8, (16, 32))
  twin = make_model({'name': 'fuzzy', 'ratio': 0.7})[0]  # equal settings are the same program
  assert evaluate.compiled(twin, None)._cache_size() == 2


def test_four_devices_give_the_same():
  """Rows over all 4, parameters split over 2, in a process of its own."""
  code = f"""
import jax, numpy as np
jax.config.update('jax_num_cpu_devices', 4)
from tests import test_evaluate as t
from tokenprune_jax import sharding
model, params, split = t.make_model({CHAIN!r})
mesh = sharding.make_mesh(2)
placed = sharding.put(params, sharding.state_shardings(mesh, params))
one, records = t.run(model, params, split)
four, others = t.run(model, placed, split, mesh=mesh)
for name in set(one) - {{'confusion'}}:
  np.testing.assert_allclose(one[name], four[name], rtol=1e-5, err_msg=name)
assert one['confusion'] == four['confusion'] and len(records) == len(others)
print('same on', jax.device_count())
"""
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
  assert done.stdout.strip() == 'same on 4', done.stderr[-2000:]


def test_loss_is_the_weighted_mean_and_ignores_filler():
  random = np.random.default_rng(0)
  logits = random.normal(size=(5, 4)).astype(np.float32)
  logits[4] = np.nan  # what a filler row without any token may hold
  label, weight = np.array([1, 0, 3, 2, 0]), np.array([1, 1, 1, 1, 0], np.float32)
  batch = {'label': jnp.asarray(label), 'weight': jnp.asarray(weight)}
  loss = tasks.make('classify').loss
  expected = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, label[i]] for i in range(4)])
  assert float(loss(jnp.asarray(logits), batch)) == pytest.approx(expected, rel=1e-5)
  assert loss(jnp.asarray(logits, jnp.bfloat16), batch).dtype == jnp.float32
  assert float(loss(jnp.asarray(logits), {**batch, 'weight': jnp.zeros(5)})) == 0


def test_batch_f1_does_not_follow_the_order_of_the_file():
  """A split sorted by class would make batches of one class, whose macro F1 is either 1 or about a half."""
  labels = np.repeat([0, 1], 160)
  predictions = labels.copy()
  predictions[::16] ^= 1  # one error in each batch of 16
  found = tasks.make('classify').scores(np.eye(2, dtype=np.float32)[predictions], labels)
  assert metrics.macro_f1_batch16(labels, predictions, 2) < 0.5 < 0.85 < found['macro_f1_batch16']


def test_unknown_task():
  with pytest.raises(UserError, match="'sort'"):
    tasks.make('sort')


def test_examples_that_overflow_are_computed_again_on_request():
  spec = {'name': 'threshold', 'threshold': 0.0, 'capacities': (1.0, 0.3, 0.3, 0.3)}
  model, params, split = make_model(spec, executor='compact')
  expected, exact = run(model.clone(executor='mask'), params, split)
  tight, lost = run(model, params, split)
  assert expected['overflow'] == 0 < tight['overflow'] < COUNT
  again, mended = evaluate.evaluate(
    model, params, split, tasks.make('classify'), batch_size=8, buckets=(16, 32), pad_id=0, rerun=True
  )
  assert again['overflow'] == tight['overflow']
  for a, b in zip(mended, exact):
    np.testing.assert_allclose(a['probabilities'], b['probabilities'], atol=1e-5)
  assert any(a['probabilities'] != b['probabilities'] for a, b in zip(lost, exact))
