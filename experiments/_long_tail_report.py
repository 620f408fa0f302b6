"""Columns and the figure of the long-tail experiments."""

import pathlib
from typing import Any

import numpy as np

from experiments import _panels
from l2rw_jax.training import evaluation

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
  _panels.draw(
    rows,
    ("dataset", "builder", "shape", "imbalance"),
    path,
    draw_method=_draw_method,
    title=lambda dataset, builder, shape, imbalance: (
      f"{dataset}, {shape} {imbalance:g} ({builder})"
    ),
    draw_legend=lambda ax: _draw_legend(ax, rows),
  )


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
  ax.grid(axis="x", linewidth=0.4)
  ax.set_axisbelow(True)


def _draw_legend(ax: Any, rows: list[dict[str, Any]]) -> None:
  for column, told in _SHOTS.items():
    if any(r[column] is not None for r in rows):
      ax.plot([], [], "o", color=_COLORS[column], label=f"{told} classes")
  ax.plot([], [], "k|", markersize=10, markeredgewidth=2, label="all (dots: seeds)")
  if any(r["published_percent"] is not None for r in rows):
    ax.plot([], [], "D", color="C4", label="published, all")
