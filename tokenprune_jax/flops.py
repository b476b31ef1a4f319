"""Counting what an encoder and its head compute, by every convention of the field.

Ours is `macs`: multiply-adds at each example's real tokens; padding never counts. One block, with q query rows, k keys of a
head (mean over heads), r rows projected to keys and values, u feed-forward rows, width d, feed-forward width f:
2 q d^2 (query, output) + 2 r d^2 (key, value) + 2 q k d (scores, mixing) + 2 u d f. Embeddings, LayerNorm, softmax and biases
are left out; what a method computes itself is counted in items: evidence read from attention maps, exits, combining, ….

Papers count in other ways, and their ratios cannot be compared with each other: `CONVENTIONS`.
"""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

from tokenprune_jax.encoder import Trace
from tokenprune_jax.encoder_config import EncoderConfig

COUNTS = ('queries', 'keys', 'key_rows', 'rows')  # of a block


class Convention(NamedTuple):
  """How a paper counts. factor: 2 where it says FLOPs. padded: at the padded length, as if padding were tokens."""

  factor: int
  attention: bool  # counts the products of queries with keys and of weights with values
  own: bool  # counts what the method computes itself, and the head
  padded: bool


CONVENTIONS = {
  'macs': Convention(1, attention=True, own=True, padded=False),
  # arXiv 2107.00910; Magic Pyramid's figures agree.
  'ltp': Convention(2, attention=True, own=False, padded=False),
  # arXiv 2010.07003: a profile of one padded example.
  'lat': Convention(1, attention=True, own=False, padded=True),
  'fastbert': Convention(2, attention=False, own=True, padded=True),  # arXiv 2004.02178: linear modules only
}


def block_parts(config: EncoderConfig, queries, keys, key_rows, rows) -> dict[str, Any]:
  """MACs of one block by part; the arguments are counts, arrays of one shape or numbers."""
  d = config.width
  return {
    'projections': 2 * d * d * (queries + key_rows),
    'attention': 2 * d * queries * keys,
    'feed_forward': 2 * d * config.hidden * rows,
  }


def block_macs(config: EncoderConfig, queries, keys, key_rows, rows):
  """MACs of one block; the arguments are counts, arrays of one shape or numbers."""
  return sum(block_parts(config, queries, keys, key_rows, rows).values())


def head_macs(config: EncoderConfig, labels: int, head: str, tokens):
  """MACs of the head for one example of `tokens` real tokens, an array or a number; head 'tokens': of each of them."""
  own = config.width * labels + (config.width**2 if head == 'family' else 0)
  return own * tokens if head == 'tokens' else own + 0 * tokens


def fastbert_classifier_macs(config: EncoderConfig, labels: int, length: int, width: int = 128) -> int:
  """MACs of one of FastBERT's own classifiers, linear layers only: down to `width`, one self-attention, two layers."""
  return config.width * width * length + 4 * width**2 * length + width**2 + width * labels


def trace_parts(config: EncoderConfig, labels: int, head: str, trace: Trace) -> dict[str, Float[Array, 'b']]:
  """MACs of each example by item: parts of the blocks, head, evidence, and the method's own."""
  blocks = block_parts(config, *(getattr(trace, name) for name in COUNTS))
  found = {name: macs.sum(-1) for name, macs in blocks.items()}
  found['head'] = head_macs(config, labels, head, trace.tokens)
  return {**found, 'evidence': trace.evidence.sum(-1), **trace.overhead}


def trace_macs(config: EncoderConfig, labels: int, head: str, trace: Trace) -> Float[Array, 'b']:
  """MACs of each example as the trace records it, the method's own included."""
  return sum(trace_parts(config, labels, head, trace).values(), 0 * trace.slots)


def dense_macs(config: EncoderConfig, labels: int, head: str, lengths):
  """MACs of the plain encoder at each example's number of tokens; lengths: an array, or one number."""
  n = lengths * 1.0
  return config.depth * block_macs(config, n, n, n, n) + head_macs(config, labels, head, n)


def by_convention(
  name: str, config: EncoderConfig, labels: int, head: str, trace: Trace, padded_length: int
) -> Float[Array, 'b']:
  """What a paper's counter would say of each example, in its own unit.

  Where it counts padding, a block that keeps a share of an example's slots is taken to keep that share of padded_length.
  """
  how = CONVENTIONS[name]
  stretch = padded_length / trace.slots if how.padded else 1 + 0 * trace.slots
  counts = {column: getattr(trace, column) * stretch[:, None] for column in COUNTS}
  parts = block_parts(config, *counts.values())
  total = parts['projections'] + parts['feed_forward'] + (parts['attention'] if how.attention else 0)
  own = trace.evidence.sum(-1) + sum(trace.overhead.values()) + head_macs(config, labels, head, trace.tokens)
  return how.factor * (total.sum(-1) + (own if how.own else 0))


def keep_ratio(trace: Trace) -> Float[Array, 'b L']:
  """Share of an example's slots (real tokens, and those a method added) that a head attends to in each block.

  1 everywhere in the plain encoder, 0 in a replaced block; padding is in neither count.
  """
  return trace.keys / trace.slots[:, None]
