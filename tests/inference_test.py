"""Passes over a data set in batches."""

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import inference


class _Rows:
  """A row source that is not an array, and supports slices only."""

  def __init__(self, array):
    self._array = array

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    assert isinstance(rows, slice)
    return self._array[rows]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
@pytest.mark.parametrize("make", [np.asarray, _Rows])
def test_results_are_joined_in_order(batch_size, make):
  x, y = np.arange(14.0).reshape(7, 2), np.arange(7)
  sizes = []

  def fun(batch):
    sizes.append(len(batch["y"]))
    return {"x": 2 * batch["x"], "pair": (batch["y"], None)}

  examples = {"x": make(x), "y": y}
  results = inference.map_batches(fun, examples, batch_size)
  np.testing.assert_array_equal(results["x"], 2 * x)
  np.testing.assert_array_equal(results["pair"][0], y)
  assert results["pair"][1] is None and isinstance(results["x"], np.ndarray)
  assert sum(sizes) == 7 and max(sizes) == min(batch_size, 7)


def test_a_scalar_result_is_refused():
  with pytest.raises(base.InputError, match="it returned a scalar"):
    inference.map_batches(lambda batch: batch["x"].sum(), {"x": np.arange(5)}, 2)


def test_a_result_per_batch():
  fun = lambda batch: batch["x"].sum(keepdims=True)  # noqa: E731
  sums = inference.map_batches(fun, {"x": np.arange(5)}, 2)
  np.testing.assert_array_equal(sums, [1, 5, 4])


@pytest.mark.parametrize(
  "examples",
  [{"y": np.arange(5), "x": np.arange(7)}, {"x": np.arange(0)}, {}, {"x": np.array(3)}],
)
def test_examples_have_one_length(examples):
  with pytest.raises(base.InputError, match="arrays of one length, at least 1"):
    inference.map_batches(lambda batch: batch["x"], examples, 2)


def test_rows_of_every_byte_order_keep_their_values_under_jit():
  # jax.jit reads the bytes of 1 in the other order as 16777216.
  x = np.arange(5)
  examples = {"x": x.astype(">i4"), "y": x.astype("<f8"), "z": x.astype(">f4")}
  results = inference.map_batches(jax.jit(lambda batch: batch), examples, 2)
  for values in results.values():
    np.testing.assert_array_equal(values, x)
