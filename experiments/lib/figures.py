"""Figures that several scripts draw."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import pathlib
import textwrap
from typing import Any

import numpy as np

from experiments.lib import report
from experiments.lib import runner
from experiments.tables import figure as table_figure
from l2rw_jax import processes

Row = report.Row
plain = table_figure.plain
# Number of characters that fit into the width of a panel of `panels`.
_TITLE_WIDTH = 50


@contextlib.contextmanager
def figure(
  path: pathlib.Path, *shape: int, **options: Any
) -> Iterator[tuple[Any, Any]]:
  """Yields a figure and its axes; process 0 writes the figure to a file at the end.

  Args:
    path: path of the PNG file.
    *shape: number of rows and columns of axes.
    **options: options of `plt.subplots`. `tight` selects a tight bounding box, for
      legends outside of the axes.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  tight = options.pop("tight", False)
  drawn, axes = plt.subplots(*shape, **options)
  try:
    yield drawn, axes
    if not tight:
      drawn.tight_layout()
    if processes.is_first():
      drawn.savefig(path, dpi=150, bbox_inches="tight" if tight else None)
  finally:
    plt.close(drawn)


def panels(
  rows: Sequence[Row],
  columns: Sequence[str],
  path: pathlib.Path,
  *,
  draw_method: Callable[[Any, int, list[Row]], None],
  add_legend_entries: Callable[[Any], None],
  title: Callable[..., str],
) -> None:
  """Draws a panel for every setting; the methods are on a shared vertical axis.

  Args:
    rows: rows of results.
    columns: columns whose values distinguish settings.
    path: path of the PNG file.
    draw_method: `(axes, place, rows)`, a function that draws the rows of one method at
      the vertical position `place` of one panel.
    add_legend_entries: a function that adds the entries of the legend to the axes of
      the last panel.
    title: a function that returns the title of a panel from its values of `columns`.
  """
  settings = report.grouped(rows, *columns)
  methods = list(report.grouped(rows, "method"))
  size = (2.3 + 3.7 * len(settings), 1.5 + 0.38 * len(methods))
  options = {"figsize": size, "sharey": True, "squeeze": False, "tight": True}
  with figure(path, 1, len(settings), **options) as (_, axes):
    for (setting, here), ax in zip(settings.items(), axes[0], strict=True):
      for method, chosen in report.grouped(here, "method").items():
        draw_method(ax, methods.index(method), chosen)
      ax.set_title(_wrapped(plain(title(*setting))), fontsize=10)
      ax.set_xlabel(f"{rows[0].get('evaluate_on', 'test')} accuracy (%), last step")
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].invert_yaxis()
    add_legend_entries(axes[0, -1])
    legend_at_right(axes[0, -1])


def _wrapped(title: str) -> str:
  """A title whose lines are not wider than a panel."""
  lines = title.splitlines()
  return "\n".join(textwrap.fill(line, _TITLE_WIDTH) for line in lines)


def legend_at_right(axes: Any, *handles: Any) -> None:
  """Draws the legend of axes, or of a figure, to their right."""
  axes.legend(
    *handles, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
  )


def few_log_ticks(axes: Any) -> None:
  """Labels a logarithmic horizontal axis with 1, 2 and 5 in each decade."""
  from matplotlib import ticker

  axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def clipped_errors(
  intervals: Sequence[report.Interval], low: float = 0.0, high: float = 100.0
) -> np.ndarray:
  """Lengths [2, N] of error bars that are clipped at `low` and `high`."""
  means = np.array([interval.mean for interval in intervals])
  widths = np.nan_to_num([interval.half_width for interval in intervals])
  return np.clip(
    [np.minimum(widths, means - low), np.minimum(widths, high - means)], 0, None
  )


def grouped_bars(
  axes: Any, values: Mapping[str, Sequence[Sequence[float]]], groups: Sequence[str]
) -> dict[str, np.ndarray]:
  """Draws groups of bars: mean percentages with 95% intervals, and dots for runs.

  Args:
    axes: axes on which to draw.
    values: maps the label of a bar to the values of its runs in each group. Without
      values, there is no bar.
    groups: labels of the groups.

  Returns:
    Maps the label of a bar to its left edge in each group.
  """
  width, edges = 0.8 / len(values), {}
  for i, (label, runs) in enumerate(values.items()):
    places = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
    known = [i for i, run in enumerate(runs) if len(run)]
    intervals = [report.interval(runs[i]) for i in known]
    means, errors = [interval.mean for interval in intervals], clipped_errors(intervals)
    axes.bar(places[known], means, width * 0.9, yerr=errors, capsize=2, label=label)
    for place, run in zip(places + 0.3 * width, runs, strict=True):
      axes.plot([place] * len(run), run, "k.", markersize=3)
    edges[label] = places - 0.45 * width
  axes.set_xticks(range(len(groups)), groups)
  return edges


def accuracies(rows: Sequence[Row], columns: Sequence[str], path: pathlib.Path) -> None:
  """Draws accuracies in a panel per setting, with the titles of `setting_title`.

  A panel has a bar for each method, a dot for each run, and a diamond for a published
  value.
  """

  def add_legend_entries(ax):
    ax.plot([], [], "k.", label="one seed")
    if any(r["published_percent"] is not None for r in rows):
      ax.plot([], [], "D", color="C1", label="published mean")

  panels(
    rows,
    columns,
    path,
    draw_method=_draw_accuracy,
    add_legend_entries=add_legend_entries,
    title=lambda *values: setting_title(
      rows[0] | dict(zip(columns, values, strict=True)), columns
    ),
  )


# How a title shows these settings; it shows all others as they are.
_FACTS = {
  "preset": "preset {}",
  "pixels": "{} pixels",
  "initialization": "{} initialization",
  "fraction": "fraction {:g}",
  "num_steps": "{:,} steps",
}


def setting_title(row: Row, columns: Sequence[str]) -> str:
  """The settings of a row, as the lines of a title.

  The last line has `columns`. The first line has the data set, the network and the
  preset, except those that are in `columns`. It also has the learning-rate schedule if
  a flag selects the schedule, or if it is a cosine or follows a plateau. A line between
  them has the range of the pixels and the initial parameters, if the row has them.
  """

  def facts(names):
    return [
      _FACTS.get(name, "{}").format(row[name])
      for name in names
      if row.get(name) is not None
    ]

  shared = facts(n for n in ("dataset", "network", "preset") if n not in columns)
  implied = [k for k in ("cosine", "plateau_steps") if row.get(k)]
  schedule = row.get("schedule") or next(iter(implied), None)
  if schedule is not None:
    shared.append(f"{schedule.removesuffix('_steps')} learning rate")
  inputs = facts(n for n in ("pixels", "initialization") if n not in columns)
  return "\n".join(", ".join(line) for line in (shared, inputs, facts(columns)) if line)


def _draw_accuracy(ax: Any, place: int, rows: list[Row]) -> None:
  values = [r["accuracy_percent"] for r in rows]
  color = "C7" if rows[0]["method"] == "uniform" else "C0"
  mean = np.mean(values)
  ax.barh(place, mean, color=color, height=0.7)
  ax.plot(values, [place] * len(values), "k.", markersize=4)
  ax.text(1.5, place, f"{mean:.1f}", va="center", color="white", fontsize=8)
  if rows[0]["published_percent"] is not None:
    # The diamond is below the dots of the seeds, which it would otherwise hide.
    ax.plot(rows[0]["published_percent"], place + 0.27, "D", color="C1", markersize=4)
  ax.set_xlim(0, 100)


def meta_weight_net_curves(
  cells: Sequence[runner.Cell], folder: pathlib.Path, name: str
) -> list[str]:
  """Draws the weights against the loss for each Meta-Weight-Net cell that saved them.

  Args:
    cells: cells of all methods.
    folder: folder of the experiment.
    name: name of a figure, in which {FACT} is replaced with that fact of the cell.

  Returns:
    The names of the figures.
  """
  names = {
    name.format(**cell.facts): cell
    for cell in cells
    if cell.method_name == "meta_weight_net"
  }
  return [n for n, cell in names.items() if _draw_curves(cell, folder, folder / n)]


def _draw_curves(cell: runner.Cell, folder: pathlib.Path, path: pathlib.Path) -> bool:
  """Draws the first seed's weights at several epochs; returns whether any are saved."""
  seeds, place = next(iter(cell.groups()))
  files = sorted((folder / place / "curves" / f"seed-{seeds[0]}").glob("epoch-*.txt"))
  if not files:
    return False
  with figure(path, figsize=(6.2, 3.4), tight=True) as (_, axes):
    for i in sorted({round(i) for i in np.linspace(0, len(files) - 1, 7)}):
      epoch = int(files[i].stem.removeprefix("epoch-"))
      color = _viridis(0.9 * i / max(1, len(files) - 1))
      label = f"before epoch {epoch}"
      axes.plot(runner.LOSS_GRID, np.loadtxt(files[i]), color=color, label=label)
    axes.set_xlabel("training loss of an example")
    axes.set_ylabel("weight V (before averaging)")
    axes.set_ylim(0, 1)
    noise = f"{cell.facts['noise']} {cell.facts['fraction']}"
    axes.set_title(f"Meta-Weight-Net's weights, {noise}", fontsize=10)
    legend_at_right(axes)
  return True


def _viridis(share: float) -> Any:
  from matplotlib import pyplot as plt

  return plt.get_cmap("viridis")(share)


def rejections(axes: Any, columns: list[dict[str, np.ndarray]]) -> None:
  """Draws a histogram of the share of steps with weight zero, over all seeds.

  Args:
    axes: axes on which to draw.
    columns: columns of the `weights.csv` of each run.
  """
  share = np.concatenate([report.rejected_share(w) for w in columns])
  is_clean = np.concatenate([w["label"] == w["true_label"] for w in columns])
  known = np.isfinite(share)
  bins = np.linspace(0, 1, 41)
  for chosen, label, color in (
    (is_clean, "clean label", "C0"),
    (~is_clean, "flipped label", "C3"),
  ):
    axes.hist(share[chosen & known], bins, alpha=0.6, label=label, color=color)
  parts = []
  for name, statistic in (
    ("zero weights", report.rejection_auroc),
    ("mean weight", report.auroc),
  ):
    scores = [s for s in map(statistic, columns) if s is not None]
    parts += [f"{name} {np.mean(scores):.3f}"] if scores else []
  aurocs = f"\nAUROC: {', '.join(parts)}" if parts else ""
  axes.set_title(f"L2RW's rejections{aurocs}")
  axes.set_xlabel("share of steps with weight zero")
  axes.set_ylabel("training examples")
  # Matplotlib warns if choosing the best place for the legend takes long.
  axes.legend(loc="upper right")
