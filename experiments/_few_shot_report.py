"""The rows and the figure of `experiments.few_shot`."""

import pathlib
from typing import Any

import numpy as np

from experiments import _report
from l2rw_jax.data import episodes
from l2rw_jax.methods import nested_maml
from l2rw_jax.training import evaluation
from l2rw_jax.training import results

# What `weights_of` tells: mean weights of parts of the training tasks.
WEIGHTS = ("own_weight", "foreign_weight", "right_weight", "wrong_weight")


def interval_over_tasks(predictions: evaluation.Predictions) -> dict[str, float]:
  """`interval`: 1.96 standard errors of the accuracy of a task."""
  accuracies = (predictions.predicted == predictions.labels).mean(axis=1)
  spread = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
  return {"interval": float(1.96 * spread)}


def weights_of(pool: episodes.Pool, share: str) -> evaluation.Probe:
  """A probe of NestedMAML: mean weights of tasks, and of single queries if it has them.

  Parts without a member are left out.

  Args:
    pool: the training tasks.
    share: of NestedMAML.
  """

  def probe(snapshot):
    state: nested_maml.State = snapshot.state.method_state
    weights = np.asarray(state.weights)
    if share == "cluster":
      weights = weights[snapshot.splits.train.group]
    is_wrong = pool.wrong_items()
    is_foreign = pool.is_foreign
    parts = {"own_weight": weights[~is_foreign], "foreign_weight": weights[is_foreign]}
    if weights.ndim == 2:
      parts["right_weight"] = weights[~is_wrong]
      parts["wrong_weight"] = weights[is_wrong]
    return {name: float(np.mean(part)) for name, part in parts.items() if part.size}

  return probe


def row(
  facts: dict[str, Any], pool: episodes.Pool, result: results.Result
) -> dict[str, Any]:
  """One run's line of `results.csv`.

  Args:
    facts: the settings by which lines are told apart.
    pool: the training tasks.
    result: of the run.
  """
  metrics = result.metrics
  probes = metrics.get("probes", {})
  return {
    **facts,
    "accuracy_percent": 100 * metrics["last"]["accuracy"],
    "interval_percent": 100 * metrics["last"]["interval"],
    **{name: probes[name][-1] if name in probes else None for name in WEIGHTS},
    "weight_auroc": _auroc(pool.is_foreign, result.weights["mean_weight"]),
    "num_tasks": len(pool.is_foreign),
    **_report.run_fields(metrics),
  }


def _auroc(is_foreign: np.ndarray, weights: np.ndarray) -> float | None:
  columns = {"label": ~is_foreign, "true_label": np.ones_like(is_foreign)}
  return _report.auroc({**columns, "mean_weight": weights})


def pooled(rows: list[dict[str, Any]]) -> tuple[float, float]:
  """Mean accuracy and its interval over the test tasks of all seeds, in percent."""
  mean = np.mean([r["accuracy_percent"] for r in rows])
  squares = np.sum([r["interval_percent"] ** 2 for r in rows])
  return float(mean), float(np.sqrt(squares) / len(rows))


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Accuracy against the share of foreign tasks; mean weights of both kinds."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  weighed = any(r[name] is not None for r in rows for name in WEIGHTS)
  panels = 2 if weighed else 1
  figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4), squeeze=False)
  left, right = axes[0, 0], axes[0, -1]
  for i, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
    own = [r for r in rows if r["method"] == method]
    shares = sorted({r["ood_share"] for r in own})
    by_share = [[r for r in own if r["ood_share"] == s] for s in shares]
    color = f"C{i}"
    found = np.array([pooled(part) for part in by_share])
    left.errorbar(
      shares, found[:, 0], found[:, 1], capsize=3, color=color, marker="o", label=method
    )
    left.plot(
      [r["ood_share"] for r in own],
      [r["accuracy_percent"] for r in own],
      linestyle="",
      marker=".",
      markersize=4,
      color="black",
    )
    for name, line in zip(WEIGHTS, ("-", "--", "-.", ":"), strict=True):
      if all(r[name] is not None for r in own):
        means = [np.mean([r[name] for r in part]) for part in by_share]
        label = f"{method}, {name.removesuffix('_weight')}"
        right.plot(shares, means, color=color, linestyle=line, marker="o", label=label)
  left.set_ylabel("accuracy %, 95% interval; a dot a seed")
  if weighed:
    right.set_ylabel("mean weight at the end, 1 at the start")
  kind = {"none": "foreign"}.get(rows[0]["ood"], rows[0]["ood"])
  for ax in axes[0]:
    ax.set_xlabel(f"share of {kind} tasks")
    ax.set_xticks(sorted({r["ood_share"] for r in rows}))
    ax.legend(fontsize=8)
  ways, shots, noise = (rows[0][k] for k in ("num_ways", "num_shots", "noise_share"))
  redrawn = f", {noise:.0%} of the labels redrawn" if noise else ""
  figure.suptitle(f"{rows[0]['dataset']}, {ways}-way {shots}-shot{redrawn}")
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)
