"""A head that reads every token: what has left is read from the board, in the same way by all executors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, apply, model_and_params, ragged_batch, settings
from tokenprune_jax import flops, segments, serve, tasks
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducer import Inputs, Reducer
from tokenprune_jax.tokens import live

LENGTHS = (14, 9, 5, 2, 1)
BATCH = ragged_batch(LENGTHS, 14)
SOME = {'name': 'topk', 'shares': (0.8, 0.6, 0.6, 0.3)}
DEPENDS = settings('threshold', 'TINY')  # how many leave depends on the example


def made(spec):
  """(model, params) of a tagger with 3 tags under a method."""
  return model_and_params(spec, readout='tokens')


def close(a, b, tolerance=1e-4):
  np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.parametrize('spec', [SOME, DEPENDS])
def test_compact_equals_mask(spec):
  model, params = made(spec)
  masked, compact = (apply(m, params, BATCH) for m in (model, model.clone(executor='compact')))
  assert masked.logits.shape == (5, 14, 3) and not np.asarray(compact.trace.overflow).any()
  close(masked.logits, compact.logits)
  np.testing.assert_array_equal(np.asarray(masked.logits)[~BATCH['mask']], 0)


def test_serve_equals_mask():
  model, params = made(DEPENDS)
  masked = apply(model, params, BATCH)
  with serve.Server(model, params, ladder=serve.Ladder((8, 16), batch_tokens=32), labels='abc') as server:
    answers = list(server.map([ids[:n] for ids, n in zip(BATCH['ids'], LENGTHS)]))
  for row, (answer, n) in enumerate(zip(answers, LENGTHS)):
    close(answer.logits, masked.logits[row, :n])
    assert answer.label == ['abc'[i] for i in answer.logits.argmax(-1)]
    close(answer.probabilities.sum(-1), np.ones(n), 1e-5)
  np.testing.assert_allclose([answer.macs for answer in answers], masked.macs, rtol=1e-5)
  np.testing.assert_allclose([answer.dense_macs for answer in answers], masked.dense_macs, rtol=1e-5)


def test_the_board_holds_the_last_state_of_every_token():
  """Against a loop that notes down the state of each token whenever a half block has computed it."""
  model, params = made(SOME)
  encoder = Encoder(model.config, model.reducer)
  plain = Encoder(model.config, Reducer())  # the same blocks, without decisions
  variables = {'params': segments.encoder_params(params)}
  inputs = Inputs(*(jnp.asarray(BATCH[name]) for name in ('ids', 'mask', 'types')), {}, 3, model.config)
  states, memory = encoder.apply(variables, inputs, method='begin')
  last = np.array(states.x[:, :14])
  for half in encoder.halves():
    computed, *_ = plain.apply(variables, states, {}, None, half, method='advance')
    position = np.asarray(states.position)
    for row, slot in zip(*np.nonzero(np.asarray(live(states)) & (position >= 0))):
      last[row, position[row, slot]] = computed.x[row, slot]
    states, memory, *_ = encoder.apply(variables, states, memory, None, half, method='advance')
  expected = last @ params['head']['out']['kernel'] + params['head']['out']['bias']
  found = apply(model, params, BATCH).logits
  close(np.asarray(found)[BATCH['mask']], expected[BATCH['mask']])


def test_compact_has_the_gradient_of_mask():
  model, params = made(SOME)
  batch = {'label': jnp.where(BATCH['mask'], BATCH['ids'] % 3, -1), 'weight': jnp.ones(5)}

  def gradient(model):
    return jax.jit(jax.grad(lambda p: tasks.make('tag').loss(apply(model, p, BATCH).logits, batch)))(params)

  masked, compact = gradient(model), gradient(model.clone(executor='compact'))
  for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(compact)):
    np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, float(jnp.abs(a).max())))


def test_the_head_is_counted_for_every_real_token():
  model, params = model_and_params({'name': 'none'}, readout='tokens')
  output = apply(model, params, BATCH)
  body = flops.dense_macs(TINY_CONFIG, 0, 'linear', np.array(LENGTHS))
  np.testing.assert_allclose(output.macs, body + 32 * 3 * np.array(LENGTHS), rtol=1e-6)
  np.testing.assert_allclose(output.dense_macs, output.macs, rtol=1e-6)


def test_what_cannot_read_tokens_says_so():
  for spec, head, message in (
    ({'name': 'none'}, 'family', "task.head is 'family', a head for whole texts"),
    (settings('early_exit', 'TINY'), 'linear', 'leaves tokens for cls, mean only'),
    (settings('combine', 'TINY'), 'linear', 'leaves tokens for cls, mean only'),
    (settings('sttabt', 'TINY'), 'linear', 'leaves tokens for cls only'),
  ):
    with pytest.raises(UserError, match=message):
      model_and_params(spec, readout='tokens', head=head)
  assert 'tokens' not in make_reducer(settings('chain', 'TINY')).readouts()
  assert 'tokens' in make_reducer(settings('combine', 'NEUTRAL')).readouts()
