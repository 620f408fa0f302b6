"""What is to be computed first, where the numbers alone leave it open.

A compiler may run two independent passes over a network in any order or at once, and
then holds the activations of both. `jax.lax.optimization_barrier` is no order to
XLA:CPU, which drops it before it arranges its operations (jaxlib 0.10.2 then starts
both passes); arithmetic whose result no compiler can foresee is one to all of them.
"""

import jax
import jax.numpy as jnp

from l2rw_jax import base


def zero_after(first: base.PyTree) -> base.Array:
  """A floating point 0 that is known as soon as `first` is, a pytree of arrays.

  Only floating point and complex arrays count.
  """
  entries = [
    _first_entry(x)
    for x in jax.tree.leaves(first)
    if x.size and jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  if not entries:
    return jnp.zeros(())
  known = jnp.stack(entries)
  # A product with 0 may be NaN, and so is not folded, though this one never is.
  zeros = jnp.isnan(0 * jnp.where(jnp.isfinite(known), known, jnp.zeros_like(known)))
  zeros = jax.lax.stop_gradient(zeros.astype(jnp.float32))
  # One product with itself, because XLA repeats a chain of sums of scalars in every
  # operation that reads its result: the program would grow with the square of their
  # number. A product with constants is turned into such a chain.
  return jnp.dot(zeros, zeros)


def _first_entry(x):
  """Of type float32; of a complex array the real part."""
  x = jax.lax.stop_gradient(x)
  if any(jax.typeof(x).sharding.spec):
    # A sharded axis cannot be sliced, and gathering a large array is expensive. The
    # largest entry also needs all of `x`, but sends only one number per device.
    entry = jnp.real(x).max()
  else:
    entry = jnp.real(jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)).reshape(())
  return entry.astype(jnp.float32)


def after(first: base.PyTree, then: base.PyTree) -> base.PyTree:
  """`then`, unchanged, but what is computed from it waits for `first`.

  Costs a copy of `then`.

  Args:
    first: pytree of arrays, of which those of floating point or complex type count.
    then: pytree of arrays, of which those of numbers wait.

  >>> import jax.numpy as jnp
  >>> print(after(jnp.array([jnp.nan]), jnp.array([1., 2.])))
  [1. 2.]
  """
  is_known = zero_after(first) == 0

  def wait(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # Such as PRNG keys.
      return x
    return jnp.where(is_known, x, jnp.zeros_like(x))

  return jax.tree.map(wait, then)
