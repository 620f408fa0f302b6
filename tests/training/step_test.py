"""One update by hand, and no update from the first non-finite step on."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import weighted_update
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import devices
from l2rw_jax.training import step as step_lib

_SGD = optax.sgd(0.1, momentum=0.9)
_UNIFORM = baselines.uniform()


def _problem(axis_name=None):
  """Squared errors of x @ p; the model state is the largest prediction so far."""

  def forward(params, model_state, batch, key, train):
    del key, train
    outputs = batch["x"] @ params["p"]
    largest = jnp.max(jax.lax.stop_gradient(outputs))
    return outputs, {"largest": jnp.maximum(model_state["largest"], largest)}

  return base.Problem(
    forward=forward,
    loss=lambda outputs, batch: (outputs - batch["y"]) ** 2,
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=2,
    class_counts=jnp.array([2, 2]),
    num_examples=4,
    num_steps=10,
    axis_name=axis_name,
  )


def _counting(method):
  """The method with a state that counts its steps."""

  def gradients(state, problem, inputs):
    result, _ = method.gradients((), problem, inputs)
    return result, state + 1

  return method._replace(gradients=gradients)


def _state(optimizer=_SGD):
  params = {"p": jnp.array([1.0, -2.0])}
  model_state = {"largest": jnp.array(-5.0)}
  return step_lib.init_state(params, model_state, jnp.zeros((), jnp.int32), optimizer)


_X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]], np.float32)
_Y = np.array([0.0, 0.0, 0.0, 2.0], np.float32)
_GOOD = {"x": _X, "y": _Y, "label": np.zeros(4, np.int32)}
_META = {"x": np.ones((1, 2), np.float32), "y": np.ones(1, np.float32)}


@functools.lru_cache
def _compiled(method, optimizer):
  return jax.jit(
    functools.partial(
      step_lib.train_step, problem=_problem(), method=method, optimizer=optimizer
    )
  )


def _step(state, batch=_GOOD, method=_UNIFORM, meta=None, optimizer=_SGD):
  return _compiled(method, optimizer)(state, batch, meta, jax.random.key(0))


def test_step_by_hand():
  counting = _counting(_UNIFORM)
  state, output = _step(_state(), method=counting)
  # The residuals of the examples are 1, -2, -1, 0 and their losses 1, 4, 1, 0.
  gradient = 2 * np.array([1.0, -2.0, -1.0, 0.0]) @ _X / 4
  np.testing.assert_allclose(state.params["p"], [1.0, -2.0] - 0.1 * gradient, rtol=1e-6)
  np.testing.assert_allclose(state.opt_state[0].trace["p"], gradient, rtol=1e-6)
  assert state.model_state["largest"] == 2.0
  assert (state.step, state.method_state, state.failure.step) == (1, 1, -1)
  np.testing.assert_allclose(output.weights, np.ones(4))
  assert output.metrics["loss"] == output.metrics["weighted_loss"] == 1.5
  np.testing.assert_allclose(output.metrics["effective_share"], 1)
  norm = np.linalg.norm(gradient)
  np.testing.assert_allclose(output.metrics["grad_norm"], norm, rtol=1e-6)


@pytest.mark.parametrize(
  ("optimizer", "message"),
  [
    (optax.lbfgs(), r"outer optimizer .* also needs .*grad.* \(a line search\)"),
    (optax.contrib.sam(_SGD, _SGD), "does not accept value"),
    (optax.lookahead(_SGD, 5, 0.5), "outer optimizer is optax.lookahead"),
  ],
  ids=["line search", "sharpness-aware", "lookahead"],
)
def test_an_unsupported_outer_optimizer_is_a_one_line_error(optimizer, message):
  with pytest.raises(base.InputError, match=message):
    _step(_state(optimizer), optimizer=optimizer)


def test_complex_parameters_descend():
  def forward(params, model_state, batch, key, train):
    del key, train
    return batch["x"].astype(jnp.complex64) @ params["p"], model_state

  problem = dataclasses.replace(
    _problem(), forward=forward, loss=lambda outputs, _: jnp.abs(outputs - 1j) ** 2
  )
  params = {"p": jnp.zeros(2, jnp.complex64)}
  state = step_lib.init_state(params, {}, (), _SGD)
  state, _ = step_lib.train_step(
    *(state, _GOOD, None, jax.random.key(0)),
    problem=problem,
    method=_UNIFORM,
    optimizer=_SGD,
  )
  np.testing.assert_allclose(state.params["p"], 0.2j * _X.mean(0), rtol=1e-6)


def test_parameters_that_cannot_be_trained_are_held_fixed():
  key = jax.random.key(5)
  params = {"p": jnp.array([1.0, -2.0]), "size": jnp.array(3), "key": key}
  optimizer = optax.adamw(0.1, weight_decay=0.5)
  model_state = {"largest": jnp.array(-5.0)}
  state = step_lib.init_state(params, model_state, (), optimizer)
  state, _ = step_lib.train_step(
    *(state, _GOOD, None, jax.random.key(0)),
    problem=_problem(),
    method=_UNIFORM,
    optimizer=optimizer,
  )
  assert not jnp.array_equal(state.params["p"], params["p"])
  assert state.params["size"] == 3 and state.params["key"] == key


def _weighted(weights):
  def gradients(state, problem, inputs):
    return weighted_update.weighted_gradients(
      problem, inputs, lambda losses: jnp.array(weights, losses.dtype)
    ), state

  return base.Method(gradients)


@pytest.mark.parametrize(
  ("weights", "share"),
  [
    ([0.5, 0.5, 0, 0], 0.5),
    ([1, 0, 0, 0], 0.25),
    ([0, 0, 0, 0], 0),
    ([0.75, 0.25, 0, 0], 1 / (0.5625 + 0.0625) / 4),
  ],
)
def test_weights_are_in_units_of_the_uniform_weight(weights, share):
  _, output = _step(_state(), method=_weighted(weights))
  np.testing.assert_allclose(output.weights, 4 * np.array(weights))
  np.testing.assert_allclose(output.metrics["effective_share"], share, rtol=1e-6)
  expected = np.dot(weights, [1, 4, 1, 0])
  np.testing.assert_allclose(output.metrics["weighted_loss"], expected, rtol=1e-6)
  assert output.metrics["loss"] == 1.5


def _batch_with(**columns):
  return {**_GOOD, **{k: np.asarray(v, np.float32) for k, v in columns.items()}}


def _nan_gradient(state, problem, inputs):
  result, state = _UNIFORM.gradients(state, problem, inputs)
  bad = jnp.where(inputs.step >= 0, jnp.nan, 0.0)
  return result._replace(grads=jax.tree.map(lambda g: g + bad, result.grads)), state


_NAN_GRADIENT = base.Method(_nan_gradient)
_L2RW = l2rw.l2rw()
_HUGE_STEP = optax.sgd(3e38)
_NONE = base.Fault.NONE
_CASES = {
  "nan_loss": ({"batch": _batch_with(y=[np.nan, 0, 0, np.nan])}, 2, _NONE),
  "infinite_loss": ({"batch": _batch_with(y=[0, 1e30, 0, 0])}, 1, _NONE),
  "nan_gradient": ({"method": _NAN_GRADIENT}, 0, _NONE),
  "direction": (
    {"method": _L2RW, "meta": {**_META, "y": _META["y"] + np.nan}},
    0,
    base.Fault.META_LOSSES,
  ),
  "loss_and_direction": (
    {
      "method": _L2RW,
      "batch": _batch_with(y=[np.nan, 0, 0, 0]),
      "meta": {**_META, "y": _META["y"] + np.nan},
    },
    1,
    base.Fault.META_LOSSES,
  ),
  "parameters": ({"optimizer": _HUGE_STEP}, 0, _NONE),
  # This update contains a `jax.lax.cond`, so it is not computed a second time.
  "parameters_of_a_cond": (
    {"optimizer": optax.apply_if_finite(_HUGE_STEP, 1)},
    0,
    _NONE,
  ),
}


@pytest.mark.parametrize("name", _CASES)
def test_non_finite_step_changes_nothing(name):
  case, losses, fault = _CASES[name]
  optimizer = case.get("optimizer", _SGD)
  method = _counting(case.get("method", _UNIFORM))
  meta = case.get("meta", _META if case.get("method") is _L2RW else None)
  case = {**case, "method": method, "meta": meta}
  before = _state(optimizer)
  if optimizer is _SGD:  # After one step the momentum is not zero.
    before, _ = _step(before, method=_counting(_UNIFORM))
  after, _ = _step(before, **case)
  chex.assert_trees_all_equal(
    after._replace(failure=None), before._replace(failure=None)
  )
  failure = jax.device_get(after.failure)
  assert failure.step == before.step
  assert failure.losses == losses and failure.fault == fault


def test_no_step_follows_the_first_failure():
  counting = _counting(_UNIFORM)
  state, _ = _step(_state(), method=counting)
  failed, _ = _step(state, _batch_with(y=[np.nan, np.nan, 0, 0]), method=counting)
  for batch in (_GOOD, _batch_with(y=[np.nan] * 4), _GOOD):
    later, _ = _step(failed, batch, method=counting)
    chex.assert_trees_all_equal(later, failed)
  assert (failed.failure.step, failed.failure.losses) == (1, 2)
  chex.assert_trees_all_equal(failed.params, state.params)


def test_non_finite_model_state_is_not_kept():
  def gradients(state, problem, inputs):
    result, state = _UNIFORM.gradients(state, problem, inputs)
    return result._replace(model_state={"largest": jnp.array(jnp.inf)}), state

  state, _ = _step(_state(), method=base.Method(gradients))
  assert state.model_state["largest"] == -5.0 and state.step == 0
  assert (state.failure.step, state.failure.losses) == (0, 0)


def test_model_state_that_overflows_in_its_type_is_not_kept():
  def gradients(state, problem, inputs):
    wide = inputs._replace(model_state={"largest": jnp.float32(-5)})
    result, state = _UNIFORM.gradients(state, problem, wide)
    largest = inputs.step.astype(jnp.float32) + 1e5
    return result._replace(model_state={"largest": largest}), state

  state = _state()._replace(model_state={"largest": jnp.float16(-5)})
  after, _ = _step(state, method=base.Method(gradients))
  assert after.model_state["largest"] == -5 and after.failure.step == 0


@pytest.mark.parametrize("entry", [300.0, 1e-4])
def test_norm_of_a_gradient_in_float16_neither_overflows_nor_vanishes(entry):
  def gradients(state, problem, inputs):
    result, state = _UNIFORM.gradients(state, problem, inputs)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, entry, jnp.float16), result.grads)
    return result._replace(grads=grads), state

  state = _state(optax.sgd(0.1))
  _, output = _step(state, method=base.Method(gradients), optimizer=optax.sgd(0.1))
  size = sum(x.size for x in jax.tree.leaves(state.params))
  expected = float(np.float16(entry)) * size**0.5
  np.testing.assert_allclose(output.metrics["grad_norm"], expected, rtol=1e-6)


def test_nan_on_one_device_stops_all_devices():
  chosen = jax.local_devices()[:2]
  step = jax.pmap(
    functools.partial(
      step_lib.train_step,
      problem=_problem(devices.AXIS_NAME),
      method=_UNIFORM,
      optimizer=_SGD,
    ),
    axis_name=devices.AXIS_NAME,
    in_axes=(None, 0, None, None),
    devices=chosen,
  )
  halves = jax.tree.map(
    lambda x: x.reshape(2, 2, *x.shape[1:]), _batch_with(y=[np.nan, 0, 0, 0])
  )
  after, output = step(_state(), halves, None, jax.random.key(0))
  for device in range(2):
    local = jax.tree.map(lambda x, device=device: x[device], after)
    chex.assert_trees_all_equal(local.params, _state().params)
    assert (local.failure.step, local.failure.losses, local.step) == (0, 1, 0)
  np.testing.assert_allclose(output.weights, np.ones((2, 2)))


def test_every_step_has_a_different_key():
  random = baselines.random()
  state = _state()
  drawn = []
  for _ in range(3):
    state, output = _step(state, method=random)
    drawn.append(tuple(output.weights.tolist()))
  _, again = _step(_state(), method=random)
  assert len(set(drawn)) == 3 and tuple(again.weights.tolist()) == drawn[0]


def test_state_keeps_its_dtypes_under_x64():
  # Model state in float32 and inputs in float64 need implicit promotion.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    batch = {k: v.astype(np.float64) if k == "x" else v for k, v in _GOOD.items()}
    state = jax.eval_shape(_state)
    state = jax.tree.map(
      lambda x: x.update(dtype=jnp.float32) if x.dtype == jnp.float64 else x, state
    )
    step = functools.partial(
      step_lib.train_step, problem=_problem(), method=_UNIFORM, optimizer=_SGD
    )
    new_state, _ = jax.eval_shape(step, state, batch, None, jax.random.key(0))
    assert new_state == state


def test_first_failed_run_and_its_explanation():
  failure = step_lib.Failure(
    np.array([-1, 7, 3, 5]), np.array([0, 2, 0, 0]), np.array([0, 0, 0, 2])
  )
  assert step_lib.first_failed_run(failure) == 2
  no_failure = failure._replace(step=np.full(4, -1))
  assert step_lib.first_failed_run(no_failure) is None
  explain = step_lib.explain_failure
  assert explain(failure, 1, 8)[0] == "2 of 8 losses are NaN or infinite"
  assert explain(failure, 2, 8)[0] == "the update is NaN or infinite"
  assert "but their gradient is NaN" in explain(failure, 3, 8)[0]
  for fault in list(base.Fault)[1:]:
    codes = np.array([fault.value])
    what, advice = explain(step_lib.Failure(codes, np.zeros(1), codes), 0, 8)
    assert what and "--learning_rate" in advice
