"""The figure of the label-noise experiments, from rows alone."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np


def draw(rows: list[dict[str, Any]], columns: Sequence[str], path: pathlib.Path):
  """A panel per noise: a bar per method, a dot a run, a diamond as published."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  panels = list(dict.fromkeys(tuple(r[c] for c in columns) for r in rows))
  methods = list(dict.fromkeys(r["method"] for r in rows))
  figure, axes = plt.subplots(
    1,
    len(panels),
    figsize=(2.2 + 3.6 * len(panels), 1.4 + 0.36 * len(methods)),
    sharey=True,
    squeeze=False,
  )
  for panel, ax in zip(panels, axes[0], strict=True):
    here = [r for r in rows if tuple(r[c] for c in columns) == panel]
    for i, method in enumerate(methods):
      own = [r for r in here if r["method"] == method]
      if not own:
        continue
      values = [r["accuracy_percent"] for r in own]
      color = "C7" if method == "uniform" else "C0"
      ax.barh(i, np.mean(values), color=color, height=0.7)
      ax.plot(values, [i] * len(values), "k.", markersize=4)
      ax.text(1.5, i, f"{np.mean(values):.1f}", va="center", color="white", fontsize=8)
      if own[0]["published_percent"] is not None:
        ax.plot(own[0]["published_percent"], i, "D", color="C1", markersize=5)
    told = (f"{p:g}" if isinstance(p, float) else str(p) for p in panel)
    ax.set_title(" ".join(told), fontsize=10)
    ax.set_xlim(0, 100)
    ax.set_xlabel("test accuracy (%), last step")
  axes[0, 0].set_yticks(range(len(methods)), methods)
  axes[0, 0].invert_yaxis()
  axes[0, -1].plot([], [], "k.", label="one seed")
  if any(r["published_percent"] is not None for r in rows):
    axes[0, -1].plot([], [], "D", color="C1", label="published mean")
  axes[0, -1].legend(
    fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
  )
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)
