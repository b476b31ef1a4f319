"""Words to the inputs of an encoder: word pieces, sentences joined, and sentences that are too long cut into windows.

The label of a word sits on its first piece. Where windows overlap, a word is labelled, and so answered, in one of them
alone: the one in which it has most context, counted in word pieces on its poorer side. Words are numbered in each window,
those that another one answers included: there they are context, and a method that decides by words counts them like any.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.data.tokenise import Encoded, Encoder, Split, Words
from tokenprune_jax.errors import UserError

MOST_KNOWN = 1_000_000  # words that a tokenizer's answers are kept of
NO_WORD = -1  # number of special tokens, which belong to none
UNLABELLED = -1  # label of pieces that are not the first of a word, and of words that another window answers


class Window(NamedTuple):
  """Words start to stop - 1 are read; of them first to last - 1 are answered."""

  start: int
  stop: int
  first: int
  last: int


def windows(pieces: Sequence[int], room: int, overlap: float) -> list[Window]:
  """Windows of at most `room` pieces over words of `pieces` pieces each, none with more than `room`.

  overlap: the share of a window, at most a half, that the next one reads again. Every word is answered once, in order.
  """
  before = np.concatenate([[0], np.cumsum(pieces)])
  count, start, read = len(pieces), 0, []
  while True:
    stop = int(np.searchsorted(before, before[start] + room, 'right')) - 1
    read.append((start, stop))
    if stop == count:
      break
    # As far back as the overlap allows, if the next word then still has room.
    start = int(np.searchsorted(before, max(before[stop] - int(overlap * room), before[stop + 1] - room)))
  found, first = [], 0
  for (start, stop), (later, _) in zip(read, [*read[1:], (count, count)]):
    # Pieces to the right of a shared word in this window.
    behind = before[stop] - before[np.arange(later, stop) + 1]
    ahead = before[np.arange(later, stop)] - before[later]  # and to its left in the next one
    last = max(later + int(np.sum(behind >= ahead)), first)
    if last > first:
      found.append(Window(start, stop, first, last))
    first = last
  return found


class WordEncoder:
  """A fast tokenizer for words that were told apart before: each is tokenised once, by itself.

  Raises UserError where the tokenizer is not fast or `max_length` leaves no room.
  """

  def __init__(self, tokenizer: Any, max_length: int):
    encoder = Encoder(tokenizer, max_length)
    self.backend = with_space_before_words(encoder.backend)
    self.unknown = tokenizer.unk_token_id or 0
    probe = self.backend.encode(['a'], is_pretokenized=True)
    inside = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    self.before, self.behind = probe.ids[: inside[0]], probe.ids[inside[-1] + 1 :]
    self.type = probe.type_ids[0] * encoder.has_types
    self.room = max_length - len(self.before) - len(self.behind)
    if self.room < 1:
      raise UserError(f'data.max_length={max_length} leaves no room beside the special tokens; raise it')
    self.known: dict[str, list[int]] = {}

  def learn(self, words: Iterable[str]) -> None:
    """Tokenises the words that it has not seen yet."""
    words = list(words)
    if len(self.known) > MOST_KNOWN:
      self.known.clear()
    new = list({word: None for word in words if word not in self.known})
    encoded = self.backend.encode_batch(
      [[word] for word in new], is_pretokenized=True, add_special_tokens=False
    )
    # Of some words, such as a control character, a tokenizer makes nothing; but each is to get an answer.
    self.known.update({word: found.ids or [self.unknown] for word, found in zip(new, encoded)})


def with_space_before_words(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """RoBERTa's tokenizer as its files leave it takes a word without a space before it for a part of the last one."""
  content = json.loads(backend.to_str())
  splitter = content.get('pre_tokenizer') or {}
  if splitter.get('type') != 'ByteLevel' or splitter.get('add_prefix_space'):
    return backend
  splitter['add_prefix_space'] = True
  return tokenizers.Tokenizer.from_str(json.dumps(content))


def joined(sentences: Sequence[Sentence], lengths: Sequence[int], room: int) -> list[list[Sentence]]:
  """Neighbours side by side while they have room together; lengths: pieces of each."""
  groups: list[list[Sentence]] = []
  left = 0
  for sentence, length in zip(sentences, lengths):
    if not groups or length > left:
      groups.append([])
      left = room
    groups[-1].append(sentence)
    left -= length
  return groups


def encode_sentences(
  units: Sequence[Sequence[Sentence]],
  encoder: WordEncoder,
  names: Sequence[str],
  scheme: str,
  options: Mapping[str, Any],
) -> Split:
  """A Split whose examples are windows over sentences, or over the sentences of a unit joined.

  units: documents, or single sentences; without tags all words get the first label. names: of the labels. options:
  config.data.tagging. Raises UserError for a sentence that is too long where it says so.
  """
  numbers = {name: i for i, name in enumerate(names)}
  sentences = [sentence for unit in units for sentence in unit]
  encoder.learn(word for sentence in sentences for word in sentence.words)
  pieces = {word: encoder.known[word][: encoder.room] for s in sentences for word in s.words}
  rows, labels, word_of, cut, example = [], [], [], [], []
  for unit in units:
    lengths = [sum(len(pieces[word]) for word in sentence.words) for sentence in unit]
    for group in joined(unit, lengths, encoder.room):
      words = [word for sentence in group for word in sentence.words]
      tags = [numbers[tag] for sentence in group for tag in sentence.tags] or [0] * len(words)
      counts = [len(pieces[word]) for word in words]
      if sum(counts) > encoder.room and options['long'] == 'error':
        raise UserError(too_long(group[0], sum(counts), encoder))
      for window in windows(counts, encoder.room, options['overlap']):
        read, own = range(window.start, window.stop), range(window.first, window.last)
        rows.append([*encoder.before, *(id for i in read for id in pieces[words[i]]), *encoder.behind])
        labels.append(
          [
            *[UNLABELLED] * len(encoder.before),
            *(
              x for i in read for x in (tags[i] if i in own else UNLABELLED, *[UNLABELLED] * (counts[i] - 1))
            ),
            *[UNLABELLED] * len(encoder.behind),
          ]
        )
        numbered = (x for i in read for x in [i - window.start] * counts[i])
        word_of.append([*[NO_WORD] * len(encoder.before), *numbered, *[NO_WORD] * len(encoder.behind)])
        answered = words[window.first : window.last]
        cut.append(sum(len(encoder.known[word]) - len(pieces[word]) for word in answered))
        example += [len(rows) - 1] * len(answered)
  encoded = Encoded(
    tokens=flat(rows, np.int32),
    token_types=np.full(sum(map(len, rows)), encoder.type, np.int8),
    starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
    cut=np.array(cut, np.int32),
  )
  about = Words(tuple(names), scheme, tuple(sentences), np.array(example, np.int64))
  return Split(
    encoded, np.zeros(len(rows), np.int32), lambda i: (about.text(i), ''), flat(labels, np.int32), about,
    flat(word_of, np.int32),
  )  # fmt: skip


def flat(rows: Iterable[Iterable[int]], kind: type) -> Int[np.ndarray, ' T']:
  """All entries of all rows."""
  return np.fromiter(itertools.chain.from_iterable(rows), kind)


def too_long(sentence: Sentence, count: int, encoder: WordEncoder) -> str:
  """What to say of a sentence that does not fit."""
  return (
    f'{sentence.where()}: the sentence has {count} word pieces, and there is room for {encoder.room}. Raise '
    "data.max_length, shorten it, or set data.tagging.long='split' to read it in overlapping windows."
  )
