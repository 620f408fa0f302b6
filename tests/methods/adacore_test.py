"""AdaCore: golden averages, curvature, CRAIG as its special case, exact resumption."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location
from l2rw_jax.methods import adacore
from l2rw_jax.methods import adacore_table

_LOGITS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
_LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 15))


def _losses(logits, labels=_LABELS):
  own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
  return -own[:, 0]


# -- formulas ----------------------------------------------------------------


@pytest.mark.parametrize("labels", [_LABELS[:, None], np.eye(4)[_LABELS], _LABELS[:1]])
def test_proxies_refuse_labels_that_would_be_broadcast(labels):
  with pytest.raises(base.InputError, match="labels must be"):
    adacore.gradient_proxies(_LOGITS, labels)


def test_proxies_are_the_gradient_at_the_logits():
  expected = jax.grad(lambda z: _losses(z).sum())(_LOGITS)
  found = adacore.gradient_proxies(_LOGITS, _LABELS)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  sure = adacore.gradient_proxies(
    jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.zeros(2, int)
  )
  np.testing.assert_allclose(sure, [[0, 0], [-1, 1]])


def test_averages_golden():
  # D = 2, -4, 3 and g = 1, 0.5, -1: `reference`, C.6.
  averages = adacore.Averages(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), int))
  found = []
  for curvature, gradient in ((2.0, 1.0), (-4.0, 0.5), (3.0, -1.0)):
    averages = adacore.update_averages(averages, jnp.array(gradient), curvature)
    found.append(adacore.corrected(averages, epsilon=0.0))
  np.testing.assert_allclose(found, np.array(_GOLDEN), rtol=2e-5)
  _, off = adacore.corrected(averages, power=0.0, epsilon=0.0)
  assert off == 1


_GOLDEN = [(1, 2), (0.736842, 3.162752), (0.095941, 3.109394)]


def test_hutchinson_finds_the_diagonal_of_the_cross_entropy():
  logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
  found = adacore_table.hessian_diagonal(
    jax.random.key(0), lambda z: _losses(z, np.zeros(1, int)).sum(), logits, 4000
  )
  np.testing.assert_allclose(found, [[0.21, 0.16, 0.09]], atol=6e-3)


def test_one_probe_is_exact_for_a_diagonal_hessian_of_any_pytree():
  scales = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}

  def loss(x):
    return sum(jnp.sum(scales[name] * v**2) / 2 for name, v in x.items())

  found = adacore_table.hessian_diagonal(jax.random.key(0), loss, scales)
  chex.assert_trees_all_close(found, scales)


# -- choosing class by class -------------------------------------------------


@pytest.mark.parametrize("budget", coresets.BUDGETS)
@pytest.mark.parametrize("size", [4, 7, 30, 57, 60])
def test_budgets_are_of_the_size_and_spare_no_class(budget, size):
  counts = [30, 18, 9, 3]
  found = coresets.class_budgets(counts, size, budget)
  assert found.sum() == size
  assert (found >= 1).all() and (found <= counts).all()
  assert (np.diff(found) <= 0).all()


def test_budgets_by_hand():
  np.testing.assert_array_equal(coresets.class_budgets([60, 0, 40], 10), [6, 0, 4])
  # 97 % and three of 1 %: each of the rare takes one from the large.
  np.testing.assert_array_equal(coresets.class_budgets([97, 1, 1, 1], 5), [2, 1, 1, 1])
  found = coresets.class_budgets([50, 30, 2], 12, "equal")
  np.testing.assert_array_equal(found, [5, 5, 2])


@pytest.mark.parametrize("greedy", coresets.GREEDY)
def test_selection_is_greedy_in_each_class_and_its_weights_sum_to_n(greedy):
  proxies = np.asarray(adacore.gradient_proxies(_LOGITS, _LABELS))
  found = coresets.select(
    proxies, _LABELS, 12, greedy=greedy, epsilon=1e-9, key=jax.random.key(0)
  )
  assert found.weights.sum() == 60
  assert (np.diff(found.rows) > 0).all()
  budgets = coresets.class_budgets(np.bincount(_LABELS).tolist(), 12)
  for c, budget in enumerate(budgets):
    members = np.flatnonzero(c == _LABELS)
    own = np.isin(found.rows, members)
    assert found.weights[own].sum() == members.size
    expected = facility_location.lazy_greedy(
      distances.vectors(proxies[members]), int(budget)
    )
    if greedy == "lazy":
      rows = members[np.asarray(expected.rows)]
      order = np.argsort(rows)
      np.testing.assert_array_equal(found.rows[own], rows[order])
      np.testing.assert_array_equal(found.weights[own], expected.weights[order])
    else:  # Every candidate is among so many draws; ties aside it is greedy too.
      away = np.linalg.norm(proxies[members, None] - proxies[found.rows[own]], axis=2)
      np.testing.assert_allclose(
        away.min(axis=1).sum(), expected.distances.sum(), rtol=0.05
      )


def test_outer_products_choose_what_formed_ones_do():
  rng = np.random.default_rng(0)
  features, scale = rng.normal(size=(60, 6)), rng.uniform(0.5, 2.0, size=(4, 7))
  with_bias = np.concatenate([features, np.ones((60, 1))], axis=1)
  proxies = adacore.gradient_proxies(_LOGITS, _LABELS)
  for given in (None, scale):
    formed = np.asarray(proxies)[:, :, None] * with_bias[:, None]
    formed = formed if given is None else formed / given
    expected = coresets.select(formed.reshape(60, -1), _LABELS, 15)
    found = coresets.select(proxies, _LABELS, 15, features=features, scale=given)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.weights, expected.weights)


@pytest.mark.parametrize("scaled", [False, True])
def test_distances_of_outer_products_and_of_equal_points(scaled):
  rng = np.random.default_rng(0)
  left, right = rng.normal(size=(30, 4)), 100 * rng.normal(size=(30, 50))
  left[7], right[7] = left[3], right[3]
  scale = rng.uniform(0.5, 2.0, size=(4, 50)) if scaled else None
  formed = left[:, :, None] * right[:, None]
  formed = formed if scale is None else formed / scale
  expected = np.linalg.norm((formed[:, None] - formed).reshape(30, 30, -1), axis=2)
  points = distances.outer_products(
    left.astype(np.float32), right.astype(np.float32), scale
  )
  found = np.asarray(points.distances(jnp.arange(30)))
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3 * expected.max())
  assert found[3, 7] == found[7, 3] == 0 and (np.diag(found) == 0).all()
  # Beyond a few coordinates vectors are measured by inner products as well.
  flat = distances.vectors(formed.reshape(30, -1).astype(np.float32))
  assert flat.distances(jnp.array([3]))[0, 7] == 0


# -- the method --------------------------------------------------------------


def test_labels_of_another_shape_or_class():
  logits = jnp.zeros((3, 4))
  for labels in (jnp.zeros((3, 1), int), jnp.zeros((3, 4), int)):
    with pytest.raises(base.InputError, match=r"integers of shape \[B\]"):
      adacore.gradient_proxies(logits, labels)
  found = adacore.gradient_proxies(logits, jnp.array([-1, 0, 4]))
  np.testing.assert_array_equal(np.isnan(found).all(axis=1), [True, False, True])


@pytest.mark.parametrize("greedy", ["lazy", "stochastic"])
def test_a_network_that_knows_nothing_yet_weighs_a_class_evenly(greedy):
  labels = np.repeat(["cat", "dog"], [30, 10])
  proxies = np.where(labels[:, None] == "cat", [0.5, -0.5], [-0.5, 0.5])
  chosen = coresets.select(
    proxies, labels, 8, greedy=greedy, key=jax.random.key(0), epsilon=0.1
  )
  np.testing.assert_allclose(chosen.weights, 5.0, rtol=1e-6)
  assert (np.diff(chosen.rows) > 0).all()
