"""What waits is not changed by what it waits for, whatever that is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import sequencing


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 3e38])
def test_unchanged(value):
  first = {"x": jnp.array([value, 1.0]), "empty": jnp.zeros(0), "int": jnp.arange(2)}
  then = {
    "x": jnp.array([-0.0, jnp.nan, -jnp.inf]),
    "half": jnp.ones(2, jnp.bfloat16),
    "int": jnp.arange(3, dtype=jnp.uint8),
    "bool": jnp.array([True, False]),
    "key": jax.random.split(jax.random.key(0)),
  }
  found = jax.jit(sequencing.after)(first, then)
  for name, expected in then.items():
    actual = found[name]
    assert actual.dtype == expected.dtype
    if name == "key":
      actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
    np.testing.assert_array_equal(actual, expected)
  assert np.signbit(found["x"][0])  # -0.0 too


def test_mapped_and_differentiated():
  first, then = jnp.array([[1.0], [jnp.nan]]), jnp.array([[2.0, 3.0], [4.0, 5.0]])
  gradient = jax.jit(
    jax.vmap(jax.grad(lambda x, y: (sequencing.after(x, y) ** 2).sum(), (0, 1)))
  )
  of_first, of_then = gradient(first, then)
  np.testing.assert_array_equal(of_first, 0 * then[:, :1])
  np.testing.assert_array_equal(of_then, 2 * then)


def test_no_compiler_foresees_the_zero():
  run = jax.jit(lambda x, y: sequencing.after(jnp.sin(x), y)).lower(1.0, 2.0).compile()
  assert "sine(" in run.as_text()
