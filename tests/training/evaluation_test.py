"""Metrics against values computed by hand; evaluators and probes in whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop


def _predictions(labels, predicted, num_classes=3, groups=None):
  labels, predicted = np.array(labels), np.array(predicted)
  values = np.arange(len(labels), dtype=np.float32)
  groups = None if groups is None else np.array(groups)
  return evaluation.Predictions(labels, predicted, values, num_classes, groups)


def test_accuracy_and_loss():
  metrics = evaluation.accuracy(_predictions([0, 1, 2, 2], [0, 1, 1, 2]))
  assert metrics == {"accuracy": 0.75, "loss": 1.5}


@pytest.mark.parametrize(
  "evaluator",
  [
    evaluation.accuracy,
    evaluation.per_class_accuracy,
    evaluation.shot_accuracy([2, 2], 5, 1),
    evaluation.equal_opportunity,
  ],
)
def test_predictions_and_labels_must_have_the_same_shape(evaluator):
  # Comparing each prediction with all labels would give 0.625.
  predictions = _predictions([[0], [1], [1], [1]], [0, 1, 1, 1])
  with pytest.raises(base.InputError, match=r"predictions of shape \[4\] do not match"):
    evaluator(predictions)


def test_equal_opportunity_of_examples_with_several_labels():
  labels, predicted = [[0, 1], [0, 1], [0, 1]], [[0, 1], [0, 0], [1, 0]]
  actual = evaluation.equal_opportunity(_predictions(labels, predicted, 2, [0, 0, 1]))
  flat = _predictions(np.ravel(labels), np.ravel(predicted), 2, [0, 0, 0, 0, 1, 1])
  assert actual == evaluation.equal_opportunity(flat)


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    # Rounded down, the groups 0.2 and 0.7 would be one group.
    ({"groups": np.array([0.2, 0.7, 0.2])}, "groups of predictions must be integers"),
    ({"labels": np.array([0, 0.5, 1])}, "the labels of predictions must be integers"),
    ({"labels": np.array(["0", "1", "1"])}, "labels of predictions must be integers"),
    ({"predicted": np.array([0, 1, np.nan])}, "predicted of predictions must be int"),
    ({"groups": np.array([0, 1])}, r"groups of shape \[2\] do not match labels"),
    ({"labels": np.zeros(0), "predicted": np.zeros(0)}, "there are no examples"),
  ],
)
@pytest.mark.parametrize(
  "evaluator",
  [evaluation.accuracy, evaluation.per_class_accuracy, evaluation.equal_opportunity],
)
def test_invalid_predictions_are_refused(evaluator, changed, message):
  labels = np.array([0, 1, 1])
  predictions = evaluation.Predictions(labels, labels, np.ones(3), 2, np.arange(3))
  evaluator(predictions)
  with pytest.raises(base.InputError, match=message):
    evaluator(predictions._replace(**changed))


def test_predictions_may_be_lists_booleans_and_whole_floats():
  labels, predicted = [True, False, True], [1.0, 1.0, 1.0]
  predictions = evaluation.Predictions(labels, predicted, [0.5, 1.0, 1.5], 2, [0, 0, 1])
  assert evaluation.accuracy(predictions) == {"accuracy": 2 / 3, "loss": 1.0}
  by_class = evaluation.per_class_accuracy(predictions)
  assert by_class == {
    "accuracy_class_0": 0,
    "accuracy_class_1": 1,
    "balanced_accuracy": 0.5,
  }
  assert evaluation.equal_opportunity(predictions)["worst_group_accuracy"] == 0.5


def test_balanced_accuracy_needs_an_example_of_a_class():
  predictions = evaluation.Predictions(
    np.array([7, 8]), np.array([0, 1]), np.ones(2), 2
  )
  message = "no label is a class from 0 to 1; the first is 7"
  with pytest.raises(base.InputError, match=message):
    evaluation.per_class_accuracy(predictions)


def test_the_mean_of_losses_in_bfloat16_is_accurate():
  # A sum in bfloat16 stops at 256.
  losses = np.asarray(jnp.ones(1000, jnp.bfloat16))
  labels = np.zeros(1000, int)
  metrics = evaluation.accuracy(evaluation.Predictions(labels, labels, losses, 2))
  assert metrics == {"accuracy": 1.0, "loss": 1.0}


def test_accuracy_of_each_class_and_balanced_accuracy():
  metrics = evaluation.per_class_accuracy(
    _predictions([0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0])
  )
  assert metrics == {
    "accuracy_class_0": 0.75,
    "accuracy_class_1": 1.0,
    "accuracy_class_2": 0.0,
    "balanced_accuracy": pytest.approx(7 / 12),
  }


def test_absent_class_is_ignored():
  metrics = evaluation.per_class_accuracy(_predictions([2, 0, 2], [2, 1, 0]))
  assert metrics == {
    "accuracy_class_0": 0.0,
    "accuracy_class_2": 0.5,
    "balanced_accuracy": 0.25,
  }


_LONG_TAIL = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(
  ("counts", "expected"),
  [
    ([500, 101, 100, 20, 19, 5], (100, 20)),
    # No class has fewer than 20 examples: groups of 3, 4 and 3 classes.
    (_LONG_TAIL, (1795, 140)),
    ([500, 400, 300, 200], (499, 201)),
    # Classes of the same size stay in one group: two groups, then one.
    ([5000] * 5 + [50] * 5, (4999, 51)),
    ([50] * 10, (50, 50)),
    ([0, 3], (2, 1)),
    ([7], (7, 7)),
  ],
)
def test_shot_thresholds(counts, expected):
  assert evaluation.shot_thresholds(counts) == expected
  assert evaluation.shot_thresholds(np.array(counts)[::-1]) == expected


def test_shot_accuracy():
  # The accuracies of the classes are 3/4, 1, 0 and 1/2.
  predictions = _predictions(
    [0, 0, 0, 0, 1, 2, 3, 3], [0, 0, 0, 1, 1, 0, 3, 0], num_classes=4
  )
  metrics = evaluation.shot_accuracy([101, 400, 100, 19], 100, 20)(predictions)
  assert metrics == {
    "many_shot_accuracy": 0.875,
    "medium_shot_accuracy": 0.0,
    "few_shot_accuracy": 0.5,
  }
  # Classes exactly at a threshold are medium-shot.
  metrics = evaluation.shot_accuracy([100, 20, 20, 100], 100, 20)(predictions)
  assert metrics == {"medium_shot_accuracy": 0.5625}


def test_shot_group_without_test_examples_is_left_out():
  predictions = _predictions([0, 0], [0, 1])
  metrics = evaluation.shot_accuracy([500, 50, 5], 100, 20)(predictions)
  assert metrics == {"many_shot_accuracy": 0.5}


def test_overlapping_shot_thresholds_raise():
  with pytest.raises(base.InputError, match="few=102 must not be above many=100 plus"):
    evaluation.shot_accuracy([1, 2], 100, 102)


def test_shot_thresholds_may_have_a_narrow_type():
  # In uint8, 255 + 1 is 0.
  evaluate = evaluation.shot_accuracy([300, 5], np.uint8(255), np.uint8(20))
  metrics = evaluate(_predictions([0, 1], [0, 0]))
  assert metrics == {"many_shot_accuracy": 1.0, "few_shot_accuracy": 0.0}


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_of_shot_accuracy_must_be_classes(label):
  evaluate = evaluation.shot_accuracy([500, 50, 5], 100, 20)
  message = f"a test label is {label}, but class_counts has the classes 0 to 2"
  with pytest.raises(base.InputError, match=message):
    evaluate(_predictions([0, label], [0, 0]))


def test_thresholds_and_gaps_need_examples():
  with pytest.raises(base.InputError, match="class_counts is empty"):
    evaluation.shot_thresholds([])
  with pytest.raises(base.InputError, match="there are no examples"):
    evaluation.equal_opportunity(_predictions([], []))


def test_equal_opportunity_of_classes():
  # Rates 3/4, 1 and 0 have the gaps 1/4, 3/4 and 1.
  labels, predicted = [0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 0]
  expected = {
    "tpr_gap_max": 1.0,
    "tpr_gap_mean": pytest.approx(2 / 3),
    "worst_group_accuracy": 0.0,
  }
  for groups in (None, labels):
    metrics = evaluation.equal_opportunity(
      _predictions(labels, predicted, groups=groups)
    )
    assert metrics == expected
  metrics = evaluation.equal_opportunity(_predictions([2, 2], [2, 1]))
  assert metrics["tpr_gap_max"] == metrics["tpr_gap_mean"] == 0
  assert metrics["worst_group_accuracy"] == 0.5


def test_equal_opportunity_of_an_attribute():
  # Class 0 has rates 1, 1/2, 0 in groups 0, 1, 4; class 1 has rates 1, 1 in groups 0,
  # 1; class 2 occurs in group 0 only, so it has no pair.
  labels = [0, 0, 0, 0, 1, 1, 2, 2, 2]
  groups = [0, 1, 1, 4, 0, 1, 0, 0, 0]
  predicted = [0, 0, 1, 1, 1, 1, 2, 0, 0]
  metrics = evaluation.equal_opportunity(_predictions(labels, predicted, groups=groups))
  assert metrics == {
    "tpr_gap_max": 1.0,
    "tpr_gap_mean": (0.5 + 1 + 0.5 + 0) / 4,
    "worst_group_accuracy": 0.0,
    "worst_cell_accuracy": 0.0,
    "accuracy_group_0": 0.6,
    "accuracy_group_1": pytest.approx(2 / 3),
    "accuracy_group_4": 0.0,
  }


def _problem(loss=losses.softmax_cross_entropy, wrap=lambda logits: logits):
  """A problem with logits x @ p. Training mode adds 100, in place of BatchNorm."""

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
def test_predict_with_any_batch_size(batch_size, wrap):
  logits = np.array([[0.0, 2, 1], [3, 0, 0], [0, 0, 5]], np.float32)
  predictions = _predict(
    _problem(wrap=wrap), logits, np.eye(3), [1, 2, 2], batch_size=batch_size
  )
  assert predictions.predicted.tolist() == [
    1,
    0,
    2,
  ] and predictions.labels.tolist() == [1, 2, 2]
  picked = logits[np.arange(3), [1, 2, 2]]
  expected = np.log(np.exp(logits).sum(axis=1)) - picked
  np.testing.assert_allclose(predictions.losses, expected, rtol=1e-6)
  assert predictions.num_classes == 3


def test_predict_with_a_single_logit():
  problem = _problem(losses.sigmoid_cross_entropy)
  predictions = _predict(problem, [[1.0]], [[-2.0], [0.0], [3.0], [3.0]], [0, 0, 1, 0])
  assert predictions.predicted.tolist() == [0, 0, 1, 1]
  expected = np.log1p(np.exp([-2.0, 0.0, -3.0, 3.0]))
  np.testing.assert_allclose(predictions.losses, expected, rtol=1e-6)
  assert evaluation.accuracy(predictions)["accuracy"] == 0.75


def test_predict_uses_evaluation_mode():
  # In training mode 100 would be added, which changes the loss.
  problem = _problem(losses.sigmoid_cross_entropy)
  predictions = _predict(problem, [[1.0]], [[0.0]], [0])
  np.testing.assert_allclose(predictions.losses, [np.log(2)], rtol=1e-6)


def test_predict_returns_the_groups():
  examples = {"x": np.eye(3, dtype=np.float32), "label": np.arange(3)}
  run = (_problem(), jnp.eye(3), jnp.zeros(()))
  assert evaluation.predict(*run, examples).groups is None
  predictions = evaluation.predict(*run, {**examples, "group": np.array([1, 0, 1])})
  assert predictions.groups.tolist() == [1, 0, 1]


def test_predict_compiles_once():
  problem = _problem()
  params, x, labels = np.eye(3, dtype=np.float32), np.eye(3), [0, 1, 2]
  _predict(problem, params, x, labels)
  with jax.no_tracing():
    _predict(problem, 2 * params, x, labels)


_UNIFORM = baselines.uniform()


def _norm(snapshot):
  leaves = jax.tree.leaves(snapshot.state.params)
  return {"norm": float(np.sqrt(sum(np.sum(np.square(x)) for x in leaves)))}


def _wrong(snapshot):
  right = snapshot.train.predicted == snapshot.train.labels
  return {"wrong": float(1 - right.mean())}


def test_probes_run_at_the_start_and_at_every_evaluation(tmp_path):
  plain = toy_runs.train(tmp_path / "plain", _UNIFORM, seeds=(0, 1))
  probed = toy_runs.train(
    tmp_path / "probed", _UNIFORM, seeds=(0, 1), probes=(_norm, _wrong)
  )
  for seed, (plain_run, probed_run) in enumerate(zip(plain, probed, strict=True)):
    metrics, probed_metrics = plain_run.metrics, probed_run.metrics
    assert metrics["params_sha256"] == probed_metrics["params_sha256"]
    assert "probes" not in metrics
    probes = probed_metrics.pop("probes")
    assert probes["step"] == [0, 3, 6, 7]
    assert len(set(probes["norm"])) == 4
    assert probes["wrong"][-1] < probes["wrong"][0]
    files, probed_files = (m.pop("files") for m in (metrics, probed_metrics))
    assert files["weights.csv"] == probed_files["weights.csv"]
    assert probed_metrics == metrics
    rows = toy_runs.rows(tmp_path / "probed" / f"seed-{seed}")
    assert rows[0] == {
      "step": 0,
      "probe/norm": probes["norm"][0],
      "probe/wrong": probes["wrong"][0],
    }


def test_resumed_run_has_one_probe_at_the_start(tmp_path):
  short = {"seeds": (0,), "probes": (_norm,), "checkpoint_every": 3}

  def interrupt(snapshot):
    if snapshot.step == 6:
      raise KeyboardInterrupt
    return _norm(snapshot)

  with pytest.raises(KeyboardInterrupt):
    toy_runs.train(tmp_path / "a", _UNIFORM, **(short | {"probes": (interrupt,)}))
  (resumed,) = toy_runs.train(tmp_path / "a", _UNIFORM, **short)
  (whole,) = toy_runs.train(tmp_path / "b", _UNIFORM, **short)
  assert resumed.metrics == whole.metrics
  timing = json.loads((tmp_path / "a" / "timing.json").read_text())
  assert [step for step, _ in timing["evaluations"]] == [3, 6, 7]
  assert timing["steps"] == 7


class _Rows:
  """A row source of images that are gathered on demand."""

  dtype = np.dtype(np.uint8)

  def __init__(self, bank, rows):
    self._bank, self._rows = bank, rows
    self.shape = (*rows.shape, *bank.shape[1:])

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, chosen):
    return self._bank[self._rows[chosen]]


class _Pairs(classifier.Classifier):
  """A classifier whose examples are two images with a label each."""

  def forward(self, params, model_state, batch, key, train):
    image = batch["image"].astype(jnp.float32) / 255
    pairs = {**batch, "image": image.reshape(-1, image.shape[-1])}
    outputs, state = super().forward(params, model_state, pairs, key, train)
    return outputs.reshape(-1, 2, outputs.shape[-1]), state

  def init(self, key, batch):
    image = batch["image"].astype(jnp.float32).reshape(-1, batch["image"].shape[-1])
    return super().init(key, {**batch, "image": image})

  def check(self, batch, num_classes):
    assert num_classes == self.num_classes

  def loss(self, outputs, batch):
    flat = {"label": batch["label"].reshape(-1)}
    return super().loss(outputs.reshape(-1, 3), flat).reshape(-1, 2).mean(1)


def _pairs(examples, rng):
  rows = rng.integers(len(examples.label), size=(len(examples.label), 2))
  bank = np.clip(60 * examples.image + 128, 0, 255).astype(np.uint8)
  return examples._replace(
    image=_Rows(bank, rows),
    label=examples.label[rows],
    true_label=examples.true_label[rows],
  )


def test_examples_from_a_row_source_with_several_labels(tmp_path):
  splits = toy_runs.make_splits(num_train=80)
  rng = np.random.default_rng(0)
  pairs = {name: _pairs(getattr(splits, name), rng) for name in ("train", "test")}
  splits = splits._replace(**pairs)
  model = _Pairs(toy_runs.MODEL.model, 3)
  config = config_lib.Config(num_steps=40, batch_size=8, num_devices=1, eval_every=20)
  (result,) = loop.train(
    config,
    model,
    _UNIFORM,
    toy_runs.OPTIMIZER,
    [splits],
    tmp_path,
    probes=(lambda s: {"shape": float(np.prod(s.train.predicted.shape))},),
  )
  assert result.metrics["last"]["accuracy"] > 0.8
  assert result.metrics["probes"]["shape"] == [160.0] * 3
  assert set(result.weights) == {
    *("index", "source_index", "mean_weight", "last_weight", "seen", "rejected")
  }
  predictions = evaluation.Predictions(
    np.array([[0, 1], [2, 2]]), np.array([[0, 1], [0, 2]]), np.zeros(2), 3
  )
  assert evaluation.accuracy(predictions)["accuracy"] == 0.75
  bad = splits.train._replace(label=splits.train.label + 1)
  with pytest.raises(base.InputError, match=r"example .* has label 3"):
    loop.train(
      config,
      model,
      _UNIFORM,
      toy_runs.OPTIMIZER,
      [splits._replace(train=bad)],
      tmp_path / "bad",
    )


def test_gaps_of_thousands_of_classes():
  # There are 200 million pairs, which do not fit in memory as a list.
  num_classes = 20_000
  labels = np.repeat(np.arange(num_classes), 4)
  num_right = np.arange(num_classes) % 5  # Of four examples in each class.
  predicted = np.where(np.arange(4) < num_right[:, None], labels.reshape(-1, 4), -1)
  metrics = evaluation.equal_opportunity(_predictions(labels, predicted.ravel()))
  assert metrics["tpr_gap_max"] == 1 and metrics["worst_group_accuracy"] == 0
  # The 4, 3, 2 and 1 pairs of different rates differ by 1/4, 1/2, 3/4 and 1.
  size = num_classes // 5
  total = size**2 * (4 * 0.25 + 3 * 0.5 + 2 * 0.75 + 1)
  mean = total / (num_classes * (num_classes - 1) / 2)
  assert metrics["tpr_gap_mean"] == pytest.approx(mean, rel=1e-12)
  by_class = evaluation.per_class_accuracy(
    _predictions(labels, predicted.ravel(), num_classes)
  )
  assert by_class["accuracy_class_19999"] == 1 and len(by_class) == num_classes + 1
