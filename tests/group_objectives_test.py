"""Fairness objectives: values computed by hand, edge cases, jit and vmap."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import group_objectives as go

# Means 2, 5 and 1 of groups 0, 1 and 3; group 2 is absent. Gaps 3, 1 and 4.
_LOSSES = jnp.array([1.0, 5.0, 3.0, 1.0])
_GROUPS = jnp.array([0, 1, 0, 3])
_ARGS = (_LOSSES, _GROUPS, 4)
_OBJECTIVES = {
  "gap_mean": go.gap,
  "gap_max": functools.partial(go.gap, reduction="max"),
  "gap_and_mean": functools.partial(go.gap, mean_coefficient=0.5),
  "worst": go.worst,
  "worst_smooth": functools.partial(go.worst, temperature=0.5),
}


def _all(losses, groups, num_groups):
  """Values and gradients by objective."""
  return {
    name: jax.value_and_grad(objective)(losses, groups, num_groups)
    for name, objective in _OBJECTIVES.items()
  }


_all_jitted = jax.jit(_all, static_argnums=2)


def _both(name, losses=_LOSSES, groups=_GROUPS, num_groups=4):
  """The value of an objective and its gradient with respect to the losses."""
  return _all_jitted(losses, groups, num_groups)[name]


def test_group_means_and_presence():
  means, present = go.group_means(*_ARGS)
  np.testing.assert_allclose(means, [2, 5, 0, 1])
  assert present.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
  ("name", "expected", "expected_gradient"),
  [
    # The mean of 5 - 2, 5 - 1 and 2 - 1: the means of groups 0, 1 and 3 have the
    # coefficients 0, 2 / 3 and -2 / 3.
    ("gap_mean", 8 / 3, [0, 2 / 3, 0, -2 / 3]),
    ("gap_max", 4, [0, 1, 0, -1]),
    ("gap_and_mean", 8 / 3 + 1.25, [1 / 8, 2 / 3 + 1 / 8, 1 / 8, -2 / 3 + 1 / 8]),
    ("worst", 5, [0, 1, 0, 0]),
  ],
)
def test_values_and_gradients_by_hand(name, expected, expected_gradient):
  actual, gradient = _both(name)
  np.testing.assert_allclose(actual, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


def test_smooth_worst_by_hand():
  actual, gradient = _both("worst_smooth")
  powers = np.exp(np.array([2, 5, 1]) / 0.5)
  np.testing.assert_allclose(actual, 0.5 * np.log(powers.sum()), rtol=1e-6)
  shares = powers / powers.sum()
  expected = [shares[0] / 2, shares[1], shares[0] / 2, shares[2]]
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
  temperatures = (1e-3, 1e-1, 1.0)
  smooth = jax.jit(
    lambda losses: [go.worst(losses, *_ARGS[1:], temperature=t) for t in temperatures]
  )
  for temperature, worst in zip(temperatures, smooth(_LOSSES), strict=True):
    assert -1e-6 <= worst - _both("worst")[0] <= temperature * np.log(3)


def test_soft_tpr_is_gap_or_worst_of_one_minus_probability():
  probabilities = jnp.exp(-_LOSSES)
  misses = 1 - probabilities
  for reduction in ("mean", "max"):
    options = {"reduction": reduction, "mean_coefficient": 0.3}
    actual = go.soft_tpr(probabilities, *_ARGS[1:], **options)
    assert actual == go.gap(misses, *_ARGS[1:], **options) > 0
  actual = go.soft_tpr(probabilities, *_ARGS[1:], reduction="worst", temperature=0.1)
  assert actual == go.worst(misses, *_ARGS[1:], temperature=0.1)
  # True-positive rates of 0.9 and 0.6.
  actual = go.soft_tpr(jnp.array([0.8, 0.6, 1.0]), jnp.array([0, 1, 0]), 2)
  np.testing.assert_allclose(actual, 0.3, rtol=1e-6)


@pytest.mark.parametrize("name", ["gap_mean", "gap_max"])
def test_equal_groups_have_no_gap_and_no_gradient(name):
  losses, groups = jnp.array([1.0, 2.0, 3.0, 2.0]), jnp.array([0, 1, 0, 2])
  actual, gradient = _both(name, losses, groups)
  assert actual == 0
  assert not gradient.any()


@pytest.mark.parametrize("name", ["gap_mean", "gap_max"])
def test_exchanging_the_groups_flips_the_gradient(name):
  losses, groups = jnp.array([1.0, 1.0, 3.0, 3.0]), jnp.array([0, 0, 1, 1])
  _, gradient = _both(name, losses, groups)
  _, flipped = _both(name, losses[::-1], groups)
  np.testing.assert_allclose(gradient, [-0.5, -0.5, 0.5, 0.5])
  np.testing.assert_allclose(flipped, -gradient)


def test_a_copy_of_the_worst_group_does_not_change_the_worst():
  # Group 2 has two copies of the only example of group 1.
  losses = jnp.concatenate([_LOSSES, jnp.array([5.0, 5.0])])
  groups = jnp.concatenate([_GROUPS, jnp.array([2, 2])])
  actual, gradient = _both("worst", losses, groups)
  assert actual == _both("worst")[0]
  # The two groups share the gradient.
  np.testing.assert_allclose(gradient, [0, 0.5, 0, 0, 0.25, 0.25])
  smooth = _both("worst_smooth", losses, groups)[0] - _both("worst_smooth")[0]
  assert 0 < smooth <= 0.5 * np.log(2) + 1e-6


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_repeating_every_example_does_not_change_the_objective(name):
  actual, gradient = _both(name)
  again, gradients = _both(name, np.tile(_LOSSES, 3), np.tile(_GROUPS, 3))
  np.testing.assert_allclose(again, actual, rtol=1e-6)
  np.testing.assert_allclose(gradients.reshape(3, 4).sum(axis=0), gradient, atol=1e-6)


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_absent_groups_are_ignored_and_unknown_ones_are_refused(name):
  actual, gradient = _both(name)
  wider, same = _both(name, num_groups=9)
  np.testing.assert_allclose(wider, actual, rtol=1e-6)
  np.testing.assert_allclose(same, gradient, rtol=1e-6)
  unknown = jnp.array([0, 1, 4, -3])
  with pytest.raises(base.InputError, match="groups are 0 to 3; got 4 in row 2"):
    _OBJECTIVES[name](_LOSSES, unknown, 4)
  assert np.isnan(_both(name, groups=unknown)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_groups_in_half_precision_neither_overflow_nor_vanish(dtype):
  # 400 groups have 79,800 pairs, and the sum over pairs is above 65,504.
  losses = jnp.asarray(np.random.default_rng(0).uniform(0, 60, 400), dtype)
  groups = np.arange(400)
  wide = losses.astype(jnp.float32)
  actual = go.gap(losses, groups, 400)
  expected = go.gap(wide, groups, 400)
  assert actual.dtype == losses.dtype
  np.testing.assert_allclose(actual, expected, rtol=0.005)


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-4, np.float64(1e-2)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_low_temperature_gives_the_maximum(temperature, dtype):
  losses, groups = jnp.asarray([10.0, 30.0, 20.0], dtype), np.arange(3)
  actual = go.worst(losses, groups, 3, temperature=temperature)
  assert actual == 30 and actual.dtype == losses.dtype


def test_derivative_with_respect_to_the_temperature():
  losses, groups = jnp.array([1.0, 3.0, 2.5]), jnp.array([0, 0, 2])  # No group 1.
  actual = jax.grad(lambda t: go.worst(losses, groups, 4, temperature=t))(0.5)
  # The derivative of T log sum_g exp(L_g / T) is the entropy of the softmax of L / T.
  # The means L_g are 2 and 2.5.
  p = np.exp([4.0, 5.0]) / np.exp([4.0, 5.0]).sum()
  np.testing.assert_allclose(actual, -(p * np.log(p)).sum(), rtol=1e-5)


def test_a_large_loss_with_a_low_temperature_is_finite():
  losses = jnp.array([1e37, 0.0])
  value, gradient = jax.value_and_grad(
    lambda x: go.worst(x, np.arange(2), 2, temperature=1e-2)
  )(losses)
  assert value == jnp.float32(1e37) and gradient.tolist() == [1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_not_finite_are_refused(value):
  losses, groups = jnp.ones(2), np.arange(2)
  with pytest.raises(base.InputError, match=f"temperature={value} must be at least 0"):
    go.worst(losses, groups, 2, temperature=value)
  with pytest.raises(base.InputError, match=f"mean_coefficient={value} must be"):
    go.gap(losses, groups, 2, mean_coefficient=value)


def test_the_coefficient_of_the_mean_may_be_traced():
  losses, groups = jnp.array([1.0, 3.0, 5.0]), np.array([0, 0, 2])
  value, derivative = jax.jit(
    jax.value_and_grad(lambda c: go.gap(losses, groups, 3, mean_coefficient=c))
  )(0.5)
  assert (value, derivative) == (4.5, 3.0)


def test_the_gap_of_no_losses_is_zero():
  assert go.gap(jnp.zeros(0), np.zeros(0, int), 2) == 0


def test_vmap_equals_a_loop():
  rng = np.random.default_rng(0)
  losses = rng.exponential(size=(5, 6)).astype(np.float32)
  groups = rng.integers(4, size=(5, 6)).astype(np.int32)
  mapped = jax.jit(jax.vmap(functools.partial(_all, num_groups=4)))(losses, groups)
  for i in range(5):
    expected = _all_jitted(losses[i], groups[i], 4)
    actual = jax.tree.map(lambda x, i=i: x[i], mapped)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_nan_affects_only_its_group():
  broken = _LOSSES.at[1].set(jnp.nan)
  means, _ = go.group_means(broken, *_ARGS[1:])
  np.testing.assert_allclose(means, [2, np.nan, 0, 1])
  assert np.isnan(go.worst(broken, *_ARGS[1:]))
  assert np.isnan(go.gap(broken, *_ARGS[1:]))


def test_huge_losses_do_not_overflow():
  losses = jnp.array([1e6, 2e6, 0.0, 0.0])
  actual, gradient = _both("worst_smooth", losses, jnp.arange(4))
  assert actual == 2e6
  np.testing.assert_allclose(gradient, [0, 1, 0, 0])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: go.gap(_LOSSES, _GROUPS[:2], 4), r"shape \(4,\); got \(2,\)"),
    (lambda: go.worst(_LOSSES[0], _GROUPS, 4), r"losses must be .* shape \(\)"),
    (
      lambda: go.worst(*_ARGS, temperature=-1.0),
      "temperature=-1.0 must be at least",
    ),
    (lambda: go.gap(*_ARGS, reduction="sum"), "reduction='sum': choose one of"),
    (lambda: go.mean([0.0]), "losses must be an array"),
    (lambda: go.gap([0.0], [0], 1), "losses must be an array"),
    (lambda: go.worst([0.0], [0], 1), "losses must be an array"),
    (lambda: go.group_means([0.0], [0], 1), "values must be an array"),
    (lambda: go.soft_tpr([0.5], [0], 1), "probabilities must be an array"),
    (
      lambda: go.soft_tpr(*_ARGS, reduction="sum"),
      "reduction='sum': choose one of",
    ),
    (lambda: go.check_groups(np.array([0.5]), 2), "must be integers of shape"),
    (
      lambda: go.check_groups(np.array([0, 2]), 2),
      "has group 2, but groups are 0 to 1",
    ),
    (lambda: go.check_groups(_GROUPS, 4), r"group 2 has no member .*\(1 of 4 groups"),
    (lambda: go.check_groups(np.zeros(0, int), 2), r"group 0 has no .*\(2 of 2"),
  ],
)
def test_invalid_arguments_are_refused(call, message):
  with pytest.raises(base.InputError, match=message):
    call()


def test_valid_groups_pass():
  go.check_groups(np.array([1, 0, 1], np.int32), 2)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_groups_of_every_integer_type(dtype):
  groups = jnp.array([0, 100, 100], dtype)
  with jax.numpy_dtype_promotion("strict"):
    for function in (go.group_means, jax.jit(go.group_means, static_argnums=2)):
      means, present = function(jnp.array([1.0, 2.0, 4.0]), groups, 256)
      assert int(present.sum()) == 2
      np.testing.assert_array_equal(means[jnp.array([0, 100])], [1, 3])


@pytest.mark.parametrize("groups", [[0, 1], np.array([False, True])])
def test_groups_may_be_lists_or_bools(groups):
  means, _ = go.group_means(jnp.array([1.0, 2.0]), groups, 2)
  np.testing.assert_array_equal(means, [1, 2])


def test_groups_that_are_not_integers_are_refused():
  with pytest.raises(base.InputError, match="one integer per exemplar"):
    go.group_means(jnp.ones(2), jnp.array([0.5, 1.0]), 2)


@pytest.mark.parametrize("function", [go.group_means, go.gap, go.worst, go.soft_tpr])
def test_the_number_of_groups_must_be_a_known_integer(function):
  values, groups = jnp.array([0.5, 1.0]), jnp.array([0, 1])
  with pytest.raises(base.InputError, match=r"num_groups=2\.5 must be an integer"):
    function(values, groups, 2.5)
  with pytest.raises(base.InputError, match="num_groups is traced"):
    jax.jit(lambda groups: function(values, groups, groups.max() + 1))(groups)
  function(values, groups, groups.max() + 1)  # Known outside `jit`.


def test_the_number_of_groups_of_an_exemplar_set_must_be_an_integer():
  with pytest.raises(base.InputError, match="num_groups=None must be an integer"):
    go.check_groups(np.array([0, 1]), None)
