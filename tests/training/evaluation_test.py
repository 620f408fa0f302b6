"""Held-out measures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.training import evaluation


def _predictions(labels, predicted, num_classes=3, groups=None):
  labels, predicted = np.array(labels), np.array(predicted)
  found = np.arange(len(labels), dtype=np.float32)
  groups = None if groups is None else np.array(groups)
  return evaluation.Predictions(labels, predicted, found, num_classes, groups)


def test_accuracy_and_loss():
  found = evaluation.accuracy(_predictions([0, 1, 2, 2], [0, 1, 1, 2]))
  assert found == {"accuracy": 0.75, "loss": 1.5}


def test_accuracy_of_each_class_and_balanced():
  found = evaluation.per_class_accuracy(
    _predictions([0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0])
  )
  assert found == {
    "accuracy_class_0": 0.75,
    "accuracy_class_1": 1.0,
    "accuracy_class_2": 0.0,
    "balanced_accuracy": pytest.approx(7 / 12),
  }


def test_a_class_that_is_absent_does_not_count():
  found = evaluation.per_class_accuracy(_predictions([2, 0, 2], [2, 1, 0]))
  assert found == {
    "accuracy_class_0": 0.0,
    "accuracy_class_2": 0.5,
    "balanced_accuracy": 0.25,
  }


_LONG_TAIL = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
  ("counts", "expected"),
  [
    ([500, 101, 100, 20, 19, 5], (100, 20)),
    # None below 20: 3, 4 and 3 classes.
    (_LONG_TAIL, (1795, 140)),
    ([500, 400, 300, 200], (499, 201)),
    # Classes of one size stay together: two groups, then one.
    ([5000] * 5 + [50] * 5, (4999, 51)),
    ([50] * 10, (50, 50)),
    ([0, 3], (2, 1)),
    ([7], (7, 7)),
  ],
)
def test_who_has_many_and_who_few(counts, expected):
  assert evaluation.shot_thresholds(counts) == expected
  assert evaluation.shot_thresholds(np.array(counts)[::-1]) == expected


def test_accuracy_of_classes_with_many_medium_and_few_examples():
  # Rates 3/4 of class 0, 1 of class 1, 0 of class 2, 1/2 of class 3.
  predictions = _predictions(
    [0, 0, 0, 0, 1, 2, 3, 3], [0, 0, 0, 1, 1, 0, 3, 0], num_classes=4
  )
  found = evaluation.shot_accuracy([101, 400, 100, 19], 100, 20)(predictions)
  assert found == {
    "many_shot_accuracy": 0.875,
    "medium_shot_accuracy": 0.0,
    "few_shot_accuracy": 0.5,
  }
  # Exactly at a threshold is medium.
  found = evaluation.shot_accuracy([100, 20, 20, 100], 100, 20)(predictions)
  assert found == {"medium_shot_accuracy": 0.5625}


def test_a_group_without_test_examples_is_left_out():
  predictions = _predictions([0, 0], [0, 1])
  found = evaluation.shot_accuracy([500, 50, 5], 100, 20)(predictions)
  assert found == {"many_shot_accuracy": 0.5}


def test_no_class_is_of_two_groups():
  with pytest.raises(base.InputError, match="few=102 must not be above many=100 plus"):
    evaluation.shot_accuracy([1, 2], 100, 102)


def test_opportunity_of_the_classes():
  # Rates 3/4, 1 and 0: gaps 1/4, 3/4 and 1.
  labels, predicted = [0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0]
  expected = {
    "tpr_gap_max": 1.0,
    "tpr_gap_mean": pytest.approx(2 / 3),
    "worst_group_accuracy": 0.0,
  }
  for groups in (None, labels):
    found = evaluation.equal_opportunity(_predictions(labels, predicted, groups=groups))
    assert found == expected
  found = evaluation.equal_opportunity(_predictions([2, 2], [2, 1]))
  assert found["tpr_gap_max"] == found["tpr_gap_mean"] == 0
  assert found["worst_group_accuracy"] == 0.5


def test_opportunity_of_an_attribute_is_compared_within_each_class():
  # Class 0: rates 1, 1/2, 0 of groups 0, 1, 4; class 1: 1 and 1 of groups 0 and 1;
  # class 2: group 0 alone, no pair.
  labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]
  groups = [0, 1, 1, 4, 0, 1, 0, 0, 0]
  predicted = [0, 0, 1, 1, 1, 1, 2, 0, 0]
  found = evaluation.equal_opportunity(_predictions(labels, predicted, groups=groups))
  assert found == {
    "tpr_gap_max": 1.0,
    "tpr_gap_mean": (0.5 + 1 + 0.5 + 0) / 4,
    "worst_group_accuracy": 0.0,
    "worst_cell_accuracy": 0.0,
    "accuracy_group_0": 0.6,
    "accuracy_group_1": pytest.approx(2 / 3),
    "accuracy_group_4": 0.0,
  }


def _task(loss=losses.softmax_cross_entropy, wrap=lambda logits: logits):
  """Logits are x @ p, plus what BatchNorm would add in training."""

  def forward(params, model_state, batch, key, train):
    del key
    logits = batch["x"] @ params
    if train:
      logits, model_state = logits + 100, model_state + 1
    return wrap(logits), model_state

  def loss_of(outputs, batch):
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss(logits, batch["label"])

  return base.Problem(
    forward=forward,
    loss=loss_of,
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=3,
    class_counts=jnp.array([1, 1, 1]),
    num_examples=3,
    num_steps=1,
  )


def _predict(problem, params, x, labels, **settings):
  examples = {"x": np.array(x, np.float32), "label": np.array(labels, np.int32)}
  return evaluation.predict(
    problem, jnp.array(params), jnp.zeros(()), examples, **settings
  )


@pytest.mark.parametrize("batch_size", [1, 2, 3, 500])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x)])
def test_predictions_by_hand_in_batches_of_any_size(batch_size, wrap):
  logits = np.array([[0.0, 2, 1], [3, 0, 0], [0, 0, 5]], np.float32)
  found = _predict(
    _task(wrap=wrap), logits, np.eye(3), [1, 2, 2], batch_size=batch_size
  )
  assert found.predicted.tolist() == [1, 0, 2] and found.labels.tolist() == [1, 2, 2]
  picked = logits[np.arange(3), [1, 2, 2]]
  expected = np.log(np.exp(logits).sum(axis=1)) - picked
  np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
  assert found.num_classes == 3


def test_a_single_logit_decides_by_its_sign():
  problem = _task(losses.sigmoid_cross_entropy)
  found = _predict(problem, [[1.0]], [[-2.0], [0.0], [3.0], [3.0]], [0, 0, 1, 0])
  assert found.predicted.tolist() == [0, 0, 1, 1]
  expected = np.log1p(np.exp([-2.0, 0.0, -3.0, 3.0]))
  np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
  assert evaluation.accuracy(found)["accuracy"] == 0.75


def test_predictions_are_those_of_evaluation_mode():
  # In training mode the toy adds 100, which the sigmoid's loss would show.
  problem = _task(losses.sigmoid_cross_entropy)
  found = _predict(problem, [[1.0]], [[0.0]], [0])
  np.testing.assert_allclose(found.losses, [np.log(2)], rtol=1e-6)


def test_groups_of_the_examples_are_handed_on():
  examples = {"x": np.eye(3, dtype=np.float32), "label": np.arange(3)}
  run = (_task(), jnp.eye(3), jnp.zeros(()))
  assert evaluation.predict(*run, examples).groups is None
  found = evaluation.predict(*run, {**examples, "group": np.array([1, 0, 1])})
  assert found.groups.tolist() == [1, 0, 1]


def test_one_program_serves_every_evaluation():
  problem = _task()
  params, x, labels = np.eye(3, dtype=np.float32), np.eye(3), [0, 1, 2]
  _predict(problem, params, x, labels)
  with jax.no_tracing():
    _predict(problem, 2 * params, x, labels)
