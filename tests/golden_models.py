"""The tiny models of golden/parity as folders, and what tests of weights share."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from tokenprune_jax import families, random_model

GOLDEN = Path(__file__).parent / 'golden' / 'parity'
FAMILIES = tuple(families.FAMILIES)


def folder_of(family, target):
  """The golden model as a folder of its own, with a tokenizer."""
  target.mkdir()
  for name in ('config.json', 'model.safetensors'):
    shutil.copy(GOLDEN / family / name, target)
  vocab = json.loads((target / 'config.json').read_text())['vocab_size']
  random_model.make_tokenizer(family, vocab, 20).save_pretrained(target)
  return target


def same(a, b):
  a, b = flatten_dict(a), flatten_dict(b)
  return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def installed(package):
  try:
    return bool(metadata.distribution(package))
  except metadata.PackageNotFoundError:
    return False
