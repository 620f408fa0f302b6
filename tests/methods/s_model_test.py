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
from l2rw_jax import changed_loss
from l2rw_jax import label_transition
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import s_model
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp


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
  forward = jax.jit(losses.forward_corrected)(logits, labels, t)
  np.testing.assert_allclose(result, forward, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradients_equal_finite_differences():
  logits, labels, layer = _draw(1)
  sizes = logits.size, layer.size

  def mean(both):
    """The mean loss; `both` has the entries of the logits, then those of the layer."""
    logits, layer = both[: sizes[0]].reshape(-1, 3), both[sizes[0] :].reshape(3, 3)
    return s_model.s_model_loss(logits, jnp.asarray(labels), layer).mean()

  both = np.concatenate([np.ravel(logits), np.ravel(layer)])
  result = jax.jit(jax.grad(mean))(both)
  steps = 1e-6 * np.eye(sum(sizes))
  values = jax.jit(jax.vmap(mean))(np.concatenate([both + steps, both - steps]))
  above, below = np.split(np.asarray(values), 2)
  np.testing.assert_allclose(result, (above - below) / 2e-6, rtol=1e-6, atol=1e-9)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def _values_and_gradients(logits, layer, labels):
  values = s_model.s_model_loss(logits, labels, layer)
  return values.sum(), values


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("layer_scale", [0, 1e4, 1e30])
@pytest.mark.parametrize("scale", [0, 1e4, 1e30])
def test_loss_is_finite_for_finite_logits_and_layer(scale, layer_scale, num_logits):
  logits, labels, layer = _draw(2, num_logits=num_logits)
  given = scale * np.float32(logits), layer_scale * np.float32(layer)
  (_, values), gradients = _values_and_gradients(*given, labels)
  for result in (values, *gradients):
    assert np.isfinite(result).all()
  assert (np.asarray(values) >= 0).all()


def test_layer_converges_to_the_confusion_of_confident_predictions():
  rng = np.random.default_rng(3)
  predicted = rng.integers(3, size=400)
  truth = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])
  labels = np.array([rng.choice(3, p=truth[i]) for i in predicted])
  logits = 50 * np.eye(3, dtype=np.float32)[predicted]

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
  with pytest.raises(base.InputError, match=r"num_classes=2\.5 must be an integer"):
    s_model.smoothed_identity(2.5)


def _net(num_logits):
  return mlp.MLP(num_logits, (4,))


def _problem(num_logits=3):
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
  init = jax.jit(_net(num_logits).init)
  params = init(jax.random.key(0), batch["image"])["params"]
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
  return method.init(
    jax.random.key(2), _problem(num_logits), _inputs(num_logits).params
  )


def _step(method, state, num_logits=3):
  problem = _problem(num_logits)
  step = jax.jit(lambda state, inputs: method.gradients(state, problem, inputs))
  return step(state, _inputs(num_logits))


def test_the_optimizer_of_the_layer_gets_the_mean_loss_as_value():
  def update(updates, state, params=None, *, value, **_):
    del state, params
    return updates, value

  recorder = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros(()), update)
  method = s_model.s_model(optimizer=recorder)
  inputs = _inputs()
  halves = jax.tree.map(np.float16, (inputs.params, inputs.batch["image"]))
  batch = {**inputs.batch, "image": halves[1]}
  for given in (inputs, inputs._replace(params=halves[0], batch=batch)):
    gradients, state = jax.jit(
      lambda state, given: method.gradients(state, _problem(), given)
    )(_begin(method), given)
    # The mean of losses in half precision is not rounded to half precision.
    mean = gradients.losses.astype(np.float32).mean()
    np.testing.assert_allclose(state.opt_state, mean, rtol=1e-6)
  assert gradients.losses.dtype == np.float16


def _softmax(layer):
  exponentials = np.exp(layer - np.max(layer, axis=1, keepdims=True))
  return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_the_loss_that_is_not_used_has_no_influence():
  def with_infinite_derivative(outputs, batch, class_counts):
    del batch, class_counts
    return jnp.sqrt(jnp.abs(outputs[:, 0] - jax.lax.stop_gradient(outputs[:, 0])))

  method = s_model.s_model()
  changed = changed_loss.changed_loss(method, with_infinite_derivative)
  state = method.init(jax.random.key(0), _problem(), {})
  expected, _ = _step(method, state)
  actual, _ = _step(changed, changed.init(jax.random.key(0), _problem(), {}))
  jax.tree.map(np.testing.assert_array_equal, actual.grads, expected.grads)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_step_updates_network_and_layer_on_the_same_loss(num_logits):
  method = s_model.s_model(optimizer=optax.sgd(0.5), smoothing=0.2)
  inputs = _inputs(num_logits)
  state = _begin(method, num_logits)
  classes = max(num_logits, 2)
  start = _softmax(state.logits)
  np.testing.assert_allclose(start, s_model.smoothed_identity(classes, 0.2), rtol=1e-5)

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1))
  def mean_and_gradients(params, layer):
    logits = _net(num_logits).apply({"params": params}, inputs.batch["image"])
    return s_model.s_model_loss(logits, inputs.batch["label"], layer).mean()

  result, after = _step(method, state, num_logits)
  mean, gradients = mean_and_gradients(inputs.params, state.logits)
  chex.assert_trees_all_close(result.grads, gradients[0], rtol=1e-4, atol=1e-7)
  expected = np.asarray(state.logits) - 0.5 * np.asarray(gradients[1])
  np.testing.assert_allclose(after.logits, expected, rtol=1e-5)
  assert np.abs(gradients[1]).max() > 1e-3
  np.testing.assert_allclose(np.mean(result.losses), mean)
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
  plain, _ = _step(baselines.uniform(), ())
  for epoch in (0, 1):
    state = method.refresh(state, _problem(), _view(epoch))
    result, after = _step(method, state)
    assert result.metrics.pop("transition_diagonal") == 1
    chex.assert_trees_all_close(result, plain, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_equal(after, state)
  state = method.refresh(after, _problem(), _view(2))
  expected = s_model.smoothed_identity(3)
  if initial == "confusion":
    view = _view(2)
    logits = _net(3).apply({"params": view.params}, view.train["image"])
    predicted, labels = logits.argmax(axis=1), jnp.asarray(view.train["label"])
    expected = label_transition.confusion(predicted, labels, 3)
  layer = _softmax(state.logits)
  np.testing.assert_allclose(layer, expected, rtol=1e-4, atol=1e-7)
  result, after = _step(method, state)
  np.testing.assert_allclose(
    result.metrics["transition_diagonal"], np.diag(expected).mean(), rtol=1e-4
  )
  assert np.abs(np.asarray(after.logits) - np.asarray(state.logits)).max() > 0.01
  later = method.refresh(after, _problem(), _view(3))
  chex.assert_trees_all_equal(later, after)


def test_class_that_is_never_predicted_has_finite_logits():
  method = s_model.s_model(from_epoch=1, initial="confusion")
  view = _view(1)
  zero = jax.tree.map(jnp.zeros_like, view.params)  # Predicts class 0 for all examples.
  view = types.SimpleNamespace(**{**vars(view), "params": zero})
  state = method.refresh(_begin(method), _problem(), view)
  result, after = _step(method, state)
  for leaf in jax.tree.leaves((result.grads, result.losses, after.logits)):
    assert np.isfinite(leaf).all()
  np.testing.assert_allclose(_softmax(state.logits)[1:], np.eye(3)[1:], atol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: s_model.s_model(from_epoch=-1),
      "from_epoch=-1 must be an integer of at least 0",
    ),
    (lambda: s_model.s_model(initial="random"), "initial='random'; choose 'identity'"),
    (
      lambda: s_model.s_model(initial="confusion"),
      "initial='confusion' needs from_epoch of at least 1",
    ),
    (lambda: s_model.s_model(smoothing=0), "smoothing=0 must be more than 0"),
    (lambda: s_model.s_model(smoothing=1.0), "smoothing=1.0 must be more than 0"),
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
