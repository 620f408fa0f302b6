"""Weights from scores: sums, all-zero scores, NaN."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import normalization

_sum_to_one = jax.jit(normalization.sum_to_one)
_rectify = jax.jit(normalization.rectify)
_equal_weights = jax.jit(normalization.equal_weights)
_SCORES = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


def test_sum_to_one_and_rectify_by_hand():
  np.testing.assert_allclose(_sum_to_one(jnp.array([1.0, 0.0, 3.0])), [0.25, 0, 0.75])
  np.testing.assert_allclose(_rectify(jnp.array([3.0, -2.0, 1.0])), [0.75, 0, 0.25])


def test_equal_weights_by_hand():
  scores = jnp.array([3.0, -2.0, 1.0, 0.0])
  np.testing.assert_array_equal(_equal_weights(scores), [0.5, 0, 0.5, 0])
  np.testing.assert_array_equal(_equal_weights(jnp.array([2, -1, 0])), [1, 0, 0])
  # In float16, the sum of 3,000 ones is exact only if it is computed in float32.
  many = _equal_weights(jnp.ones(3000, jnp.float16))
  np.testing.assert_allclose(many, 1 / 3000, rtol=1e-3)
  assert not np.asarray(jax.jacobian(_equal_weights)(scores)).any()


@pytest.mark.parametrize("normalize", [_rectify, _equal_weights])
def test_bad_scores_make_every_weight_nan(normalize):
  for bad in (jnp.nan, jnp.inf):
    assert np.isnan(normalize(jnp.array([1.0, bad, -1.0]))).all()
  np.testing.assert_array_equal(normalize(jnp.array([1.0, -jnp.inf])), [1, 0])


@hypothesis.given(_SCORES)
@hypothesis.settings(deadline=None, max_examples=60)
def test_rectified_scores_sum_to_one_or_are_all_zero(scores):
  scores = np.array(scores, np.float32)
  scores[np.abs(scores) < 1e-30] = 0  # XLA flushes subnormal numbers to zero.
  weights = np.asarray(_rectify(scores))
  assert (weights >= 0).all()
  if (scores > 0).any():
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[scores <= 0], 0)
  else:
    assert not weights.any()


@hypothesis.given(_SCORES, st.sampled_from([1e-3, 0.5, 64.0]))
@hypothesis.settings(deadline=None, max_examples=30)
def test_the_scale_of_the_scores_does_not_matter(scores, scale):
  scores = np.array(scores, np.float32)
  scores[np.abs(scores) < 1e-20] = 0
  np.testing.assert_allclose(
    _rectify(scores * np.float32(scale)), _rectify(scores), rtol=1e-4, atol=1e-7
  )


@pytest.mark.parametrize("largest", [4e-38, 1e-20, 8e37, 1e38, 3.4e38])
def test_scores_of_any_size_are_divided_by_their_sum(largest):
  scores = np.array([largest, -largest, largest / 2, 0], np.float32)
  np.testing.assert_allclose(_rectify(scores), [2 / 3, 0, 1 / 3, 0], rtol=1e-6)
  alone = np.array([0, largest, 0, 0], np.float32)
  np.testing.assert_allclose(_sum_to_one(alone), [0, 1, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("scores", [[0.0, 0.0], [-1.0, -2.0], [-0.0, 0.0]])
def test_scores_without_a_positive_one_give_zero_weights(scores):
  assert not _rectify(jnp.array(scores)).any()
  assert np.isfinite(jax.jacobian(_rectify)(jnp.array(scores))).all()


def test_nan_and_negative_scores_give_nan_weights():
  assert np.isnan(_sum_to_one(jnp.array([1.0, -1e-3, 0.0]))).all()
  assert np.isnan(_rectify(jnp.array([1.0, jnp.nan, -1.0]))).all()
  assert np.isnan(_sum_to_one(jnp.array([1.0, jnp.nan]))).all()


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_scores_of_another_shape_are_refused(shape):
  for normalize in (_sum_to_one, _rectify, _equal_weights):
    with pytest.raises(base.InputError, match="scores must be one number per example"):
      normalize(jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-6, 1.0, 2e4])
def test_half_precision_scores_are_summed_in_float32(dtype, scale):
  scores = jnp.array([1, 3, -1, 1], jnp.float32) * scale
  weights = normalization.rectify(scores.astype(dtype))
  assert weights.dtype == dtype
  rounded = np.maximum(np.asarray(scores.astype(dtype), np.float64), 0)
  np.testing.assert_allclose(
    np.asarray(weights, np.float64), rounded / rounded.sum(), rtol=1e-2
  )


@pytest.mark.parametrize("largest", [1e-10, 0.3, 1.0, 1e15])
def test_first_and_second_derivatives_for_scores_of_any_size(largest):
  scores = largest * np.array([0.2, 0.5, 1.0])
  factors, direction = np.array([1.0, -2.0, 3.0]), largest * np.array([1.0, 2.0, -1.0])
  # With w = s / S, the gradient of c w is (c - c w) / S.
  total, weights = scores.sum(), scores / scores.sum()
  first = (factors - factors @ weights) / total
  change = (direction - weights * direction.sum()) / total
  second = -(factors @ change + first * direction.sum()) / total
  gradient = jax.grad(lambda s: normalization.sum_to_one(s) @ jnp.float32(factors))
  derivatives = jax.jit(lambda s, d: jax.jvp(gradient, (s,), (d,)))
  result = derivatives(jnp.float32(scores), jnp.float32(direction))
  np.testing.assert_allclose(result, (first, second), rtol=1e-6, atol=1e-6 / largest)
