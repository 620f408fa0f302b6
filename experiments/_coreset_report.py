"""Accuracy against seconds: rows, curves and the figure of `experiments.coreset`."""

from collections.abc import Sequence
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from experiments import _report
from l2rw_jax import base
from l2rw_jax.io import metric_writer
from l2rw_jax.io import workdir
from l2rw_jax.training import results as results_lib

# Test accuracies whose first second is told, in percent.
TARGETS = (80, 90, 95, 97)
# Of the seconds that all methods of a panel have: when to compare them.
_SHARES = {"quarter": 0.25, "half": 0.5, "equal": 1.0}
_SELECTIONS = "selections.json"

Rows = list[dict[str, Any]]


class Curve(NamedTuple):
  """One run's evaluations.

  Attributes:
    steps: [E].
    seconds: of training, [E].
    percent: test accuracy, [E].
  """

  steps: np.ndarray
  seconds: np.ndarray
  percent: np.ndarray

  def at(self, seconds: Any) -> Any:
    """Accuracy at these seconds, between evaluations in a straight line.

    NaN before the first evaluation, when nothing is known.
    """
    return np.interp(seconds, self.seconds, self.percent, left=np.nan)

  def reaches(self, percent: float) -> float | None:
    """Seconds to the first evaluation of at least this accuracy, or None."""
    there = np.flatnonzero(self.percent >= percent)
    return float(self.seconds[there[0]]) if there.size else None


def timed(method: base.Method, folder: pathlib.Path) -> base.Method:
  """The method, keeping in a file how long each of its selections takes."""
  if method.refresh is base.keep_state:
    return method
  path = folder / _SELECTIONS

  def refresh(state, problem, view):
    started = time.perf_counter()
    state = method.refresh(state, problem, view)
    seconds = workdir.read_record(path) if path.exists() else {}
    # By epoch: an interrupted run selects for its epoch again.
    seconds[str(view.epoch)] = time.perf_counter() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_record(path, seconds)
    return state

  return method._replace(refresh=refresh)


def row(
  facts: dict[str, Any], folder: pathlib.Path, result: results_lib.Result
) -> dict[str, Any]:
  """One run's line of `results.csv`, with its `curve`.

  Args:
    facts: entries to begin with.
    folder: of the run.
    result: of the run.
  """
  metrics = result.metrics
  timing = workdir.read_record(folder / "timing.json")
  if timing["untimed_steps"]:
    raise base.InputError(
      f"{folder / 'timing.json'} was damaged, and nobody knows how long the first"
      f" {timing['untimed_steps']} steps took. Delete {folder} to train again."
    )
  noted = timing["evaluations"]
  path = folder / f"seed-{metrics['seed']}"
  measured = {
    line["step"]: 100 * line["test/accuracy"]
    for line in metric_writer.read(path)
    if line.get("test/accuracy") is not None
  }
  steps, seconds = (np.array(column) for column in zip(*noted, strict=True))
  curve = Curve(steps, seconds, np.array([measured[step] for step in steps.tolist()]))
  selections = folder / _SELECTIONS
  spent = workdir.read_record(selections) if selections.exists() else {}
  return {
    **facts,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "balanced_percent": 100 * metrics["last"]["balanced_accuracy"],
    "seconds": float(seconds[-1]),
    "num_selections": len(spent),
    "selection_seconds": float(sum(spent.values())),
    **{f"seconds_to_{target}": curve.reaches(target) for target in TARGETS},
    **_report.run_fields(metrics),
    "curve": curve,
  }


def panel_of(row: dict[str, Any]) -> tuple[str, float]:
  """Where a row is drawn; all data are drawn in every panel of their model."""
  return row["model"], row["fraction"]


def panels(rows: Rows) -> dict[tuple[str, float], list[int]]:
  """Numbers of the rows of each panel."""
  partial = dict.fromkeys(panel_of(r) for r in rows if r["method"] != "full")
  names = list(partial) or list(dict.fromkeys(map(panel_of, rows)))
  return {
    name: [
      i
      for i, r in enumerate(rows)
      if r["model"] == name[0] and (r["method"] == "full" or panel_of(r) == name)
    ]
    for name in names
  }


def with_equal_seconds(rows: Rows) -> Rows:
  """The rows with accuracies at seconds that all methods of a model trained for.

  That is one number for each model and seed, the seconds of its first run to finish:
  the runs of a seed follow each other, and a machine is not always equally fast.
  """
  found = []
  for one in rows:
    beside = [r for r in rows if all(r[k] == one[k] for k in ("model", "seed"))]
    equal = min(r["seconds"] for r in beside)
    told = {
      f"percent_at_{name}": _or_none(one["curve"].at(share * equal))
      for name, share in _SHARES.items()
    }
    found.append({**one, "equal_seconds": equal, **told})
  return found


def _or_none(value: Any) -> float | None:
  return None if np.isnan(value) else float(value)


def save_curves(rows: Rows, curves: Sequence[Curve], path: pathlib.Path) -> None:
  """Writes every evaluation of every run as a line of CSV."""
  columns = ("model", "method", "fraction", "seed")
  lines = [",".join((*columns, "step", "seconds", "accuracy_percent"))]
  for own, curve in zip(rows, curves, strict=True):
    name = ",".join(str(own[column]) for column in columns)
    lines += [
      f"{name},{step},{seconds:.4f},{percent:.2f}"
      for step, seconds, percent in zip(*curve, strict=True)
    ]
  workdir.write_text(path, "\n".join(lines) + "\n")


def draw(rows: Rows, curves: Sequence[Curve], path: pathlib.Path) -> None:
  """Test accuracy against seconds, a row of panels a model and a column a fraction.

  A line is the mean over seeds as long as all of them train, its band the lowest and
  the highest.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  found = panels(rows)
  models = list(dict.fromkeys(model for model, _ in found))
  width = max(sum(m == model for m, _ in found) for model in models)
  figure, axes = plt.subplots(
    len(models), width, figsize=(4.2 * width, 3.2 * len(models)), squeeze=False
  )
  colors = {m: f"C{i}" for i, m in enumerate(dict.fromkeys(r["method"] for r in rows))}
  for ax in axes.ravel():
    ax.set_visible(False)
  for (model, fraction), members in found.items():
    column = [f for m, f in found if m == model].index(fraction)
    ax = axes[models.index(model), column]
    ax.set_visible(True)
    for method, color in colors.items():
      own = [curves[i] for i in members if rows[i]["method"] == method]
      if own:
        _draw_curve(ax, own, method, color)
    lowest = min(rows[i]["accuracy_percent"] for i in members)
    ax.set_ylim(bottom=max(0, lowest - 8))
    ax.set_xscale("log")
    ax.set_title(f"{rows[0]['dataset']}, {model}, {fraction:.0%}", fontsize=10)
    ax.set_xlabel("seconds of training and selecting")
    ax.set_ylabel("test accuracy (%)")
    ax.grid(linewidth=0.3)
  axes[0, 0].legend(fontsize=8, frameon=False, loc="lower right")
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _draw_curve(ax: Any, own: Sequence[Curve], method: str, color: str) -> None:
  first = max(curve.seconds[0] for curve in own)
  last = min(curve.seconds[-1] for curve in own)
  grid = np.geomspace(first, max(first, last), 200)
  values = np.stack([curve.at(grid) for curve in own])
  ax.plot(grid, values.mean(axis=0), color=color, label=method, linewidth=1.4)
  ax.fill_between(
    grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0
  )
