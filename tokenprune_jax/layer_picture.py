"""A picture of one short text: which words each layer still sees, for one method or several under each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenprune_jax.errors import UserError
from tokenprune_jax.picture import FAINT, INK, PAPER, TINT, mix, rectangle, shown
from tokenprune_jax.predict import Reading, Word

CELL, ROW = 26.0, 20.0  # pixels of a word's column, and of a layer's row
LEFT, GAP = 210.0, 16.0  # pixels: for the methods' names, and between methods
WORDS = 44  # that fit; of a longer text the first
NOTE = 6.6  # pixels of a letter of the note below
LONGEST, LETTER = 22, 8.5  # letters of a word that are shown, and pixels of one: words stand upright


SEEN = 'Dark: every head sees all of the word; pale: a part of its pieces or heads; blank: none'


def write_layers(readings: Mapping[str, Reading], path: str, title: str = '', meaning: str = SEEN) -> None:
  """Draws a PNG: a column a word, a row a layer, dark where all heads see the word. readings: {method: the same text}.

  meaning: what dark and blank stand for, where shares are not those of heads.

  Raises UserError where the readings are of different texts.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
  from matplotlib.figure import Figure
  from PIL import Image

  if len({reading.text for reading in readings.values()}) != 1:
    raise UserError(
      'a picture by layers compares methods on one text; these readings are of several, or of none'
    )
  grids = {name: shares(reading) for name, reading in readings.items()}
  words = next(iter(readings.values())).words
  columns = min(len(words), WORDS)
  left_out = f', the first {columns} of {len(words)} words' if len(words) > columns else ''
  note = f'Rows: layers, the first above. {meaning}{left_out}.'
  width = LEFT + max(CELL * columns + 40, NOTE * len(note) + 20)
  top = heading(words[:columns], title)
  height = top + sum(ROW * len(grid) + GAP for grid in grids.values()) + 52
  figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=PAPER)
  axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
  axes.set_axis_off()
  style: dict[str, Any] = {'color': INK, 'parse_math': False}
  if title:
    axes.text(24, 30, title, fontsize=14, fontweight='bold', va='center', **style)
  for place, word in enumerate(words[:columns]):
    x = LEFT + CELL * (place + 0.5)
    axes.text(x, top - 8, shown(word)[:LONGEST], fontsize=10, rotation=90, ha='center', va='bottom', **style)
  for name, grid in grids.items():
    draw_grid(axes, name, grid[:, :columns], top)
    top += ROW * len(grid) + GAP
  axes.text(LEFT, top + 12, note, fontsize=9.5, color='#555b66', va='center')
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB').quantize(64).save(path, optimize=True)


def heading(words: Sequence[Word], title: str) -> float:
  """Pixels above the first method."""
  longest = min(max((len(word.text) for word in words), default=0), LONGEST)
  return 24 + LETTER * longest + (30 if title else 0)


def shares(reading: Reading) -> np.ndarray:
  """[layers words] share of heads that see a word; layers that see none are left out. Raises UserError without any word."""
  if not reading.words:
    raise UserError(f'the text {reading.text!r:.40} has no words to draw')
  return np.array([word.shares for word in reading.words]).T


def draw_grid(axes: Any, name: str, grid: np.ndarray, top: float) -> None:
  """One method: its name, the share of words that each layer sees, and a cell a word."""
  axes.text(24, top + ROW * len(grid) / 2, name, fontsize=11, color=INK, va='center', parse_math=False)
  for layer, row in enumerate(grid):
    y = top + ROW * layer
    label = f'{100 * row.mean():.0f}%'
    axes.text(LEFT - 8, y + ROW / 2, label, fontsize=8.5, ha='right', va='center', color='#555b66')
    for place, share in enumerate(row):
      box = LEFT + CELL * place + 1, y + 1, CELL - 2, ROW - 2
      rectangle(axes, box, mix((0.955, 0.96, 0.965), dark(float(share)), float(share)))


def dark(share: float) -> tuple[float, ...]:
  """The colour of a word's cell: the tint of few heads deepens to that of all."""
  return mix(TINT, (0.86, 0.53, 0.10), share) if share > 0 else FAINT
