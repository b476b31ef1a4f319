"""Counting multiply-adds (MACs) of an encoder and its head, at each example's real tokens. Padding never counts.

One block, with q query rows, k keys of a head (mean over heads), r rows projected to keys and values, u feed-forward rows,
width d, feed-forward width f:  2 q d^2 (query, output) + 2 r d^2 (key, value) + 2 q k d (scores, mixing) + 2 u d f.
Embeddings, LayerNorm, softmax and biases are left out; what a method computes itself is its `overhead`.
"""

from jaxtyping import Array, Float

from tokenprune_jax.encoder import EncoderConfig, Trace

COUNTS = ('queries', 'keys', 'key_rows', 'rows')  # of a block


def block_macs(config: EncoderConfig, queries, keys, key_rows, rows):
  """MACs of one block; the arguments are counts, arrays of one shape or numbers."""
  d = config.width
  return 2 * d * d * (queries + key_rows) + 2 * d * queries * keys + 2 * d * config.hidden * rows


def head_macs(config: EncoderConfig, labels: int, head: str) -> int:
  """MACs of the classification head for one example."""
  return config.width * labels + (config.width**2 if head == 'family' else 0)


def trace_macs(config: EncoderConfig, labels: int, head: str, trace: Trace) -> Float[Array, 'b']:
  """MACs of each example as the trace records it, the method's overhead included."""
  blocks = block_macs(config, trace.queries, trace.keys, trace.key_rows, trace.rows)
  return blocks.sum(-1) + trace.overhead + head_macs(config, labels, head)


def dense_macs(config: EncoderConfig, labels: int, head: str, lengths):
  """MACs of the plain encoder at each example's number of tokens; lengths: an array, or one number."""
  n = lengths * 1.0
  return config.depth * block_macs(config, n, n, n, n) + head_macs(config, labels, head)


def keep_ratio(trace: Trace) -> Float[Array, 'b L']:
  """Share of an example's slots (real tokens, and those a method added) that a head attends to in each block.

  1 everywhere in the plain encoder, 0 in a replaced block; padding is in neither count.
  """
  return trace.keys / trace.slots[:, None]
