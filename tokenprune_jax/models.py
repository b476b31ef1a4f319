"""The model: encoder, read-out and head; and the one place that finds a method by its name."""

import dataclasses
import difflib
import importlib
import numbers
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from tokenprune_jax import flops, reducers
from tokenprune_jax.encoder import Encoder, Trace
from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError
from tokenprune_jax.layers import Dense
from tokenprune_jax.reducer import Inputs, Memory, Reducer, read_out
from tokenprune_jax.tasks import weighted_mean

HEADS = ('linear', 'family')
READOUTS = ('mean', 'cls', 'tokens')
EXECUTORS = ('mask', 'compact')


def method_names() -> list[str]:
  """The methods there are: the files of `reducers/`."""
  return sorted(module.name for module in pkgutil.iter_modules(reducers.__path__))


def make_reducer(spec: Any) -> Reducer:
  """The reducer of a config: {'name': 'fuzzy', field: value, …}; a chain has a list of such specs under 'reducers'.

  Raises UserError on an unknown method or field, or a value of another type.
  """
  if not isinstance(spec, Mapping):
    raise UserError(f"a reducer is {spec!r}; expected {{'name': …}} with its settings")
  fields = dict(spec)
  name = fields.pop('name', None)
  if name not in method_names():
    raise UserError(f'reducer.name is {name!r}; there {_guess(name, method_names())}')
  method = importlib.import_module(f'{reducers.__name__}.{name}').Method
  known = {f.name: f for f in dataclasses.fields(method) if f.name not in ('parent', 'name')}
  for key in fields:
    if key not in known:
      raise UserError(f'reducer {name!r} has no setting {key!r}; there {_guess(key, list(known))}')
  return method(**{key: _value(name, key, value, known[key]) for key, value in fields.items()})


def whole_spec(spec: Mapping) -> dict:
  """A reducer's spec with the settings that it leaves at their defaults. Raises UserError as `make_reducer` does."""
  reducer = make_reducer(spec)
  fields = {f.name: getattr(reducer, f.name) for f in dataclasses.fields(reducer)}
  members = [whole_spec(member) for member in spec.get('reducers', ())]
  own = {key: value for key, value in fields.items() if key not in ('parent', 'name', 'reducers')}
  return {'name': spec['name'], **own, **({'reducers': members} if members else {})}


def _guess(name, choices: list[str]) -> str:
  near = difflib.get_close_matches(str(name), choices, n=1)
  return f'are {", ".join(choices) or "none"}' + (f' (did you mean {near[0]!r}?)' if near else '')


def tuples(value: Any) -> Any:
  """Lists, which JSON makes of tuples, as tuples again, at any depth: fields of a module have to be hashable."""
  if isinstance(value, (list, tuple)):
    return tuple(tuples(entry) for entry in value)
  return {key: tuples(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _value(method: str, key: str, value, field: dataclasses.Field):
  if key == 'reducers':
    return tuple(make_reducer(spec) for spec in value)
  if isinstance(field.default, tuple):
    return _entries(method, key, value, (*typing.get_args(field.type), Any)[0])
  wanted = type(field.default)
  if wanted is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
    raise UserError(
      f'reducer {method!r}: {key} is {value!r}, a {type(value).__name__}; a {wanted.__name__} was expected'
    )
  return value


def _entries(method: str, key: str, value, wanted: Any) -> tuple:
  """The entries of a list or tuple, all of the kind `wanted` where that is a kind of number."""
  kind = {int: numbers.Integral, float: numbers.Real}.get(wanted, object)
  whole = isinstance(value, (list, tuple))
  if not whole or not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in value):
    several = '' if kind is object else f' of {wanted.__name__}s'
    raise UserError(f'reducer {method!r}: {key} is {value!r}; a list{several} was expected')
  return tuples(value) if kind is object else tuple(wanted(entry) for entry in value)


@struct.dataclass
class Output:
  """logits [b c] float32, of a tagger [b N c] (0 at padding); loss: what the method adds to the task's loss.

  trace: what was computed.
  macs, dense_macs [b]: multiply-adds of each example, also of the plain encoder. read [b d], of a tagger [b N d]: what
  the head read. exits: logits [b e c] of the method's exits, where it has any.
  """

  logits: Array
  loss: Array
  trace: Trace
  macs: Array
  dense_macs: Array
  read: Array
  exits: Array | None = None


class Head(nn.Module):
  """linear: one layer, which is also how every family tags tokens. family: its classifier of texts, with a hidden layer."""

  config: EncoderConfig
  labels: int
  kind: str

  @nn.compact
  def __call__(self, x: Float[Array, 'b *N d'], train: bool) -> Float[Array, 'b *N c']:
    c, drop = self.config, nn.Dropout(self.config.dropout, deterministic=not train)
    if self.kind == 'family':
      # RoBERTa and MPNet drop out before the hidden layer too; BERT's hidden layer is its pooler.
      x = drop(x) if c.family in ('roberta', 'mpnet') else x
      hidden = Dense(c.width, 'float32', name='dense')(x)
      x = nn.relu(hidden) if c.family == 'distilbert' else jnp.tanh(hidden)
    return Dense(self.labels, 'float32', name='out')(drop(x))


def answered(logits: Float[Array, 'b *N c'], memory: Memory) -> Float[Array, 'b *N c']:
  """The last head's logits or, of examples and of tokens that have exited, those that they exited with."""
  if 'exited' not in memory:
    return logits
  done = memory['exited'].reshape(-1, *[1] * (logits.ndim - 1))
  if 'answered' in memory:
    done |= memory['answered'][..., None]
  return jnp.where(done, memory['prediction'], logits)


def words_of(reducer: Reducer, batch: Mapping[str, Any]) -> Array | None:
  """The words [b n] of a batch, for a method that asks for them; else None. Raises UserError where they are missing."""
  if not reducer.needs_words():
    return None
  if 'words' not in batch:
    raise UserError(
      "this method decides by words, and the batch has no 'words': the number of the word that each token is a piece of, "
      '-1 for none. Sentences of tagged words have them (docs/tagging.md).'
    )
  return batch['words']


def encoder_of(model: 'Classifier', executor: str, name: str | None = None) -> Encoder:
  """A model's encoder under an executor."""
  reads_first, reads_all = model.readout == 'cls', model.readout == 'tokens'
  return Encoder(model.config, model.reducer, executor, reads_first, reads_all, name=name)


class Classifier(nn.Module):
  """A classifier of texts or, where it reads out tokens, of each of their tokens, over any backbone and any method."""

  config: EncoderConfig
  reducer: Reducer
  labels: int
  readout: str = 'mean'
  head: str = 'linear'
  executor: str = 'mask'

  def check(self) -> 'Classifier':
    """Raises UserError where settings do not fit each other; returns the model."""
    for key, value, choices in (
      ('task.readout', self.readout, READOUTS),
      ('task.head', self.head, HEADS),
      ('model.executor', self.executor, EXECUTORS),
    ):
      if value not in choices:
        raise UserError(f'{key} is {value!r}; choose one of {", ".join(choices)}')
    if self.reducer.needs_words() and self.readout != 'tokens':
      raise UserError(
        f"task.readout is {self.readout!r}, but this method tags words: set task.name='tag' and task.readout='tokens'"
      )
    if self.readout not in self.reducer.readouts():
      raise UserError(
        f'task.readout is {self.readout!r}, but this method leaves tokens for {", ".join(self.reducer.readouts())} only; '
        'the run that it starts from has to be trained with that too: --config.task.readout='
        + self.reducer.readouts()[0]
      )
    if self.readout == 'tokens' and self.head != 'linear':
      raise UserError(
        f"task.head is {self.head!r}, a head for whole texts; with task.readout='tokens' it is 'linear'"
      )
    self.reducer.check(self.config.depth, self.config.heads)
    return self

  @property
  def counted_head(self) -> str:
    """What `flops` calls the head."""
    return 'tokens' if self.readout == 'tokens' else self.head

  @nn.compact
  def __call__(self, batch: Mapping[str, Any], train: bool = False) -> Output:
    encoder = encoder_of(self, self.executor, 'encoder')
    controls = dict(batch.get('controls', {}))
    inputs = Inputs(
      batch['ids'], batch['mask'], batch['types'], controls, self.labels, self.config, self.readout == 'cls',
      words_of(self.reducer, batch),
    )  # fmt: skip
    tokens, memory, trace = encoder(inputs, train)
    read = read_out(tokens, self.readout, memory)
    logits = Head(self.config, self.labels, self.head, name='head')(read, train)
    logits = answered(logits, memory)
    if self.readout == 'tokens':
      logits = jnp.where(batch['mask'][..., None], logits, 0)
    macs = flops.trace_macs(self.config, self.labels, self.counted_head, trace)
    dense = flops.dense_macs(self.config, self.labels, self.counted_head, batch['mask'].sum(-1))
    loss = jnp.asarray(memory.get('loss', 0.0), jnp.float32)
    if 'mac_target' in memory:
      real = batch['mask'].any(-1)
      # At least 1, for a part of a batch may be all filler.
      share = weighted_mean(macs, real) / jnp.maximum(weighted_mean(dense, real), 1.0)
      loss += memory['mac_weight'] * (share - memory['mac_target']) ** 2
    return Output(logits, loss, trace, macs, dense, read, memory.get('logits'))

  def init_params(self, key: Array) -> dict:
    """Random parameters, the tree described in `pretrained`."""
    ids = jnp.zeros((1, min(8, self.config.max_length)), jnp.int32)
    batch = {'ids': ids, 'mask': jnp.ones_like(ids, bool), 'types': ids, 'words': ids}
    model = self.clone(executor='mask')
    return jax.jit(model.init)(key, batch)['params']

  def unused_blocks(self) -> tuple[int, ...]:
    """Layers that the method replaces: their parameters stay as loaded and are not trained."""
    return tuple(sorted(set(range(1, self.config.depth + 1)) - set(self.reducer.blocks(self.config.depth))))
