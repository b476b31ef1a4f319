"""Plans for machines that are not here: 8 simulated devices, and programs lowered for TPU and CUDA."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.reference import TINY_CONFIG, labels_for, model_of, ragged_batch, settings
from tokenprune_jax import optim, stages, tasks, train
from tokenprune_jax.models import method_names

METHODS = method_names()
# Every kind of decision; fuzzy and combining are in the chain.
SPREAD = ('chain', 'early_exit', 'ltp', 'plans', 'sttabt', 'tokee', 'topk')
ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_eight_devices_give_the_same_numbers_for_an_eighth_of_the_work_each():
  """In one test: eight devices need a process. The one collective is the reduction of gradients."""
  command = [sys.executable, '-m', 'tests.scale_run', ','.join(SPREAD)]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
  assert run.returncode == 0, run.stderr
  all_found = json.loads(run.stdout.splitlines()[-1])
  assert tuple(all_found) == SPREAD and 'step' in all_found['chain']
  for name, programs in all_found.items():
    for what, found in programs.items():
      assert found['difference'] < 1e-4, (name, what, found)
      assert found['work'] == pytest.approx(1 / 8, rel=0.01), (name, what, found)
      assert found['collectives'] == (['all-reduce'] if what == 'step' else []), (name, what, found)


# cuDNN's kernel cannot be lowered where there is no cuDNN.
@pytest.mark.parametrize(
  ('name', 'kernel'), [*((name, 'plain') for name in METHODS), ('none', 'xla'), ('chain', 'xla')]
)
def test_forward_and_step_lower_for_tpu_and_cuda(name, kernel):
  config = dataclasses.replace(TINY_CONFIG, kernel=kernel, joint=True, dtype='bfloat16', dropout=0.1)
  model = model_of(settings(name, 'TINY'), config, executor='compact')
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  rows = ragged_batch((16,) * 8, 16)
  rows |= {'label': labels_for(model, rows), 'weight': np.ones(8, np.float32)}
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows)
  optimizer = optim.adamw(params, optim.schedule(1e-3, 10, 0.1), groups=(), weight_decay=0.01, clip=1.0)
  step = train.make_step(stages.default_objective(tasks.make('classify')), model, optimizer, None, 1, None)
  state = {'trained': params, 'optimizer': jax.eval_shape(optimizer.init, params)}
  number = jax.ShapeDtypeStruct((), np.int32)
  forward = jax.jit(lambda params, batch: model.apply({'params': params}, batch).logits)
  for exported in (
    jax.export.export(forward, platforms=['tpu', 'cuda'])(params, batch),
    jax.export.export(step, platforms=['tpu', 'cuda'])(state, {}, None, batch, number, number),
  ):
    assert exported.platforms == ('tpu', 'cuda') and 'stablehlo.dot_general' in exported.mlir_module()
