"""A row of panels with one line a method, as the comparisons draw them."""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

Row = dict[str, Any]


def draw(
  rows: Sequence[Row],
  columns: Sequence[str],
  path: pathlib.Path,
  *,
  draw_method: Callable[[Any, int, list[Row]], None],
  title: Callable[..., str],
  draw_legend: Callable[[Any], None],
) -> None:
  """Draws a panel for every setting; methods share the vertical axis.

  Args:
    rows: of results.
    columns: what tells settings apart.
    path: of the PNG.
    draw_method: `(axes, height, rows of one method in one panel)`.
    title: of a panel, from its values of `columns`.
    draw_legend: on the axes of the last panel.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  panels = list(dict.fromkeys(tuple(r[c] for c in columns) for r in rows))
  methods = list(dict.fromkeys(r["method"] for r in rows))
  figure, axes = plt.subplots(
    1,
    len(panels),
    figsize=(2.3 + 3.7 * len(panels), 1.5 + 0.38 * len(methods)),
    sharey=True,
    squeeze=False,
  )
  for panel, ax in zip(panels, axes[0], strict=True):
    here = [r for r in rows if tuple(r[c] for c in columns) == panel]
    for place, method in enumerate(methods):
      own = [r for r in here if r["method"] == method]
      if own:
        draw_method(ax, place, own)
    ax.set_title(title(*panel), fontsize=10)
    ax.set_xlabel("test accuracy (%), last step")
  axes[0, 0].set_yticks(range(len(methods)), methods)
  axes[0, 0].invert_yaxis()
  draw_legend(axes[0, -1])
  axes[0, -1].legend(
    fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
  )
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)
