"""Max pooling: values and gradients equal to flax's, NaN, and ties."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.models import pooling


def _reference(x, window, stride):
  return nn.max_pool(x, (window, window), (stride, stride), "SAME")


@pytest.mark.slow(unless=("3-1-shape2", "2-3-shape1", "3-2-shape0"))
@pytest.mark.parametrize("shape", [(28, 28), (7, 7), (6, 5), (1, 2)])
@pytest.mark.parametrize(("window", "stride"), [(3, 2), (2, 2), (2, 3), (3, 1)])
def test_max_pool_equals_flax(shape, window, stride):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *shape, 3)).astype(np.float32)

  def values_and_gradients(x):
    expected, expected_vjp = jax.vjp(lambda x: _reference(x, window, stride), x)
    actual, vjp = jax.vjp(lambda x: pooling.max_pool(x, window, stride), x)
    cotangent = jnp.cos(jnp.arange(expected.size, dtype=float)).reshape(expected.shape)
    return (actual, *vjp(cotangent)), (expected, *expected_vjp(cotangent))

  actual, expected = jax.jit(values_and_gradients)(x)
  np.testing.assert_array_equal(actual[0], expected[0])
  np.testing.assert_allclose(actual[1], expected[1], rtol=1e-6, atol=1e-6)


def test_max_pool_propagates_nan():
  for i in range(5):
    x = jnp.zeros((1, 5, 5, 1)).at[0, i, 2, 0].set(jnp.nan)
    np.testing.assert_array_equal(pooling.max_pool(x, 3, 2), _reference(x, 3, 2))


def test_gradients_of_tied_maxima_sum_to_that_of_the_output():
  x = jnp.zeros((1, 4, 4, 1))
  gradient = jax.grad(lambda x: pooling.max_pool(x, 2, 2).sum())(x)
  np.testing.assert_array_equal(
    gradient.reshape(2, 2, 2, 2).sum((1, 3)), np.ones((2, 2))
  )
