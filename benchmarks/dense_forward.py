"""The dense forward pass beside torch: BERT of 12 x 768 or 6 x 384, the same shapes, in turns in one process.

    python benchmarks/dense_forward.py [--model=bert,minilm] [--dtype=float32] [--repeats=7] [--out=FILE]

Writes results/dense_forward.json. Bar: throughput >= 0.9 of `transformers` with SDPA in float32.
The weights are torch's own, read through `pretrained`, so both compute the same numbers; the difference is in each row.
"""

import argparse
import pathlib
import sys
import tempfile

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import measure, report, speed
from tokenprune_jax import pretrained, timing, workdir
from tokenprune_jax.encoder import Encoder
from tokenprune_jax.models import make_reducer
from tokenprune_jax.reducer import Inputs

SHAPES = ((8, 128), (8, 512), (1, 512))
MODELS = {'bert': speed.CONFIGS['base'], 'minilm': speed.CONFIGS['minilm']}


def torch_encoder(model: str, dtype: str):
  """(module, folder with its weights): a BERT with random weights and SDPA."""
  import torch
  from transformers import BertTokenizer

  torch.manual_seed(0)
  module = speed.torch_peer(MODELS[model])
  folder = tempfile.mkdtemp()
  module.save_pretrained(folder)
  BertTokenizer(vocab={'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3, '[MASK]': 4}).save_pretrained(folder)
  return module.to(getattr(torch, dtype)), folder


def rows(model: str, dtype: str, repeats: int, allow_load: bool) -> list[dict]:
  """One row a shape."""
  import torch

  peer, folder = torch_encoder(model, dtype)
  weights = pretrained.load(folder, dtype=dtype)
  encoder = Encoder(weights.config, make_reducer({'name': 'none'}))
  params = jax.device_put(weights.params['encoder'])
  forward = jax.jit(lambda params, inputs: encoder.apply({'params': params}, inputs)[0].x)
  name = f'{model} {weights.config.depth} x {weights.config.width}'
  found = []
  for batch, length in SHAPES:
    ids = np.random.default_rng(0).integers(5, 30000, (batch, length)).astype(np.int32)
    inputs = Inputs(ids, np.ones_like(ids, bool), np.zeros_like(ids), {})
    torch_ids, torch_mask = torch.from_numpy(ids).long(), torch.ones(ids.shape, dtype=torch.long)

    def ours(inputs=inputs):
      return np.asarray(forward(params, inputs))

    def theirs(ids=torch_ids, mask=torch_mask):
      with torch.inference_mode():
        return peer(input_ids=ids, attention_mask=mask).last_hidden_state.float().numpy()

    difference = float(np.abs(ours() - theirs()).max())
    load = measure.quiet(allow_load)
    times = timing.in_turns({'ours': ours, 'torch_sdpa': theirs}, repeats)
    found.append({
      'model': name, 'method': 'none', 'executor': 'mask', 'batch': batch, 'length': length, 'dtype': dtype,
      'seconds': times['ours']['seconds'], 'quartiles': times['ours']['quartiles'],
      'torch_sdpa_seconds': times['torch_sdpa']['seconds'], 'torch_sdpa_quartiles': times['torch_sdpa']['quartiles'],
      'throughput_ratio': times['torch_sdpa']['seconds'] / times['ours']['seconds'],
      'max_difference': difference, 'load_of_others': load,
    })  # fmt: skip
    print(
      {
        key: found[-1][key]
        for key in ('batch', 'length', 'seconds', 'torch_sdpa_seconds', 'throughput_ratio')
      }
    )
  return found


def main() -> None:
  """Measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', type=speed.words, default=list(MODELS), help=', '.join(MODELS))
  parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--allow_load', action='store_true', help='measure although other programs run')
  parser.add_argument('--out', default='results/dense_forward.json')
  options = parser.parse_args()
  models = ','.join(options.model)
  # Made before the work, so that it tells of the code that is running.
  header = report.header(
    f'python benchmarks/dense_forward.py --model={models} --dtype={options.dtype} --repeats={options.repeats}'
  )
  found = [
    row for model in options.model for row in rows(model, options.dtype, options.repeats, options.allow_load)
  ]
  workdir.write_json(pathlib.Path(options.out), {**header, 'rows': found})


if __name__ == '__main__':
  main()
