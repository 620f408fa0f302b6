"""Selection of a subset class by class: budgets, weights, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location

_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


def _proxies():
  """Gradients of a cross-entropy at the logits, float32 [60, 4]."""
  logits = np.random.default_rng(0).normal(size=(60, 4))
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  return (p - np.eye(4)[_LABELS]).astype(np.float32)


@pytest.mark.parametrize("budget", coresets.BUDGETS)
@pytest.mark.parametrize("size", [4, 7, 30, 57, 60])
def test_budgets_have_the_size_and_include_every_class(budget, size):
  counts = [30, 18, 9, 3]
  budgets = coresets.class_budgets(counts, size, budget)
  assert budgets.sum() == size
  assert (budgets >= 1).all() and (budgets <= counts).all()
  assert (np.diff(budgets) <= 0).all()


def test_budgets_by_hand():
  np.testing.assert_array_equal(coresets.class_budgets([60, 0, 40], 10), [6, 0, 4])
  # Shares of 97%, 1%, 1% and 1%: the large class gives one row to each rare class.
  np.testing.assert_array_equal(coresets.class_budgets([97, 1, 1, 1], 5), [2, 1, 1, 1])
  budgets = coresets.class_budgets([50, 30, 2], 12, "equal")
  np.testing.assert_array_equal(budgets, [5, 5, 2])


@pytest.mark.slow("lazy")
@pytest.mark.parametrize("greedy", coresets.GREEDY)
def test_selection_is_greedy_in_each_class_and_its_weights_sum_to_n(greedy):
  proxies = _proxies()
  coreset = coresets.select(
    proxies, _LABELS, 12, greedy=greedy, epsilon=1e-9, key=jax.random.key(0)
  )
  assert coreset.weights.sum() == 60
  assert (np.diff(coreset.rows) > 0).all()
  budgets = coresets.class_budgets(np.bincount(_LABELS).tolist(), 12)
  for c, budget in enumerate(budgets):
    members = np.flatnonzero(c == _LABELS)
    is_member = np.isin(coreset.rows, members)
    assert coreset.weights[is_member].sum() == members.size
    expected = facility_location.lazy_greedy(
      distances.vectors(proxies[members]), int(budget)
    )
    if greedy == "lazy":
      rows = members[np.asarray(expected.rows)]
      order = np.argsort(rows)
      np.testing.assert_array_equal(coreset.rows[is_member], rows[order])
      np.testing.assert_array_equal(coreset.weights[is_member], expected.weights[order])
    else:  # With this epsilon, every row is a candidate, so only ties can differ.
      selected = proxies[coreset.rows[is_member]]
      pairwise = np.linalg.norm(proxies[members, None] - selected, axis=2)
      np.testing.assert_allclose(
        pairwise.min(axis=1).sum(), expected.distances.sum(), rtol=1e-5
      )


@pytest.mark.slow
def test_outer_products_select_the_same_as_formed_ones():
  rng = np.random.default_rng(0)
  features, scale = rng.normal(size=(60, 6)), rng.uniform(0.5, 2.0, size=(4, 7))
  with_bias = np.concatenate([features, np.ones((60, 1))], axis=1)
  proxies = _proxies()
  for divisor in (None, scale):
    formed = proxies[:, :, None] * with_bias[:, None]
    formed = formed if divisor is None else formed / divisor
    expected = coresets.select(formed.reshape(60, -1), _LABELS, 15)
    coreset = coresets.select(proxies, _LABELS, 15, features=features, scale=divisor)
    np.testing.assert_array_equal(coreset.rows, expected.rows)
    np.testing.assert_array_equal(coreset.weights, expected.weights)


@pytest.mark.parametrize("offset", [300, 3000])
def test_the_origin_of_the_proxies_does_not_matter(offset):
  proxies = np.random.default_rng(0).normal(size=(30, 64)) + offset
  proxies = proxies.astype(np.float32)
  pairwise = np.linalg.norm(proxies[:, None].astype(float) - proxies, axis=2)
  rows, nearest = [], np.full(30, pairwise.max())
  for _ in range(6):  # Each row maximizes the gain, up to the rounding of distances.
    rows.append(int(np.argmax(np.maximum(nearest - pairwise, 0).sum(axis=1))))
    nearest = np.minimum(nearest, pairwise[rows[-1]])
  coreset = coresets.select(proxies, np.zeros(30, int), 6)  # The class is padded to 32.
  np.testing.assert_array_equal(coreset.rows, sorted(rows))


@pytest.mark.parametrize("unit", [1e-24, 1.0, 1e10])
def test_the_unit_of_the_proxies_does_not_matter(unit):
  proxies = np.repeat(np.eye(3, dtype=np.float32), [5, 3, 1], axis=0) * np.float32(unit)
  coreset = coresets.select(proxies, np.zeros(9, int), 3, features=proxies)
  assert coreset.rows.tolist() == [0, 5, 8] and coreset.weights.tolist() == [5, 3, 1]


@pytest.mark.slow("lazy")
@pytest.mark.parametrize("greedy", coresets.GREEDY)
def test_equal_proxies_share_the_weight_of_their_class(greedy):
  labels = np.repeat(["cat", "dog"], [30, 10])
  proxies = np.where(labels[:, None] == "cat", [0.5, -0.5], [-0.5, 0.5])
  coreset = coresets.select(
    proxies, labels, 8, greedy=greedy, key=jax.random.key(0), epsilon=0.1
  )
  np.testing.assert_allclose(coreset.weights, 5.0, rtol=1e-6)
  assert (np.diff(coreset.rows) > 0).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": 3}, "size=3 of 60 examples in 4 classes"),
    ({"budget": "fair"}, "budget='fair': choose one of"),
    ({"greedy": "fast"}, "greedy='fast': choose one of"),
    ({"epsilon": 1.0}, "epsilon=1.0 must lie between 1e-12 and 1.$"),
    (
      {"greedy": "stochastic", "epsilon": 1e-13},
      "epsilon=1e-13 must lie between 1e-12 and 1; use greedy='lazy' instead",
    ),
    ({"greedy": "stochastic", "key": 0}, "key=0 must be jax.random.key"),
    ({"labels": np.array(["a", None] * 30)}, "labels must be of one type"),
    ({"greedy": "stochastic"}, "needs key=jax.random.key"),
    ({"scale": np.ones((4, 1))}, "scale= requires features="),
    ({"labels": _LABELS[:2]}, "pass one label per proxy"),
    ({"proxies": np.ones(60)}, r"proxies must be \[n, C\]; got shape \(60,\)"),
    (
      {"proxies": np.where(np.arange(60)[:, None] == 7, np.nan, np.ones((60, 4)))},
      "1 rows of proxies are NaN, .* too large to be squared; the first is row 7",
    ),
  ],
)
def test_invalid_arguments_are_refused(options, message):
  arguments = {"proxies": np.ones((60, 4)), "labels": _LABELS, "size": 10} | options
  with pytest.raises(base.InputError, match=message):
    coresets.select(**arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_weights_sum_to_the_number_of_examples_in_every_type(dtype):
  values = np.array([[0]] * 1500 + [[10]] * 500)
  proxies = values.astype(jnp.dtype(dtype))
  coreset = coresets.select(proxies, np.zeros(2000, int), 2)
  assert sorted(coreset.weights.tolist()) == [500, 1500]


def test_distances_between_integers_do_not_wrap():
  proxies = np.array([[0], [2], [3], [255]], np.uint8)
  one, two = (
    coresets.select(x, np.zeros(4, int), 2) for x in (proxies, proxies.astype(float))
  )
  np.testing.assert_array_equal(one.rows, two.rows)
  np.testing.assert_array_equal(one.weights, two.weights)
  np.testing.assert_array_equal(one.rows, [1, 3])


def test_budgets_of_counts_in_small_types_do_not_overflow():
  for dtype, counts, size in (
    ("int32", [60000, 10000], 50000),
    ("uint8", [200, 100], 60),
  ):
    for array in (np.array(counts, dtype), jnp.array(counts, dtype)):
      np.testing.assert_array_equal(
        coresets.class_budgets(array, size), coresets.class_budgets(counts, size)
      )
  np.testing.assert_array_equal(coresets.class_budgets([200, 100], 60), [40, 20])


@pytest.mark.parametrize("counts", [[-3, 5], [0, 0], []])
def test_budgets_need_counts(counts):
  with pytest.raises(base.InputError, match="counts must be at least 0"):
    coresets.class_budgets(counts, 1)


@pytest.mark.parametrize("counts", [[2.9, 3.9], [np.nan, 3], [[2, 3], [4, 5]], ["2"]])
def test_budgets_need_integers(counts):
  with pytest.raises(base.InputError, match="class_counts must be one integer for"):
    coresets.class_budgets(counts, 1)


def test_budgets_refuse_masked_counts():
  with pytest.raises(base.InputError, match="class_counts must not be a masked array"):
    coresets.class_budgets(np.ma.masked_equal([3, 5], 3), 1)


@pytest.mark.parametrize("size", [2.5, 2.0, "2", float("nan")])
def test_sizes_are_integers(size):
  with pytest.raises(base.InputError, match=r"size=.* must be an integer"):
    coresets.class_budgets([10, 5], size)


_EYE, _TWO_CLASSES = np.eye(3), [0, 0, 1]


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    ((np.zeros((0, 3)), [], 0), {}, "there are no examples"),
    (
      (_EYE, _TWO_CLASSES, 2),
      {"features": np.ones((2, 2))},
      r"features must be \[n, d\]",
    ),
    ((_EYE, _TWO_CLASSES, 2), {"features": np.ones(3)}, r"features must be \[n, d\]"),
    (
      (_EYE, _TWO_CLASSES, 2),
      {"features": np.ones((3, 2)), "scale": np.ones((3, 2))},
      r"scale must be .* of shape \(3, 3\)",
    ),
    (
      (_EYE, _TWO_CLASSES, 2),
      {"features": np.ones((3, 2)), "scale": np.zeros((3, 3))},
      "scale must be finite nonzero numbers",
    ),
    (
      (_EYE, _TWO_CLASSES, 2),
      {"features": np.ones((3, 2)), "scale": np.where(_EYE, 1.0, 4e-39)},
      "at least 1.18e-38 in magnitude",
    ),
    (
      (_EYE, _TWO_CLASSES, 2),
      {"features": np.ones((3, 2)), "scale": np.ma.masked_equal(_EYE + 1, 2)},
      "scale must not be a masked array",
    ),
    ((np.float32([[1e20], [0]]), [0, 0], 1), {}, "too large to be squared"),
    ((_EYE, [0, np.nan, 1], 2), {}, "labels must be finite"),
    ((_EYE * 1j, _TWO_CLASSES, 2), {}, "must be real"),
  ],
)
def test_invalid_arrays_are_refused(arguments, options, message):
  with pytest.raises(base.InputError, match=message):
    coresets.select(*arguments, **options)


def test_different_types_under_strict_promotion_in_double_precision():
  proxies, features = np.eye(3), np.ones((3, 2), np.float32)
  with jax.enable_x64(), jax.numpy_dtype_promotion("strict"):
    coreset = coresets.select(
      proxies, [0, 0, 0], 2, features=features, scale=np.ones((3, 3), np.float32)
    )
  assert coreset.weights.sum() == 3


def test_proxies_of_every_byte_order():
  proxies, labels = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 2
  expected = coresets.select(proxies.astype(np.float32), labels, 5)
  for dtype in (">f4", ">f8"):
    result = coresets.select(proxies.astype(dtype), labels.astype(">i8"), 5)
    np.testing.assert_array_equal(result.rows, expected.rows)
    np.testing.assert_array_equal(result.weights, expected.weights)
