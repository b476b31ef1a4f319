"""STTABT against the official code's whole small model and its distillation, and its stages end to end."""

import dataclasses
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import apply, model_and_params, ragged_batch
from tests.tiny_run import config as tiny_config
from tests.tiny_run import lines
from tokenprune_jax import approx_net, conversion, families, grouping, models, schedule, segments, train
from tokenprune_jax import tokens as stream
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.reducer import Inputs, Reducer
from tokenprune_jax.reducers import sttabt
from tokenprune_jax.tokens import Capacity

GOLDEN = pathlib.Path(__file__).parent / 'golden'
RNGS = {'dropout': jax.random.key(0), 'reduce': jax.random.key(1)}


def params_of(g, prefix, shape):
  """The parameters of one of the two encoders, its pooler and classifier included."""
  tensors = {
    (name if name.startswith(f'{prefix}.classifier') else f'{prefix}.bert.{name[2:]}')[2:]: g[name]
    for name in g.files
    if name.startswith(f'{prefix}.')
  }
  found = conversion.to_params(shape, tensors, dict.fromkeys(tensors, 'golden'), 'golden', families.TEXTS)
  return jax.tree.map(jnp.asarray, found)


@pytest.fixture(scope='module')
def official():
  """(vectors, model maker, parameters, batch)."""
  g = np.load(GOLDEN / 'sttabt_model.npz')
  depth, heads, width, hidden, factor, _, labels = (int(n) for n in g['cfg'])
  shape = EncoderConfig(
    vocab_size=len(g['w.embeddings.word_embeddings.weight']), width=width, depth=depth, heads=heads, hidden=hidden,
    max_positions=len(g['w.embeddings.position_embeddings.weight']), dropout=0.0, attention_dropout=0.0, group_slots=0,
  )  # fmt: skip
  narrow = dataclasses.replace(shape, width=width // factor, hidden=hidden // factor)
  big, small = params_of(g, 'w', shape), params_of(g, 'a', narrow)
  approx = {'encoder': small['encoder'], 'pooler': small['head']['dense'], 'out': small['head']['out']}
  theta = {'theta': jnp.asarray(g['theta'])}
  params = {**big, 'reducer': {'approx': approx, 'thresholds': theta}}

  def make(**fields):
    spec = {'name': 'sttabt', 'factor': factor, 'theta': float(g['theta0']), **fields}
    return models.Classifier(shape, models.make_reducer(spec), labels, readout='cls', head='family').check()

  ids = jnp.asarray(g['input_ids'])
  batch = {'ids': ids, 'mask': jnp.asarray(g['attention_mask'] > 0), 'types': jnp.zeros_like(ids)}
  return g, make, params, batch


def plan_of(output):
  """[l b n] of what each layer took in."""
  return np.asarray(output.trace.kept).swapaxes(0, 1)


def test_hard_masks_answers_and_costs_are_the_official_ones(official):
  g, make, params, batch = official
  output = apply(make(mode='hard'), params, batch)
  np.testing.assert_array_equal(plan_of(output), g['hard_mask_used'][:-1])
  np.testing.assert_allclose(output.logits, g['hard_logits'], atol=1e-4)
  sizes = g['hard_mask_used'].sum(-1).T  # [b l + 1]
  np.testing.assert_array_equal(output.trace.keys, sizes[:, :-1])
  # Rectangular: the queries of the layer above.
  np.testing.assert_array_equal(output.trace.queries, sizes[:, 1:])
  np.testing.assert_array_equal(output.trace.rows, sizes[:, 1:])


def test_in_the_hard_phase_thresholds_feel_the_regularisers_alone(official):
  g, make, params, batch = official
  model = make(mode='hard')

  def total(theta):
    reducer = {**params['reducer'], 'thresholds': {'theta': theta}}
    output = model.apply({'params': {**params, 'reducer': reducer}}, batch, train=True, rngs=RNGS)
    task = -jnp.take_along_axis(
      jax.nn.log_softmax(output.logits), jnp.asarray(g['labels'])[:, None], 1
    ).mean()
    return task + output.loss, (task, output.loss)

  (_, (task, extra)), gradient = jax.value_and_grad(total, has_aux=True)(
    params['reducer']['thresholds']['theta']
  )
  assert float(task) == pytest.approx(float(g['hard_loss_ce']), abs=1e-4)
  assert float(extra) == pytest.approx(float(g['hard_loss_reg'] + g['hard_loss_ratio']), rel=1e-3)
  np.testing.assert_allclose(gradient, g['hard_grad_theta'], rtol=1e-3, atol=1e-6)


def test_soft_masks_are_the_official_ones(official):
  g, make, params, batch = official
  output = apply(make(mode='soft'), params, batch, train=True, rngs=RNGS)
  np.testing.assert_allclose(plan_of(output), g['soft_mask_used'][:-1], atol=2e-5)
  assert float(output.loss) == pytest.approx(float(g['soft_loss_reg'] + g['soft_loss_ratio']), rel=1e-3)


def test_masks_inside_the_blocks_are_the_official_ones(official):
  """Answers, loss and the gradients of thresholds, ApproxNet and encoder, all in one."""
  g, make, params, batch = official
  model, labels = make(mode='soft', soft_form='inside'), jnp.asarray(g['labels'])

  def loss(params):
    output = model.apply({'params': params}, batch, train=True, rngs=RNGS)
    answers = jax.nn.log_softmax(output.logits)
    return output.loss - jnp.take_along_axis(answers, labels[:, None], 1).mean(), output.logits

  (total, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, g['soft_logits'], atol=1e-4)
  assert float(total) == pytest.approx(float(g['soft_loss_total']), abs=1e-4)
  reducer, encoder = gradient['reducer'], gradient['encoder']
  for found, name in (
    (reducer['thresholds']['theta'], 'theta'),
    (reducer['approx']['encoder']['block_1']['query']['kernel'].T, 'approx_query0'),
    (encoder['block_1']['value']['kernel'].T, 'bert_value0'),
  ):
    np.testing.assert_allclose(found, g[f'soft_grad_{name}'], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize('maps', ['approx', 'self'])
def test_top_k_with_the_approxnet_and_with_true_attention(official, maps):
  """The oracle is an ApproxNet of the encoder's own width and weights."""
  g, make, params, batch = official
  fields = {'mode': 'topk', 'keep': float(g['abt_ks'][0])}
  if maps == 'self':
    fields['factor'] = 1
    approx = {'encoder': params['encoder'], 'pooler': params['head']['dense'], 'out': params['head']['out']}
    params = {**params, 'reducer': {'approx': approx}}
  for row in range(len(batch['ids'])):
    one = {name: values[row : row + 1] for name, values in batch.items()}
    output = apply(make(**fields), params, one)
    expected = g[f'abt_{maps}_keep_mask'][:-1, row]
    np.testing.assert_array_equal(plan_of(output)[:, 0], expected)
    np.testing.assert_allclose(output.logits[0], g[f'abt_{maps}_logits'][row], atol=1e-4)


def test_the_parts_of_the_distillation():
  g = np.load(GOLDEN / 'sttabt_distill.npz')
  valid = jnp.asarray(g['attention_mask'])
  teacher, student = jnp.asarray(g['teacher_attn']), jnp.asarray(g['student_attn'])
  maps = np.mean([approx_net.map_divergence(a, b, valid) for a, b in zip(teacher, student)])
  every = jnp.ones_like(valid)  # the official code compares padding too

  def projected(x, name, layer=None):
    w, b = (g[f'{name}_{part}'] if layer is None else g[f'{name}_{part}'][layer] for part in 'wb')
    return jnp.asarray(x @ w.T + b)

  states = np.mean([
    approx_net.state_error(projected(g['student_hidden'][l], 'hid', l), jnp.asarray(g['teacher_hidden'][l]), every)
    for l in range(len(teacher))
  ])  # fmt: skip
  embedding = approx_net.state_error(projected(g['student_emb'], 'emb'), jnp.asarray(g['teacher_emb']), every)
  np.testing.assert_allclose([maps, states, embedding], g['loss_kldiv'][1:4], rtol=1e-4)


def test_distillation_stages_and_the_plan_that_comes_of_it(tmp_path):
  wanted = tiny_config(
    reducer={'name': 'sttabt', 'factor': 2, 'theta': -0.5, 'mode': 'hard', 'overflow_rate': 0.1},
    task__readout='cls',
    model__executor='compact',
  )
  wanted['stages'] = (
    {'name': 'tune', 'epochs': 1, 'reducer': {'name': 'none'}},
    {'name': 'approx', 'epochs': 2, 'init': 'tune', 'train': 'reducer/.*', 'objective': 'distil_approx',
     'reducer': {'mode': 'distil'}, 'checkpoint': 'last'},
    {'name': 'soft', 'epochs': 1, 'init': 'approx', 'reducer': {'mode': 'soft'}},
    {'name': 'hard', 'epochs': 1, 'init': 'soft'},
  )  # fmt: skip
  outcome = train.run(wanted, tmp_path)
  rows = [row for row in lines(tmp_path, 'train') if row['stage'] == 'approx']
  assert rows[-1]['states_loss'] < rows[0]['states_loss']
  parts = rows[0]['states_loss'] + rows[0]['answers_loss']
  assert rows[0]['loss'] == pytest.approx(parts, rel=1e-5) and rows[0]['answers_loss'] > 1e-4 * parts
  assert outcome['stages']['approx']['best_step'] == outcome['stages']['approx']['step']
  assert len(outcome['stages']['hard']['fields']['sttabt']['capacities']) == 2
  assert 0 < outcome['keep_ratio'] < 1


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'mode': 'weak'}, "mode is 'weak'"),
    ({'keep': 0.0}, 'keep is 0.0'),
    ({'factor': 0}, 'factor is 0'),
    ({'mask_weight': -1.0}, 'mask_weight is -1.0'),
  ],
)
def test_settings_out_of_range_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    models.make_reducer({'name': 'sttabt', **fields}).check(4, 4)


def test_what_cannot_be_is_refused_before_anything_is_computed(official):
  _, make, params, batch = official
  with pytest.raises(UserError, match='factor is 16, but 4 heads cannot share a width of 32'):
    make(factor=16).apply({'params': params}, batch)
  with pytest.raises(UserError, match="task.readout is 'mean', but this method leaves tokens for cls only"):
    make().clone(readout='mean').check()


def test_a_share_of_the_tokens_is_rounded_up_alike_everywhere():
  lengths = np.arange(1, 513)
  for keep in (0.15, 0.3, 0.35, 0.6, 1.0):
    found = sttabt.asked(jnp.full(512, keep, jnp.float32), jnp.asarray(lengths))
    np.testing.assert_array_equal(found, [schedule.places(keep, int(n)) for n in lengths])


def test_rows_that_a_plan_has_no_room_for_leave_by_their_score():
  """Already before the first block, whose plan is made first."""
  length, room = 12, 5
  batch = ragged_batch((length,), length)
  model, params = model_and_params({'name': 'none'})
  encoder = Encoder(model.config, Scored(room), 'compact')
  given = {'params': segments.encoder_params(params)}
  arrays = {name: jnp.asarray(batch[name]) for name in ('ids', 'mask', 'types')}
  _, _, trace = encoder.apply(given, Inputs(**arrays, controls={}, labels=3, encoder=model.config))
  tokens, _ = encoder.apply(
    given, Inputs(**arrays, controls={}, labels=3, encoder=model.config), method='begin'
  )
  tokens, overflow = stream.settled(tokens)
  assert np.flatnonzero(np.asarray(tokens.updated[0])).tolist() == [7, 8, 9, 10, 11] and bool(overflow[0])
  assert float(trace.rows[0, 0]) == room and bool(trace.overflow[0])


@pytest.mark.parametrize('mode', ['topk', 'hard'])
def test_what_a_plan_leaves_is_that_of_mask_and_by_topk_gathered_once(mode):
  """The plan's order is the order of the stream: as `mask` in values and gradient, and as it is where there is no room."""
  spec = {'name': 'sttabt', 'mode': mode, 'keep': 0.15, 'theta': -2.0, 'factor': 4}
  batch = jax.tree.map(jnp.asarray, ragged_batch((40, 33, 9, 1), 40))
  model, params = model_and_params(spec, readout='cls')

  def gradient(model):
    def loss(params):
      output = model.apply({'params': params}, batch)
      return jax.nn.log_softmax(output.logits)[:, 0].sum(), output

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  (_, masked), wanted = gradient(model)
  needed = np.asarray(masked.trace.keys).max(0)
  assert needed[0] < 40 and (np.diff(needed) <= 0).all() and needed[-1] < needed[0]
  for spare, lost in ((0, False), (-2, True)):
    capacities = tuple(float(n + spare) / 40 for n in needed)
    compact = models.make_reducer({**spec, 'capacities': capacities})
    compact = model.clone(reducer=compact, executor='compact')
    (_, output), found = gradient(compact)
    assert np.asarray(output.trace.overflow).any() == lost
    if not lost:
      np.testing.assert_allclose(output.logits, masked.logits, atol=1e-5)
      np.testing.assert_allclose(output.trace.kept, masked.trace.kept, atol=1e-6)
      np.testing.assert_allclose(output.trace.rows, masked.trace.rows, atol=1e-6)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
    program = jax.make_jaxpr(lambda p, m=compact: m.apply({'params': p}, batch).logits)(params)
    width = model.config.width
    states = [
      eqn for eqn in equations(program.jaxpr)
      if eqn.primitive.name == 'gather' and eqn.outvars[0].aval.shape[-1:] == (width,)
      and eqn.invars[0].aval.ndim == 3
    ]  # fmt: skip
    if mode == 'topk':
      assert len(states) == 1  # besides the read-out and the tables of embeddings


@pytest.mark.parametrize('mode', ['topk', 'hard'])
def test_the_walk_is_counted_with_the_rows_that_it_asks_for(mode):
  batch, real = jax.tree.map(jnp.asarray, ragged_batch((12, 5, 1), 12)), np.array([12, 5, 1])
  model, params = model_and_params({'name': 'sttabt', 'mode': mode, 'keep': 0.2, 'factor': 4}, readout='cls')
  output = apply(model, params, batch)
  depth, narrow = model.config.depth, model.reducer.narrow(model.config)
  if mode == 'topk':  # of each layer the rows that the next one needs, of the last the first
    rows = np.asarray(output.trace.rows).sum(-1)
  else:
    rows = (depth - 1) * real + 1
  expected = rows * real * (narrow.width + narrow.heads)
  if mode == 'hard':
    expected = expected + (rows + depth * real) * narrow.heads * (narrow.width // narrow.heads) ** 2
  np.testing.assert_allclose(output.trace.overhead['plan'], expected, rtol=1e-6)


@pytest.mark.parametrize('mode', ['topk', 'hard'])
def test_plans_of_a_few_examples_at_a_time_are_those_of_all(mode, monkeypatch):
  spec = {'name': 'sttabt', 'mode': mode, 'keep': 0.3, 'theta': -1.0, 'factor': 4}
  model, params = model_and_params(spec, readout='cls')
  batch = jax.tree.map(jnp.asarray, ragged_batch((12, 5, 1, 9), 12))
  # A request's setting goes with its example.
  batch['controls'] = {'keep' if mode == 'topk' else 'shift': jnp.array([0.2, 0.5, 0.3, 0.1])}
  found = []
  for rows in (4, 2):

    def group_rows(*given, rows=rows):
      assert given == (model.config.group_slots, 4, 12, sttabt.CACHED_SLOTS)
      return rows

    monkeypatch.setattr(sttabt, 'group_rows', group_rows)  # the blocks, whose group_slots is 0, take all
    program = jax.make_jaxpr(lambda p: model.apply({'params': p}, batch))(params)
    scans = {eqn.params['length'] for eqn in equations(program.jaxpr) if eqn.primitive.name == 'scan'}
    assert scans & {2, 4} == ({2} if rows == 2 else set())
    found.append(jax.jit(lambda p: model.apply({'params': p}, batch))(params))
  for grouped in found[1:]:
    np.testing.assert_allclose(grouped.logits, found[0].logits, atol=1e-5)
    np.testing.assert_array_equal(grouped.trace.kept, found[0].trace.kept)
    np.testing.assert_allclose(grouped.trace.overhead['plan'], found[0].trace.overhead['plan'], rtol=1e-6)


@pytest.mark.parametrize(
  ('group_slots', 'alone', 'b', 'rows'),
  [
    (-1, True, 16, 8),
    (-1, True, 12, 6),
    (-1, False, 12, 12),
    (0, True, 12, 12),
    (1000, False, 12, 3),
    (100, True, 12, 1),
  ],
)
def test_examples_at_a_time_divide_the_batch(monkeypatch, group_slots, alone, b, rows):
  """By default what stays in the cache of one CPU device; elsewhere all."""
  monkeypatch.setattr(grouping, 'on_one_cpu', lambda: alone)
  assert grouping.group_rows(group_slots, b, 256, cached=2100) == rows


def equations(jaxpr):
  """All of a program, inner ones included."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.extend.core.jaxprs_in_params(eqn.params):
      yield from equations(inner)


class Scored(Reducer):
  """A plan that scores later tokens higher and has room for a few."""

  room: int = 1

  def start(self, tokens, inputs, train):
    return tokens.replace(score=tokens.position.astype(jnp.float32), capacity=Capacity(rows=self.room)), {}
