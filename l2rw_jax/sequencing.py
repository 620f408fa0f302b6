"""What is to be computed first, where the numbers alone leave it open.

A compiler may run two independent passes over a network in any order or at once, and
then holds the activations of both. On accelerators `jax.lax.optimization_barrier`
tells it not to. XLA:CPU drops that before it orders its operations, and is told by
arithmetic whose result it cannot foresee.
"""

import jax
import jax.numpy as jnp

from l2rw_jax import base


def zero_after(first: base.PyTree) -> base.Array:
  """A 0 (float32) that is known as soon as `first` is, a pytree of arrays.

  Only floating point and complex arrays count.
  """
  zero = jnp.zeros(())
  for x in jax.tree.leaves(first):
    if x.size and jnp.issubdtype(x.dtype, jnp.inexact):
      one = x.ravel()[0]
      # Compilers do not fold a product with 0, for it may be NaN.
      zero += jnp.isnan(0 * jnp.where(jnp.isfinite(one), one, 0))
  return jax.lax.stop_gradient(zero)


def after(first: base.PyTree, then: base.PyTree) -> base.PyTree:
  """`then`, unchanged, but what is computed from it waits for `first`.

  Args:
    first: pytree of arrays, of which those of floating point or complex type count.
    then: pytree of arrays.

  >>> import jax.numpy as jnp
  >>> print(after(jnp.array([jnp.nan]), jnp.array([1., 2.])))
  [1. 2.]
  """
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier((first, then))[1]
  is_known = zero_after(first) == 0

  def wait(x):
    if not jnp.issubdtype(x.dtype, jnp.number):  # Such as PRNG keys.
      return x
    return jnp.where(is_known, x, jnp.zeros_like(x))

  return jax.tree.map(wait, then)
