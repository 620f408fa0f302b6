"""Meta-learning of a network inside the training loss.

Meta-Weight-Net, WarPI and the advisor have the same iteration, which trains a second
network together with the classifier. (Meta-Weight-Net computes its meta gradient
differently, because its weights may depend on the whole global batch.) Let phi be the
parameters of the second network, p those of the classifier, z(p) the outputs of the
classifier for a batch (losses, logits or features) with the Jacobian J, L(z, phi) the
inner loss, step(G) the parameters after a look-ahead step with the gradient G, and M
the meta loss:

    inner gradient    G = J^T dL/dz                    at phi
    direction         v = (d step / d G)^T grad M(step(G))
    meta gradient     dM/dphi = grad_phi [ dL/dz . J v ]
    updates           phi by dM/dphi, then p by J^T dL/dz at the new phi

One forward pass of the batch is used for both gradients and for the directional
derivative. The derivative with respect to phi passes only through L, never through the
classifier.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.linearization import control_flow

LossFn = Callable[[Any, base.PyTree], base.Array]
Schedule = float | Callable[[base.Array], base.Array]


class MetaGradient(NamedTuple):
  """The gradient of the meta loss with respect to the parameters of the network.

  Attributes:
    gradient: dM/dphi, the same on every device.
    meta_loss: M at the look-ahead parameters, scalar.
    finite: whether the training loss, the meta losses, the direction and the gradient
      are finite; bool scalar.
    zero_slope: whether the look-ahead optimizer's step ignores the gradient, see
      `hypergradient.Direction`; bool scalar.
    fault: the first quantity that is not finite, a `base.Fault`; int32 scalar.
    engine: the engine that linearized the batch, see `base.Linearized`.
  """

  gradient: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  engine: base.StaticStr = base.StaticStr()


class State(NamedTuple):
  """The state of a method with a network.

  Attributes:
    params: phi.
    opt_state: state of the meta optimizer.
    meta_loss: meta loss of the last meta gradient, infinite before the first; scalar.
    finite: whether the last meta gradient was finite; bool scalar.
    zero_slope: `zero_slope` of the last meta gradient; bool scalar.
    fault: `fault` of the last meta gradient, a `base.Fault`; int32 scalar.
  """

  params: base.PyTree
  opt_state: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array


def dense(width: int, fan_in: int) -> nn.Dense:
  """A layer with kernel and bias uniform in +-1 / sqrt(fan_in), as in the papers."""
  bound = fan_in**-0.5

  def uniform(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return nn.Dense(width, kernel_init=uniform, bias_init=uniform)


def init(params: base.PyTree, optimizer: optax.GradientTransformation) -> State:
  """The state before the first meta gradient."""
  # Under `jax_debug_nans`, NaN would raise an error.
  unknown = jnp.full((), jnp.inf, jnp.result_type(float))
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
  """Takes one step of the meta optimizer in every `every`-th step of the run.

  Args:
    state: the state before the step.
    meta_gradient_fn: `phi -> MetaGradient`. The gradient is computed only in steps with
      an update, which saves time, except for several runs under one `vmap`.
    optimizer: the meta optimizer; the meta loss is passed to it as `value`.
    step: step of the run, counted from 0; int32 scalar.
    every: number of steps from one update to the next.

  Returns:
    The state after the step.

  Raises:
    InputError: the optimizer is not supported, see `hypergradient.update`.
  """

  def updated(state):
    meta = meta_gradient_fn(state.params)
    loss = meta.meta_loss.astype(state.meta_loss.dtype)
    updates, opt_state = hypergradient.update(
      optimizer, meta.gradient, state.opt_state, state.params, loss, "meta"
    )
    return State(
      hypergradient.apply_updates(state.params, updates),
      opt_state,
      loss,
      meta.finite,
      meta.zero_slope,
      meta.fault,
    )

  if every == 1:
    return updated(state)
  return control_flow.cond(step % every == 0, updated, lambda state: state, state)


def sgd_lookahead(learning_rate: Schedule, inputs: base.Inputs) -> dict[str, Any]:
  """Arguments of `meta_gradient` for a look-ahead by plain SGD, as in the papers.

  Args:
    learning_rate: learning rate of the look-ahead, a number or `step -> number`.
    inputs: inputs of the training step.

  Returns:
    The keyword arguments `optimizer` and `has_aux`. The latter is True because the
    losses functions of a `base.Problem` also return the new model state.
  """
  rate: Any = learning_rate
  if callable(learning_rate):
    with base.implicit_promotion():
      rate = learning_rate(inputs.step)
  return {"optimizer": optax.sgd(rate), "has_aux": True}


def metrics(state: State) -> dict[str, base.Array]:
  """Metrics of the last meta gradient for the logs."""
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
  """dM/dphi for a network with parameters phi inside the inner loss.

  Args:
    linearized: the outputs for the batch, linearized at `params`.
    loss_fn: `(outputs, phi) -> scalar`, this device's term of the inner loss, which is
      the sum over devices. If the method holds the inputs of its network constant,
      `loss_fn` must use `jax.lax.stop_gradient`.
    phi: parameters of the network.
    meta_losses_fn: `(params, meta_batch) -> losses [M]`, or `(losses [M], aux)` with
      `has_aux`.
    params: parameters of the classifier.
    meta_batch: this device's meta examples.
    optimizer: the look-ahead optimizer.
    opt_state: state of the optimizer; None creates a new state.
    has_aux: whether `meta_losses_fn` also returns an auxiliary output.
    axis_name: mapped axis over which both batches are sharded.

  Returns:
    A `MetaGradient`.

  Raises:
    InputError: an argument is invalid, see `hypergradient.direction`; outside `jit`,
      also if the optimizer's step ignores the gradient.
    FloatingPointError: outside `jit`, if the inner loss, a meta loss, the gradient of
      the meta loss, the direction or dM/dphi is not finite.
  """
  outputs = linearized.outputs
  loss, cotangent = jax.value_and_grad(loss_fn)(outputs, phi)
  loss = base.psum(loss, axis_name)
  if not isinstance(loss, jax.core.Tracer) and not jnp.isfinite(loss):
    raise FloatingPointError(
      f"the inner loss of the training batch is {loss}: check batch, params and phi."
    )
  direction = hypergradient.direction(
    meta_losses_fn,
    params,
    meta_batch,
    base.psum(linearized.vjp(cotangent), axis_name),
    optimizer=optimizer,
    opt_state=opt_state,
    has_aux=has_aux,
    axis_name=axis_name,
    value=loss,
  )
  tangent = linearized.jvp(base.local(direction.vector, axis_name))

  def inner_derivative(phi):
    inner, derivative = jax.jvp(lambda z: loss_fn(z, phi), (outputs,), (tangent,))
    return derivative + hypergradient.through_value(direction, inner, axis_name)

  gradient = jax.grad(inner_derivative)(base.local(phi, axis_name))
  return checked_meta_gradient(
    base.psum(gradient, axis_name), direction, jnp.isfinite(loss), linearized.engine
  )


def checked_meta_gradient(
  gradient: base.PyTree,
  direction: hypergradient.Direction,
  losses_finite: base.Array,
  engine: base.StaticStr,
) -> MetaGradient:
  """A `MetaGradient` from its gradient and direction, checked for finite values.

  Args:
    gradient: dM/dphi, the same on every device.
    direction: the direction from which the gradient was computed.
    losses_finite: whether the training loss is finite; bool scalar.
    engine: the engine that linearized the batch.

  Raises:
    FloatingPointError: outside `jit`, if the gradient is not finite.
  """
  fault = base.lookahead_fault(
    direction.fault,
    losses_finite=losses_finite,
    slopes_finite=hypergradient.check_network_gradient(gradient),
  )
  return MetaGradient(
    gradient, direction.meta_loss, fault == 0, direction.zero_slope, fault, engine
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
  """One iteration: may update phi (see `every`), then computes the gradient for p.

  Args:
    state: the state before the step.
    problem: the learning problem.
    inputs: inputs of the training step.
    linearized: the outputs for the batch, linearized at `inputs.params`.
    virtual_loss_fn: `(outputs, phi) -> scalar`, the inner loss of the look-ahead; see
      `meta_gradient`.
    real_loss_fn: `(outputs, phi) -> scalar`, the inner loss of the classifier's step,
      at the new phi.
    learning_rate: learning rate of the look-ahead, a number or `step -> number`.
    optimizer: the meta optimizer.
    every: number of steps from one update of phi to the next.

  Returns:
    The gradient with respect to the classifier's parameters, summed over devices, and
    the state after the step.

  Raises:
    InputError: see `meta_gradient` and `update`.
    FloatingPointError: see `meta_gradient`.
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
