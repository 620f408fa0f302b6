"""Fairness objectives by hand, at their edges, and under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import group_objectives as go

# Means 2, 5 and 1 of groups 0, 1 and 3; group 2 is absent. Gaps 3, 1 and 4.
_LOSSES = jnp.array([1.0, 5.0, 3.0, 1.0])
_GROUPS = jnp.array([0, 1, 0, 3])
_GIVEN = (_LOSSES, _GROUPS, 4)
_OBJECTIVES = {
  "gap_mean": go.gap,
  "gap_max": functools.partial(go.gap, reduction="max"),
  "gap_and_mean": functools.partial(go.gap, mean_coefficient=0.5),
  "worst": go.worst,
  "worst_smooth": functools.partial(go.worst, temperature=0.5),
}


def _both(objective, losses=_LOSSES, groups=_GROUPS, num_groups=4):
  return jax.value_and_grad(objective)(losses, groups, num_groups)


def test_group_means_and_presence():
  means, present = go.group_means(*_GIVEN)
  np.testing.assert_allclose(means, [2, 5, 0, 1])
  assert present.tolist() == [True, True, False, True]


@pytest.mark.parametrize(
  ("name", "value", "gradient"),
  [
    # Signs of 1 - 0, 1 - 3 and 0 - 3, each a third; group 0 has two members.
    ("gap_mean", 8 / 3, [0, 2 / 3, 0, -2 / 3]),
    ("gap_max", 4, [0, 1, 0, -1]),
    ("gap_and_mean", 8 / 3 + 1.25, [1 / 8, 2 / 3 + 1 / 8, 1 / 8, -2 / 3 + 1 / 8]),
    ("worst", 5, [0, 1, 0, 0]),
  ],
)
def test_by_hand(name, value, gradient):
  found, slope = _both(_OBJECTIVES[name])
  np.testing.assert_allclose(found, value, rtol=1e-6)
  np.testing.assert_allclose(slope, gradient, rtol=1e-6, atol=1e-7)


def test_smooth_worst_by_hand():
  found, slope = _both(_OBJECTIVES["worst_smooth"])
  powers = np.exp(np.array([2, 5, 1]) / 0.5)
  np.testing.assert_allclose(found, 0.5 * np.log(powers.sum()), rtol=1e-6)
  shares = powers / powers.sum()
  expected = [shares[0] / 2, shares[1], shares[0] / 2, shares[2]]
  np.testing.assert_allclose(slope, expected, rtol=1e-5)
  for temperature in (1e-3, 1e-1, 1.0):
    above = go.worst(*_GIVEN, temperature=temperature) - go.worst(*_GIVEN)
    assert -1e-6 <= above <= temperature * np.log(3)


def test_soft_tpr_is_the_others_on_missing_probability():
  probabilities = jnp.exp(-_LOSSES)
  misses = 1 - probabilities
  for reduction in ("mean", "max"):
    options = {"reduction": reduction, "mean_coefficient": 0.3}
    found = go.soft_tpr(probabilities, *_GIVEN[1:], **options)
    assert found == go.gap(misses, *_GIVEN[1:], **options) > 0
  found = go.soft_tpr(probabilities, *_GIVEN[1:], reduction="worst", temperature=0.1)
  assert found == go.worst(misses, *_GIVEN[1:], temperature=0.1)
  # Rates 0.9 and 0.6.
  found = go.soft_tpr(jnp.array([0.8, 0.6, 1.0]), jnp.array([0, 1, 0]), 2)
  np.testing.assert_allclose(found, 0.3, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_equal_groups_have_no_gap_and_no_gradient(reduction):
  losses, groups = jnp.array([1.0, 2.0, 3.0, 2.0]), jnp.array([0, 1, 0, 2])
  found, slope = _both(
    functools.partial(go.gap, reduction=reduction), losses, groups, 3
  )
  assert found == 0
  assert not slope.any()


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_reversed_roles_flip_the_sign(reduction):
  objective = functools.partial(go.gap, reduction=reduction)
  losses, groups = jnp.array([1.0, 3.0]), jnp.array([0, 1])
  _, slope = _both(objective, losses, groups, 2)
  _, flipped = _both(objective, losses[::-1], groups, 2)
  np.testing.assert_allclose(slope, [-1, 1])
  np.testing.assert_allclose(flipped, -slope)


def test_a_group_listed_twice_does_not_change_the_worst():
  twice = jnp.concatenate([_LOSSES, _LOSSES[1:2]])
  groups = jnp.concatenate([_GROUPS, jnp.array([2])])
  found, slope = _both(go.worst, twice, groups)
  assert found == go.worst(*_GIVEN)
  np.testing.assert_allclose(slope, [0, 0.5, 0, 0, 0.5])  # Shared by its two names.
  smooth = functools.partial(go.worst, temperature=0.5)
  assert 0 < smooth(twice, groups, 4) - smooth(*_GIVEN) <= 0.5 * np.log(2) + 1e-6


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_repeating_every_example_changes_nothing(name):
  found, slope = _both(_OBJECTIVES[name])
  again, parts = _both(_OBJECTIVES[name], jnp.tile(_LOSSES, 3), jnp.tile(_GROUPS, 3))
  np.testing.assert_allclose(again, found, rtol=1e-6)
  np.testing.assert_allclose(parts.reshape(3, 4).sum(axis=0), slope, atol=1e-6)


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_absent_groups_do_not_count_and_unknown_ones_are_refused(name):
  found, slope = _both(_OBJECTIVES[name])
  wider, same = _both(_OBJECTIVES[name], num_groups=9)
  np.testing.assert_allclose(wider, found, rtol=1e-6)
  np.testing.assert_allclose(same, slope, rtol=1e-6)
  unknown = jnp.array([0, 1, 4, -3])
  with pytest.raises(base.InputError, match="groups are 0 to 3; got 4 in row 2"):
    _both(_OBJECTIVES[name], groups=unknown)
  found = jax.jit(lambda groups: _OBJECTIVES[name](_LOSSES, groups, 4))(unknown)
  assert np.isnan(found)


@pytest.mark.parametrize("name", _OBJECTIVES)
def test_vmap_and_jit_are_a_loop(name):
  rng = np.random.default_rng(0)
  losses = rng.exponential(size=(5, 6)).astype(np.float32)
  groups = rng.integers(4, size=(5, 6))
  run = functools.partial(_both, _OBJECTIVES[name], num_groups=4)
  mapped = jax.jit(jax.vmap(run))(losses, groups)
  for i in range(5):
    found, slope = run(losses[i], groups[i])
    np.testing.assert_allclose(mapped[0][i], found, rtol=1e-5)
    np.testing.assert_allclose(mapped[1][i], slope, rtol=1e-5, atol=1e-6)


def test_a_nan_stays_in_its_group():
  broken = _LOSSES.at[1].set(jnp.nan)
  means, _ = go.group_means(broken, *_GIVEN[1:])
  np.testing.assert_allclose(means, [2, np.nan, 0, 1])
  assert np.isnan(go.worst(broken, *_GIVEN[1:]))
  assert np.isnan(go.gap(broken, *_GIVEN[1:]))


def test_huge_losses_do_not_overflow():
  losses = jnp.array([1e6, 2e6, 0.0])
  found, slope = _both(_OBJECTIVES["worst_smooth"], losses, jnp.arange(3), 3)
  assert found == 2e6
  np.testing.assert_allclose(slope, [0, 1, 0])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: go.gap(_LOSSES, _GROUPS[:2], 4), r"shape \(4,\); got \(2,\)"),
    (lambda: go.worst(_LOSSES[0], _GROUPS, 4), r"losses must be .* shape \(\)"),
    (lambda: go.worst(*_GIVEN, temperature=-1.0), "temperature=-1.0 must be at least"),
    (lambda: go.gap(*_GIVEN, reduction="sum"), "reduction='sum': choose one of"),
    (lambda: go.soft_tpr(*_GIVEN, reduction="sum"), "reduction='sum': choose one of"),
    (lambda: go.check_groups(np.array([0.5]), 2), "must be integers of shape"),
    (
      lambda: go.check_groups(np.array([0, 2]), 2),
      "has group 2, groups are 0 to 1",
    ),
    (lambda: go.check_groups(_GROUPS, 4), r"group 2 has no member .*\(1 of 4 groups"),
    (lambda: go.check_groups(np.zeros(0, int), 2), r"group 0 has no .*\(2 of 2"),
  ],
)
def test_mistakes(call, message):
  with pytest.raises(base.InputError, match=message):
    call()


def test_sound_groups_pass():
  go.check_groups(np.array([1, 0, 1], np.int32), 2)
