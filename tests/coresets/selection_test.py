"""Selection of a weighted subset: class budgets, weights, greedy choice."""

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location
from l2rw_jax.methods import adacore

pytestmark = pytest.mark.usefixtures("quick_compilation")

_LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


@pytest.mark.parametrize("budget", coresets.BUDGETS)
@pytest.mark.parametrize("size", [4, 7, 30, 57, 60])
def test_budgets_sum_to_the_size_and_include_every_class(budget, size):
  counts = [30, 18, 9, 3]
  result = coresets.class_budgets(counts, size, budget)
  assert result.sum() == size
  assert (result >= 1).all() and (result <= counts).all()
  assert (np.diff(result) <= 0).all()


def test_budgets_match_hand_computed_values():
  np.testing.assert_array_equal(coresets.class_budgets([60, 0, 40], 10), [6, 0, 4])
  # Classes of 97 %, 1 %, 1 % and 1 %: each rare class gets one from the large class.
  np.testing.assert_array_equal(coresets.class_budgets([97, 1, 1, 1], 5), [2, 1, 1, 1])
  result = coresets.class_budgets([50, 30, 2], 12, "equal")
  np.testing.assert_array_equal(result, [5, 5, 2])


@pytest.mark.parametrize("greedy", coresets.GREEDY)
def test_selection_is_greedy_within_classes_and_weights_sum_to_n(greedy):
  proxies = np.asarray(adacore.gradient_proxies(_LOGITS, _LABELS))
  result = coresets.select(
    proxies, _LABELS, 12, greedy=greedy, epsilon=1e-9, key=jax.random.key(0)
  )
  assert result.weights.sum() == 60
  assert (np.diff(result.rows) > 0).all()
  budgets = coresets.class_budgets(np.bincount(_LABELS).tolist(), 12)
  for c, budget in enumerate(budgets):
    members = np.flatnonzero(c == _LABELS)
    in_class = np.isin(result.rows, members)
    assert result.weights[in_class].sum() == members.size
    expected = facility_location.lazy_greedy(
      distances.vectors(proxies[members]), int(budget)
    )
    if greedy == "lazy":
      rows = members[np.asarray(expected.rows)]
      order = np.argsort(rows)
      np.testing.assert_array_equal(result.rows[in_class], rows[order])
      np.testing.assert_array_equal(result.weights[in_class], expected.weights[order])
    else:  # With so many draws every candidate is drawn: greedy up to ties.
      away = np.linalg.norm(
        proxies[members, None] - proxies[result.rows[in_class]], axis=2
      )
      np.testing.assert_allclose(
        away.min(axis=1).sum(), expected.distances.sum(), rtol=0.05
      )


def test_factored_outer_products_select_the_same_rows():
  rng = np.random.default_rng(0)
  features, scale = rng.normal(size=(60, 6)), rng.uniform(0.5, 2.0, size=(4, 7))
  with_bias = np.concatenate([features, np.ones((60, 1))], axis=1)
  proxies = adacore.gradient_proxies(_LOGITS, _LABELS)
  for divisor in (None, scale):
    formed = np.asarray(proxies)[:, :, None] * with_bias[:, None]
    formed = formed if divisor is None else formed / divisor
    expected = coresets.select(formed.reshape(60, -1), _LABELS, 15)
    result = coresets.select(proxies, _LABELS, 15, features=features, scale=divisor)
    np.testing.assert_array_equal(result.rows, expected.rows)
    np.testing.assert_array_equal(result.weights, expected.weights)


@pytest.mark.parametrize("greedy", ["lazy", "stochastic"])
def test_identical_proxies_give_equal_weights_within_a_class(greedy):
  labels = np.repeat(["cat", "dog"], [30, 10])
  proxies = np.where(labels[:, None] == "cat", [0.5, -0.5], [-0.5, 0.5])
  chosen = coresets.select(
    proxies, labels, 8, greedy=greedy, key=jax.random.key(0), epsilon=0.1
  )
  np.testing.assert_allclose(chosen.weights, 5.0, rtol=1e-6)
  assert (np.diff(chosen.rows) > 0).all()


def test_invalid_selections_are_refused():
  proxies, labels = np.zeros((60, 4)), np.repeat(np.arange(4), 15)
  with pytest.raises(base.InputError, match="size=3 of 60 examples in 4 classes"):
    coresets.select(proxies, labels, 3)
  with pytest.raises(base.InputError, match="budget='fair'"):
    coresets.select(proxies, labels, 10, budget="fair")
  proxies[7, 2] = np.nan
  with pytest.raises(base.InputError, match=r"1 of the proxies .* in row 7"):
    coresets.select(proxies, labels, 10)
