"""Label noise: shares of wrong labels, transition matrices, invalid arguments."""

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import label_noise

BUILDERS = (label_noise.uniform_flip, label_noise.background_flip)


@st.composite
def problems(draw):
  num_classes = draw(st.integers(2, 6))
  labels = draw(st.lists(st.integers(0, num_classes - 1), max_size=60))
  fraction = draw(st.floats(0, 1))
  seed = draw(st.integers(0, 2**32 - 1))
  dtype = draw(st.sampled_from([np.int32, np.int64, np.uint8]))
  return np.array(labels, dtype), num_classes, fraction, seed


def balanced(num_classes, each):
  return np.repeat(np.arange(num_classes), each)


@hypothesis.given(problems())
def test_uniform_paper_flips_exactly_the_fraction(problem):
  labels, num_classes, fraction, seed = problem
  before = labels.copy()
  noisy = label_noise.uniform_flip(
    labels,
    fraction=fraction,
    num_classes=num_classes,
    rng=np.random.default_rng(seed),
  )
  np.testing.assert_array_equal(labels, before)
  assert noisy.dtype == np.int32
  assert noisy.shape == labels.shape
  assert np.all((noisy >= 0) & (noisy < num_classes))
  assert np.sum(noisy != labels) == round(fraction * len(labels))


@hypothesis.given(problems())
def test_uniform_official_flips_at_most_the_fraction_and_never_to_the_last(problem):
  labels, num_classes, fraction, seed = problem
  noisy = label_noise.uniform_flip(
    labels,
    fraction=fraction,
    num_classes=num_classes,
    rng=np.random.default_rng(seed),
    variant="official_code",
  )
  changed = noisy != labels
  assert np.sum(changed) <= round(fraction * len(labels))
  assert np.all((noisy[changed] >= 0) & (noisy[changed] < num_classes - 1))


@hypothesis.given(problems(), st.sampled_from(label_noise.VARIANTS), st.booleans())
def test_background_flips_to_one_class(problem, variant, has_background):
  labels, num_classes, fraction, seed = problem
  noisy = label_noise.background_flip(
    labels,
    fraction=fraction,
    num_classes=num_classes,
    rng=np.random.default_rng(seed),
    background=1 if has_background else None,
    variant=variant,
  )
  changed = noisy != labels
  targets = set(noisy[changed].tolist())
  assert len(targets) <= 1
  assert not has_background or targets <= {1}
  chosen = round(fraction * len(labels))
  assert np.sum(changed) <= chosen
  if targets:
    already = np.sum(labels == targets.pop())
    assert np.sum(changed) >= chosen - already


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("variant", label_noise.VARIANTS)
def test_labels_depend_on_the_seed(builder, variant):
  labels = balanced(10, 50)

  def noisy(seed):
    return builder(
      labels,
      fraction=0.4,
      num_classes=10,
      rng=np.random.default_rng(seed),
      variant=variant,
    )

  np.testing.assert_array_equal(noisy(3), noisy(3))
  assert np.any(noisy(3) != noisy(4))


@pytest.mark.parametrize(
  ("num_classes", "variant", "wrong"),
  [
    (10, "paper", 0.4),
    (100, "paper", 0.4),
    (10, "official_code", 0.36),
    (100, "official_code", 0.396),
  ],
)
def test_uniform_share_of_wrong_labels(num_classes, variant, wrong):
  labels = balanced(num_classes, 100_000 // num_classes)
  noisy = label_noise.uniform_flip(
    labels,
    fraction=0.4,
    num_classes=num_classes,
    rng=np.random.default_rng(0),
    variant=variant,
  )
  # The share of "paper" is exact. In "official_code", a flip may keep the label, and so
  # the share is random: 0.002 is more than three standard deviations.
  assert abs(np.mean(noisy != labels) - wrong) < 0.002


def test_uniform_official_share_for_unbalanced_labels():
  labels = np.repeat([0, 1, 2], [10_000, 20_000, 70_000])
  noisy = label_noise.uniform_flip(
    labels,
    fraction=0.5,
    num_classes=3,
    rng=np.random.default_rng(0),
    variant="official_code",
  )
  documented = 0.5 * (1 - (1 - 0.7) / (3 - 1))
  assert abs(np.mean(noisy != labels) - documented) < 0.005


def test_uniform_paper_flips_to_all_other_classes_equally():
  labels = np.full(90_000, 3)
  noisy = label_noise.uniform_flip(
    labels, fraction=1.0, num_classes=10, rng=np.random.default_rng(0)
  )
  counts = np.bincount(noisy, minlength=10)
  assert counts[3] == 0
  assert np.all(np.abs(np.delete(counts, 3) - 10_000) < 5 * 100)


@pytest.mark.parametrize("variant", label_noise.VARIANTS)
def test_background_share_of_wrong_labels(variant):
  labels = balanced(10, 10_000)
  noisy = label_noise.background_flip(
    labels,
    fraction=0.4,
    num_classes=10,
    rng=np.random.default_rng(0),
    variant=variant,
  )
  assert abs(np.mean(noisy != labels) - 0.36) < 0.003


@pytest.mark.parametrize(
  ("variant", "reachable"), [("paper", {0, 1, 2}), ("official_code", {0, 1})]
)
def test_possible_background_classes(variant, reachable):
  drawn = {
    label_noise.draw_background(3, rng=np.random.default_rng(seed), variant=variant)
    for seed in range(60)
  }
  assert drawn == reachable


@pytest.mark.parametrize("builder", BUILDERS)
def test_official_code_with_two_classes_gives_the_first(builder):
  noisy = builder(
    [1, 1, 0],
    fraction=1.0,
    num_classes=2,
    rng=np.random.default_rng(0),
    variant="official_code",
  )
  np.testing.assert_array_equal(noisy, [0, 0, 0])


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fraction": 1.5}, r"fraction must lie in \[0, 1\].*got 1.5"),
    ({"fraction": -0.1}, r"fraction must lie in \[0, 1\].*got -0.1"),
    ({"fraction": float("nan")}, r"fraction must lie in \[0, 1\].*got nan"),
    ({"labels": [0, 3, 1]}, r"labels must lie in 0 .. 2.*is 3 at index 1"),
    ({"labels": [0, 1, -1]}, r"labels must lie in 0 .. 2.*is -1 at index 2"),
    ({"labels": [0.0, 1.0]}, r"labels must be integers of shape \[N\]; got float64"),
    ({"labels": [[0, 1]]}, r"labels must be integers of shape \[N\].*\(1, 2\)"),
    ({"variant": "peper"}, r"variant must be one of .*got 'peper'"),
    (
      {"labels": [0], "num_classes": 1},
      r"num_classes=1 must be an integer of at least 2",
    ),
  ],
)
def test_invalid_arguments_raise(builder, changes, message):
  arguments = {
    "labels": [0, 1, 2],
    "fraction": 0.5,
    "num_classes": 3,
    "rng": np.random.default_rng(0),
    **changes,
  }
  with pytest.raises(base.InputError, match=message) as error:
    builder(arguments.pop("labels"), **arguments)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("background", [-1, 3, 1.5])
def test_background_out_of_range_raises(background):
  with pytest.raises(base.InputError, match="background must be a class from 0 to 2"):
    label_noise.background_flip(
      [0, 1, 2],
      fraction=0.5,
      num_classes=3,
      rng=np.random.default_rng(0),
      background=background,
    )


def test_matrices_by_hand():
  np.testing.assert_allclose(
    label_noise.symmetric_matrix(4, 0.6),
    [
      [0.4, 0.2, 0.2, 0.2],
      [0.2, 0.4, 0.2, 0.2],
      [0.2, 0.2, 0.4, 0.2],
      [0.2, 0.2, 0.2, 0.4],
    ],
  )
  np.testing.assert_allclose(
    label_noise.uniform_matrix(4, 0.6),
    [
      [0.55, 0.15, 0.15, 0.15],
      [0.15, 0.55, 0.15, 0.15],
      [0.15, 0.15, 0.55, 0.15],
      [0.15, 0.15, 0.15, 0.55],
    ],
  )
  np.testing.assert_allclose(
    label_noise.pair_matrix(4, 0.3, {3: 0, 1: 2, 2: 1}),
    [[1, 0, 0, 0], [0, 0.7, 0.3, 0], [0, 0.3, 0.7, 0], [0.3, 0, 0, 0.7]],
  )


@pytest.mark.parametrize("num_targets", [1, 2])
def test_flip_matrix_draws_all_other_classes(num_targets):
  counts = np.zeros((5, 5))
  for seed in range(40):
    rng = np.random.default_rng(seed)
    matrix = label_noise.flip_matrix(5, 0.4, num_targets=num_targets, rng=rng)
    np.testing.assert_allclose(np.diag(matrix), 0.6)
    off_diagonal = matrix - np.diag(np.diag(matrix))
    np.testing.assert_allclose(
      np.sort(off_diagonal, 1),
      np.tile([0.0] * (5 - num_targets) + [0.4 / num_targets] * num_targets, (5, 1)),
    )
    counts += off_diagonal > 0
  # With enough seeds, each class flips to every other class.
  assert np.all(counts[~np.eye(5, dtype=bool)] > 40 * num_targets / 4 / 4)


@pytest.mark.parametrize(
  ("matrix", "wrong"),
  [
    (label_noise.symmetric_matrix(10, 0.4), 0.4),
    (label_noise.uniform_matrix(10, 0.4), 0.36),
    (label_noise.uniform_matrix(100, 0.6), 0.594),
    (label_noise.pair_matrix(10, 0.4, {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}), 0.2),
    (
      label_noise.flip_matrix(10, 0.4, num_targets=2, rng=np.random.default_rng(0)),
      0.4,
    ),
  ],
)
def test_resample_follows_the_matrix(matrix, wrong):
  labels = balanced(len(matrix), 100_000 // len(matrix))
  before = labels.copy()
  noisy = label_noise.resample(labels, matrix, rng=np.random.default_rng(0))
  np.testing.assert_array_equal(labels, before)
  assert noisy.dtype == np.int32
  # A share of 100,000 labels has a standard deviation of at most 0.0016.
  assert abs(np.mean(noisy != labels) - wrong) < 0.006
  estimate = np.zeros_like(matrix)
  np.add.at(estimate, (labels, noisy), len(matrix) / 100_000)
  assert not estimate[matrix == 0].any()
  each = 100_000 // len(matrix)
  np.testing.assert_allclose(estimate, matrix, atol=5 * np.sqrt(0.25 / each))


def test_resample_draws_examples_independently():
  matrix = label_noise.symmetric_matrix(2, 0.5)
  noisy = label_noise.resample(
    np.zeros(40_000, int), matrix, rng=np.random.default_rng(0)
  )
  pairs = np.bincount(2 * noisy[::2] + noisy[1::2], minlength=4) / 20_000
  np.testing.assert_allclose(pairs, 0.25, atol=0.016)


def test_resample_accepts_rows_that_are_rounded():
  matrix = label_noise.symmetric_matrix(10, 0.4).astype(np.float32)
  noisy = label_noise.resample(balanced(10, 5), matrix, rng=np.random.default_rng(0))
  exact = label_noise.symmetric_matrix(10, 0.4)
  expected = label_noise.resample(balanced(10, 5), exact, rng=np.random.default_rng(0))
  np.testing.assert_array_equal(noisy, expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32, jnp.float32, jnp.bfloat16])
def test_a_rate_of_any_type_gives_a_matrix_in_float64(kind):
  # A matrix in half precision has rows that do not sum to 1, and a JAX array cannot be
  # changed in place.
  rate, rng = kind(0.4), np.random.default_rng
  for make in (
    label_noise.symmetric_matrix,
    label_noise.uniform_matrix,
    lambda classes, rate: label_noise.pair_matrix(classes, rate, {1: 2}),
    lambda classes, rate: label_noise.flip_matrix(
      classes, rate, num_targets=2, rng=rng(0)
    ),
  ):
    matrix = make(10, rate)
    assert isinstance(matrix, np.ndarray) and matrix.dtype == np.float64
    np.testing.assert_array_equal(matrix, make(10, float(rate)))
    label_noise.resample(np.arange(10), matrix, rng=rng(0))


def test_a_fraction_may_be_in_half_precision():
  # In half precision, 0.5 * 200,001 is infinite.
  noisy = label_noise.uniform_flip(
    np.zeros(200_001, int),
    fraction=np.float16(0.5),
    num_classes=2,
    rng=np.random.default_rng(0),
  )
  assert noisy.sum() == 100_000


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: label_noise.symmetric_matrix(1, 0.1),
      "num_classes=1 must be an integer of at least 2",
    ),
    (
      lambda: label_noise.uniform_matrix(2.5, 0.1),
      "num_classes=2.5 must be an integer",
    ),
    (
      lambda: label_noise.flip_matrix(
        3, 0.1, num_targets=1.5, rng=np.random.default_rng(0)
      ),
      "num_targets=1.5 must be an integer",
    ),
    (lambda: label_noise.uniform_matrix(3, 1.1), r"rate must lie in .* got 1.1"),
    (lambda: label_noise.uniform_matrix(3, float("nan")), "rate must lie.*nan"),
    (lambda: label_noise.pair_matrix(3, 0.1, {0: 3}), "from 0 to 2; got 0: 3"),
    (lambda: label_noise.pair_matrix(3, 0.1, {1: 1}), "to another class.*got 1: 1"),
    (
      lambda: label_noise.flip_matrix(
        2, 0.1, num_targets=2, rng=np.random.default_rng(0)
      ),
      "num_targets must be between 1 and num_classes - 1 = 1; got 2",
    ),
    (lambda: _resample([0], [[1.0, 0.0]]), r"shape \[C, C\]; got \(1, 2\)"),
    (lambda: _resample([0], [[1, 0], [0.5, 0.6]]), "sum 1; row 1 is .0.5, 0.6."),
    (lambda: _resample([0], [[1.5, -0.5], [0, 1]]), "non-negative.*row 0"),
    (lambda: _resample([2], np.eye(2)), "labels must lie in 0 .. 1"),
    (
      lambda: _resample([0], np.ma.masked_equal(np.eye(2), 0)),
      "matrix must not be a masked array",
    ),
  ],
)
def test_invalid_matrices_raise(call, message):
  with pytest.raises(base.InputError, match=message) as error:
    call()
  assert "\n" not in str(error.value)


def _resample(labels, matrix):
  return label_noise.resample(labels, matrix, rng=np.random.default_rng(0))


def test_pairs_may_be_whole_numbers_of_any_type():
  expected = label_noise.pair_matrix(3, 0.1, {0: 1})
  pairs = {np.float64(0): np.float32(1)}
  np.testing.assert_array_equal(label_noise.pair_matrix(3, 0.1, pairs), expected)


def test_the_number_of_classes_must_be_an_integer():
  with pytest.raises(base.InputError, match="num_classes=nan must be an integer"):
    label_noise.check_labels("labels", np.array([0, 7]), np.nan)
