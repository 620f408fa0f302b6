"""FORML: persistent example weights that serve a fairness objective (Yan et al.).

Every training example keeps a weight w_i for the whole run. A step looks ahead
with the weights of its batch, asks how a *fairness* objective of a held-out
exemplar set with group membership feels them, and moves them:

    p'(w)  = p - alpha grad sum_i w_i l_i(p)             sum over the batch of w = 1
    w     <- max(w - eta dF(p'(w))/dw, 0), then made to sum to 1 again
    p     <- optimizer step on grad sum_i w_i l_i(p)     with the new weights

with dF/dw_i = -alpha <grad F(p'), grad l_i(p)>. F is one of `group_objectives`:
`gap`, `worst` or `soft_tpr` of the exemplar losses and their groups, or their
`mean`, which ignores the groups and is L2RW's meta loss.

What is the paper's and what is ours: from the paper's abstract come the joint
learning of sample weights and network, a user's held-out set that represents
the distribution on which fairness is wanted, equality of opportunity as the
goal, no weighting network, and data condensation by weight. No official code is
public and its surrogate, persistence and normalization of weights, learning
rates and exemplar sizes could not be checked. The equations above, all four
objectives, the zero guard and the defaults are this library's construction.

A pure `gap` is at its minimum when every group is equally *bad*; here it has a
`mean_coefficient` of 1 unless told otherwise.

References:
  Yan, Seto, Apostoloff, "FORML: Learning to Reweight Data for Fairness", DataPerf
  workshop at ICML 2022, arXiv:2202.01719.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import group_objectives
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import normalization


def update_weights(
  weights: base.Array,
  gradient: base.Array,
  weight_learning_rate: float,
  axis_name: base.AxisName = None,
) -> base.Array:
  """max(w - eta dF/dw, 0), made to sum to 1; all zero if nothing is left.

  Args:
    weights: of this device's examples, [B].
    gradient: dF/dw at these weights, [B].
    weight_learning_rate: eta, in units of weight (1 / B is uniform) per dF/dw.
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    Weights [B] whose sum over all devices is 1, or 0.

  >>> import jax.numpy as jnp
  >>> print(update_weights(jnp.array([.5, .5]), jnp.array([-.5, 2.]), 0.5))
  [1. 0.]
  """
  return normalization.rectify(weights - weight_learning_rate * gradient, axis_name)


class Reweighted(NamedTuple):
  """FORML's verdict on one batch.

  Attributes:
    weights: after the update, summing to 1 over all devices, or all 0; [B].
    gradient: dF/dw at the weights before it (normalized), [B].
    objective: F at the look-ahead, scalar.
    losses: the batch's own losses, [B].
    finite: False if a loss of either batch, F, a gradient or a weight was NaN or
      infinite; bool scalar.
    zero_slope: whether the look-ahead step ignores the gradient (a rate of 0), see
      `hypergradient.Direction`; bool scalar.
    fault: which was not finite first, a `base.Fault`; int32 scalar.
    aux: what `losses_fn` returned in addition to the losses of `batch`, else None.
  """

  weights: base.Array
  gradient: base.Array
  objective: base.Array
  losses: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None


def example_weights(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  meta_batch: Any,
  weights: base.Array,
  objective: hypergradient.Objective,
  *,
  weight_learning_rate: float,
  inner_learning_rate: float,
  meta_losses_fn: base.LossesFn | None = None,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
  engine: str = "auto",
) -> Reweighted:
  """One update of the weights of a batch; keep them per example between steps.

  Args:
    losses_fn: `(params, batch) -> losses [B]`.
    params: any pytree of parameters.
    batch: the examples to weigh, as `losses_fn` takes them.
    meta_batch: the exemplars.
    weights: of the batch so far, of any positive scale, [B].
    objective: exemplar losses [M] (of all devices) -> F, for instance
      `lambda losses: group_objectives.worst(losses, groups, num_groups)`.
    weight_learning_rate: eta, see `update_weights`.
    inner_learning_rate: alpha, of the look-ahead by plain SGD.
    meta_losses_fn: like `losses_fn`, for `meta_batch`, if it differs.
    axis_name: mapped axis over which both batches are sharded.
    has_aux: both losses functions return `(losses, aux)`.
    engine: see `linearization.linearize`.

  Returns:
    A `Reweighted`; no gradient flows through its weights.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, b: (b["x"] @ p - b["y"]) ** 2
    >>> batch = {"x": jnp.eye(2), "y": jnp.array([1., 1.])}
    >>> exemplars = {"x": jnp.eye(2), "y": jnp.array([1., 3.])}
    >>> objective = lambda losses: group_objectives.worst(losses, jnp.arange(2), 2)
    >>> found = example_weights(losses_fn, jnp.zeros(2), batch, exemplars,
    ...     jnp.ones(2), objective, weight_learning_rate=.1, inner_learning_rate=.1)
    >>> print(jnp.round(found.weights, 2), jnp.round(found.objective, 2))
    [0.45 0.55] 8.41
  """
  linearized = linearization.linearize(
    losses_fn,
    base.local(params, axis_name),
    batch,
    has_aux=has_aux,
    engine=engine,
  )
  return reweigh(
    linearized,
    meta_losses_fn or losses_fn,
    params,
    meta_batch,
    weights,
    objective,
    weight_learning_rate=weight_learning_rate,
    inner_learning_rate=inner_learning_rate,
    axis_name=axis_name,
    has_aux=has_aux,
  )


def reweigh(
  linearized: base.Linearized,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  weights: base.Array,
  objective: hypergradient.Objective,
  *,
  weight_learning_rate: float,
  inner_learning_rate: float,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
) -> Reweighted:
  """`example_weights` of a batch that is already linearized at `params`."""
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.finite_rows(
    "training losses", linearized.losses, axis_name, ": check batch and params"
  )
  optimizer = optax.sgd(inner_learning_rate)
  weights = normalization.sum_to_one(weights, axis_name)
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_batch,
    base.psum(linearized.weighted_gradient(weights), axis_name),
    optimizer=optimizer,
    opt_state=hypergradient.init_optimizer(optimizer, params),
    objective=objective,
    has_aux=has_aux,
    axis_name=axis_name,
  )
  gradient = hypergradient.weight_gradient(linearized, direction, axis_name)
  gradient = jax.lax.stop_gradient(gradient).astype(weights.dtype)
  weights = jax.lax.stop_gradient(
    update_weights(weights, gradient, weight_learning_rate, axis_name)
  )
  slopes_finite = base.finite_rows("slopes dF/dw", gradient, axis_name)
  slopes_finite &= base.finite_rows("weights", weights, axis_name)
  fault = base.first_fault(
    direction.fault, training_losses=losses_finite, slopes=slopes_finite
  )
  return Reweighted(
    weights=weights,
    gradient=gradient,
    objective=direction.meta_loss,
    losses=linearized.losses,
    finite=fault == 0,
    zero_slope=direction.zero_slope,
    fault=fault,
    aux=linearized.aux,
  )


OBJECTIVES = ("mean", "gap", "worst", "soft_tpr")


def settings_of(objective: str, reduction: str | None = None) -> dict[str, Any]:
  """The settings that an objective with this reduction has, at their defaults.

  Raises:
    InputError: an unknown objective.
  """
  if objective not in OBJECTIVES:
    raise base.InputError(f"objective={objective!r}: choose one of {OBJECTIVES}.")
  if objective == "mean":
    return {}
  found = {} if objective == "worst" else {"reduction": reduction or "mean"}
  if objective == "worst" or (objective == "soft_tpr" and reduction == "worst"):
    return found | {"temperature": 0.0}
  return found | {"mean_coefficient": 1.0}


def make_objective(
  name: str, **settings: Any
) -> Callable[[base.Array, base.Array, int], base.Array]:
  """`(losses [M], groups [M], num_groups) -> F` by its name.

  Args:
    name: one of `OBJECTIVES`; "soft_tpr" takes exp(-loss) for the probability of
      the label, which is right for cross-entropy losses.
    **settings: of the function of that name in `group_objectives`; what is left out
      is as in `settings_of`. A `temperature` goes with "worst" and with "soft_tpr"
      of reduction "worst", a `mean_coefficient` with the differences of groups.

  Raises:
    InputError: an unknown name, a setting out of range, or one that this objective
      does not have.
  """
  known = settings_of(name, settings.get("reduction"))
  unknown = [setting for setting in settings if setting not in known]
  if unknown:
    given = "".join(f", {k}={v!r}" for k, v in settings.items())
    raise base.InputError(
      f"objective={name!r}{given}: it has no {unknown[0]}; leave it out."
    )
  settings = known | settings

  def objective(losses, groups, num_groups):
    if name == "mean":
      return group_objectives.mean(losses)
    values = jnp.exp(-losses) if name == "soft_tpr" else losses
    return getattr(group_objectives, name)(values, groups, num_groups, **settings)

  # Settings that do not fit show here, not in the middle of a trace.
  jax.eval_shape(lambda x: objective(x, jnp.zeros(1, int), 1), jnp.zeros(1))
  return objective


def forml(
  weight_learning_rate: float = 0.1,
  objective: str = "gap",
  num_groups: int | None = None,
  *,
  inner_learning_rate: float = 0.1,
  groups_fn: Callable[[base.Batch], base.Array] = lambda batch: batch["group"],
  **settings: Any,
) -> base.Method:
  """FORML for the training loop.

  State: weights [N] in units in which uniform is 1, where they start. A batch's
  weights are gathered by `batch["index"]`, normalized over the global batch,
  updated, and stored again; an index may occur once in a batch. As the paper's sums
  are over all examples, note what normalizing a batch costs (it is ours): a batch
  of low weights alone is lifted to a mean of 1. The network's own
  step is the outer optimizer's, on the updated weights.

  Args:
    weight_learning_rate: eta, in units of weight (sum 1 over the batch) per dF/dw.
      What moves a weight is the product eta alpha: on MNIST in batches of 100,
      products of 0.01 (the default) and 0.02 did best among 0.0004 to 0.1.
    objective: one of `OBJECTIVES`; see the module for what is ours.
    num_groups: G; the number of classes if None.
    inner_learning_rate: alpha, of the look-ahead by plain SGD.
    groups_fn: meta batch -> groups [M] of 0 .. G - 1.
    **settings: of the objective, see `make_objective`.

  Returns:
    A `base.Method` that needs a meta batch with "group" (unless `objective` is
    "mean" or `groups_fn` reads something else).

  Raises:
    InputError: a setting out of range, or one that the objective does not have.
  """
  for name, value in (
    ("weight_learning_rate", weight_learning_rate),
    ("inner_learning_rate", inner_learning_rate),
  ):
    if not value >= 0:  # Nor NaN.
      raise base.InputError(f"forml: {name}={value} must be at least 0.")
  objective_fn = make_objective(objective, **settings)

  def init(key, problem, params):
    del key, params
    return jnp.ones(problem.num_examples)

  def gradients(state, problem, inputs):
    axis_name = problem.axis_name
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    linearized = problem.linearize(
      losses_fn, base.local(inputs.params, axis_name), inputs.batch, has_aux=True
    )
    groups = _groups(groups_fn, inputs.meta_batch, objective, axis_name)
    index = inputs.batch["index"]
    found = reweigh(
      linearized,
      problem.meta_losses_fn(inputs.model_state, inputs.key),
      inputs.params,
      inputs.meta_batch,
      base.take(state, index),
      lambda losses: objective_fn(losses, groups, num_groups or problem.num_classes),
      weight_learning_rate=weight_learning_rate,
      inner_learning_rate=inner_learning_rate,
      axis_name=axis_name,
      has_aux=True,
    )
    grads = base.psum(linearized.weighted_gradient(found.weights), axis_name)
    # The state is the same on every device: each notes the whole global batch.
    stored = found.weights * base.global_size(index.size, axis_name)
    index, stored = (base.unsharded(base.gather(x, axis_name)) for x in (index, stored))
    state = state.at[index].set(stored)
    metrics = {
      "objective": found.objective,
      "rejected": base.pmean(jnp.mean(found.weights == 0), axis_name),
      "direction_finite": found.finite.astype(jnp.float32),
      "zero_slope": found.zero_slope.astype(jnp.float32),
    }
    gradients = base.Gradients(
      grads,
      found.weights,
      found.losses,
      found.aux,
      metrics,
      fault=found.fault,
      zero_slope=found.zero_slope,
    )
    return gradients, state

  return base.Method(gradients, init=init, needs_meta=True)


def _groups(groups_fn, meta_batch, objective, axis_name):
  if objective == "mean":
    return None
  try:
    groups = groups_fn(meta_batch)
  except KeyError as error:
    raise base.InputError(
      f"forml: the meta batch has no {error}, the group of each exemplar, which"
      f" objective={objective!r} needs: add it, pass groups_fn, or use 'mean'."
    ) from None
  return base.gather(groups, axis_name)
