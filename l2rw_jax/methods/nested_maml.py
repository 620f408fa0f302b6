"""NestedMAML: persistent weights of few-shot tasks, or of their queries.

The loss L_i(p) of training task i is the loss of its query examples after the network
has been adapted to its support examples (`models.few_shot`). Some training tasks are
from another distribution or mislabeled. Clean validation tasks j have losses V_j(p).
One step with a batch of m training tasks and n validation tasks is

    p'  = p - (eta/m) sum_i w_i grad L_i(p)                                  (5)
    w_i <- w_i - gamma d/dw_i (1/n) sum_j V_j(p')                            (8)
    p   <- optimizer step on (1/m) sum_i w_i grad L_i(p), with the new w     (9)

V_j includes adaptation. For one inner step with learning rate alpha, grad V_j(p') is
therefore (I - alpha H_j) times the gradient at the adapted parameters, where H_j is the
Hessian of the support loss; the paper writes this out. Here (8) is computed by one
Jacobian-vector product of the training losses (`hypergradient`), which is exact for any
number of inner steps. The first-order variant, NestedMAML-FO, omits alpha H_j.

The released code takes both gradients of (8) at the adapted parameters (closer to FO),
omits 1/m, bounds weights below by 0, clips the gradient of the weights, and does not
undo the look-ahead step.

Reference: Killamsetty, Li, Zhao, Iyer, Chen, "A Nested Bi-level Optimization
Framework for Robust Few Shot Learning", AAAI 2022 (https://arxiv.org/abs/2011.06782).
The numbers in parentheses above are its equation numbers.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax.linearization import control_flow

SHARES = ("task", "cluster", "item")


def update_weights(
  weights: base.Array,
  gradient: base.Array,
  weight_learning_rate: float | base.Array,
  *,
  clip: float | None = None,
  floor: float = 0.0,
) -> base.Array:
  """max(w - gamma clip(gradient), floor), of any shape.

  Args:
    weights: w.
    gradient: gradient of the validation loss with respect to w, shaped like `weights`.
    weight_learning_rate: gamma.
    clip: largest magnitude of a gradient entry; None does not clip.
    floor: lower bound of the weights; -inf gives equation (8) as printed.

  >>> import jax.numpy as jnp
  >>> print(update_weights(jnp.array([1., 1.]), jnp.array([-.5, 3.]), 0.5))
  [1.25 0.  ]
  """
  weight_learning_rate, clip, floor = (
    base.setting(x, gradient.dtype) for x in (weight_learning_rate, clip, floor)
  )
  if clip is not None:
    gradient = jnp.clip(gradient, -clip, clip)
  return jnp.maximum(weights - weight_learning_rate * gradient, floor)


class WeightGradient(NamedTuple):
  """Gradient of the validation loss with respect to the weights of one batch.

  Attributes:
    gradient: derivative of the validation loss with respect to each weight, [T].
    meta_loss: the validation loss at the look-ahead parameters, scalar.
    losses: losses of the training tasks (or items), [T].
    finite: whether all quantities of the step are finite, see `fault`; bool scalar.
    zero_slope: whether the look-ahead step ignores the gradient (a learning rate of
      0), see `hypergradient.Direction`; bool scalar.
    fault: the first quantity that is not finite, a `base.Fault`; int32 scalar.
    aux: the auxiliary output of `losses_fn` for the batch, or None.
  """

  gradient: base.Array
  meta_loss: base.Array
  losses: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None


def weight_gradient(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  tasks: Any,
  meta_tasks: Any,
  weights: base.Array,
  *,
  lookahead_learning_rate: float,
  meta_losses_fn: base.LossesFn | None = None,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
) -> WeightGradient:
  """The derivative in (8); apply `update_weights` to its `gradient`.

  Args:
    losses_fn: `(params, tasks) -> [T]`, the loss of each task after adaptation to the
      task (`few_shot.adapt`), or of each query of all tasks, flattened.
    params: any pytree of parameters.
    tasks: the training tasks, in the form that `losses_fn` takes.
    meta_tasks: the validation tasks.
    weights: weights of the losses before the update, [T]; 1 is uniform.
    lookahead_learning_rate: eta of the look-ahead step, which is plain SGD.
    meta_losses_fn: like `losses_fn`, for `meta_tasks`; None is `losses_fn`. With
      first-order adaptation this is NestedMAML-FO.
    axis_name: mapped axis over which both sets of tasks are sharded.
    has_aux: whether both losses functions return `(losses, aux)`.

  Raises:
    InputError: `meta_tasks` is None, or an error of `linearization.linearize` or
      `hypergradient.direction`.
    FloatingPointError: outside `jit`, if a loss or a gradient is not finite.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, targets: 0.5 * (p - targets) ** 2
    >>> result = weight_gradient(losses_fn, jnp.zeros(()), jnp.array([1., -1.]),
    ...   jnp.ones(1), jnp.ones(2), lookahead_learning_rate=0.1)
    >>> print(result.gradient, result.meta_loss)
    [-0.05  0.05] 0.5
  """
  linearized = linearization.linearize(
    losses_fn, base.local(params, axis_name), tasks, has_aux=has_aux
  )
  return linearized_weight_gradient(
    linearized,
    meta_losses_fn or losses_fn,
    params,
    meta_tasks,
    weights,
    lookahead_learning_rate=lookahead_learning_rate,
    axis_name=axis_name,
    has_aux=has_aux,
  )


def linearized_weight_gradient(
  linearized: base.Linearized,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_tasks: Any,
  weights: base.Array,
  *,
  lookahead_learning_rate: float,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
) -> WeightGradient:
  """`weight_gradient` of tasks that are already linearized at `params`.

  Raises:
    InputError, FloatingPointError: see `weight_gradient`.
  """
  if meta_tasks is None:
    raise base.InputError("meta_tasks is None: give the validation tasks.")
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.check_finite(
    "training losses", linearized.losses, axis_name, ": check tasks and params"
  )
  size = base.global_size(linearized.losses.size, axis_name)
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_tasks,
    base.summed_gradient(linearized, weights / size, axis_name),
    optimizer=optax.sgd(lookahead_learning_rate),
    has_aux=has_aux,
    axis_name=axis_name,
  )
  gradient = hypergradient.weight_gradient(linearized, direction, axis_name) / size
  # Do not cast to the weights' type: integers would round the gradient to zero.
  dtype = base.common_dtype(weights, linearized.losses)
  gradient = jax.lax.stop_gradient(gradient).astype(dtype)
  fault = base.lookahead_fault(
    direction.fault,
    losses_finite=losses_finite,
    slopes_finite=base.check_finite("slopes dV/dw", gradient, axis_name),
  )
  return WeightGradient(
    gradient=gradient,
    meta_loss=direction.meta_loss,
    losses=linearized.losses,
    finite=fault == 0,
    zero_slope=direction.zero_slope,
    fault=fault,
    aux=linearized.aux,
  )


class State(NamedTuple):
  """State of `nested_maml`.

  Attributes:
    weights: w, [N] per task, [K] per cluster, or [N, Q] per item.
    meta_loss: validation loss at the last update, 0 before the first; scalar.
    finite: `finite` of the last update, see `WeightGradient`; bool scalar.
    zero_slope: `zero_slope` of the last update, see `WeightGradient`; bool scalar.
    fault: `fault` of the last update, see `WeightGradient`; int32 scalar.
  """

  weights: base.Array
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array


def nested_maml(
  weight_learning_rate: float,
  lookahead_learning_rate: float,
  share: str = "task",
  *,
  num_clusters: int | None = None,
  num_items: int | None = None,
  initial: float = 1.0,
  clip: float | None = None,
  floor: float = 0.0,
  meta_forward: Callable[..., Any] | None = None,
  every: int = 1,
) -> base.Method:
  """NestedMAML for the training loop.

  With `models.few_shot.Learner`, the examples of the training loop are tasks. With a
  classifier they are plain examples, whose weights are learned in the same way. A
  weight of 1 is uniform: `initial=1` and `weight_learning_rate=0` give MAML. In the
  released code the weights start at 1 / 200. The same relative step then needs a gamma
  that is 200 times smaller, and an outer optimizer that is invariant to scale, such as
  Adam.

  Args:
    weight_learning_rate: gamma.
    lookahead_learning_rate: eta in (5), a plain SGD step.
    share: the unit that has one weight: a "task" (given by `batch["index"]`), a
      "cluster" of tasks (given by `batch["group"]`), or an "item", a query of a task
      (given by index and position in `label`).
    num_clusters: K, for share "cluster"; groups are 0 to K - 1.
    num_items: Q, the number of labels of a task, for share "item".
    initial: initial weight.
    clip: largest magnitude of an entry of the weight gradient (0.5 per cluster in the
      released code, for gradients without 1/m); None does not clip.
    floor: lower bound of the weights.
    meta_forward: like `base.Problem.forward`, for the validation tasks; the `forward`
      of a learner with `first_order=True` makes this NestedMAML-FO.
    every: number of steps from one update of the weights to the next; 1 in the paper.

  Returns:
    A `base.Method` whose state is a `State`. It needs a meta batch, the validation
    tasks. With items, the `weights` of its gradients are sums over the items of a task.

  Raises:
    InputError: a setting is out of range or does not apply to `share`; when an epoch
      begins, the cluster of a task is not in 0 to K - 1; or, in training, the batch has
      no "index" or "group", or with items its labels are not [T, Q].
  """
  _check_share(share, num_clusters=num_clusters, num_items=num_items)
  for name, value in (
    ("weight_learning_rate", weight_learning_rate),
    ("lookahead_learning_rate", lookahead_learning_rate),
    ("clip", clip),
  ):
    value = base.setting(value)
    is_known = value is not None and not base.is_traced(value)
    if is_known and not value >= 0:  # Also refuses NaN.
      raise base.InputError(f"nested_maml: {name}={value} must be at least 0.")
  initial, floor = base.setting(initial), base.setting(floor)
  if not base.is_traced(initial, floor) and not initial >= floor:
    raise base.InputError(f"nested_maml: initial={initial} is below floor={floor}.")
  every = base.check_integer("nested_maml: every", every)

  def init(key, problem, params):
    del key, params
    shapes = {
      "task": (problem.num_examples,),
      "cluster": (num_clusters,),
      "item": (problem.num_examples, num_items),
    }
    return State(
      jnp.full(shapes[share], initial, jnp.result_type(float)),
      jnp.zeros(()),
      jnp.array(True),
      jnp.array(False),
      jnp.zeros((), jnp.int32),
    )

  def refresh(state, problem, view):
    del problem
    if share == "cluster":
      _check_clusters(view.train["group"], num_clusters)
    return state

  def gradients(state, problem, inputs):
    axis_name = problem.axis_name
    key = "group" if share == "cluster" else "index"
    place = base.entry(inputs.batch, key, "nested_maml")
    losses_fn = None
    if share == "item":
      losses_fn = _item_losses_fn(problem, inputs, num_items)
    linearized = problem.linearize_batch(inputs, losses_fn)
    forward = meta_forward or problem.forward

    def update(state):
      validation = dataclasses.replace(problem, forward=forward)
      result = linearized_weight_gradient(
        linearized,
        validation.meta_losses_fn(inputs.model_state, inputs.key),
        inputs.params,
        inputs.meta_batch,
        base.take(state.weights, place).ravel(),
        lookahead_learning_rate=lookahead_learning_rate,
        axis_name=axis_name,
        has_aux=True,
      )
      gradient = _scatter(state.weights, place, result.gradient, axis_name)
      weights = update_weights(
        state.weights, gradient, weight_learning_rate, clip=clip, floor=floor
      )
      return State(
        weights,
        result.meta_loss.astype(state.meta_loss.dtype),
        result.finite,
        result.zero_slope,
        result.fault,
      )

    if every == 1:
      state = update(state)
    else:
      is_due = inputs.step % every == 0
      state = control_flow.cond(is_due, update, lambda state: state, state)
    size = base.global_size(linearized.losses.size, axis_name)
    weights = base.take(state.weights, place).ravel() / size
    grads = base.summed_gradient(linearized, weights, axis_name)
    metrics = {
      "meta_loss": state.meta_loss,
      "rejected": base.pmean(jnp.mean(weights == 0), axis_name),
      "direction_finite": state.finite.astype(jnp.float32),
      "zero_slope": state.zero_slope.astype(jnp.float32),
    }
    task_shape, losses = (len(place), -1), linearized.losses
    return base.Gradients(
      grads,
      jnp.sum(weights.reshape(task_shape), axis=1),
      jnp.mean(losses.reshape(task_shape), axis=1),
      linearized.aux,
      metrics,
      value=base.psum(jnp.sum(weights * losses.astype(weights.dtype)), axis_name),
      fault=state.fault,
      zero_slope=state.zero_slope,
    ), state

  return base.Method(gradients, init=init, refresh=refresh, needs_meta=True)


def _scatter(weights, place, gradient, axis_name):
  """Sums the gradient entries of a batch that share a weight, shaped like `weights`."""
  gradient = gradient.reshape(place.shape + weights.shape[1:])
  # The state is the same on every device, so each one sums over the global batch.
  place, gradient = (
    base.unsharded(base.gather(x, axis_name)) for x in (place, gradient)
  )
  return jnp.zeros_like(weights).at[place].add(gradient.astype(weights.dtype))


def _item_losses_fn(problem, inputs, num_items):
  """Like `problem.losses_fn`, but with one loss per query, [T * Q], not per task."""

  def losses_fn(params, batch):
    labels = batch["label"]
    if labels.shape[1:] != (num_items,):
      raise base.InputError(
        f"nested_maml: share='item' with num_items={num_items} needs labels of shape"
        f" [T, {num_items}]; got {labels.shape}."
      )
    logits, state = problem.forward(params, inputs.model_state, batch, inputs.key, True)
    logits = logits.reshape(-1, 1, logits.shape[-1])
    return problem.loss(logits, {**batch, "label": labels.reshape(-1, 1)}), state

  return losses_fn


def _check_clusters(groups, num_clusters):
  smallest, largest = np.min(groups), np.max(groups)
  if np.ndim(groups) != 1 or smallest < 0 or largest >= num_clusters:
    raise base.InputError(
      f"nested_maml: clusters must be one number per task, 0 to {num_clusters - 1}; got"
      f" shape {np.shape(groups)} with {smallest} to {largest}: correct `group` or"
      " num_clusters."
    )


def _check_share(share, *, num_clusters, num_items):
  if share not in SHARES:
    raise base.InputError(f"nested_maml: share={share!r}: choose one of {SHARES}.")
  for unit, name, number in (
    ("cluster", "num_clusters", num_clusters),
    ("item", "num_items", num_items),
  ):
    if (share == unit) != (number is not None and number >= 1):
      raise base.InputError(
        f"nested_maml: share={share!r} with {name}={number}: share={unit!r} requires"
        f" a number of at least 1, and other values of share do not accept {name}."
      )
