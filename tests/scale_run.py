"""One forward pass and one training step of each method on 8 simulated devices: a program for tests/test_scale.py.

  python -m tests.scale_run METHOD,METHOD,…      'plans': `PLANS`

Prints a JSON object: method -> {forward, step: {difference, work (of a device, as a share of all), collectives}}. The forward
pass gives logits; the step loss, gradient norm and every tensor's squared gradient.
"""

import json
import re
import sys

import jax
import numpy as np

DEVICES = 8
PLANS = {
  'name': 'sttabt',
  'mode': 'topk',
  'keep': 0.3,
  'factor': 4,
}  # whose walk goes as far as it has to on one device
STEPS = ('chain', 'topk')  # whose training step runs too: most of the time is compiling
COLLECTIVE = re.compile(
  r'= .*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\('
)


def main():
  jax.config.update('jax_num_cpu_devices', DEVICES)
  from jax.sharding import NamedSharding, PartitionSpec

  from tests.reference import TINY_CONFIG, dot_macs, model_and_params, ragged_batch, settings
  from tokenprune_jax import optim, sharding, stages, tasks, train

  mesh = sharding.make_mesh(1)
  spread, everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), sharding.replicated(mesh)
  batch = ragged_batch(np.random.default_rng(0).integers(1, 17, 16), 16)
  batch |= {'label': np.arange(16, dtype=np.int32) % 3, 'weight': np.ones(16, np.float32)}
  found = {}
  for name in sys.argv[1].split(','):
    model, params = model_and_params(
      PLANS if name == 'plans' else settings(name, 'TINY'), TINY_CONFIG, executor='compact'
    )
    optimizer = optim.adamw(params, optim.schedule(1e-3, 10, 0.1), groups=(), weight_decay=0.01, clip=1.0)
    step = train.make_step(stages.default_objective(tasks.make('classify')), model, optimizer, None, 1, None)

    def forward(params, batch, model=model):
      return model.apply({'params': params}, batch).logits

    def trained(params, batch, step=step, optimizer=optimizer):
      state = {'trained': params, 'optimizer': optimizer.init(params)}
      return step.__wrapped__(state, {}, None, batch, np.int32(0), np.int32(0))[1]

    found[name] = {}
    for what, function in (('forward', forward), ('step', trained))[: 1 + (name in STEPS)]:
      alone = jax.jit(function).lower(params, batch).compile()
      placed = jax.device_put(params, everywhere), jax.device_put(batch, spread)
      together = (
        jax.jit(function, out_shardings=spread if what == 'forward' else everywhere).lower(*placed).compile()
      )
      one, all_ = alone(params, batch), together(*placed)
      pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(all_))]
      difference = max(float(np.abs(a - b).max() / max(1, np.abs(a).max())) for a, b in pairs)
      found[name][what] = {
        'difference': difference,
        'work': dot_macs(together.as_text()) / dot_macs(alone.as_text()),
        'collectives': sorted(set(COLLECTIVE.findall(together.as_text()))),
      }
  print(json.dumps(found))


if __name__ == '__main__':
  main()
