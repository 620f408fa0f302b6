"""NestedMAML: persistent weights of few-shot tasks, or of their queries.

Training tasks i have losses L_i(p) (of their queries, once the network has adapted
itself to their supports: `models.few_shot`), some of them are from another
distribution or mislabeled, and clean validation tasks have losses V_j(p). One step,
with m and n of them at hand:

    p'  = p - (eta/m) sum_i w_i grad L_i(p)                                  (5)
    w_i <- w_i - gamma d/dw_i (1/n) sum_j V_j(p')                            (8)
    p   <- optimizer step on (1/m) sum_i w_i grad L_i(p), with the new w     (9)

V_j adapts too, so that grad V_j(p') = (I - alpha H_j) times the gradient at the adapted
parameters, as the paper writes it out; here (8) is one Jacobian-vector product of the
training losses (`hypergradient`), exact through any number of inner steps. The
first-order variant, NestedMAML-FO, drops alpha H_j.

The released code takes both gradients of (8) at the adapted parameters (closer to
FO), leaves 1/m out, floors weights at 0, clips slopes, and leaves the look-ahead in p.

Reference: Killamsetty, Li, Zhao, Iyer, Chen, "A Nested Bi-level Optimization
Framework for Robust Few Shot Learning", AAAI 2022 (https://arxiv.org/abs/2011.06782),
the equations above by their numbers.
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
from l2rw_jax import meta_network

SHARES = ("task", "cluster", "item")


def update_weights(
  weights: base.Array,
  gradient: base.Array,
  weight_learning_rate: float,
  *,
  clip: float | None = None,
  floor: float = 0.0,
) -> base.Array:
  """max(w - gamma clip(gradient), floor), of any shape.

  Args:
    weights: w.
    gradient: of the validation loss in w, shaped like `weights`.
    weight_learning_rate: gamma.
    clip: largest magnitude of a slope; None for any.
    floor: least weight; -inf leaves (8) as it is printed.

  >>> import jax.numpy as jnp
  >>> print(update_weights(jnp.array([1., 1.]), jnp.array([-.5, 3.]), 0.5))
  [1.25 0.  ]
  """
  if clip is not None:
    gradient = jnp.clip(gradient, -clip, clip)
  return jnp.maximum(weights - weight_learning_rate * gradient, floor)


class Slopes(NamedTuple):
  """What the validation tasks say of the weights of one batch.

  Attributes:
    gradient: derivative of the validation loss in each weight, [T].
    meta_loss: the validation loss at the look-ahead, scalar.
    losses: of the training tasks (or items), [T].
    finite: False if a loss of either set or the gradient holds a NaN or an infinity;
      bool scalar.
    zero_slope: whether the look-ahead step ignores the gradient (a rate of 0), see
      `hypergradient.Direction`; bool scalar.
    fault: which was not finite first, a `base.Fault`; int32 scalar.
    aux: what `losses_fn` returned in addition to the losses of the batch, else None.
  """

  gradient: base.Array
  meta_loss: base.Array
  losses: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None


def task_slopes(
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
) -> Slopes:
  """The derivative in (8); `update_weights` does the rest.

  Args:
    losses_fn: `(params, tasks) -> [T]`, the loss of each task after it has been
      adapted to (`few_shot.adapt`), or of each query of all tasks, flattened.
    params: any pytree of parameters.
    tasks: the training tasks, as `losses_fn` takes them.
    meta_tasks: the validation tasks.
    weights: of the losses so far, [T]; 1 is uniform.
    lookahead_learning_rate: eta of the look-ahead by plain SGD.
    meta_losses_fn: like `losses_fn`, for `meta_tasks`: one that adapts to first
      order makes this NestedMAML-FO.
    axis_name: mapped axis over which both are sharded.
    has_aux: both losses functions return `(losses, aux)`.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, targets: 0.5 * (p - targets) ** 2
    >>> found = task_slopes(losses_fn, jnp.zeros(()), jnp.array([1., -1.]),
    ...   jnp.ones(1), jnp.ones(2), lookahead_learning_rate=0.1)
    >>> print(found.gradient, found.meta_loss)
    [-0.05  0.05] 0.5
  """
  linearized = linearization.linearize(
    losses_fn, base.local(params, axis_name), tasks, has_aux=has_aux
  )
  return slopes(
    linearized,
    meta_losses_fn or losses_fn,
    params,
    meta_tasks,
    weights,
    lookahead_learning_rate=lookahead_learning_rate,
    axis_name=axis_name,
    has_aux=has_aux,
  )


def slopes(
  linearized: base.Linearized,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_tasks: Any,
  weights: base.Array,
  *,
  lookahead_learning_rate: float,
  axis_name: base.AxisName = None,
  has_aux: bool = False,
) -> Slopes:
  """`task_slopes` of tasks that are already linearized at `params`."""
  base.check_losses("losses_fn's result", linearized.losses)
  losses_finite = base.finite_rows(
    "training losses", linearized.losses, axis_name, ": check tasks and params"
  )
  optimizer = optax.sgd(lookahead_learning_rate)
  size = base.global_size(linearized.losses.size, axis_name)
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_tasks,
    base.psum(linearized.weighted_gradient(weights / size), axis_name),
    optimizer=optimizer,
    opt_state=hypergradient.init_optimizer(optimizer, params),
    has_aux=has_aux,
    axis_name=axis_name,
  )
  gradient = hypergradient.weight_gradient(linearized, direction, axis_name) / size
  gradient = jax.lax.stop_gradient(gradient).astype(weights.dtype)
  fault = base.first_fault(
    direction.fault,
    training_losses=losses_finite,
    slopes=base.finite_rows("slopes dV/dw", gradient, axis_name),
  )
  return Slopes(
    gradient=gradient,
    meta_loss=direction.meta_loss,
    losses=linearized.losses,
    finite=fault == 0,
    zero_slope=direction.zero_slope,
    fault=fault,
    aux=linearized.aux,
  )


class State(NamedTuple):
  """What NestedMAML carries.

  Attributes:
    weights: w, [N] per task, [K] per cluster, or [N, Q] per item.
    told: validation loss of the last update, and whether it was finite, [2].
    zero_slope: of that update, see `Slopes`; bool scalar.
    fault: of that update, see `Slopes`; int32 scalar.
  """

  weights: base.Array
  told: base.Array
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
  """NestedMAML for the training loop; the model says what a task is.

  With `models.few_shot.Learner` examples are tasks; with a classifier they are
  examples, and this weighs those. A weight of 1 is uniform: `initial=1` and
  `weight_learning_rate=0` is MAML. The released weights start at 1 / 200, where the
  same relative step takes a gamma 200 times smaller, and an outer optimizer that is
  indifferent to scale, such as Adam.

  Args:
    weight_learning_rate: gamma.
    lookahead_learning_rate: eta of (5), a plain SGD step.
    share: whose weight it is: "task" by `batch["index"]`, "cluster" by
      `batch["group"]`, "item" (a query of a task) by index and place in `label`.
    num_clusters: K of share "cluster"; groups are 0 to K - 1.
    num_items: Q of share "item", labels of a task.
    initial: weight at the start.
    clip: largest magnitude of a slope (0.5 per cluster in the released code, of
      slopes without the 1/m); None for any.
    floor: least weight.
    meta_forward: like `base.Problem.forward`, for the validation tasks: that of a
      learner with `first_order=True` makes this NestedMAML-FO.
    every: steps between two updates of the weights; 1 in the paper.

  Returns:
    A `base.Method` that needs a meta batch: the validation tasks. With items, the
    `weights` of its gradients are the sums over the items of each task.

  Raises:
    InputError: a setting out of range, or one that `share` does not have; before an
      epoch, clusters that are not 0 to K - 1.
  """
  _check(locals())

  def init(key, problem, params):
    del key, params
    shapes = {
      "task": (problem.num_examples,),
      "cluster": (num_clusters,),
      "item": (problem.num_examples, num_items),
    }
    return State(
      jnp.full(shapes[share], initial),
      jnp.array([0.0, 1.0]),
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
    place = inputs.batch["group" if share == "cluster" else "index"]
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    if share == "item":
      losses_fn = _item_losses_fn(problem, inputs, num_items)
    linearized = problem.linearize(
      losses_fn, base.local(inputs.params, axis_name), inputs.batch, has_aux=True
    )
    forward = meta_forward or problem.forward

    def update(state):
      validation = dataclasses.replace(problem, forward=forward)
      found = slopes(
        linearized,
        validation.meta_losses_fn(inputs.model_state, inputs.key),
        inputs.params,
        inputs.meta_batch,
        base.take(state.weights, place).ravel(),
        lookahead_learning_rate=lookahead_learning_rate,
        axis_name=axis_name,
        has_aux=True,
      )
      table = _table(state.weights, place, found.gradient, axis_name)
      weights = update_weights(
        state.weights, table, weight_learning_rate, clip=clip, floor=floor
      )
      dtype = state.told.dtype
      told = jnp.stack([found.meta_loss.astype(dtype), found.finite.astype(dtype)])
      return State(weights, told, found.zero_slope, found.fault)

    due = inputs.step % every == 0
    state = (
      update(state) if every == 1 else jax.lax.cond(due, update, lambda s: s, state)
    )
    size = base.global_size(linearized.losses.size, axis_name)
    weights = base.take(state.weights, place).ravel() / size
    grads = base.psum(linearized.weighted_gradient(weights), axis_name)
    metrics = {
      "meta_loss": state.told[0],
      "rejected": base.pmean(jnp.mean(weights == 0), axis_name),
      "direction_finite": state.told[1],
      "zero_slope": state.zero_slope.astype(jnp.float32),
    }
    by_task = (len(place), -1)
    return base.Gradients(
      grads,
      jnp.sum(weights.reshape(by_task), axis=1),
      jnp.mean(linearized.losses.reshape(by_task), axis=1),
      linearized.aux,
      metrics,
      fault=state.fault,
      zero_slope=state.zero_slope,
    ), state

  return base.Method(gradients, init=init, refresh=refresh, needs_meta=True)


def _table(weights, place, gradient, axis_name):
  """Slopes of a batch, summed where its examples share a weight; like `weights`."""
  gradient = gradient.reshape(place.shape + weights.shape[1:])
  # The state is the same on every device: each sums the whole global batch.
  place, gradient = (
    base.unsharded(base.gather(x, axis_name)) for x in (place, gradient)
  )
  return jnp.zeros_like(weights).at[place].add(gradient)


def _item_losses_fn(problem, inputs, num_items):
  """`problem.losses_fn` with one loss per query, [T * Q], instead of one per task."""

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
  found = np.min(groups), np.max(groups)
  if np.ndim(groups) != 1 or found[0] < 0 or found[1] >= num_clusters:
    raise base.InputError(
      f"nested_maml: clusters must be one number a task, 0 to {num_clusters - 1}; got"
      f" {np.shape(groups)} of {found[0]} to {found[1]}: mend `group` or num_clusters."
    )


def _check(given: dict[str, Any]) -> None:
  share = given["share"]
  if share not in SHARES:
    raise base.InputError(f"nested_maml: share={share!r}: choose one of {SHARES}.")
  for own, name in (("cluster", "num_clusters"), ("item", "num_items")):
    if (share == own) != (given[name] is not None and given[name] >= 1):
      raise base.InputError(
        f"nested_maml: share={share!r} with {name}={given[name]}: a number of at least"
        f" 1 goes with share={own!r} and only with it."
      )
  for name in ("weight_learning_rate", "lookahead_learning_rate", "clip"):
    if given[name] is not None and not given[name] >= 0:  # Nor NaN.
      raise base.InputError(f"nested_maml: {name}={given[name]} must be at least 0.")
  if not given["initial"] >= given["floor"]:
    raise base.InputError(
      f"nested_maml: initial={given['initial']} is below floor={given['floor']}."
    )
  meta_network.check_every("nested_maml", given["every"])
