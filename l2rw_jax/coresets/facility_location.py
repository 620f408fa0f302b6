"""Floor 1: which few points stand best for all of them, greedily.

Facility location chooses S, |S| = r, of n points so that every point has a chosen one
near,

    F(S) = sum_i max_{j in S} (C - d_ij)    is large, and
    cost(S) = sum_i min_{j in S} d_ij       is small,

with d the unsquared Euclidean distance and C any number that no distance exceeds.
F is monotone and submodular: greedy reaches at least 1 - 1/e of the best F. With m_i
the distance of point i to the nearest chosen one, C while there is none, adding j gains

    gain_j = sum_i max(0, m_i - d_ij).

C has no say in what is chosen: the first gain is n C - sum_i d_ij, largest for the
point that is nearest to all others whatever C, and from then on every m_i is itself a
distance. Ties go to the lowest index. No n x n matrix is ever held: memory grows like
that of a block of candidates, [block, n].

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
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.coresets import distances


class Selection(NamedTuple):
  """Chosen points in the order they were chosen.

  Attributes:
    rows: [capacity]; -1 beyond the size that was asked for.
    gains: what each added to F, [capacity].
    weights: how many points have it for their nearest, [capacity]; they sum to n.
      Chosen points at distance 0 of each other share theirs equally, so that each
      stands for itself at least.
    assignment: which of `rows` (0, 1, ...) is nearest to each point, the earliest
      chosen of equally near ones, [n]; -1 for padding.
    distances: of each point to its nearest, [n].
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
  nearest: base.Array  # m_i, and 0 for padding, which so has nothing to gain
  assignment: base.Array
  rows: base.Array
  gains: base.Array
  leaders: base.Array  # of each chosen point, the earliest at distance 0


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
  """Greedy facility location: what evaluating every gain at every step would choose.

  A gain can only fall from step to step, so the one that a point had when it was last
  looked at bounds it from above. Each step looks again at the candidates of highest
  bounds, some at a time, until none of the others can do better.

  Args:
    points: `distances.vectors` or `distances.outer_products`, all finite.
    size: r, how many to choose; at least 1 and at most n. May be traced, given a
      `capacity`.
    capacity: length of the answer, at least `size`; `size` if None. Together with
      `num_points` it lets sets of different sizes share one compiled program.
    num_points: n; points from there on are padding. All if None.
    bound: C; twice the largest distance from the first choice if None, which is
      enough by the triangle inequality. It shows in `gains` alone.
    block: gains evaluated at a time where all are.
    candidates: gains evaluated again at a time.

  Returns:
    A `Selection`.

  Raises:
    InputError: a size out of range.

  >>> import jax.numpy as jnp
  >>> line = distances.vectors(jnp.array([[0.], [1.], [1.5], [6.], [7.], [20.]]))
  >>> chosen = lazy_greedy(line, 3, bound=20.)
  >>> print(chosen.rows, chosen.gains, chosen.weights)
  [2 5 3] [89.5 18.5  9. ] [3. 1. 2.]
  """
  capacity, num_points = _check(points, size, capacity, num_points)
  return _lazy_greedy(points, size, num_points, bound, capacity, block, candidates)


@functools.partial(jax.jit, static_argnames=("capacity", "block", "candidates"))
def _lazy_greedy(points, size, num_points, bound, capacity, block, candidates):
  valid = jnp.arange(points.num_points) < num_points

  def all_gains(contribution):
    found = _in_blocks(points, contribution, num_points, block)
    return jnp.where(valid, found, -jnp.inf)

  totals = all_gains(lambda d: jnp.where(valid, -d, 0))
  first = _first_of(totals)
  state = _first_choice(points, first, totals[first], valid, bound, capacity)
  bounds = all_gains(_improvement(state.nearest)).at[first].set(-jnp.inf)

  def step(number, carry):
    state, bounds = carry
    bounds, best = _best_candidate(points, state.nearest, bounds, candidates)
    state = _choose(points, state, number, best, bounds[best])
    return state, bounds.at[best].set(-jnp.inf)

  state, _ = jax.lax.fori_loop(1, size, step, (state, bounds))
  return _selection(state, valid)


def _best_candidate(points, nearest, bounds, candidates):
  """Bounds, tightened as far as needed, and the candidate of the largest gain."""
  candidates = min(candidates, points.num_points)
  contribution = _improvement(nearest)

  def undecided(carry):
    bounds, fresh = carry
    return ~fresh[_first_of(bounds)]

  def look_again(carry):
    bounds, fresh = carry
    highest, rows = jax.lax.top_k(jnp.where(fresh, -jnp.inf, bounds), candidates)
    found = _totals(points, rows, contribution)
    # Those already chosen and padding are at the bottom, and stay there.
    found = jnp.where(jnp.isfinite(highest), found, bounds[rows])
    return bounds.at[rows].set(found), fresh.at[rows].set(True)

  fresh = jnp.zeros(bounds.shape, bool)
  bounds, _ = jax.lax.while_loop(undecided, look_again, (bounds, fresh))
  return bounds, _first_of(bounds)


def sample_size(num_points: int, size: int, epsilon: float) -> int:
  """Candidates a step of `stochastic_greedy`: ceil(n / r ln(1 / epsilon)).

  >>> sample_size(60000, 6000, 0.01)
  47
  """
  return max(1, math.ceil(num_points / size * math.log(1 / epsilon)))


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
  """Greedy that looks at a few random candidates a step, not at all.

  With `sample_size(n, r, epsilon)` candidates F reaches at least 1 - 1/e - epsilon of
  the best in expectation. They are drawn with replacement from the points not chosen
  yet, and looked at in blocks. Among equal gains the lowest index wins.

  Args:
    key: a typed PRNG key.
    points: `distances.vectors` or `distances.outer_products`.
    size: as in `lazy_greedy`.
    num_candidates: evaluated at each step.
    capacity: as in `lazy_greedy`.
    num_points: as in `lazy_greedy`.
    bound: as in `lazy_greedy`.

  Returns:
    A `Selection`.

  Raises:
    InputError: a size out of range.
  """
  capacity, num_points = _check(points, size, capacity, num_points)
  if num_candidates < 1:
    raise base.InputError(f"num_candidates={num_candidates} must be at least 1.")
  return _stochastic_greedy(
    key, points, size, num_points, bound, capacity, num_candidates
  )


@functools.partial(jax.jit, static_argnames=("capacity", "num_candidates"))
def _stochastic_greedy(key, points, size, num_points, bound, capacity, num_candidates):
  valid = jnp.arange(points.num_points) < num_points

  def draw(number, remaining, contribution):
    own = jax.random.fold_in(key, number)
    places = jax.random.randint(own, (num_candidates,), 0, num_points - number)
    rows = remaining[places]
    gains = _totals_of_many(points, rows, contribution)
    row = jnp.min(jnp.where(gains == gains.max(), rows, points.num_points))
    place = places[jnp.argmax(rows == row)]
    last = remaining[num_points - number - 1]
    return remaining.at[place].set(last), row, gains.max()

  def step(number, carry):
    state, remaining = carry
    remaining, row, gain = draw(number, remaining, _improvement(state.nearest))
    return _choose(points, state, number, row, gain), remaining

  remaining, first, total = draw(
    0, jnp.arange(points.num_points), lambda d: jnp.where(valid, -d, 0)
  )
  state = _first_choice(points, first, total, valid, bound, capacity)
  state, _ = jax.lax.fori_loop(1, size, step, (state, remaining))
  return _selection(state, valid)


def _check(points, size, capacity, num_points):
  """`(capacity, num_points)` once they are seen to fit."""
  whole = points.num_points
  num_points = whole if num_points is None else num_points
  if capacity is None:
    capacity = size
  known = [x for x in (size, capacity) if isinstance(x, numbers.Integral)]
  if isinstance(num_points, numbers.Integral) and (
    known and max(known[0], 1) > num_points
  ):
    raise base.InputError(
      f"cannot choose size={size} of {num_points} points; lower it."
    )
  if len(known) == 2 and capacity < size:
    raise base.InputError(f"capacity={capacity} must be at least size={size}.")
  if any(x < 1 for x in known):
    raise base.InputError(f"size={size} must be at least 1.")
  return int(capacity), num_points


def _improvement(nearest: base.Array) -> Callable[[base.Array], base.Array]:
  return lambda away: jnp.maximum(nearest[None, :] - away, 0)


def _totals(points, rows, contribution):
  """Sum over all points i of contribution(d_ij), for j in rows [K]; [K]."""
  values = contribution(points.distances(rows))
  # As a matrix product: XLA:CPU does not vectorize sums over the last axis.
  return jnp.dot(
    values, jnp.ones(values.shape[1], values.dtype), precision=distances.EXACT
  )


def _totals_of_many(points, rows, contribution, block=64):
  """`_totals` of any number of rows, so many at a time."""
  if rows.size <= block:
    return _totals(points, rows, contribution)
  # Repeated rows fill the last block.
  blocks = jnp.resize(rows, (-(-rows.size // block), block))
  found = jax.lax.map(lambda own: _totals(points, own, contribution), blocks)
  return found.ravel()[: rows.size]


def _in_blocks(points, contribution, num_points, block):
  """`_totals` of all points, a block at a time; what is beyond num_points is unset."""
  whole = points.num_points
  block = min(block, whole)
  padded = -(-whole // block) * block

  def fill(number, found):
    rows = number * block + jnp.arange(block)
    values = _totals(points, jnp.minimum(rows, whole - 1), contribution)
    return jax.lax.dynamic_update_slice(found, values, (number * block,))

  dtype = jax.eval_shape(points.distances, jnp.zeros(1, jnp.int32)).dtype
  num_blocks = (num_points + block - 1) // block
  found = jax.lax.fori_loop(0, num_blocks, fill, jnp.zeros(padded, dtype))
  return found[:whole]


def _first_of(values: base.Array) -> base.Array:
  """argmax, the lowest index of equals; XLA:CPU's own takes ten times as long."""
  index = jnp.arange(values.size)
  return jnp.min(jnp.where(values == values.max(), index, values.size))


def _first_choice(points, row, total, valid, bound, capacity):
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


def _choose(points, state, number, row, gain):
  distances = points.distances(row[None])[0]
  nearer = distances < state.nearest
  equal = state.leaders[state.assignment[row]]
  leader = jnp.where(state.nearest[row] == 0, equal, number)
  return _State(
    nearest=jnp.where(nearer, distances, state.nearest),
    assignment=jnp.where(nearer, number, state.assignment),
    rows=state.rows.at[number].set(row),
    gains=state.gains.at[number].set(gain),
    leaders=state.leaders.at[number].set(leader),
  )


def _selection(state, valid):
  none = jnp.zeros(state.rows.size, state.gains.dtype)
  # Of all points that are equal to the leader, or have it for their nearest.
  leaders = state.leaders[state.assignment]
  totals = none.at[leaders].add(valid.astype(none.dtype))
  shares = none.at[state.leaders].add((state.rows >= 0).astype(none.dtype))
  weights = jnp.where(
    state.rows >= 0, (totals / jnp.maximum(shares, 1))[state.leaders], 0
  )
  return Selection(state.rows, state.gains, weights, state.assignment, state.nearest)
