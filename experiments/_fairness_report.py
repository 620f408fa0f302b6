"""The rows and the figure of `experiments.fairness`."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from experiments import _report

# Column of a row: its heading, what `evaluation.equal_opportunity` calls it.
MEASURES = {
  "accuracy_percent": ("accuracy %", "accuracy"),
  "worst_group_percent": ("worst group %", "worst_group_accuracy"),
  "worst_cell_percent": ("worst class and group %", "worst_cell_accuracy"),
  "gap_max_percent": ("largest TPR gap %", "tpr_gap_max"),
  "gap_mean_percent": ("mean TPR gap %", "tpr_gap_mean"),
}


def row(
  dataset: str,
  groups: str,
  method: str,
  percent: int | None,
  kept: str,
  metrics: dict[str, Any],
) -> dict[str, Any]:
  """One run's line of `results.csv`.

  Args:
    dataset: of the run.
    groups: "class" or "inverted".
    method: that trained it or, condensed, whose weights chose its images.
    percent: of the images it was trained on uniformly; None for all, by `method`.
    kept: "top" or "random"; "" for all.
    metrics: content of its own `results.json`.
  """
  last = metrics["last"]
  measured = {
    column: None if name not in last else 100 * last[name]
    for column, (_, name) in MEASURES.items()
  }
  return {
    "dataset": dataset,
    "groups": groups,
    "method": method,
    "kept_percent": percent,
    "kept": kept,
    **measured,
    **_report.run_fields(metrics),
  }


def label(one: Mapping[str, Any]) -> str:
  """What a row's method is called in the table."""
  if one["kept_percent"] is None:
    return one["method"]
  by = f" by {one['method']}" if one["kept"] == "top" else ""
  return f"uniform on {one['kept']} {one['kept_percent']}%{by}"


def _columns(rows: list[dict[str, Any]]) -> list[str]:
  return [column for column in MEASURES if rows[0][column] is not None]


def _interval(rows: list[dict[str, Any]], name: str, column: str) -> _report.Interval:
  return _report.interval([r[column] for r in rows if label(r) == name])


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Bars of every measure by method; with condensation, its curves beside them."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  whole = [r for r in rows if r["kept_percent"] is None]
  smaller = [r for r in rows if r["kept_percent"] is not None]
  figure, axes = plt.subplots(
    1, 1 + bool(smaller), figsize=(9 + 5 * bool(smaller), 3.8), squeeze=False
  )
  _draw_bars(axes[0, 0], whole)
  if smaller:
    _draw_curves(axes[0, 1], whole, smaller)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
  columns, names = _columns(rows), list(dict.fromkeys(map(label, rows)))
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    places = np.arange(len(columns)) + (i - (len(names) - 1) / 2) * width
    found = [_interval(rows, name, column) for column in columns]
    errors = [np.nan_to_num(f.half_width) for f in found]
    means = [f.mean for f in found]
    axes.bar(places, means, width * 0.9, yerr=errors, capsize=2, label=name)
    for place, column in zip(places, columns, strict=True):
      values = [r[column] for r in rows if label(r) == name]
      axes.plot([place] * len(values), values, "k.", markersize=3)
  axes.set_xticks(range(len(columns)), [MEASURES[c][0] for c in columns], fontsize=8)
  axes.set_ylabel("mean and 95% interval, a dot a seed")
  axes.set_title(f"{rows[0]['dataset']}, groups: {rows[0]['groups']}")
  axes.set_ylim(0, 105)
  axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _draw_curves(
  axes: Any, whole: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> None:
  percents = sorted({r["kept_percent"] for r in rows})
  for column, line in (("accuracy_percent", "--"), ("worst_group_percent", "-")):
    heading = MEASURES[column][0]
    for kept, color in (("top", "C3"), ("random", "C0")):
      means = [
        np.mean(
          [r[column] for r in rows if (r["kept"], r["kept_percent"]) == (kept, percent)]
        )
        for percent in percents
      ]
      axes.plot(percents, means, f"{color}o{line}", label=f"{kept}: {heading}")
    uniform = [r[column] for r in whole if r["method"] == "uniform"]
    if uniform:
      axes.axhline(np.mean(uniform), color="black", linestyle=line, linewidth=0.8)
  axes.set_xlabel("% of the training set kept (black: uniform on all)")
  axes.set_title(f"uniform on a part, top by {rows[0]['method']} weight")
  axes.set_ylim(0, 105)
  axes.legend(fontsize=7)
