"""The figure of the label-noise experiments, from rows alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from experiments import _panels


def draw(rows: list[dict[str, Any]], columns: Sequence[str], path: pathlib.Path):
  """A panel per noise: a bar per method, a dot a run, a diamond as published."""
  _panels.draw(
    rows,
    columns,
    path,
    draw_method=_draw_method,
    title=lambda *panel: " ".join(
      f"{p:g}" if isinstance(p, float) else str(p) for p in panel
    ),
    draw_legend=lambda ax: _draw_legend(ax, rows),
  )


def _draw_method(ax: Any, place: int, rows: list[dict[str, Any]]) -> None:
  values = [r["accuracy_percent"] for r in rows]
  color = "C7" if rows[0]["method"] == "uniform" else "C0"
  mean = np.mean(values)
  ax.barh(place, mean, color=color, height=0.7)
  ax.plot(values, [place] * len(values), "k.", markersize=4)
  ax.text(1.5, place, f"{mean:.1f}", va="center", color="white", fontsize=8)
  if rows[0]["published_percent"] is not None:
    ax.plot(rows[0]["published_percent"], place, "D", color="C1", markersize=5)
  ax.set_xlim(0, 100)


def _draw_legend(ax: Any, rows: list[dict[str, Any]]) -> None:
  ax.plot([], [], "k.", label="one seed")
  if any(r["published_percent"] is not None for r in rows):
    ax.plot([], [], "D", color="C1", label="published mean")
