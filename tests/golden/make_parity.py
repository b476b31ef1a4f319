"""Makes parity/: a tiny random model of each family as transformers saves it, and what torch makes of it.

Needs torch, which the tests that read these files do not:  python tests/golden/make_parity.py
expected.safetensors: ids, mask and types [b n], layer_0 (the embeddings) to layer_2 [b n d], logits [b c].
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / 'parity'
VOCAB, LABELS = 112, 3
SHAPE = {
  'vocab_size': VOCAB,
  'hidden_size': 8,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 12,
  'num_labels': LABELS,
}
DISTILBERT = {
  'vocab_size': VOCAB,
  'dim': 8,
  'n_layers': 2,
  'n_heads': 2,
  'hidden_dim': 12,
  'num_labels': LABELS,
}
# (class, arguments, lengths of the rows). MPNet's pass 128 tokens, the end of its relative positions.
FAMILIES = {
  'bert': ('Bert', SHAPE | {'max_position_embeddings': 20}, (20, 7, 2)),
  'roberta': (
    'Roberta',
    SHAPE | {'max_position_embeddings': 22, 'type_vocab_size': 1, 'layer_norm_eps': 1e-5},
    (20, 7, 2),
  ),
  'distilbert': ('DistilBert', DISTILBERT | {'max_position_embeddings': 20}, (20, 7, 2)),
  'mpnet': ('MPNet', SHAPE | {'max_position_embeddings': 142, 'layer_norm_eps': 1e-5}, (140, 30)),
}


def randomize(model: torch.nn.Module) -> None:
  """Every parameter gets a value of its own: fresh biases are 0 and scales 1, and would hide a mistake."""
  for parameter in model.parameters():
    with torch.no_grad():
      parameter.normal_(1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0, 0.4)


def make(family: str, number: int) -> None:
  name, arguments, lengths = FAMILIES[family]
  torch.manual_seed(number)
  config = getattr(transformers, f'{name}Config')(**arguments)
  model = getattr(transformers, f'{name}ForSequenceClassification')._from_config(
    config, attn_implementation='eager'
  )
  randomize(model.eval())
  mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
  rng = np.random.default_rng(number)
  ids = np.where(mask, rng.integers(5, VOCAB, mask.shape), config.pad_token_id)
  types = rng.integers(0, 2, mask.shape) * mask if family == 'bert' else np.zeros_like(ids)
  inputs = {'input_ids': torch.tensor(ids), 'attention_mask': torch.tensor(mask.astype(np.int64))}
  if family == 'bert':
    inputs['token_type_ids'] = torch.tensor(types)
  with torch.no_grad():
    output = model(**inputs, output_hidden_states=True)
  model.save_pretrained(FOLDER / family)
  expected = {f'layer_{l}': state.numpy() for l, state in enumerate(output.hidden_states)}
  arrays = {
    'ids': ids.astype(np.int32),
    'mask': mask,
    'types': types.astype(np.int32),
    'logits': output.logits.numpy(),
  }
  save_file(expected | arrays, FOLDER / family / 'expected.safetensors')


if __name__ == '__main__':
  for number, family in enumerate(FAMILIES):
    make(family, number)
