"""What a training step costs, dense and pruned: 12 x 768, combining at layer 7 or 11 of 12.

    python benchmarks/train_cost.py [--batch=4] [--length=512] [--repeats=5] [--variants=dense,pfc_late,…]

Writes results/train_cost.json and .md. Time: the trainer's own step (gradient, clipping, AdamW) in turns in one process.
Memory: XLA's analysis of the step compiled for 16 rows, without running it, and the peak of a process of its own that takes
two steps. Dense and pruned use the same attention code, without rematerialisation. With the rule `rank` counts are fixed, so
keys and values of pruned tokens leave by the schedule; with `protect` capacities are calibrated on real documents with
MPNet-base, whose attention is trained, and documents kept aside tell how often they overflow.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import measure, report
from tokenprune_jax import costs, data, flops, optim, pretrained, stages, tasks, timing, train, workdir
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.models import Classifier, make_reducer

LABELS = 5
RANK = {'name': 'fuzzy', 'ratio': 0.9, 'rule': 'rank'}
PAPER = {
  'pf': (1.25, 0.88),
  'c_late': (1.26, 0.89),
  'pfc_late': (1.29, 0.80),
  'pfc_early': (1.64, 0.61),
  'p': (1.33, 0.88),
}
OVERFLOW_RATE = 0.01  # share of documents that a calibrated capacity may be too small for, a layer


def specs(capacities: tuple[float, ...] | None) -> dict[str, tuple[dict, str]]:
  """variant -> (reducer spec, executor)."""
  late, early = ({'name': 'combine', 'slots': 8, 'layer': layer} for layer in (11, 7))
  found = {
    'dense': ({'name': 'none'}, 'mask'),
    'p': (RANK, 'compact'),
    'c_late': (late, 'compact'),
    'pfc_late': ({'name': 'chain', 'reducers': (RANK, late)}, 'compact'),
    'pfc_early': ({'name': 'chain', 'reducers': (RANK, early)}, 'compact'),
  }
  if capacities:
    protect = {**RANK, 'rule': 'protect', 'capacities': capacities}
    found['pfc_late_protect'] = ({'name': 'chain', 'reducers': (protect, late)}, 'compact')
    found['pfc_early_protect'] = ({'name': 'chain', 'reducers': (protect, early)}, 'compact')
  return found


class Step:
  """One variant's training step on full-length random rows."""

  def __init__(self, spec: dict, executor: str, batch: int, length: int, attention_dropout: float):
    config = EncoderConfig(dropout=0.1, attention_dropout=attention_dropout)
    self.model = Classifier(config, make_reducer(spec), LABELS, executor=executor).check()
    shapes = jax.eval_shape(self.model.init_params, jax.random.key(0))
    trained = optim.trainable(shapes, '.*', self.model.unused_blocks())
    rate = optim.schedule(5e-5, 100, 0.1)
    self.optimizer = optim.adamw(shapes, rate, groups=(), weight_decay=0.01, clip=1.0)
    objective = stages.default_objective(tasks.make('classify'))
    self.function = train.make_step(objective, self.model, self.optimizer, None, 1, None)
    self.split = lambda params: optim.split(params, trained)
    ids = np.random.default_rng(0).integers(5, 30000, (batch, length)).astype(np.int32)
    ones = np.ones(batch, np.float32)
    self.batch = {'ids': ids, 'mask': np.ones_like(ids, bool), 'types': np.zeros_like(ids),
                  'label': np.zeros(batch, np.int32), 'weight': ones, 'index': np.arange(batch, dtype=np.int32)}  # fmt: skip

  def state(self):
    """(state, frozen) of fresh parameters."""
    trained, frozen = self.split(self.model.init_params(jax.random.key(0)))
    return {'trained': trained, 'optimizer': self.optimizer.init(trained)}, frozen

  def compiled(self):
    """The step compiled for the batch's shape, from shapes alone."""
    return self.function.lower(
      *jax.eval_shape(self.state), None, self.batch, np.int32(0), np.int32(0)
    ).compile()

  def start(self) -> None:
    """Puts a state in memory."""
    self.now, self.frozen = self.state()

  def __call__(self) -> None:
    """One step, waited for."""
    self.now, metrics = self.function(self.now, self.frozen, None, self.batch, np.int32(0), np.int32(0))
    jax.block_until_ready((self.now, metrics))

  def macs(self) -> float:
    """Multiply-adds of the forward pass, one example of the batch."""
    apply = jax.jit(lambda params: self.model.apply({'params': params}, self.batch).trace)
    trace = apply(self.model.init_params(jax.random.key(0)))
    return float(flops.trace_macs(self.model.config, LABELS, 'linear', trace)[0])


def calibrated(length: int, documents: int = 24) -> tuple[tuple[float, ...], dict]:
  """(capacities of `protect` by layer, how they overflow on other documents), on BBC News with MPNet-base."""
  weights = pretrained.load('mpnet-base')
  spec = {
    'name': 'bbc',
    'max_length': length,
    'valid_limit': documents,
    'test_limit': documents,
    'train_limit': 20,
  }
  dataset = data.load(
    {**{'on_bad_row': 'error'}, **spec}, weights.tokenizer, length, data.cache_dir(), seed=0
  )
  model = Classifier(weights.config, make_reducer({**RANK, 'rule': 'protect'}), LABELS)
  params = {**model.init_params(jax.random.key(0)), 'encoder': weights.params['encoder']}
  apply = functools.partial(jax.jit(stages.forward(model)), params)

  def batches(split):
    plan = data.batches(
      dataset.splits[split], batch_size=4, buckets=(length,), seed=0, epoch_shuffle=False, pad_id=1
    )
    return plan.iterator(0)

  validation = costs.Validation(apply, lambda: batches('valid'))
  capacities = validation.capacities(lambda cost: cost.widest, OVERFLOW_RATE)
  widest = np.concatenate([np.asarray(apply(b).trace.widest)[b['weight'] > 0] for b in batches('test')])
  overflow = float((widest / length > np.array(capacities) + 1e-6).any(-1).mean())
  about = {
    'documents': documents,
    'overflow_rate_allowed_a_layer': OVERFLOW_RATE,
    'overflow_share_of_other_documents': overflow,
  }
  return capacities, {**about, 'capacities': list(capacities)}


def peak(variant: str, options) -> int:
  """Peak memory in bytes of a process that takes two steps of the variant."""
  command = [sys.executable, __file__, f'--peak={variant}', f'--batch={options.batch}', f'--length={options.length}',
             f'--attention_dropout={options.attention_dropout}',
             f'--capacities={json.dumps(options.capacities)}']  # fmt: skip
  return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measured(options) -> tuple[list[dict], dict]:
  """(rows, how capacities were calibrated)."""
  options.capacities, about = calibrated(options.length) if options.protect else (None, {})
  table = {
    name: spec
    for name, spec in specs(options.capacities).items()
    if not options.variants or name in options.variants
  }
  memory = {}
  for name, (spec, executor) in table.items():
    large = (
      Step(spec, executor, options.memory_batch, options.length, options.attention_dropout)
      .compiled()
      .memory_analysis()
    )
    memory[name] = large.temp_size_in_bytes + large.argument_size_in_bytes, peak(name, options)
    print(
      f'{name}: compiled {memory[name][0] / 2**30:.2f} GiB, process {memory[name][1] / 2**30:.2f} GiB',
      flush=True,
    )
  steps = {
    name: Step(*spec, options.batch, options.length, options.attention_dropout)
    for name, spec in table.items()
  }
  macs = {name: step.macs() for name, step in steps.items()}
  for step in steps.values():
    step.start()
  load = measure.quiet(options.allow_load)
  times = timing.in_turns(steps, options.repeats)
  rows = []
  for name, (_, executor) in table.items():
    mac_ratio, time_ratio = macs[name] / macs['dense'], times['dense']['seconds'] / times[name]['seconds']
    rows.append({
      'model': 'bert 12 x 768', 'method': name, 'executor': executor, 'batch': options.batch, 'length': options.length,
      'dtype': 'float32', 'attention_dropout': options.attention_dropout, **times[name],
      'dense_seconds': times['dense']['seconds'], 'mac_ratio': mac_ratio, 'time_ratio': time_ratio,
      'efficiency': time_ratio * mac_ratio, 'compiled_bytes': memory[name][0], 'compiled_batch': options.memory_batch,
      'compiled_memory_ratio': memory[name][0] / memory['dense'][0], 'process_bytes': memory[name][1],
      'process_memory_ratio': memory[name][1] / memory['dense'][1], 'load_of_others': load,
      'paper_time_ratio': PAPER.get(name, (None, None))[0], 'paper_memory_ratio': PAPER.get(name, (None, None))[1],
    })  # fmt: skip
  return rows, about


def page(rows: list[dict]) -> str:
  """The table."""
  lines = [
    (
      'step',
      'seconds',
      'times as fast',
      'its MAC limit',
      'paper',
      'memory, compiled',
      'memory, process',
      'paper',
    )
  ]
  for row in rows:
    lines.append((
      row['method'], f'{row["seconds"]:.2f}', f'{row["time_ratio"]:.2f}', f'{1 / row["mac_ratio"]:.2f}',
      f'{row["paper_time_ratio"] or "":}', f'{row["compiled_memory_ratio"]:.2f}', f'{row["process_memory_ratio"]:.2f}',
      f'{row["paper_memory_ratio"] or "":}',
    ))  # fmt: skip
  return report.table(lines)


def main() -> None:
  """Measures, writes and prints; with --peak it is the process whose memory is read."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument(
    '--memory_batch', type=int, default=16, help='rows of the step whose memory XLA analyses'
  )
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--attention_dropout', type=float, default=0.0)
  parser.add_argument('--variants', type=lambda text: text.split(','), default=[])
  parser.add_argument('--protect', action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/train_cost.json')
  parser.add_argument('--capacities', type=json.loads, default=None, help=argparse.SUPPRESS)
  parser.add_argument('--peak', default='', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.peak:
    step = Step(
      *specs(options.capacities)[options.peak], options.batch, options.length, options.attention_dropout
    )
    step.start()
    step(), step()
    print(timing.peak_rss())
    return
  path = pathlib.Path(options.out)
  header = report.header(report.command())  # of what is running now
  rows, about = measured(options)
  workdir.write_json(path, {**header, 'calibration': about, 'rows': rows})
  workdir.write_text(path.with_suffix('.md'), f'{page(rows)}\n')
  print(page(rows))


if __name__ == '__main__':
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  main()
