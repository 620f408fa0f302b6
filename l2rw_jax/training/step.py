"""One update of one run on one device, as a pure function."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base


class Failure(NamedTuple):
  """The first step that gave NaN or infinity; all later ones were not taken.

  Attributes:
    step: the step, counted from 0, or -1 while all is well; int32 scalar.
    losses: how many of its losses were not finite (0: only the gradient, or what
      it made of the parameters).
    fault: the `base.Fault` of a meta-learned method, int32 scalar.
  """

  step: base.Array
  losses: base.Array
  fault: base.Array


class TrainState(NamedTuple):
  """Everything that changes from step to step.

  Attributes:
    step: updates done, int32 scalar.
    params: network parameters.
    model_state: non-trained variables.
    opt_state: outer optimizer state.
    method_state: whatever the method carries.
    failure: see `Failure`.
  """

  step: base.Array
  params: base.PyTree
  model_state: base.PyTree
  opt_state: base.PyTree
  method_state: base.PyTree
  failure: Failure


class StepOutput(NamedTuple):
  """What one step shows.

  Attributes:
    metrics: scalars, the same on every device.
    weights: this device's example weights times the global batch size, so that
      uniform is 1; [B].
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

  What a step returns is, and a step that first meets a weak type would be compiled
  a second time for its own output.
  """
  with base.implicit_promotion():
    opt_state = optimizer.init(params)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=opt_state,
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
  """One update, or none at all from the first non-finite step on.

  Args:
    state: the state.
    batch: this device's training examples.
    meta_batch: this device's clean examples, or None.
    key: the run's key; folded with the step here.
    task: the learning problem.
    method: how the batch becomes a gradient.
    optimizer: what takes the gradient.
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
  found, method_state = method.gradients(state.method_state, problem, inputs)
  metrics = _metrics(found, problem)
  with base.implicit_promotion():
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
      found.grads,
      state.opt_state,
      state.params,
      value=metrics["weighted_loss"] if found.value is None else found.value,
    )
    params = optax.apply_updates(state.params, updates)
  proposed = TrainState(
    step=state.step + 1,
    params=params,
    model_state=found.model_state,
    opt_state=opt_state,
    method_state=method_state,
    failure=state.failure,
  )
  size = base.global_size(found.weights.shape[0], problem.axis_name)
  output = StepOutput(metrics, found.weights * size)
  return _keep_last_good(state, proposed, found, problem), output


def _keep_last_good(state, proposed, found, problem):
  bad_losses = base.psum(jnp.sum(~jnp.isfinite(found.losses)), problem.axis_name)
  made = (found.grads, proposed.params, proposed.model_state)
  fault = jnp.zeros((), jnp.int32) if found.fault is None else found.fault
  healthy = (bad_losses == 0) & base.all_finite(made) & (fault == 0)
  going = healthy & (state.failure.step < 0)

  def keep(new, old):
    kept = jnp.where(going, new, old)
    # The dtype it began with, as a loop over steps demands: under x64 the running
    # statistics of float32 networks come back in float64.
    return kept if kept.dtype == old.dtype else kept.astype(old.dtype)

  kept = jax.tree.map(keep, proposed, state)
  now = Failure(state.step, bad_losses.astype(jnp.int32), fault)
  is_first = ~healthy & (state.failure.step < 0)
  failure = jax.tree.map(
    lambda new, old: jnp.where(is_first, new, old), now, state.failure
  )
  return kept._replace(failure=failure)


def _metrics(found: base.Gradients, problem: base.Problem) -> dict[str, Any]:
  size = base.global_size(found.weights.shape[0], problem.axis_name)
  # Squares of weights and their sums underflow in float16.
  weights, losses = (
    x.astype(base.accumulator_dtype(x.dtype)) for x in (found.weights, found.losses)
  )
  total = base.psum(jnp.sum(weights), problem.axis_name)
  squares = base.psum(jnp.sum(weights**2), problem.axis_name)
  return {
    "loss": base.pmean(jnp.mean(losses), problem.axis_name),
    "weighted_loss": base.psum(jnp.sum(weights * losses), problem.axis_name),
    # Kish's effective sample size, as a share of the batch.
    "effective_share": total**2 / jnp.where(squares > 0, squares, 1) / size,
    "grad_norm": optax.tree.norm(found.grads),
    **found.metrics,
  }
