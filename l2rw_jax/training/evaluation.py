"""Measuring a classifier on held-out examples."""

from collections.abc import Callable
import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import losses


class Predictions(NamedTuple):
  """A trained network's answers on N examples, as NumPy arrays.

  Attributes:
    labels: true classes, [N].
    predicted: classes with the highest score, [N].
    losses: [N].
    num_classes: C.
    groups: attribute of each example, [N]; None stands for the classes.
  """

  labels: np.ndarray
  predicted: np.ndarray
  losses: np.ndarray
  num_classes: int
  groups: np.ndarray | None = None


Evaluator = Callable[[Predictions], dict[str, float]]


@functools.partial(jax.jit, static_argnames=("forward", "loss"))
def _predict(forward, loss, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  logits = outputs[0] if isinstance(outputs, tuple) else outputs
  return losses.predictions(logits), loss(outputs, batch)


def predict(
  task: base.Task,
  params: base.PyTree,
  model_state: base.PyTree,
  examples: base.Batch,
  batch_size: int = 500,
) -> Predictions:
  """Evaluation-mode answers on all `examples`.

  Args:
    task: the learning problem.
    params: one run's parameters.
    model_state: its variables.
    examples: arrays with leading axis N, among them "label"; "group" if known.
    batch_size: examples a forward pass.
  """
  size = len(examples["label"])
  predicted, found = [], []
  for start in range(0, size, batch_size):
    batch = {k: v[start : start + batch_size] for k, v in examples.items()}
    classes, values = _predict(task.forward, task.loss, params, model_state, batch)
    predicted.append(np.asarray(classes))
    found.append(np.asarray(values))
  return Predictions(
    np.asarray(examples["label"]),
    np.concatenate(predicted),
    np.concatenate(found),
    task.num_classes,
    None if "group" not in examples else np.asarray(examples["group"]),
  )


def accuracy(predictions: Predictions) -> dict[str, float]:
  """Share of examples classified right, and the mean loss."""
  right = predictions.predicted == predictions.labels
  return {"accuracy": float(right.mean()), "loss": float(predictions.losses.mean())}


def per_class_accuracy(predictions: Predictions) -> dict[str, float]:
  """Accuracy within each true class, and their mean (balanced accuracy)."""
  right = predictions.predicted == predictions.labels
  by_class = {}
  for c in range(predictions.num_classes):
    members = predictions.labels == c
    if members.any():
      by_class[f"accuracy_class_{c}"] = float(right[members].mean())
  return {**by_class, "balanced_accuracy": float(np.mean(list(by_class.values())))}


def equal_opportunity(predictions: Predictions) -> dict[str, float]:
  """How far true-positive rates are from equal, and how the worst group fares.

  The true-positive rate of class c is the accuracy on class c. Where the groups
  are the classes, rates of two classes are compared:

    tpr_gap_max, tpr_gap_mean    over all pairs of classes
    worst_group_accuracy         the lowest accuracy of a class

  Where they are an attribute, rates of two groups within each class:

    tpr_gap_max, tpr_gap_mean    over all classes and pairs of groups
    worst_group_accuracy         the lowest accuracy of an attribute group
    worst_cell_accuracy          the lowest of a (class, attribute) cell
    accuracy_group_G             of attribute group G

  Classes, groups and cells without an example do not count; a gap without a pair
  is 0.
  """
  labels, groups = predictions.labels, predictions.groups
  right = predictions.predicted == labels
  if groups is None or np.array_equal(groups, labels):
    rates = _rates(right, labels)
    gaps = _gaps(list(rates.values()))
    return {**_gap_summary(gaps), "worst_group_accuracy": min(rates.values())}
  cells = [_rates(right[labels == c], groups[labels == c]) for c in np.unique(labels)]
  by_group = _rates(right, groups)
  gaps = [gap for cell in cells for gap in _gaps(list(cell.values()))]
  return {
    **_gap_summary(gaps),
    "worst_group_accuracy": min(by_group.values()),
    "worst_cell_accuracy": min(min(cell.values()) for cell in cells),
    **{f"accuracy_group_{g}": rate for g, rate in by_group.items()},
  }


def _rates(right: np.ndarray, groups: np.ndarray) -> dict[int, float]:
  return {int(g): float(right[groups == g].mean()) for g in np.unique(groups)}


def _gaps(rates: list[float]) -> list[float]:
  return [abs(a - b) for a, b in itertools.combinations(rates, 2)]


def _gap_summary(gaps: list[float]) -> dict[str, float]:
  gaps = gaps or [0.0]
  return {"tpr_gap_max": max(gaps), "tpr_gap_mean": float(np.mean(gaps))}
