"""One picture of all published values next to the measured ones."""

from collections.abc import Sequence
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.tables import table as table_lib


class _Panel(NamedTuple):
  """The lines of one metric of one table that have a published value."""

  title: str
  metric: str
  labels: list[str]
  values: list[table_lib.Value]


def draw(tables: Sequence[table_lib.Table], path: pathlib.Path) -> bool:
  """A panel per experiment, a line per method: a dot is measured, a diamond published.

  Returns:
    Whether there was anything to draw: some published value.
  """
  panels = [p for table in tables for p in _panels(table)]
  if not panels:
    return False
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  sizes = [len(panel.labels) for panel in panels]
  figure, axes = plt.subplots(
    len(panels),
    1,
    figsize=(11, 1.3 * len(panels) + 0.32 * sum(sizes)),
    height_ratios=[size + 1 for size in sizes],
    squeeze=False,
    layout="constrained",
  )
  for panel, ax in zip(panels, axes[:, 0], strict=True):
    _draw_panel(ax, panel)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right")
  figure.savefig(path, dpi=150)
  plt.close(figure)
  return True


def _panels(table: table_lib.Table) -> list[_Panel]:
  varying, panels = table.varying(), []
  for i in filter(table.has_published, table.metrics()):
    lines = [line for line in table.lines if line.values[i].difference is not None]
    names = [(line.method, table.say(line, varying)) for line in lines]
    labels = [f"{method}, {where}" if where else method for method, where in names]
    heading = table.layout.metrics[i].heading
    values = [line.values[i] for line in lines]
    panels.append(_Panel(table.layout.title, heading, labels, values))
  return panels


def _draw_panel(ax: Any, panel: _Panel) -> None:
  places = np.arange(len(panel.labels))
  measured = [v.measured for v in panel.values if v.measured is not None]
  ax.errorbar(
    [interval.mean for interval in measured],
    places - 0.13,
    xerr=np.nan_to_num([interval.half_width for interval in measured]),
    fmt="o",
    color="C0",
    capsize=2,
    label="measured, 95% interval",
  )
  ax.errorbar(
    [value.published for value in panel.values],
    places + 0.13,
    xerr=[value.spread or 0.0 for value in panel.values],
    fmt="D",
    color="C1",
    markersize=5,
    capsize=2,
    label="published, with its ±",
  )
  # A label from a results file must not be read as a formula of TeX.
  ax.set_yticks(places, [label.replace("$", r"\$") for label in panel.labels])
  ax.invert_yaxis()
  ax.set_xlabel(panel.metric)
  ax.set_title(panel.title, loc="left", fontsize=10)
  ax.grid(axis="x", linewidth=0.4)
  ax.set_axisbelow(True)
