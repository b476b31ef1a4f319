"""The four families as data: how their Hugging Face files name tensors and configuration keys.

One table serves reading and writing, and each tensor that a checkpoint holds matches exactly one rule of it.
A torch Linear weight is [out in] and a kernel [in out], so the one is the transpose of the other.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenprune_jax.encoder_config import EncoderConfig
from tokenprune_jax.errors import UserError


class Part(NamedTuple):
  """A module with parameters in both worlds. {l} is the layer, from 0 in `name` and from 1 in `target`."""

  name: str  # in the checkpoint, with the family's prefix where it has one
  target: str  # path of ours
  kind: str  # a key of LEAVES
  shape: str  # axes of the weight: fields of EncoderConfig, or `labels`


class Rule(NamedTuple):
  """A tensor in both worlds; without a target it is known and not needed."""

  pattern: re.Pattern[str]
  name: str = ''
  target: str | None = None
  transpose: bool = False
  shape: tuple[str, ...] = ()  # axes in our layout


# kind -> (name in the checkpoint, old TensorFlow name, our name, transposed, its share of the part's shape)
LEAVES = {
  'dense': (('weight', '', 'kernel', True, slice(None)), ('bias', '', 'bias', False, slice(1, None))),
  'norm': (('weight', 'gamma', 'scale', False, slice(None)), ('bias', 'beta', 'bias', False, slice(None))),
  'table': (('weight', '', 'embedding', False, slice(None)),),
}


_EMBEDDINGS = 'encoder/embeddings'


def _embedding_parts(prefix: str) -> tuple[Part, ...]:
  table = f'{prefix}.embeddings'
  return (
    Part(f'{table}.word_embeddings', f'{_EMBEDDINGS}/word', 'table', 'vocab_size width'),
    Part(f'{table}.position_embeddings', f'{_EMBEDDINGS}/position', 'table', 'max_positions width'),
    Part(f'{table}.LayerNorm', f'{_EMBEDDINGS}/norm', 'norm', 'width'),
  )


def _bert_parts(prefix: str) -> tuple[Part, ...]:
  layer, block = f'{prefix}.encoder.layer.{{l}}', 'encoder/block_{l}'
  return (
    *_embedding_parts(prefix),
    Part(f'{prefix}.embeddings.token_type_embeddings', f'{_EMBEDDINGS}/type', 'table', 'type_vocab width'),
    Part(f'{layer}.attention.self.query', f'{block}/query', 'dense', 'width width'),
    Part(f'{layer}.attention.self.key', f'{block}/key', 'dense', 'width width'),
    Part(f'{layer}.attention.self.value', f'{block}/value', 'dense', 'width width'),
    Part(f'{layer}.attention.output.dense', f'{block}/out', 'dense', 'width width'),
    Part(f'{layer}.attention.output.LayerNorm', f'{block}/attention_norm', 'norm', 'width'),
    Part(f'{layer}.intermediate.dense', f'{block}/up', 'dense', 'width hidden'),
    Part(f'{layer}.output.dense', f'{block}/down', 'dense', 'hidden width'),
    Part(f'{layer}.output.LayerNorm', f'{block}/output_norm', 'norm', 'width'),
  )


def _distilbert_parts() -> tuple[Part, ...]:
  layer, block = 'distilbert.transformer.layer.{l}', 'encoder/block_{l}'
  return (
    *_embedding_parts('distilbert'),
    Part(f'{layer}.attention.q_lin', f'{block}/query', 'dense', 'width width'),
    Part(f'{layer}.attention.k_lin', f'{block}/key', 'dense', 'width width'),
    Part(f'{layer}.attention.v_lin', f'{block}/value', 'dense', 'width width'),
    Part(f'{layer}.attention.out_lin', f'{block}/out', 'dense', 'width width'),
    Part(f'{layer}.sa_layer_norm', f'{block}/attention_norm', 'norm', 'width'),
    Part(f'{layer}.ffn.lin1', f'{block}/up', 'dense', 'width hidden'),
    Part(f'{layer}.ffn.lin2', f'{block}/down', 'dense', 'hidden width'),
    Part(f'{layer}.output_layer_norm', f'{block}/output_norm', 'norm', 'width'),
  )


def _mpnet_parts() -> tuple[Part, ...]:
  renamed = {
    'attention.self.query': 'attention.attn.q',
    'attention.self.key': 'attention.attn.k',
    'attention.self.value': 'attention.attn.v',
    'attention.output.dense': 'attention.attn.o',
    'attention.output.LayerNorm': 'attention.LayerNorm',
  }
  parts = []
  for part in _bert_parts('mpnet'):
    start, layer, module = part.name.partition('{l}.')
    if not part.name.endswith('token_type_embeddings'):
      parts.append(part._replace(name=start + layer + renamed.get(module, module)))
  bias = 'mpnet.encoder.relative_attention_bias'
  return (*parts, Part(bias, 'encoder/relative_bias', 'table', 'relative_buckets heads'))


def _head_parts(dense: str, out: str) -> tuple[Part, ...]:
  return (
    Part(dense, 'head/dense', 'dense', 'width width'),
    Part(out, 'head/out', 'dense', 'width labels'),
  )


# What a checkpoint is for: transformers' classes are called BertModel, BertForTokenClassification, …
BACKBONE, TEXTS, TOKENS = 'Model', 'ForSequenceClassification', 'ForTokenClassification'
_TOKEN_HEAD = (Part('classifier', 'head/out', 'dense', 'width labels'),)  # in every family


@dataclass(frozen=True)
class Family:
  """How one family's files are laid out."""

  classes: str  # how transformers' classes begin
  parts: tuple[Part, ...]
  head: tuple[Part, ...]  # that classifies texts
  ignored: tuple[str, ...]  # patterns of known tensors that are not needed: buffers, heads of other tasks
  position_offset: int | None = 0  # None: the row after the padding id's
  keys: tuple[tuple[str, str], ...] = ()  # (field of EncoderConfig, key in config.json)
  fixed: tuple[tuple[str, Any], ...] = ()  # fields that config.json does not hold


_KEYS = (
  ('vocab_size', 'vocab_size'),
  ('width', 'hidden_size'),
  ('depth', 'num_hidden_layers'),
  ('heads', 'num_attention_heads'),
  ('hidden', 'intermediate_size'),
  ('max_positions', 'max_position_embeddings'),
  ('activation', 'hidden_act'),
  ('dropout', 'hidden_dropout_prob'),
  ('attention_dropout', 'attention_probs_dropout_prob'),
  ('norm_eps', 'layer_norm_eps'),
  ('pad_id', 'pad_token_id'),
)
_DISTILBERT_KEYS = (
  ('vocab_size', 'vocab_size'),
  ('width', 'dim'),
  ('depth', 'n_layers'),
  ('heads', 'n_heads'),
  ('hidden', 'hidden_dim'),
  ('max_positions', 'max_position_embeddings'),
  ('activation', 'activation'),
  ('dropout', 'dropout'),
  ('attention_dropout', 'attention_dropout'),
  ('pad_id', 'pad_token_id'),
)
_TYPES, _BUCKETS = ('type_vocab', 'type_vocab_size'), ('relative_buckets', 'relative_attention_num_buckets')
# RoBERTa's and MPNet's classification heads read the first state itself, so their pooler is not needed.
_OTHER_HEADS = (r'qa_outputs\..*', r'classifier\.(?:weight|bias)', r'lm_head\..*')

FAMILIES = {
  'bert': Family(
    'Bert',
    _bert_parts('bert'),
    _head_parts('bert.pooler.dense', 'classifier'),
    (r'(?:bert\.)?embeddings\.position_ids', r'cls\..*', r'qa_outputs\..*'),
    keys=(*_KEYS, _TYPES),
  ),
  'roberta': Family(
    'Roberta',
    _bert_parts('roberta'),
    _head_parts('classifier.dense', 'classifier.out_proj'),
    (r'(?:roberta\.)?embeddings\.(?:position|token_type)_ids', r'(?:roberta\.)?pooler\..*', *_OTHER_HEADS),
    position_offset=None,
    keys=(*_KEYS, _TYPES),
  ),
  'distilbert': Family(
    'DistilBert',
    _distilbert_parts(),
    _head_parts('pre_classifier', 'classifier'),
    (r'(?:distilbert\.)?embeddings\.position_ids', r'vocab_\w+\..*', r'qa_outputs\..*'),
    keys=_DISTILBERT_KEYS,
    fixed=(('norm_eps', 1e-12), ('type_vocab', 0)),
  ),
  'mpnet': Family(
    'MPNet',
    _mpnet_parts(),
    _head_parts('classifier.dense', 'classifier.out_proj'),
    (r'(?:mpnet\.)?embeddings\.position_ids', r'(?:mpnet\.)?pooler\..*', *_OTHER_HEADS),
    position_offset=2,  # transformers' MPNet counts from its padding id 1, whatever the configuration says
    keys=(*_KEYS, _BUCKETS),
    fixed=(('type_vocab', 0),),
  ),
}

# What transformers takes where config.json is silent. The other keys must be there: a guess may run, wrongly.
_DEFAULTS = {
  'activation': 'gelu',
  'dropout': 0.1,
  'attention_dropout': 0.1,
  'norm_eps': 1e-12,
  'relative_buckets': 32,
  'type_vocab': 2,
}
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'relu': 'relu'}
_PAD_IDS = {'bert': 0, 'distilbert': 0, 'roberta': 1, 'mpnet': 1}


@functools.cache
def rules(family: str, kind: str) -> tuple[Rule, ...]:
  """Every tensor that a checkpoint of the family may hold; kind: what it is for, BACKBONE where that is not known."""
  layout = FAMILIES[family]
  head, ignored = layout.head, layout.ignored
  if kind == TOKENS:  # whose classifier other checkpoints do not need; BERT's older ones hold a pooler too
    head = _TOKEN_HEAD
    ignored = tuple(pattern for pattern in ignored if not re.fullmatch(pattern, f'{head[0].name}.weight'))
    ignored += (r'bert\.pooler\..*',)
  found = [Rule(re.compile(pattern)) for pattern in ignored]
  for part in layout.parts + head:
    for name, old, ours, transpose, axes in LEAVES[part.kind]:
      pattern = re.escape(part.name).replace(re.escape('{l}'), r'(\d+)')
      if part.name.startswith(f'{family}.'):  # a backbone saved alone has no prefix
        pattern = pattern.replace(rf'{family}\.', rf'(?:{family}\.)?', 1)
      pattern += rf'\.(?:{name}|{old})' if old else rf'\.{name}'
      shape = tuple(part.shape.split()[axes])
      target = f'{part.target}/{ours}'
      found.append(Rule(re.compile(pattern), f'{part.name}.{name}', target, transpose, shape))
  return tuple(found)


def read_config(raw: Mapping[str, Any], file: str) -> EncoderConfig:
  """EncoderConfig from a config.json's content. Raises UserError where this encoder cannot be that model."""
  family = raw.get('model_type')
  if family not in FAMILIES:
    known = ', '.join(FAMILIES)
    raise UserError(f'{file}: model_type is {family!r}; expected one of {known}')
  layout = FAMILIES[family]
  values = dict(layout.fixed)
  for field, key in layout.keys:
    values[field] = _value(raw, field, key, family, file)
  _refuse_variants(raw, values, file)
  offset = values['pad_id'] + 1 if layout.position_offset is None else layout.position_offset
  return EncoderConfig(family=family, position_offset=offset, **values)


def _value(raw, field, key, family, file):
  default = _PAD_IDS[family] if field == 'pad_id' else _DEFAULTS.get(field)
  value = raw.get(key)
  value = default if value is None else value
  if value is None:
    raise UserError(f'{file}: the key {key!r} is missing; is this the config.json of a {family} model?')
  if field == 'activation':
    if value not in _ACTIVATIONS:
      raise UserError(f'{file}: {key} is {value!r}; expected one of {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[value]
  real = field in ('dropout', 'attention_dropout', 'norm_eps')
  if isinstance(value, bool) or not isinstance(value, (int, float) if real else int) or value < 0:
    raise UserError(f'{file}: {key} is {value!r}; expected a {"number" if real else "whole number"} >= 0')
  if value == 0 and not real and field != 'pad_id':
    raise UserError(f'{file}: {key} is {value}; expected at least 1')
  return float(value) if real else value


def _refuse_variants(raw, values, file):
  """Settings of the same families that change the mathematics."""
  if values['width'] % values['heads']:
    raise UserError(f'{file}: width {values["width"]} is not a multiple of the {values["heads"]} heads')
  if raw.get('is_decoder') or raw.get('add_cross_attention'):
    raise UserError(f'{file}: the model is a decoder (is_decoder, add_cross_attention); expected an encoder')
  if raw.get('position_embedding_type', 'absolute') != 'absolute':
    kind = raw['position_embedding_type']
    raise UserError(f'{file}: position_embedding_type is {kind!r}; only absolute positions are supported')
  # transformers' MPNet computes 32 buckets, whatever the configuration says.
  if values.get('relative_buckets', 32) != 32:
    raise UserError(f'{file}: relative_attention_num_buckets is {values["relative_buckets"]}; expected 32')


def kind_of(raw: Mapping[str, Any]) -> str:
  """What the checkpoint beside a config.json's content is for; BACKBONE where its head is for another task."""
  names = [str(name) for name in raw.get('architectures') or (TEXTS,)]
  return next((kind for kind in (TEXTS, TOKENS) if any(name.endswith(kind) for name in names)), BACKBONE)


def write_config(config: EncoderConfig, labels: tuple[str, ...], kind: str) -> dict[str, Any]:
  """The content of a config.json of a checkpoint of a kind."""
  layout = FAMILIES[config.family]
  raw = {key: getattr(config, field) for field, key in layout.keys}
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  raw[dict(layout.keys)['activation']] = names[config.activation]
  raw |= {'model_type': config.family, 'architectures': [layout.classes + kind]}
  if kind != BACKBONE:
    raw |= {
      'num_labels': len(labels),
      'id2label': {str(i): label for i, label in enumerate(labels)},
      'label2id': {label: i for i, label in enumerate(labels)},
    }
  if kind == TEXTS:
    raw['problem_type'] = 'single_label_classification'
  return raw
