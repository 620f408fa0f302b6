"""The derivative of a meta loss through one optimizer step.

With M(p) the mean loss of the meta batch (or another objective of its losses)
and one optax step

    step(g) = apply_updates(p, optimizer.update(g, opt_state, p)[0])

taken with the weighted gradient g(w) = J^T w of a batch (see `linearization`):

    look-ahead        p' = step(g(w))
    direction         v  = (d step / d g)^T grad M(p')    one cheap vjp, O(params)
    weight gradient   dM/dw = J v                         all B numbers at once
    network gradient  dM/dphi = (dw/dphi)^T (dM/dw)       when phi makes w

which equals differentiating the unrolled step (`unrolled_weight_gradient`, kept
as the definition) to rounding, at roughly half its cost. Nothing here
differentiates a collective: the meta gradient is averaged over devices first, and
an objective is differentiated where its losses are already gathered.

Reference: Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
(2018), eq. (4)-(7) and appendix A; any optax optimizer in place of their SGD.
"""

from collections.abc import Callable
import functools
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import checkify
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax.linearization import engines
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import ordering

# The losses [M] of the global meta batch to the meta loss, a scalar.
Objective = Callable[[base.Array], base.Array]
OPTIMIZER_TRAP = (
  "optimizers that divide by the root of a squared gradient (adam, adamw, lamb,"
  " muon, clip_by_global_norm) have no derivative at the zero gradient where"
  " example weights are linearized. Use optimizer=optax.sgd(...), or adam with"
  " eps_root > 0."
)
_TRAPPED = (
  "the meta gradient is finite, but not after the look-ahead optimizer's step."
  " If it holds NaN, " + OPTIMIZER_TRAP
)
_OVERFLOW = (
  "the meta gradient is finite, but the look-ahead optimizer's step turns it into"
  " infinity: it overflows. Scale the inputs or lower the learning rate."
)
_META_LOSS = (
  "a meta loss, or the objective made of them, is NaN or infinite: check meta_batch"
  " and params."
)
_META_GRADIENT = (
  "the meta losses are finite, but their gradient is NaN or infinite: check"
  " meta_batch (the scale of its inputs), params and the derivative of the loss."
)
ZERO_SLOPE = (
  "the look-ahead optimizer's step does not change with the gradient, so that no"
  " example can matter and all weights would be zero: its learning rate is 0 here"
  " (warm-up, a schedule that ended), or it accumulates gradients (MultiSteps,"
  " apply_every), or takes signs (lion, sign_sgd). Use optimizer=optax.sgd(...) for"
  " the look-ahead."
)


class Direction(NamedTuple):
  """How the meta loss feels a change of the inner gradient.

  Attributes:
    vector: v, shaped like `params`; dM/dw = J v for any example weights w.
    meta_loss: M at the looked-ahead parameters, scalar, of the global meta batch.
    finite: False when a meta loss, the meta loss, its gradient or `vector` holds a
      NaN or an infinity; bool scalar.
    zero_slope: whether `vector` is zero everywhere although the meta gradient is
      not: the optimizer's step ignores the gradient; bool scalar.
    fault: which of them was not finite, a `base.Fault`; int32 scalar.
    aux: what the meta losses function returned in addition to its losses, else None.
  """

  vector: base.PyTree
  meta_loss: base.Array
  finite: base.Array
  zero_slope: base.Array
  fault: base.Array
  aux: Any = None


def init_optimizer(
  optimizer: optax.GradientTransformation, params: base.PyTree
) -> base.PyTree:
  """`optimizer.init(params)`, whatever JAX's switches against promotion are.

  Args:
    optimizer: any optax optimizer.
    params: any pytree of parameters, which may hold PRNG keys.
  """
  with base.implicit_promotion():
    return optimizer.init(engines.without_keys(params))


def lookahead_params(
  params: base.PyTree,
  gradient: base.PyTree,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree,
  value: Any = None,
) -> base.PyTree:
  """Parameters after one optimizer step; the state it would leave is dropped.

  Args:
    params: before the step.
    gradient: of the inner loss.
    optimizer: any whose update takes no more than `params` and `value`.
    opt_state: its state at `params`.
    value: the inner loss, which some optimizers watch; None is 0, the loss whose
      weights are all zero.

  Raises:
    InputError: the update of the optimizer needs other arguments.
  """
  value = jnp.zeros(()) if value is None else value
  try:
    with base.implicit_promotion():
      updates, _ = optax.with_extra_args_support(optimizer).update(
        engines.without_keys(gradient),
        opt_state,
        engines.without_keys(params),
        value=value,
      )
  except TypeError as error:
    missing = re.search(r"missing .*required .*arguments?: (.*)", str(error))
    if missing is None:
      raise
    raise base.InputError(
      "the look-ahead takes one step with a gradient, params and value, but the"
      f" update of this optimizer also needs {missing[1]} (a line search): use"
      " another optimizer for the look-ahead, such as optax.sgd(...)."
    ) from error
  partition, combine = engines.differentiable(params)
  with base.implicit_promotion():
    return combine(optax.apply_updates(partition(params), partition(updates)))


def direction(
  meta_losses_fn: base.LossesFn,
  params: base.PyTree,
  meta_batch: Any,
  inner_gradient: base.PyTree | None = None,
  *,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree,
  objective: Objective | None = None,
  has_aux: bool = False,
  axis_name: base.AxisName = None,
  microbatch_size: int | None = None,
  value: Any = None,
) -> Direction:
  """The direction v = (d step / d g)^T grad M(step(g)) at g = `inner_gradient`.

  Args:
    meta_losses_fn: `(params, meta_batch) -> [M]` (with `has_aux`, and aux).
    params: current parameters.
    meta_batch: this device's clean examples.
    inner_gradient: gradient of the look-ahead step, the same on every device;
      None is zero, where L2RW stands.
    optimizer: the look-ahead optimizer.
    opt_state: its state at `params`.
    objective: `losses [M] -> M(p)`, of the losses of all devices in device order
      (`base.gather` what else it needs, such as groups); None is their mean. It
      should not change when every example is repeated, for a meta batch that
      does not divide among the devices is repeated on each.
    has_aux: whether `meta_losses_fn` returns something beside its losses.
    axis_name: mapped axis over which `meta_batch` is sharded.
    microbatch_size: clean examples of this device at a time, see `microbatching`.
    value: the inner loss whose gradient is `inner_gradient`, for optimizers that
      watch it (optax's `value`); None is 0.

  Returns:
    A `Direction`, the same on every device.

  Raises:
    InputError: meta losses are not of shape [M], there are none, or they cannot be
      taken `microbatch_size` at a time; or the optimizer needs more than a value.
      Outside `jit` also if the optimizer's step ignores the gradient.
    FloatingPointError: outside `jit`, if a meta loss, the meta gradient or the
      direction is not finite; the message names which. Under `jit` see
      `Direction.finite` and `Direction.zero_slope`, or functionalize with
      `checkify.checkify`, which then carries the same errors.
  """
  partition, combine = engines.differentiable(params)
  leaves = partition(params)
  if inner_gradient is None:
    inner_gradient = jax.tree.map(engines.zero, params)

  def step(gradient_leaves):
    gradient = combine(gradient_leaves, zeros=True)
    return partition(lookahead_params(params, gradient, optimizer, opt_state, value))

  def meta_losses(leaves, meta_batch):
    found = meta_losses_fn(combine(leaves), meta_batch)
    losses, aux = base.losses_and_aux("meta_losses_fn", found, has_aux)
    if losses.size == 0:
      raise base.InputError("meta_batch is empty: a meta loss needs an example.")
    return losses, aux

  ahead, transpose = jax.vjp(step, partition(inner_gradient))
  ahead = base.local(ahead, axis_name)
  if microbatch_size is None:
    losses, pull, aux = jax.vjp(
      lambda leaves: meta_losses(leaves, meta_batch), ahead, has_aux=True
    )
    loss, cotangent = _meta_loss(objective, losses, axis_name)
    (gradient,) = pull(cotangent)
  else:
    losses, loss, gradient, aux = _microbatched_meta_gradient(
      meta_losses, ahead, meta_batch, objective, axis_name, microbatch_size
    )
  meta_gradient = base.psum(gradient, axis_name)
  (vector,) = transpose(
    [g.astype(x.dtype) for g, x in zip(meta_gradient, leaves, strict=True)]
  )
  before, after = base.max_abs(meta_gradient), base.max_abs(vector)
  fault = _check_finite(losses, loss, before, after, axis_name)
  zero_slope = _check_slope(before, after)
  return Direction(
    combine(vector, zeros=True), loss, fault == 0, zero_slope, fault, aux
  )


def _meta_loss(objective, losses, axis_name):
  """The global meta loss, and its gradient in this device's own losses."""
  if objective is None:
    dtype = base.accumulator_dtype(losses.dtype)
    loss = base.pmean(jnp.mean(losses.astype(dtype)), axis_name).astype(losses.dtype)
    size = base.global_size(losses.size, axis_name)
    return loss, jnp.full_like(losses, 1 / size)
  # Every device differentiates the same function of the same gathered losses, so
  # no collective is transposed; each then pulls back the part that is its own.
  loss, gradient = jax.value_and_grad(objective)(base.gather(losses, axis_name))
  return base.pmean(loss, axis_name), base.local_slice(gradient, axis_name)


def _microbatched_meta_gradient(
  losses_fn, leaves, meta_batch, objective, axis_name, microbatch_size
):
  """This device's losses, the global meta loss, its gradient pulled back, and aux."""
  pull = functools.partial(
    microbatching.weighted_gradient,
    losses_fn,
    leaves,
    meta_batch,
    microbatch_size=microbatch_size,
    has_aux=True,
  )
  if objective is None:  # A mean asks the same of every example: one pass will do.
    size = base.global_size(microbatching.num_rows(meta_batch), axis_name)
    found = pull(1 / max(size, 1))  # Of none, the losses themselves complain.
    loss, _ = _meta_loss(None, found.losses, axis_name)
    return found.losses, loss, found.gradient, found.aux
  linearize = microbatching.microbatched(linearization.linearize, microbatch_size)
  parts = linearize(losses_fn, leaves, meta_batch, has_aux=True)
  loss, cotangent = _meta_loss(objective, parts.losses, axis_name)
  return parts.losses, loss, pull(cotangent).gradient, parts.aux


def batch_after(direction: Direction, batch: Any) -> Any:
  """`batch`, unchanged, but what is computed from it waits for the direction.

  A direction at zero (L2RW's) needs the clean batch alone. Compilers are free to run
  the training batch's forward pass before it all the same, and XLA:CPU does: then the
  activations of both batches are in memory at once. A batch is much smaller than the
  activations, so the copy that the order costs does not matter.

  Args:
    direction: of `direction`.
    batch: pytree of arrays; one that holds none of numbers is not ordered.
  """
  return ordering.after(base.max_abs(direction.vector), batch)


def weight_gradient(
  linearized: base.Linearized, direction: Direction, axis_name: base.AxisName = None
) -> base.Array:
  """dM/dw, shape [B]: the gradient of the meta loss in this device's weights.

  It is float32 at least. Where parameters or losses are float16 or bfloat16, the
  derivative is taken along the direction scaled to unit length, up to a power of two,
  since the small slopes along a short direction underflow.
  """
  types = [x.dtype for x in jax.tree.leaves((direction.vector, linearized.losses))]
  if all(base.accumulator_dtype(t) == t or not _is_inexact(t) for t in types):
    return linearized.directional(base.local(direction.vector, axis_name))
  vector, length = _unit(direction.vector)
  slopes = linearized.directional(base.local(vector, axis_name))
  dtype = base.accumulator_dtype(slopes.dtype)
  return slopes.astype(dtype) * length.astype(dtype)


def _unit(vector):
  """`vector`, divided by a power of two near its length, and that power (float32)."""

  # Not in float16, which flushes small divisors to zero.
  def wide(x):
    return x.astype(base.accumulator_dtype(x.dtype))

  leaves = [wide(x) for x in jax.tree.leaves(vector) if _is_inexact(x.dtype)]
  largest = base.max_abs(vector)
  largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  squares = [
    jnp.sum(jnp.abs(x / largest.astype(x.dtype)).astype(largest.dtype) ** 2)
    for x in leaves
  ]
  norm = largest * jnp.sqrt(jnp.sum(jnp.stack(squares)))
  _, exponent = jnp.frexp(jnp.where(norm > 0, norm, 1))
  length = jnp.ldexp(jnp.ones((), norm.dtype), exponent)

  def scaled(x):
    if not _is_inexact(x.dtype):
      return x
    return (wide(x) / length.astype(wide(x).dtype)).astype(x.dtype)

  return jax.tree.map(scaled, vector), length


def _is_inexact(dtype):
  return jnp.issubdtype(dtype, jnp.inexact)


def network_gradient(
  weights_fn: Callable[[base.PyTree], base.Array],
  phi: base.PyTree,
  weight_gradient: base.Array,
  *,
  axis_name: base.AxisName = None,
) -> base.PyTree:
  """dM/dphi = (dw/dphi)^T dM/dw for a network that makes the weights.

  Args:
    weights_fn: `phi -> w [B]`, this device's weights as they entered the inner
      gradient sum_i w_i l_i (including any 1/B).
    phi: parameters of the weighting network.
    weight_gradient: dM/dw at those weights, [B].
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    The gradient summed over devices, shaped like `phi`.

  Raises:
    FloatingPointError: outside `jit`, if the slopes, the weights or the gradient
      hold a NaN or an infinity.
  """
  weights, pull = jax.vjp(weights_fn, base.local(phi, axis_name))
  base.finite_rows("slopes dM/dw", weight_gradient, axis_name)
  base.finite_rows("weights", weights, axis_name, ": look at phi and the losses")
  gradient = base.psum(pull(weight_gradient.astype(weights.dtype))[0], axis_name)
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
      "the gradient of the network that makes the weights (or gates) is NaN or"
      " infinite, but the direction is finite: look at the scale of its inputs, the"
      " losses, and at its parameters."
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
  """dM/dw [B] as it is defined: `jax.grad` through the unrolled inner step.

  The literal reference of this file: reverse over reverse, one device, weights
  of any value. Use `direction` and `weight_gradient` for the same numbers in
  about half the time.
  """

  def meta_loss(weights):
    def weighted_loss(params):
      return jnp.sum(weights * losses_fn(params, batch))

    gradient = jax.grad(weighted_loss)(params)
    ahead = lookahead_params(params, gradient, optimizer, opt_state)
    return objective(meta_losses_fn(ahead, meta_batch))

  return jax.grad(meta_loss)(weights)


def _check_finite(losses, loss, before, after, axis_name) -> base.Array:
  """The `base.Fault` of a direction; raises outside `jit`.

  Args:
    losses: meta losses of this device, [M].
    loss: the meta loss.
    before: the largest absolute value of the meta gradient.
    after: that of the direction, behind the optimizer's step.
    axis_name: mapped device axis.
  """
  prefix = "non-finite direction: "
  losses_finite = base.finite_rows(
    "meta losses", losses, axis_name, ": check meta_batch and params"
  )
  losses_finite &= jnp.isfinite(loss)
  fault = base.first_fault(
    jnp.zeros((), jnp.int32),
    meta_losses=losses_finite,
    meta_gradient=jnp.isfinite(before),
    optimizer_step=jnp.isfinite(after),
  )
  holds_nan = jnp.isnan(after)
  checks = (
    (fault != base.Fault.META_LOSSES, _META_LOSS),
    (fault != base.Fault.META_GRADIENT, _META_GRADIENT),
    ((fault != base.Fault.OPTIMIZER_STEP) | ~holds_nan, _TRAPPED),
    ((fault != base.Fault.OPTIMIZER_STEP) | holds_nan, _OVERFLOW),
  )
  for healthy, message in checks:
    if isinstance(healthy, jax.core.Tracer):
      # A no-op unless the caller functionalizes with checkify.
      checkify.debug_check(healthy, prefix + message)
    elif not healthy:
      raise FloatingPointError(prefix + message)
  return fault


def _check_slope(before, after) -> base.Array:
  """Whether the step ignores the gradient; raises outside `jit`.

  Args:
    before: the largest absolute value of the meta gradient.
    after: that of the direction, behind the optimizer's step.
  """
  zero_slope = (after == 0) & (before != 0)
  if isinstance(zero_slope, jax.core.Tracer):
    checkify.debug_check(~zero_slope, ZERO_SLOPE)
  elif zero_slope:
    raise base.InputError(ZERO_SLOPE)
  return zero_slope
