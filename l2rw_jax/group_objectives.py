"""Fairness objectives: scalars that are computed from per-example losses and groups.

L_g is the mean loss of group g in the batch.

    mean      average loss of all examples
    gap       mean or maximum of |L_a - L_b| over pairs of groups
    worst     max_g L_g, or a smooth maximum
    soft_tpr  gap or worst with 1 - mean p(label) in place of L_g

Equality of opportunity requires equal true-positive rates (Hardt, Price, Srebro,
arXiv:1610.02413). These rates are piecewise constant in the parameters, whereas the
objectives of this module are differentiable. Groups without a member in the batch are
ignored. M is the number of exemplars, which are the examples of the meta batch, and G
is the number of groups.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base


def group_means(
  values: base.Array, groups: base.Array, num_groups: int
) -> tuple[base.Array, base.Array]:
  """Mean of each group, and whether the group has a member.

  Args:
    values: [M].
    groups: group of each example, an integer from 0 to G - 1, [M].
    num_groups: G.

  Returns:
    Means [G], 0 for a group without a member, and whether each group has a member, bool
    [G]. Under `jit`, all means are NaN if the group of an example is outside 0 to
    G - 1, so that the meta loss is NaN and the mistake is reported.

  Raises:
    InputError: the shapes do not match, the groups are not integers, `num_groups` is
      not a positive integer or is traced, or the group of an example is outside 0 to
      G - 1 (the last is raised only outside `jit`).
  """
  num_groups = base.check_integer("num_groups", num_groups)
  means, present = _wide_means(values, groups, num_groups, "values")
  if jnp.issubdtype(values.dtype, jnp.inexact):
    means = means.astype(values.dtype)
  return means, present


def _wide_means(values, groups, num_groups, name="losses"):
  """`group_means`, with means in float32 or wider."""
  _check(name, values, groups)
  exist = _check_exist(groups, num_groups)
  groups = base.wide_integers(groups, num_groups)
  columns = jnp.arange(num_groups, dtype=groups.dtype)
  is_member = groups[:, None] == columns[None, :]
  counts = is_member.sum(axis=0)
  # A matrix product would be rounded on TPU, and would spread a NaN to all groups.
  dtype = base.accumulator_dtype(values.dtype)
  totals = jnp.where(is_member, values.astype(dtype)[:, None], 0).sum(axis=0)
  means = totals / jnp.maximum(counts, 1).astype(dtype)
  return jnp.where(exist, means, jnp.nan), counts > 0


def mean(losses: base.Array) -> base.Array:
  """Average of the losses [M] of the exemplars, regardless of groups; scalar.

  Raises:
    InputError: `losses` does not have shape [M].
  """
  base.check_vector("losses", losses)
  return jnp.mean(losses)


def gap(
  losses: base.Array,
  groups: base.Array,
  num_groups: int,
  *,
  reduction: str = "mean",
  mean_coefficient: float = 0.0,
) -> base.Array:
  """Absolute difference of the mean losses of two groups, reduced over pairs of groups.

  Pairs in which a group has no member are ignored. If fewer than two groups have a
  member, only the term of `mean_coefficient` remains. A pair of groups with equal means
  adds nothing to the gradient.

  Args:
    losses: losses of the exemplars, [M].
    groups: groups of the exemplars, [M].
    num_groups: G.
    reduction: "mean" or "max" over the pairs; pairs that tie share the gradient.
    mean_coefficient: factor of the mean loss, which is added to the gap.

  Returns:
    A scalar.

  Raises:
    InputError: `reduction` is unknown, `mean_coefficient` is not finite, or the groups
      are invalid, see `group_means`.

  >>> import jax.numpy as jnp
  >>> losses, groups = jnp.array([1., 3., 5.]), jnp.array([0, 0, 2])
  >>> print(gap(losses, groups, num_groups=3))
  3.0
  """
  _check_choice("reduction", reduction, ("mean", "max"))
  num_groups = base.check_integer("num_groups", num_groups)
  mean_coefficient = base.setting(mean_coefficient)
  is_traced = base.is_traced(mean_coefficient)
  if not is_traced and not math.isfinite(mean_coefficient):
    raise base.InputError(f"mean_coefficient={mean_coefficient} must be finite.")
  means, present = _wide_means(losses, groups, num_groups)
  pairs = jnp.triu(present[:, None] & present[None, :], k=1)
  difference = jnp.where(pairs, means[:, None] - means[None, :], 0)
  # The derivative of jnp.abs at 0 is 1 in JAX; that of this product is 0.
  gaps = difference * jnp.sign(difference)
  if reduction == "max":
    reduced = gaps.max()
  else:
    reduced = gaps.sum() / jnp.maximum(pairs.sum(), 1).astype(gaps.dtype)
  reduced = jnp.where(_check_exist(groups, num_groups), reduced, jnp.nan)
  # Without losses, 0 times their mean would be NaN.
  if is_traced or mean_coefficient:
    average = jnp.mean(losses.astype(reduced.dtype))
    reduced = reduced + jnp.asarray(mean_coefficient, reduced.dtype) * average
  return _narrowed(reduced, losses)


def _narrowed(value, losses):
  """`value` in the type of the losses, unless they are integers."""
  is_float = jnp.issubdtype(losses.dtype, jnp.inexact)
  return value.astype(losses.dtype) if is_float else value


def worst(
  losses: base.Array,
  groups: base.Array,
  num_groups: int,
  *,
  temperature: float = 0.0,
) -> base.Array:
  """Largest mean loss among the groups that have a member.

  Args:
    losses: losses of the exemplars, [M].
    groups: groups of the exemplars, [M].
    num_groups: G.
    temperature: T, may be traced. 0 selects the maximum; groups that tie share its
      gradient. T > 0 selects the smooth maximum T log sum_g exp(L_g / T), which is at
      most T log G larger than the maximum. If a group is split into two groups with
      equal losses, the maximum stays the same, but the smooth maximum grows by up to
      T log 2.

  Returns:
    A scalar; 0 if no group has a member.

  Raises:
    InputError: `temperature` is negative or not finite, or the groups are invalid, see
      `group_means`.

  >>> import jax.numpy as jnp
  >>> print(worst(jnp.array([1., 3., 2.5]), jnp.array([0, 0, 2]), num_groups=3))
  2.5
  """
  num_groups = base.check_integer("num_groups", num_groups)
  temperature = base.setting(temperature)
  is_traced = base.is_traced(temperature)
  if not is_traced and not 0 <= temperature < math.inf:
    raise base.InputError(f"temperature={temperature} must be at least 0, and finite.")
  means, present = _wide_means(losses, groups, num_groups)
  any_present = present.any()
  # Absent groups have -inf, unless all are absent: the maximum must be finite.
  is_used = present | ~any_present
  masked = jnp.where(is_used, means, -jnp.inf)
  exist = _check_exist(groups, num_groups)
  # Temperatures below this number would be flushed to 0.
  tiny = float(jnp.finfo(means.dtype).tiny)
  if not is_traced and temperature < tiny:
    return _narrowed(jnp.where(exist, masked.max(), jnp.nan), losses)
  largest = jax.lax.stop_gradient(masked.max())
  largest = jnp.where(jnp.isfinite(largest), largest, 0)
  given = base.setting(temperature, means.dtype)
  scale: Any = jnp.where(given < tiny, 1, given) if is_traced else float(given)
  # The differences are at most 0, so that their quotients cannot become +infinity.
  # The derivative of -infinity / scale would be NaN.
  quotients = jnp.where(is_used, means - largest, 0) / scale
  exponents = jnp.where(is_used, quotients, -jnp.inf)
  smooth = largest + scale * jax.nn.logsumexp(exponents)
  if is_traced:
    smooth = jnp.where(given < tiny, masked.max(), smooth)
  smooth = jnp.where(exist, jnp.where(any_present, smooth, 0), jnp.nan)
  return _narrowed(smooth, losses)


def soft_tpr(
  probabilities: base.Array,
  groups: base.Array,
  num_groups: int,
  *,
  reduction: str = "mean",
  mean_coefficient: float = 0.0,
  temperature: float = 0.0,
) -> base.Array:
  """`gap` or `worst` of 1 - mean p(label), a differentiable false-negative rate.

  Args:
    probabilities: the model's probabilities of the exemplars' labels, [M]; exp(-loss)
      for the cross-entropy.
    groups: groups of the exemplars, [M].
    num_groups: G.
    reduction: "mean" or "max" over pairs of groups, see `gap`, or "worst", see `worst`.
    mean_coefficient: for "mean" and "max", see `gap`.
    temperature: for "worst", see `worst`.

  Returns:
    A scalar.

  Raises:
    InputError: an argument is invalid, see `gap` and `worst`.
  """
  _check_choice("reduction", reduction, ("mean", "max", "worst"))
  base.check_vector("probabilities", probabilities)
  # In half precision, 1 - p would be rounded.
  misses = 1 - probabilities.astype(base.accumulator_dtype(probabilities.dtype))
  if reduction == "worst":
    value = worst(misses, groups, num_groups, temperature=temperature)
  else:
    value = gap(
      misses,
      groups,
      num_groups,
      reduction=reduction,
      mean_coefficient=mean_coefficient,
    )
  return _narrowed(value, probabilities)


def check_groups(groups: Any, num_groups: int, where: str = "the exemplar set") -> None:
  """Raises InputError unless groups are integers from 0 to G - 1, each with a member.

  Call this function once, on the host, before training: inside `jit`, a group without a
  member is silently ignored, and an unknown group makes the objective NaN.

  Args:
    groups: groups of all exemplars, or of all examples of another set, integers [M].
    num_groups: G.
    where: name of the set for the error message.
  """
  num_groups = base.check_integer("num_groups", num_groups)
  base.refuse_mask(f"groups of {where}", groups)
  array = np.asarray(groups)
  if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
    raise base.InputError(
      f"groups of {where} must be integers of shape [M]; got {array.dtype} of shape"
      f" {array.shape}."
    )
  unknown = np.setdiff1d(array, np.arange(num_groups))
  if unknown.size:
    raise base.InputError(
      f"{where} has group {unknown[0]}, but groups are 0 to {num_groups - 1}: correct"
      " the groups or num_groups."
    )
  absent = np.setdiff1d(np.arange(num_groups), array)
  if absent.size:
    raise base.InputError(
      f"group {absent[0]} has no member in {where} ({absent.size} of {num_groups}"
      " groups have none): add examples of it."
    )


def _check(name, values, groups):
  base.check_vector(name, values)
  groups = base.host_or_jax_array(groups)
  is_integer = jnp.issubdtype(groups.dtype, jnp.integer) or groups.dtype == jnp.bool_
  if groups.shape != values.shape or not is_integer:
    raise base.InputError(
      f"groups must be one integer per exemplar, shape {values.shape}; got"
      f" {groups.shape} of {groups.dtype}."
    )


def _check_exist(groups, num_groups):
  """Whether all groups are in 0 to G - 1; raises InputError outside `jit` if not."""
  numbers = base.wide_integers(groups, num_groups)
  exist = (numbers >= 0) & (numbers < num_groups)
  if not isinstance(exist, jax.core.Tracer) and not exist.all():
    row = int(np.flatnonzero(~np.asarray(exist))[0])
    raise base.InputError(
      f"groups are 0 to {num_groups - 1}; got {int(groups[row])} in row {row}: correct"
      " the groups or num_groups."
    )
  return exist.all()


def _check_choice(name, value, allowed):
  if value not in allowed:
    raise base.InputError(f"{name}={value!r}: choose one of {allowed}.")
