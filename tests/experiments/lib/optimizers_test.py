"""Schedules of the papers' optimizers, and schedules that start again."""

import numpy as np
import pytest

from experiments.lib import optimizers
from l2rw_jax import base


def _rates(optimizer, num_steps):
  schedule = optimizer.schedule(num_steps)
  return np.array([schedule(step) for step in range(num_steps)])


def test_drops_multiply_the_rate_at_shares_of_the_run():
  optimizer = optimizers.OptimizerConfig(learning_rate=2.0, drops=((0.5, 0.1),))
  np.testing.assert_allclose(_rates(optimizer, 10), [2.0] * 5 + [0.2] * 5, rtol=1e-6)


def test_drops_at_the_same_step_are_multiplied():
  drops = ((0.79, 0.1), (0.89, 0.5))  # Both are at step 4 of 5.
  optimizer = optimizers.OptimizerConfig(learning_rate=2.0, drops=drops)
  np.testing.assert_allclose(_rates(optimizer, 5), [*[2.0] * 4, 0.1], rtol=1e-6)


def test_warm_up_rises_in_five_steps():
  optimizer = optimizers.OptimizerConfig(learning_rate=1.0, warmup=0.5)
  expected = [0.2, 0.4, 0.6, 0.8, *[1.0] * 6]
  np.testing.assert_allclose(_rates(optimizer, 10), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [{"cosine": True}, {"drops": ((0.8, 0.1),)}])
def test_the_schedule_starts_again_for_fine_tuning(shape):
  optimizer = optimizers.OptimizerConfig(learning_rate=3.0, **shape)
  assert optimizer.for_method("fine_tuning", 40) == optimizer
  restarted = _rates(optimizer.for_method("fine_tuning_restarted", 40), 40)
  tuned_steps = optimizers.fine_tuning_steps(40)
  assert tuned_steps == 4 and restarted[-tuned_steps] == 3.0
  np.testing.assert_allclose(restarted[:36], _rates(optimizer, 36), rtol=1e-6)
  np.testing.assert_allclose(restarted[36:], _rates(optimizer, 4), rtol=1e-6)


def test_a_run_of_one_step_has_the_highest_rate():
  optimizer = optimizers.OptimizerConfig(learning_rate=3.0, cosine=True)
  (rate,) = _rates(optimizer.for_method("fine_tuning_restarted", 1), 1)
  assert rate == 3.0


def test_a_plateau_cannot_start_again():
  optimizer = optimizers.OptimizerConfig(plateau_steps=10)
  with pytest.raises(base.InputError, match="cannot start a --plateau schedule again"):
    optimizer.for_method("fine_tuning_restarted", 40)
