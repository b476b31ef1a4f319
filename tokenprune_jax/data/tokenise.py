"""Texts to token ids: in parallel, once, kept on disk under a key made of all that they depend on."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress

from tokenprune_jax.errors import UserError

VERSION = 1  # of the cache's format
CHUNK = 256  # texts that the tokenizer's threads get at once: a few for each of many cores


@dataclasses.dataclass(frozen=True)
class Encoded:
  """N token sequences end to end. Sequence i is tokens[starts[i]:starts[i + 1]]."""

  tokens: Int[np.ndarray, ' T']  # int32
  token_types: Int[np.ndarray, ' T']  # int8, 0 or 1
  starts: Int[np.ndarray, ' N_1']  # int64, N + 1 of them
  cut: Int[np.ndarray, ' N']  # int32, tokens of each text beyond max_length


class Words(NamedTuple):
  """What a tagger's examples are made of: W words, in the order of the examples that answer them."""

  names: tuple[str, ...]  # of the tags
  scheme: str  # 'bio', 'bioes' or 'plain'
  sentences: tuple[Any, ...]  # `sentences.Sentence`
  example: Int[np.ndarray, ' W']  # that answers each word

  def cut(self, values: Sequence[Any]) -> list[list[Any]]:
    """Values of all words, by sentence."""
    rest = iter(values)
    return [list(itertools.islice(rest, len(sentence.words))) for sentence in self.sentences]

  def tags(self, numbers: Int[np.ndarray, ' W']) -> list[list[str]]:
    """Names of the tags of all words, by sentence."""
    return self.cut([self.names[number] for number in numbers])

  def text(self, i: int) -> str:
    """The words that example i answers."""
    words = itertools.chain.from_iterable(sentence.words for sentence in self.sentences)
    return ' '.join(itertools.compress(words, self.example == i))


class Split:
  """The examples of one split. Texts are read from disk when asked for, tokens lie in memory.

  tags: where tokens are labelled, the label of each, -1 for none; words: what they belong to; word_of: the number, in its
  example, of the word that each token is a piece of, -1 for none. `label` then is all 0.
  """

  def __init__(
    self,
    encoded: Encoded,
    label: Int[np.ndarray, ' N'],
    read: Callable[[int], tuple[str, str]],
    tags: Int[np.ndarray, ' T'] | None = None,
    words: Words | None = None,
    word_of: Int[np.ndarray, ' T'] | None = None,
  ):
    self.encoded, self.tags, self.words, self.word_of = encoded, tags, words, word_of
    self.label = label.astype(np.int32)  # [N]
    self.lengths = np.diff(encoded.starts).astype(np.int32)  # [N] tokens, special ones included
    self.cut = encoded.cut  # [N] tokens left out
    self.read = read

  def __len__(self) -> int:
    return len(self.label)

  def digest(self) -> str:
    """Of all tokens and labels."""
    found = hashlib.blake2b(digest_size=16)
    for values in (self.encoded.tokens, self.encoded.token_types, self.encoded.starts, self.label, self.tags):
      found.update(b'' if values is None else np.ascontiguousarray(values).tobytes())
    return found.hexdigest()

  def ids(self, i: int) -> Int[np.ndarray, ' n']:
    """Token ids of example i, special tokens included, without padding."""
    return self.encoded.tokens[self.place(i)]

  def place(self, i: int) -> slice:
    """Where example i lies among all tokens."""
    return slice(self.encoded.starts[i], self.encoded.starts[i + 1])

  def at(self, rows: Int[np.ndarray, ' K']) -> 'Split':
    """Some of the examples, in the order of `rows`; of whole texts, not of tagged words."""
    assert self.tags is None
    tokens, types = (
      np.concatenate([values[self.place(i)] for i in rows.tolist()])
      for values in (self.encoded.tokens, self.encoded.token_types)
    )
    starts = np.concatenate([[0], np.cumsum(self.lengths[rows], dtype=np.int64)])
    encoded = Encoded(tokens, types, starts, self.cut[rows])
    return Split(encoded, self.label[rows], lambda i: self.read(int(rows[i])))

  def types(self, i: int) -> Int[np.ndarray, ' n']:
    """Token types of example i: 1 in the second text of a pair, where the model tells them apart."""
    return self.encoded.token_types[self.place(i)].astype(np.int32)

  def texts(self, i: int) -> str:
    """The text of example i, of a pair the first."""
    return self.read(i)[0]

  def pairs(self, i: int) -> str:
    """The second text of example i, '' where there is none."""
    return self.read(i)[1]


class Encoder:
  """A fast tokenizer with a length: what `encode` sets up, to keep where it is called often; from any thread.

  The tokenizer is copied, because its object and its files carry settings for truncation and padding (the
  MiniLM package's say 128 tokens, padded) that would cut texts unseen.
  """

  def __init__(self, tokenizer: Any, max_length: int):
    if not getattr(tokenizer, 'is_fast', False):
      raise UserError(
        f'{type(tokenizer).__name__} is not a fast tokenizer; use weights whose folder holds a tokenizer.json'
      )
    self.backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    self.backend.no_truncation()
    self.backend.no_padding()
    self.content = self.backend.to_str()
    self.max_length = max_length
    self.has_types = 'token_type_ids' in tokenizer.model_input_names
    self.alone = threading.Lock()  # truncation is a state of the backend

  def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[tuple[Any, int]]:
    """(tokenizers.Encoding, tokens cut) of each text or pair; a pair is cut where it is longest."""
    extra = self.backend.num_special_tokens_to_add(pairs is not None)
    if self.max_length <= extra + (pairs is not None):
      raise UserError(
        f'data.max_length={self.max_length} leaves no room beside {extra} special tokens; raise it'
      )
    results = []
    with self.alone:
      self.backend.no_truncation()
      first = self.backend.encode_batch(list(texts), add_special_tokens=False)
      second = self.backend.encode_batch(list(pairs), add_special_tokens=False) if pairs is not None else []
      self.backend.enable_truncation(self.max_length, strategy='longest_first')
      for i, encoding in enumerate(first):
        pair = second[i] if pairs is not None else None
        length = len(encoding) + (len(pair) if pair is not None else 0) + extra
        results.append((self.backend.post_process(encoding, pair), max(0, length - self.max_length)))
    return results

  def key(self, texts: Sequence[str], pairs: Sequence[str] | None) -> str:
    """A name for the result of encoding these texts."""
    digest = hashlib.sha256()
    settings = (VERSION, self.content, self.max_length, self.has_types, pairs is not None, len(texts))
    for part in (*map(str, settings), *texts, *(pairs or ())):
      content = part.encode()
      digest.update(len(content).to_bytes(8, 'little'))
      digest.update(content)
    return digest.hexdigest()[:32]


def encode_all(
  encoder: Encoder, texts: Sequence[str], pairs: Sequence[str] | None, title: str = ''
) -> Encoded:
  """All texts through `encoder`, many at once on all cores, with a progress bar where a person looks on."""
  tokens, types, lengths, cut = [], [], [], []
  console = Console(stderr=True)
  with Progress(console=console, transient=True, disable=not (title and console.is_terminal)) as progress:
    task = progress.add_task(title, total=len(texts))
    for start in range(0, len(texts), CHUNK):
      part = slice(start, start + CHUNK)
      for encoding, excess in encoder(texts[part], None if pairs is None else pairs[part]):
        tokens.append(np.array(encoding.ids, np.int32))
        types.append(np.array(encoding.type_ids, np.int8) * encoder.has_types)
        lengths.append(len(encoding))
        cut.append(excess)
      progress.advance(task, len(texts[part]))
  return Encoded(
    tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
    token_types=np.concatenate([np.zeros(0, np.int8), *types]),
    starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
    cut=np.array(cut, np.int32),
  )


def encode(
  texts: Sequence[Any], tokenizer: Any, max_length: int, pairs: Sequence[Any] | None = None
) -> Split:
  """Texts, or pairs of them, as a `Split` of unknown labels (0), for `batches`.

  tokenizer: a fast one of transformers. Raises UserError where a text is none or not valid, or max_length is
  too small.
  """
  for name, values in (('text', texts), ('second text', pairs or ())):
    for i, text in enumerate(values):
      problem = text_problem(text)
      if problem:
        raise UserError(f'{name} {i}: {problem}')
  if pairs is not None and len(pairs) != len(texts):
    raise UserError(f'there are {len(texts)} texts and {len(pairs)} second texts; give as many of both')
  encoded = encode_all(Encoder(tokenizer, max_length), texts, pairs)
  return Split(encoded, np.zeros(len(texts), np.int32), lambda i: (texts[i], pairs[i] if pairs else ''))


def text_problem(text: Any) -> str:
  """Why `text` cannot be tokenised; '' where it can. An empty text can: it is for the caller to judge."""
  if not isinstance(text, str):
    return f'expected a text, found {type(text).__name__} {text!r:.40}'
  try:
    text.encode()
  except UnicodeEncodeError as error:
    return f'invalid UTF-8 at character {error.start} of the text'
  return ''


def encode_cached(
  encoder: Encoder, texts: Sequence[str], pairs: Sequence[str] | None, folder: Path, title: str
) -> Encoded:
  """`encode_all`, kept in `folder`; a damaged file is made again. Raises UserError if it cannot be kept."""
  path = folder / f'{encoder.key(texts, pairs)}.npz'
  encoded = read_cache(path, len(texts))
  if encoded is None:
    with locked(folder):
      encoded = read_cache(path, len(texts))  # another process may have made it while this one waited
      if encoded is None:
        encoded = encode_all(encoder, texts, pairs, title)
        write_cache(path, encoded)
  return encoded


def read_cache(path: Path, count: int) -> Encoded | None:
  """What `write_cache` wrote for `count` texts; None where there is nothing or it is damaged."""
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      encoded = Encoded(**arrays)
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
    sys.stderr.write(f'{path} is damaged ({error}); made again\n')
    return None
  sizes = len(encoded.starts) == count + 1 and len(encoded.cut) == count
  if not sizes or not len(encoded.tokens) == len(encoded.token_types) == encoded.starts[-1]:
    sys.stderr.write(f'{path} is damaged (arrays do not fit together); made again\n')
    return None
  return encoded


def write_cache(path: Path, encoded: Encoded) -> None:
  """Writes the file whole or not at all. Raises UserError."""
  with writing(path.parent):
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix='.partial')
    try:
      with os.fdopen(handle, 'wb') as file:
        np.savez(file, **vars(encoded))
      os.replace(partial, path)
    except BaseException:
      os.unlink(partial)
      raise


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
  """Makes `folder`; what goes wrong with it is the user's to know. Raises UserError for an OSError inside."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'cannot write to the cache {folder}: {reason}. Free some space, or choose another folder in the '
      'environment variable TOKENPRUNE_CACHE'
    ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """One process at a time; the others wait. Raises UserError where the folder cannot be written."""
  with writing(folder):
    file = open(folder / '.lock', 'a', encoding='utf-8')  # noqa: SIM115 (closed below)
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
