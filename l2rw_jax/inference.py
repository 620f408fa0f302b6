"""Passes over a whole data set."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import processes


def map_batches(
  fun: Callable[[base.Batch], base.PyTree],
  examples: Mapping[str, Any],
  batch_size: int,
  by_process: bool = False,
) -> base.PyTree:
  """Applies `fun` to a data set, one batch at a time, and concatenates the results.

  The last batch is smaller if `batch_size` does not divide N. If `fun` reduces over its
  batch, its result must have a leading axis of size 1.

  Args:
    fun: `batch -> results`, a pytree of arrays with a leading axis. It is usually
      compiled; it is compiled a second time for a smaller last batch.
    examples: arrays or row sources with leading axis N, at least 1.
    batch_size: number of examples in a batch.
    by_process: whether each of several processes applies `fun` only to its part of the
      batches, and receives the results of the others. All processes must then call
      this function with the same examples.

  Returns:
    The results as NumPy arrays, concatenated along their leading axis.

  Raises:
    InputError: an array is masked or has no length, the lengths differ, there is no
      example, `batch_size` is not a positive integer, `fun` returns a scalar, or, with
      `by_process`, another process failed (see `processes.publish_failure`).

  >>> examples = {"x": np.arange(5)}
  >>> map_batches(lambda batch: 2 * batch["x"], examples, batch_size=2)
  array([0, 2, 4, 6, 8])
  >>> map_batches(lambda batch: batch["x"].sum(keepdims=True), examples, batch_size=2)
  array([1, 5, 4])
  """
  for name, x in examples.items():
    base.refuse_mask(f"{name} in a pass over a data set", x)
  # `len` of a scalar array would raise a TypeError.
  sizes = {
    name: len(x) if getattr(x, "shape", True) else None for name, x in examples.items()
  }
  size = next(iter(sizes.values()), 0)
  if not size or set(sizes.values()) != {size}:
    raise base.InputError(
      "the examples of a pass over a data set must be arrays of one length, at least 1;"
      f" got the lengths {sizes}."
    )
  starts = range(0, size, base.check_integer("batch_size", batch_size))

  def results(starts):
    parts = []
    for start in starts:
      batch = {
        name: _native(x[start : start + batch_size]) for name, x in examples.items()
      }
      parts.append(jax.device_get(fun(batch)))
      if any(np.ndim(x) == 0 for x in jax.tree.leaves(parts[-1])):
        raise base.InputError(
          "the function of a pass over a data set must return arrays with a leading"
          " axis, to be concatenated; it returned a scalar."
        )
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)

  if not by_process or processes.count() == 1:
    return results(starts)
  bounds = len(starts) * np.arange(processes.count() + 1) // processes.count()
  first, last = bounds[processes.index() :][:2]
  if first < last:
    part = results(starts[first:last])
  else:  # There are fewer batches than processes; this process adds no rows.
    part = jax.tree.map(lambda x: x[:0], results(starts[:1]))
  leaves, structure = jax.tree.flatten(part)
  return jax.tree.unflatten(structure, processes.join(leaves))


def _native(values: Any) -> Any:
  """Rows in the byte order of this machine.

  `jax.jit` reads integers in the other byte order as if they were in this one.
  """
  dtype = getattr(values, "dtype", None)
  if not isinstance(dtype, np.dtype) or dtype.isnative:
    return values
  return np.asarray(values).astype(dtype.newbyteorder("="))
