"""The studies of methods on texts as data: corpora, methods and runs, in the order in which they are worth having."""

import argparse
import gzip
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.studies import Row
from tokenprune_jax import workdir
from tokenprune_jax.errors import UserError

TRAINED_AT = 0.4  # share of dense's multiply-adds


class Corpus(NamedTuple):
  """A dataset as it is trained on here."""

  title: str
  length: int
  buckets: tuple[int, ...]
  epochs: int
  limit: int = 0  # training texts that are sampled; 0: all
  folder: str = ''  # of its files, where that is not named as it is
  weights: str = 'minilm-l6'
  learning_rate: float = 1e-4  # of the dense fine-tune


CORPORA = {
  'sst2': Corpus('SST-2', 64, (16, 32, 64), 3, 10_000),
  'ag_news': Corpus('AG News', 128, (48, 64, 96, 128), 3),
  'ag_short': Corpus('AG News, trained on its shorter half', 128, (48, 64, 96, 128), 3, folder='ag_news'),
  'ag_mpnet': Corpus(
    'AG News, MPNet-base (12 x 768)', 128, (48, 64, 96, 128), 3, 2_000, 'ag_news', 'mpnet-base', 3e-5
  ),
  'rotten_tomatoes': Corpus('Rotten Tomatoes', 64, (16, 32, 48, 64), 3),
  'bbc': Corpus('BBC News', 256, (64, 128, 192, 256), 3),
}
BUDGET = (f'reducer.target_macs={TRAINED_AT}',)
HALF_PRUNED = ('reducer.reducers[0].target_macs=0.5',)  # exits take off the rest
ADAPTED = 3  # epochs that an ApproxNet of all texts goes on for on the attention of a dataset's own dense run
LONG = 5  # epochs of the last stage where a teacher's states are learned: they go on telling more when labels are known

CASCADE = '(0.459,0.459,0.459,0.367,0.275,0.184)'  # SpAtten's schedule, whose first half is whole, scaled to TRAINED_AT


class Method(NamedTuple):
  """How a method stands in tables, what configs/prune.py calls it, what is changed of its config, and how it is timed.

  after: the run that it goes on from, where that is not the dense one.
  """

  title: str
  recipe: str
  overrides: tuple[str, ...] = ()
  executor: str = 'compact'  # fixed counts, or a plan of known size; 'serve': counts that depend on the text
  after: str = ''


METHODS = {
  'dense_more': Method('dense, trained on', 'dense'),
  'dense_states': Method('dense, self-distilled', 'dense+states', (f'stages[0].epochs={LONG}',)),
  'ltp': Method('LTP', 'ltp', BUDGET, 'serve'),
  'sttabt': Method('STTABT, Concrete', 'sttabt', (*BUDGET, 'reducer.theta=-0.5')),
  'sttabt_pooled': Method(
    'STTABT, ApproxNet of all texts alone, weak mask loss',
    'sttabt',
    (*BUDGET, 'reducer.theta=-0.5', 'reducer.mask_weight=0.001', 'stages[1].train=.*'),
  ),
  'power': Method('PoWER-BERT', 'power', BUDGET),
  'topk': Method('top-k', 'topk'),
  'topk_distil': Method('top-k, distilled', 'topk+distil'),
  'topk_states': Method('top-k, distilled with states', 'topk+states', (f'stages[0].epochs={LONG}',)),
  'ltp_states': Method(
    'LTP, distilled with states', 'ltp+states', (*BUDGET, f'stages[1].epochs={LONG}'), 'serve'
  ),
  'sttabt_states': Method(
    'STTABT, Concrete, distilled with states',
    'sttabt+states',
    (*BUDGET, 'reducer.theta=-0.5', f'stages[1].epochs={LONG}'),
  ),
  'topk_cls': Method('top-k by [CLS]', 'topk', ('reducer.score=cls',)),
  'topk_random': Method('top-k at random', 'topk', ('reducer.score=random',)),
  'topk_cumulative': Method('top-k, cumulative', 'topk', ('reducer.score=cumulative',)),
  'manual': Method('top-k, manual schedule', 'manual', ('reducer.score=received',)),
  'cascade': Method('cascade of tokens', 'cascade', (f'reducer.shares={CASCADE}',)),
  'spatten': Method(
    'cascade of tokens and heads (SpAtten)', 'spatten', (f'reducer.reducers[0].shares={CASCADE}',)
  ),
  'exits': Method('exits, linear', 'exits', ('reducer.head=linear', 'stages[0].epochs=1'), 'serve'),
  'fastbert': Method('FastBERT, brief exits', 'exits', ('stages[0].epochs=1',), 'serve'),
  'fastbert_long': Method(
    f'FastBERT, {LONG} epochs of exits',
    'exits',
    (f'stages[0].epochs={LONG}',),
    'serve',
  ),
  'fastbert_states': Method(
    f'self-distilled, then FastBERT, {LONG} epochs',
    'exits',
    (f'stages[0].epochs={LONG}',),
    'serve',
    after='dense_states',
  ),
  'topk_light': Method('light top-k, with states', 'topk_light+states', (f'stages[0].epochs={LONG}',)),
  'topk_exits': Method(
    f'light top-k, then FastBERT, {LONG} epochs',
    'exits',
    (f'stages[0].epochs={LONG}',),
    'serve',
    after='topk_light',
  ),
  'pyramid': Method(
    'Magic Pyramid, linear exits',
    'pyramid',
    (*HALF_PRUNED, 'reducer.reducers[1].head=linear', 'stages[2].epochs=2'),
    'serve',
  ),
  'pyramid_fastbert': Method(
    "Magic Pyramid, FastBERT's exits", 'pyramid', (*HALF_PRUNED, 'stages[2].epochs=2'), 'serve'
  ),
  'pyramid_states': Method(
    'Magic Pyramid, distilled with states, brief exits',
    'pyramid+states',
    (*HALF_PRUNED, f'stages[1].epochs={LONG}', 'stages[2].epochs=2'),
    'serve',
  ),
  'pyramid_long': Method(
    f'Magic Pyramid, distilled with states, {LONG} epochs of exits',
    'pyramid+states',
    (*HALF_PRUNED, f'stages[1].epochs={LONG}', f'stages[2].epochs={LONG}'),
    'serve',
  ),
  'student': Method('student, half of the layers', 'student+states', (f'stages[0].epochs={LONG}',)),
  'student_third': Method(
    'student, a third of the layers', 'student_third+states', (f'stages[0].epochs={LONG}',)
  ),
}

# A third of AG News' texts: exits are trained on them for longer, the pruned encoder as long as its dense fine-tune. On BBC
# News the thresholds' whole gradient, with which LTP was trained there.
OWN = {
  ('bbc', 'pyramid_long'): ('reducer.reducers[0].score_gradient=1.0',),
  ('ag_mpnet', 'fastbert'): ('stages[0].epochs=3',),
  ('ag_mpnet', 'pyramid_states'): (
    'stages[1].epochs=2',
    'stages[2].epochs=3',
    'reducer.reducers[0].score_gradient=0.0',
  ),
}

# Accuracy (dense beside it) at a share of dense's cost, as the papers print them. BERT-base, but LTP on SST-2 RoBERTa-base.
PAPERS = {
  ('sst2', 'ltp'): '93.5 (94.3) at 0.48',
  ('sst2', 'sttabt'): '91.7 (92.4) at 0.36, padding counted',
  ('sst2', 'power'): '92.1 (93.0) at 0.42 of the time',
  ('ag_news', 'ltp'): '94.3 (94.3) at 0.58',
  ('ag_news', 'student'): '94.4 (94.3) at 0.50',
  ('ag_news', 'fastbert_long'): '94.3 (94.3) at 0.25',
  ('ag_news', 'pyramid'): '94.3 (94.3) at 0.20',
}


GUIDED = ('sttabt', 'sttabt_states')  # by the ApproxNet of their dense run


class Plan(NamedTuple):
  """A study. main: the methods that run on every seed, others on the first alone; budgets: what all are set to.

  more: budgets of single methods beside these; few: the methods of datasets that run no others; lengths: whether gains are
  told by the texts' length; extras: what only the study of pruning asks: dense checkpoints without training, and longer
  texts than trained on.
  """

  title: str
  seeds: dict[str, tuple[int, ...]]  # of each dataset
  main: tuple[str, ...]
  others: tuple[str, ...]
  budgets: tuple[float, ...]  # shares of dense's multiply-adds, in the order in which they are worth having
  more: Mapping[str, tuple[float, ...]] = {}
  few: Mapping[str, tuple[str, ...]] = {}
  lengths: bool = False
  extras: bool = False

  def methods(self, dataset: str) -> tuple[str, ...]:
    """Those that run on every seed of a dataset."""
    return self.few.get(dataset, self.main)

  def budgets_of(self, name: str) -> tuple[float, ...]:
    """What a method is set to."""
    return (*self.budgets, *self.more.get(name, ()))


ALL = (0, 1, 2)
PLANS = {
  'text_pruning': Plan(
    'Learned token pruning of text',
    {'sst2': ALL, 'ag_news': ALL},
    ('topk', 'ltp', 'power', 'topk_states', 'ltp_states', 'sttabt', 'sttabt_states'),
    (
      'dense_more',
      'topk_distil',
      'sttabt_pooled',
      'topk_cls',
      'topk_random',
      'topk_cumulative',
      'manual',
      'cascade',
      'spatten',
      'student',
      'student_third',
    ),
    (0.4, 0.55, 0.48, 0.3, 0.7, 0.2),
    more=dict.fromkeys(GUIDED, (0.35,)),  # about 35% of the keys: what their authors claim it for
    extras=True,
  ),
  'exits': Plan(
    'Exits, pruning, and both',
    {'ag_news': ALL, 'bbc': (0,), 'rotten_tomatoes': (0,), 'ag_mpnet': (0,), 'sst2': ALL},
    (
      'ltp',
      'exits',
      'fastbert',
      'fastbert_long',
      'pyramid_fastbert',
      'student',
      'pyramid_states',
      'pyramid_long',
      'pyramid',
      'topk_light',
      'topk_exits',
    ),
    (),
    (0.4, 0.25, 0.6, 0.15, 0.8, 0.5, 0.3),
    few={
      'ag_mpnet': ('fastbert', 'pyramid_states'),
      'sst2': ('fastbert', 'fastbert_long', 'dense_states', 'fastbert_states', 'topk_light', 'topk_exits'),
    },
    lengths=True,
  ),
}

UNTRAINED = {
  'manual': ('top-k on the way up', {'name': 'topk', 'score': 'received'}),
  'abt': ('back-tracking, ApproxNet', {'name': 'sttabt', 'mode': 'topk'}),
  'oracle': ('back-tracking, true attention', {'name': 'sttabt', 'mode': 'topk', 'factor': 1}),
  'pooled': ('back-tracking, ApproxNet of all texts pooled', {'name': 'sttabt', 'mode': 'topk'}),
  'random': ('top-k at random', {'name': 'topk', 'score': 'random'}),
}
KEEP = (0.1, 0.2, 0.3, 0.4, 0.6)  # of the tokens, by layer
MIXES = (0.0, 0.5, 1.0)  # of back-tracking, beside its default of 0.1


# ------------------------------------------------------------------------------------------------------- Runs
def dense_row(dataset: str, seed: int) -> Row:
  """The fine-tune that all methods on a dataset start from."""
  corpus = CORPORA[dataset]
  if dataset == 'bbc':
    return Row('bbc', 'dense_cls', 'dense', seed, ('task.readout=cls',), timed=False)
  folder = f'{{data}}/{corpus.folder or dataset}'
  data = {split: f'{folder}/{split}.jsonl.gz' for split in ('train', 'valid', 'test')}
  if dataset == 'ag_short':
    data['train'] = '{runs}/ag_news_short.jsonl'
  if dataset == 'rotten_tomatoes':
    data = {'name': dataset}
  overrides = (
    *(f'data.{name}={value}' for name, value in data.items()), f'data.train_limit={corpus.limit}',
    f'data.max_length={corpus.length}', f'data.buckets={corpus.buckets}'.replace(' ', ''), 'task.readout=cls',
    f'stages[0].epochs={corpus.epochs}', f'optimizer.learning_rate={corpus.learning_rate}',
  )  # fmt: skip
  return Row(dataset, 'dense', f'dense,{corpus.weights}', seed, overrides, 'configs/own_data.py', False)


def approx_row() -> Row:
  """The ApproxNet of the pretrained encoder, on all texts pooled: one for all seeds, as the encoder itself is."""
  overrides = (
    'data.name=file', 'data.train={runs}/pooled.jsonl', 'data.train_limit=0', 'data.max_length=256',
    'data.buckets=(16,32,64,96,128,256)',
  )  # fmt: skip
  return Row('pooled', 'approx', 'approx', 0, overrides, 'configs/imdb_sttabt.py', False)


def own_approx_row(dataset: str, seed: int) -> Row:
  """The ApproxNet of a dataset's dense run, which goes on from that of the pretrained encoder."""
  dense = f'{{runs}}/{dataset}/{dense_row(dataset, seed).name}-seed{seed}'
  variant = f'approx,{dense},{{runs}}/pooled/approx-seed0'
  return Row(dataset, 'approx', variant, seed, (f'stages[0].epochs={ADAPTED}',), 'configs/prune.py', False)


def method_row(dataset: str, name: str, seed: int) -> Row:
  """A method, from the dense run of its dataset and seed, or from what that was pruned to."""
  method = METHODS[name]
  place = 'pooled/approx-seed0' if name == 'sttabt_pooled' else f'{dataset}/approx-seed{seed}'
  approx = f',{{runs}}/{place}' if method.recipe.startswith('sttabt') else ''
  before = method.after or dense_row(dataset, seed).name
  variant = f'{method.recipe},{{runs}}/{dataset}/{before}-seed{seed}{approx}'
  overrides = (*method.overrides, *OWN.get((dataset, name), ()))
  return Row(dataset, name, variant, seed, overrides, 'configs/prune.py', False)


def rows(plan: Plan) -> Iterator[Row]:
  """Every run of a study: all of the first seed before any of the second, an ApproxNet before those who need it."""
  for seed in ALL:
    datasets = [dataset for dataset, seeds in plan.seeds.items() if seed in seeds]
    for dataset in datasets:
      yield dense_row(dataset, seed)
      yield from (method_row(dataset, name, seed) for name in plan.methods(dataset) if name not in GUIDED)
    if set(GUIDED) & set(plan.main):
      if seed == 0:
        yield approx_row()
      for dataset in datasets:
        yield own_approx_row(dataset, seed)
        yield from (method_row(dataset, name, seed) for name in plan.methods(dataset) if name in GUIDED)
    if plan.extras and seed == 0:
      yield dense_row('bbc', 0)
      yield own_approx_row('bbc', 0)
      yield dense_row('ag_short', 0)
      yield from (method_row('ag_short', name, 0) for name in ('ltp', 'power', 'topk'))
    if seed == 0:
      yield from (method_row(dataset, name, 0) for dataset in datasets for name in plan.others)


def placed(row: Row, options: argparse.Namespace) -> Row:
  """The row with the folders that it names."""
  folders = {'data': options.data, 'runs': options.runs}
  return row._replace(
    variant=row.variant.format(**folders), overrides=tuple(text.format(**folders) for text in row.overrides)
  )


def texts(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a gzipped JSONL file."""
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file]


def bbc_texts() -> list[str]:
  """The training texts of BBC News, as the runs of seed 0 divide it."""
  from tokenprune_jax import data, pretrained

  length = CORPORA['bbc'].length
  found = data.load({'name': 'bbc'}, pretrained.load('minilm-l6').tokenizer, length, data.cache_dir(), seed=0)
  train = found.splits['train']
  return [train.texts(i) for i in range(len(train))]


def write_corpora(options: argparse.Namespace) -> None:
  """The pooled texts, and the shorter half of AG News by words. Raises UserError where the datasets are not there."""
  data, runs = pathlib.Path(options.data), pathlib.Path(options.runs)
  missing = [
    str(data / name) for name in ('sst2', 'ag_news') if not (data / name / 'train.jsonl.gz').exists()
  ]
  if missing:
    raise UserError(
      f'{missing[0]} holds no train.jsonl.gz; put the datasets there, or name their folder with --data'
    )
  names = ('pooled', 'ag_news_short')
  if all((runs / f'{name}.jsonl').exists() for name in names):
    return
  ag_news = texts(data / 'ag_news' / 'train.jsonl.gz')
  ag_news.sort(key=lambda row: len(row['text'].split()))
  sst2 = texts(data / 'sst2' / 'train.jsonl.gz')
  chosen = np.random.default_rng(0).permutation(len(sst2))[: CORPORA['sst2'].limit]
  pooled = [{'text': sst2[i]['text'], 'label': 'sst2'} for i in chosen]
  pooled += [{'text': row['text'], 'label': 'ag_news'} for row in ag_news]
  pooled += [{'text': text, 'label': 'bbc'} for text in bbc_texts()]
  runs.mkdir(parents=True, exist_ok=True)
  for name, lines in zip(names, (pooled, ag_news[: len(ag_news) // 2])):
    workdir.write_text(runs / f'{name}.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
