"""Draws which words each layer still sees in one real text, for trained methods under each other and each alone.

    python benchmarks/kept_words.py [--dataset=sst2] [--runs=runs] [--example=N] [--out=docs/methods]

Reads the runs of benchmarks/text_pruning.py (seed 0) that are finished. The text is one of the test split:
`--example`, or the first of 20 to 30 words that the dense model gets right. Writes kept.png and kept_METHOD.png.
"""

import argparse
import pathlib
import sys

# So that this file can be run by its path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import accuracy
from benchmarks.studies import Row
from benchmarks.text_runs import CORPORA, METHODS, dense_row
from tokenprune_jax import layer_picture, predict
from tokenprune_jax.calibrate import Calibration

DRAWN = ('topk', 'ltp', 'power', 'sttabt')
SHORT, LONG = 20, 30  # words


def chosen(dense: Calibration, example: int) -> str:
  """The text to draw."""
  test, labels, reader = (
    dense.splits['test'],
    dense.exported.labels,
    predict.Predictor(dense.exported, 'mask'),
  )
  if example >= 0:
    return test.texts(example)
  for i, label in enumerate(test.label):
    text = test.texts(i)
    if SHORT <= len(text.split()) <= LONG and reader.read(text).label == labels[label]:
      return text
  raise SystemExit(
    f'error: no test text of {SHORT} to {LONG} words that dense gets right; name one with --example'
  )


def main() -> None:
  """Draws every method that has a finished run."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--dataset', default='sst2', choices=tuple(CORPORA))
  parser.add_argument('--runs', default='runs', help='folder of the workdirs')
  parser.add_argument('--example', type=int, default=-1, help='number in the test split, from 0')
  parser.add_argument('--out', default='docs/methods', help='folder of the pictures')
  options = parser.parse_args()

  def folder(name: str) -> pathlib.Path:
    return pathlib.Path(accuracy.workdir_of(Row(options.dataset, name, '', 0), options.runs))

  finished = [name for name in DRAWN if (folder(name) / 'result.json').exists()]
  if not finished:
    raise SystemExit(
      f'error: {options.runs} holds no finished run of {", ".join(DRAWN)} on {options.dataset}'
    )
  text = chosen(Calibration(folder(dense_row(options.dataset, 0).name)), options.example)
  readings = {}
  for name in finished:
    readings[METHODS[name].title] = predict.load(folder(name)).read(text)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  layer_picture.write_layers(readings, str(out / 'kept.png'), 'Which words each layer still sees')
  for name in finished:
    title = METHODS[name].title
    layer_picture.write_layers({title: readings[title]}, str(out / f'kept_{name}.png'))
  print(f'{text!r}: {", ".join(finished)} drawn in {out}')


if __name__ == '__main__':
  main()
