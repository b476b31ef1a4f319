"""The config of a run: its keys, their defaults and the check that a given one is sound.

A config is a plain dict of dicts. `configs/NAME.py` starts from `defaults()` and changes what it needs;
whatever is left out keeps its default. A reducer's own fields are checked by `models.make_reducer`.
"""

import copy
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenprune_jax.errors import UserError

DEFAULTS: dict[str, Any] = {
  'seed': 0,
  'task': {
    'name': 'classify',  # or 'tag': a tag for each word, with readout='tokens'
    'readout': 'mean',  # or 'cls'; the same for a method and for the dense row it is compared with
    'head': 'linear',  # or 'family', the weights' own classification head
    'constrained': False,  # name='tag': the best tags that keep to BIO or BIOES, in place of each word's best
  },
  'model': {
    'weights': 'minilm-l6',  # or 'mpnet-base', a folder, a hub name, 'random:…'
    'dtype': 'float32',  # of the matrix products; parameters stay in float32
    'dropout': 0.1,
    'attention_dropout': 0.0,  # on the attention maps; a few more passes over them in a step
    'executor': 'mask',  # or 'compact'; 'serve': trained as under 'mask', timed as served
  },
  'data': {
    'name': 'imdb',
    'max_length': 256,  # tokens; longer documents are cut
    'buckets': (64, 128, 192, 256),  # lengths that batches are filled up to
    'train_limit': 0,  # examples; 0 = all
    'valid_limit': 0,
    'test_limit': 0,
    'train': '',  # name='file': paths of CSV, TSV or JSONL files
    'valid': '',  # '' = split off from train
    'test': '',
    'text': 'text',  # column names
    'text_pair': '',  # '' = one text
    'label': 'label',
    'labels': (),  # () = discovered in the training file
    'on_bad_row': 'error',  # or 'skip': left out, counted and reported
    'tagging': {  # of words: task.name='tag'
      'scheme': 'as_given',  # or 'bio', 'bioes', in which spans are written again; 'plain': tags mark no spans
      'repair': False,  # tags that are against their scheme, which are bad rows otherwise
      'documents': False,  # sentences between -DOCSTART- lines are read together, as many as max_length has room for
      'long': 'split',  # a sentence above max_length: in overlapping windows; or 'error'
      'overlap': 0.25,  # share of a window that the next one reads again, at most 0.5
      'comment': '# ',  # how lines begin that are skipped before a sentence's first word; '': none are
    },
  },
  'reducer': {'name': 'none'},
  'stages': ({'name': 'finetune', 'epochs': 2},),
  'optimizer': {
    'learning_rate': 5e-5,
    # (regex of parameter paths, factor of the learning rate); the first match wins
    'groups': (('head/.*|reducer/.*', 10.0),),
    'warmup': 0.1,  # share of the steps
    'weight_decay': 0.01,  # not on biases and norms
    'clip': 1.0,  # largest global norm of the gradient; 0 = no clipping
    'batch_size': 16,  # examples of one step, over all devices and processes
    'accumulate': 1,  # parts that a step's batch is computed in, to save memory
    'patience': 0,  # validations without a lower loss before a stage ends; 0 = never
  },
  'eval': {
    'batch_size': 32,
    'every': 0,  # steps; 0 = each epoch
    'timing': True,  # measure seconds per example beside dense at the end
    'rerun': False,  # compute examples that a capacity was too small for again, by the executor 'mask'
  },
  'parallel': {
    'fsdp': 1,  # devices that parameters are spread over
    'coordinator': '',  # HOST:PORT of process 0, where there are several
    'processes': 1,
    'process': 0,  # this one's number
  },
  'checkpoint': {
    'every': 100,  # steps
    'keep': 2,  # newest ones kept, each with the best one it knows of
  },
  'predict': '',  # a file of texts to label when training has ended
}

STAGE: dict[str, Any] = {
  'name': 'finetune',
  'init': 'pretrained',  # or the name of an earlier stage, or another run's workdir
  'init_reducer': '',  # the same for the method's own parameters alone; '': as init
  'train': '.*',  # regex of the parameter paths to train; the others are frozen
  'objective': 'default',  # or the name of one that the stage's reducer brings
  'teacher': '',  # an earlier stage, or another run's workdir, whose model is frozen beside this one
  'epochs': 2,
  'rate': 1.0,  # factor of optimizer.learning_rate
  'checkpoint': 'best',  # that it hands on, by validation loss; or 'last', where that loss does not see what it trains
  'reducer': {},  # fields that differ from config.reducer; in a chain {'fuzzy': {'ratio': 0.8}}
}

# Keys that may differ when a run is continued: none of them changes what is learned.
HARMLESS = ('predict', 'eval.batch_size', 'eval.timing', 'eval.rerun', 'parallel.', 'checkpoint.')

Rule = tuple[Callable[[Any], bool], str]


def one_of(*names: str) -> Rule:
  """The value is one of these."""
  return names.__contains__, 'one of ' + ', '.join(repr(name) for name in names)


def at_least(low: int | float) -> Rule:
  """The value is no less."""
  return lambda value: value >= low, f'{low} or more'


def is_regex(text: str) -> bool:
  """Whether `re` can read it."""
  try:
    re.compile(text)
  except re.error:
    return False
  return True


def are_groups(groups: Sequence[Any]) -> bool:
  """Whether each is a regular expression and a factor."""
  return all(
    isinstance(group, Sequence) and len(group) == 2 and isinstance(group[0], str) and is_regex(group[0])
    and isinstance(group[1], (int, float)) and group[1] >= 0 for group in groups
  )  # fmt: skip


def are_increasing(lengths: Sequence[Any]) -> bool:
  """Whether they are whole numbers above 0, each above the one before."""
  return (
    len(lengths) > 0
    and all(type(length) is int for length in lengths)
    and all(low < high for low, high in zip((0, *lengths), lengths))
  )


SHARE: Rule = (lambda value: 0 <= value < 1, 'from 0 up to, not including, 1')
NAME: Rule = (lambda text: bool(re.fullmatch(r'[\w.-]+', text)), 'letters, digits, _, - and .')
REGEX: Rule = (is_regex, 'a regular expression')

RULES: dict[str, Rule] = {
  'seed': (lambda value: 0 <= value < 2**31, 'a whole number from 0 to 2147483647'),
  'task.name': one_of('classify', 'tag'),
  'task.readout': one_of('mean', 'cls', 'tokens'),
  'task.head': one_of('linear', 'family'),
  'model.dtype': one_of('float32', 'bfloat16'),
  'model.dropout': SHARE,
  'model.attention_dropout': SHARE,
  'model.executor': one_of('mask', 'compact', 'serve'),
  'data.max_length': at_least(2),
  'data.buckets': (are_increasing, 'whole numbers above 0 in increasing order'),
  'data.train_limit': at_least(0),
  'data.valid_limit': at_least(0),
  'data.test_limit': at_least(0),
  'data.on_bad_row': one_of('error', 'skip'),
  'data.tagging.scheme': one_of('as_given', 'bio', 'bioes', 'plain'),
  'data.tagging.long': one_of('split', 'error'),
  'data.tagging.overlap': (lambda value: 0 <= value <= 0.5, 'a share from 0 to 0.5'),
  'stages': (lambda stages: len(stages) > 0, 'at least one stage'),
  'optimizer.learning_rate': at_least(0),
  'optimizer.groups': (are_groups, "pairs of a regular expression and a factor, as in (('head/.*', 10.0),)"),
  'optimizer.warmup': (lambda value: 0 <= value <= 1, 'a share of the steps from 0 to 1'),
  'optimizer.weight_decay': at_least(0),
  'optimizer.clip': at_least(0),
  'optimizer.batch_size': at_least(1),
  'optimizer.accumulate': at_least(1),
  'optimizer.patience': at_least(0),
  'eval.batch_size': at_least(1),
  'eval.every': at_least(0),
  'parallel.fsdp': at_least(1),
  'parallel.processes': at_least(1),
  'parallel.process': at_least(0),
  'checkpoint.every': at_least(1),
  'checkpoint.keep': at_least(1),
  'stages[].name': NAME,
  'stages[].train': REGEX,
  'stages[].epochs': at_least(1),
  'stages[].rate': at_least(0),
  'stages[].checkpoint': one_of('best', 'last'),
}

TYPES = {
  bool: 'True or False',
  int: 'a whole number',
  float: 'a number',
  str: 'text',
  tuple: 'a tuple',
  dict: 'dict',
}


def defaults() -> dict[str, Any]:
  """A copy of the default config, to change and hand to `check`."""
  return copy.deepcopy(DEFAULTS)


def stage(**fields: Any) -> dict[str, Any]:
  """A stage with every key there is, so that the command line can change any: --config.stages[0].init=…"""
  return {**copy.deepcopy(STAGE), **fields}


def check(config: Mapping[str, Any]) -> dict[str, Any]:
  """The whole config: `config` over the defaults. Raises UserError, naming what is unknown or wrong."""
  config = complete(config, DEFAULTS, '')
  config['stages'] = tuple(
    complete(stage, STAGE, f'stages[{i}].') for i, stage in enumerate(config['stages'])
  )
  check_reducer(config['reducer'], 'config.reducer')
  names = [stage['name'] for stage in config['stages']]
  if len(set(names)) < len(names):
    raise UserError(f'config.stages: the names {names} are not all different; give each stage its own.')
  task = config['task']
  if (task['name'] == 'tag') != (task['readout'] == 'tokens'):
    raise UserError(
      f"config.task.name is {task['name']!r} and config.task.readout {task['readout']!r}; 'tag' and 'tokens' belong "
      'together. Set both, or neither.'
    )
  if task['constrained'] and task['name'] != 'tag':
    raise UserError("config.task.constrained is True; it goes with config.task.name='tag'.")
  optimizer, parallel = config['optimizer'], config['parallel']
  if optimizer['batch_size'] % optimizer['accumulate']:
    raise UserError(
      f'config.optimizer.accumulate is {optimizer["accumulate"]}, which does not divide batch_size '
      f'{optimizer["batch_size"]}; choose a divisor.'
    )
  if parallel['process'] >= parallel['processes']:
    raise UserError(
      f'config.parallel.process is {parallel["process"]}; with processes={parallel["processes"]} they are '
      f'numbered 0 to {parallel["processes"] - 1}.'
    )
  if parallel['processes'] > 1 and not re.fullmatch(r'.+:\d+', parallel['coordinator']):
    raise UserError(
      f"config.parallel.coordinator is '{parallel['coordinator']}'; with several processes it is HOST:PORT "
      'of process 0, the same for all, such as 127.0.0.1:9911.'
    )
  return config


def filled_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """A config that an earlier version wrote, with the defaults of the keys that it did not know."""
  try:
    return check(config)
  except UserError:  # it knew others: all differences are told
    return config


def check_reducer(spec: Any, path: str) -> None:
  """Raises UserError unless `spec` looks like {'name': …}, in a chain with such ones under 'reducers'."""
  if not isinstance(spec, Mapping) or not isinstance(spec.get('name'), str):
    raise UserError(f"{path} is {spec!r}; expected a dict with the reducer's 'name' and its fields.")
  members = spec.get('reducers', ())
  if not isinstance(members, (list, tuple)):
    raise UserError(f'{path}.reducers is {members!r}; expected a tuple of reducers.')
  for i, member in enumerate(members):
    check_reducer(member, f'{path}.reducers[{i}]')


def complete(given: Any, default: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """One level of `check`: `given` over `default`, values of the default's type and allowed by its rule."""
  if not isinstance(given, Mapping):
    raise UserError(f'config.{prefix[:-1]} is {given!r}; expected a dict.')
  for key in given:
    if key not in default:
      raise UserError(f'unknown key config.{prefix}{key}.{closest(str(key), default)}')
  result = {}
  for key, value in default.items():
    path = prefix + key
    if isinstance(value, dict) and key != 'reducer':
      result[key] = complete(given.get(key, {}), value, path + '.')
    else:
      result[key] = typed(copy.deepcopy(given.get(key, value)), value, path)
  return result


def typed(value: Any, default: Any, path: str) -> Any:
  """`value` as the default's type, if it has it and passes the rule of its key; UserError otherwise."""
  kind = type(default)
  if kind is float and type(value) is int:
    value = float(value)
  if kind is tuple and isinstance(value, list):
    value = tuple(value)
  if kind is dict and isinstance(value, Mapping):
    value = dict(value)
  if type(value) is not kind:
    raise UserError(f'config.{path} is {value!r}; expected {TYPES[kind]}, such as {default!r}.')
  allowed, expected = RULES.get(re.sub(r'\[\d+\]', '[]', path), (lambda value: True, ''))
  if value != value or not allowed(value):
    raise UserError(f'config.{path} is {value!r}; expected {expected or "a number"}.')
  return value


def closest(key: str, keys: Mapping[str, Any]) -> str:
  """The end of a message about an unknown key: the nearest one if there is one, else all."""
  near = difflib.get_close_matches(key, list(keys), n=1)
  return f" Did you mean '{near[0]}'?" if near else f' Expected one of: {", ".join(keys)}.'


def flatten(config: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """(dotted key, value) of each leaf; lists count as tuples: a config equals itself read back from JSON."""
  if isinstance(config, Mapping) and config:
    for key, value in config.items():
      yield from flatten(value, f'{prefix}.{key}' if prefix else str(key))
  elif isinstance(config, (list, tuple)) and any(isinstance(x, (Mapping, list, tuple)) for x in config):
    for i, value in enumerate(config):
      yield from flatten(value, f'{prefix}[{i}]')
  else:
    yield prefix, tuple(config) if isinstance(config, list) else config


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """{dotted key: (value, other's value)} where two configs differ; None where a key is missing."""
  first, second = dict(flatten(config)), dict(flatten(other))
  return {
    key: (first.get(key), second.get(key))
    for key in sorted(first.keys() | second.keys())
    if first.get(key) != second.get(key)
  }


def is_harmless(key: str) -> bool:
  """Whether a run may be continued although this key changed."""
  return any(key == name or (name.endswith('.') and key.startswith(name)) for name in HARMLESS)
