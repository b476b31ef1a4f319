"""The accuracy studies as data: which runs a table needs, in the order in which they are worth having."""

from typing import NamedTuple


class Row(NamedTuple):
  """One run: a config with its variant and overrides, and a seed. `name` stands in tables and folders."""

  dataset: str
  name: str
  variant: str
  seed: int
  overrides: tuple[str, ...] = ()
  config: str = ''  # the dataset's, where none is named
  timed: bool = True  # beside dense at the end, for the first seed


class Paper(NamedTuple):
  """The paper's figures in percent (BERT-base, 512 tokens, all data); F1 is averaged over batches of 16."""

  accuracy: float
  macro_f1_batch16: float


class Study(NamedTuple):
  """A table. `title` and `setting` say what it shows and how it was trained."""

  title: str
  setting: str
  dataset: str
  rows: tuple[Row, ...]
  paper: dict[str, Paper]


class Dataset(NamedTuple):
  """What all runs on a dataset share, so that one dense fine-tune serves every table."""

  config: str  # a file that takes the variant as its argument, and holds limits, lengths and epochs
  model: str
  overrides: tuple[str, ...] = ()


DATASETS = {
  'bbc': Dataset('configs/bbc_fuzzy.py', 'minilm-l6', ()),
  'imdb': Dataset('configs/imdb_fuzzy.py', 'minilm-l6', ()),
  'newsgroups': Dataset(
    'configs/newsgroups_fuzzy.py',
    'minilm-l6',
    ('data.train_limit=3000', 'data.valid_limit=500', 'data.test_limit=3000'),
  ),
}

# What the rows are: the method's name in result files, and the paper's name for it.
METHODS = {
  'dense': ('dense', 'dense'),
  'p': ('fuzzy', 'P (rank)'),
  'pf': ('fuzzy', 'PF (protect)'),
  'pf_complement': ('fuzzy', 'PF (complement)'),
  'c_late': ('combine', 'C, late'),
  'pfc_late': ('fuzzy+combine', 'PFC, late'),
  'pfc_early': ('fuzzy+combine', 'PFC, early'),
}
COMPLEMENT = ('reducer.rule=complement',)


def main_rows(dataset: str, seeds: tuple[int, ...]) -> tuple[Row, ...]:
  """Dense and the three that the study is about, all of the first seed before any of the second."""
  names = ('dense', 'pfc_late', 'pf', 'pfc_early')
  return tuple(Row(dataset, name, name, seed) for seed in seeds for name in names)


def other_rows(dataset: str) -> tuple[Row, ...]:
  """The other variants and readings, one seed."""
  return (
    Row(dataset, 'p', 'p', 0),
    Row(dataset, 'c_late', 'c_late', 0),
    Row(dataset, 'pf_complement', 'pf', 0, COMPLEMENT),
  )


def paper(dense: tuple, p: tuple, pf: tuple, c: tuple, pfc_late: tuple, pfc_early: tuple) -> dict[str, Paper]:
  """The rows of the paper's table 2 by our names."""
  names = ('dense', 'p', 'pf', 'c_late', 'pfc_late', 'pfc_early')
  return {name: Paper(*row) for name, row in zip(names, (dense, p, pf, c, pfc_late, pfc_early))}


STUDIES = {
  'bbc_fuzzy': Study(
    'Fuzzy token pruning and token combining on BBC News',
    'MiniLM-L6 (6 x 384), 256 tokens, 3 epochs; combining at layer 5 (late) or 4 (early) of 6.',
    'bbc',
    main_rows('bbc', (0, 1, 2)) + other_rows('bbc'),
    paper((96.2, 94.0), (97.2, 95.4), (97.9, 96.6), (96.8, 95.2), (98.1, 97.1), (97.0, 95.2)),
  ),
  'imdb_fuzzy': Study(
    'Fuzzy token pruning and token combining on IMDB',
    'MiniLM-L6 (6 x 384), 256 tokens, 2 epochs on 1,500 reviews, tested on 2,000; combining at layer 5 '
    '(late) or 4 (early) of 6.',
    'imdb',
    main_rows('imdb', (0, 1, 2)) + other_rows('imdb'),
    paper((93.7, 92.8), (93.8, 92.9), (94.3, 93.4), (92.6, 91.3), (93.5, 92.5), (92.8, 91.5)),
  ),
  'newsgroups_fuzzy': Study(
    'Fuzzy token pruning and token combining on 20 Newsgroups',
    'MiniLM-L6 (6 x 384), 128 tokens, 3 epochs on 3,000 documents, tested on 3,000; combining at layer 5 (late) '
    'or 4 (early) of 6.',
    'newsgroups',
    tuple(Row('newsgroups', name, name, 0) for name in ('dense', 'pf', 'pfc_late', 'pfc_early')),
    paper((68.7, 56.1), (69.4, 56.8), (70.7, 58.2), (69.2, 56.5), (69.9, 57.1), (68.5, 55.4)),
  ),
}
