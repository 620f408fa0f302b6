"""Distances between points, a few rows of the distance matrix at a time."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from l2rw_jax import base

# Distances are computed from squared differences for up to this number of coordinates,
# and from inner products for more.
_FEW_COORDINATES = 32
# Without this setting, TPUs and GPUs round the factors of float32 matrix products.
EXACT = jax.lax.Precision.HIGHEST


class Points(Protocol):
  """A set of n points with a distance."""

  @property
  def num_points(self) -> int:
    """The number of points, n."""

  def distances(self, rows: base.Array) -> base.Array:
    """Distances from the points `rows` [K] to all points, [K, n]."""


class Vectors(NamedTuple):
  """Points that are given by their coordinates; see `vectors`.

  Attributes:
    coordinates: coordinates divided by `unit`, and shifted as described in `vectors`.
      The layout is [d, n], so that the values of one coordinate are contiguous in
      memory.
    unit: a power of two, so that squares neither overflow nor vanish; scalar.
  """

  coordinates: base.Array
  unit: base.Array

  @property
  def num_points(self) -> int:
    """The number of points, n."""
    return self.coordinates.shape[1]

  def distances(self, rows: base.Array) -> base.Array:
    """Distances from the points `rows` [K] to all points, [K, n]."""
    selected = self.coordinates[:, rows]
    if self.coordinates.shape[0] > _FEW_COORDINATES:
      squares = jnp.sum(self.coordinates**2, axis=0)
      inner = jnp.dot(selected.T, self.coordinates, precision=EXACT)
      return self.unit * _from_inner_products(inner, squares[rows], squares)
    pairs = zip(selected, self.coordinates, strict=True)
    squared = jnp.zeros((len(rows), self.num_points), self.coordinates.dtype)
    for a, b in pairs:
      squared += (a[:, None] - b[None, :]) ** 2
    return self.unit * jnp.sqrt(squared)


class OuterProducts(NamedTuple):
  """Points u_i v_i^T, which are never formed; see `outer_products`.

  Attributes:
    left: u, [n, C], divided by a power of two.
    right: v, [n, d], divided by a power of two.
    precision: the weight 1 / scale^2 of each squared coordinate, divided by a power of
      two, [C, d]; None if all weights are 1.
    squares: squared norms of the points, [n], divided by the square of `unit`.
    unit: the factor by which distances computed from these arrays are multiplied,
      scalar: the product of the powers of two of `left` and `right` and of the square
      root of the power of two of `precision`.
  """

  left: base.Array
  right: base.Array
  precision: base.Array | None
  squares: base.Array
  unit: base.Array

  @property
  def num_points(self) -> int:
    """The number of points, n."""
    return self.left.shape[0]

  def distances(self, rows: base.Array) -> base.Array:
    """Distances from the points `rows` [K] to all points, [K, n]."""
    left, right = self.left[rows], self.right[rows]
    if self.precision is None:
      inner = jnp.dot(left, self.left.T, precision=EXACT)
      inner *= jnp.dot(right, self.right.T, precision=EXACT)
    else:
      weighted = left[:, :, None] * right[:, None, :] * self.precision[None]
      inner = jnp.einsum(
        "kcd,nd,nc->kn", weighted, self.right, self.left, precision=EXACT
      )
    return self.unit * _from_inner_products(inner, self.squares[rows], self.squares)


def vectors(points: base.Array, num_points: int | base.Array | None = None) -> Vectors:
  """Points with the Euclidean distance.

  For up to 32 coordinates, squared differences are summed, so that small distances are
  accurate. For more coordinates, the squared distance is |a|^2 + |b|^2 - 2 a.b, which
  takes one matrix product; a result below its rounding error is replaced by 0. The
  rounding error grows with the norms. Therefore, a coordinate whose mean is larger in
  magnitude than its standard deviation is first shifted to mean 0, which changes no
  distance. Distances from and to points that are not finite are NaN or infinite.

  Args:
    points: real numbers, [n, d].
    num_points: all points after the first `num_points` are padding, and distances to
      them have no meaning. None if there is no padding.
  """
  points, unit = _in_units(_wide(points))
  if points.shape[1] > _FEW_COORDINATES:
    # The scale can be much smaller after the shift.
    points, shifted_unit = _in_units(_shifted(points, num_points))
    unit *= shifted_unit
  return Vectors(points.T, unit)


def outer_products(
  left: base.Array, right: base.Array, scale: base.Array | None = None
) -> OuterProducts:
  """Points u_i v_i^T / scale, such as the gradients of the weights of a last layer.

  Their inner products are (u_i.u_j)(v_i.v_j); with a scale, they are
  sum_c u_ic u_jc sum_e v_ie v_je / scale_ce^2. The error of distances that are computed
  from them is about 1e-3 of the norms in float32. A squared distance below its rounding
  error is replaced by 0, so that equal points have distance 0.

  Args:
    left: u, [n, C].
    right: v, [n, d].
    scale: divisor of each coordinate, [C, d]; None for 1.
  """
  left, right = _wide(left), _wide(right)
  with base.implicit_promotion():
    dtype = jnp.promote_types(left.dtype, right.dtype)
  left, left_unit = _in_units(left.astype(dtype))
  right, right_unit = _in_units(right.astype(dtype))
  unit = left_unit * right_unit
  if scale is None:
    squares = jnp.sum(left**2, axis=1) * jnp.sum(right**2, axis=1)
    return OuterProducts(left, right, None, squares, unit)
  inverse, inverse_unit = _in_units((1 / _wide(scale)).astype(dtype))
  precision = inverse**2
  right_squares = jnp.dot(right**2, precision.T, precision=EXACT)
  squares = jnp.sum(left**2 * right_squares, axis=1)
  return OuterProducts(left, right, precision, squares, unit * inverse_unit)


@jax.jit
def _shifted(points, num_points):
  """Subtracts the mean of each coordinate whose mean exceeds its standard deviation.

  A few outliers cannot cause such a mean. If they could, the shift would round the
  other points to the precision of the outliers.
  """
  valid = jnp.isfinite(points).all(axis=1)
  if num_points is not None:
    valid &= jnp.arange(len(points)) < num_points
  valid = valid[:, None]
  count = jnp.maximum(valid.sum(axis=0), 1).astype(points.dtype)
  mean = jnp.where(valid, points, 0).sum(axis=0) / count
  deviations = jnp.where(valid, points - mean[None], 0)
  spread = jnp.sqrt((deviations**2).sum(axis=0) / count)
  return points - jnp.where(jnp.abs(mean) > spread, mean, 0)[None]


def _in_units(x):
  """Returns `x` / unit and the unit, a power of two near the largest entry of `x`."""
  largest = jnp.max(jnp.abs(x), initial=0)
  is_usual = (largest > 0) & jnp.isfinite(largest)
  _, exponent = jnp.frexp(jnp.where(is_usual, largest, 1))
  unit = jnp.ldexp(jnp.ones((), x.dtype), exponent - 1)
  return x / unit, unit


def _wide(points):
  """Replicated points in float32 or wider, because narrower types overflow or round."""
  points = base.unsharded(jnp.asarray(points))
  return points.astype(base.accumulator_dtype(points.dtype))


def _from_inner_products(inner, row_squares, squares):
  """Distances [K, n] from inner products [K, n] and squared norms [K] and [n]."""
  total = row_squares[:, None] + squares[None, :]
  squared = total - 2 * inner
  rounding = 16 * jnp.finfo(total.dtype).eps
  # This comparison is false for NaN and for two infinities, so that neither becomes 0.
  return jnp.sqrt(jnp.where(squared < rounding * total, 0, squared))
