"""Passes over a whole data set."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from l2rw_jax import base


def map_batches(
  fun: Callable[[base.Batch], base.PyTree],
  examples: Mapping[str, Any],
  batch_size: int,
) -> base.PyTree:
  """Applies `fun` to a data set, one batch at a time, and concatenates the results.

  The last batch is smaller if `batch_size` does not divide N. If `fun` reduces over its
  batch, its result must have a leading axis of size 1.

  Args:
    fun: `batch -> results`, a pytree of arrays with a leading axis. It is usually
      compiled; it is compiled a second time for a smaller last batch.
    examples: arrays or row sources with leading axis N, at least 1.
    batch_size: examples in a batch.

  Returns:
    The results as NumPy arrays, concatenated along their leading axis.

  >>> examples = {"x": np.arange(5)}
  >>> map_batches(lambda batch: 2 * batch["x"], examples, batch_size=2)
  array([0, 2, 4, 6, 8])
  >>> map_batches(lambda batch: batch["x"].sum(keepdims=True), examples, batch_size=2)
  array([1, 5, 4])
  """
  size = len(next(iter(examples.values())))
  results = []
  for start in range(0, size, batch_size):
    batch = {name: x[start : start + batch_size] for name, x in examples.items()}
    results.append(jax.device_get(fun(batch)))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *results)
