"""Loops whose results are allocated only after an earlier computation.

A `jax.lax.scan` writes the rows that it collects, such as the activations of layers,
into arrays of zeros. These zeros depend on nothing, so a compiler may create them as
soon as the program starts (XLA:CPU does). Even if the loop itself waits for an earlier
pass, its arrays are then in memory during that pass. This module makes the zeros depend
on the earlier pass, as the inputs of the loop do (see `ordering`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import parameter_uses


def allocated_after(first: base.PyTree, function: Callable[[], Any]) -> Any:
  """Runs `function` with loops that allocate stacked outputs after `first` is computed.

  Loops inside other loops, or inside `jax.checkpoint`, `cond` or a function with a
  custom derivative, are not changed. Outside of `jit` and similar transformations,
  operations run in the order of the program, so nothing is changed.

  Args:
    first: pytree of arrays that are computed earlier. Integers and keys have no effect.
    function: the computation, which is traced once.

  Returns:
    The result of `function`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> def squares():
    ...   return jax.lax.scan(lambda i, _: (i + 1, i**2), 0, length=3)[1]
    >>> print(jax.jit(lambda x: allocated_after(jnp.sin(x), squares))(1.))
    [0 1 4]
  """
  if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(first)):
    return function()
  closed, shapes = jax.make_jaxpr(function, return_shape=True)()
  zero = ordering.zero_after(first)

  def replace(eqn, inputs):
    if eqn.primitive.name != "scan" or not eqn.params["length"]:
      return None
    return _scan(eqn, inputs, zero)

  outputs = parameter_uses.run(closed.jaxpr, closed.consts, [], replace)
  return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _scan(eqn, inputs, zero):
  """The outputs of a loop that writes its rows into arrays in its carry."""
  loop = batch_axes.scan(eqn)
  first_row = loop.num_consts + loop.num_carry
  avals = [v.aval for v in eqn.outvars[loop.num_carry :]]
  # PRNG keys cannot be added to `zero`, so their rows remain outputs of the scan.
  is_moved = [not jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in avals]
  consts = inputs[: loop.num_consts]
  start = [
    parameter_uses.zeros(aval) + zero.astype(aval.dtype)
    for aval, moved in zip(avals, is_moved, strict=True)
    if moved
  ]

  def iterate(state, xs):
    i, carry, arrays = state
    results = jax.core.eval_jaxpr(loop.jaxpr, loop.closed_consts, *consts, *carry, *xs)
    carry, rows = results[: loop.num_carry], results[loop.num_carry :]
    moved_rows = [row for row, moved in zip(rows, is_moved, strict=True) if moved]
    arrays = [
      jax.lax.dynamic_update_index_in_dim(array, row, i, 0)
      for array, row in zip(arrays, moved_rows, strict=True)
    ]
    others = [row for row, moved in zip(rows, is_moved, strict=True) if not moved]
    return (i + (-1 if loop.reverse else 1), carry, arrays), others

  (_, carry, arrays), others = jax.lax.scan(
    iterate,
    (
      jnp.int32(loop.length - 1 if loop.reverse else 0),
      inputs[loop.num_consts : first_row],
      start,
    ),
    inputs[first_row:],
    length=loop.length,
    reverse=loop.reverse,
    unroll=loop.unroll,
  )
  groups = {True: iter(arrays), False: iter(others)}
  return [*carry, *(next(groups[moved]) for moved in is_moved)]
