"""A network inside the training loss, taught by the meta loss.

Meta-Weight-Net, WarPI and the advisor share one iteration (Meta-Weight-Net takes its
own lesson: its weights may depend on the whole global batch). With phi the network's
parameters, z(p) what the classifier makes of a batch (losses, logits, features)
and L(z, phi) the inner loss:

    inner gradient    G = J^T dL/dz                    at phi
    direction         v = (d step / d G)^T grad M(step(G))
    lesson            dM/dphi = grad_phi [ dL/dz . J v ]
    then              phi moves, and the classifier steps on J^T dL/dz at the new phi

One forward pass of the batch serves both of its gradients and the directional
derivative; phi is differentiated only through L, never through the classifier.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient

LossFn = Callable[[Any, base.PyTree], base.Array]
Schedule = float | Callable[[base.Array], base.Array]


class MetaGradient(NamedTuple):
  """What the meta batch says of the network.

  Attributes:
    gradient: dM/dphi, the same on every device.
    meta_loss: M at the looked-ahead parameters, scalar.
    finite: False when a loss of either batch, the direction or the gradient held a
      NaN or an infinity; bool scalar.
    zero_slope: whether the look-ahead optimizer's step ignores the gradient, see
      `hypergradient.Direction`; bool scalar.
    fault: which was not finite first, a `base.Fault`; int32 scalar.
  """

  gradient: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array


class State(NamedTuple):
  """What a method with a network carries from step to step.

  Attributes:
    params: phi.
    opt_state: of the meta optimizer.
    meta_loss: of the last lesson, NaN before the first; scalar.
    finite: whether that lesson was; bool scalar.
    zero_slope: of that lesson; bool scalar.
    fault: of that lesson, a `base.Fault`; int32 scalar.
  """

  params: base.PyTree
  opt_state: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array


def dense(width: int, fan_in: int) -> nn.Dense:
  """A layer with kernel and bias uniform in +-1 / sqrt(fan_in), as released."""
  bound = fan_in**-0.5

  def uniform(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nn.Dense(width, kernel_init=uniform, bias_init=uniform)


def init(params: base.PyTree, optimizer: optax.GradientTransformation) -> State:
  """State before the first lesson."""
  # Not computed, so that `jax_debug_nans` has nothing to find.
  unknown = jnp.asarray(np.full((), np.nan, jnp.result_type(float)))
  return State(
    params,
    hypergradient.init_optimizer(optimizer, params),
    unknown,
    jnp.array(True),
    jnp.array(False),
    jnp.zeros((), jnp.int32),
  )


def update(
  state: State,
  meta_gradient_fn: Callable[[base.PyTree], MetaGradient],
  optimizer: optax.GradientTransformation,
  step: base.Array,
  every: int = 1,
) -> State:
  """The state after a step of the meta optimizer, taken `every` so many steps.

  Args:
    state: before.
    lesson_fn: `phi -> MetaGradient`. Not computed between lessons, which is what makes
      `every` cheaper; runs side by side under one `vmap` compute it regardless.
    optimizer: the meta optimizer.
    step: of the run, counted from 0; int32 scalar.
    every: steps from one lesson to the next.
  """

  def updated(state):
    found = meta_gradient_fn(state.params)
    with base.implicit_promotion():
      updates, opt_state = optimizer.update(
        found.gradient, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    return State(
      params,
      opt_state,
      found.meta_loss.astype(state.meta_loss.dtype),
      found.finite,
      found.zero_slope,
      found.fault,
    )

  if every == 1:
    return updated(state)
  return jax.lax.cond(step % every == 0, updated, lambda state: state, state)


def check_every(method: str, every: int) -> None:
  """Raises InputError unless `every` is a number of steps."""
  if every < 1:
    raise base.InputError(f"{method}: every={every} must be at least 1 step.")


def sgd_lookahead(learning_rate: Schedule, inputs: base.Inputs) -> dict[str, Any]:
  """Arguments of the papers' look-ahead in the loop: plain SGD, at this step's rate.

  Losses functions of a `base.Problem` return new variables too, hence `has_aux`.
  """
  rate: Any = learning_rate
  if callable(learning_rate):
    with base.implicit_promotion():
      rate = learning_rate(inputs.step)
  optimizer = optax.sgd(rate)
  return {
    "optimizer": optimizer,
    "opt_state": hypergradient.init_optimizer(optimizer, inputs.params),
    "has_aux": True,
  }


def metrics(state: State) -> dict[str, base.Array]:
  """What to log of the last lesson."""
  return {
    "meta_loss": state.meta_loss,
    "direction_finite": state.finite.astype(jnp.float32),
    "zero_slope": state.zero_slope.astype(jnp.float32),
  }


def meta_gradient(
  linearized: base.LinearizedOutputs,
  loss_fn: LossFn,
  phi: base.PyTree,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  *,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree = None,
  has_aux: bool = False,
  axis_name: base.AxisName = None,
) -> MetaGradient:
  """dM/dphi for a network phi inside the inner loss.

  Args:
    linearized: the batch, linearized at `params`.
    loss_fn: `(outputs, phi) -> scalar`: this device's part of the inner loss,
      which is their sum over devices. What phi's network is fed must be held
      constant inside by the caller where the method says so.
    phi: the network's parameters.
    meta_losses_fn: `(params, meta_batch) -> [M]` (with `has_aux`, and aux).
    params: of the classifier.
    meta_batch: this device's clean examples.
    optimizer: takes the look-ahead step.
    opt_state: its state; fresh if None.
    has_aux: whether `meta_losses_fn` returns something in addition to its losses.
    axis_name: mapped axis over which both batches are sharded.

  Raises:
    InputError: outside `jit`, if the optimizer's step ignores the gradient.
    FloatingPointError: outside `jit`, if the inner loss, the direction or the
      gradient is not finite.
  """
  outputs = linearized.outputs
  loss, cotangent = jax.value_and_grad(loss_fn)(outputs, phi)
  loss = base.psum(loss, axis_name)
  if not isinstance(loss, jax.core.Tracer) and not jnp.isfinite(loss):
    raise FloatingPointError(
      f"the inner loss of the training batch is {loss}: check batch, params and phi."
    )
  inner = linearized.vjp(cotangent)
  found = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_batch,
    base.psum(inner, axis_name),
    optimizer=optimizer,
    opt_state=(
      hypergradient.init_optimizer(optimizer, params)
      if opt_state is None
      else opt_state
    ),
    has_aux=has_aux,
    axis_name=axis_name,
    value=loss,
  )
  tangent = linearized.jvp(base.local(found.vector, axis_name))

  def slope(phi):
    return jax.jvp(lambda z: loss_fn(z, phi), (outputs,), (tangent,))[1]

  gradient = jax.grad(slope)(base.local(phi, axis_name))
  return checked_meta_gradient(
    base.psum(gradient, axis_name), found, jnp.isfinite(loss)
  )


def checked_meta_gradient(
  gradient: base.PyTree,
  direction: hypergradient.Direction,
  losses_finite: base.Array,
) -> MetaGradient:
  """The lesson of a gradient dM/dphi, the same on every device, and its direction.

  Args:
    gradient: dM/dphi.
    direction: what it was made with.
    losses_finite: whether all training losses are finite; bool scalar.

  Raises:
    FloatingPointError: outside `jit`, if the gradient is not finite.
  """
  fault = base.first_fault(
    direction.fault,
    training_losses=losses_finite,
    slopes=hypergradient.check_network_gradient(gradient),
  )
  return MetaGradient(
    gradient, direction.meta_loss, fault == 0, direction.zero_slope, fault
  )


def iterate(
  state: State,
  problem: base.Problem,
  inputs: base.Inputs,
  linearized: base.LinearizedOutputs,
  virtual_loss_fn: LossFn,
  real_loss_fn: LossFn,
  *,
  learning_rate: Schedule,
  optimizer: optax.GradientTransformation,
  every: int = 1,
) -> tuple[base.PyTree, State]:
  """A whole iteration in the loop: phi learns, then the classifier has its gradient.

  Args:
    state: before.
    task: the learning problem.
    inputs: of the step.
    linearized: the batch, linearized at `inputs.params`.
    virtual_loss_fn: `(outputs, phi) -> scalar`, of the look-ahead; see `meta_gradient`.
    real_loss_fn: likewise, of the classifier's own step, at the new phi.
    learning_rate: of the look-ahead, a number or `step -> number`.
    optimizer: the meta optimizer.
    every: see `update`.

  Returns:
    The classifier's gradient, summed over devices, and the state after.
  """

  def meta_gradient_fn(phi):
    return meta_gradient(
      linearized,
      virtual_loss_fn,
      phi,
      problem.meta_losses_fn(inputs.model_state, inputs.key),
      inputs.params,
      inputs.meta_batch,
      axis_name=problem.axis_name,
      **sgd_lookahead(learning_rate, inputs),
    )

  state = update(state, meta_gradient_fn, optimizer, inputs.step, every)
  cotangent = jax.grad(real_loss_fn)(linearized.outputs, state.params)
  return base.psum(linearized.vjp(cotangent), problem.axis_name), state
