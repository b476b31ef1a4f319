import jax
import numpy as np

from tests.reference import apply, model_and_params, ragged_batch
from tokenprune_jax import flops
from tokenprune_jax.encoder import EncoderConfig


def test_published_reference_values():
  bert = EncoderConfig()
  encoder = 12 * flops.block_macs(bert, 128, 128, 128, 128)
  assert abs(2 * encoder / 1e9 - 22.347) < 0.001  # GFLOPs at 128 tokens, two per MAC
  assert (
    abs(12 * flops.block_macs(bert, 384, 384, 384, 384) / 35_340_779_904 - 1) < 0.001
  )  # MACs, with a few extras


def test_products_are_what_xla_counts():
  for spec in ({'name': 'none'}, {'name': 'combine', 'slots': 3, 'layer': 3}):
    model, params = model_and_params(spec)
    batch = ragged_batch((32,), 32)
    counted = jax.jit(lambda p, m=model, b=batch: apply(m, p, b).logits).lower(params).as_text(dialect='hlo')
    ours = flops.trace_macs(model.config, 3, 'linear', apply(model, params, batch).trace)[0]
    assert abs(dot_macs(counted) / float(ours) - 1) < 0.02


def dot_macs(hlo):
  """Multiply-adds of all dots in an HLO text: elements of the result times the contracted sizes."""
  import re

  shapes = {
    m[1]: [int(d) for d in m[2].split(',') if d] for m in re.finditer(r'(\S+) = \w+\[([\d,]*)\]', hlo)
  }
  total = 0
  for name, left, contracted in re.findall(
    r'(\S+) = \S+ dot\((\S+), .*?lhs_contracting_dims=\{([\d,]*)\}', hlo
  ):
    total += np.prod(shapes[name]) * np.prod([shapes[left][int(d)] for d in contracted.split(',')])
  return total
