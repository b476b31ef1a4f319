"""A picture of one document, as PNG and HTML: which words survive, and which slot each is combined into.

A word's shade is the share of (heads x layers) in which it is still a key, over the layers before words are
combined; the bar under it has the colour of its slot.
"""

import html
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenprune_jax.errors import UserError
from tokenprune_jax.predict import Predictor, Reading, Word

WIDTH = 1400  # of the PNG in pixels; at 100 dots an inch a point is 1.39 pixels
MARGIN, LINE, SIZE = 56.0, 37.0, 13  # pixels, pixels from line to line, points
MAX_LINES = 40
PAPER, INK, FAINT = '#ffffff', (0.07, 0.09, 0.13), (0.66, 0.68, 0.71)
TINT = (0.99, 0.80, 0.38)  # under a word that every head of every layer still sees
SLOTS = ('#4477aa', '#ee6677', '#228833', '#aa3377', '#66ccee', '#b8860b', '#555555', '#7755cc')


class Box(NamedTuple):
  """Where a word stands, in pixels from the top left corner."""

  word: Word
  x: float
  line: int
  width: float


def draw(
  predictor: Predictor, text: str | tuple[str, str], png: str = '', page: str = '', title: str = ''
) -> None:
  """Draws one text as PNG and HTML page (an empty path: not that one). Raises UserError as `predict` does."""
  if not isinstance(predictor, Predictor):
    raise UserError('this model tags words; pictures are drawn of texts that are classified')
  reading = predictor.read(text)
  if png:
    write_png(reading, png, title)
  if page:
    write_html(reading, page, title)


def shade(share: float, lowest: float) -> float:
  """The share on the drawn scale, which runs from `lowest` (0) to all heads and layers (1)."""
  return float(np.clip((share - lowest) / max(1 - lowest, 1e-6), 0, 1))


def scale_start(words: Sequence[Word]) -> float:
  """Where the scale begins: the lowest share, rounded down to a tenth."""
  return float(np.floor(min((word.share for word in words), default=0) * 10) / 10)


def mix(low: tuple, high: tuple, share: float) -> tuple[float, ...]:
  """The colour between two, as three floats in [0, 1]."""
  return tuple(a + (b - a) * share for a, b in zip(low, high))


def caption(reading: Reading) -> str:
  """What the model says of this text, in one line."""
  said = f'{reading.label} ({reading.probability:.0%})'
  cut = f', {reading.truncated} more tokens cut off' if reading.truncated else ''
  return f'Prediction: {said}. {reading.tokens} tokens{cut}.'


def layout(words: Sequence[Word], measure: Any, space: float) -> tuple[list[Box], int]:
  """Words set in lines of the page's width, line breaks kept. Returns (boxes, number of words left out).

  measure: text -> width in pixels; space: width of a space. Words that touch in the text touch here too.
  """
  boxes: list[Box] = []
  widths = [measure(shown(word)) for word in words]
  x, line = MARGIN, 0
  for i, word in enumerate(words):
    # A comma stays with its word.
    end = next((j for j in range(i + 1, len(words)) if words[j].gap), len(words))
    if boxes:
      x += space if word.gap else 0
      if '\n' in word.gap or (word.gap and x + sum(widths[i:end]) > WIDTH - MARGIN):
        x, line = MARGIN, line + 1
    if line >= MAX_LINES:
      return boxes, len(words) - i
    boxes.append(Box(word, x, line, widths[i]))
    x += widths[i]
  return boxes, 0


def shown(word: Word) -> str:
  """The word as it is drawn: something longer than any line is cut."""
  return word.text if len(word.text) <= 60 else word.text[:59] + '…'


def write_png(reading: Reading, path: str, title: str = '') -> None:
  """Draws `reading` 1400 pixels wide, as high as its text needs."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only pictures need it
  from matplotlib.figure import Figure
  from PIL import Image

  figure = Figure(figsize=(WIDTH / 100, 1), dpi=100, facecolor=PAPER)
  canvas = FigureCanvasAgg(figure)
  renderer = canvas.get_renderer()

  def measure(text: str) -> float:
    artist = figure.text(0, 0, text, fontsize=SIZE, parse_math=False)
    width = artist.get_window_extent(renderer).width
    artist.remove()
    return width

  boxes, left_out = layout(reading.words, measure, measure('a b') - measure('ab'))
  top = 118.0 if title else 82.0
  bottom = top + (boxes[-1].line + 1 if boxes else 0) * LINE + (26 if left_out else 0)
  height = bottom + 150
  figure.set_size_inches(WIDTH / 100, height / 100)
  axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
  axes.set_axis_off()
  if title:
    axes.text(MARGIN, 48, title, fontsize=19, fontweight='bold', color=INK, parse_math=False, va='center')
  axes.text(MARGIN, top - 36, caption(reading), fontsize=12, color='#555b66', parse_math=False, va='center')
  draw_words(axes, boxes, top, scale_start(reading.words))
  if left_out:
    axes.text(MARGIN, bottom - 14, f'… and {left_out} more words', fontsize=12, color='#555b66', va='center')
  draw_legend(axes, reading, bottom + 30)
  canvas.draw()
  # 255 colours are plenty for tints of one hue and eight bars, and make the file a third as large.
  image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB').quantize(255)
  image.save(path, optimize=True)


def draw_words(axes: Any, boxes: Sequence[Box], top: float, lowest: float) -> None:
  """The text itself: tint and ink by share, a bar by slot."""
  for box in boxes:
    y, strength = top + box.line * LINE, shade(box.word.share, lowest)
    rectangle(axes, (box.x - 2, y, box.width + 4, 25), mix((1, 1, 1), TINT, strength))
    if box.word.slot >= 0:
      rectangle(axes, (box.x - 1, y + 26, box.width + 2, 4), SLOTS[box.word.slot % len(SLOTS)])
    ink = mix(FAINT, INK, strength)
    axes.text(box.x, y + 19, shown(box.word), fontsize=SIZE, color=ink, parse_math=False, va='baseline')


def rectangle(axes: Any, box: tuple, colour: Any) -> None:
  """A filled rectangle without an edge; box: its top left corner x, y, its width and its height."""
  from matplotlib.patches import Rectangle

  x, y, width, height = box
  axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor='none'))


def draw_legend(axes: Any, reading: Reading, top: float) -> None:
  """What shades and bars mean, and the share of words left at each layer."""
  rectangle(axes, (MARGIN, top - 14, WIDTH - 2 * MARGIN, 1), '#d9dce1')
  style = {'fontsize': 11, 'color': '#333840', 'va': 'center', 'parse_math': False}
  lowest = scale_start(reading.words)
  axes.text(MARGIN, top + 8, 'Heads and layers that still see the word', **style)
  for i in range(60):
    rectangle(axes, (MARGIN + 5 * i, top + 24, 5, 20), mix((1, 1, 1), TINT, i / 59))
  axes.text(MARGIN, top + 60, f'{lowest:.0%}', **style)
  axes.text(MARGIN + 300, top + 60, '100%', ha='right', **style)
  x = MARGIN + 360
  axes.text(x, top + 8, 'Words seen, by layer (mean over heads)', **style)
  step = min(54, 330 / max(len(reading.share_by_layer), 1))
  small = {**style, 'ha': 'center', 'fontsize': 11 if step == 54 else 7.5}
  for layer, share in enumerate(reading.share_by_layer, 1):
    left, width = x + step * (layer - 1), 0.82 * step
    rectangle(axes, (left, top + 24 + 40 * (1 - share), width, 40 * share), TINT)
    rectangle(axes, (left, top + 64, width, 1), '#9aa0aa')
    axes.text(left + width / 2, top + 50, f'{100 * share:.0f}' + '%' * (step == 54), **small)
    axes.text(left + width / 2, top + 78, str(layer), **small)
  slots = sorted({word.slot for word in reading.words if word.slot >= 0})
  x += 384
  if slots:
    axes.text(x, top + 8, 'Combination slot (words in it)', **style)
  for i, slot in enumerate(slots[:16]):
    left, y = x + 92 * (i % 4), top + 34 + 24 * (i // 4)
    rectangle(axes, (left, y - 6, 20, 12), SLOTS[slot % len(SLOTS)])
    count = sum(word.slot == slot for word in reading.words)
    axes.text(left + 27, y, f'{slot + 1} ({count})', **style)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 17px/2.1 "DejaVu Sans", Verdana, sans-serif; color: #12171f }}
body {{ max-width: 1100px; margin: 3em auto; padding: 0 1.5em }}
h1 {{ font-size: 1.4em; line-height: 1.3 }}
p.note {{ color: #555b66; font-size: .85em; line-height: 1.6 }}
p.text {{ white-space: pre-line }}
p.text span {{ padding: .12em .1em; border-bottom: 4px solid transparent }}
</style></head><body>
<h1>{title}</h1>
<p class="note">{caption}</p>
<p class="text">{words}</p>
<p class="note">The darker a word, the more heads and layers still see it ({lowest:.0%} to 100%, layers 1 to
{layers}); the bar under it has the colour of its combination slot. Point at a word for its figures.</p>
</body></html>
"""


def write_html(reading: Reading, path: str, title: str = '') -> None:
  """The same picture as one self-contained page, with a word's figures on hover. Every text is escaped."""
  lowest = scale_start(reading.words)
  words = ''.join(html.escape(word.gap) + span(word, lowest) for word in reading.words)
  page = PAGE.format(
    title=html.escape(title or 'Which words survive'),
    caption=html.escape(caption(reading)),
    words=words,
    lowest=lowest,
    layers=len(reading.share_by_layer),
  )
  pathlib.Path(path).write_text(page, encoding='utf-8')


def span(word: Word, lowest: float) -> str:
  """One word in HTML."""
  strength = shade(word.share, lowest)
  back, ink = (css(mix(low, high, strength)) for low, high in (((1, 1, 1), TINT), (FAINT, INK)))
  bar = f';border-color:{SLOTS[word.slot % len(SLOTS)]}' if word.slot >= 0 else ''
  by_layer = ' '.join(f'{share:.0%}' for share in word.shares)
  slot = f'; slot {word.slot + 1}' if word.slot >= 0 else ''
  tip = f'{word.share:.0%} seen; by layer {by_layer}{slot}'
  return f'<span style="background:{back};color:{ink}{bar}" title="{tip}">{html.escape(word.text)}</span>'


def css(colour: tuple[float, ...]) -> str:
  """#rrggbb of three floats in [0, 1]."""
  return '#' + ''.join(f'{round(255 * part):02x}' for part in colour)
