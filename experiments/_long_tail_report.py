"""Columns and the figure of the long-tail experiments."""

import pathlib
from typing import Any

import numpy as np

from l2rw_jax.training import evaluation

_PANEL = ("dataset", "builder", "shape", "imbalance")
_SHOTS = {f"{name}_percent": f"{name}-shot" for name in evaluation.SHOTS}
_COLORS = {"many_percent": "C2", "medium_percent": "C1", "few_percent": "C3"}


def measured(last: dict[str, float]) -> dict[str, float | None]:
  """A row's columns beside the accuracy.

  Args:
    last: what the evaluators told at the last step.

  Returns:
    In percent; None for a group that has no class.
  """
  names = {"balanced_percent": "balanced_accuracy"}
  names |= {f"{name}_percent": f"{name}_shot_accuracy" for name in evaluation.SHOTS}
  return {
    column: 100 * last[name] if name in last else None for column, name in names.items()
  }


def thresholds(rows: list[dict[str, Any]]) -> str:
  """What many and few mean, a line per tail."""
  found = {(r["shape"], r["imbalance"], r["many_above"], r["few_below"]) for r in rows}
  return "\n".join(
    f"{shape} {imbalance:g}: many-shot classes have more than {many} training images,"
    f" few-shot ones less than {few}."
    for shape, imbalance, many, few in sorted(found)
  )


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """A panel per tail, a line per method from its few- to its many-shot classes.

  The bar is the accuracy, a dot a run, a diamond as published.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  panels = list(dict.fromkeys(tuple(r[c] for c in _PANEL) for r in rows))
  methods = list(dict.fromkeys(r["method"] for r in rows))
  figure, axes = plt.subplots(
    1,
    len(panels),
    figsize=(2.4 + 3.8 * len(panels), 1.5 + 0.4 * len(methods)),
    sharey=True,
    squeeze=False,
  )
  for panel, ax in zip(panels, axes[0], strict=True):
    here = [r for r in rows if tuple(r[c] for c in _PANEL) == panel]
    for i, method in enumerate(methods):
      own = [r for r in here if r["method"] == method]
      if own:
        _draw_method(ax, i, own)
    dataset, builder, shape, imbalance = panel
    ax.set_title(f"{dataset}, {shape} {imbalance:g} ({builder})", fontsize=10)
    ax.set_xlabel("test accuracy (%), last step")
    ax.grid(axis="x", linewidth=0.4)
    ax.set_axisbelow(True)
  axes[0, 0].set_yticks(range(len(methods)), methods)
  axes[0, 0].invert_yaxis()
  _draw_legend(axes[0, -1], rows)
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)


def _draw_method(ax: Any, place: int, rows: list[dict[str, Any]]) -> None:
  shots = {c: np.mean([r[c] for r in rows]) for c in _SHOTS if rows[0][c] is not None}
  ax.hlines(place, min(shots.values()), max(shots.values()), color="0.75", zorder=1)
  for column, mean in shots.items():
    ax.plot(mean, place, "o", color=_COLORS[column], markersize=5)
  values = [r["accuracy_percent"] for r in rows]
  ax.plot(np.mean(values), place, "k|", markersize=15, markeredgewidth=2)
  ax.plot(values, [place] * len(values), "k.", markersize=3)
  if rows[0]["published_percent"] is not None:
    ax.plot(rows[0]["published_percent"], place, "D", color="C4", markersize=5)


def _draw_legend(ax: Any, rows: list[dict[str, Any]]) -> None:
  for column, told in _SHOTS.items():
    if any(r[column] is not None for r in rows):
      ax.plot([], [], "o", color=_COLORS[column], label=f"{told} classes")
  ax.plot([], [], "k|", markersize=10, markeredgewidth=2, label="all (dots: seeds)")
  if any(r["published_percent"] is not None for r in rows):
    ax.plot([], [], "D", color="C4", label="published, all")
  ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
