"""Estimates of the transition matrix from predictions and labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import label_transition

_T = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.1, 0.6]])


def _noisy_posteriors(num_anchors, num_others=100):
  """p(given label | x); for each class, `num_anchors` examples surely belong to it."""
  clean = np.random.default_rng(0).dirichlet(np.full(3, 2.0), size=num_others)
  clean = np.concatenate([clean, np.repeat(np.eye(3), num_anchors, axis=0)])
  return np.random.default_rng(1).permutation(clean) @ _T


_estimate = jax.jit(label_transition.estimate_transition, static_argnums=1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("num_anchors", "percentile"), [(1, 100), (8, 97), (8, 100)])
def test_anchors_recover_the_matrix(num_anchors, percentile):
  # T_ii is the largest entry of its column, so the given label i is most probable for
  # the anchors of class i.
  probabilities = _noisy_posteriors(num_anchors)
  result = _estimate(probabilities, percentile)
  np.testing.assert_allclose(result, _T, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 2, 50, 77])
def test_percentile_equals_the_released_estimator(size):
  probabilities = np.random.default_rng(size).dirichlet(np.ones(4), size=size)
  result = _estimate(probabilities, 97.0)
  if size == 1:  # No example is below the threshold, so the only one is used.
    np.testing.assert_allclose(result, np.repeat(probabilities, 4, axis=0))
    return
  expected = []
  for column in probabilities.T:
    threshold = np.percentile(column, 97, method="higher")
    expected.append(probabilities[np.where(column >= threshold, 0, column).argmax()])
  np.testing.assert_allclose(result, expected, rtol=1e-12)


@pytest.mark.parametrize(
  ("percentile", "size", "rank"),
  [(64.1, 1001, 641), (32.3, 1001, 323), (64.6, 501, 323), (100, 501, 500)],
)
def test_the_rank_of_a_percentile_is_exact(percentile, size, rank):
  p = np.arange(1, size + 1) / (size + 1)
  matrix = label_transition.estimate_transition(np.stack([p, 1 - p], 1), percentile)
  np.testing.assert_allclose(matrix[0, 0], p[rank], rtol=1e-6)


def test_outliers_above_the_percentile_are_skipped():
  probabilities = np.concatenate([_noisy_posteriors(8), np.eye(3)[[0, 1]]])
  result = _estimate(probabilities, 97.0)
  np.testing.assert_allclose(result, _T, atol=1e-6)
  result = _estimate(probabilities, 100.0)
  np.testing.assert_allclose(np.asarray(result)[:2], np.eye(3)[:2], atol=1e-6)


def test_confusion_counts_the_given_labels_of_each_predicted_class():
  rng = np.random.default_rng(0)
  predicted, labels = rng.choice([0, 1, 3], size=200), rng.integers(4, size=200)
  confusion = jax.jit(label_transition.confusion, static_argnums=(2, 3))
  for smoothing in (0.0, 1.0, 5.0):
    result = np.asarray(confusion(predicted, labels, 4, smoothing))
    for i in range(4):
      counts = np.bincount(labels[predicted == i], minlength=4) + smoothing / 4
      expected = np.eye(4)[i] if i == 2 else counts / counts.sum()
      np.testing.assert_allclose(result[i], expected, rtol=1e-6)
    np.testing.assert_allclose(np.sum(result, axis=1), np.ones(4), rtol=1e-6)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: label_transition.estimate_transition(jnp.ones((0, 3))),
      r"probabilities must be \[N, C\] with N at least 1",
    ),
    (
      lambda: label_transition.confusion(jnp.zeros(3, int), jnp.zeros(2, int), 2),
      r"predicted and labels must be \[N\]",
    ),
    (
      lambda: label_transition.confusion(
        jnp.zeros(3, int), jnp.zeros(3, int), 2, smoothing=-1
      ),
      "smoothing=-1 must be a number of at least 0",
    ),
    (
      lambda: label_transition.confusion(
        jnp.zeros(3, int), jnp.zeros(3, int), 2, smoothing=np.nan
      ),
      "smoothing=nan must be a number of at least 0",
    ),
    (
      lambda: label_transition.confusion(jnp.zeros(3, int), jnp.zeros(3, int), 2.0),
      "num_classes=2.0 must be an integer",
    ),
    (
      lambda: label_transition.estimate_from_network("anchors", None, None),
      "estimator='anchors': choose one of",
    ),
    # Probabilities in place of classes.
    (
      lambda: label_transition.confusion(np.array([0.2, 0.9]), np.array([0, 1]), 2),
      "must be integers; got float64",
    ),
  ],
)
def test_bad_arguments_are_refused(make, message):
  with pytest.raises(base.InputError, match=message):
    make()


def test_lists_are_accepted():
  matrix = label_transition.estimate_transition([[0.75, 0.25], [0.5, 0.5]], 100)
  np.testing.assert_allclose(matrix, [[0.75, 0.25], [0.5, 0.5]])
  matrix = label_transition.confusion([0, 0, 1], [0, 1, 1], 2, 0)
  np.testing.assert_allclose(matrix, [[0.5, 0.5], [0, 1]])


def test_logits_in_place_of_probabilities_are_refused():
  with pytest.raises(base.InputError, match="row 1 is not a distribution"):
    label_transition.estimate_transition(jnp.array([[0.5, 0.5], [2.0, -1.0]]))


def test_labels_out_of_range_are_refused_or_give_nan():
  predicted, labels = jnp.array([0, 1]), jnp.array([0, -1])
  with pytest.raises(base.InputError, match="row 1 of predicted or labels"):
    label_transition.confusion(predicted, labels, 2)
  run = jax.jit(lambda labels: label_transition.confusion(predicted, labels, 2))
  assert np.isnan(run(labels)).all() and np.isfinite(run(predicted)).all()


def test_counts_of_more_than_2_to_24_examples_are_exact():
  # A sum of ones in float32 stops at 2^24. One-hot labels would be large arrays.
  size = 2**24 + 2**23 + 2**22
  zeros = jnp.zeros(size, jnp.int8)
  labels = (jnp.arange(size) >= 2**23).astype(jnp.int8)
  count = jax.jit(lambda p, y: label_transition.confusion(p, y, 50, smoothing=0.0))
  compiled = count.lower(zeros, labels).compile()
  np.testing.assert_allclose(compiled(zeros, labels)[0, :2], [2 / 7, 5 / 7], rtol=1e-6)
  # There are int32 arrays of rows and of columns and a mask, but no arrays [N, C].
  assert compiled.memory_analysis().temp_size_in_bytes < 20 * size
