"""Distances between vectors and between outer products."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.coresets import distances


@pytest.mark.parametrize("scaled", [False, True])
def test_outer_product_distances_are_exact_for_equal_points(scaled):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(30, 4)), 100 * rng.normal(size=(30, 50))
  left[7], right[7] = left[3], right[3]
  scale = rng.uniform(0.5, 2.0, size=(4, 50)) if scaled else None
  formed = left[:, :, None] * right[:, None]
  formed = formed if scale is None else formed / scale
  expected = np.linalg.norm((formed[:, None] - formed).reshape(30, 30, -1), axis=2)
  points = distances.outer_products(
    left.astype(np.float32), right.astype(np.float32), scale
  )
  result = np.asarray(points.distances(jnp.arange(30)))
  np.testing.assert_allclose(result, expected, rtol=1e-3, atol=2e-3 * expected.max())
  assert result[3, 7] == result[7, 3] == 0 and (np.diag(result) == 0).all()
  # Beyond a few coordinates distances of vectors use inner products as well.
  flat = distances.vectors(formed.reshape(30, -1).astype(np.float32))
  assert flat.distances(jnp.array([3]))[0, 7] == 0
