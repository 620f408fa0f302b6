"""Measurements of a run, from its predictions and its training state."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import inference
from l2rw_jax import losses
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import step as step_lib


class Predictions(NamedTuple):
  """Predictions of a network on N examples, as NumPy arrays.

  Attributes:
    labels: the labels of the examples, [N]; [N, Q] if an example has Q labels (the
      queries of a few-shot task).
    predicted: the predicted classes, of the same shape.
    losses: per-example losses, [N].
    num_classes: C.
    groups: integer group of each example, such as the value of an attribute, [N]; None
      if the groups are the classes.
  """

  labels: np.ndarray
  predicted: np.ndarray
  losses: np.ndarray
  num_classes: int
  groups: np.ndarray | None = None

  def right(self) -> np.ndarray:
    """Whether each predicted class is the label, bool, of the same shape.

    Raises:
      InputError: there is no example or not one prediction for each label, labels,
        predictions or groups are not whole numbers, there is not one group for each
        example, or an array is masked.
    """
    for name in ("labels", "predicted", "losses", "groups"):
      base.refuse_mask(f"the {name} of predictions", getattr(self, name))
    for name in ("labels", "predicted", "groups"):
      _check_whole(name, getattr(self, name))
    shapes = np.shape(self.predicted), np.shape(self.labels)
    if shapes[0] != shapes[1]:  # NumPy could compare each with all others.
      raise base.InputError(
        f"predictions of shape {list(shapes[0])} do not match labels of shape"
        f" {list(shapes[1])}; give one label for each prediction."
      )
    if not np.size(self.labels):
      raise base.InputError("there are no examples to measure: give some.")
    if self.groups is not None and np.shape(self.groups)[:1] != shapes[1][:1]:
      raise base.InputError(
        f"groups of shape {list(np.shape(self.groups))} do not match labels of shape"
        f" {list(shapes[1])}; give one group for each example."
      )
    return np.equal(self.predicted, self.labels)


def _check_whole(name: str, values: Any) -> None:
  """Raises InputError unless the values are whole numbers, or None.

  Otherwise, the groups 0.2 and 0.7 would become one group, and labels that are strings
  would never be equal to a predicted class.
  """
  values = np.asarray(values if values is not None else 0)
  is_whole = values.dtype.kind in "biu" or (
    values.dtype.kind == "f" and bool((values == np.rint(values)).all())
  )
  if not is_whole:
    raise base.InputError(
      f"the {name} of predictions must be integers; got {values.dtype}. Number the"
      " classes and the groups from 0."
    )


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The state of one run at one step.

  Attributes:
    seed: the seed of the run.
    step: number of updates so far.
    state: the training state, on one device.
    problem: the learning problem, without a device axis.
    optimizer: the optimizer of the network.
    splits: the data of the run.
  """

  seed: int
  step: int
  state: step_lib.TrainState
  problem: base.Problem
  optimizer: optax.GradientTransformation
  splits: examples_lib.Splits

  @functools.cached_property
  def test(self) -> Predictions:
    """Predictions on the test set."""
    return self._predict(self.splits.test)

  @functools.cached_property
  def train(self) -> Predictions:
    """Predictions on the training set in evaluation mode, with its given labels."""
    return self._predict(self.splits.train)

  def _predict(self, examples: examples_lib.Examples) -> Predictions:
    batch = examples_lib.as_batch(examples)
    return predict(self.problem, self.state.params, self.state.model_state, batch)


# Metrics of the predictions on the test set, by name.
Evaluator = Callable[[Predictions], dict[str, float]]
# Metrics of a run that need more than its predictions on the test set, by name.
Probe = Callable[[Snapshot], dict[str, float]]
# A function that records something before an epoch. The second argument is the epoch,
# counted from 0.
EpochProbe = Callable[[Snapshot, int], None]
SHOTS = ("many", "medium", "few")
_MANY, _FEW = 100, 20


@functools.partial(jax.jit, static_argnames=("forward", "loss"))
def _predict(forward, loss, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  return losses.predictions(losses.logits_of(outputs)), loss(outputs, batch)


def predict(
  problem: base.Problem,
  params: base.PyTree,
  model_state: base.PyTree,
  examples: base.Batch,
  batch_size: int = 500,
) -> Predictions:
  """Predictions in evaluation mode.

  Args:
    problem: the learning problem.
    params: parameters of one run.
    model_state: variables of the run that are not trained.
    examples: arrays with leading axis N, including "label", and "group" if it is known.
    batch_size: number of examples in a forward pass.
  """

  def predict_batch(batch):
    return _predict(problem.forward, problem.loss, params, model_state, batch)

  predicted, values = inference.map_batches(predict_batch, examples, batch_size)
  return Predictions(
    np.asarray(examples["label"]),
    predicted,
    values,
    problem.num_classes,
    None if "group" not in examples else np.asarray(examples["group"]),
  )


def measure(
  snapshot: Snapshot, evaluators: Sequence[Evaluator], probes: Sequence[Probe]
) -> dict[str, float]:
  """All metrics: those of evaluators as `test/NAME`, of probes as `probe/NAME`."""
  metrics = {}
  for evaluator in evaluators:
    metrics.update({f"test/{k}": v for k, v in evaluator(snapshot.test).items()})
  for probe in probes:
    metrics.update({f"probe/{k}": v for k, v in probe(snapshot).items()})
  return metrics


def accuracy(predictions: Predictions) -> dict[str, float]:
  """Share of correctly classified examples, and the mean loss.

  Raises:
    InputError: the predictions are invalid, see `Predictions.right`.
  """
  right = predictions.right()
  # NumPy sums bfloat16 in bfloat16, where adding 1 to 256 changes nothing.
  loss = np.mean(predictions.losses, dtype=np.float64)
  return {"accuracy": float(right.mean()), "loss": float(loss)}


def per_class_accuracy(predictions: Predictions) -> dict[str, float]:
  """Accuracy of each true class, and their mean (balanced accuracy).

  Classes without examples are ignored.

  Raises:
    InputError: no example has a label from 0 to C - 1, or the predictions are invalid,
      see `Predictions.right`.
  """
  right = predictions.right()
  rates = _rates(right, predictions.labels)
  by_class = {
    f"accuracy_class_{c}": rate
    for c, rate in rates.items()
    if 0 <= c < predictions.num_classes
  }
  if not by_class:
    raise base.InputError(
      f"per_class_accuracy: no label is a class from 0 to {predictions.num_classes - 1}"
      f"; the first is {next(iter(rates))}."
    )
  return {**by_class, "balanced_accuracy": float(np.mean(list(by_class.values())))}


def shot_thresholds(class_counts: Sequence[int]) -> tuple[int, int]:
  """The counts above which a class is many-shot, and below which it is few-shot.

  These are the usual 100 and 20, unless one of the three groups would be empty (as in
  all sets with ten classes of thousands of examples). In that case the classes are
  split into thirds by their count: ten classes into 3, 4 and 3. Classes of the same
  size stay in one group. If half of the classes have one size and half have another,
  there is therefore no medium-shot class. If one size is so common that it occurs in
  the first and in the last third, all classes are medium-shot.

  Args:
    class_counts: training examples of each class, [C].

  Returns:
    The two thresholds, `many` and `few` of `shot_accuracy`.

  Raises:
    InputError: there is no class.

  References:
    Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019
    (100 and 20).

  >>> shot_thresholds([500, 90, 10])
  (100, 20)
  >>> shot_thresholds([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
  (1795, 140)
  """
  counts = np.asarray(class_counts)
  if not counts.size:
    raise base.InputError("shot_thresholds: class_counts is empty.")
  if all((_shot_groups(counts, _MANY, _FEW) == group).any() for group in range(3)):
    return _MANY, _FEW
  ordered = np.sort(counts)
  third = round(len(counts) / 3)
  if not third or ordered[-third] == ordered[third - 1]:
    return int(ordered[-1]), int(ordered[0])
  return int(ordered[-third]) - 1, int(ordered[third - 1]) + 1


def _shot_groups(counts: np.ndarray, many: float, few: float) -> np.ndarray:
  return np.where(counts > many, 0, np.where(counts < few, 2, 1))


def shot_accuracy(class_counts: Sequence[int], many: int, few: int) -> Evaluator:
  """Makes an evaluator for classes with many, medium and few training examples.

  The evaluator computes `many_shot_accuracy`, `medium_shot_accuracy` and
  `few_shot_accuracy`: the mean accuracy of the classes in each group. A group is left
  out if none of its classes has test examples.

  Args:
    class_counts: training examples of each class, [C].
    many: classes with more examples are many-shot; see `shot_thresholds`.
    few: classes with fewer examples are few-shot.

  Raises:
    InputError: `few` is larger than `many` + 1, so that a class would be both; in the
      evaluator, the test labels are not classes of `class_counts`.
  """
  # In uint8, many + 1 could overflow.
  upper, lower = float(many), float(few)
  if lower > upper + 1:
    raise base.InputError(
      f"shot_accuracy: few={few} must not be above many={many} plus 1, because a class"
      f" of {upper + 1:g} examples would be both many-shot and few-shot; lower few."
    )
  groups = _shot_groups(np.asarray(class_counts), upper, lower)

  def evaluate(predictions: Predictions) -> dict[str, float]:
    right = predictions.right()
    rates = _rates(right, predictions.labels)
    unknown = sorted(set(rates).difference(range(len(groups))))
    if unknown:
      raise base.InputError(
        f"shot_accuracy: a test label is {unknown[0]}, but class_counts has the classes"
        f" 0 to {len(groups) - 1}."
      )
    metrics = {}
    for group, name in enumerate(SHOTS):
      group_rates = [rate for label, rate in rates.items() if groups[label] == group]
      if group_rates:
        metrics[f"{name}_shot_accuracy"] = float(np.mean(group_rates))
    return metrics

  return evaluate


def equal_opportunity(predictions: Predictions) -> dict[str, float]:
  """Differences between true-positive rates, and the accuracy of the worst group.

  The true-positive rate of class c is the accuracy on class c. If the groups are the
  classes, the rates of classes are compared:

    tpr_gap_max, tpr_gap_mean    over all pairs of classes
    worst_group_accuracy         the lowest accuracy of a class

  If the groups are an attribute, the rates of groups are compared within each class:

    tpr_gap_max, tpr_gap_mean    over all classes and pairs of groups
    worst_group_accuracy         the lowest accuracy of an attribute group
    worst_cell_accuracy          the lowest accuracy of a (class, attribute) cell
    accuracy_group_G             the accuracy of attribute group G

  Classes, groups and cells without examples are ignored. Without any pair the gaps
  are 0. If an example has several labels, all of them are in its group.

  Raises:
    InputError: the predictions are invalid, see `Predictions.right`.
  """
  right = predictions.right()
  labels = np.asarray(predictions.labels)
  groups = None if predictions.groups is None else np.asarray(predictions.groups)
  if groups is None or np.array_equal(groups, labels):
    rates = _rates(right, labels)
    return {**_gap_summary([rates]), "worst_group_accuracy": min(rates.values())}
  more_axes = tuple(range(groups.ndim, labels.ndim))
  groups = np.broadcast_to(np.expand_dims(groups, more_axes), labels.shape)
  right, groups, labels = (x.ravel() for x in (right, groups, labels))
  members = base.rows_by_class(labels, np.unique(labels))
  cells = [_rates(right[rows], groups[rows]) for rows in members]
  by_group = _rates(right, groups)
  return {
    **_gap_summary(cells),
    "worst_group_accuracy": min(by_group.values()),
    "worst_cell_accuracy": min(min(cell.values()) for cell in cells),
    **{f"accuracy_group_{g}": rate for g, rate in by_group.items()},
  }


def _rates(right: np.ndarray, groups: np.ndarray) -> dict[int, float]:
  """The share of right predictions in each group that occurs, by group."""
  names, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
  shares = np.bincount(places.ravel(), weights=right.ravel()) / counts
  return dict(zip(names.astype(int).tolist(), shares.tolist(), strict=True))


def _gap_summary(cells: Sequence[dict[int, float]]) -> dict[str, float]:
  """The largest and the mean difference over all pairs of rates within a cell."""
  largest = total = 0.0
  num_pairs = 0
  for cell in cells:
    rates = np.sort(list(cell.values()))
    largest = max(largest, float(rates[-1] - rates[0]))
    # The k-th gap between neighboring rates is part of the differences of k (n - k)
    # pairs. The pairs themselves (50 million for 10,000 classes) need not be listed.
    below = np.arange(1, len(rates))
    total += float(np.diff(rates) @ (below * (len(rates) - below)))
    num_pairs += len(rates) * (len(rates) - 1) // 2
  return {"tpr_gap_max": largest, "tpr_gap_mean": total / max(num_pairs, 1)}
