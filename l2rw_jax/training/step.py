"""One update of one run on one device, as a pure function, and how it can fail."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import trainable


class Failure(NamedTuple):
  """The first step that gave NaN or infinity; later steps change nothing.

  Attributes:
    step: the step, counted from 0, or -1 if no step has failed; int32 scalar.
    losses: number of losses in this step that were not finite. If it is 0, `fault` says
      what was not finite; if `fault` is 0 as well, it was the gradient or the updated
      variables.
    fault: the `base.Fault` of a meta-learning method, int32 scalar.
  """

  step: base.Array
  losses: base.Array
  fault: base.Array


class TrainState(NamedTuple):
  """Everything that changes from step to step.

  Attributes:
    step: number of updates so far, int32 scalar.
    params: network parameters.
    model_state: variables that are not trained.
    opt_state: state of the outer optimizer.
    method_state: state of the method.
    failure: see `Failure`.
  """

  step: base.Array
  params: base.PyTree
  model_state: base.PyTree
  opt_state: base.PyTree
  method_state: base.PyTree
  failure: Failure


class StepOutput(NamedTuple):
  """The metrics and weights of one step.

  Attributes:
    metrics: scalars, the same on every device.
    weights: this device's example weights times the global batch size, so that a
      uniform weight is 1; [B].
  """

  metrics: dict[str, base.Array]
  weights: base.Array


def init_state(
  params: base.PyTree,
  model_state: base.PyTree,
  method_state: base.PyTree,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """State before the first step, strongly typed.

  Step outputs are strongly typed; weakly typed inputs would trigger a recompilation.
  """
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=hypergradient.init_optimizer(optimizer, params),
    method_state=method_state,
    failure=Failure(
      jnp.full((), -1, jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    ),
  )
  return jax.tree.map(
    lambda x: x.astype(x.dtype) if getattr(x, "weak_type", False) else x, state
  )


def train_step(
  state: TrainState,
  batch: base.Batch,
  meta_batch: base.Batch | None,
  key: base.Array,
  *,
  problem: base.Problem,
  method: base.Method,
  optimizer: optax.GradientTransformation,
) -> tuple[TrainState, StepOutput]:
  """Takes one update.

  A step whose losses, gradient, parameters or model state are not finite, or that has a
  fault, changes only `failure`; all later steps change nothing.

  Args:
    state: the state.
    batch: this device's training examples.
    meta_batch: this device's meta examples, or None.
    key: the key of the run; this function folds the step into it.
    problem: the learning problem.
    method: the method that computes the gradient from the batch.
    optimizer: the optimizer of the network.

  Returns:
    The new state, and the output of the step.

  Raises:
    InputError: the optimizer needs arguments other than `params` and `value`.
  """
  inputs = base.Inputs(
    params=state.params,
    model_state=state.model_state,
    opt_state=state.opt_state,
    batch=batch,
    meta_batch=meta_batch,
    step=state.step,
    key=jax.random.fold_in(key, state.step),
  )
  result, method_state = method.gradients(state.method_state, problem, inputs)
  metrics = _metrics(result, problem)
  value = metrics["weighted_loss"] if result.value is None else result.value

  def update(grads):
    """The new parameters and optimizer state, in the types of the old ones."""
    updates, opt_state = hypergradient.update(
      optimizer, grads, state.opt_state, state.params, value, "outer"
    )
    params = hypergradient.apply_updates(state.params, updates)
    if result.fixed is not None:
      params = jax.tree.map(jnp.where, *result.fixed, params)
    old = (state.params, state.opt_state)
    return jax.tree.map(_of_same_type, (params, opt_state), old)

  params, opt_state = update(result.grads)
  others = TrainState(
    step=state.step + 1,
    params=None,
    model_state=result.model_state,
    opt_state=None,
    method_state=method_state,
    failure=state.failure,
  )
  old_others = state._replace(params=None, opt_state=None)
  # A loop over steps needs constant types: under x64, BatchNorm returns float64
  # statistics for float64 inputs.
  others = jax.tree.map(_of_same_type, others, old_others)
  takes_step, failure = _check(state, params, others.model_state, result, problem)

  def kept(new, old):
    return jax.tree.map(
      lambda new, old: old if new is old else jnp.where(takes_step, new, old), new, old
    )

  if _is_elementwise(update, result.grads):
    # Keep only the gradients until the check is complete, and then compute the update
    # again: first the parameters, which take the memory of the old ones, and then the
    # optimizer state, whose old value the new parameters depend on. Otherwise, the
    # whole new state would be in memory in addition to the old state.
    is_checked = jnp.asarray(takes_step, jnp.float32)
    params, _ = update(ordering.after(is_checked, result.grads))
    params = kept(params, state.params)
    _, opt_state = update(ordering.after(params, result.grads))
  else:
    params = kept(params, state.params)
  opt_state = kept(opt_state, state.opt_state)
  others = kept(others, old_others)
  method_state = method.record(others.method_state, problem, inputs, result, takes_step)
  size = base.global_size(result.weights.shape[0], problem.axis_name)
  output = StepOutput(metrics, result.weights * size)
  new_state = others._replace(
    params=params, opt_state=opt_state, method_state=method_state, failure=failure
  )
  return new_state, output


def _check(state, params, model_state, result, problem):
  """Whether the step is taken, and the new `Failure`."""
  bad_losses = base.psum(jnp.sum(~jnp.isfinite(result.losses)), problem.axis_name)
  fault = jnp.zeros((), jnp.int32) if result.fault is None else result.fault
  is_finite = base.all_finite((result.grads, params, model_state))
  is_finite &= (bad_losses == 0) & (fault == 0)
  has_failed = state.failure.step >= 0
  this = Failure(state.step, bad_losses.astype(jnp.int32), fault)
  failure = jax.tree.map(
    lambda new, old: jnp.where(~is_finite & ~has_failed, new, old), this, state.failure
  )
  return is_finite & ~has_failed, failure


def _is_elementwise(function, tree):
  """Whether a function of a pytree consists of elementwise operations and sums."""
  return batch_axes.is_elementwise(jax.make_jaxpr(function)(tree).jaxpr)


def _of_same_type(new, old):
  new = new if hasattr(new, "dtype") else jnp.asarray(new)
  return new if new.dtype == old.dtype else new.astype(old.dtype)


def _widened(x):
  """`x` in float32 or wider: squares and sums overflow and underflow in float16."""
  return x.astype(base.accumulator_dtype(x.dtype))


def _metrics(result: base.Gradients, problem: base.Problem) -> dict[str, Any]:
  size = base.global_size(result.weights.shape[0], problem.axis_name)
  weights, losses = _widened(result.weights), _widened(result.losses)
  total = base.psum(jnp.sum(weights), problem.axis_name)
  squares = base.psum(jnp.sum(weights**2), problem.axis_name)
  gradient = jax.tree.map(_widened, trainable.without_keys(result.grads))
  return {
    "loss": base.pmean(jnp.mean(losses), problem.axis_name),
    "weighted_loss": base.psum(jnp.sum(weights * losses), problem.axis_name),
    # Kish's effective sample size, as a share of the batch.
    "effective_share": total**2 / jnp.where(squares > 0, squares, 1) / size,
    "grad_norm": optax.tree.norm(gradient),
    **result.metrics,
  }


_ADVICE = "Check the scale of the inputs and lower --learning_rate."
# A description of each fault, and advice.
_FAULTS = {
  base.Fault.META_LOSSES: (
    "a meta loss, or the objective of the meta losses, is NaN or infinite",
    "Check the images and labels of the meta set, or lower --learning_rate.",
  ),
  base.Fault.META_GRADIENT: (
    "the meta losses are finite, but their gradient is NaN or infinite",
    _ADVICE,
  ),
  base.Fault.OPTIMIZER_STEP: (
    "the gradient of the meta loss is finite, but its derivative through the look-ahead"
    " optimizer's step is NaN or infinite",
    f"With plain SGD the step overflows: lower --learning_rate. Otherwise,"
    f" {hypergradient.OPTIMIZER_TRAP}",
  ),
  base.Fault.TRAINING_LOSSES: ("a training loss is NaN or infinite", _ADVICE),
  base.Fault.SLOPES: (
    "the losses and the gradient of the meta loss are finite, but what the method"
    " computes from them (scores, weights or the gradient of its network) is NaN or"
    " infinite",
    _ADVICE,
  ),
}


def first_failed_run(failure: Failure) -> int | None:
  """The index of the run that failed first, or None.

  The arrays of `failure` have shape [R], for R runs.
  """
  failed = np.flatnonzero(failure.step >= 0)
  return int(failed[np.argmin(failure.step[failed])]) if failed.size else None


def explain_failure(failure: Failure, run: int, batch_size: int) -> tuple[str, str]:
  """Returns a description of the failure of a run, and advice."""
  if num_losses := int(failure.losses[run]):
    what = f"{num_losses} of {batch_size} losses are NaN or infinite"
    return what, "Lower --learning_rate or check the data."
  if fault := int(failure.fault[run]):
    return _FAULTS[base.Fault(fault)]
  return "the update is NaN or infinite", "Lower --learning_rate."
