"""Linearization of a batch: losses, directional derivatives, weighted gradients.

Every weighting method needs the same three results for a batch. If l(p) in R^B is the
vector of per-example losses and J is its Jacobian, these are

    losses                l(p)
    directional(v)        J v       derivative of each example's loss along v
    weighted_gradient(w)  J^T w     gradient of sum_i w_i l_i

`linearize` stores no per-example gradients, except those of parameters that are
broadcast over the examples, such as biases, which take no more memory than activations.
There is an engine for nearly every model; by default, the results are exact, and the
losses need one forward pass.
"""

from collections.abc import Callable
import operator
from typing import Any

from absl import logging
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import backward_rules
from l2rw_jax.linearization import layerwise
from l2rw_jax.linearization import parameter_uses
from l2rw_jax.linearization import surrogates
from l2rw_jax.linearization import trainable

_OUTPUT_ENGINES = ("forward", "reverse", "difference")
ENGINES = ("auto", "layerwise", *_OUTPUT_ENGINES)


def linearize(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "auto",
  direction: base.PyTree | None = None,
) -> base.Linearized:
  """Linearizes the per-example losses of one batch at `params`.

  All engines except `difference` are exact. The backward rule of a `jax.custom_vjp`
  must be linear in its cotangent; a rule that clips gradients, for instance, is not,
  and is refused if `backward_rules` detects it. The three costs in the table are those
  of `linearize` itself (recording), of `directional` and of `weighted_gradient`. Their
  unit is a forward pass of the batch, and the first forward pass is not counted.

  ============  =========  ====================================================
  layerwise     1, 1, 1    One backward pass records every use of a parameter,
                           see `layerwise`. For models that process examples
                           independently (so without BatchNorm in training mode)
                           and have no `jax.custom_vjp` that takes parameters.
                           Layers or time steps may be in `jax.lax.scan`. Under
                           `jax.checkpoint` the costs are 2, 3, 3.
  forward       0, 2, 2    `jax.linearize`. For any model with a forward-mode
                           derivative. Under `jax.checkpoint` the recomputed
                           values are not stored, and the costs are 0, 3, 3,
                           or 0, 2, 3 with `direction`.
  reverse       0, 2, 2    The gradient of `w -> <J^T w, v>`. For models with a
                           `jax.custom_vjp`, which has no forward mode; its
                           backward rule must be differentiable.
  difference    0, 2, 2    (l(p + h v) - l(p - h v)) / 2h. For backward rules that
                           are not differentiable, such as those of many kernels;
                           the error is about 1e-3 of the largest entry if all
                           computations are in float32, and a few percent if one is
                           in half precision. Arguments of `stop_gradient` are held
                           fixed; functions whose declared derivative differs by
                           more than 10% from the derivative of their values
                           (straight-through, gradient reversal) are refused.
  auto                     The default: layerwise if the model allows it, else
                           forward. If at least a fourth of the FLOPs are in a
                           `jax.checkpoint` that takes parameters, forward is
                           cheaper and is used, unless the model has a
                           `jax.custom_vjp`.
  ============  =========  ====================================================

  Args:
    losses_fn: `(params, batch) -> losses [B]`, or `(losses [B], aux)` with
      `has_aux`. It must be pure: with dropout, close over the key.
    params: any pytree. Leaves that are not floating point or complex (counters,
      keys, masks) are held fixed; their gradients are zeros.
    batch: the batch, in the form that `losses_fn` takes.
    has_aux: whether `losses_fn` returns an auxiliary output in addition to the
      losses, such as new BatchNorm statistics.
    engine: one of the engines in the table.
    direction: the vector, shaped like `params`, with which `directional` will be
      called, if it is known. Forward mode then computes this derivative together with
      the losses and stores nothing for it; other engines ignore `direction`. Calling
      `directional` with another vector, even an equal copy, takes another pass.

  Returns:
    A `base.Linearized`. Its functions may be called any number of times, but only in
    the trace in which `linearize` was called.

  Raises:
    InputError: the losses are not floating-point numbers of shape [B], `params` has no
      trainable leaf, the result of `losses_fn` does not match `has_aux`, or `engine` is
      unknown or does not support the model (the message names an engine that does).

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, x: (x @ p) ** 2
    >>> lin = linearize(losses_fn, jnp.array([1., 2.]), jnp.eye(2))
    >>> print(lin.losses, lin.directional(jnp.array([1., 0.])))
    [1. 4.] [2. 0.]
    >>> print(lin.weighted_gradient(jnp.array([0., 1.])))
    [0. 4.]
  """

  def checked(params, batch):
    return base.losses_and_aux("losses_fn", losses_fn(params, batch), has_aux)

  if engine not in ENGINES:
    raise base.InputError(f"engine={engine!r}: choose one of {ENGINES}.")
  trainable.check(params)
  linearized = _layerwise(checked, params, batch, engine)
  if linearized is None:
    engine = "forward" if engine == "auto" else engine
    if engine == "forward" and direction is not None:
      linearized = _along(checked, params, batch, direction)
    else:
      linearized = linearize_outputs(
        checked, params, batch, has_aux=True, engine=engine
      )
  losses = linearized.outputs

  def weighted_gradient(weights):
    weights = jnp.asarray(weights)
    if weights.shape != losses.shape:
      raise base.InputError(
        f"weights must be one number per loss, {losses.shape}; got {weights.shape}."
      )
    return linearized.vjp(base.sharded_like(weights.astype(losses.dtype), losses))

  return base.Linearized(
    losses, linearized.jvp, weighted_gradient, linearized.aux, linearized.engine
  )


def _layerwise(losses_fn, params, batch, engine):
  """The result of the layerwise engine; None if another engine is to be used."""
  if engine not in ("auto", "layerwise"):
    return None
  partition = trainable.Partition(params)
  try:
    losses, directional, weighted_gradient, aux = layerwise.linearize(
      lambda leaves, batch: losses_fn(partition.combine(leaves), batch),
      partition.leaves(params),
      batch,
      partition.names,
      recompute=True if engine == "layerwise" else None,
    )
  except parameter_uses.NotLayerwiseError as error:
    if engine == "layerwise":
      raise base.InputError(
        f"engine='layerwise' does not fit this model: {error}. Use engine='forward'."
      ) from error
    _log_fallback(error)
    return None
  except Exception as error:
    # Either the batch contains something other than arrays, which forward mode accepts,
    # or the losses function has an error, which forward mode reports more clearly.
    if engine == "layerwise":
      raise
    _log_fallback(error)
    return None
  return base.LinearizedOutputs(
    losses,
    lambda vector: directional(partition.vector_leaves("vector", vector)),
    lambda weights: partition.combine_gradient(weighted_gradient(weights)),
    aux,
    base.StaticStr("layerwise"),
  )


def _along(losses_fn, params, batch, direction):
  """Forward mode, with the derivative along `direction` in the first pass.

  No intermediate values are stored for a later call of `directional`. If the network is
  under `jax.checkpoint`, nothing is recomputed for this derivative.
  """
  partition = trainable.Partition(params)
  leaves, known = partition.leaves(params), jax.tree.leaves(direction)
  tangents = partition.vector_leaves("direction", direction)

  def losses_and_aux(leaves):
    return losses_fn(partition.combine(leaves), batch)

  def losses_and_derivatives(leaves):
    losses, derivatives, aux = jax.jvp(
      losses_and_aux, (leaves,), (tangents,), has_aux=True
    )
    return losses, (derivatives, aux)

  try:
    losses, vjp_fn, (derivatives, aux) = jax.vjp(
      losses_and_derivatives, leaves, has_aux=True
    )
  except (TypeError, NotImplementedError, ValueError) as error:
    jax.eval_shape(losses_and_aux, leaves)  # Raises errors of `losses_fn` itself.
    raise _no_forward_derivative(error) from error
  if isinstance(losses, jax.core.Tracer):
    _check_forward_mode(losses_and_aux, losses_and_derivatives, leaves)

  def directional(vector):
    given = jax.tree.leaves(vector)
    if len(given) == len(known) and all(map(operator.is_, given, known)):
      return derivatives
    tangents = partition.vector_leaves("vector", vector)
    return jax.jvp(losses_and_aux, (leaves,), (tangents,), has_aux=True)[1]

  return base.LinearizedOutputs(
    losses,
    directional,
    lambda weights: partition.combine_gradient(vjp_fn(weights)[0]),
    aux,
    base.StaticStr("forward"),
  )


def _log_fallback(reason):
  logging.log_first_n(
    logging.INFO, "using forward mode instead of the layerwise engine: %s", 1, reason
  )


def linearize_outputs(
  outputs_fn: Callable[..., Any],
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "forward",
) -> base.LinearizedOutputs:
  """Linearizes the outputs of a network for one batch at `params`.

  Use it for methods that replace the loss by other functions of the network's outputs
  (of rectified logits or gated features, for instance): one forward pass of the network
  is enough for all of these functions.

  Args:
    outputs_fn: `(params, batch) -> outputs`, a pytree of floating-point arrays, or
      `(outputs, aux)` with `has_aux`.
    params: see `linearize`.
    batch: the batch, in the form that `outputs_fn` takes.
    has_aux: whether `outputs_fn` returns an auxiliary output in addition to the
      outputs.
    engine: "forward", "reverse" or "difference", see `linearize`.

  Returns:
    A `base.LinearizedOutputs`.

  Raises:
    InputError: the arguments are invalid, see `linearize`, or no output is
      floating-point or complex; outputs may have any shape.

  Example:
    >>> import jax.numpy as jnp
    >>> lin = linearize_outputs(lambda p, x: x * p[None], jnp.ones(2), jnp.eye(2))
    >>> print(lin.jvp(jnp.array([1., 0.])))
    [[1. 0.]
     [0. 0.]]
  """
  if engine not in _OUTPUT_ENGINES:
    raise base.InputError(f"engine={engine!r}: choose one of {_OUTPUT_ENGINES}.")
  trainable.check(params)
  partition = trainable.Partition(params)

  def outputs_and_aux(leaves):
    result = outputs_fn(partition.combine(leaves), batch)
    outputs, aux = base.split_aux("outputs_fn", result, has_aux)
    types = [jnp.result_type(x) for x in jax.tree.leaves(outputs)]
    if not any(jnp.issubdtype(t, jnp.inexact) for t in types):
      raise base.InputError(
        "outputs_fn returned no floating-point array (the types are"
        f" {', '.join(map(str, types)) or 'none'}), so it has no derivative."
      )
    return outputs, aux

  leaves = partition.leaves(params)
  if engine == "forward":
    try:
      outputs, jvp_fn, aux = jax.linearize(outputs_and_aux, leaves, has_aux=True)
    except (TypeError, NotImplementedError, ValueError) as error:
      jax.eval_shape(outputs_and_aux, leaves)  # Raises errors of `outputs_fn` itself.
      raise _no_forward_derivative(error) from error
    vjp_fn = jax.linear_transpose(jvp_fn, leaves)
    jvp_fn = _without_custom_vjp(jvp_fn, outputs)
  else:
    outputs, vjp_fn, aux = jax.vjp(outputs_and_aux, leaves, has_aux=True)
    if engine == "reverse":
      traced = jax.make_jaxpr(lambda leaves: outputs_and_aux(leaves)[0])(leaves)
      name = backward_rules.find_nonlinear(traced.jaxpr)
      if name is not None:
        raise base.InputError(
          f"no exact engine fits this model: the backward rule of {name} is not linear"
          " in its cotangent (it clips gradients, for instance). Clip gradients in the"
          " optimizer instead, or pass engine='difference', which is approximate."
        )
      jvp_fn = _double_reverse(vjp_fn, outputs)
    else:
      outputs_of, epsilon = _without_surrogates(outputs_and_aux, leaves)
      jvp_fn = _central_difference(outputs_of, leaves, epsilon)

  return base.LinearizedOutputs(
    outputs,
    lambda vector: jvp_fn(partition.vector_leaves("vector", vector)),
    lambda cotangent: partition.combine_gradient(vjp_fn(cotangent)[0]),
    aux,
    base.StaticStr(engine),
  )


def _double_reverse(vjp_fn, outputs):
  # `vjp_fn` is linear, so its derivative is the same at every point. It is taken at a
  # cotangent of ones, where a backward rule that divides by its cotangent stays finite.
  _, jvp_fn = jax.vjp(lambda c: vjp_fn(c)[0], jax.tree.map(jnp.ones_like, outputs))
  return lambda vector: jvp_fn(vector)[0]


def _without_surrogates(outputs_and_aux, leaves):
  """The outputs as a function whose finite differences match declared derivatives.

  Returns:
    The function, and the rounding error of its least precise intermediate result.

  Raises:
    InputError: the outputs use a function whose declared derivative is not the
      derivative of its values.
  """

  def outputs_of(leaves):
    return outputs_and_aux(leaves)[0]

  closed, shapes = jax.make_jaxpr(outputs_of, return_shape=True)(leaves)
  name = surrogates.find(closed.jaxpr)
  if name is not None:
    raise base.InputError(
      "engine='difference' does not fit this model: the declared derivative of"
      f" {name} is not the derivative of its values (as in a straight-through"
      " estimator or a gradient reversal). Pass engine='reverse', or 'forward' if"
      " that function is a jax.custom_jvp."
    )
  flat_outputs_of = surrogates.hold_stopped(
    lambda leaves: jax.tree.leaves(outputs_of(leaves)), leaves
  )
  treedef = jax.tree.structure(shapes)
  return (
    lambda leaves: jax.tree.unflatten(treedef, flat_outputs_of(leaves)),
    largest_epsilon(closed.jaxpr),
  )


def largest_epsilon(jaxpr, flags=None):
  """The largest machine epsilon of the types in which a function computes.

  Args:
    jaxpr: the function.
    flags: for each input, whether values that are computed from it matter; None means
      that all of them do.
  """
  flags = [True] * len(jaxpr.invars) if flags is None else flags
  depends = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}
  epsilons = [0.0]
  for eqn in jaxpr.eqns:
    given = [not isinstance(v, jax_core.Literal) and v in depends for v in eqn.invars]
    if not any(given):
      continue
    depends.update(eqn.outvars)
    for inner in jax_core.jaxprs_in_params(eqn.params):
      inner = getattr(inner, "jaxpr", inner)
      is_same = len(inner.invars) == len(given)
      epsilons.append(largest_epsilon(inner, given if is_same else None))
  types = {x.aval.dtype for x in depends if hasattr(x.aval, "dtype")}
  epsilons += [float(jnp.finfo(t).eps) for t in types if jnp.issubdtype(t, jnp.inexact)]
  return max(epsilons)


def _central_difference(outputs_of, leaves, epsilon):
  """Directional derivative from two forward passes.

  The sum of the truncation error (h^2) and the rounding error (eps / h) is smallest if
  the relative step is near the cube root of eps. The step is relative to the norm of
  the parameters, because the scale of the direction is arbitrary.
  """
  relative_step = 0.2 * epsilon ** (1 / 3)
  is_double = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
  dtype = jnp.float64 if is_double else jnp.float32  # The dtype of step sizes.

  def jvp_fn(vector):
    if not vector:
      return jax.tree.map(jnp.zeros_like, jax.eval_shape(outputs_of, leaves))
    # The vector is divided by its largest entry, because squares of entries of 1e-20
    # would underflow in float32. The maxima are sorted, because XLA would recompute
    # their maximum in every operation that uses it.
    largest = jnp.sort(jnp.stack([_largest(v).astype(dtype) for v in vector]))[-1]
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    vector = [_divided(_wide(v, dtype), largest) for v in vector]
    length = jnp.maximum(_norm(vector, dtype), 1)
    step = relative_step * jnp.maximum(_norm(leaves, dtype), 1) / length

    def outputs_at(sign):
      return outputs_of(
        [
          (_wide(x, dtype) + (sign * step).astype(v.dtype) * v).astype(x.dtype)
          for x, v in zip(leaves, vector, strict=True)
        ]
      )

    def slope(ahead, behind):
      change = _divided(_wide(ahead - behind, dtype), 2 * step)
      return (change * largest.astype(change.dtype)).astype(ahead.dtype)

    return jax.tree.map(slope, outputs_at(1.0), outputs_at(-1.0))

  return jvp_fn


def _wide(x, dtype):
  """Casts a real or complex array to the precision of the real type `dtype`."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
  return x.astype(dtype)


def _divided(x, scalar):
  """A real or complex array divided by a real scalar, without implicit promotion."""
  return x / scalar.astype(x.dtype)


def _largest(x):
  return jnp.max(jnp.abs(x), initial=0)


def _norm(arrays, dtype):
  """The Euclidean norm of a list of arrays."""
  norms = jnp.stack(
    [jnp.sqrt(jnp.sum(jnp.square(jnp.abs(_wide(x, dtype))))) for x in arrays]
  )
  # Use a dot product, because XLA repeats a chain of sums, see `ordering.zero_after`.
  return jnp.sqrt(jnp.dot(norms, norms, precision="highest"))


def _without_custom_vjp(jvp_fn, outputs):
  """Wraps `jvp_fn` to raise InputError if it contains a `jax.custom_vjp`."""

  def checked(vector):
    # JAX also raises an error, but under `jit` only when the program is compiled.
    leaves = (*jax.tree.leaves(outputs), *vector)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if traced and _has_custom_vjp(jax.make_jaxpr(jvp_fn)(vector).jaxpr):
      raise _no_forward_derivative("it is a jax.custom_vjp")
    try:
      return jvp_fn(vector)
    except TypeError as error:
      if "custom_vjp" not in str(error):
        raise
      raise _no_forward_derivative(error) from error

  return checked


def _check_forward_mode(losses_and_aux, losses_and_derivatives, leaves):
  """Raises InputError if the derivatives need forward mode of a `jax.custom_vjp`.

  This check is needed under `jit`, where JAX raises an error only when the program is
  compiled.
  """
  # The derivative takes longer to trace than the network, so it is traced only if the
  # network has a `jax.custom_vjp`, which most networks do not have.
  network = jax.make_jaxpr(losses_and_aux)(leaves).jaxpr
  if _has_primitive(network, "custom_vjp_call") and _has_custom_vjp(
    jax.make_jaxpr(losses_and_derivatives)(leaves).jaxpr
  ):
    raise _no_forward_derivative("it is a jax.custom_vjp")


def _has_custom_vjp(jaxpr):
  return _has_primitive(jaxpr, "custom_lin")


def _has_primitive(jaxpr, name):
  """Whether `jaxpr` has an operation of this name, possibly nested."""
  return any(
    eqn.primitive.name == name
    or any(
      _has_primitive(inner, name) for inner in jax_core.jaxprs_in_params(eqn.params)
    )
    for eqn in jaxpr.eqns
  )


def _no_forward_derivative(reason):
  first_line = str(reason).partition("\n")[0].rstrip(".")
  return base.InputError(
    "the model contains an operation without a forward-mode derivative"
    f" ({first_line}). Pass engine='reverse' (exact), or"
    " engine='difference' (two more forward passes; the backward rule need not be"
    " differentiable)."
  )
