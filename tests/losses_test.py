"""Per-example losses: hand values, extremes, shapes."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import losses

_softmax = jax.jit(losses.softmax_cross_entropy)
_sigmoid = jax.jit(losses.sigmoid_cross_entropy)


def test_by_hand():
  logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
  np.testing.assert_allclose(
    _softmax(logits, jnp.array([1, 0])), [np.log(4 / 3), np.log(2)], rtol=1e-6
  )
  logits = jnp.log(jnp.array([[3.0], [1.0]]))
  np.testing.assert_allclose(
    _sigmoid(logits, jnp.array([0, 1])), [np.log(4), np.log(2)], rtol=1e-6
  )


@hypothesis.given(
  st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), st.integers(0, 1)
)
@hypothesis.settings(deadline=None, max_examples=40)
def test_one_logit_is_two_of_which_one_is_zero(values, label):
  one = jnp.array(values, jnp.float32)[:, None]
  two = jnp.concatenate([jnp.zeros_like(one), one], axis=1)
  labels = jnp.full(3, label)
  np.testing.assert_allclose(
    _sigmoid(one, labels), _softmax(two, labels), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("wrong", [0, 1])
def test_extreme_logits_give_finite_losses_and_gradients(wrong):
  labels = jnp.array([wrong])
  for loss_fn, logits in (
    (_softmax, jnp.array([[1e4, -1e4]])),
    (_sigmoid, jnp.array([[1e4]])),
  ):
    gradient = jax.grad(lambda z, f=loss_fn: f(z, labels).sum())(logits)
    assert np.isfinite(loss_fn(logits, labels)).all()
    assert np.isfinite(gradient).all()


def test_nan_stays_with_its_example():
  logits = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
  found = np.isnan(_softmax(logits, jnp.array([0, 0])))
  np.testing.assert_array_equal(found, [False, True])


def test_predictions():
  logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  np.testing.assert_array_equal(losses.predictions(logits), [1, 0])
  logits = jnp.array([[0.3], [-0.3], [0.0]])
  np.testing.assert_array_equal(losses.predictions(logits), [1, 0, 0])


@pytest.mark.parametrize("loss_fn", [_softmax, _sigmoid])
@pytest.mark.parametrize(
  ("logits", "labels"),
  [((4,), (4,)), ((4, 1), (3,)), ((4, 1), (4, 1)), ((2, 4, 1), (2,))],
)
def test_shapes_that_would_broadcast_are_refused(loss_fn, logits, labels):
  with pytest.raises(base.InputError, match=r"logits must be \[B, C\]"):
    loss_fn(jnp.zeros(logits), jnp.zeros(labels, jnp.int32))
