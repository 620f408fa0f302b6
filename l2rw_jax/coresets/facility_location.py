"""Greedy facility location: a subset of points that is close to all of them.

Facility location selects a subset S, |S| = r, of n points, so that

    F(S) = sum_i max_{j in S} (C - d_ij)    is large, or equivalently
    cost(S) = sum_i min_{j in S} d_ij       is small,

where d is the Euclidean distance (not squared) and C is an upper bound on all
distances. F is monotone and submodular, so that the greedy algorithm reaches at least
1 - 1/e of the largest F. Let m_i be the distance of point i to the nearest selected
point, or C if no point is selected. Selecting point j increases F by

    gain_j = sum_i max(0, m_i - d_ij).

C does not change the selection: the first gain is n C - sum_i d_ij, which is largest
for the point with the smallest sum of distances, and afterwards every m_i is a
distance. If several computed gains are largest, the lowest index is selected; gains
that are equal in exact arithmetic can differ by rounding. The n x n distance matrix is
never stored; memory is proportional to a block of its rows, [block, n].

References:
  Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing submodular
  set functions", Mathematical Programming 1978 (the bound). Minoux, "Accelerated
  greedy algorithms for maximizing submodular set functions", 1978 (lazy evaluation).
  Mirzasoleiman et al., "Lazier Than Lazy Greedy", AAAI 2015 (stochastic greedy).
  Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine
  Learning Models", ICML 2020 (CRAIG: distances and cluster sizes as used here).
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.coresets import distances


class Selection(NamedTuple):
  """The selected points, in the order of their selection.

  Attributes:
    rows: indices of the selected points, [capacity]; -1 beyond the requested size.
    gains: increase of F by each of them, [capacity].
    weights: cluster sizes: the number of points whose nearest selected point is this
      one, [capacity]; they sum to n. Selected points at distance 0 from each other
      share the sum of their cluster sizes equally, so that each has at least 1.
    assignment: position in `rows` of the selected point that is nearest to each point,
      the first one if several are equally near, [n]; -1 for padding.
    distances: distance of each point to the nearest selected point, [n]; 0 for padding.
  """

  rows: base.Array
  gains: base.Array
  weights: base.Array
  assignment: base.Array
  distances: base.Array

  @property
  def objective(self) -> base.Array:
    """F(S), scalar."""
    return self.gains.sum()


class _State(NamedTuple):
  nearest: base.Array  # m_i; 0 for padding, whose gain is then 0.
  assignment: base.Array
  rows: base.Array
  gains: base.Array
  leaders: base.Array  # For each selected point, the first one at distance 0 from it.


def lazy_greedy(
  points: distances.Points,
  size: int | base.Array,
  *,
  capacity: int | None = None,
  num_points: int | base.Array | None = None,
  bound: float | base.Array | None = None,
  block: int = 64,
  candidates: int = 16,
) -> Selection:
  """Greedy facility location with lazy evaluation of gains.

  Up to rounding, the selection is the same as if every gain were evaluated at every
  step. Gains never increase from step to step, so that an earlier gain of a point is an
  upper bound on its current gain. Each step re-evaluates the points with the largest
  bounds, a few at a time, until the largest bound is a re-evaluated gain.

  Args:
    points: `distances.vectors` or `distances.outer_products`, all finite.
    size: r, the number of points to select, from 1 to n. It may be traced if `capacity`
      is not None.
    capacity: length of the result, at least `size`; None for `size`. With `capacity`
      and `num_points`, sets of different sizes can share one compiled program.
    num_points: n; all points after the first n are padding, see `distances.vectors`.
      None for all points.
    bound: C, which only changes `gains`; None for twice the largest distance from the
      first selected point, an upper bound by the triangle inequality.
    block: number of gains per block in the first two steps, which evaluate all gains.
    candidates: number of gains that are re-evaluated at a time.

  Returns:
    A `Selection`.

  Raises:
    InputError: a size that is not traced is out of range, `size` is traced and
      `capacity` is None, or `block` or `candidates` is not a positive integer.

  >>> import jax.numpy as jnp
  >>> line = distances.vectors(jnp.array([[0.], [1.], [1.5], [6.], [7.], [20.]]))
  >>> selection = lazy_greedy(line, 3, bound=20.)
  >>> print(selection.rows, selection.gains, selection.weights)
  [2 5 3] [89.5 18.5  9. ] [3. 1. 2.]
  """
  capacity, num_points = _check(points, size, capacity, num_points)
  block = base.check_integer("block", block)
  candidates = base.check_integer("candidates", candidates)
  return _lazy_greedy(points, size, num_points, bound, capacity, block, candidates)


@functools.partial(jax.jit, static_argnames=("capacity", "block", "candidates"))
def _lazy_greedy(points, size, num_points, bound, capacity, block, candidates):
  valid = jnp.arange(points.num_points) < num_points

  def all_gains(contribution):
    totals = _all_totals(points, contribution, num_points, block)
    return jnp.where(valid, totals, -jnp.inf)

  totals = all_gains(lambda d: jnp.where(valid, -d, 0))
  first = _argmax(totals)
  state = _select_first(points, first, totals[first], valid, bound, capacity)
  bounds = all_gains(_improvement(state.nearest)).at[first].set(-jnp.inf)

  def step(number, carry):
    state, bounds = carry
    bounds, best = _best_candidate(points, state.nearest, bounds, candidates)
    state = _select_next(points, state, number, best, bounds[best])
    return state, bounds.at[best].set(-jnp.inf)

  state, _ = jax.lax.fori_loop(1, size, step, (state, bounds))
  return _selection(state, valid)


def _best_candidate(points, nearest, bounds, candidates):
  """Updates bounds until the largest is exact; returns (bounds, index of largest)."""
  candidates = min(candidates, points.num_points)
  contribution = _improvement(nearest)

  def is_undecided(carry):
    bounds, is_exact = carry
    return ~is_exact[_argmax(bounds)]

  def evaluate(carry):
    bounds, is_exact = carry
    largest, rows = jax.lax.top_k(jnp.where(is_exact, -jnp.inf, bounds), candidates)
    gains = _totals(points, rows, contribution)
    # Selected points and padding keep their bound of -inf.
    gains = jnp.where(jnp.isfinite(largest), gains, bounds[rows])
    return bounds.at[rows].set(gains), is_exact.at[rows].set(True)

  is_exact = jnp.zeros(bounds.shape, bool)
  bounds, _ = jax.lax.while_loop(is_undecided, evaluate, (bounds, is_exact))
  return bounds, _argmax(bounds)


def sample_size(num_points: int, size: int, epsilon: float) -> int:
  """Number of candidates per step of `stochastic_greedy`: ceil(n / r ln(1 / epsilon)).

  Raises:
    InputError: `size` is not a positive integer, or `epsilon` is not between 0 and 1.

  >>> sample_size(60000, 6000, 0.01)
  47
  """
  size = base.check_integer("size", size)
  if not 0 < epsilon < 1:
    raise base.InputError(f"epsilon={epsilon} must lie between 0 and 1.")
  return max(1, math.ceil(num_points / size * math.log(1 / float(epsilon))))


def stochastic_greedy(
  key: base.Array,
  points: distances.Points,
  size: int | base.Array,
  *,
  num_candidates: int,
  capacity: int | None = None,
  num_points: int | base.Array | None = None,
  bound: float | base.Array | None = None,
) -> Selection:
  """Greedy facility location among a few random candidates per step.

  With `sample_size(n, r, epsilon)` candidates, F reaches at least 1 - 1/e - epsilon of
  the largest F in expectation. Candidates are drawn with replacement from the points
  that are not selected yet, and evaluated in blocks. Ties go to the lowest index.

  Args:
    key: a typed PRNG key.
    points: see `lazy_greedy`.
    size: see `lazy_greedy`.
    num_candidates: number of candidates at each step.
    capacity: see `lazy_greedy`.
    num_points: see `lazy_greedy`.
    bound: see `lazy_greedy`.

  Returns:
    A `Selection`.

  Raises:
    InputError: see `lazy_greedy`, or `num_candidates` is not a positive integer.
  """
  capacity, num_points = _check(points, size, capacity, num_points)
  num_candidates = base.check_integer("num_candidates", num_candidates)
  return _stochastic_greedy(
    key, points, size, num_points, bound, capacity, num_candidates
  )


@functools.partial(jax.jit, static_argnames=("capacity", "num_candidates"))
def _stochastic_greedy(key, points, size, num_points, bound, capacity, num_candidates):
  valid = jnp.arange(points.num_points) < num_points

  def draw(number, remaining, contribution):
    step_key = jax.random.fold_in(key, number)
    places = jax.random.randint(step_key, (num_candidates,), 0, num_points - number)
    rows = remaining[places]
    gains = _blocked_totals(points, rows, contribution)
    row = jnp.min(jnp.where(gains == gains.max(), rows, points.num_points))
    place = places[jnp.argmax(rows == row)]
    last = remaining[num_points - number - 1]
    return remaining.at[place].set(last), row, gains.max()

  def step(number, carry):
    state, remaining = carry
    remaining, row, gain = draw(number, remaining, _improvement(state.nearest))
    return _select_next(points, state, number, row, gain), remaining

  remaining, first, total = draw(
    0, jnp.arange(points.num_points), lambda d: jnp.where(valid, -d, 0)
  )
  state = _select_first(points, first, total, valid, bound, capacity)
  state, _ = jax.lax.fori_loop(1, size, step, (state, remaining))
  return _selection(state, valid)


def _check(points, size, capacity, num_points):
  """Checks the sizes that are not traced; returns (capacity, num_points)."""
  num_points = points.num_points if num_points is None else num_points
  is_traced = isinstance(size, jax.core.Tracer)
  if capacity is None:
    if is_traced:
      raise base.InputError(
        "capacity=None, but size is traced: pass capacity=, the largest possible size."
      )
    capacity = size
  if not is_traced:
    base.check_integer("size", size)
  capacity = base.check_integer("capacity", capacity)
  is_known = not isinstance(num_points, jax.core.Tracer)
  if is_known and not is_traced and size > num_points:
    raise base.InputError(
      f"cannot choose size={size} of {num_points} points; lower size."
    )
  if is_known and num_points > points.num_points:
    raise base.InputError(
      f"num_points={num_points}, but there are {points.num_points} points."
    )
  if not is_traced and capacity < size:
    raise base.InputError(f"capacity={capacity} must be at least size={size}.")
  return capacity, num_points


def _improvement(nearest: base.Array) -> Callable[[base.Array], base.Array]:
  """Returns `d [K, n] -> max(0, m - d)`, the terms of the gains."""
  return lambda d: jnp.maximum(nearest[None, :] - d, 0)


def _totals(points, rows, contribution):
  """Sum over all points i of contribution(d_ij), for j in rows [K]; [K]."""
  values = contribution(points.distances(rows))
  # Use a matrix product, because XLA:CPU does not vectorize sums over the last axis.
  return jnp.dot(
    values, jnp.ones(values.shape[1], values.dtype), precision=distances.EXACT
  )


def _blocked_totals(points, rows, contribution, block=64):
  """`_totals` of any number of rows, one block at a time."""
  if rows.size <= block:
    return _totals(points, rows, contribution)
  # The last block is filled with repeated rows.
  blocks = jnp.resize(rows, (-(-rows.size // block), block))
  totals = jax.lax.map(lambda block: _totals(points, block, contribution), blocks)
  return totals.ravel()[: rows.size]


def _all_totals(points, contribution, num_points, block):
  """`_totals` of all points, one block at a time; arbitrary values for padding."""
  size = points.num_points
  block = min(block, size)
  padded_size = -(-size // block) * block

  def fill(number, totals):
    rows = number * block + jnp.arange(block)
    values = _totals(points, jnp.minimum(rows, size - 1), contribution)
    return jax.lax.dynamic_update_slice(totals, values, (number * block,))

  dtype = jax.eval_shape(points.distances, jnp.zeros(1, jnp.int32)).dtype
  num_blocks = (num_points + block - 1) // block
  totals = jax.lax.fori_loop(0, num_blocks, fill, jnp.zeros(padded_size, dtype))
  return totals[:size]


def _argmax(values: base.Array) -> base.Array:
  """The lowest index of the maximum."""
  # On XLA:CPU, `jnp.argmax` takes twice as long for 600,000 values.
  index = jnp.arange(values.size)
  return jnp.min(jnp.where(values == values.max(), index, values.size))


def _select_first(points, row, total, valid, bound, capacity):
  """The state after the selection of the first point."""
  distances = jnp.where(valid, points.distances(row[None])[0], 0)
  if bound is None:
    bound = 2 * distances.max()
  first_gain = valid.sum().astype(distances.dtype) * bound + total
  return _State(
    nearest=distances,
    assignment=jnp.where(valid, 0, -1),
    rows=jnp.full(capacity, -1).at[0].set(row),
    gains=jnp.zeros(capacity, distances.dtype).at[0].set(first_gain),
    leaders=jnp.arange(capacity),
  )


def _select_next(points, state, number, row, gain):
  """The state after the selection of another point."""
  distances = points.distances(row[None])[0]
  is_nearer = distances < state.nearest
  nearest_leader = state.leaders[state.assignment[row]]
  leader = jnp.where(state.nearest[row] == 0, nearest_leader, number)
  return _State(
    nearest=jnp.where(is_nearer, distances, state.nearest),
    assignment=jnp.where(is_nearer, number, state.assignment),
    rows=state.rows.at[number].set(row),
    gains=state.gains.at[number].set(gain),
    leaders=state.leaders.at[number].set(leader),
  )


def _selection(state, valid):
  """The result; selected points that are equal share their cluster sizes."""
  is_selected = state.rows >= 0
  zeros = jnp.zeros(state.rows.size, state.gains.dtype)
  # Sums over the selected points that have the same leader.
  leaders = state.leaders[state.assignment]
  cluster_sizes = zeros.at[leaders].add(valid.astype(zeros.dtype))
  num_equal = zeros.at[state.leaders].add(is_selected.astype(zeros.dtype))
  shared = (cluster_sizes / jnp.maximum(num_equal, 1))[state.leaders]
  weights = jnp.where(is_selected, shared, 0)
  return Selection(state.rows, state.gains, weights, state.assignment, state.nearest)
