"""Plots of studies, in one style."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.studies import METHODS

COLOURS = {
  'dense': '#333840', 'p': '#b8860b', 'pf': '#4477aa', 'pf_complement': '#66ccee', 'c_late': '#aa3377',
  'pfc_late': '#228833', 'pfc_early': '#ee6677',
}  # fmt: skip
PALETTE = ('#4477aa', '#ee6677', '#228833', '#b8860b', '#66ccee', '#aa3377', '#333840', '#9aa0aa',
           '#332288', '#44aa99', '#e07b39', '#882255', '#999933', '#7a5c3e', '#b9a0dc', '#c0d070')  # fmt: skip
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
PLOT_NOTE = (
  'Bars: 95% interval of the difference to dense. Band: half a point below dense.\n'
  'Points of nearly equal cost stand side by side.'
)


def look(place: int) -> dict[str, str]:
  """Colour and marker of the line at a place of a plot, no two alike among the first 128."""
  turn, colour = divmod(place, len(PALETTE))
  return {'color': PALETTE[colour], 'marker': MARKERS[(colour + turn) % len(MARKERS)]}


def figure(width: float = 9.2, height: float = 5.2) -> tuple[Any, Any]:
  """A figure and its axes in the style of all plots."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  canvas = FigureCanvasAgg(Figure(figsize=(width, height), dpi=110, layout='constrained', facecolor='white'))
  canvas.figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
  axes = canvas.figure.add_subplot()
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color('#9aa0aa')
  axes.grid(color='#e7e9ed', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors='#555b66', labelsize=10)
  return canvas.figure, axes


def titled(axes: Any, title: str, x: str, y: str) -> None:
  """Title and axis labels."""
  axes.set_title(title, loc='left', fontsize=13, fontweight='bold', color='#12171f', pad=12)
  axes.set_xlabel(x, fontsize=11, color='#333840')
  axes.set_ylabel(y, fontsize=11, color='#333840')


def legend(axes: Any) -> None:
  """Right of the plot, where there is something to name."""
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False, fontsize=10, loc='center left', bbox_to_anchor=(1.01, 0.5))


def rings(axes: Any, spots: Sequence[tuple[float, float]], label: str) -> None:
  """Rings around some points of other lines."""
  if spots:
    ring = {'markersize': 11, 'markerfacecolor': 'none', 'markeredgewidth': 1, 'color': '#12171f'}
    axes.plot(*zip(*spots), 'o', label=label, **ring)


def level(axes: Any, accuracy: float) -> None:
  """Dense: a dashed line, and a band of half a point below it; accuracy in percent."""
  axes.axhline(accuracy, color='#333840', linewidth=1, linestyle=(0, (4, 3)))
  axes.axhspan(accuracy - 0.5, accuracy, color='#333840', alpha=0.07, linewidth=0)


def side_by_side(places: Sequence[float], gap: float = 0.007) -> list[float]:
  """The places, moved right as far as is needed to keep them `gap` apart."""
  moved = list(places)
  order = sorted(range(len(places)), key=lambda i: places[i])
  for before, after in zip(order, order[1:]):
    moved[after] = max(moved[after], moved[before] + gap)
  return moved


def accuracy(path: pathlib.Path, title: str, summary: Sequence[Mapping[str, Any]]) -> None:
  """Accuracy against MAC ratio: a point a name, whose bar is the 95% interval of its difference to dense."""
  drawing, axes = figure()
  ran = [row for row in summary if row['accuracy']]
  dense = next((row for row in ran if row['name'] == 'dense'), None)
  for row, x in zip(ran, side_by_side([row['mac_ratio'] for row in ran])):
    y, colour = 100 * row['accuracy']['mean'], COLOURS[row['name']]
    if row['difference']:
      gain = row['difference']
      bars = [[100 * (gain['mean'] - gain['low'])], [100 * (gain['high'] - gain['mean'])]]
      axes.errorbar(x, y, yerr=bars, color=colour, elinewidth=1.6, capsize=4)
    axes.plot(x, y, 'o', color=colour, markersize=9, label=METHODS[row['name']][1])
  if dense:
    level(axes, 100 * dense['accuracy']['mean'])
  legend(axes)
  titled(axes, title, 'Multiply-adds, share of dense', 'Test accuracy in %')
  axes.text(0, -0.2, PLOT_NOTE,
            transform=axes.transAxes, fontsize=9, color='#555b66')  # fmt: skip
  drawing.savefig(path)


def keep(path: pathlib.Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Keys kept by layer, mean over seeds: a line a name."""
  drawing, axes = figure()
  longest = 1
  for name in dict.fromkeys(row['name'] for row in rows):
    ran = [row['keep_ratio_by_layer'] for row in rows if row['name'] == name and row['metrics']]
    if ran and name != 'dense':
      layers = np.arange(1, len(ran[0]) + 1)
      axes.plot(
        layers, 100 * np.mean(ran, axis=0), 'o-', color=COLOURS[name], markersize=6, label=METHODS[name][1]
      )
      longest = max(longest, len(layers))
  axes.set_xticks(range(1, longest + 1))
  axes.set_ylim(0, 105)
  legend(axes)
  titled(axes, title, 'Layer that runs', 'Keys a head attends to, % of the tokens')
  drawing.savefig(path)


def savings(path: pathlib.Path, title: str, rows: Sequence[Mapping[str, Any]], shape: Callable) -> None:
  """Removal efficiency by method, a marker a `shape(row)`: at 1 every multiply-add that is removed shows on the clock."""
  rows = [row for row in rows if not row['method'].startswith('dense')]
  methods, shapes = (list(dict.fromkeys(map(key, rows))) for key in (lambda row: row['method'], shape))
  drawing, axes = figure(height=1.8 + 0.3 * max(len(methods), 3))
  for place, name in enumerate(shapes):
    mine = [row for row in rows if shape(row) == name]
    spots = [row['efficiency'] for row in mine], [methods.index(row['method']) for row in mine]
    axes.plot(*spots, linestyle='', markersize=8, label=name, **look(place))
  axes.set_yticks(range(len(methods)), [cost_of(name, rows) for name in methods])
  axes.set_ylim(max(len(methods), 1) - 0.5, -0.5)
  axes.set_xlim(0, max([1.0, *(row['efficiency'] for row in rows)]) * 1.08)
  axes.axvline(1, color='#333840', linewidth=1, linestyle=(0, (4, 3)))
  legend(axes)
  titled(axes, title, 'Times as fast as the fastest dense x share of its MACs', 'Method (MACs)')
  drawing.savefig(path)


def cost_of(method: str, rows: Sequence[Mapping[str, Any]]) -> str:
  """'topk (0.50)', or the least and the most of its rows."""
  least, *_, most = [*sorted(f'{row["mac_ratio"]:.2f}' for row in rows if row['method'] == method)] * 2
  return f'{method} ({least})' if least == most else f'{method} ({least} to {most})'


def lengths(path: pathlib.Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
  """Times as fast as dense against length, of rows of one batch size: a line a method; below 1 it does not pay."""
  drawing, axes = figure()
  rows = sorted((row for row in rows if not row['method'].startswith('dense')), key=lambda row: row['length'])
  ends = []
  for place, method in enumerate(dict.fromkeys(row['method'] for row in rows)):
    mine = [row for row in rows if row['method'] == method]
    ends.append((mine[-1]['time_ratio'], place, mine))
  for _, place, mine in sorted(ends, key=lambda end: -end[0]):  # named in the order in which they end
    label = f'{mine[-1]["method"]} ({mine[-1]["mac_ratio"]:.2f} of the MACs)'
    x, y = [row['length'] for row in mine], [row['time_ratio'] for row in mine]
    axes.plot(x, y, linewidth=1.4, markersize=6, label=label, **look(place))
  axes.set_xscale('log', base=2)
  axes.set_yscale('log', base=2)
  for axis, values in (
    (axes.xaxis, [row['length'] for row in rows]),
    (axes.yaxis, (0.5, 0.7, 1, 1.4, 2, 4, 8)),
  ):
    axis.set_ticks(sorted(set(values)), [f'{value:g}' for value in sorted(set(values))])
  axes.axhline(1, color='#333840', linewidth=1, linestyle=(0, (4, 3)))
  legend(axes)
  titled(axes, title, 'Tokens', 'Times as fast as the fastest dense')
  drawing.savefig(path)
