"""Which documents are in train, valid and test: no text in two of them, all classes in the same shares.

Which split a document falls into depends on its text and on the number of documents in its class, never on a
run's seed, the order of a file or the platform: runs that are compared share their test documents.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from tokenprune_jax.errors import UserError

Indices = Int[np.ndarray, ' k']
KEEPS = ('test', 'valid', 'train')  # of equal texts, the first of these splits keeps one
TEST_SHARE = 0.2  # of the training documents, where there is no test split
VALID_SHARE = 0.1  # of the training documents, where there is a test split, but no validation split


def fingerprint(text: str, pair: str = '') -> bytes:
  """Equal for texts that differ in white space or case alone."""
  parts = (' '.join(part.split()).casefold() for part in (text, pair))
  return hashlib.blake2b('\0'.join(parts).encode(), digest_size=16).digest()


def drop_duplicates(keys: Mapping[str, Sequence[bytes]]) -> dict[str, Indices]:
  """{split: indices of what stays}: of all documents with the same fingerprint, in whatever split, one."""
  seen: set[bytes] = set()
  kept = {}
  for split in (name for name in KEEPS if name in keys):
    indices = []
    for i, key in enumerate(keys[split]):
      if key not in seen:
        seen.add(key)
        indices.append(i)
    kept[split] = np.array(indices, np.int64)
  return kept


def allocate(counts: Int[np.ndarray, ' c'], total: int) -> Int[np.ndarray, ' c']:
  """`total` places shared out in proportion to `counts` (largest remainders), none above its count."""
  total = min(total, int(counts.sum()))
  exact = counts * total / max(int(counts.sum()), 1)
  places = np.floor(exact).astype(np.int64)
  most = np.argsort(places - exact, kind='stable')
  places[most[: total - int(places.sum())]] += 1
  return places


def stratified(
  keys: Sequence[bytes], labels: Int[np.ndarray, ' n'], total: int, *, salt: str, spare: int = 0
) -> Indices:
  """Sorted indices of about `total` of n documents, each class in its share, of every class all but `spare`
  at most.

  keys: fingerprints [n]; which documents are taken depends on them and on `salt` alone. A smaller total with
  the same salt takes fewer of the same documents.
  """
  classes, counts = np.unique(labels, return_counts=True)
  places = np.minimum(allocate(counts, total), np.maximum(counts - spare, 0))
  order = [hashlib.blake2b(key, key=salt.encode(), digest_size=16).digest() for key in keys]
  taken: list[int] = []
  for name, count in zip(classes, places):
    members = sorted(np.flatnonzero(labels == name).tolist(), key=order.__getitem__)
    taken += members[:count]
  return np.array(sorted(taken), np.int64)


def fill_in(
  keys: Mapping[str, Sequence[bytes]], labels: Mapping[str, Int[np.ndarray, ' _']]
) -> dict[str, tuple[str, Indices]]:
  """{'train', 'valid', 'test': (source split, indices)}: splits that are missing are taken from train,
  stratified.

  Missing test: 20% of train. Missing valid: 20% of all where test is missing too, else 10% of train. At least
  one document of each class stays in train. keys, labels: of the de-duplicated documents of each split there
  is. Raises UserError where there are too few documents.
  """
  left = np.arange(len(keys['train']))
  parts = {name: (name, np.arange(len(keys[name]))) for name in keys}
  share = VALID_SHARE if 'test' in keys else TEST_SHARE
  wanted = {'test': TEST_SHARE, 'valid': share}
  for name in (name for name in wanted if name not in keys):
    total = round(wanted[name] * len(keys['train']))
    salt, left_keys = f'split {name}', [keys['train'][int(i)] for i in left]
    taken = stratified(left_keys, labels['train'][left], total, salt=salt, spare=1)
    parts[name] = ('train', left[taken])
    left = np.delete(left, taken)
  parts['train'] = ('train', left)
  parts = {name: parts[name] for name in ('train', 'valid', 'test')}
  for name, (_, indices) in parts.items():
    if not len(indices):
      raise UserError(
        f'the {name} split is empty: {len(keys["train"])} different training documents are too few to take '
        f'it from. Add documents, or name a file or split of its own in data.{name}.'
      )
  return parts
