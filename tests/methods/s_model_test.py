"""The S-model: its loss, its two gradients, and the learned layer."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import label_transition
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import s_model
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _draw(seed, size=6, num_logits=3):
  rng = np.random.default_rng(seed)
  classes = max(num_logits, 2)
  logits, layer = rng.normal(size=(size, num_logits)), rng.normal(size=(classes,) * 2)
  return jnp.asarray(logits), rng.integers(classes, size=size), jnp.asarray(layer)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_logits", [1, 3])
def test_loss_equals_the_product_of_two_softmaxes(num_logits):
  logits, labels, layer = _draw(0, num_logits=num_logits)
  z = np.asarray(logits)
  if num_logits == 1:
    z = np.concatenate([0 * z, z], axis=1)
  p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
  t = np.exp(layer) / np.exp(layer).sum(axis=1, keepdims=True)
  expected = [-np.log((p @ t)[i, y]) for i, y in enumerate(labels)]
  result = jax.jit(s_model.s_model_loss)(logits, labels, layer)
  np.testing.assert_allclose(result, expected, rtol=1e-12)
  forward = losses.forward_corrected(logits, jnp.asarray(labels), jnp.asarray(t))
  np.testing.assert_allclose(result, forward, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradients_equal_finite_differences():
  logits, labels, layer = _draw(1)

  def mean(logits, layer):
    return s_model.s_model_loss(logits, jnp.asarray(labels), layer).mean()

  run = jax.jit(mean)
  result = jax.jit(jax.grad(mean, argnums=(0, 1)))(logits, layer)
  step = 1e-6
  for position, slope in enumerate(result):
    for entry in np.ndindex(slope.shape):
      ends = []
      for sign in (1, -1):
        given = [logits, layer]
        given[position] = given[position].at[entry].add(sign * step)
        ends.append(run(*given))
      difference = (ends[0] - ends[1]) / (2 * step)
      np.testing.assert_allclose(slope[entry], difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("layer_scale", [0, 1e4, 1e30])
@pytest.mark.parametrize("scale", [0, 1e4, 1e30])
def test_loss_is_finite_for_finite_logits_and_layer(scale, layer_scale, num_logits):
  logits, labels, layer = _draw(2, num_logits=num_logits)
  given = scale * logits.astype(np.float32), layer_scale * layer.astype(np.float32)

  def total(logits, layer):
    values = s_model.s_model_loss(logits, jnp.asarray(labels), layer)
    return values.sum(), values

  (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
    *given
  )
  assert base.all_finite((values, gradients))
  assert (values >= 0).all()


def test_layer_converges_to_the_confusion_of_certain_predictions():
  rng = np.random.default_rng(3)
  predicted = rng.integers(3, size=400)
  truth = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])
  labels = np.array([rng.choice(3, p=truth[i]) for i in predicted])
  logits = 50.0 * jax.nn.one_hot(predicted, 3)

  @jax.jit
  def fit(layer):
    slope = jax.grad(
      lambda a: s_model.s_model_loss(logits, jnp.asarray(labels), a).mean()
    )
    return jax.lax.fori_loop(0, 500, lambda _, a: a - 5.0 * slope(a), layer)

  result = jax.nn.softmax(fit(jnp.log(s_model.smoothed_identity(3))), axis=1)
  expected = label_transition.confusion(predicted, labels, 3, smoothing=0.0)
  np.testing.assert_allclose(result, expected, atol=1e-4)


def test_smoothed_identity():
  expected = np.full((4, 4), 0.1) + np.diag(np.full(4, 0.6))
  np.testing.assert_allclose(s_model.smoothed_identity(4, 0.3), expected, rtol=1e-6)


def _net(num_logits):
  return mlp.MLP(num_logits, (4,))


def _task(num_logits=3):
  classes = max(num_logits, 2)
  return classifier.Classifier(_net(num_logits), classes).problem(
    class_counts=jnp.ones(classes, int), num_examples=40, num_steps=10
  )


@functools.cache
def _examples(size, num_classes):
  rng = np.random.default_rng(size)
  return {
    "image": rng.normal(size=(size, 3)).astype(np.float32),
    "label": rng.integers(num_classes, size=size).astype(np.int32),
    "index": np.arange(size),
  }


@functools.cache
def _inputs(num_logits=3):
  batch = _examples(6, max(num_logits, 2))
  params = _net(num_logits).init(jax.random.key(0), batch["image"])["params"]
  step = jnp.zeros((), int)
  return base.Inputs(params, {}, (), batch, None, step, jax.random.key(1))


def _view(epoch, num_logits=3):
  return types.SimpleNamespace(
    epoch=epoch,
    params=_inputs(num_logits).params,
    model_state={},
    train=_examples(700, max(num_logits, 2)),
  )


def _begin(method, num_logits=3):
  return method.init(jax.random.key(2), _task(num_logits), _inputs(num_logits).params)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_step_updates_network_and_layer_on_the_same_loss(num_logits):
  method = s_model.s_model(optimizer=optax.sgd(0.5), smoothing=0.2)
  problem, inputs = _task(num_logits), _inputs(num_logits)
  state = _begin(method, num_logits)
  classes = max(num_logits, 2)
  start = jax.nn.softmax(state.logits, axis=1)
  np.testing.assert_allclose(start, s_model.smoothed_identity(classes, 0.2), rtol=1e-5)

  def mean(params, layer):
    logits = _net(num_logits).apply({"params": params}, inputs.batch["image"])
    return s_model.s_model_loss(logits, inputs.batch["label"], layer).mean()

  result, after = method.gradients(state, problem, inputs)
  gradients = jax.grad(mean, argnums=(0, 1))(inputs.params, state.logits)
  chex.assert_trees_all_close(result.grads, gradients[0], rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(after.logits, state.logits - 0.5 * gradients[1], rtol=1e-5)
  assert np.abs(gradients[1]).max() > 1e-3
  np.testing.assert_allclose(result.losses.mean(), mean(inputs.params, state.logits))
  np.testing.assert_allclose(result.weights, np.full(6, 1 / 6), rtol=1e-6)
  np.testing.assert_allclose(result.metrics["transition_diagonal"], 0.8, rtol=1e-5)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("initial", s_model.INITIALS)
def test_layer_is_inactive_and_constant_before_its_epoch(initial):
  # Weight decay would change a layer whose gradient is 0.
  method = s_model.s_model(
    optimizer=optax.adamw(0.1, weight_decay=0.1), from_epoch=2, initial=initial
  )
  state = _begin(method)
  for epoch in (0, 1):
    state = method.refresh(state, _task(), _view(epoch))
    result, after = method.gradients(state, _task(), _inputs())
    plain, _ = baselines.uniform().gradients((), _task(), _inputs())
    assert result.metrics.pop("transition_diagonal") == 1
    chex.assert_trees_all_close(result, plain, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(after, state)
  state = method.refresh(after, _task(), _view(2))
  expected = s_model.smoothed_identity(3)
  if initial == "confusion":
    view = _view(2)
    logits = _net(3).apply({"params": view.params}, view.train["image"])
    predicted, labels = logits.argmax(axis=1), jnp.asarray(view.train["label"])
    expected = label_transition.confusion(predicted, labels, 3)
  layer = jax.nn.softmax(state.logits, axis=1)
  np.testing.assert_allclose(layer, expected, rtol=1e-4, atol=1e-7)
  result, after = method.gradients(state, _task(), _inputs())
  np.testing.assert_allclose(
    result.metrics["transition_diagonal"], np.diag(expected).mean(), rtol=1e-4
  )
  assert np.abs(after.logits - state.logits).max() > 0.01
  kept = method.refresh(after, _task(), _view(3))
  chex.assert_trees_all_equal(kept, after)


def test_class_that_is_never_predicted_has_finite_logits():
  method = s_model.s_model(from_epoch=1, initial="confusion")
  view = _view(1)
  zero = jax.tree.map(jnp.zeros_like, view.params)  # Predicts class 0 for all examples.
  view = types.SimpleNamespace(**{**vars(view), "params": zero})
  state = method.refresh(_begin(method), _task(), view)
  result, after = method.gradients(state, _task(), _inputs())
  assert base.all_finite((result.grads, result.losses, after.logits))
  np.testing.assert_allclose(
    jax.nn.softmax(state.logits, axis=1)[1:], np.eye(3)[1:], atol=1e-6
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: s_model.s_model(from_epoch=-1), "from_epoch=-1 must be at least 0"),
    (lambda: s_model.s_model(initial="random"), "initial='random'; choose 'identity'"),
    (
      lambda: s_model.s_model(initial="confusion"),
      "initial='confusion' needs from_epoch of at least 1",
    ),
    (lambda: s_model.s_model(smoothing=0), "smoothing=0 must lie between 0 and 1"),
    (lambda: s_model.s_model(smoothing=1.0), "smoothing=1.0 must lie between 0 and 1"),
    (
      lambda: s_model.s_model_loss(
        jnp.ones((2, 3)), jnp.zeros(2, int), jnp.ones((2, 2))
      ),
      "predictions of 3 classes need",
    ),
    (
      lambda: s_model.s_model_loss(
        jnp.ones((2, 3)), jnp.zeros(3, int), jnp.ones((3, 3))
      ),
      r"labels of shape \(3,\)",
    ),
  ],
)
def test_bad_arguments_are_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()
