"""Words that halt: executors, limits, counting, serving, objectives, and settings that are none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import (
  TINY_CONFIG,
  apply,
  labels_for,
  model_and_params,
  model_of,
  ragged_batch,
  requests,
  settings,
)
from tokenprune_jax import costs, decoding, flops, segments, serve, stages, tasks, word_exit
from tokenprune_jax.errors import UserError
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducer import Inputs
from tokenprune_jax.reducers import tokee
from tokenprune_jax.tokens import Capacity

LENGTHS = (14, 9, 5, 7)
BATCH = ragged_batch(LENGTHS, 14)
FIRST = np.asarray(word_exit.first_pieces(jnp.asarray(BATCH['words'])))
LADDER = serve.Ladder((8, 16), batch_tokens=32)
TINY = settings('tokee', 'TINY')


def close(a, b, tolerance=1e-4):
  np.testing.assert_allclose(a, b, atol=tolerance)


def with_controls(**values):
  return {
    **BATCH,
    'controls': {name: np.full(len(LENGTHS), value, np.float32) for name, value in values.items()},
  }


@pytest.mark.parametrize(
  'changes',
  [
    {'keep_norm': True},
    {'copied': 'first'},
    {'level': 'sentence', 'threshold': 0.975},
    {'level': 'sentence', 'criterion': 'max_probability', 'pool': 'mean', 'threshold': 0.5},
  ],
  ids=lambda changes: '-'.join(map(str, changes.values())),
)
def test_executors_agree_under_every_setting(changes):
  model, params = model_and_params({**TINY, **changes})
  masked = apply(model, params, BATCH)
  compact = apply(model.clone(executor='compact'), params, BATCH)
  close(masked.logits, compact.logits)
  close(masked.trace.rows, compact.trace.rows)
  assert (np.asarray(masked.trace.rows)[:, -1] < LENGTHS).any()  # something has halted
  with serve.Server(model, params, ladder=serve.Ladder((16,), batch_tokens=32)) as server:
    answers = list(server.map(requests(BATCH)))
  for answer, expected, n in zip(answers, masked.logits, LENGTHS):
    close(answer.logits, expected[:n])
  np.testing.assert_allclose([answer.macs for answer in answers], masked.macs, rtol=1e-5)


TAGS = ('O', 'B-X', 'I-X')


@pytest.mark.parametrize('transitions', tokee.TRANSITIONS)
def test_exits_may_keep_to_the_scheme_of_the_tags(transitions):
  spec = {**TINY, 'window': 1, 'threshold': 0.93, 'transitions': transitions, 'tags': TAGS}
  model, params = model_and_params(spec)
  masked = apply(model, params, BATCH)
  if transitions == 'both':
    close(masked.logits, apply(model.clone(executor='compact'), params, BATCH).logits)
    with serve.Server(model, params, ladder=serve.Ladder((16,), batch_tokens=32)) as server:
      for answer, expected, n in zip(server.map(requests(BATCH)), masked.logits, LENGTHS):
        close(answer.logits, expected[:n])
  encoder = segments.make_encoder(model)
  given = {name: jnp.asarray(BATCH[name]) for name in ('ids', 'mask', 'types', 'words')}
  inputs = Inputs(**given, controls={}, labels=len(TAGS), encoder=TINY_CONFIG)
  memory = encoder.apply({'params': segments.encoder_params(params)}, inputs)[1]
  wrong = decoding.illegal_transitions(TAGS)
  layers, broken = np.asarray(memory['word_exit']), 0
  for i, n in enumerate(LENGTHS):
    tags = np.asarray(masked.logits)[i, :n][FIRST[i, :n]].argmax(-1)
    for j, (before, after) in enumerate(itertools.pairwise(tags)):
      there, then = layers[i, j : j + 2]
      if not wrong[before, after] or not there or not then:
        continue
      broken += 1
      assert transitions == 'free' or (
        transitions == 'mask' and there == then
      )  # whom it cannot tell of each other
  assert broken or transitions != 'free'


def test_a_sentence_stays_while_its_tags_break_the_scheme():
  tags = ('O', 'I-X', 'B-X')  # in this order half of the sentences clash at the first exit
  spec = {**TINY, 'level': 'sentence', 'threshold': 1.1, 'transitions': 'refuse', 'tags': tags}
  model, params = model_and_params(spec)
  masked, wrong = apply(model, params, BATCH), decoding.illegal_transitions(tags)
  rows = np.asarray(masked.trace.rows)
  for i in range(len(LENGTHS)):
    exits = np.asarray(masked.exits)[i].argmax(-1)  # [l w]
    count = int(FIRST[i].sum())
    legal = [not wrong[said[: count - 1], said[1:count]].any() for said in exits]
    left = legal.index(True) + 1 if any(legal) else len(rows[i])
    assert (rows[i] > 0).sum() == left
  assert len(set((rows > 0).sum(1).tolist())) > 1
  close(masked.logits, apply(model.clone(executor='compact'), params, BATCH).logits)


def test_tags_that_are_not_named_or_mark_no_spans():
  model, params = model_and_params({**TINY, 'transitions': 'mask'})
  with pytest.raises(UserError, match='name the 3 tags in their order; it names 0'):
    apply(model, params, BATCH)
  with pytest.raises(UserError, match='mark no spans: NN, VB; set it to'):
    tokee.labelled({'transitions': 'both'}, ('NN', 'VB'), 'plain')
  assert tokee.labelled({'transitions': 'both'}, TAGS, 'bio') == {'tags': TAGS}
  assert tokee.labelled({}, ('NN', 'VB'), 'plain') == {}
  with pytest.raises(UserError, match="goes with level='token'"):
    make_reducer({**TINY, 'level': 'sentence', 'transitions': 'mask'}).check(4, 2)


def test_frozen_slots_of_another_method_are_no_words_without_room():
  frozen = {'name': 'topk', 'shares': (0.9, 0.7, 0.7, 0.7), 'leavers': 'frozen'}
  for key, value in (('capacities', (1.0,) * 4), ('overflow_rate', 0.01), ('capacity_batch', 8)):
    chain = make_reducer({'name': 'chain', 'reducers': (frozen, {**TINY, key: value})})
    with pytest.raises(
      UserError, match=rf'reducer.reducers\[1\].{key} takes a slot that is seen and not updated'
    ):
      chain.check(4, 2)


def test_executors_agree_where_another_method_prunes_too():
  spec = {'name': 'chain', 'reducers': ({'name': 'topk', 'shares': (0.9, 0.7, 0.7, 0.7)}, TINY)}
  model, params = model_and_params(spec, readout='tokens')
  masked = apply(model, params, BATCH)
  close(masked.logits, apply(model.clone(executor='compact'), params, BATCH).logits)
  with serve.Server(model, params, ladder=LADDER) as server:
    for answer, expected, n in zip(server.map(requests(BATCH)), masked.logits, LENGTHS):
      close(answer.logits, expected[:n])


@pytest.mark.parametrize('rows', [36, 24, 17, 1])
def test_examples_may_share_the_rows_of_a_batch(rows):
  model, params = model_and_params(TINY)
  encoder = segments.make_encoder(model)
  given = {'params': segments.encoder_params(params)}
  arrays = {name: jnp.asarray(BATCH[name]) for name in ('ids', 'mask', 'types', 'words')}
  inputs = Inputs(**arrays, controls={}, labels=3, encoder=TINY_CONFIG)
  tokens, _ = encoder.apply(given, inputs, method='begin')
  halted = np.random.default_rng(0).random(tokens.updated.shape) < [[0.9], [0.0], [0.3], [1.0]]
  tokens = tokens.replace(updated=tokens.updated * ~halted)

  def block(tokens):
    def halves(encoder, tokens):
      mixed, _, first = encoder.block['2'].attend(tokens, None, (), False)
      fed, second = encoder.block['2'].feed_forward(mixed, False)
      return fed.x, first | second

    return encoder.apply(given, tokens, method=halves)

  expected, _ = block(tokens)
  found, overflow = block(tokens.replace(capacity=Capacity(batch_rows=rows)))
  fits = rows >= np.asarray(tokens.updated).sum()
  assert bool(overflow.any()) != fits
  if fits:
    close(found, expected)
  else:  # the first that fit are computed, the others keep their states
    kept = np.cumsum(np.asarray(tokens.updated).ravel()).reshape(halted.shape) <= rows
    expected, _ = block(tokens.replace(updated=tokens.updated * kept))
    close(np.asarray(found)[BATCH['mask']], np.asarray(expected)[BATCH['mask']])


def test_a_served_batch_computes_no_more_rows_than_it_needs(monkeypatch):
  model, params = model_and_params({**TINY, 'threshold': 0.0})
  with serve.Server(model, params, ladder=serve.Ladder((16,), batch_tokens=64)) as server:
    asked, program = [], server.programs.program
    monkeypatch.setattr(
      server.programs, 'program', lambda index, bucket: asked.append(bucket) or program(index, bucket)
    )
    answers = list(server.map(requests(ragged_batch((4,) * 8, 14))))
  assert len(answers) == 8 and {(bucket.rows, bucket.together) for bucket in asked} == {(8, 1)}  # 32 of 128


def test_words_that_are_left_are_gathered_into_capacities():
  masked_model, params = model_and_params(TINY)
  masked = apply(masked_model, params, BATCH)
  rows = np.asarray(masked.trace.rows)

  def compact(counts):
    capacities = tuple(float(count) / 14 for count in counts)
    return model_of({**TINY, 'capacities': capacities}).clone(executor='compact')

  wide = compact(np.maximum(rows.max(0), 1))
  found = apply(wide, params, BATCH)
  close(masked.logits, found.logits)
  assert not np.asarray(found.trace.overflow).any()
  cost, whole = (
    jax.jit(model.apply).lower({'params': params}, BATCH).cost_analysis()['flops']
    for model in (wide, masked_model)
  )
  assert cost < 0.9 * whole
  tight = np.maximum(rows.max(0) - [0, 1, 1, 1], 1)
  found = apply(compact(tight), params, BATCH)
  overflow = np.asarray(found.trace.overflow)
  assert overflow[rows[:, 1] > tight[1]].all() and 0 < overflow.sum() < len(LENGTHS)
  close(masked.logits[~overflow], found.logits[~overflow])
  given = {**BATCH, 'controls': {'exit_layers': np.full((len(LENGTHS), 14), 9)}}
  assert not np.asarray(apply(compact(tight), params, given).trace.overflow).any()  # while exits are sampled


def test_a_budget_finds_the_threshold_and_the_capacities_with_it():
  spec = {**TINY, 'overflow_rate': 0.01}
  model, params = model_and_params(spec)

  def batches():
    yield {**BATCH, 'weight': np.ones(len(LENGTHS), np.float32)}

  validation = costs.Validation(lambda batch: apply(model, params, batch), batches, encoder=model.config)
  found = stages.at_budget(spec, 0.7, validation)
  again = apply(model_of(found), params, BATCH)
  assert abs(float(again.macs.sum() / again.dense_macs.sum()) - 0.7) < 0.15
  assert found['capacities'] == pytest.approx((np.asarray(again.trace.rows) / 14).max(0).clip(1e-6))


@pytest.mark.parametrize('window', [1, 31])
def test_a_threshold_that_always_exits_is_the_first_exit(window):
  model, params = model_and_params({**TINY, 'window': window, 'threshold': 1.1})
  never = apply(model, params, with_controls(exit_threshold=0.0))
  always = apply(model, params, BATCH)
  firsts = word_exit.of_words(always.logits, jnp.asarray(FIRST), jnp.asarray(BATCH['words']), 14)
  close(firsts, never.exits[:, 0])
  assert (np.asarray(always.trace.rows)[:, 0] == LENGTHS).all()
  assert not np.asarray(always.trace.rows)[:, 1:].any()
  assert (np.asarray(never.trace.rows) == np.array(LENGTHS)[:, None]).all()


def test_a_window_of_one_lets_each_word_exit_by_itself():
  model, params = model_and_params({**TINY, 'upper': 1.0, 'window': 1})
  never = apply(model, params, with_controls(exit_threshold=0.0))
  found = apply(model, params, BATCH)
  sure = np.asarray(tokee.uncertainty(never.exits)[:, 0]) < 0.95  # at the first exit nothing has halted yet
  sure &= np.asarray(word_exit.places(jnp.asarray(BATCH['words']), jnp.asarray(BATCH['mask'])))
  left = np.asarray(found.trace.rows)[:, 1]
  for row, n in enumerate(LENGTHS):
    words = BATCH['words'][row, :n]
    halted = sum(sure[row, word] for word in words if word >= 0)
    everything = sure[row].sum() == words.max() + 1
    assert left[row] == (0 if everything else n - halted)


def test_attention_is_counted_where_it_is_computed():
  """Each layer: keys and values of all, queries and feed-forward of those that are left, once a layer."""
  model, params = model_and_params({**TINY, 'upper': 1.0})
  output = apply(model, params, BATCH)
  trace, c = output.trace, TINY_CONFIG
  expected = np.zeros(len(LENGTHS))
  for row, n in enumerate(LENGTHS):
    words = BATCH['words'][row].max() + 1
    for layer in range(c.depth):
      m = float(trace.rows[row, layer])
      keys = n if m else 0
      expected[row] += 2 * c.width**2 * (keys + m) + 2 * c.width * m * keys + 2 * c.width * c.hidden * m
      expected[row] += words * c.width * 3 * (m > 0 and layer < 3)  # an exit is asked while any word is there
    expected[row] += n * c.width * 3
  np.testing.assert_allclose(output.macs, expected, rtol=1e-6)
  assert (output.macs < flops.dense_macs(c, 3, 'tokens', np.array(LENGTHS))).any()


def test_in_serve_rows_that_exit_leave_at_once_and_waiting_ones_take_their_place(monkeypatch):
  """Every third request goes through whole: the programs behind the first layer see no row of the others."""
  model, params = model_and_params({**TINY, 'threshold': 1.1})
  rows = requests(ragged_batch((7,) * 30, 8))
  seen: dict[int, list] = {}
  with serve.Server(
    model, params, ladder=serve.Ladder((8,), batch_tokens=32), controls={'exit_threshold': 1.1}
  ) as server:
    start = server.start

    def watched(place, given, waiting):
      seen.setdefault(place.segment, []).append(len(waiting))
      start(place, given, waiting)

    monkeypatch.setattr(server, 'start', watched)
    futures = [
      server.submit(row, {'exit_threshold': 0.0 if i % 3 == 0 else 1.1}) for i, row in enumerate(rows)
    ]
    answers = [future.result(60) for future in futures]
  assert [answer.layers for answer in answers] == [4 if i % 3 == 0 else 1 for i in range(30)]
  assert sum(seen[0]) == 30 and all(sum(seen[segment]) == 10 for segment in (1, 2, 3))
  assert max(seen[0]) == max(seen[3]) == 8  # waiting ones came in until those that go on filled a batch


def test_nothing_is_compiled_after_precompile_where_words_halt():
  model, params = model_and_params(TINY)
  given = {'controls': {'exit_threshold': 0.95}, 'ladder': serve.Ladder((8,), batch_tokens=16)}
  with serve.Server(model, params, **given) as server:
    server.precompile()
    before = len(server.programs)
    rows = requests(ragged_batch(np.random.default_rng(0).integers(1, 9, 40), 8))
    futures = [
      server.submit(row, {'exit_threshold': limit}, wait=True)
      for row, limit in zip(rows, (0.0, 0.9, 0.95, 0.98, 1.1) * 8)
    ]
    assert len({future.result(60).macs for future in futures}) > 10 and len(server.programs) == before


def test_what_is_kept_of_words_is_as_long_as_their_bucket():
  model, params = model_and_params(TINY)
  with serve.Server(model, params, ladder=LADDER) as server:
    assert {(bucket.slots, bucket.length) for bucket in server.buckets.of(2)} == {(8, 8), (16, 16)}
    kept = server.programs.shapes(2, segments.Bucket(4, 8, length=8)).memory
  assert kept['prediction'].shape == (4, 8, 3) and kept['board'].size == 0


def test_an_example_without_words_goes_through_whole():
  model, params = model_and_params({**TINY, 'threshold': 1.1})
  batch = {**BATCH, 'words': np.full_like(BATCH['words'], -1)}
  assert (np.asarray(apply(model, params, batch).trace.rows) == np.array(LENGTHS)[:, None]).all()


# -------------------------------------------------------------------------------------------------- Objectives
@pytest.fixture(scope='module')
def training():
  """(model, params, batch) without dropout."""
  model, params = model_and_params({**TINY, 'dropout': 0.0})
  return (
    model,
    params,
    {**BATCH, 'label': labels_for(model, BATCH), 'weight': np.array([1, 1, 0, 1], np.float32)},
  )


def objective(function, model, params, batch, teacher=None):
  """(loss, metrics) under jit; teacher: (model, params)."""

  @jax.jit
  def run(params, batch):
    teach = None if teacher is None else lambda given: stages.forward(teacher[0])(teacher[1], given)
    return function(stages.forward(model), params, batch, jax.random.key(0), teach)

  return run(params, jax.tree.map(jnp.asarray, batch))


def by_loop(logits, batch, present):
  """Mean cross-entropy of words by layer, from logits [l b w c], of those `present(layer, row, word)`."""
  losses, counts = np.zeros(len(logits)), 0
  for row, weight in enumerate(batch['weight']):
    for piece in np.flatnonzero(batch['label'][row] >= 0):
      word = batch['words'][row, piece]
      counts += weight
      for layer, found in enumerate(logits):
        odds = found[row, word].astype(np.float64)
        loss = np.log(np.exp(odds).sum()) - odds[batch['label'][row, piece]]
        losses[layer] += weight * loss * present(layer, row, word)
  return losses / counts


def test_all_exits_learn_the_later_the_heavier(training):
  model, params, batch = training
  loss, said = objective(tokee.tags_joint, model, params, batch)
  output = apply(model, params, batch, train=True)
  last = word_exit.of_words(output.logits, jnp.asarray(FIRST), jnp.asarray(batch['words']), 14)
  losses = by_loop([*np.asarray(output.exits.swapaxes(0, 1)), np.asarray(last)], batch, lambda *_: True)
  assert float(loss) == pytest.approx(np.average(losses, weights=[1, 2, 3, 4]), rel=1e-4)
  assert float(said['task_loss']) == pytest.approx(losses[-1], rel=1e-4)


def test_sampled_exits_halt_words_and_only_those_that_are_left_learn(training, monkeypatch):
  model, params, batch = training
  leaving = np.random.default_rng(0).integers(1, 5, (4, 14))
  monkeypatch.setattr(tokee, 'sampled_exits', lambda *_: jnp.asarray(leaving))
  other = jax.tree.map(lambda x: x + 0.01, params)

  def run(params, halts):
    output = apply(model, params, {**batch, 'controls': {'exit_layers': halts}}, train=True)
    return [np.asarray(layer) for layer in tokee.by_words(output, jax.tree.map(jnp.asarray, batch))[0]]

  loss, _ = objective(tokee.tags_sampled, model, params, batch, (model, other))
  now, then = run(params, leaving), run(other, np.full((4, 14), 9))
  expected = 0.0
  for layer in range(4):
    for row, weight in enumerate(batch['weight']):
      for piece in np.flatnonzero(batch['label'][row] >= 0):
        word, label = batch['words'][row, piece], batch['label'][row, piece]
        if leaving[row, word] > layer:
          losses = [
            np.log(np.exp(x[layer][row, word].astype(np.float64)).sum()) - x[layer][row, word, label]
            for x in (now, then)
          ]
          expected += (layer + 1) / 10 * weight * abs(losses[0] - losses[1])
  expected /= (batch['weight'][:, None] * (batch['label'] >= 0)).sum()
  assert float(loss) == pytest.approx(expected, rel=1e-3) and expected > 0
  monkeypatch.setattr(tokee, 'sampled_exits', lambda *_: jnp.full((4, 14), 4))
  assert float(objective(tokee.tags_sampled, model, other, batch, (model, other))[0]) == pytest.approx(
    0, abs=1e-5
  )


def test_what_sampling_cannot_do_without_is_named(training):
  model, params, batch = training
  alone = {'name': 'sampled', 'objective': 'tags_sampled', 'teacher': ''}
  with pytest.raises(UserError, match="stage 'sampled': the objective 'tags_sampled' needs a teacher"):
    stages.find_objective(alone, TINY, tasks.make('tag'))
  plain, own = model_and_params({'name': 'none'}, readout='tokens')
  with pytest.raises(UserError, match='has no exits'):
    objective(tokee.tags_sampled, model, params, batch, (plain, own))
  few, own = model_and_params({**TINY, 'layers': (1, 3)})
  with pytest.raises(UserError, match='an exit behind each layer: set reducer.layers to 1, …, 3'):
    objective(tokee.tags_sampled, few, own, batch, (few, own))


# ---------------------------------------------------------------------------------------------------- Settings
@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'layers': (1, 4)}, r'layers is \(1, 4\); an exit stands behind one of the layers 1 to 3'),
    ({'layers': ()}, 'behind one of the layers 1 to 3'),
    ({'layers': (2, 1)}, 'different layers in their order'),
    ({'threshold': -0.1}, 'threshold is -0.1; expected a number between 0.0, at which nothing exits, and 1.1'),
    ({'threshold': 5.0}, 'threshold is 5.0'),
    ({'threshold': float('nan')}, 'threshold is nan'),
    ({'level': 'sentence', 'criterion': 'max_probability', 'threshold': 1.05}, 'between 1.0, at which nothing exits'),
    ({'window': 4}, 'window is 4; expected an odd number'),
    ({'window': -1}, 'window is -1'),
    ({'upper': -1.0}, 'upper is -1.0'),
    ({'dropout': 1.0}, 'dropout is 1.0; expected a number from 0 to 0.99'),
    ({'level': 'word'}, "level is 'word'; choose one of token, sentence"),
    ({'criterion': 'max_probability'}, "goes with level='sentence'"),
    ({'level': 'sentence', 'overflow_rate': 0.01}, "overflow_rate go with level='token'"),
    ({'capacities': (0.5,)}, 'reducer.capacities needs 4 shares'),
    ({'pool': 'sum'}, 'choose one of max, mean'),
    ({'copied': 'last'}, 'choose one of all, first'),
  ],
)  # fmt: skip
def test_settings_that_are_none(fields, message):
  with pytest.raises(UserError, match=message):
    model_of({**TINY, **fields})


def test_a_model_that_tags_no_words_and_inputs_without_them_are_refused():
  with pytest.raises(
    UserError, match="task.readout is 'cls', but this method tags words: set task.name='tag'"
  ):
    model_of(TINY, readout='cls')
  model, params = model_and_params(TINY)
  with pytest.raises(UserError, match="the batch has no 'words'"):
    model.apply({'params': params}, {name: BATCH[name] for name in ('ids', 'mask', 'types')})
  refused = pytest.raises(UserError, match="this model decides by words: a request is {'ids'")
  with serve.Server(model, params, ladder=LADDER) as server, refused:
    server.submit([5, 6, 7])
  assert make_reducer({'name': 'chain', 'reducers': [{'name': 'topk'}, TINY]}).needs_words()
