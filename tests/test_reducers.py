"""What holds for every method: the files of `reducers/` are found by listing the folder, and run with their own settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, model_and_params, ragged_batch, requests, settings
from tokenprune_jax import flops, segments, serve
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer, method_names
from tokenprune_jax.reducer import Half, Inputs
from tokenprune_jax.tokens import live

METHODS = method_names()
LENGTHS = (14, 9, 5, 2, 1)
BATCH = ragged_batch(LENGTHS, 14)
FAMILIES = {
  'bert': TINY_CONFIG,
  'mpnet': dataclasses.replace(  # one or two rows at a time
    TINY_CONFIG,
    family='mpnet',
    type_vocab=0,
    position_offset=2,
    relative_buckets=32,
    pad_id=1,
    group_slots=20,
  ),
}


@pytest.fixture(scope='module', params=METHODS)
def name(request):
  """A method. Of module scope, so that a method's tests come together and share what they compile."""
  return request.param


def close(a, b, tolerance=1e-4):
  np.testing.assert_allclose(a, b, atol=tolerance)


# The last: fused attention, one product for queries, keys and values, and all rows at once.
@pytest.mark.parametrize(
  ('family', 'changes'),
  [('bert', {}), ('mpnet', {}), ('mpnet', {'kernel': 'xla', 'joint': True, 'group_slots': 0})],
)
def test_compact_equals_mask(name, family, changes):
  model, params = model_and_params(settings(name, 'TINY'), FAMILIES[family])
  masked = apply(model, params, BATCH)
  other = model.clone(executor='compact', config=dataclasses.replace(model.config, **changes))
  compact = apply(other, params, BATCH)
  assert not np.asarray(compact.trace.overflow).any()
  close(masked.logits, compact.logits)
  for field in ('keys', 'queries', 'rows', 'kept'):
    close(getattr(masked.trace, field), getattr(compact.trace, field), 1e-5)


def test_serve_equals_mask(name):  # MPNet, whose bias follows each token to its new place
  model, params = model_and_params(settings(name, 'TINY'), FAMILIES['mpnet'])
  masked = apply(model, params, BATCH)
  with serve.Server(model, params, ladder=serve.Ladder((8, 16), batch_tokens=32)) as server:
    answers = list(server.map(requests(BATCH)))
  for answer, expected, n in zip(answers, masked.logits, LENGTHS):
    close(answer.logits, expected[:n] if model.readout == 'tokens' else expected)
  np.testing.assert_allclose([answer.macs for answer in answers], masked.macs, rtol=1e-5)
  assert apart(masked.trace) == set(model.reducer.separates())  # anything more would be programs for nothing


def apart(trace):
  """What `Reducer.separates` is about, from what was computed."""
  found = {'keys': trace.widest < trace.queries, 'rows': trace.queries < trace.widest}
  return {name for name, differs in found.items() if differs.any()}


@pytest.mark.parametrize(('leavers', 'differs'), [('frozen', {'rows'}), ('unseen', {'keys'})])
def test_tokens_that_leave_in_part_are_told_apart(leavers, differs):
  model, params = model_and_params(settings('topk', 'TINY') | {'leavers': leavers})
  assert apart(apply(model, params, BATCH).trace) == set(model.reducer.separates()) == differs


def test_the_state_of_a_token_that_is_gone_changes_nothing_bit_for_bit(name):
  model, params = model_and_params(settings(name, 'TINY'))
  encoder = segments.make_encoder(model).clone(executor='mask')
  variables = {'params': segments.encoder_params(params)}
  inputs = Inputs(
    *(jnp.asarray(BATCH[name]) for name in ('ids', 'mask', 'types')),
    {},
    labels=3,
    encoder=model.config,
    words=jnp.asarray(BATCH['words']),
  )

  @jax.jit
  def states(noise):
    key = jax.random.key(0)
    tokens, memory = encoder.apply(variables, inputs, method='begin')
    for half in encoder.halves():
      tokens, memory, *_ = encoder.apply(variables, tokens, memory, None, half, method='advance')
      gone = ~live(tokens)[..., None]
      tokens = tokens.replace(x=jnp.where(gone, noise * jax.random.normal(key, tokens.x.shape), tokens.x))
    return jnp.where(gone, 0, tokens.x), memory

  (plain, memory), (noisy, other) = states(0.0), states(100.0)
  np.testing.assert_array_equal(plain, noisy)
  jax.tree.map(np.testing.assert_array_equal, memory, other)


def test_compact_has_the_gradient_of_mask(name):
  model, params = model_and_params(settings(name, 'TINY'))

  def gradient(model):
    return jax.jit(jax.grad(lambda p: jax.nn.log_softmax(apply(model, p, BATCH).logits)[:, 0].sum()))(params)

  masked, compact = gradient(model), gradient(model.clone(executor='compact'))
  for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(compact)):
    np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(a).max())))


def test_padding_and_batch_mates_change_nothing(name):
  model, params = model_and_params(settings(name, 'TINY'), executor='compact')
  together = apply(model, params, BATCH)
  wider = apply(model, params, {k: np.pad(v, ((0, 0), (0, 4))) for k, v in BATCH.items()})
  tags = model.readout == 'tokens'
  close(together.logits, wider.logits[:, :14] if tags else wider.logits)
  close(together.trace.kept, wider.trace.kept[..., :14], 1e-5)
  for i, n in list(enumerate(LENGTHS))[1::2]:
    alone = apply(model, params, {k: v[i : i + 1, :n] for k, v in BATCH.items()})
    close(together.logits[i, :n] if tags else together.logits[i], alone.logits[0])
    close(together.trace.kept[i, :, :n], alone.trace.kept[0], 1e-5)


def test_what_padding_holds_changes_nothing_bit_for_bit(name):
  model, params = model_and_params(settings(name, 'TINY'))
  other = {**BATCH, 'ids': np.where(BATCH['mask'], BATCH['ids'], 7).astype(np.int32)}
  np.testing.assert_array_equal(apply(model, params, BATCH).logits, apply(model, params, other).logits)


@pytest.mark.parametrize('executor', ['mask', 'compact'])
def test_neutral_setting_is_the_plain_encoder(name, executor):
  model, own = model_and_params(settings(name, 'NEUTRAL'), executor=executor)
  plain, params = model_and_params({'name': 'none'}, readout=model.readout)
  both = {**own, **params}
  close(apply(plain, params, BATCH).logits, apply(model, both, BATCH).logits, 1e-6)


def test_the_backbone_has_the_same_parameters_under_every_method(name):
  plain, _ = model_and_params({'name': 'none'})
  model, _ = model_and_params(settings(name, 'TINY'))
  shapes = [jax.eval_shape(m.init_params, jax.random.key(0))['encoder'] for m in (plain, model)]
  assert shapes[0] == shapes[1]


def test_the_class_token_is_kept_when_it_is_read_out(name):
  if 'cls' not in make_reducer(settings(name, 'TINY')).readouts():
    pytest.skip('it is not read out')
  model, params = model_and_params(settings(name, 'TINY'), readout='cls')
  trace = apply(model, params, BATCH).trace
  live = np.asarray(trace.keys) > 0
  combined = np.asarray(trace.assignment).max() >= 0
  kept = np.asarray(trace.kept)[live]
  assert combined or (kept[:, 0] == kept.max(-1)).all()  # every head that sees anything sees it


def test_costs_are_counted_on_real_tokens(name):
  model, params = model_and_params(settings(name, 'TINY'), executor='compact')
  trace = apply(model, params, BATCH).trace
  head = model.counted_head
  macs = np.asarray(flops.trace_macs(model.config, 3, head, trace))
  wider = apply(model, params, {k: np.pad(v, ((0, 0), (0, 4))) for k, v in BATCH.items()}).trace
  close(macs, flops.trace_macs(model.config, 3, head, wider), 1.0)
  dense = np.asarray(flops.dense_macs(model.config, 3, head, jnp.array(LENGTHS)))
  assert name == 'none' and (macs == dense).all() or (name != 'none' and (macs < dense).any())
  ratio = np.asarray(flops.keep_ratio(trace))
  assert (ratio >= 0).all() and (ratio <= 1 + 1e-6).all()
  planned = Half(0, False) in model.reducer.decides(4)
  assert planned or (ratio[:, 0] == 1).all()


def test_bfloat16_stays_close_and_reads_out_float32(name):
  model, params = model_and_params(settings(name, 'TINY'))
  half = model.clone(config=dataclasses.replace(TINY_CONFIG, dtype='bfloat16'))
  logits = apply(half, params, BATCH).logits
  assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
  if name == 'none':
    close(logits, apply(model, params, BATCH).logits, 0.15)


@pytest.mark.parametrize(
  ('spec', 'words'),
  [
    ({'name': 'fuzy'}, "'fuzy'.*did you mean 'fuzzy'"),
    ({}, 'reducer.name is None'),
    ({'name': 'fuzzy', 'ration': 0.5}, "no setting 'ration'.*did you mean 'ratio'"),
    ({'name': 'fuzzy', 'ratio': 'high'}, "ratio is 'high'"),
    ({'name': 'combine', 'slots': 2.5}, 'slots is 2.5'),
    ({'name': 'topk', 'shares': ('a', 'b')}, r"shares is \('a', 'b'\); a list of floats"),
    ({'name': 'early_exit', 'layers': (1.5,)}, r'layers is \(1.5,\); a list of ints'),
    ({'name': 'power', 'counts': 3}, 'counts is 3; a list of ints'),
    ({'name': 'chain', 'reducers': ['ltp']}, "a reducer is 'ltp'"),
    ({'name': 'chain', 'reducers': [{'name': 'nothing'}]}, "'nothing'"),
  ],
)
def test_a_wrong_spec_is_refused_with_what_there_is(spec, words):
  with pytest.raises(UserError, match=words):
    make_reducer(spec)
