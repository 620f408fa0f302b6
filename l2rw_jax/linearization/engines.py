"""A batch, linearized: losses, their change along a direction, weighted gradients.

Every weighting method asks a batch three things. With l(p) in R^B the
per-example losses and J their Jacobian:

    losses                l(p)
    directional(v)        J v       how each example's loss changes along v
    weighted_gradient(w)  J^T w     the gradient of sum_i w_i l_i

`linearize` answers all three after ONE forward pass, exactly, for any model,
without ever holding a per-example gradient.
"""

from collections.abc import Callable
from typing import Any

from absl import logging
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.linearization import layerwise
from l2rw_jax.linearization import parameter_uses
from l2rw_jax.linearization import surrogates

_OF_OUTPUTS = ("forward", "reverse", "difference")
ENGINES = ("auto", "layerwise", *_OF_OUTPUTS)


def linearize(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "auto",
) -> base.Linearized:
  """Linearizes the per-example losses of one batch at `params`.

  `engine` says how. All but the last are exact. Costs are in forward passes of the
  batch beyond the first: recording, `directional`, `weighted_gradient`.

  ============  =========  ====================================================
  layerwise     1, 1, 1    One backward pass records what meets the parameters,
                           see `layerwise`. For models that treat examples one
                           by one: no BatchNorm in training, no scan over data;
                           nor `jax.custom_vjp` and `jax.checkpoint`.
  forward       0, 2, 2    `jax.linearize`. For any model.
  reverse       0, 2, 2    The gradient of `w -> <J^T w, v>`. For models with a
                           `jax.custom_vjp`, which has no forward mode; its
                           backward rule must itself be differentiable.
  difference    0, 2, 2    (l(p + h v) - l(p - h v)) / 2h. Goes through any
                           kernel. About 1e-3 of the largest entry in float32.
                           What passes a `stop_gradient` is held fixed; a function
                           whose declared derivative is not the slope of its values
                           (straight-through, gradient reversal) is refused.
  auto                     layerwise where the model allows, else forward. The
                           default.
  ============  =========  ====================================================

  Args:
    losses_fn: `(params, batch) -> losses [B]`, or `(losses [B], aux)` with
      `has_aux`. Must be pure: with dropout, close over the key.
    params: any pytree. Leaves that are not floating point or complex (counters,
      keys, masks) are held fixed; their gradients are zeros.
    batch: whatever `losses_fn` takes.
    has_aux: whether `losses_fn` returns something beside the losses, such as
      new BatchNorm statistics.
    engine: one of the above.

  Returns:
    A `base.Linearized`. Its functions may be called any number of times, but
    only where `linearize` was called (the same trace).

  Raises:
    InputError: losses are not floating point numbers of shape [B], `params` holds
      nothing to train, `losses_fn` does not return what `has_aux` announces, `engine`
      is unknown or does not fit the model (the message names one that does).

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
  check_trainable(params)
  found = _layerwise(checked, params, batch, engine)
  if found is None:
    engine = "forward" if engine == "auto" else engine
    found = linearize_outputs(checked, params, batch, has_aux=True, engine=engine)
  losses = found.outputs

  def weighted_gradient(weights):
    weights = jnp.asarray(weights)
    if weights.shape != losses.shape:
      raise base.InputError(
        f"weights must be one number per loss, {losses.shape}; got {weights.shape}."
      )
    return found.vjp(base.sharded_like(weights.astype(losses.dtype), losses))

  return base.Linearized(losses, found.jvp, weighted_gradient, found.aux)


def check_trainable(params: base.PyTree) -> None:
  """Raises InputError unless a leaf of `params` is of floating point or complex type.

  Without one no example can matter, and all weights would silently be zero.
  """
  types = [_type(leaf) for leaf in jax.tree.leaves(params)]
  if not any(jnp.issubdtype(t, jnp.inexact) for t in types):
    names = sorted({str(t) for t in types})
    raise base.InputError(
      "params holds no floating point array, so that nothing can be trained"
      f" (its types: {', '.join(names) or 'none'}): convert params to float32."
    )


def _layerwise(losses_fn, params, batch, engine):
  """As `linearize_outputs`, or None where the layerwise engine is not to be used."""
  if engine not in ("auto", "layerwise"):
    return None
  partition, combine = differentiable(params)
  try:
    losses, jvp_fn, vjp_fn, aux = layerwise.linearize(
      lambda leaves, batch: losses_fn(combine(leaves), batch),
      partition(params),
      batch,
      _names(params),
    )
  except parameter_uses.NotLayerwiseError as error:
    if engine == "layerwise":
      raise base.InputError(
        f"engine='layerwise' does not fit this model: {error}. Use engine='forward'."
      ) from error
    return _log_forward(error)
  except Exception as error:
    # A batch that holds more than arrays, or a mistake in the losses function: the
    # one needs forward mode, the other is better told by it.
    if engine == "layerwise":
      raise
    return _log_forward(error)
  return base.LinearizedOutputs(
    losses,
    lambda vector: jvp_fn(partition(vector)),
    lambda weights: combine(vjp_fn(weights), zeros=True),
    aux,
  )


def _names(params):
  """Of the leaves that `differentiable` selects."""
  paths = jax.tree_util.tree_leaves_with_path(params)
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in paths
    if jnp.issubdtype(_type(leaf), jnp.inexact)
  ]


def _log_forward(reason):
  logging.log_first_n(
    logging.INFO, "forward mode instead of the layerwise engine: %s", 1, reason
  )


def linearize_outputs(
  outputs_fn: Callable[..., Any],
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "forward",
) -> base.LinearizedOutputs:
  """Linearizes what a network makes of one batch, at `params`.

  For methods that change the loss after the network (a rectified logit, a gated
  feature): the network is passed through once, whatever comes after it is cheap.

  Args:
    outputs_fn: `(params, batch) -> outputs`, a pytree of float arrays, or
      `(outputs, aux)` with `has_aux`.
    params: as in `linearize`.
    batch: whatever `outputs_fn` takes.
    has_aux: whether `outputs_fn` returns something beside the outputs.
    engine: "forward", "reverse" or "difference", see `linearize`.

  Returns:
    A `base.LinearizedOutputs`.

  Raises:
    InputError: as in `linearize`, but for the shape.

  Example:
    >>> import jax.numpy as jnp
    >>> lin = linearize_outputs(lambda p, x: x * p, jnp.array([1., 2.]), jnp.eye(2))
    >>> print(lin.jvp(jnp.array([1., 0.])))
    [[1. 0.]
     [0. 0.]]
  """
  if engine not in _OF_OUTPUTS:
    raise base.InputError(f"engine={engine!r}: choose one of {_OF_OUTPUTS}.")
  partition, combine = differentiable(params)

  def outputs_and_aux(leaves):
    return base.split_aux("outputs_fn", outputs_fn(combine(leaves), batch), has_aux)

  leaves = partition(params)
  if engine == "forward":
    try:
      outputs, jvp_fn, aux = jax.linearize(outputs_and_aux, leaves, has_aux=True)
    except (TypeError, NotImplementedError, ValueError) as error:
      jax.eval_shape(outputs_and_aux, leaves)  # Lets errors of its own pass.
      raise _no_forward_derivative(error) from error
    vjp_fn = jax.linear_transpose(jvp_fn, leaves)
    jvp_fn = _forward(jvp_fn, outputs)
  else:
    outputs, vjp_fn, aux = jax.vjp(outputs_and_aux, leaves, has_aux=True)
    if engine == "reverse":
      jvp_fn = _double_reverse(vjp_fn, outputs)
    else:
      jvp_fn = _central_difference(_without_surrogates(outputs_and_aux, leaves), leaves)

  return base.LinearizedOutputs(
    outputs,
    lambda vector: jvp_fn(partition(vector)),
    lambda cotangent: combine(vjp_fn(cotangent)[0], zeros=True),
    aux,
  )


def differentiable(
  params: base.PyTree,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The trainable leaves of a pytree, and how to put them back.

  Returns:
    select: pytree like `params` -> list of its inexact leaves.
    fill: such a list -> pytree; the other leaves as in `params`, or zeros.
  """
  all_leaves: list[Any]
  treedef: Any
  all_leaves, treedef = jax.tree.flatten(params)
  inexact = [jnp.issubdtype(_type(x), jnp.inexact) for x in all_leaves]

  def partition(tree):
    leaves = treedef.flatten_up_to(tree)
    return [jnp.asarray(x) for x, keep in zip(leaves, inexact, strict=True) if keep]

  def combine(leaves, zeros=False):
    chosen = iter(leaves)
    others = [zero(x) for x in all_leaves] if zeros else all_leaves
    return treedef.unflatten(
      next(chosen) if keep else x for x, keep in zip(others, inexact, strict=True)
    )

  return partition, combine


def _type(leaf: Any) -> Any:
  try:
    return jnp.result_type(leaf)
  except TypeError:
    raise base.InputError(
      f"params holds a {type(leaf).__name__}, which is no array: split it off, for"
      " instance by eqx.partition(model, eqx.is_inexact_array)."
    ) from None


def zero(x: Any) -> Any:
  """The gradient of a leaf that is held fixed: zeros of its own shape and type."""
  if jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended):  # typed PRNG keys
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
  return jnp.zeros_like(x)


def without_keys(tree: base.PyTree) -> base.PyTree:
  """`tree` with float zeros for typed PRNG keys and their gradients.

  Optimizers compute with every leaf that they are given, which these do not allow.
  """

  def replace(x):
    dtype = jnp.result_type(x) if not hasattr(x, "dtype") else x.dtype
    is_key = jnp.issubdtype(dtype, jax.dtypes.extended) or dtype == jax.dtypes.float0
    return jnp.zeros(jnp.shape(x)) if is_key else x

  return jax.tree.map(replace, tree)


def _double_reverse(vjp_fn, outputs):
  # `vjp_fn` is linear, so the point where it is differentiated is free; ones keep
  # a backward rule that divides by its cotangent finite.
  _, jvp_fn = jax.vjp(lambda c: vjp_fn(c)[0], jax.tree.map(jnp.ones_like, outputs))
  return lambda vector: jvp_fn(vector)[0]


def _without_surrogates(outputs_and_aux, leaves):
  """The outputs as a function whose differences are what is declared as derivative.

  Raises:
    InputError: a function in it has another derivative than its values have.
  """

  def outputs_of(leaves):
    return outputs_and_aux(leaves)[0]

  closed, shapes = jax.make_jaxpr(outputs_of, return_shape=True)(leaves)
  name = surrogates.find(closed.jaxpr)
  if name is not None:
    raise base.InputError(
      f"engine='difference' does not fit this model: the derivative that is declared"
      f" for {name} is not the slope of its values (a straight-through estimator, a"
      " gradient reversal or alike). Pass engine='reverse', or 'forward' if it is a"
      " jax.custom_jvp."
    )
  held = surrogates.holding(lambda leaves: jax.tree.leaves(outputs_of(leaves)), leaves)
  return lambda leaves: jax.tree.unflatten(jax.tree.structure(shapes), held(leaves))


def _central_difference(outputs_of, leaves):
  """Directional derivative from two forward passes.

  The balance of truncation (h^2) and rounding (eps / h) puts the best relative
  step at the cube root of eps; it is taken relative to the parameters' norm,
  because a direction (a gradient) has a scale of its own.
  """
  epsilon = max((float(jnp.finfo(x.dtype).eps) for x in leaves), default=1.0)
  relative_step = 0.2 * epsilon ** (1 / 3)
  double = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
  dtype = jnp.float64 if double else jnp.float32  # of step sizes

  def jvp_fn(vector):
    if not vector:
      return jax.tree.map(jnp.zeros_like, jax.eval_shape(outputs_of, leaves))
    # The squares in the norm of a gradient of 1e-20 would vanish in float32.
    # They are sorted, because XLA repeats a maximum in all that reads it.
    largest = jnp.sort(jnp.stack([_largest(v).astype(dtype) for v in vector]))[-1]
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    vector = [_wide(v, dtype) / largest for v in vector]
    length = jnp.maximum(_norm(vector, dtype), 1)
    step = relative_step * jnp.maximum(_norm(leaves, dtype), 1) / length

    def outputs_at(sign):
      return outputs_of(
        [
          (_wide(x, dtype) + sign * step * v).astype(x.dtype)
          for x, v in zip(leaves, vector, strict=True)
        ]
      )

    def slope(ahead, behind):
      change = _wide(ahead - behind, dtype) / (2 * step) * largest
      return change.astype(ahead.dtype)

    return jax.tree.map(slope, outputs_at(1.0), outputs_at(-1.0))

  return jvp_fn


def _wide(x, dtype):
  """A real or complex array in the precision of `dtype`, a real type."""
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return x.astype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
  return x.astype(dtype)


def _largest(x):
  return jnp.max(jnp.abs(x), initial=0)


def _norm(arrays, dtype):
  """The Euclidean norm of all arrays together."""
  norms = jnp.stack(
    [jnp.sqrt(jnp.sum(jnp.square(jnp.abs(_wide(x, dtype))))) for x in arrays]
  )
  # A product of the norms with themselves, not a chain of sums, see `sequencing`.
  return jnp.sqrt(jnp.dot(norms, norms, precision="highest"))


def _forward(jvp_fn, outputs):
  """`jvp_fn`, but refusing a `jax.custom_vjp` in words that name the way out."""

  def checked(vector):
    # JAX itself refuses at once when run eagerly, under `jit` only while compiling.
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


def _has_custom_vjp(jaxpr):
  return any(
    eqn.primitive.name == "custom_lin"
    or any(map(_has_custom_vjp, jax_core.jaxprs_in_params(eqn.params)))
    for eqn in jaxpr.eqns
  )


def _no_forward_derivative(reason):
  first_line = str(reason).partition("\n")[0].rstrip(".")
  return base.InputError(
    "losses_fn contains an operation without a forward-mode derivative"
    f" ({first_line}). Pass engine='reverse' (exact), or"
    " engine='difference' (two more forward passes, works through any kernel)."
  )
