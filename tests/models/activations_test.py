"""The ReLU that is written for speed, compared with that of JAX."""

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax.models import activations


def test_relu_and_its_derivative_equal_jax():
  x = jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, jnp.nan])
  np.testing.assert_array_equal(activations.relu(x), jax.nn.relu(x))
  derivative, expected = (
    jax.vmap(jax.grad(f))(x[:-1]) for f in (activations.relu, jax.nn.relu)
  )
  np.testing.assert_array_equal(derivative, expected)
  assert activations.relu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
