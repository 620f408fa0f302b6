"""Optimizers that monitor the validation loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax import losses
from l2rw_jax.methods import bare
from l2rw_jax.methods import baselines
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import validation


def _held_out(size=30, seed=5):
  return toy_runs.examples(np.random.default_rng(seed), size, (4,), flipped=0.5)


def _reference(values, *, factor, patience, min_scale, rtol=1e-4):
  """The scale after each value, by PyTorch's ReduceLROnPlateau as documented."""
  best, bad, scale, scales = np.inf, 0, 1.0, []
  for value in values:
    if value < best * (1 - rtol):
      best, bad = value, 0
    else:
      bad += 1
    if bad > patience:
      scale, bad = max(scale * factor, min_scale), 0
    scales.append(scale)
  return scales


@pytest.mark.promotes("optax.contrib.reduce_on_plateau mixes float32 with int32")
def test_reduce_on_plateau_matches_pytorch():
  rng = np.random.default_rng(0)
  values = np.concatenate([[3.0, 2.0, 1.0], 1 + rng.random(40)]).astype(np.float32)
  rule = {"factor": 0.1, "patience": 2, "min_scale": 0.005}
  optimizer = validation.reduce_on_plateau(optax.sgd(1.0), 4, **rule)
  params = jnp.ones(())
  state, scales = optimizer.init(params), []
  update = jax.jit(optimizer.update)
  for value in values:
    for _ in range(4):
      updates, state = update(jnp.ones(()), state, params, value=value)
    scales.append(-float(updates))  # In the last update of the epoch.
  expected = _reference(values, **rule)
  np.testing.assert_allclose(scales, expected, rtol=1e-5)
  assert min(expected) == 0.005 and expected[4] == 1.0


def _recording_sgd(values):
  """SGD that records the `value` of every update."""

  def update(grads, state, params=None, *, value, **_):
    del params
    values.append(value)
    return jax.tree.map(lambda g: -0.1 * g, grads), state

  return optax.GradientTransformationExtraArgs(lambda params: (), update)


def _batch(examples):
  return {n: getattr(examples, n) for n in ("image", "label", "index")}


def _begin(method):
  """The problem, the first view of the run of seed 7, and the method's first state."""
  problem = toy_runs.MODEL.problem(
    class_counts=jnp.ones(3), num_examples=40, num_steps=9
  )
  train = _batch(toy_runs.make_splits().train)
  params, model_state = toy_runs.MODEL.init(jax.random.key(0), train)
  view = base.EpochView(7, 0, params, model_state, train, np.random.default_rng(0))
  return problem, view, method.init(jax.random.key(1), problem, params)


def _one_step(method):
  problem, view, method_state = _begin(method)
  params, model_state = view.params, view.model_state
  batch = {n: v[:8] for n, v in view.train.items()}
  method_state = method.refresh(method_state, problem, view)
  values = []
  optimizer = _recording_sgd(values)
  state = step_lib.init_state(params, model_state, method_state, optimizer)
  _, output = step_lib.train_step(
    state,
    batch,
    _batch(toy_runs.make_splits().meta),
    jax.random.key(2),
    problem=problem,
    method=method,
    optimizer=optimizer,
  )
  return problem, params, values[0], output


@pytest.mark.slow
def test_value_defaults_to_the_weighted_loss():
  *_, value, output = _one_step(baselines.random())
  np.testing.assert_allclose(value, output.metrics["weighted_loss"])
  assert abs(value - output.metrics["loss"]) > 1e-3


@pytest.mark.ci
@pytest.mark.parametrize("batch_size", [500, 7])
def test_value_is_the_loss_of_the_validation_set(batch_size):
  held_out = _held_out()
  method = validation.watched(
    baselines.uniform(), {7: held_out, 8: _held_out(seed=6)}, batch_size=batch_size
  )
  problem, params, value, _ = _one_step(method)
  logits, _ = problem.forward(params, {}, {"image": held_out.image}, None, False)
  expected = losses.softmax_cross_entropy(logits, held_out.label)
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize(
  ("last_steps", "is_outermost"), [(1, False), (9, False), (9, True)]
)
def test_fine_tuning_reports_the_meta_loss_unless_it_is_wrapped(
  last_steps, is_outermost
):
  held_out, meta = _held_out(), toy_runs.make_splits().meta
  if is_outermost:
    method = validation.watched(baselines.fine_tuning(last_steps), {7: held_out})
  else:
    first = validation.watched(baselines.uniform(), {7: held_out})
    method = baselines.fine_tuning(last_steps, first)
  problem, params, value, _ = _one_step(method)
  examples = meta if last_steps == 9 and not is_outermost else held_out
  logits, _ = problem.forward(params, {}, {"image": examples.image}, None, False)
  expected = losses.softmax_cross_entropy(logits, examples.label)
  np.testing.assert_allclose(value, expected.mean(), rtol=1e-5)


def test_changed_loss_is_compiled_once():
  traced = []

  def tripled(outputs, batch, class_counts):
    traced.append(class_counts)
    return 3 * losses.softmax_cross_entropy(outputs, batch["label"])

  watched = validation.watched(baselines.uniform(), {7: _held_out()})
  method = changed_loss.changed_loss(watched, tripled, from_epoch=1)
  problem, view, state = _begin(method)
  values = []
  for epoch in range(4):
    state = method.refresh(state, problem, view._replace(epoch=epoch))
    values.append(state.inner.value)
  np.testing.assert_allclose(
    values, values[0] * np.array([1, 3, 3, 3], np.float32), rtol=1e-5
  )
  assert len(traced) == 1


def test_validation_examples_can_be_weighted():
  held_out = _held_out()
  method = validation.watched(
    baselines.uniform(), {7: held_out}, weights=bare.example_weights
  )
  problem, params, value, _ = _one_step(method)
  logits, _ = problem.forward(params, {}, {"image": held_out.image}, None, False)
  expected = losses.softmax_cross_entropy(logits, held_out.label)
  kept = bare.select(logits, jnp.asarray(held_out.label))
  np.testing.assert_allclose(value, expected[kept].mean(), rtol=1e-5)
  assert 0 < kept.sum() < 30


def test_run_reduces_its_learning_rate(tmp_path, monkeypatch):
  # The validation labels contradict the training labels, so that the validation loss
  # only increases.
  held_out = _held_out()
  held_out = held_out._replace(label=(held_out.true_label + 2) % toy_runs.CLASSES)
  method = validation.watched(baselines.uniform(), {0: held_out})
  optimizer = validation.reduce_on_plateau(
    optax.sgd(0.1), 5, factor=0.5, patience=0, min_scale=0.1
  )
  monkeypatch.setattr(toy_runs, "OPTIMIZER", optimizer)
  (whole,) = toy_runs.train(tmp_path / "whole", method, num_steps=20)
  scales = {
    name: x
    for name, x in toy_runs.saved(tmp_path / "whole")[1].items()
    if "scale" in name
  }
  assert [x.item() for x in scales.values()] == [
    0.125
  ]  # Halved after epochs 1, 2 and 3.
  assert whole.metrics["num_steps"] == 20


def test_empty_validation_set_raises():
  with pytest.raises(base.InputError, match="of seed 3 is empty: hold examples out"):
    validation.watched(baselines.uniform(), {3: _held_out(size=0)})


def test_the_order_of_examples_is_that_of_the_watched_method():
  def sample(state, problem, train, rng):
    return np.array([state])

  chooses = baselines.uniform()._replace(sample=sample)
  watched = validation.watched(chooses, {7: _held_out()})
  assert watched.sample(validation.State(jnp.inf, 3), None, None, None) == [3]
