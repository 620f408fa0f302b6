"""Models compared by susceptibility and training accuracy: regions and figures."""

from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from experiments import _report
from l2rw_jax import susceptibility

Rows = list[dict[str, Any]]
_PAIRS = (
  ("susceptibility", "wrong_subset_percent"),
  ("susceptibility", "accuracy_percent"),
  ("train_percent", "accuracy_percent"),
)
_REGIONS = (1, 2, 3, 4)
_MOST_CURVES = 4
# Learning rates are decades apart, and so are drops; some are below zero.
_LINEAR = 1e-3
_SHORT = {
  "susceptibility": "susceptibility",
  "wrong_subset_percent": "accuracy on wrong labels",
  "accuracy_percent": "test accuracy",
  "train_percent": "training accuracy",
}


def of_noise(rows: Rows, fraction: float) -> Rows:
  """The models of one noise that can be compared.

  One without a susceptibility, because a drop was not finite, cannot.
  """
  return [
    row
    for row in rows
    if row["noise_fraction"] == fraction and row["susceptibility"] is not None
  ]


def fractions_of(rows: Rows) -> list[float]:
  """The noise fractions, ascending."""
  return sorted({row["noise_fraction"] for row in rows})


def with_regions(rows: Rows) -> Rows:
  """The rows with the `region` of each among the models of its noise, or None."""
  regions: dict[int, int] = {}
  for fraction in fractions_of(rows):
    own = of_noise(rows, fraction)
    if len(own) > 1:
      found = susceptibility.regions(_column(own, "susceptibility"), _train(own))
      regions |= {id(row): int(region) for row, region in zip(own, found, strict=True)}
  return [{"region": regions.get(id(row)), **row} for row in rows]


def selection(rows: Rows) -> str:
  """Clean test accuracy by region, as the paper tells it, as a Markdown table."""
  header = ["noise_fraction", "all models", *(f"region {r}" for r in _REGIONS)]
  lines = []
  for fraction in fractions_of(rows):
    own = of_noise(rows, fraction)
    groups = [own, *([r for r in own if r["region"] == g] for g in _REGIONS)]
    lines.append([f"{fraction:g}", *map(_spread, groups)])
  told = "Clean test accuracy %, mean ± standard deviation over models (how many)"
  return f"{told}:\n\n{_report.table(header, lines)}"


def _spread(rows: Rows) -> str:
  values = _column(rows, "accuracy_percent")
  if not values:
    return "-"
  return f"{np.mean(values):.2f} ± {np.std(values):.2f} ({len(values)})"


def correlations(rows: Rows) -> str:
  """Rank correlations over the models of each noise, as a Markdown table."""
  header = ["noise_fraction", *(f"{_SHORT[a]}, {_SHORT[b]}" for a, b in _PAIRS)]
  lines = []
  for fraction in fractions_of(rows):
    own = of_noise(rows, fraction)
    found = [_correlation(own, *pair) for pair in _PAIRS]
    lines.append([f"{fraction:g}", *("-" if r is None else f"{r:+.2f}" for r in found)])
  return f"Rank correlations over models:\n\n{_report.table(header, lines)}"


def _correlation(rows: Rows, one: str, other: str) -> float | None:
  pairs = [(row[one], row[other]) for row in rows if row[other] is not None]
  if len(pairs) < 2:
    return None
  return susceptibility.rank_correlation(*zip(*pairs, strict=True))


def _column(rows: Rows, name: str) -> list[float]:
  return [row[name] for row in rows]


def _train(rows: Rows) -> list[float]:
  return _column(rows, "train_percent")


def draw(rows: Rows, path: pathlib.Path) -> None:
  """A panel per noise: training accuracy against susceptibility, a dot a model.

  The color is the accuracy on clean test images; lines are the means between the
  regions.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  fractions = fractions_of(rows)
  figure, axes = plt.subplots(
    1, len(fractions), figsize=(4.2 * len(fractions), 3.8), squeeze=False
  )
  for ax, fraction in zip(axes[0], fractions, strict=True):
    own = of_noise(rows, fraction)
    zeta = _column(own, "susceptibility")
    dots = ax.scatter(
      zeta,
      _train(own),
      c=_column(own, "accuracy_percent"),
      cmap="viridis",
      edgecolors="black",
      linewidths=0.4,
    )
    ax.set_xscale("symlog", linthresh=_LINEAR)
    ax.margins(0.12)
    figure.colorbar(dots, ax=ax, label="clean test accuracy (%)")
    if len(own) > 1:
      at_zeta, at_accuracy = susceptibility.boundaries(zeta, _train(own))
      ax.axvline(at_zeta, color="black", linewidth=0.8, linestyle=":")
      ax.axhline(at_accuracy, color="black", linewidth=0.8, linestyle=":")
    for region, (x, y) in zip(_REGIONS, [(0, 1), (1, 1), (0, 0), (1, 0)], strict=True):
      ax.annotate(
        str(region),
        (0.03 + 0.94 * x, 0.03 + 0.94 * y),
        xycoords="axes fraction",
        ha="right" if x else "left",
        va="top" if y else "bottom",
        color="C3",
        fontsize=13,
        zorder=0,
      )
    ax.set_xlabel("susceptibility (mean drop, nats)")
    ax.set_ylabel("training accuracy, labels as given (%)")
    ax.set_title(f"{rows[0]['dataset']}, {fraction:.0%} of the labels replaced")
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def draw_curves(
  runs: Sequence[tuple[dict[str, Any], dict[str, Any]]], path: pathlib.Path
) -> bool:
  """Susceptibility and accuracy on wrong labels over the epochs, at the highest noise.

  Args:
    runs: row of each, and what was probed in it. Drawn are up to four, from the
      lowest susceptibility to the highest.
    path: to write.

  Returns:
    Whether there was anything to draw.
  """
  highest = fractions_of([row for row, _ in runs])[-1]
  own = [run for run in runs if of_noise([run[0]], highest)]
  own = sorted(own, key=lambda run: run[0]["susceptibility"])
  if not own:
    return False
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  places = np.linspace(0, len(own) - 1, min(_MOST_CURVES, len(own)))
  figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
  for color, place in enumerate(np.rint(places).astype(int)):
    row, probes = own[place]
    zeta = susceptibility.running_average(probes["susceptibility_drop"][:-1])
    name = f"{row['network']}, rate {row['learning_rate']:g}"
    left.plot(np.arange(1, len(zeta) + 1), zeta, f"C{color}", label=name)
    wrong = probes.get("train_accuracy_wrong")
    if wrong:
      right.plot(100 * np.array(wrong), f"C{color}", label=name)
  left.set_yscale("symlog", linthresh=_LINEAR)
  left.set_ylabel("susceptibility so far (nats)")
  right.set_ylabel("accuracy on wrong labels (%)")
  for ax in (left, right):
    ax.set_xlabel("epoch")
  handles = left.get_legend_handles_labels()
  figure.legend(
    *handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False
  )
  told = f"{highest:.0%} of the labels replaced"
  figure.suptitle(f"{own[0][0]['dataset']}, {told}", fontsize=10)
  figure.tight_layout()
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)
  return True
