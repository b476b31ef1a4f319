"""The demonstration: a dense and a pruned model fine-tuned on real news, compared, and one document drawn.

    make demo        (or: python -m benchmarks.demo [--runs=runs/demo])

At most 10 minutes on 2 cores. Both runs are ordinary runs of main.py, so a stopped demonstration goes on where it was.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import tokenprune_jax
from benchmarks import report
from tokenprune_jax import data, picture, predict

VARIANTS = ('dense', 'pfc_early')
SETTINGS = (
  '--config.data.max_length=192', '--config.data.buckets=(96, 192)', '--config.data.train_limit=480',
  '--config.data.valid_limit=200', '--config.data.test_limit=400',
)  # fmt: skip


def train(variant: str, folder: pathlib.Path) -> dict:
  """The result of one run."""
  command = [
    sys.executable,
    'main.py',
    f'--config=configs/bbc_fuzzy.py:{variant}',
    f'--workdir={folder}',
    *SETTINGS,
  ]
  print(f'\n{" ".join(command)}\n', flush=True)
  subprocess.run(command, check=True, cwd=report.ROOT)
  return json.loads((folder / 'result.json').read_text(encoding='utf-8'))


def table(results: dict[str, dict]) -> str:
  """The comparison."""
  lines = [
    (
      '',
      'accuracy',
      'macro F1',
      'MACs an example',
      'of dense',
      'ms an example',
      'dense beside it',
      'times as fast',
    )
  ]
  for name, result in results.items():
    seconds, dense = result['seconds_per_example'], result['dense_seconds_per_example']
    lines.append((
      name, f'{100 * result["metrics"]["accuracy"]:.1f}', f'{100 * result["metrics"]["macro_f1"]:.1f}',
      f'{result["macs_per_example"] / 1e9:.2f} G', f'{result["mac_ratio"]:.2f}', f'{1000 * seconds:.1f}',
      f'{1000 * dense:.1f}', f'{dense / seconds:.2f}',
    ))  # fmt: skip
  return report.table(lines)


def document(folder: pathlib.Path, predictor: predict.Predictor) -> str:
  """A test document that fits the picture: the shortest that has 120 tokens."""
  config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
  dataset = data.load(
    config['data'], predictor.tokenizer, predictor.max_length, data.cache_dir(), seed=config['seed']
  )
  split = dataset.splits['test']
  return split.texts(min((n, i) for i, n in enumerate(split.lengths) if n >= 120)[1])


def main() -> None:
  """Trains, compares, draws."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--runs', default='runs/demo')
  runs = (report.ROOT / parser.parse_args().runs).resolve()
  results = {variant: train(variant, runs / variant) for variant in VARIANTS}
  predictor = tokenprune_jax.load(runs / VARIANTS[-1])
  reading = predictor.read(document(runs / VARIANTS[-1], predictor))
  picture.write_png(reading, str(runs / 'words.png'))
  picture.write_html(reading, str(runs / 'words.html'))
  print(f'\n{table(results)}\n\nWhich words survive: {runs / "words.png"} and words.html')
  print(
    'Tested on 400 documents, one of which is 0.25 points, after a brief fine-tune on 480; results/ has the studies.'
  )


if __name__ == '__main__':
  main()
