"""Forward correction: the corrected loss, and when T is estimated."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import label_transition
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods.forward_correction import forward_correction

_T = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.1, 0.6]])


@pytest.mark.usefixtures("x64")
def test_corrected_loss_is_minimal_at_the_clean_posterior():
  clean = jnp.array([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.3, 0.4, 0.3]])
  given = clean @ _T
  labels = jnp.arange(3)

  def risk(logits, transition):
    """Expected loss under the distribution of given labels."""
    by_label = jax.vmap(
      lambda y: losses.forward_corrected(logits, jnp.full(3, y), transition)
    )(labels)
    return jnp.sum(given.T * by_label)

  @jax.jit
  def fit(transition):
    slope = jax.grad(risk)
    return jax.lax.fori_loop(
      0, 3000, lambda _, z: z - 2.0 * slope(z, transition), jnp.zeros((3, 3))
    )

  np.testing.assert_allclose(jax.nn.softmax(fit(jnp.asarray(_T))), clean, atol=1e-5)
  np.testing.assert_allclose(jax.nn.softmax(fit(jnp.eye(3))), given, atol=1e-5)


def _problem(num_logits=3):
  """A linear classifier whose input is 2 x in training and x in evaluation."""

  def forward(params, model_state, batch, key, train):
    del key
    return (1 + train) * batch["x"] @ params["w"], model_state

  def loss(logits, batch):
    if num_logits == 1:
      return losses.sigmoid_cross_entropy(logits, batch["label"])
    return losses.softmax_cross_entropy(logits, batch["label"])

  return base.Problem(
    forward=forward,
    loss=loss,
    linearize=linearization.linearize,
    linearize_outputs=linearization.linearize_outputs,
    num_classes=max(num_logits, 2),
    class_counts=jnp.ones(max(num_logits, 2), int),
    num_examples=9,
    num_steps=10,
  )


@functools.cache
def _examples(size, num_classes=3):
  rng = np.random.default_rng(size)
  return {
    "x": rng.normal(size=(size, 4)).astype(np.float32),
    "label": rng.integers(num_classes, size=size).astype(np.int32),
    "index": np.arange(size),
  }


def _params(num_logits=3):
  return {"w": np.random.default_rng(5).normal(size=(4, num_logits)).astype(np.float32)}


def _inputs(num_logits=3):
  batch = _examples(6, max(num_logits, 2))
  step = jnp.zeros((), int)
  params = _params(num_logits)
  return base.Inputs(params, {}, (), batch, None, step, jax.random.key(1))


def _view(epoch, num_logits=3):
  train = _examples(1100, max(num_logits, 2))
  params = _params(num_logits)
  return types.SimpleNamespace(epoch=epoch, params=params, model_state={}, train=train)


def _begin(method, num_logits=3):
  return method.init(jax.random.key(0), _problem(num_logits), _params(num_logits))


def _step(method, state, problem, inputs):
  return jax.jit(lambda s, i: method.gradients(s, problem, i))(state, inputs)


@pytest.mark.slow(unless=("anchor-3",))
@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("estimator", label_transition.ESTIMATORS)
def test_loss_is_corrected_once_the_matrix_is_estimated(estimator, num_logits):
  method = forward_correction(2, estimator=estimator, percentile=90)
  problem, inputs = _problem(num_logits), _inputs(num_logits)
  state = _begin(method, num_logits)
  plain, _ = _step(baselines.uniform(), (), problem, inputs)
  for epoch in (0, 1):
    state = method.refresh(state, problem, _view(epoch, num_logits))
    gradients, state = _step(method, state, problem, inputs)
    assert gradients.metrics.pop("transition_diagonal") == 1
    chex.assert_trees_all_close(gradients, plain, rtol=1e-5, atol=1e-6)
  view = _view(2, num_logits)
  state = method.refresh(state, problem, view)
  # The estimate uses evaluation mode (x, not 2 x) and all examples.
  logits = view.train["x"] @ view.params["w"]
  p = jax.jit(lambda z: jnp.exp(losses.log_probabilities(z)))(logits)
  if estimator == "anchor":
    estimate = jax.jit(label_transition.estimate_transition, static_argnums=1)
    expected = estimate(p, 90)
  else:
    confusion = jax.jit(label_transition.confusion, static_argnums=2)
    expected = confusion(np.argmax(p, axis=1), view.train["label"], p.shape[1])
  assert state.dtype == np.float32
  np.testing.assert_allclose(state, expected, rtol=1e-4)
  gradients, after = _step(method, state, problem, inputs)
  corrected = dataclasses.replace(
    problem, loss=lambda z, b: losses.forward_corrected(z, b["label"], expected)
  )
  plain, _ = _step(baselines.uniform(), (), corrected, inputs)
  np.testing.assert_allclose(gradients.losses, plain.losses, rtol=1e-4)
  chex.assert_trees_all_close(gradients.grads, plain.grads, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    gradients.metrics["transition_diagonal"], np.diag(expected).mean(), rtol=1e-4
  )
  # The matrix is estimated only once.
  later = method.refresh(after, problem, _view(3, num_logits))
  np.testing.assert_array_equal(later, state)


@pytest.mark.parametrize("from_epoch", [None, 0, 2])
def test_known_matrix_is_used_from_its_epoch(from_epoch):
  method = forward_correction(from_epoch, transition=_T)
  state, first = _begin(method), from_epoch or 0
  for epoch in range(4):
    state = method.refresh(state, _problem(), _view(epoch))
    expected = _T if epoch >= first else np.eye(3)
    np.testing.assert_allclose(state, expected, rtol=1e-6)
  if first == 0:
    np.testing.assert_allclose(_begin(method), _T, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_losses_and_gradients_are_finite_at_extreme_logits(scale):
  method = forward_correction(transition=_T)
  inputs = _inputs()
  inputs = inputs._replace(params={"w": scale * _params()["w"]})
  gradients, _ = _step(method, _begin(method), _problem(), inputs)
  for leaf in jax.tree.leaves((gradients.losses, gradients.grads)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: forward_correction(),
      "from_epoch=None must be at least 1",
    ),
    (
      lambda: forward_correction(0),
      "from_epoch=0 must be at least 1",
    ),
    (
      lambda: forward_correction(-1, transition=_T),
      "from_epoch=-1 must be an integer of at least 0",
    ),
    (
      lambda: forward_correction(1, estimator="median"),
      "estimator='median': choose one of .'anchor', 'confusion'",
    ),
    (
      lambda: forward_correction(1, percentile=101),
      "percentile=101 must lie between 0 and 100",
    ),
    (
      lambda: forward_correction(transition=_T[:2]),
      r"transition must be \[C, C\].*got shape \(2, 3\)",
    ),
    (
      lambda: forward_correction(transition=_T.T),
      "transition must be .* with sum 1",
    ),
    (
      lambda: forward_correction(transition=2 * np.eye(3) - _T),
      "transition must be",
    ),
    (
      lambda: forward_correction(transition=np.nan * _T),
      "transition must be",
    ),
    (
      lambda: _begin(forward_correction(transition=np.eye(4))),
      r"transition has shape \(4, 4\); the data need \(3, 3\)",
    ),
  ],
)
def test_bad_settings_are_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()
