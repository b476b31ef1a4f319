"""The best legal tags of a sentence, against every sequence there is; and where they are used."""

import itertools

import numpy as np
import pytest

from tokenprune_jax import data, decoding, tasks
from tokenprune_jax.data import tags
from tokenprune_jax.data.sentences import Sentence

SCHEMES = {
  'bio': ('O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC'),
  'bioes': ('O', 'B-PER', 'I-PER', 'E-PER', 'S-PER'),
}


def of_length(names, *lengths):
  """The words of sentences of these lengths."""
  given = tuple(Sentence(('a',) * n, ('O',) * n, 'f', 1) for n in lengths)
  return data.Words(names, 'bio', given, np.zeros(sum(lengths), np.int64))


def test_transitions():
  bio = ('O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC')
  wrong = decoding.illegal_transitions(bio)
  pairs = {(bio[i], bio[j]) for i, j in zip(*np.nonzero(wrong))}
  inside = {('O', 'I-PER'), ('O', 'I-LOC')}
  inside |= {(f'{k}-{a}', f'I-{b}') for k in 'BI' for a, b in (('PER', 'LOC'), ('LOC', 'PER'))}
  assert pairs == inside
  bioes = ('O', 'B-PER', 'I-PER', 'E-PER', 'S-PER')
  wrong = decoding.illegal_transitions(bioes)
  legal = {(bioes[i], bioes[j]) for i, j in zip(*np.nonzero(~wrong))}
  begun = {(a, b) for a in ('B-PER', 'I-PER') for b in ('I-PER', 'E-PER')}
  free = {(a, b) for a in ('O', 'E-PER', 'S-PER') for b in ('O', 'B-PER', 'S-PER')}
  assert legal == begun | free


@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_best_legal_sequence_of_all_that_there_are(scheme):
  names = SCHEMES[scheme]
  random = np.random.default_rng(0)
  for length in (1, 2, 3, 4) * 3:
    logits = 2 * random.normal(size=(length, len(names))).astype(np.float32)
    legal = [
      path for path in itertools.product(range(len(names)), repeat=length)
      if tags.first_illegal([names[i] for i in path], scheme) is None
    ]  # fmt: skip
    expected = max(legal, key=lambda path: sum(float(logits[j, i]) for j, i in enumerate(path)))
    found = decoding.best_tags(logits, of_length(names, length), True)
    assert tuple(found.tolist()) == expected


def test_sentences_are_decoded_one_by_one_and_scores_follow():
  names = SCHEMES['bio']
  logits = np.full((3, 5), -5.0, np.float32)
  logits[0, 1] = logits[1, 2] = logits[2, 2] = 0  # B-PER, I-PER | I-PER, with O next
  logits[2, 0] = -1
  words = of_length(names, 2, 1)
  assert decoding.best_tags(logits, words, False).tolist() == [1, 2, 2]
  assert decoding.best_tags(logits, words, True).tolist() == [1, 2, 0]
  label = np.array([1, 2, 0])
  assert tasks.make('tag').scores(logits, label, words)['accuracy'] == pytest.approx(2 / 3)
  assert tasks.make('tag', constrained=True).scores(logits, label, words)['f1'] == 1


def test_tags_without_a_legal_sequence_are_each_the_best():
  names = ('B-PER', 'E-PER')
  assert decoding.best_tags(np.eye(2, dtype=np.float32)[[1]], of_length(names, 1), True).tolist() == [1]
