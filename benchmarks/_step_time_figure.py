"""Figures of the results of `step_time`: one of all rows, and a smaller one of L2RW."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

Row = Mapping[str, Any]
_COLORS = {
  "double backward": "C1",
  "literal": "0.65",
  "forward": "C9",
  "layerwise": "C0",
  None: "C2",
}
_LABELS = {
  None: "l2rw_jax, plain training",
  "double backward": "PyTorch, double backward",
  "literal": "JAX, jax.grad through the step",
  "forward": "l2rw_jax, forward mode",
  "layerwise": "l2rw_jax, layer by layer",
}


_FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}


def draw(rows: Sequence[Row], folder: pathlib.Path) -> list[str]:
  """Writes figure.png and, if L2RW was timed in JAX or eager PyTorch, l2rw.png.

  Args:
    rows: the rows of `results.json`.
    folder: the folder to write the files to.

  Returns:
    The names of the files.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figures = {"figure.png": _all_rows(plt, rows)}
  eager = [r for r in rows if r["framework"] != "torch.compile"]
  if any(r["method"] == "l2rw" for r in eager):
    figures["l2rw.png"] = _l2rw(plt, eager)
  for name, figure in figures.items():
    figure.savefig(folder / name, dpi=130, bbox_inches="tight")
    plt.close(figure)
  return list(figures)


def _all_rows(plt, rows):
  """Draws, for each network, the time of each step relative to a plain step."""
  networks = list(dict.fromkeys(r["network"] for r in rows))
  ways = _ways(rows)
  figure, axes = plt.subplots(
    1,
    len(networks),
    figsize=(2.6 + 2.7 * len(networks), 1.6 + 0.34 * len(ways)),
    sharey=True,
    squeeze=False,
    layout="constrained",
  )
  for network, ax in zip(networks, axes[0], strict=True):
    of_network = [r for r in rows if r["network"] == network]
    _bars(ax, of_network, ways)
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
    first = of_network[0]
    title = f"{network}, batch size {first['batch_size']}, {first['dtype']}"
    speeds = {
      r["framework"]: r["examples_per_second"]
      for r in of_network
      if r["method"] == "plain"
    }
    for name, speed in speeds.items():
      title += f"\n{_FRAMEWORKS.get(name, name)}, plain: {speed:,.0f} examples/s"
    ax.set_title(title, fontsize=8)
    ax.margins(x=0.16)
    ax.set_xlabel("time per step / plain", fontsize=9)
  axes[0, 0].set_yticks(range(len(ways)), [_name(*way) for way in ways])
  axes[0, 0].set_ylim(len(ways) - 0.4, -0.6)
  shares = _shares(rows)
  handles = [
    plt.Rectangle((0, 0), 1, 1, color="0.3", alpha=_alpha(share, shares))
    for share in shares
  ]
  labels = [f"meta batch {share:g} x batch" for share in shares]
  if shares:
    labels[0] += ", or no meta batch"
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels))
  figure.suptitle(_machine(rows[0]), x=0.01, ha="left", fontsize=10)
  return figure


def _shares(rows):
  return sorted({r["meta_share"] for r in rows if r["meta_share"]}, reverse=True)


def _alpha(share, shares):
  """The opacity of a bar: smaller meta batches are paler."""
  return 1 if share is None else 1 - 0.7 * shares.index(share) / len(shares)


def _ways(rows):
  """The implementations that were timed: tuples of method, engine and framework."""
  ways = [(r["method"], r["engine"], r["framework"]) for r in rows]
  # Group the implementations of each method, with PyTorch first.
  order = list(dict.fromkeys(method for method, _, _ in ways))
  return sorted(
    dict.fromkeys(ways), key=lambda way: (order.index(way[0]), way[2] == "jax")
  )


def _bars(ax, rows, ways):
  """Draws a horizontal bar per implementation and size of the meta batch."""
  shares = _shares(rows)
  for place, way in enumerate(ways):
    bars = [r for r in rows if (r["method"], r["engine"], r["framework"]) == way]
    bars = sorted(bars, key=lambda r: -(r["meta_share"] or 0))
    for i, row in enumerate(bars):
      height = 0.8 / len(bars)
      y = place - 0.4 + (i + 0.5) * height
      color = "C1" if row["framework"] != "jax" else _COLORS[row["engine"]]
      alpha = _alpha(row["meta_share"], shares)
      ax.barh(y, row["ratio"], height, color=color, alpha=alpha)
      text = f" {row['ratio']:.2f}"
      ax.annotate(text, (row["ratio"], y), va="center", fontsize=7)


def _name(method, engine, framework):
  engine = "" if engine is None else f", {engine}"
  return {"jax": "", "torch": "PyTorch: "}.get(framework, f"{framework}: ") + (
    method + engine
  )


def _l2rw(plt, rows):
  """Draws L2RW's time relative to plain training and, below, speedups over PyTorch."""
  l2rw = [r for r in rows if r["method"] == "l2rw"]
  shares, networks = _shares(l2rw), list(dict.fromkeys(r["network"] for r in l2rw))
  panels = ["ratio"]
  if any(r["faster_than_torch"] for r in l2rw):
    panels.append("faster_than_torch")
  figure, axes = plt.subplots(
    len(panels),
    len(shares),
    figsize=(1.5 + len(shares) * (0.8 + 1.1 * len(networks)), 0.6 + 2.9 * len(panels)),
    sharey="row",
    squeeze=False,
    layout="constrained",
  )
  plain = [r for r in rows if r["method"] == "plain"]
  for share, column in zip(shares, axes.T, strict=True):
    of_share = [r for r in l2rw if r["meta_share"] == share]
    column[0].set_title(f"meta batch {share:g} x batch")
    for panel, ax in zip(panels, column, strict=True):
      drawn = of_share if panel == "ratio" else of_share + plain
      _vertical_bars(ax, drawn, networks, panel)
  axes[0, 0].set_ylabel("time / plain training\nin the same framework")
  axes[-1, 0].set_ylabel("time in PyTorch /\ntime in JAX (higher is better)")
  if len(panels) == 1:
    axes[0, 0].set_ylabel("time / plain training")
  handles = dict(zip(*axes[-1, 0].get_legend_handles_labels()[::-1], strict=True))
  handles |= dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1], strict=True))
  figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
  figure.suptitle(f"L2RW: {_machine(rows[0])}", fontsize=9, y=-0.01, va="top")
  return figure


def _vertical_bars(ax, rows, networks, name):
  """Draws a bar for each network and engine with a known value of the column `name`."""
  rows = [r for r in rows if r[name]]
  engines = [e for e in _LABELS if any(r["engine"] == e for r in rows)]
  width = 0.8 / max(1, len(engines))
  for i, engine in enumerate(engines):
    values = {r["network"]: r[name] for r in rows if r["engine"] == engine}
    heights = [values.get(network, np.nan) for network in networks]
    places = np.arange(len(networks)) - 0.4 + (i + 0.5) * width
    bars = ax.bar(places, heights, width, color=_COLORS[engine], label=_LABELS[engine])
    ax.bar_label(bars, ["" if np.isnan(h) else f"{h:.1f}" for h in heights], fontsize=6)
  ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
  ax.set_xlim(-0.6, len(networks) - 0.4)
  ax.margins(y=0.1)
  ax.set_xticks(range(len(networks)), networks, rotation=20, ha="right", fontsize=8)


def _machine(row):
  versions = f"jax {row['jax']}" + (f", torch {row['torch']}" if row["torch"] else "")
  where = row["device_kind"]
  if row["platform"] == "cpu":
    where = f"{row['cpus']} CPU core{'s' if row['cpus'] > 1 else ''}"
  policy = row["omp_wait_policy"]
  waiting = "" if policy in (None, "default") else f", OMP_WAIT_POLICY={policy}"
  return f"{where}, {versions}, {row['dtype']}{waiting}"
