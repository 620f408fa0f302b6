"""Selection of a subset class by class: budgets, weights, errors."""

import jax
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
      away = np.linalg.norm(proxies[members, None] - selected, axis=2)
      np.testing.assert_allclose(
        away.min(axis=1).sum(), expected.distances.sum(), rtol=0.05
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
    ({"epsilon": 1.0}, "epsilon=1.0 must lie between"),
    ({"greedy": "stochastic"}, "needs key=jax.random.key"),
    ({"scale": np.ones((4, 1))}, "scale= requires features="),
    ({"labels": _LABELS[:2]}, "pass one label per proxy"),
    ({"proxies": np.ones(60)}, r"proxies must be \[n, C\]; got shape \(60,\)"),
    (
      {"proxies": np.where(np.arange(60)[:, None] == 7, np.nan, np.ones((60, 4)))},
      "1 of the proxies are NaN or infinite; the first is in row 7",
    ),
  ],
)
def test_invalid_arguments_are_refused(options, message):
  arguments = {"proxies": np.ones((60, 4)), "labels": _LABELS, "size": 10} | options
  with pytest.raises(base.InputError, match=message):
    coresets.select(**arguments)
