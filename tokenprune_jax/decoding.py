"""Tags that keep to their scheme: the best sequence of a sentence, found over all of its words at once.

  argmax_t sum_j log p_j(t_j)    over t without a transition that BIO or BIOES forbids (Viterbi)

A sentence begins and ends as if O stood before and behind it. W words, c tags.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from tokenprune_jax.data import Words


def illegal_transitions(labels: Sequence[str]) -> Bool[np.ndarray, 'c c']:
  """[i, j]: tag j cannot follow tag i under BIO, or BIOES where the labels have S or E; others may follow anything."""
  ending = any(label[:2] in ('S-', 'E-') or label in ('S', 'E') for label in labels)

  def wrong(before: str, after: str) -> bool:
    kind, _, name = before.partition('-')
    into, _, other = after.partition('-')
    inside = kind in ('B', 'I')
    if into in ('I', 'E'):
      return not (inside and name == other)
    return ending and inside  # an entity that has begun must end with E

  return np.array([[wrong(a, b) for b in labels] for a in labels], bool)


def viterbi(
  scores: Float[np.ndarray, 'W c'], wrong: Bool[np.ndarray, 'c c'],
  first: Bool[np.ndarray, ' c'], last: Bool[np.ndarray, ' c'],
) -> Int[np.ndarray, ' W']:  # fmt: skip
  """The tags with the highest sum of scores; first, last: tags that cannot begin or end it.

  Where the tags allow no sequence of this length, each word's own best.
  """
  forbidden = np.where(wrong, -np.inf, 0.0)
  best, came = np.where(first, -np.inf, scores[0]), []
  for row in scores[1:]:
    reached = best[:, None] + forbidden
    came.append(reached.argmax(0))
    best = reached.max(0) + row
  best = np.where(last, -np.inf, best)
  if not np.isfinite(best.max()):
    return scores.argmax(-1)
  path = [int(best.argmax())]
  for back in reversed(came):
    path.append(int(back[path[-1]]))
  return np.array(path[::-1])


def best_tags(logits: Float[np.ndarray, 'W c'], words: Words, constrained: bool) -> Int[np.ndarray, ' W']:
  """The tags of a split's words, or each word's own best. logits: up to a number for each word, so log p as well."""
  if not constrained:
    return logits.argmax(-1)
  wrong = illegal_transitions(('O', *words.names))
  ends = np.cumsum([0, *(len(sentence.words) for sentence in words.sentences)])
  parts = [logits[start:stop].astype(np.float64) for start, stop in itertools.pairwise(ends)]
  return np.concatenate([viterbi(part, wrong[1:, 1:], wrong[0, 1:], wrong[1:, 0]) for part in parts])
