"""Distances between vectors and between outer products, compared with NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.coresets import distances


@pytest.mark.parametrize("dims", [1, 32, 33])
def test_vectors_have_euclidean_distances(dims):
  points = np.random.default_rng(0).normal(size=(9, dims)).astype(np.float32)
  points[7] = points[3]
  rows = jnp.array([3, 0])
  vectors = distances.vectors(points)
  actual = np.asarray(vectors.distances(rows))
  expected = np.linalg.norm(points[[3, 0]][:, None] - points, axis=2)
  assert vectors.num_points == 9
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-3)
  assert actual[0, 3] == actual[0, 7] == actual[1, 0] == 0


def test_small_distances_of_few_coordinates_are_accurate():
  points = np.array([[1.0, 2.0], [1.0 + 2.0**-20, 2.0]], np.float32)
  assert distances.vectors(points).distances(jnp.array([0]))[0, 1] == 2.0**-20


@pytest.mark.parametrize("scaled", [False, True])
def test_outer_products_have_the_distances_of_explicit_matrices(scaled):
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
  actual = np.asarray(points.distances(jnp.arange(30)))
  np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-3 * expected.max())
  assert actual[3, 7] == actual[7, 3] == 0 and (np.diag(actual) == 0).all()
