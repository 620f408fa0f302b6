"""The derivative of a meta loss through one optimizer step.

M(p) is the mean loss of the meta batch (or another objective of its losses). One optax
step

    step(g) = apply_updates(p, optimizer.update(g, opt_state, p)[0])

is taken with the weighted gradient g(w) = J^T w of a batch (see `linearization`):

    look-ahead        p' = step(g(w))
    direction         v  = (d step / d g)^T grad M(p')    one cheap vjp, O(params)
    weight gradient   dM/dw = J v + l dM/d value          for all B weights together
    network gradient  dM/dphi = (dw/dphi)^T (dM/dw)       if phi parameterizes w

Some optimizers (optax's `polyak_sgd`, for instance) also use `value`, the inner loss
sum_i w_i l_i; for all others, dM/d value is 0. Up to rounding, dM/dw equals the
derivative of the unrolled step, which is the definition (`unrolled_weight_gradient`),
at about half the cost. No collective is differentiated: the gradient of the meta loss
is averaged over devices first, and an objective is differentiated with respect to
losses that are already gathered.

Reference: Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
(2018), eq. (4)-(7) and appendix A, with any optax optimizer in place of their SGD.
"""

from collections.abc import Callable
import enum
import functools
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import checkify
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import loop_buffers
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import trainable


class _State(enum.IntEnum):
  """The state of the meta gradient and the direction, in ascending precedence.

  The state of an array is the largest state of its entries, and the state of a pytree
  is the largest state of its arrays.
  """

  ZERO = 0  # Both are zero.
  IGNORED = 1  # The direction is zero, but the meta gradient is not.
  USED = 2  # The direction is not zero.
  INFINITE = 3  # The direction is infinite.
  NAN = 4  # The direction is NaN.
  BAD_GRADIENT = 5  # The meta gradient is NaN or infinite.


# A function from the losses [M] of the global meta batch to the meta loss, a scalar.
Objective = Callable[[base.Array], base.Array]
OPTIMIZER_TRAP = (
  "optimizers that divide by the square root of a squared gradient (adam, adamw, lamb,"
  " adafactor, muon, clip_by_global_norm) have no derivative where the gradient or one"
  " of its entries is 0 (in L2RW, all are 0). Use optimizer=optax.sgd(...), or adam"
  " with eps_root > 0."
)
_TRAPPED = (
  "the meta gradient is finite, but its derivative through the look-ahead optimizer's"
  " step is NaN: " + OPTIMIZER_TRAP
)
_OVERFLOW = (
  "the meta gradient is finite, but its derivative through the look-ahead optimizer's"
  " step is infinite: it overflows. Scale the inputs or lower the learning rate."
)
_META_LOSS = (
  "a meta loss, or the objective of the meta losses, is NaN or infinite: check"
  " meta_batch and params."
)
_META_GRADIENT = (
  "the meta losses are finite, but their gradient is NaN or infinite: check"
  " meta_batch (the scale of its inputs), params and the derivative of the loss."
)
ZERO_SLOPE = (
  "the look-ahead optimizer's step does not change with the gradient, so that all"
  " weights would be zero: its learning rate is 0 at this step (warm-up, or the end of"
  " a schedule), or it accumulates gradients (MultiSteps, apply_every), or it uses the"
  " signs of gradients only (lion, sign_sgd, the first step of adam). Use"
  " optimizer=optax.sgd(...) for the look-ahead."
)

# Arrays with at most this number of entries are joined, to be checked together.
_SMALL = 4096


class Direction(NamedTuple):
  """The gradient of the meta loss with respect to the inner gradient, dM/dg.

  Attributes:
    vector: v, shaped like `params`; for any example weights w, dM/dw is J v plus the
      losses times `value_slope`.
    meta_loss: M at the look-ahead parameters, of the global meta batch, scalar.
    finite: whether the meta losses, the meta loss, its gradient and `vector` are
      finite; bool scalar.
    zero_slope: whether `vector` is zero although the meta gradient is not, because the
      optimizer's step ignores the gradient; bool scalar.
    fault: the first quantity that is not finite, a `base.Fault`; int32 scalar.
    aux: the auxiliary output of the meta losses function, or None.
    activation_ratio: the memory of the activations of a meta example divided by that of
      the parameters, see `ordering.activation_ratio`; infinite if it is unknown.
    value_slope: dM/d value, the derivative through the inner loss that the optimizer
      receives, scalar; None stands for 0.
  """

  vector: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None
  activation_ratio: base.StaticFloat = base.StaticFloat("inf")
  value_slope: base.Array | None = None


def init_optimizer(
  optimizer: optax.GradientTransformation, params: base.PyTree
) -> base.PyTree:
  """`optimizer.init(params)`, even if JAX is configured to refuse type promotion.

  Args:
    optimizer: any optax optimizer.
    params: any pytree of parameters, which may contain PRNG keys.

  Raises:
    InputError: `optimizer` is not an optimizer, for instance a function that returns
      one.
  """
  # This is not an isinstance check, because `optax.MultiSteps` has both functions but
  # is of another type.
  if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
    raise base.InputError(
      "optimizer must be an optax optimizer, such as optax.sgd(0.1); got"
      f" {optimizer!r}."
    )
  with base.implicit_promotion():
    return optimizer.init(trainable.without_keys(params))


def lookahead_params(
  params: base.PyTree,
  gradient: base.PyTree,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree,
  value: Any = None,
) -> base.PyTree:
  """Parameters after one optimizer step; the new optimizer state is discarded.

  Args:
    params: parameters before the step.
    gradient: gradient of the inner loss, as `jax.grad` returns it.
    optimizer: any optimizer whose update needs no arguments but `params` and `value`.
    opt_state: state of the optimizer at `params`.
    value: the inner loss, which some optimizers use; None stands for 0, the loss if all
      weights are zero.

  Returns:
    Parameters, shaped like `params`.

  Raises:
    InputError: the update of the optimizer needs arguments other than `params` and
      `value`, does not accept `value` although the optimizer is an
      `optax.GradientTransformationExtraArgs`, or takes the gradient of only a part of
      its parameters (`optax.lookahead`).
  """
  value = jnp.zeros(()) if value is None else value
  updates, _ = update(optimizer, gradient, opt_state, params, value, "look-ahead")
  return apply_updates(params, updates)


def apply_updates(params: base.PyTree, updates: base.PyTree) -> base.PyTree:
  """`params` plus `updates`; leaves that cannot be trained are held fixed.

  Optimizers have updates for all leaves: weight decay would change integers, and typed
  PRNG keys cannot be added to anything.
  """
  partition = trainable.Partition(params)
  leaves, updates = partition.leaves(params), partition.leaves(updates)
  with base.implicit_promotion():
    return partition.combine(optax.apply_updates(leaves, updates))


def update(
  optimizer: optax.GradientTransformation,
  gradient: base.PyTree,
  opt_state: base.PyTree,
  params: base.PyTree,
  value: Any,
  role: str,
) -> tuple[base.PyTree, base.PyTree]:
  """`optimizer.update` with `value`, even if JAX is configured to refuse promotion.

  Args:
    optimizer: any optimizer whose update needs no arguments but `params` and `value`.
    gradient: gradient of the loss, shaped like `params`, as `jax.grad` returns it. The
      optimizer gets the conjugate of complex entries, see `trainable.conjugated`.
    opt_state: state of the optimizer at `params`.
    params: parameters before the step.
    value: the loss, a scalar, which some optimizers use.
    role: the role of the optimizer, for error messages: such as "look-ahead".

  Returns:
    The updates and the new state of the optimizer.

  Raises:
    InputError: see `lookahead_params`.
  """

  def is_pair(x):
    return isinstance(x, optax.LookaheadState)

  if any(map(is_pair, jax.tree.leaves(opt_state, is_leaf=is_pair))):
    raise base.InputError(
      f"the {role} optimizer is optax.lookahead, which steps pairs of parameters with a"
      " gradient of the fast ones alone: use its fast optimizer, with params.fast and"
      " opt_state.fast_state."
    )
  try:
    with base.implicit_promotion():
      return optax.with_extra_args_support(optimizer).update(
        trainable.conjugated(trainable.without_keys(gradient)),
        opt_state,
        trainable.without_keys(params),
        value=value,
      )
  except TypeError as error:
    if "unexpected keyword argument 'value'" in str(error):
      raise base.InputError(
        f"the update of the {role} optimizer does not accept value, although the"
        " optimizer is an optax.GradientTransformationExtraArgs (sharpness-aware"
        " minimization, for instance): use another optimizer, such as optax.sgd(...)."
      ) from error
    missing = re.search(r"missing .*required .*arguments?: (.*)", str(error))
    if missing is None:
      raise
    raise base.InputError(
      f"the {role} optimizer takes one step with a gradient, params and value, but its"
      f" update also needs {missing[1]} (a line search): use another optimizer, such as"
      " optax.sgd(...)."
    ) from error


def direction(
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  inner_gradient: base.PyTree | None = None,
  *,
  optimizer: optax.GradientTransformation | None = None,
  opt_state: base.PyTree = None,
  objective: Objective | None = None,
  has_aux: bool = False,
  axis_name: base.AxisName = None,
  microbatch_size: int | None = None,
  value: Any = None,
) -> Direction:
  """The direction v = (d step / d g)^T grad M(step(g)) at g = `inner_gradient`.

  Args:
    meta_losses_fn: `(params, meta_batch) -> losses [M]`, or `(losses [M], aux)` with
      `has_aux`.
    params: current parameters.
    meta_batch: this device's meta examples.
    inner_gradient: gradient of the look-ahead step, shaped like `params` and the same
      on every device; None means a zero gradient, as in L2RW.
    optimizer: the look-ahead optimizer. With None, the step subtracts the gradient from
      the parameters, as `optax.sgd(1.0)` does. The backward pass then starts from the
      negative meta loss, so a custom backward rule must be linear in its cotangent.
      None saves memory on XLA:CPU, which may store the scalar factor of an optimizer's
      step as an array of the size of a parameter.
    opt_state: state of the optimizer at `params`; None initializes it.
    objective: `losses [M] -> M(p)`, a function of the losses of all devices in device
      order; None is their mean. Other inputs of the objective, such as groups, must be
      gathered with `base.gather`. Its value should not change if every example is
      repeated, because a meta batch whose size is not a multiple of the number of
      devices is repeated on every device.
    has_aux: whether `meta_losses_fn` also returns an auxiliary output.
    axis_name: mapped axis over which `meta_batch` is sharded.
    microbatch_size: number of meta examples that this device processes at a time, see
      `microbatching`.
    value: the inner loss whose gradient is `inner_gradient`, for optimizers that use it
      (optax's `value`); None stands for 0.

  Returns:
    A `Direction`, the same on every device.

  Raises:
    InputError: `params` has no trainable leaf, `inner_gradient` is not shaped like it,
      the meta losses do not have shape [M], the meta batch is empty, or the losses
      cannot be computed in microbatches; `value` or the result of `objective` is not
      one number; `opt_state` is given without `optimizer`; or `init_optimizer` or
      `lookahead_params` refuses the optimizer. Outside `jit`, it is also raised if the
      optimizer's step ignores the gradient.
    FloatingPointError: outside `jit`, if a meta loss, the gradient of the meta loss or
      the direction is not finite; the message says which. Under `jit`, check
      `Direction.fault` and `Direction.zero_slope`, or use `checkify.checkify`, which
      returns the same errors.
  """
  if optimizer is None and opt_state is not None:
    raise base.InputError(
      "opt_state without optimizer would be ignored: pass the optimizer that it"
      " belongs to, or leave opt_state out."
    )
  if optimizer is not None and opt_state is None:
    opt_state = init_optimizer(optimizer, params)
  trainable.check(params)
  partition = trainable.Partition(params)
  leaves = partition.leaves(params)
  if inner_gradient is None:
    inner_gradient = trainable.zero_gradients(params)
  value = jnp.zeros(()) if value is None else jnp.asarray(value)
  if value.shape:
    raise base.InputError(f"value must be one number; got shape {value.shape}.")
  if not jnp.issubdtype(value.dtype, jnp.inexact):
    value = value.astype(float)

  def step(gradient_leaves, value):
    if optimizer is None:
      pairs = zip(leaves, gradient_leaves, strict=True)
      return [p - trainable.conjugated(g).astype(p.dtype) for p, g in pairs]
    gradient = partition.combine_gradient(gradient_leaves)
    stepped = lookahead_params(params, gradient, optimizer, opt_state, value)
    return partition.leaves(stepped)

  def meta_losses(leaves, meta_batch):
    result = meta_losses_fn(partition.combine(leaves), meta_batch)
    losses, aux = base.losses_and_aux("meta_losses_fn", result, has_aux)
    if losses.size == 0:
      raise base.InputError("meta_batch is empty: a meta loss needs an example.")
    return losses, aux

  lookahead_leaves, step_vjp = jax.vjp(
    step, partition.checked_leaves("inner_gradient", inner_gradient), value
  )
  lookahead_leaves = base.local(lookahead_leaves, axis_name)
  # Without an optimizer, the direction is the negative gradient. It is computed from
  # the negative loss, because a change of sign of every entry would be one more array
  # of the size of each parameter.
  sign = -1 if optimizer is None else 1
  ratio = base.StaticFloat("inf")
  if microbatch_size is None:
    losses, losses_vjp, aux = jax.vjp(
      lambda leaves: meta_losses(leaves, meta_batch), lookahead_leaves, has_aux=True
    )
    loss, cotangent = _meta_loss(objective, losses, axis_name)
    (gradient,) = losses_vjp(sign * cotangent)
    ratio = base.StaticFloat(
      ordering.activation_ratio(
        lambda leaves: meta_losses(leaves, meta_batch)[0],
        losses_vjp,
        lookahead_leaves,
        meta_batch,
        losses.size,
      )
      / losses.size
    )
  else:
    losses, loss, gradient, aux = _microbatched_meta_gradient(
      meta_losses,
      lookahead_leaves,
      meta_batch,
      objective,
      axis_name,
      microbatch_size,
      sign,
    )
  meta_gradient = base.psum(gradient, axis_name)  # This is `sign` times the gradient.
  vector = [g.astype(x.dtype) for g, x in zip(meta_gradient, leaves, strict=True)]
  if optimizer is None:
    vector, value_slope = trainable.conjugated(vector), None
  else:
    vector, value_slope = step_vjp(vector)
  state = _state(meta_gradient, vector, value_slope)
  fault = _check_finite(losses, loss, state, axis_name)
  zero_slope = _check_slope(state)
  vector = partition.combine_gradient(vector)
  return Direction(vector, loss, fault == 0, zero_slope, fault, aux, ratio, value_slope)


def _meta_loss(objective, losses, axis_name):
  """The global meta loss, and its gradient with respect to this device's losses."""
  if objective is None:
    dtype = base.accumulator_dtype(losses.dtype)
    loss = base.pmean(jnp.mean(losses.astype(dtype)), axis_name).astype(losses.dtype)
    size = base.global_size(losses.size, axis_name)
    return loss, jnp.full_like(losses, 1 / size)

  # Every device differentiates the same function of the same gathered losses, so that
  # no collective is transposed. Each device then uses its slice of the gradient.
  def scalar(losses):
    value = objective(losses)
    is_number = isinstance(value, float | jax.Array) and jnp.shape(value) == ()
    if not is_number or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
      got = jax.tree.map(jax.typeof, value)
      raise base.InputError(
        f"objective must return one floating-point number; got {got}. Reduce the"
        " losses of all examples, for instance by their mean."
      )
    return value

  loss, gradient = jax.value_and_grad(scalar)(base.gather(losses, axis_name))
  return base.pmean(loss, axis_name), base.local_slice(gradient, axis_name)


def _microbatched_meta_gradient(
  losses_fn, leaves, meta_batch, objective, axis_name, microbatch_size, sign
):
  """This device's losses, the global meta loss, `sign` times its gradient, and aux."""
  weighted_gradient = functools.partial(
    microbatching.weighted_gradient,
    losses_fn,
    leaves,
    meta_batch,
    microbatch_size=microbatch_size,
    has_aux=True,
  )
  if objective is None:  # The weights of a mean are known, so one pass is enough.
    size = base.global_size(microbatching.num_rows(meta_batch), axis_name)
    # For an empty batch, `losses_fn` raises an InputError.
    weighted = weighted_gradient(sign / max(size, 1))
    loss, _ = _meta_loss(None, weighted.losses, axis_name)
    return weighted.losses, loss, weighted.gradient, weighted.aux
  linearize = microbatching.microbatched(linearization.linearize, microbatch_size)
  linearized = linearize(losses_fn, leaves, meta_batch, has_aux=True)
  loss, cotangent = _meta_loss(objective, linearized.losses, axis_name)
  gradient = weighted_gradient(sign * cotangent).gradient
  return linearized.losses, loss, gradient, linearized.aux


def batch_after(direction: Direction, batch: Any) -> Any:
  """Returns a copy of `batch` that is available only after the direction.

  The direction of L2RW, at a zero inner gradient, depends only on the meta batch. A
  compiler may still run the forward pass of the training batch first, as XLA:CPU does,
  and then the activations of both batches are in memory at the same time. This function
  costs a copy of the batch, which is much smaller than the activations.

  Args:
    direction: the result of `direction`.
    batch: pytree of arrays. Typed PRNG keys are returned as they are.
  """
  return ordering.after(_last_scalar(direction), batch)


def _last_scalar(direction):
  """A number that is computed only after the whole direction."""
  # `zero_slope` depends on every number of the direction, and, unlike `finite`, on no
  # sum over devices except that of the meta gradient.
  return jnp.asarray(direction.zero_slope, jnp.float32)


def order_of(direction: Direction, batch: Any) -> base.StaticStr:
  """The order of the two batches that needs less memory.

  With "batches", the meta batch is finished before the training batch begins. Memory
  then contains the activations of one batch at a time, and the whole direction.
  "layers" leaves the order to the compiler. Memory then contains the activations of
  both batches, even those that the network recomputes, but only the part of the
  direction that the current layer needs. The result is "layers" if the parameters
  outside of loops take more memory than these activations of `batch`.

  Args:
    direction: the result of `direction`.
    batch: the training batch, whose arrays have a row per example.
  """
  rows = [x.shape[0] for x in jax.tree.leaves(batch) if getattr(x, "shape", ())]
  is_small = bool(rows) and direction.activation_ratio * max(rows) < 1
  return base.StaticStr("layers" if is_small else "batches")


def after_direction(
  direction: Direction, batch: Any, function: Callable[[Any], Any]
) -> Any:
  """`function(batch)`, in the order that needs less memory, see `order_of`.

  Args:
    direction: the result of `direction`.
    batch: pytree of arrays, the training batch.
    function: the computation that follows.
  """
  if order_of(direction, batch) == "layers":
    return function(batch)
  batch = batch_after(direction, batch)
  return loop_buffers.allocated_after(_last_scalar(direction), lambda: function(batch))


def local(direction: Direction, axis_name: base.AxisName) -> Direction:
  """`direction` with its vector marked as varying over devices, see `base.local`."""
  return direction._replace(vector=base.local(direction.vector, axis_name))


def known_vector(direction: Direction) -> base.PyTree | None:
  """The vector along which `weight_gradient` takes the derivative, or None.

  It is None if a parameter is float16, because `weight_gradient` then scales the
  vector. If only the losses are float16, which is not known yet, `weight_gradient`
  scales the vector, too, and a derivative along the unscaled vector is not used.
  """
  types = [x.dtype for x in jax.tree.leaves(direction.vector)]
  return None if any(map(_is_narrow, types)) else direction.vector


def weight_gradient(
  linearized: base.Linearized, direction: Direction, axis_name: base.AxisName = None
) -> base.Array:
  """dM/dw, [B]: the gradient of the meta loss with respect to this device's weights.

  Its type is float32 or wider. If parameters or losses are float16, the direction is
  first scaled to about unit length by a power of two, because the small derivatives
  along a short direction would underflow. bfloat16 needs no scaling, because it has the
  range of float32.
  """
  types = [x.dtype for x in jax.tree.leaves((direction.vector, linearized.losses))]
  dtype = base.accumulator_dtype(linearized.losses.dtype)
  if any(map(_is_narrow, types)):
    vector, length = _unit(direction.vector)
    slopes = linearized.directional(base.local(vector, axis_name))
    slopes = slopes.astype(dtype) * length.astype(dtype)
  else:
    vector = base.local(direction.vector, axis_name)
    slopes = linearized.directional(vector).astype(dtype)
  return slopes + through_value(direction, linearized.losses.astype(dtype), axis_name)


def through_value(
  direction: Direction, derivative: base.Array, axis_name: base.AxisName = None
) -> base.Array:
  """`derivative` of the inner loss times dM/d value, and 0 if the latter is 0.

  Args:
    direction: the result of `direction`.
    derivative: derivative of the inner loss, which may be infinite if it is not used.
    axis_name: mapped device axis over which `derivative` varies.
  """
  if direction.value_slope is None:
    return jnp.zeros_like(derivative)
  slope = base.local(direction.value_slope, axis_name).astype(derivative.dtype)
  is_used = slope != 0  # True for NaN, too.
  return jnp.where(is_used, slope * derivative, jnp.zeros_like(derivative))


def _unit(vector):
  """`vector` divided by a power of two near its length, and the power, a scalar."""

  # Do not divide in float16, which flushes small divisors to zero.
  def wide(x):
    return x.astype(base.accumulator_dtype(x.dtype))

  leaves = [wide(x) for x in jax.tree.leaves(vector) if _is_inexact(x.dtype)]
  largest = base.max_abs(vector)
  largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  squares = [
    jnp.sum(jnp.abs(base.divide_by_largest(x, largest)).astype(largest.dtype) ** 2)
    for x in leaves
  ]
  norm = largest * jnp.sqrt(jnp.sum(jnp.stack(squares)))
  _, exponent = jnp.frexp(jnp.where(norm > 0, norm, 1))
  length = jnp.ldexp(jnp.ones((), norm.dtype), exponent)

  def scaled(x):
    if not _is_inexact(x.dtype):
      return x
    return base.divide_by_largest(wide(x), length).astype(x.dtype)

  return jax.tree.map(scaled, vector), length


def _is_inexact(dtype):
  return jnp.issubdtype(dtype, jnp.inexact)


def _is_narrow(dtype):
  """Whether the smallest normal number of a type is larger than that of float32."""
  return _is_inexact(dtype) and jnp.finfo(dtype).tiny > jnp.finfo(jnp.float32).tiny


def network_gradient(
  weights_fn: Callable[[base.PyTree], base.Array],
  phi: base.PyTree,
  weight_gradient: base.Array,
  *,
  axis_name: base.AxisName = None,
) -> base.PyTree:
  """dM/dphi = (dw/dphi)^T dM/dw, for a network that computes the weights.

  Args:
    weights_fn: `phi -> w [B]`, this device's weights in the inner loss
      sum_i w_i l_i, including any factor 1/B.
    phi: parameters of the weighting network.
    weight_gradient: dM/dw at those weights, [B].
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    The gradient summed over devices, shaped like `phi`.

  Raises:
    InputError: `weights_fn` does not return one weight for each weight gradient.
    FloatingPointError: outside `jit`, if the weight gradient, the weights or the result
      is not finite.
  """
  weights, weights_vjp = jax.vjp(weights_fn, base.local(phi, axis_name))
  weight_gradient = jnp.asarray(weight_gradient)
  if jnp.shape(weights) != weight_gradient.shape:
    raise base.InputError(
      "weights_fn must return one weight for each weight gradient, shape"
      f" {weight_gradient.shape}; got {jnp.shape(weights)}."
    )
  base.check_finite("weight gradients dM/dw", weight_gradient, axis_name)
  base.check_finite("weights", weights, axis_name, ": check phi and the losses")
  gradient = base.psum(weights_vjp(weight_gradient.astype(weights.dtype))[0], axis_name)
  check_network_gradient(gradient)
  return gradient


def check_network_gradient(gradient: base.PyTree) -> base.Array:
  """Whether dM/dphi is finite; bool scalar.

  Raises:
    FloatingPointError: outside `jit`, if it is not.
  """
  finite = base.all_finite(gradient)
  if not isinstance(finite, jax.core.Tracer) and not finite:
    raise FloatingPointError(
      "the gradient of the network that computes the weights (or gates) is NaN or"
      " infinite, but the direction is finite: check the scale of its inputs, the"
      " losses, and its parameters."
    )
  return finite


def unrolled_weight_gradient(
  losses_fn: base.LossesFn,
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  meta_batch: Any,
  weights: base.Array,
  *,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree,
  objective: Objective = jnp.mean,
) -> base.Array:
  """dM/dw [B] by the definition: `jax.grad` through the unrolled inner step.

  This is the reference for `direction` and `weight_gradient`, which compute the same
  numbers in about half the time. It runs on one device, for weights of any value.

  Raises:
    InputError: the losses or the weights do not have shape [B], or the meta losses do
      not have shape [M].
  """
  partition = trainable.Partition(params)

  def meta_loss(weights):
    def weighted_loss(leaves):
      losses = losses_fn(partition.combine(leaves), batch)
      base.check_losses("losses_fn's result", losses)
      if weights.shape != losses.shape:
        raise base.InputError(
          f"weights must be one number per loss, {losses.shape}; got {weights.shape}."
        )
      return jnp.sum(weights * losses)

    value, gradient = jax.value_and_grad(weighted_loss)(partition.leaves(params))
    gradient = partition.combine_gradient(gradient)
    stepped = lookahead_params(params, gradient, optimizer, opt_state, value)
    losses = meta_losses_fn(stepped, meta_batch)
    base.check_losses("meta_losses_fn's result", losses)
    return objective(losses)

  return jax.grad(meta_loss)(jnp.asarray(weights))


def _state(gradient, vector, value_slope) -> base.Array:
  """The `_State` of lists of arrays and of dM/d value, int32 scalar."""
  # Compile time grows with the number of kernels, so all small arrays of a type are
  # checked by one kernel.
  large: list[Any] = []
  small: dict[Any, list[Any]] = {}
  for g, v in zip(gradient, vector, strict=True):
    aval = jax.typeof(g)
    if g.size > _SMALL or any(aval.sharding.spec):
      large.append((g, v))
    elif g.size:
      key = (g.dtype, v.dtype, frozenset(aval.manual_axis_type.varying))
      small.setdefault(key, []).append((g.reshape(-1), v.reshape(-1)))
  for pairs in small.values():
    large.append(tuple(jnp.concatenate(arrays) for arrays in zip(*pairs, strict=True)))
  # Reduce first: a state for every entry would take as much memory as the parameters.
  maxima = [(_largest(g), _largest(v)) for g, v in large or [(jnp.zeros(1),) * 2]]
  g, v = (jnp.stack(numbers) for numbers in zip(*maxima, strict=True))
  unused = jnp.where(g == 0, _State.ZERO, _State.IGNORED)
  states = jnp.where(v == 0, unused, _State.USED)
  states = jnp.where(jnp.isinf(v), _State.INFINITE, states)
  states = jnp.where(jnp.isnan(v), _State.NAN, states)
  states = jnp.where(jnp.isfinite(g), states, _State.BAD_GRADIENT).astype(jnp.int32)
  if value_slope is not None:
    # A slope that is not 0 does not show that the gradient is used.
    fault = jnp.where(jnp.isnan(value_slope), _State.NAN, _State.INFINITE)
    is_finite = jnp.isfinite(value_slope)
    of_slope = jnp.where(is_finite, _State.ZERO, fault).astype(jnp.int32)
    states = jnp.append(states, of_slope)
  # The maximum, as the last element of a sort, for the reason in `base.max_abs`.
  return jnp.sort(states)[-1]


@jax.jit  # It is traced once for all arrays of a shape.
def _largest(x):
  return jnp.max(jnp.abs(x)).astype(jnp.result_type(float))


def _check_finite(losses, loss, state, axis_name) -> base.Array:
  """The `base.Fault` of a direction; raises FloatingPointError outside `jit`.

  Args:
    losses: meta losses of this device, [M].
    loss: the meta loss.
    state: the `_State` of the meta gradient and the direction.
    axis_name: mapped device axis.
  """
  prefix = "non-finite direction: "
  losses_finite = base.check_finite(
    "meta losses", losses, axis_name, ": check meta_batch and params"
  )
  losses_finite &= jnp.isfinite(loss)
  fault = base.first_fault(
    jnp.zeros((), jnp.int32),
    meta_losses=losses_finite,
    meta_gradient=state < _State.BAD_GRADIENT,
    optimizer_step=state <= _State.USED,
  )
  holds_nan = state == _State.NAN
  checks = (
    (fault != base.Fault.META_LOSSES, _META_LOSS),
    (fault != base.Fault.META_GRADIENT, _META_GRADIENT),
    ((fault != base.Fault.OPTIMIZER_STEP) | ~holds_nan, _TRAPPED),
    ((fault != base.Fault.OPTIMIZER_STEP) | holds_nan, _OVERFLOW),
  )
  for holds, message in checks:
    if isinstance(holds, jax.core.Tracer):
      # This has no effect unless the caller uses `checkify.checkify`.
      checkify.debug_check(holds, prefix + message)
    elif not holds:
      raise FloatingPointError(prefix + message)
  return fault


def _check_slope(state) -> base.Array:
  """Whether the step ignores the gradient; raises InputError outside `jit` if so."""
  zero_slope = state == _State.IGNORED
  if isinstance(zero_slope, jax.core.Tracer):
    checkify.debug_check(~zero_slope, ZERO_SLOPE)
  elif zero_slope:
    raise base.InputError(ZERO_SLOPE)
  return zero_slope
