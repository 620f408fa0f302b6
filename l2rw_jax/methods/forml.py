"""FORML: persistent example weights for a fairness objective (Yan et al., 2022).

Every training example has a weight w_i that persists for the whole run. Each training
step takes a look-ahead step with the weights of its batch, computes the gradient of a
*fairness* objective F on a held-out exemplar set with known groups, and updates the
weights:

    p'(w)  = p - alpha grad sum_i w_i l_i(p)             w sums to 1 over the batch
    w     <- max(w - eta dF(p'(w))/dw, 0), then normalized to sum to 1
    p     <- optimizer step on grad sum_i w_i l_i(p)     with the new weights

with dF/dw_i = -alpha <grad F(p'), grad l_i(p)>. F is one of `group_objectives`:
`gap`, `worst` or `soft_tpr` of the exemplar losses and their groups, or their
`mean`, which ignores the groups and is L2RW's meta loss.

The abstract of the paper specifies the joint learning of example weights and network, a
held-out set that represents the distribution on which fairness is wanted, equality of
opportunity as the goal, the absence of a weighting network, and the selection of a part
of the data by weight (condensation). No official code is public. The paper's surrogate,
the persistence and normalization of weights, the learning rates and the exemplar sizes
could not be checked. The equations above, all four objectives, the handling of all-zero
weights and the defaults are choices of this library.

`gap` alone is 0 even if all groups are equally *bad*. By default, the mean loss
is therefore added to it (`mean_coefficient` is 1).

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
  """max(w - eta dF/dw, 0), normalized to sum to 1; all zero if none is positive.

  Args:
    weights: weights of this device's examples, [B].
    gradient: dF/dw at these weights, [B].
    weight_learning_rate: eta, the learning rate of weights that sum to 1.
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    Weights [B] whose sum over all devices is 1, or 0.

  Raises:
    InputError: the result does not have shape [B].

  >>> import jax.numpy as jnp
  >>> print(update_weights(jnp.array([.5, .5]), jnp.array([-.5, 2.]), 0.5))
  [1. 0.]
  """
  rate = base.setting(weight_learning_rate, gradient.dtype)
  return normalization.rectify(weights - rate * gradient, axis_name)


class Reweighted(NamedTuple):
  """Result of one weight update.

  Attributes:
    weights: weights after the update, [B]; their sum over all devices is 1, or all are
      0.
    gradient: dF/dw at the normalized weights before the update, [B].
    objective: F at the look-ahead parameters, scalar.
    losses: losses of the training batch, [B].
    finite: False if a loss of either batch, F, a gradient or a weight is NaN or
      infinite; bool scalar.
    zero_slope: whether the look-ahead step ignores the gradient (a learning rate of
      0), see `hypergradient.Direction`; bool scalar.
    fault: the first quantity that is not finite, a `base.Fault`; int32 scalar.
    aux: the auxiliary output of `losses_fn` for `batch`, or None.
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
  """One update of the weights of a batch; the caller stores them between steps.

  Args:
    losses_fn: `(params, batch) -> losses [B]`.
    params: any pytree of parameters.
    batch: the training batch, in the form that `losses_fn` takes.
    meta_batch: the exemplars.
    weights: weights of the batch before the update, [B]: non-negative, on any scale.
    objective: maps the exemplar losses [M] of all devices to F, for instance
      `lambda losses: group_objectives.worst(losses, groups, num_groups)`.
    weight_learning_rate: eta, see `update_weights`.
    inner_learning_rate: alpha, the learning rate of the look-ahead step of plain SGD.
    meta_losses_fn: like `losses_fn`, for `meta_batch`; None is `losses_fn`.
    axis_name: mapped axis over which both batches are sharded.
    has_aux: whether both losses functions return `(losses, aux)`.
    engine: see `linearization.linearize`.

  Returns:
    A `Reweighted`; no gradient flows through its weights.

  Raises:
    InputError: `meta_batch` is None, or an error of `linearization.linearize` or of
      `hypergradient.direction`.
    FloatingPointError: outside `jit`, if a loss, F, a gradient or a weight is not
      finite, or a weight is negative before the update.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, b: (b["x"] @ p - b["y"]) ** 2
    >>> batch = {"x": jnp.eye(2), "y": jnp.array([1., 1.])}
    >>> exemplars = {"x": jnp.eye(2), "y": jnp.array([1., 3.])}
    >>> objective = lambda losses: group_objectives.worst(losses, jnp.arange(2), 2)
    >>> result = example_weights(losses_fn, jnp.zeros(2), batch, exemplars,
    ...     jnp.ones(2), objective, weight_learning_rate=.1, inner_learning_rate=.1)
    >>> print(jnp.round(result.weights, 2), jnp.round(result.objective, 2))
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
  """`example_weights` of a batch that is already linearized at `params`.

  Raises:
    InputError, FloatingPointError: see `example_weights`.
  """
  if meta_batch is None:
    raise base.InputError("meta_batch is None: give the exemplars.")
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.check_finite(
    "training losses", linearized.losses, axis_name, ": check batch and params"
  )
  given, weights = weights, normalization.sum_to_one(weights, axis_name)
  # If one of the given weights is invalid, all normalized ones are NaN.
  base.check_finite(
    "weights",
    jnp.where(given < 0, jnp.inf, jnp.asarray(given).astype(weights.dtype)),
    axis_name,
    " (a negative weight counts as infinite): check the weights before the update",
  )
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_batch,
    base.summed_gradient(linearized, weights, axis_name),
    optimizer=optax.sgd(inner_learning_rate),
    objective=objective,
    has_aux=has_aux,
    axis_name=axis_name,
  )
  gradient = hypergradient.weight_gradient(linearized, direction, axis_name)
  gradient = jax.lax.stop_gradient(gradient).astype(weights.dtype)
  weights = jax.lax.stop_gradient(
    update_weights(weights, gradient, weight_learning_rate, axis_name)
  )
  slopes_finite = base.check_finite("slopes dF/dw", gradient, axis_name)
  slopes_finite &= base.check_finite("weights", weights, axis_name)
  fault = base.lookahead_fault(
    direction.fault, losses_finite=losses_finite, slopes_finite=slopes_finite
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


def objective_settings(objective: str, reduction: str | None = None) -> dict[str, Any]:
  """Default settings of an objective with this reduction.

  Raises:
    InputError: the objective is unknown.
  """
  if objective not in OBJECTIVES:
    raise base.InputError(f"objective={objective!r}: choose one of {OBJECTIVES}.")
  if objective == "mean":
    return {}
  settings = {} if objective == "worst" else {"reduction": reduction or "mean"}
  if objective == "worst" or (objective == "soft_tpr" and reduction == "worst"):
    return settings | {"temperature": 0.0}
  return settings | {"mean_coefficient": 1.0}


def make_objective(
  name: str, **settings: Any
) -> Callable[[base.Array, base.Array, int], base.Array]:
  """Returns the objective `(losses [M], groups [M], num_groups) -> F` of this name.

  Args:
    name: one of `OBJECTIVES`; "soft_tpr" uses exp(-loss) as the probability of the
      label, which is correct for cross-entropy losses.
    **settings: arguments of the function with this name in `group_objectives`; the
      defaults are those of `objective_settings`. `temperature` applies to "worst", and
      to "soft_tpr" with the reduction "worst". `mean_coefficient` applies to objectives
      that are differences between groups.

  Raises:
    InputError: the name is unknown, a setting is out of range, or the objective does
      not have one of the settings.
  """
  known = objective_settings(name, settings.get("reduction"))
  unknown = [setting for setting in settings if setting not in known]
  if unknown:
    listed = "".join(f", {k}={v!r}" for k, v in settings.items())
    raise base.InputError(
      f"objective={name!r}{listed}: it has no {unknown[0]}; leave it out."
    )
  settings = known | settings

  def objective(losses, groups, num_groups):
    if name == "mean":
      return group_objectives.mean(losses)
    values = jnp.exp(-losses) if name == "soft_tpr" else losses
    return getattr(group_objectives, name)(values, groups, num_groups, **settings)

  # Invalid settings are reported here instead of during tracing.
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

  The state contains the weights [N], in units of the uniform weight; all are 1 at
  first. The weights of a batch are gathered by `batch["index"]`, normalized over the
  global batch, updated, and stored again; an index may occur only once in a batch. The
  outer optimizer then updates the network with the new weights. The normalization
  within a batch is a choice of this library; its disadvantage is that the weights of a
  batch that contains only low weights are scaled up to a mean of 1.

  Args:
    weight_learning_rate: eta, the learning rate of weights that sum to 1 over a batch.
      Weights change in proportion to the product eta alpha, which is 0.01 by default.
      On MNIST with batches of 100, a product of 0.02 performed best on held-out images,
      among 0.0004, 0.002, 0.01, 0.02, 0.05 and 0.1 (three seeds).
    objective: one of `OBJECTIVES`.
    num_groups: G; the number of classes if None.
    inner_learning_rate: alpha, the learning rate of the look-ahead step of plain SGD.
    groups_fn: maps the meta batch to groups [M], integers 0 .. G - 1.
    **settings: settings of the objective, see `make_objective`.

  Returns:
    A `base.Method` that needs a meta batch with "group" (unless `objective` is
    "mean" or `groups_fn` reads something else).

  Raises:
    InputError: a setting is out of range, or the objective does not have it; in
      training, the batch has no "index", or the meta batch has no "group" although
      `objective` and `groups_fn` need it.
  """
  for name, value in (
    ("weight_learning_rate", weight_learning_rate),
    ("inner_learning_rate", inner_learning_rate),
  ):
    value = base.setting(value)
    if not base.is_traced(value) and not value >= 0:  # Also refuses NaN.
      raise base.InputError(f"forml: {name}={value} must be at least 0.")
  if num_groups is not None:
    num_groups = base.check_integer("forml: num_groups", num_groups)
  objective_fn = make_objective(objective, **settings)

  def init(key, problem, params):
    del key, params
    return jnp.ones(problem.num_examples)

  def gradients(state, problem, inputs):
    axis_name = problem.axis_name
    linearized = problem.linearize_batch(inputs)
    groups = _groups(groups_fn, inputs.meta_batch, objective, axis_name)
    index = base.entry(inputs.batch, "index", "forml")
    update = reweigh(
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
    grads = base.summed_gradient(linearized, update.weights, axis_name)
    # The state is the same on every device: each one stores the whole global batch.
    stored = update.weights * base.global_size(index.size, axis_name)
    index, stored = (base.unsharded(base.gather(x, axis_name)) for x in (index, stored))
    state = state.at[index].set(stored)
    metrics = {
      "objective": update.objective,
      "rejected": base.pmean(jnp.mean(update.weights == 0), axis_name),
      "direction_finite": update.finite.astype(jnp.float32),
      "zero_slope": update.zero_slope.astype(jnp.float32),
    }
    gradients = base.Gradients(
      grads,
      update.weights,
      update.losses,
      update.aux,
      metrics,
      fault=update.fault,
      zero_slope=update.zero_slope,
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
      f"forml: the meta batch has no {error}, the group of each exemplar, but"
      f" objective={objective!r} needs it: add it, pass groups_fn, or use 'mean'."
    ) from None
  return base.gather(groups, axis_name)
