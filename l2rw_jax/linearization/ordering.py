"""Ordering of computations that do not depend on each other.

A compiler may run two independent passes over a network in any order or at the same
time, so that the activations of both are in memory. `jax.lax.optimization_barrier` does
not prevent this on XLA:CPU, which removes the barrier before operations are scheduled
(seen with jaxlib 0.10.2). A data dependency does: an arithmetic expression that is
always 0, but that no compiler can simplify.
"""

import jax
import jax.numpy as jnp

from l2rw_jax import base


def zero_after(first: base.PyTree) -> base.Array:
  """A 0 in float32 that depends on the floating-point and complex arrays of `first`.

  Args:
    first: pytree of arrays.
  """
  entries = [
    _first_entry(x)
    for x in jax.tree.leaves(first)
    if isinstance(x, jax.Array) and x.size and jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  if not entries:
    return jnp.zeros((), jnp.float32)  # The type of the result below, even with x64.
  values = jnp.stack(entries)
  # Compilers do not simplify a product with 0, because it could be NaN. This product is
  # never NaN, because its other factor is finite.
  zeros = jnp.isnan(0 * jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values)))
  zeros = jax.lax.stop_gradient(zeros.astype(jnp.float32))
  # XLA repeats a chain of sums of scalars in every operation that uses the result, so
  # that the program would grow with the square of the number of scalars. XLA also turns
  # a product with constants into such a chain, but not the product of an array with
  # itself.
  return jnp.dot(zeros, zeros)


def _first_entry(x):
  """The real part of the first entry, or the largest of a sharded array, in float32."""
  x = jax.lax.stop_gradient(x)
  if any(jax.typeof(x).sharding.spec):
    # A sharded axis cannot be sliced, and gathering a large array is expensive. For the
    # largest entry, each device sends only one number.
    entry = jnp.real(x).max()
  else:
    entry = jnp.real(jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)).reshape(())
  return entry.astype(jnp.float32)


def num_bytes(tree: base.PyTree) -> int:
  """The total size in bytes of the arrays of a pytree; PRNG keys are not counted."""
  avals = [jax.typeof(x) for x in jax.tree.leaves(tree)]
  is_key = [jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals]
  return sum(
    aval.size * aval.dtype.itemsize
    for aval, skip in zip(avals, is_key, strict=True)
    if not skip
  )


def residual_bytes(vjp_fn: base.PyTree, known: base.PyTree) -> int:
  """The size in bytes of the arrays that are stored for a backward pass.

  Args:
    vjp_fn: the result of `jax.vjp`.
    known: pytree of arrays that are in memory anyway, and are not counted.
  """
  known_ids = {id(x) for x in jax.tree.leaves(known)}
  residuals = {id(x): x for x in jax.tree.leaves(vjp_fn) if id(x) not in known_ids}
  return num_bytes(list(residuals.values()))


def after(first: base.PyTree, then: base.PyTree) -> base.PyTree:
  """Returns a copy of `then`; computations that use the copy wait for `first`.

  Args:
    first: pytree of arrays; only floating-point and complex ones are waited for.
    then: pytree of arrays. Typed PRNG keys, numbers of Python, and arrays of strings or
      objects do not wait.

  Returns:
    A pytree with the values of `then`.

  >>> import jax.numpy as jnp
  >>> print(after(jnp.array([jnp.nan]), jnp.array([1., 2.])))
  [1. 2.]
  """
  is_ready = zero_after(first) == 0  # Always True.

  def wait(x):
    if not base.is_array(x):  # Numbers of Python and strings are not computed.
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # Typed PRNG keys.
      return x
    return jnp.where(is_ready, x, jnp.zeros_like(x))

  return jax.tree.map(wait, then)
