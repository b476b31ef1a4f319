import html.parser

import numpy as np
import pytest

from tokenprune_jax import layer_picture, picture
from tokenprune_jax.errors import UserError
from tokenprune_jax.predict import Reading, Word


def reading(count=240, layers=4, slots=8, seed=0, words=None):
  random = np.random.default_rng(seed)
  texts = words or [
    str(random.choice(['film', 'a', 'clockmaker', 'astronomical', 'the'])) for _ in range(count)
  ]
  made = []
  for i, text in enumerate(texts):
    shares = tuple(np.sort(random.random(layers))[::-1].tolist())
    made.append(Word(text, ' ' if i else '', shares, int(random.integers(slots)) if slots else -1))
  return Reading(' '.join(texts), 'good', {'bad': 0.25, 'good': 0.75}, tuple(made), count + 2, 0)


def pixels(path):
  image = pytest.importorskip('PIL.Image').open(path)
  return np.asarray(image.convert('RGB'))


def test_png_is_wide_small_and_drawn(tmp_path):
  picture.write_png(reading(), str(tmp_path / 'a.png'), 'A title')
  drawn = pixels(tmp_path / 'a.png')
  assert drawn.shape[1] == picture.WIDTH and drawn.shape[0] > 400
  assert (tmp_path / 'a.png').stat().st_size < 200_000
  assert (drawn[:, :50] == 255).all() and (drawn[:, 1354:] == 255).all()


def test_shade_and_bar_say_share_and_slot(tmp_path):
  """A word that all see has the full tint, one that nobody sees none; each has the bar of its slot."""
  words = (Word('mmmm', '', (1.0, 1.0), 0), Word('mmmm', '\n', (0.0, 0.0), 1))
  picture.write_png(reading(1)._replace(words=words), str(tmp_path / 'a.png'))
  drawn = pixels(tmp_path / 'a.png').astype(int)
  rows = [drawn[82 + line * 37 + 2, 58] for line in (0, 1)]  # the top of the word's box
  bars = [drawn[82 + line * 37 + 28, 66] for line in (0, 1)]
  near = lambda pixel, colour: np.abs(pixel - colour).max() <= 12  # noqa: E731 (colours are quantised)
  assert near(rows[0], np.array(picture.TINT) * 255) and near(rows[1], 255)
  for slot in (0, 1):
    assert near(bars[slot], [int(picture.SLOTS[slot][i : i + 2], 16) for i in (1, 3, 5)])


def test_words_stay_on_the_page():
  boxes, left_out = picture.layout(reading().words, lambda text: 9.0 * len(text), 6.0)
  assert not left_out and max(box.x + box.width for box in boxes) <= picture.WIDTH - picture.MARGIN
  assert [box.word for box in boxes] == list(reading().words)
  for box, after in zip(boxes, boxes[1:]):
    assert after.line > box.line or after.x >= box.x + box.width


def test_touching_words_stay_together_and_line_breaks_stay():
  words = [Word('x' * 60, '', (1.0,), -1), Word('y' * 60, ' ', (1.0,), -1), Word(',', '', (1.0,), -1),
           Word('z', '\n', (1.0,), -1)]  # fmt: skip
  boxes, _ = picture.layout(words, lambda text: 10.6 * len(text), 6.0)
  assert [box.line for box in boxes] == [0, 1, 1, 2]
  assert boxes[2].x == pytest.approx(boxes[1].x + boxes[1].width)


def test_long_texts_are_cut_and_told():
  boxes, left_out = picture.layout(reading(5000).words, lambda text: 9.0 * len(text), 6.0)
  assert boxes[-1].line == picture.MAX_LINES - 1 and left_out == 5000 - len(boxes) > 0
  assert len(picture.shown(Word('x' * 1000, '', (1.0,), -1))) == 60


@pytest.mark.filterwarnings('ignore:Glyph')  # the font lacks one
@pytest.mark.parametrize('kind', [
  reading(0), reading(3, layers=1, slots=0), reading(5, layers=24, slots=20),
  reading(words=['$x^2$', '{', '\\frac', '語']),
])  # fmt: skip
def test_odd_readings_are_drawn(tmp_path, kind):
  picture.write_png(kind, str(tmp_path / 'a.png'), '$title$')
  picture.write_html(kind, str(tmp_path / 'a.html'))
  assert pixels(tmp_path / 'a.png').shape[1] == picture.WIDTH


class Reader(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.tags, self.text = [], []

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_data(self, data):
    self.text.append(data)


def test_html_escapes_everything(tmp_path):
  evil = '<script>alert("1")</script>'
  kind = reading(words=[evil, '&amp;', "it's"])._replace(
    label='<b>good</b>', probabilities={'<b>good</b>': 1.0}
  )
  picture.write_html(kind, str(tmp_path / 'a.html'), title='<i>title</i>')
  reader = Reader()
  reader.feed((tmp_path / 'a.html').read_text())
  assert {tag for tag, _ in reader.tags} == {
    'html',
    'head',
    'meta',
    'title',
    'style',
    'body',
    'h1',
    'p',
    'span',
  }
  text = ''.join(reader.text)
  assert evil in text and '&amp;' in text and '<b>good</b>' in text and '<i>title</i>' in text
  spans = [attributes for tag, attributes in reader.tags if tag == 'span']
  assert len(spans) == 3 and all('by layer' in attributes['title'] for attributes in spans)


# ------------------------------------------------------------------------------------------------- By layers
def test_layers_are_drawn_where_words_are_seen(tmp_path):
  words = (Word('kept', '', (1.0, 1.0), -1), Word('gone', ' ', (1.0, 0.0), -1))
  one = reading(2)._replace(text='kept gone', words=words)
  layer_picture.write_layers({'top-k': one, 'dense': one}, str(tmp_path / 'a.png'), 'A title')
  drawn = pixels(tmp_path / 'a.png').astype(int)
  top = layer_picture.heading(words, 'A title')

  def cell(word, layer):
    x, y = layer_picture.LEFT + layer_picture.CELL * (word + 0.5), top + layer_picture.ROW * (layer + 0.5)
    return drawn[int(y), int(x)]

  full = np.array([0.86, 0.53, 0.10]) * 255
  assert np.abs(cell(0, 0) - full).max() <= 12 and np.abs(cell(0, 1) - full).max() <= 12
  assert np.abs(cell(1, 0) - full).max() <= 12 and cell(1, 1).min() > 235


def test_a_long_text_is_cut_and_other_texts_are_refused(tmp_path):
  layer_picture.write_layers({'m': reading(90)}, str(tmp_path / 'a.png'))
  assert (tmp_path / 'a.png').stat().st_size < 200_000
  with pytest.raises(UserError, match='one text'):
    layer_picture.write_layers({'a': reading(3), 'b': reading(4)}, str(tmp_path / 'b.png'))
  with pytest.raises(UserError, match='no words to draw'):
    layer_picture.write_layers({'a': reading(0)}, str(tmp_path / 'b.png'))
