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
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert actual[0, 3] == actual[0, 7] == actual[1, 0] == 0


@pytest.mark.parametrize("dims", [3, 40])
@pytest.mark.parametrize("unit", [2.0**-110, 2.0**90])
def test_distances_are_exact_multiples_for_any_unit(dims, unit):
  # The squares are outside the range of float32.
  points = np.random.default_rng(0).normal(size=(9, dims)).astype(np.float32)
  rows = jnp.array([3, 0])
  expected = np.asarray(distances.vectors(points).distances(rows))
  actual = np.asarray(distances.vectors(points * np.float32(unit)).distances(rows))
  np.testing.assert_array_equal(actual, expected * np.float32(unit))
  left, right = points[:, :2], points[:, 2:]
  expected = distances.outer_products(left, right).distances(rows)
  scaled = distances.outer_products(left * np.float32(unit), right)
  actual = np.asarray(scaled.distances(rows))
  np.testing.assert_array_equal(actual, np.asarray(expected) * np.float32(unit))
  scale = np.full((2, right.shape[1]), 1 / unit, np.float32)
  scaled = distances.outer_products(left, right, scale)
  np.testing.assert_allclose(scaled.distances(rows), actual, rtol=1e-5)


@pytest.mark.parametrize("dims", [3, 40])
def test_points_that_are_not_finite_have_no_finite_distance(dims):
  points = np.zeros((3, dims), np.float32)
  points[1], points[2] = np.nan, np.inf
  actual = np.asarray(distances.vectors(points).distances(jnp.array([0])))
  assert actual[0, 0] == 0 or np.isnan(actual[0, 0])
  assert not np.isfinite(actual[0, 1:]).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_distances_from_infinite_points_are_never_zero(sign):
  points = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
  points[0, 0] = sign * np.inf
  actual = np.asarray(distances.vectors(points).distances(jnp.arange(5)))
  assert not np.isfinite(actual[0]).any() and not np.isfinite(actual[:, 0]).any()
  outer = distances.outer_products(points[:, :2], points[:, 2:])
  assert not np.isfinite(outer.distances(jnp.array([0]))).any()


def test_points_without_coordinates_have_distances_of_zero():
  actual = distances.vectors(np.zeros((3, 0))).distances(jnp.array([0, 2]))
  np.testing.assert_array_equal(actual, np.zeros((2, 3)))


def test_small_distances_of_few_coordinates_are_accurate():
  points = np.array([[1.0, 2.0], [1.0 + 2.0**-20, 2.0]], np.float32)
  assert distances.vectors(points).distances(jnp.array([0]))[0, 1] == 2.0**-20


def _far_points():
  """Points far from the origin, in coordinates of different spread, and an outlier."""
  rng = np.random.default_rng(0)
  offset = 10.0 ** rng.uniform(-3, 6, 40)
  points = rng.normal(size=(30, 40)) * offset / 1000 + offset
  points[7] = points[3]
  points[:, 39] = rng.normal(size=30)
  points[5, 39] = 100.0
  return points.astype(np.float32)


def test_distances_do_not_depend_on_the_origin():
  points = _far_points()
  exact = points.astype(np.float64)
  expected = np.linalg.norm(exact[:, None] - exact, axis=2)
  # Neither padding nor points that are not finite have an influence.
  for value, num_points in ((3e8, 30), (np.nan, 60)):
    more = np.concatenate([points, np.full((30, 40), value, np.float32)])
    actual = distances.vectors(more, num_points).distances(jnp.arange(30))
    actual = np.asarray(actual)[:, :30]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3 * expected.max())
    assert actual[3, 7] == 0 and (np.diag(actual) == 0).all()


def test_centered_points_and_outliers_are_not_shifted():
  points = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
  points[0] = 1e4  # In every coordinate, the mean is 330.
  vectors = distances.vectors(points)
  np.testing.assert_array_equal(vectors.unit * vectors.coordinates.T, points)


@pytest.mark.parametrize("scaled", [False, True])
def test_outer_products_have_the_distances_of_explicit_matrices(scaled):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(30, 4)), 100 * rng.normal(size=(30, 50))
  left[7], right[7] = left[3], right[3]
  scale = rng.uniform(0.5, 2.0, size=(4, 50)) if scaled else None
  matrices = left[:, :, None] * right[:, None]
  matrices = matrices if scale is None else matrices / scale
  expected = np.linalg.norm(matrices[:, None] - matrices, axis=(2, 3))
  points = distances.outer_products(
    left.astype(np.float32), right.astype(np.float32), scale
  )
  actual = np.asarray(points.distances(jnp.arange(30)))
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert actual[3, 7] == actual[7, 3] == 0 and (np.diag(actual) == 0).all()
