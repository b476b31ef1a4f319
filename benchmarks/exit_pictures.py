"""Draws where words exit: how many at each layer, and which have halted by layer in one real sentence; or where texts do.

    python benchmarks/exit_pictures.py [--budget=0.33] [--runs=runs] [--results=results] [--example=N] [--out=docs/methods]
    python benchmarks/exit_pictures.py --texts=ag_news [--budget=0.3] …

Models of benchmarks/tagging.py (seed 0) that are measured, each at the given share of dense's multiply-adds. Words are those
of the test split; the sentence is `--example`, or the first of 12 to 24 words with three spans or more that dense gets right.
Writes tokee_depths.png and tokee_layers.png. `--texts`: models of the study of exits on that dataset, and its validation
split; writes exit_depths.png.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dataclasses

import numpy as np

from benchmarks import pictures, tagging, text_pruning
from benchmarks.text_runs import METHODS, PLANS
from benchmarks.trained import Trained
from tokenprune_jax import layer_picture, specs
from tokenprune_jax.data import tags
from tokenprune_jax.data.sentences import Sentence
from tokenprune_jax.predict import Reading, Word
from tokenprune_jax.tagger import Tagger

SHORT, LONG, SPANS = 12, 24, 3  # words, and spans
HALTS = 'Dark: the word is still computed; blank: it has exited, its tag is fixed'


def chosen(dense: Tagger, sentences: tuple[Sentence, ...], example: int) -> Sentence:
  """The sentence to draw."""
  if example >= 0:
    return sentences[example]
  for sentence in sentences:
    fits = SHORT <= len(sentence.words) <= LONG and len(tags.spans(sentence.tags)) >= SPANS
    if fits and dense.tagged([sentence.words])[0].tags == sentence.tags:
      return sentence
  raise SystemExit('error: dense gets no such sentence right; name one with --example')


def reading(sentence: Sentence, layers: tuple[int, ...], depth: int) -> Reading:
  """A sentence as a picture by layers takes it: each word is there up to the layer that it exits at."""
  words = [
    Word(
      f'{word} {tag}' if tag != 'O' else word, ' ', tuple(float(l <= last) for l in range(1, depth + 1)), -1
    )
    for word, tag, last in zip(sentence.words, sentence.tags, layers)
  ]
  return Reading(' '.join(sentence.words), '', {}, tuple(words), len(words), 0)


def histogram(
  path: pathlib.Path, depths: Mapping[str, np.ndarray], depth: int, what: str = 'Test words'
) -> None:
  """Bars: share of words (or texts) by the layer that they exit at, a colour a model."""
  drawing, axes = pictures.figure(height=4.4)
  width = 0.8 / len(depths)
  for place, (name, layers) in enumerate(depths.items()):
    share = 100 * np.bincount(layers, minlength=depth + 1)[1:] / len(layers)
    at = np.arange(1, depth + 1) + (place - (len(depths) - 1) / 2) * width
    label = f'{name}, mean {layers.mean():.1f}'
    axes.bar(at, share, width, color=pictures.PALETTE[place % len(pictures.PALETTE)], label=label)
  axes.set_xticks(range(1, depth + 1))
  pictures.legend(axes)
  pictures.titled(axes, f'Where {what.split()[-1]} exit', 'Layer', f'{what} in %')
  drawing.savefig(path)


def texts(options: argparse.Namespace) -> None:
  """Draws the layers that texts exit at, of all models with exits that are measured at the budget."""
  given = argparse.Namespace(**vars(options), study='exits', data='')
  study = text_pruning.Study(given, 'python benchmarks/text_pruning.py --study=exits')
  rows = {(row.dataset, row.name): row for row in study.runs if row.seed == 0}
  depths, depth = {}, 0
  for point in study.document['rows']:
    own = (point['dataset'], point['seed'], point['budget']) == (options.texts, 0, options.budget)
    if own and point['metrics'] and 'early_exit' in specs.names(point['reducer']):
      trained = Trained(study.folder(rows[options.texts, point['name']]))
      costs = trained.validation(point['reducer']).costs({})
      depths[METHODS[point['name']].title] = np.concatenate([(c.queries > 0).sum(-1) for c, _ in costs])
      depth = trained.exported.config.depth
  if not depths:
    raise SystemExit(
      f'error: {study.path} holds no exits on {options.texts} at {options.budget}; run benchmarks/text_pruning.py first'
    )
  out = pathlib.Path(options.out)
  histogram(out / 'exit_depths.png', depths, depth, 'Validation texts')
  print(f'{", ".join(depths)}: drawn in {out}')


def words(options: argparse.Namespace) -> None:
  """Draws the layers that words exit at, and those of one sentence."""
  study = tagging.Study(argparse.Namespace(**vars(options), sentences=0))
  specs = {
    point['name']: point['reducer'] for own in study.points.values() for point in own
    if point['seed'] == 0 and point['budget'] == options.budget and point['metrics']
  }  # fmt: skip
  if not specs:
    raise SystemExit(
      f'error: {study.path} holds no model at {options.budget}; run benchmarks/tagging.py first'
    )
  folders = {row.name: study.folder(row) for row in study.runs if row.seed == 0}
  dense = Trained(folders['dense'])
  test, depth = dense.splits['test'].words, dense.exported.config.depth
  assert test is not None  # it is tagged
  sentence = chosen(Tagger(dense.exported, 'mask'), test.sentences, options.example)
  depths, drawn = {}, {}
  for name, spec in specs.items():
    curve = tagging.CURVES[name]
    model = Tagger(dataclasses.replace(Trained(folders[curve.run]).exported, reducer_spec=spec), 'mask')
    depths[curve.title] = np.concatenate(model.depths([given.words for given in test.sentences], 32))
    [layers] = model.depths([sentence.words])
    drawn[curve.title] = reading(sentence, layers, depth)
  out = pathlib.Path(options.out)
  histogram(out / 'tokee_depths.png', depths, depth)
  layer_picture.write_layers(
    drawn, str(out / 'tokee_layers.png'), 'Which words each layer still computes', HALTS
  )
  print(f'{" ".join(sentence.words)!r}: {", ".join(specs)} drawn in {out}')


def main() -> None:
  """Draws all models that are measured at the budget."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--budget', type=float, default=0.33, help='share of the multiply-adds')
  parser.add_argument('--texts', default='', choices=('', *PLANS['exits'].seeds), help='draw this dataset')
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--results', default='results', help='folder of the result files')
  parser.add_argument('--example', type=int, default=-1, help='number of the test sentence, from 0')
  parser.add_argument('--out', default='docs/methods', help='folder of the pictures')
  options = parser.parse_args()
  budgets = PLANS['exits'].budgets if options.texts else tagging.BUDGETS
  if options.budget not in budgets:
    parser.error(f'--budget is {options.budget}; choose one of {", ".join(map(str, budgets))}')
  pathlib.Path(options.out).mkdir(parents=True, exist_ok=True)
  if options.texts:
    texts(options)
  else:
    words(options)


if __name__ == '__main__':
  main()
