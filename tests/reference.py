"""NumPy loops that the tests compare the arrays with, and the small model that they share."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from tokenprune_jax import optim
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.models import Classifier, make_reducer

TINY_CONFIG = EncoderConfig(
  vocab_size=60,
  width=32,
  depth=4,
  heads=4,
  hidden=48,
  max_positions=40,
  dropout=0.0,
  attention_dropout=0.0,
  group_slots=0,
)


def ragged_batch(lengths, length, seed=0, vocab=60):
  """A padded batch of random ids, all but the first and the last token pieces of words."""
  rng = np.random.default_rng(seed)
  rows = [rng.integers(5, vocab, n) for n in lengths]
  ids = np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)
  mask = np.arange(length)[None] < np.asarray(lengths)[:, None]
  begins = rng.random(ids.shape) < 0.7
  begins[:, :2] = [False, True]
  inside = mask & np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
  inside[:, 0] = False
  words = np.where(inside, np.cumsum(begins, 1) - 1, -1).astype(np.int32)
  return {'ids': ids, 'mask': mask, 'types': np.zeros_like(ids), 'words': words}


def requests(batch):
  """The rows of a batch as requests of a server, with their words."""
  lengths = batch['mask'].sum(1)
  return [
    {'ids': ids[:n], 'words': words[:n]} for ids, words, n in zip(batch['ids'], batch['words'], lengths)
  ]


def labels_for(model, batch, count=3):
  """Random labels of the examples or, where the model tags, of the words; -1 elsewhere."""
  rng = np.random.default_rng(5)
  if model.readout != 'tokens':
    return rng.integers(0, count, len(batch['ids'])).astype(np.int32)
  first = (batch['words'] >= 0) & (np.diff(batch['words'], axis=1, prepend=-1) != 0)
  return np.where(first, rng.integers(0, count, first.shape), -1).astype(np.int32)


@functools.lru_cache(maxsize=64)
def compiled(model, train):
  """The jitted forward pass of a model, once a test session."""
  return jax.jit(functools.partial(model.apply, train=train))


def apply(model, params, batch, train=False, rngs=None):
  """The compiled forward pass of a NumPy batch."""
  batch = jax.tree.map(jnp.asarray, dict(batch))
  return compiled(model, train)({'params': params}, batch, rngs=rngs)


def model_of(spec, config=TINY_CONFIG, **kwargs):
  """A model with the read-out that its method can be tested with."""
  kwargs.setdefault('readout', getattr(module(spec['name']), 'READOUT', 'mean'))
  return Classifier(config, make_reducer(spec), labels=3, **kwargs).check()


def model_and_params(spec, config=TINY_CONFIG, seed=0, **kwargs):
  """A model and parameters far from their initial values, so that no two tokens look alike."""
  model = model_of(spec, config, **kwargs)
  return model, drawn_params(model.clone(executor='mask'), seed)


@functools.lru_cache(maxsize=64)
def drawn_params(model, seed):
  """Parameters of a model, one object for all tests that ask for the same."""
  rng = np.random.default_rng(seed + 1)
  initial = jax.jit(model.init_params)
  shapes = optim.flatten(jax.eval_shape(initial, jax.random.key(seed)))
  # Weights are not drawn by their own initialisers: compiling those takes longer than most tests.
  plain = {'kernel': 0.0, 'bias': 0.0, 'embedding': 0.0, 'scale': 1.0}
  own = [name for name in shapes if name.startswith('reducer/') and name.split('/')[-1] not in plain]

  def drawn(key):
    params = optim.flatten(initial(key))
    return {name: params[name] for name in own}

  start = jax.jit(drawn)(jax.random.key(seed)) if own else {}

  def value(name, shape):
    base = start[name] if name in start else plain.get(name.split('/')[-1], 0.0)
    return jnp.asarray(base + 0.1 * rng.standard_normal(shape.shape), jnp.float32)

  return optim.unflatten({name: value(name, shape) for name, shape in shapes.items()})


def settings(name, which):
  """A method's spec with its own settings TINY or NEUTRAL."""
  return {'name': name, **getattr(module(name), which)}


def module(name):
  """The file of a method."""
  return importlib.import_module(f'tokenprune_jax.reducers.{name}')


def dot_macs(hlo):
  """Multiply-adds of all dots in an HLO text: elements of the result times the contracted sizes."""
  shapes = {
    m[1]: [int(d) for d in m[2].split(',') if d] for m in re.finditer(r'(\S+) = \w+\[([\d,]*)\]', hlo)
  }
  total = 0
  for name, left, contracted in re.findall(
    r'(\S+) = \S+ dot\(([^,\s)]+), .*?lhs_contracting_dims=\{([\d,]*)\}', hlo
  ):
    total += np.prod(shapes[name]) * np.prod([shapes[left][int(d)] for d in contracted.split(',')])
  return float(total)


def attention_loop(query, key, value, seen, bias=None):
  """Soft-masked attention of one head, one pair at a time: (mixed [q e], weights [q k])."""
  weights = np.zeros((len(query), len(key)))
  for i, q in enumerate(query):
    scores = [float(q @ k) / math.sqrt(len(q)) for k in key]
    if bias is not None:
      scores = [s + b for s, b in zip(scores, bias[i])]
    top = max((s for s, alive in zip(scores, seen) if alive > 0), default=0.0)
    total = sum(math.exp(s - top) * alive for s, alive in zip(scores, seen))
    for j, (s, alive) in enumerate(zip(scores, seen)):
      weights[i, j] = math.exp(s - top) * alive / total if alive > 0 else 0.0
  return weights @ value, weights


def fuzzy_loop(rule, scores, valid, ratio, alpha_important, alpha_unimportant, count):
  """Kept keys of one example [h n], from the definitions: memberships, alpha-cuts, then the rule head by head."""
  pooled = np.array([s for row, ok in zip(scores, valid) for s, v in zip(row, ok) if v])
  low, high = np.quantile(pooled, 0.25), np.quantile(pooled, 0.75)
  keep = np.zeros(scores.shape, bool)
  for h, row in enumerate(scores):
    order = sorted((j for j in range(len(row)) if valid[h, j]), key=lambda j: (-row[j], j))
    core = set()
    for j in order:
      importance = 1.0 if high == low else min(max((row[j] - low) / (high - low), 0), 1)
      unimportance = 0.0 if high == low else min(max((high - row[j]) / (high - low), 0), 1)
      if importance >= alpha_important and not unimportance >= alpha_unimportant:
        core.add(j)
    if rule == 'complement':
      candidates = [j for j in order if j not in core]
      chosen = core | set(candidates[: next_count(ratio, len(candidates))])
    else:
      chosen = set(order[:count]) | (core if rule == 'protect' else set())
    keep[h, list(chosen)] = True
  return keep


def next_count(ratio, t):
  """floor(ratio * t) in decimals, at least one of any."""
  thousandths = round(ratio * 1000)
  return max(thousandths * t // 1000, 1) if t else 0
