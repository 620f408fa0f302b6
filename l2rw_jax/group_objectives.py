"""Floor 1: example losses and their groups to one fairness objective.

With L_g the mean loss of group g in the batch:

    mean      average loss, whatever the groups
    gap       mean or maximum over pairs of groups of |L_a - L_b|
    worst     max_g L_g, or a smooth maximum
    soft_tpr  either of the last two on 1 - mean p(label) instead of L_g

Equality of opportunity asks for equal true-positive rates (Hardt, Price, Srebro,
arXiv:1610.02413). Those are steps in the parameters; these can be differentiated.
Groups without a member in the batch do not count. M examples, G groups.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base


def group_means(
  values: base.Array, groups: base.Array, num_groups: int
) -> tuple[base.Array, base.Array]:
  """Mean of each group, and whether it has a member.

  Args:
    values: [M].
    groups: group of each example, integers, [M]; 0 .. G - 1.
    num_groups: G.

  Returns:
    Means [G], 0 where a group is absent; presence, bool [G]. All means are NaN if
    a group does not exist, so that the meta loss is, and `finite` False.

  Raises:
    InputError: outside `jit`, a group does not exist; shapes do not agree.
  """
  _check(values, groups)
  exist = _check_exist(groups, num_groups)
  member = groups[:, None] == jnp.arange(num_groups)[None, :]
  counts = member.sum(axis=0)
  # Not a matrix product: it would round on TPU, and spread a NaN to all groups.
  dtype = base.accumulator_dtype(values.dtype)
  totals = jnp.where(member, values.astype(dtype)[:, None], 0).sum(axis=0)
  means = totals / jnp.maximum(counts, 1).astype(dtype)
  if jnp.issubdtype(values.dtype, jnp.inexact):
    means = means.astype(values.dtype)
  return jnp.where(exist, means, jnp.nan), counts > 0


def mean(losses: base.Array) -> base.Array:
  """Average exemplar loss [M] -> scalar, whatever the groups."""
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
  """Difference between the groups' mean losses, over pairs of groups.

  Pairs of which a group has no member do not count; equal groups give a zero
  gradient; with fewer than two groups present the gap is 0.

  Args:
    losses: of the exemplars, [M].
    groups: of the exemplars, [M].
    num_groups: G.
    reduction: "mean" or "max" over pairs; tied pairs share the gradient.
    mean_coefficient: times the mean loss is added.

  Returns:
    A scalar.

  >>> import jax.numpy as jnp
  >>> losses, groups = jnp.array([1., 3., 5.]), jnp.array([0, 0, 2])
  >>> print(gap(losses, groups, num_groups=3))
  3.0
  """
  _choose("reduction", reduction, ("mean", "max"))
  means, present = group_means(losses, groups, num_groups)
  pairs = jnp.triu(present[:, None] & present[None, :], k=1)
  difference = jnp.where(pairs, means[:, None] - means[None, :], 0)
  # Not jnp.abs: its slope at 0 is 1 in JAX, and equal groups shall be left alone.
  gaps = difference * jnp.sign(difference)
  if reduction == "max":
    found = gaps.max()
  else:
    found = gaps.sum() / jnp.maximum(pairs.sum(), 1).astype(gaps.dtype)
  found = jnp.where(_check_exist(groups, num_groups), found, jnp.nan)
  return found + mean_coefficient * jnp.mean(losses)


def worst(
  losses: base.Array,
  groups: base.Array,
  num_groups: int,
  *,
  temperature: float = 0.0,
) -> base.Array:
  """Mean loss of the worst group that has a member.

  Args:
    losses: of the exemplars, [M].
    groups: of the exemplars, [M].
    num_groups: G.
    temperature: T; 0 is the maximum itself, whose gradient tied groups share.
      T > 0 is the smooth maximum T log sum_g exp(L_g / T), at most T log G above
      it. Only the hard maximum stays put when a group is listed twice: the
      smooth one then grows, by up to T log 2.

  Returns:
    A scalar; 0 when no group has a member.

  >>> import jax.numpy as jnp
  >>> print(worst(jnp.array([1., 3., 2.5]), jnp.array([0, 0, 2]), num_groups=3))
  2.5
  """
  if temperature < 0:
    raise base.InputError(f"temperature={temperature} must be at least 0.")
  means, present = group_means(losses, groups, num_groups)
  any_present = present.any()
  # Minus infinity, so that the absent weigh nothing; finite when all are absent.
  lifted = jnp.where(present | ~any_present, means, -jnp.inf)
  exist = _check_exist(groups, num_groups)
  if temperature == 0:
    return jnp.where(exist, lifted.max(), jnp.nan)
  smooth = temperature * jax.nn.logsumexp(lifted / temperature)
  return jnp.where(exist, jnp.where(any_present, smooth, 0), jnp.nan)


def soft_tpr(
  probabilities: base.Array,
  groups: base.Array,
  num_groups: int,
  *,
  reduction: str = "mean",
  mean_coefficient: float = 0.0,
  temperature: float = 0.0,
) -> base.Array:
  """`gap` or `worst` of 1 - mean p(label), a true-positive rate without steps.

  Args:
    probabilities: that the model gives the exemplars' labels, [M]; exp(-loss)
      for cross-entropy.
    groups: of the exemplars, [M].
    num_groups: G.
    reduction: "mean" or "max" over pairs of groups, or "worst".
    mean_coefficient: of "mean" and "max", see `gap`.
    temperature: of "worst", see there.

  Returns:
    A scalar.
  """
  _choose("reduction", reduction, ("mean", "max", "worst"))
  misses = 1 - probabilities
  if reduction == "worst":
    return worst(misses, groups, num_groups, temperature=temperature)
  return gap(
    misses, groups, num_groups, reduction=reduction, mean_coefficient=mean_coefficient
  )


def check_groups(groups: Any, num_groups: int, where: str = "the exemplar set") -> None:
  """Raises InputError unless every group has a member, and only groups do.

  Call it once, on the host, before training: inside `jit` an absent group is
  left out without a word, and an unknown one makes the objective NaN.

  Args:
    groups: of all exemplars, integers [M].
    num_groups: G.
    where: how the message calls them.
  """
  array = np.asarray(groups)
  if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
    raise base.InputError(
      f"groups of {where} must be integers of shape [M]; got {array.dtype} of shape"
      f" {array.shape}."
    )
  unknown = np.setdiff1d(array, np.arange(num_groups))
  if unknown.size:
    raise base.InputError(
      f"{where} has group {unknown[0]}, groups are 0 to {num_groups - 1}: mend the"
      " groups or num_groups."
    )
  absent = np.setdiff1d(np.arange(num_groups), array)
  if absent.size:
    raise base.InputError(
      f"group {absent[0]} has no member in {where} ({absent.size} of {num_groups}"
      " groups have none): add exemplars of it."
    )


def _check(values, groups):
  base.check_vector("losses", values)
  if groups.shape != values.shape:
    raise base.InputError(
      f"groups must be one integer an exemplar, shape {values.shape}; got"
      f" {groups.shape}."
    )


def _check_exist(groups, num_groups):
  """Whether every group is one of 0 .. G - 1; raises outside `jit`."""
  bad = (groups < 0) | (groups >= num_groups)
  exist = ~bad.any()
  if not isinstance(exist, jax.core.Tracer) and not exist:
    row = int(np.flatnonzero(np.asarray(bad))[0])
    raise base.InputError(
      f"groups are 0 to {num_groups - 1}; got {int(groups[row])} in row {row}: correct"
      " the groups or num_groups."
    )
  return exist


def _choose(what, given, allowed):
  if given not in allowed:
    raise base.InputError(f"{what}={given!r}: choose one of {allowed}.")
