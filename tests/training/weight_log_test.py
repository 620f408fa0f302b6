"""Statistics of example weights, compared with values computed by hand."""

import numpy as np

from l2rw_jax.training import weight_log


def test_two_steps_of_two_runs_by_hand():
  log = weight_log.WeightLog.empty(num_runs=2, num_examples=4)
  log.add(np.array([[0, 1], [3, 2]]), np.array([[0.5, 0.0], [2.0, 1.0]]))
  log.add(np.array([[1, 0], [3, 0]]), np.array([[0.0, 1.5], [0.0, 4.0]]))
  nan = np.nan
  np.testing.assert_array_equal(
    log.mean(), [[1.0, 0.0, nan, nan], [4.0, nan, 1.0, 1.0]]
  )
  np.testing.assert_array_equal(log.last, [[1.5, 0.0, nan, nan], [4.0, nan, 1.0, 0.0]])
  np.testing.assert_array_equal(log.seen, [[2, 2, 0, 0], [1, 0, 1, 2]])
  np.testing.assert_array_equal(log.rejected, [[0, 2, 0, 0], [0, 0, 0, 1]])
  np.testing.assert_array_equal(log.total, [[2.0, 0.0, 0, 0], [4.0, 0, 1.0, 2.0]])


def test_repeated_example_in_a_batch_counts_each_time():
  log = weight_log.WeightLog.empty(1, 2)
  log.add(np.array([[1, 1, 1]]), np.array([[0.0, 3.0, 1.5]]))
  assert log.seen.tolist() == [[0, 3]] and log.rejected.tolist() == [[0, 1]]
  assert log.mean()[0, 1] == 1.5 and log.last[0, 1] == 1.5


def test_only_zero_weights_are_rejected():
  log = weight_log.WeightLog.empty(1, 3)
  log.add(np.array([[0, 1, 2]]), np.array([[-0.0, 1e-30, -1.0]], np.float32))
  assert log.rejected.tolist() == [[1, 0, 0]]


def test_small_weights_are_not_lost():
  log = weight_log.WeightLog.empty(1, 1)
  big = np.float32(2.0**24)
  log.add(np.array([[0]]), np.array([[big]]))
  for _ in range(4):
    log.add(np.array([[0]]), np.array([[np.float32(1)]]))
  assert log.total[0, 0] == 2.0**24 + 4  # In float32 it would stay 2^24.


def test_empty_log_is_nan_without_warning(recwarn):
  log = weight_log.WeightLog.empty(1, 3)
  assert np.isnan(log.mean()).all() and np.isnan(log.last).all()
  assert len(recwarn) == 0
