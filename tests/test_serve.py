"""The executor `serve`: exact whatever is served together, with nothing lost, no hang and no late compiling."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import apply, model_and_params, ragged_batch
from tokenprune_jax import buckets, flops, ladder, request, segments, serve
from tokenprune_jax.errors import UserError

PYRAMID = {
  'name': 'chain',
  'reducers': (
    {'name': 'threshold', 'threshold': 0.015},
    {'name': 'early_exit', 'layers': (1, 2), 'threshold': 0.9},
  ),
}
CONTROLS = {'threshold': 0.015, 'exit_threshold': 0.9}
LADDER = serve.Ladder((4, 8, 16), batch_tokens=32)


def rows(batch):
  """A padded batch as a list of requests."""
  return [ids[:n] for ids, n in zip(batch['ids'], batch['mask'].sum(1))]


@pytest.fixture(scope='module')
def pyramid():
  """(server, model, params) of a method that prunes and exits, compiled."""
  model, params = model_and_params(PYRAMID)
  with serve.Server(model, params, ladder=LADDER, controls=CONTROLS, queue=8) as server:
    server.precompile()
    yield server, model, params


@settings(max_examples=15, deadline=None)
@given(
  lengths=st.lists(st.integers(1, 16), min_size=1, max_size=12),
  seed=st.integers(0, 5),
  threshold=st.sampled_from([0.0, 0.01, 0.015, 0.02]),
  exit_threshold=st.sampled_from([0.0, 0.9, 0.95, 1.0]),
)
def test_every_composition_is_answered_as_by_mask(pyramid, lengths, seed, threshold, exit_threshold):
  server, model, params = pyramid
  controls = {'threshold': threshold, 'exit_threshold': exit_threshold}
  batch = ragged_batch(lengths + [1] * (12 - len(lengths)), 16, seed)  # one shape for `mask`
  every = {name: np.full(12, value, np.float32) for name, value in controls.items()}
  expected = apply(model, params, {**batch, 'controls': every})
  answers = list(server.map(rows(batch)[: len(lengths)], controls))
  for i, answer in enumerate(answers):
    np.testing.assert_allclose(answer.logits, expected.logits[i], atol=1e-4)
  macs = flops.trace_macs(model.config, 3, 'linear', expected.trace)[: len(lengths)]
  np.testing.assert_allclose([answer.macs for answer in answers], macs, rtol=1e-5)


@pytest.mark.parametrize(
  ('request_', 'words'),
  [
    ({'ids': [5, 6]}, r"the keys \['ids'\]; expected 'ids' and 'words'"),
    ({'ids': [5, 6], 'words': [0]}, r'has 2 token ids; words is \[0\]'),
    ({'ids': [5, 6], 'words': [0, 0.5]}, 'expected as many numbers'),
    ({'ids': [5, 6], 'words': [1, 2]}, 'numbered from 0 in their order'),
    ({'ids': [5, 6, 7], 'words': [0, 2, 2]}, 'numbered from 0'),
    ({'ids': [5, 6, 7], 'words': [0, 1, 0]}, 'numbered from 0'),
    ({'ids': [5, 6], 'words': [-2, 0]}, 'numbered from 0'),
  ],
)
def test_words_that_do_not_fit_are_refused(pyramid, request_, words):
  with pytest.raises(UserError, match=words):
    pyramid[0].submit(request_)


def test_controls_may_differ_within_a_batch(pyramid):
  server, _, _ = pyramid
  request = ragged_batch((12,), 12)['ids'][0]
  futures = [server.submit(request, {'exit_threshold': value}, wait=True) for value in (0.0, 1.0) * 4]
  assert [future.result().layers for future in futures] == [4, 1] * 4


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ({'exit_threshold': -3}, 'the control exit_threshold is -3.0; it is a share from 0 to 1'),
    ({'exit_threshold': 50}, 'the control exit_threshold is 50.0'),
    ({'exit_threshold': np.nan}, 'expected finite numbers'),
    ({'threshold': -0.1}, 'the control threshold is -0.1'),
  ],
)
def test_controls_out_of_range_are_refused(pyramid, given, words):
  server, model, params = pyramid
  with pytest.raises(UserError, match=words):
    server.submit([5, 6], given)
  with pytest.raises(UserError, match=words):
    serve.Server(model, params, controls=given)


def test_types_are_those_that_the_model_was_trained_with():
  pair = SimpleNamespace(ids=[5, 6], type_ids=[0, 1])
  for has_types, types in ((True, [0, 1]), (False, [0, 0])):

    def encode(texts, pairs=None):
      return [(pair, 0)]

    encode.has_types = has_types
    reader = request.Reader(8, 60, {}, encode)
    assert reader.read(('some text', 'and another'), {}).types.tolist() == types


def test_nothing_is_compiled_after_precompile(pyramid):
  server, _, _ = pyramid
  compiled = []

  def listen(event, seconds, **about):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  before, rng = len(server.programs), np.random.default_rng(0)
  lengths = rng.integers(1, 17, 300)
  answers = list(server.map(rng.integers(5, 60, n) for n in lengths))
  assert len(answers) == 300 and len(server.programs) == before
  assert not [event for event in compiled if 'backend_compile' in event]


def test_segments_with_equal_code_share_one_program():
  model, params = model_and_params({'name': 'threshold', 'threshold': 0.015})
  programs = segments.Programs(model, params, 16, ())
  assert [[tuple(half) for half in s.halves] for s in programs.segments] == [
    [(1, True), (1, False), (2, True)], [(2, False), (3, True)], [(3, False), (4, True)], [(4, False)]
  ]  # fmt: skip
  for index in range(4):
    programs.program(index, segments.Bucket(2, 8))
  assert len(programs.by_code) == 3  # the two in the middle are one


def test_layers_of_a_plan_share_one_program():
  model, params = model_and_params({'name': 'sttabt', 'mode': 'hard', 'factor': 4}, readout='cls')
  programs = segments.Programs(model, params, 16, ())
  for index in range(1, 4):  # each a layer; the first segment plans
    programs.program(index, segments.Bucket(2, 8, updated=2))
  assert len(programs.segments) == 5 and len(programs.by_code) == 1


def test_exits_behind_layers_in_which_all_tokens_are_combined():
  combined = {'name': 'combine', 'slots': 3, 'layer': 2}
  exits = {'name': 'early_exit', 'layers': (1, 3), 'threshold': 0.9}
  model, params = model_and_params({'name': 'chain', 'reducers': (combined, exits)})
  batch = ragged_batch([14, 9, 5, 2, 1], 14)
  with serve.Server(model, params, ladder=LADDER) as server:
    compiled = server.precompile()
    answers = list(server.map(rows(batch)))
    assert [server.buckets.left(index, 0) for index in range(3)] == [(4, 8, 16), (0,), (0,)]
    assert len(server.programs) == compiled
  expected = apply(model, params, batch)
  np.testing.assert_allclose([answer.logits for answer in answers], expected.logits, atol=1e-4)


def test_rows_that_exit_make_room_and_order_is_kept(pyramid):
  server, model, params = pyramid
  batch = ragged_batch(np.random.default_rng(1).integers(1, 17, 60), 16)
  answers = list(server.map(rows(batch), {'exit_threshold': 0.95}))
  expected = apply(model, params, {**batch, 'controls': {
    'threshold': np.full(60, 0.015, np.float32), 'exit_threshold': np.full(60, 0.95, np.float32)
  }})  # fmt: skip
  np.testing.assert_allclose(np.stack([answer.logits for answer in answers]), expected.logits, atol=1e-4)
  assert {answer.layers for answer in answers} == {1, 2, 4}


@pytest.mark.parametrize(
  ('request_', 'words'),
  [
    ([], 'the request is empty'),
    (np.arange(5, 22), 'has 17 tokens; this server takes at most 16'),
    ([5, 'word'], 'expected one text, a pair of texts, or token ids'),
    ([[5, 6], [7]], 'expected one text'),
    ([0.5], 'expected one text'),
    ([5, 60], 'token id 60; the model has the ids 0 to 59'),
    ([-1], 'token id -1'),
    ('a text', 'without a tokenizer'),
    ('  ', 'an empty text'),
    ('\ud800 hello', 'invalid UTF-8'),
    (None, 'expected one text'),
  ],
)
def test_a_bad_request_is_refused_and_the_others_are_answered(pyramid, request_, words):
  server, _, _ = pyramid
  with pytest.raises(UserError, match=words):
    server.submit(request_)
  good, bad, after = server.map([[5, 6], request_, [7]], on_error='return')
  assert isinstance(bad, UserError) and 'request number 2' in str(bad)
  assert good.logits.shape == after.logits.shape == (3,)
  with pytest.raises(UserError, match='request number 1'):
    list(server.map([request_]))


def test_wrong_controls_are_refused(pyramid):
  server, _, _ = pyramid
  with pytest.raises(UserError, match="unknown control 'speed'.*threshold, exit_threshold"):
    server.submit([5], {'speed': 1.0})
  with pytest.raises(UserError, match='finite'):
    server.submit([5], {'threshold': float('nan')})
  with pytest.raises(UserError, match='expected finite numbers'):
    server.submit([5], {'threshold': 'low'})
  _, model, params = pyramid
  with pytest.raises(UserError, match="unknown control 'exit_treshold'; this method has: .*exit_threshold"):
    serve.Server(model, params, controls={'exit_treshold': 0.3})


def test_a_full_queue_says_so_and_loses_nothing(pyramid, monkeypatch):
  server, _, _ = pyramid
  admit, gate = server.admit, threading.Event()
  monkeypatch.setattr(server, 'admit', lambda whole: admit(whole) if gate.is_set() else [])
  futures = [server.submit([5, 6, 7]) for _ in range(8)]
  with pytest.raises(UserError, match='the queue is full: 8 requests wait'):
    server.submit([5])
  gate.set()
  assert all(future.result(60).logits.shape == (3,) for future in futures)


def test_a_reader_that_stops_early_leaves_the_server_free(pyramid):
  server, _, _ = pyramid
  answers = server.map([5, 6] for _ in range(10_000))
  next(answers)
  answers.close()
  assert server.submit([5, 6], wait=True).result(60).logits.shape == (3,)
  with server.changed:
    server.changed.wait_for(lambda: not server.waiting, timeout=60)
  assert not server.waiting


def test_those_without_company_are_not_overtaken_for_ever(pyramid, monkeypatch):
  server, _, _ = pyramid
  monkeypatch.setattr(serve, 'PATIENCE', 5)
  monkeypatch.setattr(server, 'queue', 500)
  admit, gate, order = server.admit, threading.Event(), []
  monkeypatch.setattr(server, 'admit', lambda whole: admit(whole) if gate.is_set() else [])
  lengths = [3] * 16 + [15] + [4] * 400  # one long request among those that always fill a batch
  for number, length in enumerate(lengths):
    future = server.submit(np.arange(5, 5 + length), {'exit_threshold': 0.0})
    future.add_done_callback(lambda _, number=number: order.append(number))
  gate.set()
  future.result(60)
  assert order.index(16) < 200


def test_a_program_that_fails_fails_its_batch_alone(pyramid, monkeypatch):
  server, _, _ = pyramid
  program = server.programs.program

  def failing(index, bucket):
    if bucket.slots == 4:
      raise RuntimeError('out of memory')
    return program(index, bucket)

  monkeypatch.setattr(server.programs, 'program', failing)
  short, long = (
    server.submit([5, 6]),
    server.submit(np.arange(5, 20), {'threshold': 0.0, 'exit_threshold': 0.0}),
  )
  with pytest.raises(RuntimeError, match='out of memory'):
    short.result(60)
  assert long.result(60).layers == 4


def test_a_server_that_breaks_leaves_nobody_waiting(monkeypatch):
  model, params = model_and_params({'name': 'none'})
  server = serve.Server(model, params, ladder=LADDER)

  def broken(whole):
    raise RuntimeError('a defect')

  monkeypatch.setattr(server, 'admit', broken)
  with pytest.raises(RuntimeError, match='a defect'):
    server.submit([5, 6]).result(60)
  with pytest.raises(UserError, match='closed'):
    server.submit([5])
  server.close()


@pytest.mark.parametrize('step', ['form', 'batch', 'worth'])
def test_nobody_waits_for_what_breaks_before_it_starts(monkeypatch, step):
  model, params = model_and_params({'name': 'none'})
  server = serve.Server(model, params, ladder=LADDER)

  def broken(*_):
    raise RuntimeError('a defect')

  monkeypatch.setattr(server if step == 'batch' else server.buckets, step, broken)
  with pytest.raises(RuntimeError, match='a defect'):
    server.submit([5, 6]).result(60)
  server.close()


def test_closing_answers_what_was_submitted():
  model, params = model_and_params({'name': 'none'})
  server = serve.Server(model, params, ladder=LADDER)
  futures = [server.submit([5, 6, 7]) for _ in range(20)]
  server.close()
  assert all(future.done() for future in futures) and futures[0].result().layers == 4
  with pytest.raises(UserError, match='closed'):
    server.submit([5])
  with pytest.raises(UserError, match='closed'):
    list(server.map([[5]]))


@pytest.mark.parametrize(
  ('ladder', 'words'),
  [
    (serve.Ladder(()), 'ladder.lengths'),
    (serve.Ladder((8, 4)), 'increasing order'),
    (serve.Ladder((0, 4)), 'above 0'),
    (serve.Ladder((4,), -1), 'batch_tokens is -1'),
  ],
)
def test_a_ladder_that_is_none_is_refused(ladder, words):
  model, params = model_and_params({'name': 'none'})
  with pytest.raises(UserError, match=words):
    serve.Server(model, params, ladder=ladder)
  with pytest.raises(UserError, match='queue is 0'):
    serve.Server(model, params, queue=0)


def test_examples_go_one_by_one_where_that_costs_less():
  assert not ladder.crowded(1, 64, 512) and ladder.crowded(8, 64, 512)
  assert ladder.crowded(3, 64, 0.25 * 512) and not ladder.crowded(3, 64, 512)
  assert ladder.crowded(1, 512, 512)  # a full batch, of one row


def test_a_quarter_holds_the_count():
  for total in (16, 60, 512):
    for count in range(total + 1):
      share = ladder.quarter(count, total)
      assert (total if share is None else -(-share * total // 4)) >= count
      assert share in (None, 1) or (share - 1) * total / 4 < count


def test_the_ladder_is_coarse_where_shapes_are_many():
  every, apart = (model_and_params({'name': name})[0] for name in ('threshold', 'fuzzy'))
  assert buckets.lengths_of(every) == ladder.LENGTHS and buckets.lengths_of(apart) == ladder.COARSE


def test_a_ladder_ends_with_the_model():
  assert serve.Ladder((16, 64, 512)).settled(40).lengths == (16, 40)
  assert serve.Ladder((16, 32)).settled(40).lengths == (16, 32)  # and longer requests are refused
  assert [serve.Ladder(batch_tokens=512).rows(n) for n in (4, 8, 16, 512)] == [64, 64, 32, 1]
