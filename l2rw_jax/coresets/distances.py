"""Floor 1: how far apart points are, a few rows of the distance matrix at a time."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from l2rw_jax import base

# Up to here squared differences are summed, beyond it inner products are taken.
_FEW_COORDINATES = 32
# A matrix product in float32 throughout: TPUs and GPUs would round its factors.
EXACT = jax.lax.Precision.HIGHEST


class Points(Protocol):
  """n points that know their distances."""

  @property
  def num_points(self) -> int:
    """n."""

  def distances(self, rows: base.Array) -> base.Array:
    """From the points `rows` [K] to all points, [K, n]."""


class Vectors(NamedTuple):
  """Points by their coordinates; see `vectors`.

  Attributes:
    coordinates: [d, n], so that one coordinate of all points lies in one piece.
  """

  coordinates: base.Array

  @property
  def num_points(self) -> int:
    """n."""
    return self.coordinates.shape[1]

  def distances(self, rows: base.Array) -> base.Array:
    """From the points `rows` [K] to all points, [K, n]."""
    chosen = self.coordinates[:, rows]
    if self.coordinates.shape[0] > _FEW_COORDINATES:
      squares = jnp.sum(self.coordinates**2, axis=0)
      inner = jnp.dot(chosen.T, self.coordinates, precision=EXACT)
      return _by_inner_products(inner, squares[rows], squares)
    pairs = zip(chosen, self.coordinates, strict=True)
    return jnp.sqrt(sum((a[:, None] - b[None, :]) ** 2 for a, b in pairs))


class OuterProducts(NamedTuple):
  """Points u_i v_i^T, flattened and never formed; see `outer_products`.

  Attributes:
    left: u, [n, C].
    right: v, [n, d].
    precision: a weight of each squared coordinate, [C, d], or None for 1.
    squares: squared norms, [n].
  """

  left: base.Array
  right: base.Array
  precision: base.Array | None
  squares: base.Array

  @property
  def num_points(self) -> int:
    """n."""
    return self.left.shape[0]

  def distances(self, rows: base.Array) -> base.Array:
    """From the points `rows` [K] to all points, [K, n]."""
    left, right = self.left[rows], self.right[rows]
    if self.precision is None:
      inner = jnp.dot(left, self.left.T, precision=EXACT)
      inner *= jnp.dot(right, self.right.T, precision=EXACT)
    else:
      formed = left[:, :, None] * right[:, None, :] * self.precision[None]
      inner = jnp.einsum(
        "kcd,nd,nc->kn", formed, self.right, self.left, precision=EXACT
      )
    return _by_inner_products(inner, self.squares[rows], self.squares)


def vectors(points: base.Array) -> Vectors:
  """Points [n, d] whose distance is that of their coordinates.

  Of up to 32 coordinates the differences are squared and summed: equal points are at
  distance 0 and close ones at their exact distance. Of more, |a|^2 + |b|^2 - 2 a.b is
  taken, which is one matrix product, and what is below its rounding error counts as 0.
  """
  return Vectors(base.unsharded(jnp.asarray(points)).T)


def outer_products(
  left: base.Array, right: base.Array, scale: base.Array | None = None
) -> OuterProducts:
  """Points u_i v_i^T / scale, such as the gradients of a last layer's weights.

  Their inner products are (u_i.u_j)(v_i.v_j); with a scale, sum_c u_ic u_jc sum_e
  v_ie v_je / scale_ce^2. Distances from them are known to some 1e-3 of the norms only
  (float32); what is below rounding counts as 0, so equal points stay together.

  Args:
    left: u, [n, C].
    right: v, [n, d].
    scale: what each coordinate is divided by, [C, d].
  """
  left, right = (base.unsharded(jnp.asarray(x)) for x in (left, right))
  if scale is None:
    squares = jnp.sum(left**2, axis=1) * jnp.sum(right**2, axis=1)
    return OuterProducts(left, right, None, squares)
  precision = 1 / jnp.asarray(scale) ** 2
  within = jnp.dot(right**2, precision.T, precision=EXACT)
  return OuterProducts(left, right, precision, jnp.sum(left**2 * within, axis=1))


def _by_inner_products(inner, squares_of_rows, squares):
  total = squares_of_rows[:, None] + squares[None, :]
  squared = total - 2 * inner
  rounding = 16 * jnp.finfo(total.dtype).eps
  return jnp.sqrt(jnp.where(squared > rounding * total, squared, 0))
