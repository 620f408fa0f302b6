"""Forward correction: what it estimates T to be, and what it then trains on."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import label_transition

_T = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.1, 0.6]])


def _noisy_posteriors(num_anchors, num_others=100):
  """p(given label | x) of examples of which each class has so many sure ones."""
  clean = np.random.default_rng(0).dirichlet(np.full(3, 2.0), size=num_others)
  clean = np.concatenate([clean, np.repeat(np.eye(3), num_anchors, axis=0)])
  return np.random.default_rng(1).permutation(clean) @ _T


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("num_anchors", "percentile"), [(1, 100), (8, 97), (8, 100)])
def test_anchors_recover_the_matrix(num_anchors, percentile):
  # The given label i is most probable for sure examples of class i: T_ii is the
  # largest of its column.
  probabilities = _noisy_posteriors(num_anchors)
  found = jax.jit(label_transition.estimate_transition, static_argnums=1)(
    probabilities, percentile
  )
  np.testing.assert_allclose(found, _T, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 2, 50, 77])
def test_the_percentile_is_that_of_the_released_estimator(size):
  probabilities = np.random.default_rng(size).dirichlet(np.ones(4), size=size)
  found = label_transition.estimate_transition(jnp.asarray(probabilities), 97.0)
  if size == 1:  # There is nothing below its one example.
    np.testing.assert_allclose(found, np.repeat(probabilities, 4, axis=0))
    return
  expected = []
  for column in probabilities.T:
    threshold = np.percentile(column, 97, method="higher")
    expected.append(probabilities[np.where(column >= threshold, 0, column).argmax()])
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_outliers_above_the_percentile_are_spared():
  probabilities = np.concatenate([_noisy_posteriors(8), np.eye(3)[[0, 1]]])
  found = label_transition.estimate_transition(jnp.asarray(probabilities), 97.0)
  np.testing.assert_allclose(found, _T, atol=1e-6)
  found = label_transition.estimate_transition(jnp.asarray(probabilities), 100.0)
  np.testing.assert_allclose(found[:2], np.eye(3)[:2], atol=1e-6)


def test_confusion_counts_the_given_labels_of_each_predicted_class():
  rng = np.random.default_rng(0)
  predicted, labels = rng.choice([0, 1, 3], size=200), rng.integers(4, size=200)
  for smoothing in (0.0, 1.0, 5.0):
    found = jax.jit(label_transition.confusion, static_argnums=(2, 3))(
      predicted, labels, 4, smoothing
    )
    for i in range(4):
      counts = np.bincount(labels[predicted == i], minlength=4) + smoothing / 4
      expected = np.eye(4)[i] if i == 2 else counts / counts.sum()
      np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), np.ones(4), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_corrected_loss_is_least_at_the_clean_posterior():
  clean = jnp.array([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.3, 0.4, 0.3]])
  given = clean @ _T
  labels = jnp.arange(3)

  def risk(logits, transition):
    """Mean over the labels that are given with these probabilities."""
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


def _task(num_logits=3):
  """A linear classifier that predicts otherwise in training: it sees 2 x there."""

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
  return method.init(jax.random.key(0), _task(num_logits), _params(num_logits))


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("estimator", label_transition.ESTIMATORS)
def test_cross_entropy_until_the_matrix_is_estimated_and_corrected_from_then_on(
  estimator, num_logits
):
  method = label_transition.forward_correction(2, estimator=estimator, percentile=90)
  problem, inputs = _task(num_logits), _inputs(num_logits)
  state = _begin(method, num_logits)
  for epoch in (0, 1):
    state = method.refresh(state, problem, _view(epoch, num_logits))
    found, state = method.gradients(state, problem, inputs)
    plain, _ = baselines.uniform().gradients((), problem, inputs)
    assert found.metrics.pop("transition_diagonal") == 1
    chex.assert_trees_all_close(found, plain, rtol=1e-5, atol=1e-6)
  view = _view(2, num_logits)
  state = method.refresh(state, problem, view)
  # Evaluation mode: x, not 2 x; all of the examples, whatever the batches.
  logits = view.train["x"] @ view.params["w"]
  p = jnp.exp(losses.log_probabilities(jnp.asarray(logits)))
  if estimator == "anchor":
    expected = label_transition.estimate_transition(p, 90)
  else:
    labels = jnp.asarray(view.train["label"])
    expected = label_transition.confusion(p.argmax(axis=1), labels, p.shape[1])
  assert state.dtype == np.float32
  np.testing.assert_allclose(state, expected, rtol=1e-4)
  found, kept = method.gradients(state, problem, inputs)
  corrected = dataclasses.replace(
    problem, loss=lambda z, b: losses.forward_corrected(z, b["label"], expected)
  )
  plain, _ = baselines.uniform().gradients((), corrected, inputs)
  np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-4)
  chex.assert_trees_all_close(found.grads, plain.grads, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(
    found.metrics["transition_diagonal"], np.diag(expected).mean(), rtol=1e-4
  )
  # It is estimated once.
  later = method.refresh(kept, problem, _view(3, num_logits))
  np.testing.assert_array_equal(later, state)


@pytest.mark.parametrize("from_epoch", [None, 0, 2])
def test_a_known_matrix_holds_from_its_epoch(from_epoch):
  method = label_transition.forward_correction(from_epoch, transition=_T)
  state, first = _begin(method), from_epoch or 0
  for epoch in range(4):
    state = method.refresh(state, _task(), _view(epoch))
    expected = _T if epoch >= first else np.eye(3)
    np.testing.assert_allclose(state, expected, rtol=1e-6)
  if first == 0:
    np.testing.assert_allclose(_begin(method), _T, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_finite_at_extreme_logits(scale):
  method = label_transition.forward_correction(transition=_T)
  inputs = _inputs()
  inputs = inputs._replace(params={"w": scale * _params()["w"]})
  found, _ = method.gradients(_begin(method), _task(), inputs)
  assert base.all_finite((found.losses, found.grads))


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: label_transition.forward_correction(),
      "from_epoch=None must be at least 1",
    ),
    (lambda: label_transition.forward_correction(0), "from_epoch=0 must be at least 1"),
    (
      lambda: label_transition.forward_correction(-1, transition=_T),
      "from_epoch=-1 must be at least 0",
    ),
    (
      lambda: label_transition.forward_correction(1, estimator="median"),
      "estimator='median'; choose 'anchor' or 'confusion'",
    ),
    (
      lambda: label_transition.forward_correction(1, percentile=101),
      "percentile=101 must lie between 0 and 100",
    ),
    (
      lambda: label_transition.forward_correction(transition=_T[:2]),
      r"transition must be \[C, C\].*got shape \(2, 3\)",
    ),
    (
      lambda: label_transition.forward_correction(transition=_T.T),
      "transition must be .* summing to 1",
    ),
    (
      lambda: label_transition.forward_correction(transition=2 * np.eye(3) - _T),
      "transition must be",
    ),
    (
      lambda: label_transition.forward_correction(transition=np.nan * _T),
      "transition must be",
    ),
    (
      lambda: _begin(label_transition.forward_correction(transition=np.eye(4))),
      r"transition is \(4, 4\); the data need \(3, 3\)",
    ),
    (
      lambda: label_transition.estimate_transition(jnp.ones((0, 3))),
      r"probabilities must be \[N, C\], N at least 1",
    ),
    (
      lambda: label_transition.confusion(jnp.zeros(3, int), jnp.zeros(2, int), 2),
      r"predicted and labels must be \[N\]",
    ),
    (
      lambda: label_transition.confusion(
        jnp.zeros(3, int), jnp.zeros(3, int), 2, smoothing=-1
      ),
      "smoothing=-1 must be at least 0",
    ),
  ],
)
def test_what_is_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()


def test_logits_are_not_taken_for_probabilities():
  with pytest.raises(base.InputError, match="row 1 is no distribution"):
    label_transition.estimate_transition(jnp.array([[0.5, 0.5], [2.0, -1.0]]))


def test_impossible_labels_are_not_counted_in_silence():
  predicted, labels = jnp.array([0, 1]), jnp.array([0, -1])
  with pytest.raises(base.InputError, match="row 1 of predicted or labels"):
    label_transition.confusion(predicted, labels, 2)
  run = jax.jit(lambda labels: label_transition.confusion(predicted, labels, 2))
  assert np.isnan(run(labels)).all() and np.isfinite(run(predicted)).all()
