"""One picture of all published values next to the measured ones."""

from collections.abc import Sequence
import pathlib
import textwrap
from typing import Any, NamedTuple

import numpy as np

from experiments.tables import table as table_lib

# Number of characters of a title that fit in the width of the figure.
_TITLE_WIDTH = 110


class _Panel(NamedTuple):
  """The lines of a table that have a measured and a published value of one metric.

  Attributes:
    title: title of the table, with the settings that all its lines share.
    metric: name of the metric, with its unit.
    groups: pairs of a method and a value, by setting.
  """

  title: str
  metric: str
  groups: dict[str, list[tuple[str, table_lib.Value]]]

  @property
  def height(self) -> int:
    """Number of lines plus number of headings."""
    headings = sum(bool(setting) for setting in self.groups)
    return headings + sum(map(len, self.groups.values()))


def draw(tables: Sequence[table_lib.Table], path: pathlib.Path) -> bool:
  """Draws a panel per table and metric, with a line per setting and method.

  A dot is a measured value, and a diamond is a published one.

  Args:
    tables: the tables.
    path: the PNG file.

  Returns:
    Whether a file was written; False if there is no pair of a published and a measured
    value.
  """
  panels = [p for table in tables for p in _panels(table)]
  if not panels:
    return False
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  sizes = [panel.height for panel in panels]
  figure, axes = plt.subplots(
    len(panels),
    1,
    figsize=(9, 1.1 * len(panels) + 0.27 * sum(sizes)),
    height_ratios=[size + 1 for size in sizes],
    squeeze=False,
    layout="constrained",
  )
  for panel, ax in zip(panels, axes[:, 0], strict=True):
    _draw_panel(ax, panel)
  legend = axes[0, 0].get_legend_handles_labels()
  figure.legend(*legend, loc="outside upper right", ncols=2, fontsize=8)
  figure.savefig(path, dpi=130)
  plt.close(figure)
  return True


def _panels(table: table_lib.Table) -> list[_Panel]:
  varying, panels = table.varying(), []
  constant = table.say_constant(but=varying)
  title = f"{table.layout.title}: {constant}" if constant else table.layout.title
  for i in filter(table.has_published, table.metrics()):
    groups: dict[str, list[tuple[str, table_lib.Value]]] = {}
    for line in table.lines:
      if line.values[i].difference is not None:
        setting = groups.setdefault(table.say(line, varying), [])
        setting.append((line.method, line.values[i]))
    if groups:
      panels.append(_Panel(title, table.layout.metrics[i].heading, groups))
  return panels


def _draw_panel(ax: Any, panel: _Panel) -> None:
  labels, values, places, place = [], [], [], 0
  for setting, lines in panel.groups.items():
    if setting:
      ax.text(
        *(0.008, place, plain(setting)),
        transform=ax.get_yaxis_transform(),
        **{"fontsize": 8, "color": "0.35", "va": "center", "style": "italic"},
      )
      place += 1
    for method, value in lines:
      labels.append(method)
      values.append(value)
      places.append(place)
      place += 1
  middle = np.array(places, float)
  is_percent = panel.metric.rstrip().endswith("%")
  measured = [value.measured for value in values if value.measured is not None]
  shown = {
    "measured, 95% interval": [(m.mean, m.half_width) for m in measured],
    "published, with its ±": [(v.published or 0.0, v.spread or 0.0) for v in values],
  }
  for (label, numbers), form, color, shift in zip(
    shown.items(), "oD", ("C0", "C1"), (-0.13, 0.13), strict=True
  ):
    means, widths = (list(column) for column in zip(*numbers, strict=True))
    ax.errorbar(
      means,
      middle + shift,
      xerr=_errors(means, widths, is_percent),
      fmt=form,
      color=color,
      markersize=4,
      capsize=2,
      label=label,
    )
  ax.set_yticks(places, [plain(label) for label in labels], fontsize=8)
  ax.set_ylim(place - 0.4, -0.7)
  if is_percent:
    low, high = ax.get_xlim()
    ax.set_xlim(max(low, 0), min(high, 100))
  ax.set_xlabel(panel.metric, fontsize=8)
  ax.tick_params(axis="x", labelsize=8)
  title = textwrap.fill(plain(panel.title), _TITLE_WIDTH)
  ax.set_title(title, loc="left", fontsize=9)
  ax.grid(axis="x", linewidth=0.4)
  ax.set_axisbelow(True)


def _errors(
  means: Sequence[float], widths: Sequence[float], is_percent: bool
) -> np.ndarray:
  """Lengths of error bars [2, N]; those of percentages end at 0 and 100."""
  widths_known = np.nan_to_num(widths)
  if not is_percent:
    return np.stack([widths_known, widths_known])
  centers = np.array(means)
  left = np.minimum(widths_known, centers)
  return np.maximum([left, np.minimum(widths_known, 100 - centers)], 0)


def plain(text: str) -> str:
  """Text that Matplotlib shows as it is: two dollar signs would enclose a formula."""
  return text.replace("$", r"\$")
