"""The parts of training that need no model: optimizer, stages as data, what is written and how."""

import functools
import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokenprune_jax import (
  events,
  initial,
  models,
  optim,
  pretrained,
  settings,
  specs,
  stages,
  stopping,
  train,
  workdir,
  writer,
)
from tokenprune_jax.errors import UserError

PARAMS = {
  'encoder': {
    'block_1': {'query': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}, 'norm': {'scale': jnp.ones(2)}},
    'block_2': {'query': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}},
  },
  'head': {'out': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}},
}


# ---------------------------------------------------------------------------------------------- Optimizer
def test_schedule_rises_to_the_rate_and_falls_to_zero():
  rate = optim.schedule(2.0, 10, 0.3)
  values = [float(rate(step)) for step in range(10)]
  assert values[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
  assert values[2] == max(values) and values[-1] == pytest.approx(2 / 7)
  assert float(rate(10)) == 0
  assert [float(optim.schedule(1.0, 1, 0.1)(0)), float(optim.schedule(1.0, 2, 0.0)(1))] == [1.0, 1.0]


def test_trainable_leaves_out_blocks_that_never_run_and_split_merges_back():
  paths = optim.trainable(PARAMS, 'encoder/.*', (2,))
  assert paths == {'encoder/block_1/query/kernel', 'encoder/block_1/query/bias', 'encoder/block_1/norm/scale'}
  trained, frozen = optim.split(PARAMS, paths)
  assert set(optim.flatten(trained)) == paths
  assert jax.tree.structure(optim.merge(trained, frozen)) == jax.tree.structure(PARAMS)
  assert list(optim.flatten(PARAMS)) == [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_flatten_with_path(PARAMS)[0]
  ]


@pytest.mark.parametrize('regex', ['heads/.*', 'encoder/block_2/.*', 'head'])
def test_a_train_regex_that_trains_nothing_is_an_error(regex):
  with pytest.raises(UserError, match='matches none of the parameters'):
    optim.trainable(PARAMS, regex, (2,))


def test_the_first_group_that_matches_gives_the_rate():
  rates = optim.rates(PARAMS, (('head/out/.*', 10.0), ('head/.*|encoder/block_2/.*', 0.5)))
  assert rates['head/out/kernel'] == 10.0
  assert rates['encoder/block_2/query/bias'] == 0.5
  assert rates['encoder/block_1/query/kernel'] == 1.0


def test_a_group_has_to_match_in_some_stage():
  later = {**PARAMS, 'reducer': {'r': jnp.ones(2)}}
  optim.check_groups((('reducer/.*', 2.0), ('head/.*', 2.0)), [PARAMS, later])
  for groups, stages_ in (((('pooler/.*', 2.0),), [PARAMS, later]), ((('reducer/.*', 2.0),), [PARAMS])):
    with pytest.raises(UserError, match=r'/\.\*.*matches no parameter'):
      optim.check_groups(groups, stages_)


def one_update(grads, **changes):
  options = {'groups': (), 'weight_decay': 0.0, 'clip': 0.0} | changes
  optimizer = optim.adamw(PARAMS, lambda step: 0.1, **options)
  updates, _ = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(PARAMS), PARAMS))(grads)
  return {path: np.asarray(update) for path, update in optim.flatten(updates).items()}


def test_adamw_equals_optax_where_there_are_no_groups():
  grads = jax.tree.map(lambda x: 0.3 * jnp.arange(1.0, x.size + 1).reshape(x.shape), PARAMS)
  mask = optim.unflatten({path: optim.decays(path) for path in optim.flatten(PARAMS)})
  peer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.2, mask=mask))
  expected, _ = jax.jit(lambda grads: peer.update(grads, peer.init(PARAMS), PARAMS))(grads)
  found = one_update(grads, clip=1.0, weight_decay=0.2)
  for path, update in optim.flatten(expected).items():
    np.testing.assert_allclose(found[path], update, rtol=1e-6)


def test_weight_decay_spares_biases_and_norms():
  updates = one_update(jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=0.5)
  moved = {path for path, update in updates.items() if np.any(update != 0)}
  assert moved == {path for path in updates if path.endswith('kernel')}
  np.testing.assert_allclose(updates['head/out/kernel'], -0.1 * 0.5, rtol=1e-6)


def test_a_group_scales_the_whole_update():
  grads = jax.tree.map(jnp.ones_like, PARAMS)
  plain, grouped = one_update(grads), one_update(grads, groups=(('head/.*', 10.0), ('encoder/.*', 0.0)))
  np.testing.assert_allclose(grouped['head/out/bias'], 10 * plain['head/out/bias'], rtol=1e-6)
  assert not np.any(grouped['encoder/block_1/query/kernel'])


def test_accumulating_equals_the_big_batch_whatever_the_weights():
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(5,)), jnp.float32)
  weight = np.array([1, 0, 2, 1, 0, 0, 1, 0.5])
  batch = {'x': rng.normal(size=(8, 5)), 'label': np.zeros(8, int), 'weight': weight}
  batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}

  def gradient(batch, key):
    def loss(weights):
      rows = jnp.square(batch['x'] @ weights - 1)
      mean = jnp.sum(rows * batch['weight']) / jnp.maximum(batch['weight'].sum(), 1e-6)
      return mean, {'twice': 2 * mean}

    return jax.value_and_grad(loss, has_aux=True)(weights)

  accumulated = jax.jit(functools.partial(train.accumulated, gradient), static_argnums=2)
  whole = accumulated(batch, jax.random.key(0), 1)
  for parts in (2, 4, 8):
    cut = accumulated(batch, jax.random.key(0), parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), cut, whole)


# ------------------------------------------------------------------------------------------- Stages as data
CHAIN = {'name': 'chain', 'reducers': ({'name': 'fuzzy', 'ratio': 0.9}, {'name': 'combine', 'slots': 8})}


def test_stage_fields_reach_one_reducer_or_a_member_of_a_chain():
  assert specs.with_fields({'name': 'fuzzy', 'ratio': 0.9}, {'ratio': 0.5}) == {
    'name': 'fuzzy',
    'ratio': 0.5,
  }
  changed = specs.with_fields(CHAIN, {'combine': {'slots': 4}})
  assert [member.get('slots') for member in changed['reducers']] == [None, 4]
  assert CHAIN['reducers'][1]['slots'] == 8
  assert specs.with_fields(CHAIN, {'name': 'none'}) == {'name': 'none'}
  with pytest.raises(UserError, match='chain of fuzzy, combine'):
    specs.with_fields(CHAIN, {'ratio': 0.5})


def test_fields_handed_on_come_before_the_stage_s_own():
  handed_on = [{'fuzzy': {'ratio': 0.7, 'rule': 'rank'}}, {'other': {'x': 1}}]
  spec = stages.reducer_spec(CHAIN, handed_on, {'reducer': {'fuzzy': {'ratio': 0.6}}})
  assert spec['reducers'][0] == {'name': 'fuzzy', 'ratio': 0.6, 'rule': 'rank'}
  single = stages.reducer_spec({'name': 'fuzzy'}, handed_on, {'reducer': {}})
  assert single == {'name': 'fuzzy', 'ratio': 0.7, 'rule': 'rank'}


def test_a_teacher_is_an_earlier_stage():
  config = settings.check({'stages': ({'name': 'a'}, {'name': 'b', 'teacher': 'a', 'objective': 'x'})})
  stages.check(config['stages'])
  config = settings.check({'stages': ({'name': 'a', 'teacher': 'b', 'objective': 'x'}, {'name': 'b'})})
  with pytest.raises(UserError, match="teacher is 'b'"):
    stages.check(config['stages'])


def test_grafting_takes_what_fits_and_refuses_another_backbone(capsys):
  weights = pretrained.load('random:bert:layers=2,width=8,heads=1,hidden=8,vocab=128,length=16')
  reducer = models.make_reducer({'name': 'combine', 'slots': 2, 'layer': 2})
  model = models.Classifier(weights.config, reducer, 3)
  source = weights.params | {'head': {'out': {'bias': np.ones(3, np.float32), 'kernel': np.ones((8, 5))}}}
  result = initial.graft(model, jax.random.key(0), source, 'here')
  assert jax.tree.map(np.shape, result) == jax.tree.map(lambda x: x.shape, initial.param_shapes(model))
  assert np.array_equal(
    result['encoder']['block_1']['up']['kernel'], source['encoder']['block_1']['up']['kernel']
  )
  assert np.all(result['head']['out']['bias'] == 1) and result['head']['out']['kernel'].std() > 0
  said = capsys.readouterr().err
  assert 'new, not from here: head/out, reducer/assign, reducer/tokens (10 tensors)' in said
  encoder = dict(weights.params['encoder'])
  with pytest.raises(UserError, match=r'encoder/extra/w has shape \(1,\) there and None here'):
    initial.graft(model, jax.random.key(0), {'encoder': encoder | {'extra': {'w': np.ones(1)}}}, 'here')
  del encoder['block_2']
  with pytest.raises(UserError, match=r'encoder/block_2/attention_norm/bias has shape None there'):
    initial.graft(model, jax.random.key(0), {'encoder': encoder}, 'here')


# ------------------------------------------------------------------------------------------------ Writing
def test_metrics_go_on_after_a_step_without_a_line_twice_or_half(tmp_path):
  out = writer.MetricsWriter(tmp_path)
  out.go_on_after(0)
  for step in (1, 2, 3):
    out.write(step, 'a', 'train', {'loss': 1 / step, 'list': [1, 2]})
  out.write(2, 'a', 'valid', {'loss': 0.5})
  out.write(2, 'a', 'test', {'loss': 0.5})
  out.file.write(b'{"step": 1, "spl')
  out.close()
  again = writer.MetricsWriter(tmp_path)
  again.go_on_after(2)
  again.write(3, 'a', 'train', {'loss': 9.0})
  again.close()
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(row['step'], row['split']) for row in rows] == [
    (1, 'train'),
    (2, 'train'),
    (2, 'valid'),
    (3, 'train'),
  ]
  assert rows[-1] == {'step': 3, 'stage': 'a', 'split': 'train', 'loss': 9.0}
  assert list((tmp_path / 'tensorboard').glob('*tfevents*'))


def test_tensorboard_events_hold_the_numbers(tmp_path):
  out = writer.MetricsWriter(tmp_path)
  out.go_on_after(299)
  out.write(300, 'a', 'valid', {'loss': 0.25, 'examples': 3, 'list': [1], 'flag': True})
  out.close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  assert path.name.startswith('events.out.tfevents.')
  content, found = path.read_bytes(), []
  while content:
    (length,), (crc,) = struct.unpack('<Q', content[:8]), struct.unpack('<I', content[8:12])
    data, end = content[12 : 12 + length], struct.unpack('<I', content[12 + length : 16 + length])
    assert (crc, end[0]) == tuple(struct.unpack('<I', events.masked_crc(x))[0] for x in (content[:8], data))
    found.append(data)
    content = content[16 + length :]
  version, start, scalars = found
  assert version.endswith(b'brain.Event:2') and start[9:] == bytes([0x10, 0xAC, 0x02, 0x3A, 2, 8, 1])
  assert b'valid/loss\x15' + struct.pack('<f', 0.25) in scalars
  assert (
    b'valid/examples\x15' + struct.pack('<f', 3) in scalars
    and b'list' not in scalars
    and b'flag' not in scalars
  )


def test_the_checksum_is_that_of_the_standard():
  (masked,) = struct.unpack('<I', events.masked_crc(b'123456789'))
  crc = (masked - 0xA282EAD8) & 0xFFFFFFFF
  assert (crc << 15 | crc >> 17) & 0xFFFFFFFF == 0xE3069283  # CRC-32C of RFC 3720's check string


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_a_full_disk_is_one_clear_error(tmp_path):
  (tmp_path / 'metrics.jsonl').symlink_to('/dev/full')
  out = writer.MetricsWriter(tmp_path)
  with pytest.raises(UserError, match=r'metrics.jsonl: No space left on device'):
    out.write(1, 'a', 'train', {'loss': 1.0})


def test_a_workdir_that_cannot_be_made_is_one_clear_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write.*file'):
    workdir.lock(tmp_path / 'file' / 'run')
  with pytest.raises(UserError, match='cannot write'):
    workdir.write_json(tmp_path / 'file' / 'x.json', {})


def test_files_are_replaced_whole(tmp_path):
  workdir.write_json(tmp_path / 'a.json', {'x': 1})
  with pytest.raises(TypeError):
    workdir.write_json(tmp_path / 'a.json', {'x': object()})
  assert workdir.read_json(tmp_path / 'a.json') == {'x': 1}
  assert workdir.read_json(tmp_path / 'b.json') is None
  (tmp_path / 'a.json').write_text('{"x": ')
  with pytest.raises(UserError, match='a.json is not valid JSON'):
    workdir.read_json(tmp_path / 'a.json')


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
  code = (
    'import pathlib,sys; from tokenprune_jax import workdir; f = workdir.lock(pathlib.Path(sys.argv[1]));'
  )
  code += 'print("held", flush=True); sys.stdin.read()'
  owner = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
  )
  try:
    assert owner.stdout.readline() == 'held\n'
    with pytest.raises(UserError, match=rf'in use by another run \(process {owner.pid}\)'):
      workdir.lock(tmp_path)
  finally:
    owner.kill()
    owner.wait()
  workdir.lock(tmp_path).close()  # a kill frees it


def test_a_changed_config_is_refused_by_its_keys(tmp_path):
  config = settings.check({})
  # Nothing is learned yet: a slip costs no workdir.
  workdir.begin(tmp_path, settings.check({'seed': 5}))
  assert not workdir.is_finished(tmp_path, config)
  workdir.begin(tmp_path, config)
  workdir.write_json(tmp_path / 'stages' / 'finetune.json', {})
  workdir.write_json(tmp_path / 'result.json', {})
  assert workdir.is_finished(tmp_path, settings.check({'predict': 'x.txt', 'checkpoint': {'every': 7}}))
  assert not workdir.is_finished(tmp_path, settings.check({'eval': {'timing': False}}))
  assert (tmp_path / 'result.json').exists()  # until it is known that the run can begin
  with pytest.raises(UserError, match=r'config\.optimizer\.warmup was 0\.1 and is now 0\.2; config\.seed'):
    workdir.is_finished(tmp_path, settings.check({'seed': 1, 'optimizer': {'warmup': 0.2}}))


def test_changed_data_are_refused_by_what_differs(tmp_path):
  identity = {'labels': ['neg', 'pos'], 'train': {'examples': 9, 'digest': 'a'}}
  workdir.settle_data(tmp_path, {'labels': ['x', 'y']})
  workdir.settle_data(tmp_path, identity)  # nothing was learned from the others
  workdir.write_json(tmp_path / 'stages' / 'finetune.json', {})
  workdir.settle_data(tmp_path, identity)
  with pytest.raises(UserError, match=r"labels was \['neg', 'pos'\] and is now \['apos', 'neg'\]; train was"):
    workdir.settle_data(tmp_path, {'labels': ['apos', 'neg'], 'train': {'examples': 9, 'digest': 'b'}})


def test_a_signal_waits_for_the_step_but_interrupts_what_can_be_repeated():
  before = signal.getsignal(signal.SIGTERM)
  with stopping.Stop() as stop:
    assert not stop.requested(1)
    assert signal.getsignal(signal.SIGTERM) == stop.caught  # else the next line would end the tests
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(2) and stop.number == signal.SIGTERM
    with pytest.raises(stopping.Interrupted), stop.at_once():
      pytest.fail('was started although the run is to stop')
  with stopping.Stop() as stop, pytest.raises(stopping.Interrupted), stop.at_once():
    assert signal.getsignal(signal.SIGTERM) == stop.caught
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail('was not interrupted')
  assert signal.getsignal(signal.SIGTERM) == before
  assert stopping.Stopped(signal.SIGTERM).code == 143


def test_progress_elsewhere_than_on_a_terminal_is_a_line_now_and_then(monkeypatch):
  clock = itertools.count()  # as on a machine that has just started
  monkeypatch.setattr(writer.time, 'monotonic', lambda: float(next(clock)))
  stream = io.StringIO()
  progress = writer.Progress('tune', 4, stream, seconds=1000.0)
  for step in range(1, 5):
    progress.update(step, 0.5, 16.0, None if step == 1 else 0.25)
  progress.close()
  lines = stream.getvalue().splitlines()
  assert len(lines) == 2 and lines[1] == 'tune  step 4/4  loss 0.5000  64.0 examples/s  0:00 left'
  assert writer.clock(3725.5) == '1:02:05'
