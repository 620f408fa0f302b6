"""Measuring a classifier on held-out examples."""

from collections.abc import Callable
import functools
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
  """

  labels: np.ndarray
  predicted: np.ndarray
  losses: np.ndarray
  num_classes: int


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
    examples: arrays with leading axis N, among them "label".
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
