"""The probes of memorization, with and without a run."""

import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax import susceptibility
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import devices
from l2rw_jax.training import evaluation
from l2rw_jax.training import memorization


def _snapshot(model=toy_runs.MODEL, optimizer=toy_runs.OPTIMIZER, step=5, seed=1):
  splits = toy_runs.make_splits(seed)
  params, model_state = model.init(
    jax.random.key(seed), {"image": splits.train.image[:1]}
  )
  problem = model.problem(class_counts=jnp.ones(3), num_examples=40, num_steps=10)
  # As in the middle of a run, the momentum is not zero.
  opt_state = jax.tree.map(lambda x: x + 0.5, optimizer.init(params))
  state = types.SimpleNamespace(
    params=params, model_state=model_state, opt_state=opt_state
  )
  return types.SimpleNamespace(
    seed=seed,
    step=step,
    state=state,
    problem=problem,
    optimizer=optimizer,
    splits=splits,
  )


def test_images_that_do_not_exist_are_refused():
  with pytest.raises(base.InputError, match="unlabeled='foo' must be an array of imag"):
    memorization.susceptibility(unlabeled="foo")


@pytest.mark.slow
def test_probe_is_the_loss_drop_with_random_labels():
  snapshot = _snapshot()
  # The batch has all images, so their order does not matter.
  metrics = memorization.susceptibility(batch_size=40)(snapshot)
  images = snapshot.splits.train.image
  batch = {
    "image": images,
    "label": susceptibility.random_labels(1, 40, 3),
    "index": np.arange(40),
  }
  expected = susceptibility.loss_drop(
    snapshot.problem.losses_fn({}, jax.random.key(0)),
    snapshot.state.params,
    batch,
    optimizer=snapshot.optimizer,
    opt_state=snapshot.state.opt_state,
    has_aux=True,
  )
  expected_drop = pytest.approx(float(expected.drop), rel=1e-4)
  assert metrics == {"susceptibility_drop": expected_drop}


def test_batch_depends_on_seed_and_step():
  probe = memorization.susceptibility(batch_size=8)
  drops = {}
  for seed, step in ((1, 5), (1, 6), (2, 5)):
    # The network and the images are the same, so only the batch differs.
    snapshot = _snapshot(step=step)
    snapshot.seed = seed
    drops[seed, step] = probe(snapshot)["susceptibility_drop"]
    assert drops[seed, step] == probe(snapshot)["susceptibility_drop"]
  assert len(set(drops.values())) == 3


def test_unlabeled_images_may_be_an_array_or_another_split():
  snapshot = _snapshot()
  train = snapshot.splits.train.image
  drop = memorization.susceptibility(40, unlabeled=train)(snapshot)
  assert drop == memorization.susceptibility(40)(snapshot)
  test = memorization.susceptibility(20, unlabeled="test")(snapshot)
  held_out = snapshot.splits.test.image
  assert test == memorization.susceptibility(20, unlabeled=held_out)(snapshot) != drop


def test_probe_uses_the_momentum_of_the_run():
  snapshot = _snapshot()
  probe = memorization.susceptibility(40)
  drop = probe(snapshot)["susceptibility_drop"]
  snapshot.state.opt_state = jax.tree.map(jnp.zeros_like, snapshot.state.opt_state)
  other = probe(snapshot)["susceptibility_drop"]
  assert abs(other - drop) > 1e-3 * abs(drop)


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"unlabeled": "validation"}, "the unlabeled set is empty: hold images out"),
    ({"batch_size": 41}, "a batch needs 41 unlabeled images, but there are 40"),
    (
      {"unlabeled": np.zeros((9, 4), np.uint8)},
      r"are uint8 \(4,\), but the training images are float32 \(4,\); give both",
    ),
    ({"unlabeled": np.zeros((9, 5), np.float32)}, r"float32 \(5,\), but the train"),
  ],
)
def test_unusable_images_raise(options, match):
  probe = memorization.susceptibility(**{"batch_size": 8, **options})
  with pytest.raises(base.InputError, match=match):
    probe(_snapshot())


def test_empty_batch_or_several_labels_raise():
  with pytest.raises(
    base.InputError, match="batch_size=0 must be an integer of at least 1"
  ):
    memorization.susceptibility(0)
  snapshot = _snapshot()
  train = snapshot.splits.train
  train = train._replace(label=np.stack([train.label] * 2, axis=1))
  snapshot.splits = snapshot.splits._replace(train=train)
  with pytest.raises(base.InputError, match=r"labels of shape \(40, 2\)"):
    memorization.susceptibility(8)(snapshot)


class _Normed(nn.Module):
  """A network with BatchNorm over the device axis, and flax's dropout."""

  @nn.compact
  def __call__(self, x, train=False):
    norm = nn.BatchNorm(use_running_average=not train, axis_name=devices.AXIS_NAME)
    x = nn.relu(norm(nn.Dense(8)(x)))
    return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_batch_norm_and_dropout_run_in_training_mode():
  model = classifier.Classifier(_Normed(), 3)
  snapshot = _snapshot(model, optax.sgd(0.0))
  probe = memorization.susceptibility(40)
  # With learning rate 0 and the same dropout mask and batch, the loss does not change.
  assert probe(snapshot)["susceptibility_drop"] == pytest.approx(0, abs=1e-6)
  snapshot = _snapshot(model, optax.sgd(0.1))
  drop = probe(snapshot)["susceptibility_drop"]
  assert abs(drop) > 1e-3
  # The running statistics are not used.
  changed = jax.tree.map(lambda x: x + 100, snapshot.state.model_state)
  snapshot.state.model_state = changed
  assert probe(snapshot)["susceptibility_drop"] == drop


def test_probe_compiles_once():
  model = classifier.Classifier(mlp.MLP(3, hidden=(4,)), 3)
  probe = memorization.susceptibility(batch_size=8)
  probe(_snapshot(model))
  snapshot = _snapshot(model, step=6)
  other_seed = _snapshot(model, seed=2)
  with jax.no_tracing():
    probe(snapshot)
    probe(other_seed)


def test_accuracy_on_clean_and_wrong_labels():
  label, true = np.array([0, 1, 2, 1, 0]), np.array([0, 1, 1, 1, 2])
  predicted = np.array([0, 2, 2, 1, 1])

  def measure(label, true, predicted):
    examples = types.SimpleNamespace(label=label, true_label=true)
    return memorization.accuracy(
      types.SimpleNamespace(
        train=evaluation.Predictions(label, predicted, np.zeros(len(label)), 3),
        splits=types.SimpleNamespace(train=examples),
      )
    )

  assert measure(label, true, predicted) == {
    "train_accuracy": 3 / 5,
    "train_accuracy_clean": pytest.approx(2 / 3),
    "train_accuracy_wrong": 1 / 2,
  }
  metrics = measure(label, label, predicted)
  assert metrics == {"train_accuracy": 0.6, "train_accuracy_clean": 0.6}


def test_zeta_is_the_mean_without_drops_after_the_last_step():
  probes = {"step": [0, 4, 8, 10], "susceptibility_drop": [0.25, 0.5, 0.75, 9.0]}
  metrics = {"num_steps": 10, "probes": probes}
  assert memorization.zeta(metrics) == 0.5
  assert memorization.zeta({**metrics, "num_steps": 8}) == 0.375
  probes["susceptibility_drop"][1] = None  # NaN in results.json.
  assert memorization.zeta(metrics) is None
  for other in ({}, {"probes": {"step": [0], "train_accuracy": [0.1]}}):
    with pytest.raises(base.InputError, match="the run has no loss drops"):
      memorization.zeta({"num_steps": 10, **other})


def test_probes_do_not_change_the_run(tmp_path):
  probes = (memorization.susceptibility(batch_size=8), memorization.accuracy)
  settings = {"seeds": (0, 1), "num_steps": 6, "eval_every": 3}
  method = baselines.uniform()
  plain = toy_runs.train(tmp_path / "plain", method, **settings)
  probed = toy_runs.train(tmp_path / "probed", method, probes=probes, **settings)
  for one, other in zip(plain, probed, strict=True):
    assert one.metrics["params_sha256"] == other.metrics["params_sha256"]
    assert one.metrics["last"] == other.metrics["last"]
    np.testing.assert_array_equal(
      one.weights["last_weight"], other.weights["last_weight"]
    )
    metrics = other.metrics["probes"]
    assert metrics["step"] == [0, 3, 6]
    assert np.isfinite(metrics["susceptibility_drop"]).all()
    shares = np.array([13 / 40, 27 / 40])  # Of wrong and clean labels.
    both = np.array([metrics["train_accuracy_wrong"], metrics["train_accuracy_clean"]])
    np.testing.assert_allclose(shares @ both, metrics["train_accuracy"], rtol=1e-6)
