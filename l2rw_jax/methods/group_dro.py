r"""Group DRO: groups with large losses get large weights (Sagawa et al., 2020).

Training minimizes, over the parameters p, the largest of the groups' mean losses
L_g(p). Each step updates a distribution q over the groups by exponentiated gradient
ascent, then the network by gradient descent on the q-weighted loss.

    q_g <- q_g exp(eta L_g) / Z     for groups g in the batch, with mean loss L_g there
    w_i  = q_g / n_g                for each of the n_g examples i of g in the batch

Then sum_i w_i l_i = sum_g q_g L_g. With eta = 0 and uniform q, this is the mean of
the groups' means if every group is in the batch.

Groups that are absent from a batch keep their q, except for the division by Z, and
contribute nothing to the sum: the sum of the weights is the sum of q over the groups in
the batch, at most 1. This generalizes the paper's step, which uses one group at a
time and multiplies its gradient by q_g. If the weights were rescaled to sum to 1, the
groups in the batch would gain the weight of groups that are never sampled. Without
rescaling, however, the influence of a rare group depends on how often it is sampled.
The paper's algorithm draws all groups equally often; if the groups are the classes,
`baselines.resampling` draws batches in this way.

Differences from the released code: this module stores log q instead of q and computes
it relative to the worst group, so that large losses do not overflow and a q below the
smallest float can grow again. The released code also adds the size adjustment
C / sqrt(N_g) to absent groups, where N_g is the number of training examples of group g;
here, as in the paper's algorithm, q of an absent group is only divided by Z. The
released options that normalize the groups' losses or select groups greedily (`btl`) are
left out.

References:
  Sagawa, Koh, Hashimoto, Liang, "Distributionally Robust Neural Networks for Group
  Shifts: On the Importance of Regularization for Worst-Case Generalization", ICLR
  2020, arXiv:1911.08731, algorithm 1 and section 3.3 (adjustments).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import group_objectives
from l2rw_jax import losses as losses_lib
from l2rw_jax import weighted_update


def example_weights(
  losses: base.Array,
  groups: base.Array,
  log_q: base.Array,
  step_size: float | base.Array,
  *,
  adjustments: float | base.Array = 0.0,
  axis_name: base.AxisName = None,
) -> tuple[base.Array, base.Array]:
  """Weights of a batch, and log q after an ascent step on its losses.

  Args:
    losses: losses of this device's examples, [B].
    groups: groups of these examples, integers 0 .. G - 1, [B]. Under `jit`, an example
      whose group does not exist gets a NaN weight and does not affect the others.
    log_q: log q before this batch, [G]; any constant offset is removed.
    step_size: eta, per unit of loss, at least 0; may be traced.
    adjustments: numbers that are added to the mean loss of each group before q is
      updated, a scalar or [G]; in the paper, C / sqrt(training examples of the group).
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    Weights [B], which are constant under differentiation, and log q [G], which is the
    same on every device. The sum of the weights over all devices is the sum of q over
    the groups in the batch. A NaN loss makes all weights NaN.

  Raises:
    InputError: the losses are not floating-point numbers of shape [B], the groups are
      not integers of this shape, log_q does not have shape [G], or adjustments neither
      have shape [G] nor are a scalar; unless traced, a group does not exist or the step
      size is out of range.

  >>> import jax.numpy as jnp
  >>> losses, groups = jnp.array([0., 2., 2.]), jnp.array([0, 0, 1])
  >>> weights, log_q = example_weights(losses, groups, jnp.zeros(3), jnp.log(2))
  >>> print(jnp.round(7 * weights), jnp.round(7 * jnp.exp(log_q)))
  [1. 1. 4.] [2. 4. 1.]
  """
  log_q = jnp.asarray(log_q)
  _check_shapes(losses, groups, log_q, adjustments)
  _check_setting("step_size", step_size)
  dtype = base.accumulator_dtype(log_q.dtype)
  # Stop gradients before the collectives, which must not be differentiated.
  values, log_q, step_size, adjustments = (
    jax.lax.stop_gradient(jnp.asarray(x, dtype))
    for x in (losses, log_q, step_size, adjustments)
  )
  members = losses_lib.label_mask(groups, log_q.shape[0])
  _check_members(members)
  counts = base.psum(members.sum(axis=0), axis_name)
  sizes = jnp.maximum(counts, 1).astype(dtype)[None, :]
  # Divide before summing, so that large losses do not overflow. A matrix product would
  # be rounded to bfloat16 on TPU.
  parts = jnp.where(members, values[:, None] / sizes, 0).sum(axis=0)
  means = base.psum(parts, axis_name)
  log_q = _ascend(log_q, step_size, means + adjustments, counts > 0)
  weights = jnp.where(members, jnp.exp(log_q)[None, :] / sizes, 0).sum(axis=1)
  weights = weights * losses_lib.label_scale(members).astype(dtype)
  return weights.astype(losses.dtype), log_q


def _ascend(log_q, step_size, group_losses, present):
  """log q [G] after an ascent step on the losses [G] of the groups in the batch."""
  group_losses = jnp.where(present, group_losses, 0)
  limit = jnp.finfo(log_q.dtype).max / 4  # Twice the limit does not overflow.
  increase = step_size * jnp.maximum(group_losses - group_losses.max(), -limit)
  return jax.nn.log_softmax(jnp.maximum(log_q + increase, -limit))


class State(NamedTuple):
  """State of `group_dro`.

  Attributes:
    log_q: log q, float32 [G], at first the logarithm of the uniform distribution.
    adjustments: C / sqrt(N_g), float32 [G]; 0 until the first `refresh`.
  """

  log_q: base.Array
  adjustments: base.Array


def group_dro(
  num_groups: int | None = None,
  step_size: float = 0.01,
  key: str = "label",
  *,
  adjustment: float = 0.0,
) -> base.Method:
  """Group DRO for the training loop.

  The paper combines it with strong weight decay or early stopping: once a network fits
  every example, no group has a larger loss than the others.

  Args:
    num_groups: G; the number of classes if None.
    step_size: eta, per unit of loss, at least 0. The default is that of the released
      code.
    key: the entry of a training batch that contains the groups, such as "label" or
      "group". Warning: the library's data sets without an attribute store the *true*
      class in "group", which a method for wrong labels must not use.
    adjustment: C in C / sqrt(N_g), at least 0. A larger C favors small groups. The
      default of the released code is 0.

  Returns:
    A `base.Method` whose state is a `State`; it logs the largest q and the sum of
    the weights. Before the first epoch it checks the groups of the training set.

  Raises:
    InputError: a setting is out of range; in training, the batch has no `key`, or the
      groups of the training set are not integers 0 .. G - 1 that all occur.
  """
  _check_setting("step_size", step_size)
  _check_setting("adjustment", adjustment)
  if num_groups is not None:
    num_groups = base.check_integer("group_dro: num_groups", num_groups)

  def init(rng_key, problem, params):
    del rng_key, params
    size = num_groups or problem.num_classes
    log_q = jnp.full(size, -np.log(size), jnp.float32)
    return State(log_q, jnp.zeros(size, jnp.float32))

  def gradients(state, problem, inputs):
    groups = _groups(inputs.batch, key)
    gradients, log_q = weighted_update.weighted_gradients(
      problem,
      inputs,
      lambda losses: example_weights(
        losses,
        groups,
        state.log_q,
        step_size,
        adjustments=state.adjustments,
        axis_name=problem.axis_name,
      ),
      has_aux=True,
    )
    metrics = {
      "largest_q": jnp.exp(log_q.max()),
      "total_weight": base.psum(jnp.sum(gradients.weights), problem.axis_name),
    }
    return gradients._replace(metrics=metrics), state._replace(log_q=log_q)

  def refresh(state, problem, view):
    del problem
    if view.epoch:
      return state
    groups, size = np.asarray(_groups(view.train, key)), state.log_q.shape[0]
    group_objectives.check_groups(groups, size, "the training set")
    counts = np.bincount(groups, minlength=size)
    return state._replace(
      adjustments=jnp.asarray(adjustment / np.sqrt(counts), jnp.float32)
    )

  return base.Method(gradients, init=init, refresh=refresh)


def _check_shapes(losses, groups, log_q, adjustments):
  base.check_losses("losses", losses)
  if np.shape(groups) != losses.shape:
    raise base.InputError(
      f"group_dro: groups must be one integer per example, shape {losses.shape}; got"
      f" {np.shape(groups)}."
    )
  if log_q.ndim != 1:
    raise base.InputError(
      f"group_dro: log_q must be one number per group, shape [G]; got {log_q.shape}."
    )
  if np.shape(adjustments) not in ((), log_q.shape):
    raise base.InputError(
      "group_dro: adjustments must be a scalar or one number per group, shape"
      f" {log_q.shape}; got {np.shape(adjustments)}."
    )


def _check_members(members):
  exist = members.any(axis=1)
  if not isinstance(exist, jax.core.Tracer) and not exist.all():
    raise base.InputError(
      f"group_dro: the group of row {jnp.argmin(exist)} does not exist; groups are 0 to"
      f" {members.shape[1] - 1}."
    )


def _check_setting(name, value):
  value = base.setting(value)
  if not base.is_traced(value) and not 0 <= value < np.inf:
    raise base.InputError(f"group_dro: {name}={value} must be at least 0, and finite.")


def _groups(batch, key):
  if key not in batch:
    raise base.InputError(
      f"group_dro: the training batch has no {key!r}, the group of each example. It has"
      f" {sorted(batch)}: choose another key."
    )
  return batch[key]
