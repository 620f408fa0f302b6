"""Dropout: rates, and masks per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import dropout


def test_masks_keep_the_mean_and_differ_between_examples():
  layer = dropout.Dropout(0.3)
  x = jnp.full((50, 1000), 2.0)
  result = layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)})
  kept = result > 0
  np.testing.assert_allclose(result[kept], 2 / 0.7, rtol=1e-6)
  # The tolerance is four standard deviations of the mean of 50,000 draws.
  assert np.mean(kept) == pytest.approx(0.7, abs=0.0083)
  assert len({row.tobytes() for row in np.asarray(kept)}) == 50
  np.testing.assert_array_equal(layer.apply({}, x, False), x)


@pytest.mark.parametrize("rate", [1.0, -0.5, float("nan")])
def test_rates_out_of_range_are_refused(rate):
  with pytest.raises(base.InputError, match=f"rate={rate} must be at least 0, less"):
    dropout.Dropout(rate).apply({}, jnp.ones((2, 3)), True)
