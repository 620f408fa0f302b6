"""The number of devices changes only rounding: the drift in float64 is tiny."""

import jax
import pytest

from benchmarks import device_drift


@pytest.mark.ci
def test_one_and_eight_devices_agree_in_double_precision():
  with jax.enable_x64(True):
    one, eight = (list(device_drift.steps_of("l2rw", n, 0, 20)) for n in (1, 8))
  loss, weight = device_drift.drift(one, eight)
  assert loss.max() < 1e-12 and weight.max() < 1e-10
