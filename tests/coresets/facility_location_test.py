"""Greedy facility location: brute force, bound, ties, padding, memory."""

import itertools
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location

_LINE = np.array([[0.0], [1.0], [1.5], [6.0], [7.0], [20.0]])


def _matrix(points):
  return np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))


def _brute_force(matrix, size, bound):
  """Rows, gains, assignment and distances; each step computes all gains anew."""
  nearest = np.full(len(matrix), bound)
  assignment = np.zeros(len(matrix), int)
  rows, gains = [], []
  for _ in range(size):
    all_gains = np.maximum(nearest - matrix, 0).sum(axis=1)
    all_gains[rows] = -np.inf
    row = int(np.argmax(all_gains))
    nearer = matrix[row] < nearest
    assignment[nearer] = len(rows)
    nearest = np.minimum(nearest, matrix[row])
    rows.append(row)
    gains.append(all_gains[row])
  return np.array(rows), np.array(gains), assignment, nearest


def _shared_weights(matrix, rows, assignment):
  """Cluster sizes, shared equally by selected points at distance 0."""
  sizes = np.bincount(assignment, minlength=len(rows))
  equal = matrix[np.ix_(rows, rows)] == 0
  return equal @ sizes / equal.sum(axis=1)


def _assert_same(selection, points, size, bound, matrix=None, rtol=1e-6):
  matrix = _matrix(points) if matrix is None else matrix
  rows, gains, assignment, nearest = _brute_force(matrix, size, bound)
  np.testing.assert_array_equal(selection.rows, rows)
  np.testing.assert_allclose(selection.gains, gains, rtol, atol=1e-5)
  np.testing.assert_array_equal(selection.assignment, assignment)
  np.testing.assert_allclose(selection.distances, nearest, rtol, atol=1e-6)
  np.testing.assert_allclose(
    selection.weights, _shared_weights(matrix, rows, assignment), rtol=1e-6
  )


def test_points_on_a_line_by_hand():
  selection = facility_location.lazy_greedy(distances.vectors(_LINE), 3, bound=20.0)
  np.testing.assert_array_equal(_LINE[selection.rows, 0], [1.5, 20, 6])
  np.testing.assert_allclose(selection.gains, [89.5, 18.5, 9.0])
  np.testing.assert_array_equal(selection.weights, [3, 1, 2])
  np.testing.assert_allclose(selection.objective, 117.0)
  np.testing.assert_array_equal(selection.assignment, [0, 0, 0, 2, 2, 1])


@pytest.mark.ci
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dims", "candidates"), [(1, 1), (3, 4), (40, 100)])
def test_lazy_greedy_equals_brute_force(dims, candidates):
  points = np.random.default_rng(dims).normal(size=(57, dims))
  selection = facility_location.lazy_greedy(
    distances.vectors(points), 23, bound=50.0, block=10, candidates=candidates
  )
  _assert_same(selection, points, 23, 50.0)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
  st.lists(st.integers(0, 4), min_size=12, max_size=12), st.integers(1, 12)
)
def test_ties_go_to_the_lowest_index(values, size):
  # With integers, every sum is exact, and many points and gains are equal.
  points = np.array(values, float)[:, None]
  selection = _lazy_greedy_of_12(points, size)
  selection = selection._replace(
    **{k: getattr(selection, k)[:size] for k in ("rows", "gains", "weights")}
  )
  _assert_same(selection, points, size, 10.0)


def _lazy_greedy_of_12(points, size):
  """Selects `size` of 12 points, in one program for all sizes."""
  return facility_location.lazy_greedy(
    distances.vectors(points), size, capacity=12, bound=10.0, block=5, candidates=3
  )


def test_ties_on_an_integer_grid():
  # The points form 3-4-5 triangles, so that all distances are integers.
  points = np.array(list(itertools.product([0.0, 3.0], [0.0, 4.0])) * 3)
  selection = facility_location.lazy_greedy(
    distances.vectors(points), 12, bound=10.0, candidates=2
  )
  _assert_same(selection, points, 12, 10.0)
  # Every place is selected once before any place is selected twice.
  assert selection.rows[:4].tolist() == [0, 1, 2, 3]


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.integers(0, 10_000), st.integers(1, 12))
def test_greedy_reaches_a_share_of_1_minus_1_over_e_of_the_best(seed, size):
  rng = np.random.default_rng(seed)
  points = rng.normal(size=(12, 2)) * rng.exponential(size=(12, 1))
  matrix = _matrix(points)
  bound = matrix.max()
  selection = _lazy_greedy_of_12(points, size)
  value = (bound - matrix[:, selection.rows[:size]].min(axis=1)).sum()
  best = max(
    (bound - matrix[:, list(subset)].min(axis=1)).sum()
    for subset in itertools.combinations(range(12), size)
  )
  assert value >= (1 - 1 / math.e) * best - 1e-9
  np.testing.assert_allclose(
    selection.objective, 12 * 10.0 - selection.distances.sum(), rtol=1e-5
  )


@pytest.mark.parametrize("bound", [None, 4.0, 400.0])
def test_the_bound_does_not_change_the_selection(bound):
  points = np.random.default_rng(0).uniform(size=(40, 2))
  selection = facility_location.lazy_greedy(distances.vectors(points), 10, bound=bound)
  expected = _brute_force(_matrix(points), 10, np.sqrt(2))
  np.testing.assert_array_equal(selection.rows, expected[0])
  np.testing.assert_allclose(selection.gains[1:], expected[1][1:], rtol=1e-4)
  assert bound is not None or selection.gains[0] >= 0


@pytest.mark.slow("stochastic")
@pytest.mark.parametrize("algorithm", ["lazy", "stochastic"])
def test_all_points_one_point_and_equal_points(algorithm):
  def choose(points, size):
    points = distances.vectors(np.asarray(points))
    if algorithm == "lazy":
      return facility_location.lazy_greedy(points, size)
    return facility_location.stochastic_greedy(
      jax.random.key(0), points, size, num_candidates=2
    )

  everything = choose(_LINE, 6)
  assert sorted(everything.rows.tolist()) == list(range(6))
  np.testing.assert_array_equal(everything.weights, np.ones(6))
  np.testing.assert_array_equal(everything.distances, np.zeros(6))
  alone = choose([[3.0, 4.0]], 1)
  assert (alone.rows[0], alone.weights[0]) == (0, 1)
  equal = choose(np.ones((5, 2)), 3)
  assert len(set(equal.rows.tolist())) == 3
  np.testing.assert_allclose(equal.weights, 5 / 3, rtol=1e-6)
  assert np.isfinite(equal.gains).all()


def test_extreme_scales_give_finite_gains():
  rng = np.random.default_rng(0)
  for scale in (1e-15, 1e15):
    points = (scale * rng.normal(size=(30, 3))).astype(np.float32)
    selection = facility_location.lazy_greedy(distances.vectors(points), 7)
    assert np.isfinite(selection.gains).all()
    rows = _brute_force(_matrix(points.astype(float)), 7, 10 * scale)[0]
    np.testing.assert_array_equal(selection.rows, rows)


@pytest.mark.ci
def test_padding_does_not_change_the_selection_and_sizes_share_a_program():
  points = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  padding = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
  before = facility_location._lazy_greedy._cache_size()
  for num_points, size in ((50, 11), (37, 5), (37, 1)):
    alone = facility_location.lazy_greedy(distances.vectors(points[:num_points]), size)
    padded = np.concatenate([points[:num_points], padding[num_points:]])
    selection = facility_location.lazy_greedy(
      distances.vectors(padded), size, capacity=16, num_points=num_points
    )
    np.testing.assert_array_equal(selection.rows[:size], alone.rows)
    np.testing.assert_array_equal(selection.rows[size:], -1)
    np.testing.assert_array_equal(selection.weights[:size], alone.weights)
    assert selection.weights.sum() == num_points
    np.testing.assert_array_equal(selection.assignment[num_points:], -1)
    np.testing.assert_allclose(selection.gains[:size], alone.gains, rtol=1e-4)
  # The three padded sets share one program; without padding there is one for each.
  assert facility_location._lazy_greedy._cache_size() == before + 3 + 1


@pytest.mark.slow
def test_stochastic_greedy_improves_with_more_candidates():
  points = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
  exact = facility_location.lazy_greedy(distances.vectors(points), 30, bound=20.0)

  def mean_value(epsilon):
    count = facility_location.sample_size(300, 30, epsilon)
    run = jax.vmap(
      lambda key: facility_location.stochastic_greedy(
        key, distances.vectors(points), 30, num_candidates=count, bound=20.0
      )
    )
    selection = run(jax.random.split(jax.random.key(0), 8))
    for rows in np.asarray(selection.rows):
      assert len(set(rows.tolist())) == 30
    np.testing.assert_array_equal(selection.weights.sum(axis=1), 300)
    return selection.gains.sum(axis=1).mean()

  values = [mean_value(epsilon) for epsilon in (0.5, 0.01)]
  assert values[0] < values[1]
  assert exact.objective * 0.995 < values[1] < exact.objective * 1.001


@pytest.mark.usefixtures("x64")
def test_stochastic_greedy_with_every_candidate_is_greedy():
  points = np.random.default_rng(1).normal(size=(20, 2))
  selection = facility_location.stochastic_greedy(
    jax.random.key(0), distances.vectors(points), 20, num_candidates=2000, bound=20.0
  )
  _assert_same(selection, points, 20, 20.0)


def test_sample_size_by_hand():
  assert facility_location.sample_size(1000, 100, 0.1) == 24  # 10 ln 10 = 23.03
  assert facility_location.sample_size(10, 10, 0.99) == 1


def _temporary_bytes(num_points):
  points = distances.vectors(jnp.zeros((num_points, 10)))
  lowered = facility_location._lazy_greedy.lower(
    points, 64, num_points, None, capacity=64, block=64, candidates=16
  )
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_linear_in_the_number_of_points():
  small, large = (_temporary_bytes(n) for n in (2000, 16000))
  assert large <= 8.5 * small
  assert large < 16000**2 * 4 / 100


@pytest.mark.slow
def test_many_candidates_are_evaluated_in_blocks():
  points = distances.vectors(jnp.ones((4000, 10)))
  compiled = facility_location._stochastic_greedy.lower(
    jax.random.key(0), points, 2, 4000, None, capacity=2, num_candidates=4000
  ).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4000**2 * 4 / 10
  rng = np.random.default_rng(0)
  few = distances.vectors(jnp.asarray(rng.normal(size=(90, 3)), jnp.float32))
  chosen = facility_location.stochastic_greedy(
    jax.random.key(0), few, 3, num_candidates=10_000
  )
  assert len(set(np.asarray(chosen.rows).tolist())) == 3


_INVALID = {
  "size=7 of 6 points; lower size": {"size": 7},
  "size=0 must be an integer of at least 1": {"size": 0},
  "capacity=2 must be at least size=3": {"size": 3, "capacity": 2},
  "size=8 of 6 points; lower size": {"size": np.int64(8)},
}


@pytest.mark.parametrize("message", _INVALID)
def test_sizes_out_of_range_are_refused(message):
  points = distances.vectors(_LINE)
  with pytest.raises(base.InputError, match=message):
    facility_location.lazy_greedy(points, **_INVALID[message])
  with pytest.raises(base.InputError, match=message):
    facility_location.stochastic_greedy(
      jax.random.key(0), points, num_candidates=3, **_INVALID[message]
    )


def test_a_traced_size_needs_only_a_capacity():
  points = distances.vectors(_LINE)
  expected = facility_location.lazy_greedy(points, 3, capacity=8).rows
  choose = jax.jit(lambda s: facility_location.lazy_greedy(points, s, capacity=8).rows)
  np.testing.assert_array_equal(choose(3), expected)
  with pytest.raises(base.InputError, match="size is traced: pass capacity="):
    jax.jit(lambda s: facility_location.lazy_greedy(points, s).rows)(3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": jnp.array(8), "capacity": 8}, "cannot choose size=8 of 6 points"),
    ({"size": 2, "num_points": 10}, "num_points=10, but there are 6"),
    ({"size": 2, "block": 0}, "block=0 must be an integer of at least 1"),
  ],
)
def test_invalid_options_are_refused(options, message):
  points = distances.vectors(jnp.arange(6.0)[:, None])
  with pytest.raises(base.InputError, match=message):
    facility_location.lazy_greedy(points, **options)
  with pytest.raises(base.InputError, match="size=0 must be an integer of at least 1"):
    facility_location.sample_size(10, 0, 0.1)
