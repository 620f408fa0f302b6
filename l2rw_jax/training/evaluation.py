"""Measuring a run: on held-out examples, and the run itself."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import batches
from l2rw_jax.training import step as step_lib


class Predictions(NamedTuple):
  """A trained network's answers on N examples, as NumPy arrays.

  Attributes:
    labels: classes as the examples tell them, [N]; [N, Q] where an example has Q
      labels (the queries of a task).
    predicted: classes with the highest score, likewise.
    losses: [N].
    num_classes: C.
    groups: attribute of each example, [N]; None stands for the classes.
  """

  labels: np.ndarray
  predicted: np.ndarray
  losses: np.ndarray
  num_classes: int
  groups: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """One run, at one step.

  Attributes:
    seed: of the run.
    step: updates done.
    state: of the run, on one device.
    task: the learning problem, outside the devices' axis.
    optimizer: of the network.
    splits: the data.
  """

  seed: int
  step: int
  state: step_lib.TrainState
  problem: base.Problem
  optimizer: optax.GradientTransformation
  splits: examples_lib.Splits

  @functools.cached_property
  def test(self) -> Predictions:
    """Answers on the test set."""
    return self._predict(self.splits.test)

  @functools.cached_property
  def train(self) -> Predictions:
    """Answers on the training set, in evaluation mode, beside its own labels."""
    return self._predict(self.splits.train)

  def _predict(self, examples: examples_lib.Examples) -> Predictions:
    fields = batches.examples_dict(examples)
    return predict(self.problem, self.state.params, self.state.model_state, fields)


# What to tell of the answers on the test set.
Evaluator = Callable[[Predictions], dict[str, float]]
# What to tell of a run that its answers on the test set do not show.
Probe = Callable[[Snapshot], dict[str, float]]
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
    classes, values = _predict(
      problem.forward, problem.loss, params, model_state, batch
    )
    predicted.append(np.asarray(classes))
    found.append(np.asarray(values))
  return Predictions(
    np.asarray(examples["label"]),
    np.concatenate(predicted),
    np.concatenate(found),
    problem.num_classes,
    None if "group" not in examples else np.asarray(examples["group"]),
  )


def measure(
  snapshot: Snapshot, evaluators: Sequence[Evaluator], probes: Sequence[Probe]
) -> dict[str, float]:
  """What all of them tell, as `test/NAME` and `probe/NAME`."""
  found = {}
  for evaluator in evaluators:
    found.update({f"test/{k}": v for k, v in evaluator(snapshot.test).items()})
  for probe in probes:
    found.update({f"probe/{k}": v for k, v in probe(snapshot).items()})
  return found


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


def shot_thresholds(class_counts: Sequence[int]) -> tuple[int, int]:
  """Above which count a class is many-shot, and below which few-shot.

  The usual 100 and 20, where they leave none of the three groups empty. Else
  (every set of ten classes of thousands) thirds of the classes by count, a third
  of ten being 3, 4 and 3; classes of one size stay together, so that a step has
  no medium group and equal classes nothing else.

  Args:
    class_counts: training examples of each class, [C].

  References:
    Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019
    (100 and 20).

  >>> shot_thresholds([500, 90, 10])
  (100, 20)
  >>> shot_thresholds([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
  (1795, 140)
  """
  counts = np.asarray(class_counts)
  if all((_shot_groups(counts, _MANY, _FEW) == group).any() for group in range(3)):
    return _MANY, _FEW
  ordered = np.sort(counts)
  third = round(len(counts) / 3)
  if not third or ordered[-third] == ordered[third - 1]:
    return int(ordered[-1]), int(ordered[0])
  return int(ordered[-third]) - 1, int(ordered[third - 1]) + 1


def _shot_groups(counts: np.ndarray, many: int, few: int) -> np.ndarray:
  return np.where(counts > many, 0, np.where(counts < few, 2, 1))


def shot_accuracy(class_counts: Sequence[int], many: int, few: int) -> Evaluator:
  """Makes an evaluator of classes with many, medium and few training examples.

  It tells `many_shot_accuracy`, `medium_shot_accuracy` and `few_shot_accuracy`:
  means over the accuracies of the group's classes. A group without a class that
  has test examples is left out.

  Args:
    class_counts: training examples of each class, [C].
    many: classes with more examples are many-shot.
    few: of the others, classes with less examples are few-shot; see
      `shot_thresholds`.

  Raises:
    InputError: `few` is larger than `many` + 1, so that a class would be both.
  """
  if few > many + 1:
    raise base.InputError(
      f"shot_accuracy: few={few} must not be above many={many} plus 1, or a class of"
      f" {many + 1} examples would be both; lower few."
    )
  groups = _shot_groups(np.asarray(class_counts), many, few)

  def evaluate(predictions: Predictions) -> dict[str, float]:
    right = predictions.predicted == predictions.labels
    rates = _rates(right, predictions.labels)
    found = {}
    for group, name in enumerate(SHOTS):
      own = [rate for label, rate in rates.items() if groups[label] == group]
      if own:
        found[f"{name}_shot_accuracy"] = float(np.mean(own))
    return found

  return evaluate


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
