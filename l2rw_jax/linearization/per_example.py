"""Norms, inner products and clipped means of per-example gradients.

Let g_i be the gradient of the loss of example i. Differentially private training needs
the mean of the g_i after each has been clipped to a norm. Methods that select or
diagnose examples need the norms and inner products of the g_i. `vmap(grad)` forms all
g_i, which take the memory of a copy of the parameters for every example. The layerwise
engine (see `layerwise`) records cotangents, the gradients of the losses with respect to
the outputs of layers. They give the same numbers without most of these copies. For a
dense layer, with activations a_it and cotangents d_it at position t of example i,

    g_i = sum_t a_it d_it^T     <g_i, g_j> = sum_ts <a_it, a_js> <d_it, d_js>

The second form, the *ghost product*, is cheap if an example has few positions. The
first form is cheap if it has many, and is also what a plain gradient computes. The form
with fewer FLOPs is selected for every parameter:

* Dense layers, convolutions (as dense layers of patches) and lookups in tables (whose
  activations are one-hot) have both forms.
* For scales, biases and all other operations, g_i is formed; it is small for most of
  them.
* If a parameter is used several times (tied weights, an unrolled recurrence), the
  gradients of its uses are added before squaring, so that cross terms are included.

If the parameter is transformed before its use by more than a cast, a reshape or a
transposition (weight normalization, an L2 penalty in the losses), g_i is formed for it.
Memory is then that of `vmap(grad)` for these parameters; `microbatch_size` limits it.

Reference: Goodfellow, "Efficient Per-Example Gradient Computations", 2015,
arXiv:1510.01799; Lee and Kifer, "Scaling up Differentially Private Deep Learning with
Fast Per-Example Gradient Clipping", PoPETs 2021, arXiv:2009.03106.
"""

import numbers
from typing import Any, NamedTuple

from absl import logging
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.linearization import engines
from l2rw_jax.linearization import ghost_products
from l2rw_jax.linearization import microbatching
from l2rw_jax.linearization import parameter_uses
from l2rw_jax.linearization import trainable

ENGINES = ("auto", "layerwise", "vmap")
_CHUNK = 16  # Examples at a time with engine="vmap", if no number is given.
_MIXED = (
  "the loss of an example changes with the other examples of the batch (BatchNorm, or a"
  " dropout mask for a whole batch), so that engine='vmap', which computes examples one"
  " by one, does not apply. Use GroupNorm or LayerNorm, and draw the mask of each"
  " example from a key in the batch. If all examples share an array with as many rows"
  " as there are examples, close over it instead of passing it in the batch."
)


class Info(NamedTuple):
  """Additional results of a function of this module.

  Attributes:
    losses: [B].
    norms: Euclidean norms of the per-example gradients, [B], in float32 or wider.
    aux: the auxiliary output of the losses function, or None.
    engine: "layerwise" or "vmap", the engine that was used.
  """

  losses: base.Array
  norms: base.Array
  aux: Any = None
  engine: base.StaticStr = base.StaticStr()


def norms(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "auto",
  microbatch_size: int | None = None,
) -> tuple[base.Array, Info]:
  """Norms of the gradients of the losses of a batch.

  Call it inside `jit`, like all functions of this module.

  Args:
    losses_fn: `(params, batch) -> losses [B]`, or `(losses [B], aux)` with `has_aux`.
      The loss of an example must not depend on the others, as it does with BatchNorm in
      training mode.
    params: any pytree; the gradient has the leaves that are floating point or complex.
    batch: arrays with a row per example; others are shared by all examples.
    has_aux: whether `losses_fn` returns an auxiliary output in addition to the losses.
    engine: "layerwise" records cotangents, see the module docstring. "vmap" computes
      the gradients of a few examples at a time, each alone in a batch of one row.
      "auto" is "layerwise" if the model allows it (see `linearization.linearize`), and
      "vmap" otherwise.
    microbatch_size: number of examples in memory at a time; None is all, or 16 with
      "vmap". The number does not change the results. If it is given, every array of the
      batch and of aux must have a row per example.

  Returns:
    The norms [B], float32 at least, and an `Info`. A norm whose square is outside the
    range of its type is infinite or 0 (in float32, above 1.8e19 and below 1e-19).

  Raises:
    InputError: the losses are not floating-point numbers of shape [B] or are empty,
      `params` has no trainable leaf, `batch` is sharded over an explicit mesh, `engine`
      is unknown or does not support the model, or `microbatch_size` is invalid (see
      `microbatching.microbatched`). If "vmap" is used (given or selected by "auto"),
      the error is also raised if no array of the batch has B rows or if examples depend
      on each other; under `jit`, examples that depend on each other make the results
      NaN instead.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, x: (x @ p) ** 2
    >>> print(norms(losses_fn, jnp.array([1., 2.]), jnp.eye(2))[0])
    [2. 4.]
  """

  def step(carry, gradients):
    return carry, jnp.sqrt(gradients.squares())

  _, values, info = _map(
    step, (), losses_fn, params, batch, has_aux, engine, microbatch_size
  )
  return values, info._replace(norms=values)


def inner_products(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  *,
  has_aux: bool = False,
  engine: str = "auto",
) -> tuple[base.Array, Info]:
  """Inner products of the gradients of all pairs of examples of a batch.

  For complex parameters, these are the real parts of the complex products. Memory grows
  with the square of the number of examples. With engine="vmap", the gradients of all
  examples are in memory.

  Args:
    losses_fn: see `norms`.
    params: see `norms`.
    batch: see `norms`.
    has_aux: see `norms`.
    engine: see `norms`.

  Returns:
    The Gram matrix [B, B], float32 at least, and an `Info`.

  Raises:
    InputError: see `norms`.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, x: (x @ p) ** 2
    >>> x = jnp.array([[1., 0.], [1., 1.]])
    >>> print(inner_products(losses_fn, jnp.array([1., 2.]), x)[0])
    [[ 4. 12.]
     [12. 72.]]
  """

  def step(carry, gradients):
    return carry, gradients.products()

  _, products, info = _map(
    step, (), losses_fn, params, batch, has_aux, engine, None, whole=True
  )
  squares = jnp.maximum(jnp.diagonal(products), 0)
  return products, info._replace(norms=jnp.sqrt(squares))


def clipped_gradient(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  max_norm: Any,
  *,
  has_aux: bool = False,
  engine: str = "auto",
  microbatch_size: int | None = None,
  axis_name: base.AxisName = None,
) -> tuple[base.PyTree, Info]:
  """The mean of the gradients of a batch, each clipped to a norm.

  This is (1/B) sum_i min(1, C / |g_i|) g_i for C = `max_norm`. Replacing one example
  changes the mean by at most 2 C / B; adding one example changes the sum by at most C.
  The noise of differentially private SGD is therefore proportional to C:

      gradient + (C * noise_multiplier / B) * standard normal noise

  Args:
    losses_fn: see `norms`.
    params: see `norms`.
    batch: see `norms`.
    max_norm: C, a positive scalar; infinity clips nothing. A gradient whose squared
      norm overflows its type (in float32, if the norm is 1.8e19 or more) counts as
      infinitely long and becomes 0. A gradient whose squared norm underflows to 0 (a
      norm below 1e-19) is not clipped.
    has_aux: see `norms`.
    engine: see `norms`.
    microbatch_size: see `norms`.
    axis_name: mapped axis over which the batch is sharded. The mean is that of the
      global batch, and the same on every device.

  Returns:
    The gradient, shaped like `params` (zeros for leaves that are not trainable), and an
    `Info` with the norms before clipping.

  Raises:
    InputError: see `norms`; or `max_norm` is not positive.

  Example:
    >>> import jax.numpy as jnp
    >>> losses_fn = lambda p, x: (x @ p) ** 2
    >>> print(clipped_gradient(losses_fn, jnp.array([1., 2.]), jnp.eye(2), 2.)[0])
    [1. 1.]
  """
  max_norm = base.setting(max_norm)
  is_number = isinstance(max_norm, numbers.Real | np.ndarray | jax.Array)
  if (
    not is_number
    or jnp.shape(max_norm)
    or (not base.is_traced(max_norm) and not max_norm > 0)
  ):
    raise base.InputError(f"max_norm={max_norm!r}: must be a positive number.")

  partition = trainable.Partition(params)
  local_params = base.local(params, axis_name)
  leaves = partition.leaves(local_params)
  with jax.numpy_dtype_promotion("standard"):
    types = [base.accumulator_dtype(x.dtype) for x in leaves]
  zeros = [jnp.zeros_like(x, dtype=t) for x, t in zip(leaves, types, strict=True)]

  def add(total, gradients):
    values = jnp.sqrt(gradients.squares())
    limit = jnp.asarray(max_norm).astype(values.dtype)
    is_long = values > limit
    factors = jnp.where(is_long, limit / jnp.where(is_long, values, 1), 1)
    clipped = gradients.weighted(factors)
    total = [t + x.astype(t.dtype) for t, x in zip(total, clipped, strict=True)]
    return total, values

  total, values, info = _map(
    add, zeros, losses_fn, local_params, batch, has_aux, engine, microbatch_size
  )
  total = base.psum(total, axis_name)
  size = base.global_size(info.losses.shape[0], axis_name)
  mean = [(t / size).astype(x.dtype) for t, x in zip(total, leaves, strict=True)]
  return partition.combine_gradient(mean), info._replace(norms=values)


class _Recorded(NamedTuple):
  """The gradients of a batch by the layerwise engine.

  Attributes:
    losses: [B].
    aux: the auxiliary output.
    gradients: the gradients.
  """

  losses: base.Array
  aux: Any
  gradients: ghost_products.PerExampleGradients

  def squares(self) -> base.Array:
    """Squared norms, [B]."""
    return self.gradients.squares()

  def products(self) -> base.Array:
    """Inner products, [B, B]."""
    return self.gradients.products()

  def weighted(self, weights: base.Array) -> list[base.Array]:
    """The sum of w_i g_i, as a list like the leaves."""
    return self.gradients.weighted(weights)


class _Formed(NamedTuple):
  """The gradients of a batch, each computed from its example alone.

  Attributes:
    losses: losses of the examples when each is alone in a batch, [B].
    gradients: list of [B, *shape of the leaf].
  """

  losses: base.Array
  gradients: list[base.Array]

  def _flat(self):
    return [
      ghost_products.wide(g.reshape(self.losses.shape[0], -1)) for g in self.gradients
    ]

  def squares(self) -> base.Array:
    """Squared norms, [B]."""
    return ghost_products.summed(
      [jnp.sum(jnp.square(jnp.abs(g)), axis=1) for g in self._flat()]
    )

  def products(self) -> base.Array:
    """Inner products, [B, B]."""
    return ghost_products.summed([jnp.real(g @ jnp.conj(g).T) for g in self._flat()])

  def weighted(self, weights: base.Array) -> list[base.Array]:
    """The sum of w_i g_i, as a list like the leaves."""

    def times(g):
      g = ghost_products.wide(g)
      return jnp.tensordot(weights.astype(g.dtype), g, axes=1)

    return [times(g) for g in self.gradients]


def _map(
  step,
  carry,
  losses_fn,
  params,
  batch,
  has_aux,
  engine,
  microbatch_size,
  whole=False,
):
  """Calls `step` for each microbatch of a batch, one after the other.

  Args:
    step: `(carry, gradients) -> (carry, results)`, where `gradients` is a `_Recorded`
      or a `_Formed`.
    carry: the initial carry, a pytree of arrays.
    losses_fn: see `norms`.
    params: see `norms`.
    batch: see `norms`.
    has_aux: see `norms`.
    engine: see `norms`.
    microbatch_size: see `norms`.
    whole: whether `step` needs the gradients of all examples at once.

  Returns:
    The last carry, the results with a row per example, and an `Info` whose norms the
    caller must replace.
  """
  if engine not in ENGINES:
    raise base.InputError(f"engine={engine!r}: choose one of {ENGINES}.")
  microbatching.check(microbatch_size)
  microbatching.check_unsharded(batch, "for per-example gradients")
  trainable.check(params)
  partition = trainable.Partition(params)
  leaves = partition.leaves(params)

  def call(leaves, batch, size=None):
    with microbatching.noting_size(size):
      result = losses_fn(partition.combine(leaves), batch)
    losses, aux = base.losses_and_aux("losses_fn", result, has_aux)
    base.check_not_empty("losses", losses)
    return losses, aux

  if microbatch_size is None:
    gradients = _record(call, leaves, batch, partition.names, engine)
    if gradients is not None:
      carry, results = step(carry, gradients)
      return carry, results, _info(gradients.losses, gradients.aux, "layerwise")
    losses, aux = call(leaves, batch)
    rows, merge = _split_rows(batch, losses.shape[0])
    if not rows:
      raise base.InputError(
        f"losses_fn returned {losses.shape[0]} losses, but no array of batch has"
        f" {losses.shape[0]} rows. {microbatching.ONE_LOSS_PER_ROW}"
      )
    size = losses.shape[0] if whole else min(_CHUNK, losses.shape[0])

    def vmap_step(carry, rows):
      gradients = _form(call, leaves, rows, merge)
      carry, results = step(carry, gradients)
      return carry, (results, gradients.losses)

    carry, (results, alone) = microbatching.scan(vmap_step, carry, rows, size)
    epsilon = _epsilon(call, leaves, batch, losses)
    carry, results = _checked(carry, results, losses, alone, epsilon)
    return carry, results, _info(losses, aux, "vmap")

  microbatching.num_rows(batch)

  def call_part(leaves, microbatch):
    return call(leaves, microbatch, jax.tree.leaves(microbatch)[0].shape[0])

  if has_aux:
    microbatching.check_aux(call_part, leaves, batch, microbatch_size)
  names = set()

  def microbatch_step(carry, microbatch):
    size = jax.tree.leaves(microbatch)[0].shape[0]
    # With one example, both engines compute the same, and the layerwise engine may not
    # recognize the batch axis.
    chosen = engine if size > 1 else "vmap"
    gradients = _record(call_part, leaves, microbatch, partition.names, chosen)
    if gradients is not None:
      losses, aux = gradients.losses, gradients.aux
      names.add("layerwise")
    else:
      losses, aux = call_part(leaves, microbatch)
      gradients = _form(call, leaves, *_split_rows(microbatch, size))
      names.add("vmap")
    carry, results = step(carry, gradients)
    return carry, (results, gradients.losses, losses, aux)

  carry, (results, alone, losses, aux) = microbatching.scan(
    microbatch_step, carry, batch, microbatch_size
  )
  if "vmap" in names:
    epsilon = _epsilon(call, leaves, batch, losses)
    carry, results = _checked(carry, results, losses, alone, epsilon)
  name = "layerwise" if "layerwise" in names else "vmap"
  return carry, results, _info(losses, aux, name)


def _info(losses, aux, engine):
  return Info(losses, losses, aux, base.StaticStr(engine))


def _record(call, leaves, batch, names, engine):
  """A `_Recorded`, or None if every example has to be computed alone."""
  if engine == "vmap":
    return None
  try:
    return _layerwise(call, leaves, batch, names)
  except Exception as error:
    if engine == "layerwise" and isinstance(error, parameter_uses.NotLayerwiseError):
      raise base.InputError(
        f"engine='layerwise' does not fit this model: {error}. Use engine='vmap'."
      ) from error
    if engine == "layerwise":
      raise
    # If the losses function has an error, the next call reports it, as in `engines`.
    logging.log_first_n(
      logging.INFO, "using vmap of grad instead of the layerwise engine: %s", 1, error
    )
    return None


def _layerwise(call, leaves, batch, names):
  """A `_Recorded` with the activations and cotangents of all parameter uses."""
  plan, env, outputs, tree = parameter_uses.trace(call, leaves, batch, names)
  steps = ghost_products.uses_of(plan)

  def perturbed_losses(perturbations):
    values, remaining = env | dict(enumerate(leaves)), iter(perturbations)
    plan.run(parameter_uses.Kind.PARAMS, values)
    for step in plan.steps:
      if step.kind == parameter_uses.Kind.DATA:
        step.run(values, None)
      if isinstance(step, parameter_uses.Step) and step.is_use:
        # Every use is perturbed at its outputs.
        pairs = zip(step.differentiable_outputs, next(remaining), strict=True)
        for (i, _), perturbation in pairs:
          values[step.outputs[i]] += perturbation
    losses, *aux = [parameter_uses.value_of(output, values) for output in outputs]
    return losses, (values, aux)

  zeros = [
    [_zeros(step.eqn.outvars[i].aval) for i, _ in step.differentiable_outputs]
    for step in steps
  ]
  losses, vjp_fn, (values, aux) = jax.vjp(perturbed_losses, zeros, has_aux=True)
  (cotangents,) = vjp_fn(jnp.ones_like(losses))
  gradients = ghost_products.PerExampleGradients(
    plan, values, leaves, cotangents, losses.shape[0]
  )
  return _Recorded(losses, jax.tree.unflatten(tree, aux), gradients)


def _zeros(aval):
  zeros = jax.lax.full(aval.shape, 0, aval.dtype, sharding=aval.sharding)
  return base.varying(zeros, aval)


def _split_rows(batch, size):
  """The arrays with a row per example, and a function that puts them into the batch."""
  leaves, tree = jax.tree.flatten(batch)
  treedef: Any = tree
  is_row = [base.is_array(x) and jnp.shape(x)[:1] == (size,) for x in leaves]

  def merge(rows):
    remaining = iter(rows)
    pairs = zip(leaves, is_row, strict=True)
    return treedef.unflatten(next(remaining) if keep else x for x, keep in pairs)

  return [x for x, keep in zip(leaves, is_row, strict=True) if keep], merge


def _form(call, leaves, rows, merge):
  """A `_Formed` of rows of a batch."""

  def loss_and_gradient(row):
    def loss(leaves):
      losses, _ = call(leaves, merge([x[None] for x in row]), 1)
      if losses.shape != (1,):
        raise base.InputError(
          f"losses_fn returned {losses.shape[0]} losses for one example."
          f" {microbatching.ONE_LOSS_PER_ROW}"
        )
      return losses.reshape(())

    value, vjp_fn = jax.vjp(loss, leaves)
    return value, vjp_fn(jnp.ones_like(value))[0]

  return _Formed(*jax.vmap(loss_and_gradient)(rows))


def _epsilon(call, leaves, batch, losses):
  """The largest machine epsilon of the types from which the losses are computed."""
  rows, merge = _split_rows(batch, losses.shape[0])
  closed = jax.make_jaxpr(lambda leaves, rows: call(leaves, merge(rows))[0])(
    leaves, rows
  )
  return engines.largest_epsilon(closed.jaxpr)


def _checked(carry, results, losses, alone, epsilon):
  """Raises InputError if losses change with the batch, or returns NaN under `jit`.

  `epsilon` is that of the least precise intermediate result: a network in bfloat16 may
  return losses in float32, which are rounded differently for one example than for many.
  """
  if losses.shape[0] == 1:  # There is no other example.
    return carry, results
  # Losses that are NaN or infinite cannot be compared.
  is_finite = jnp.isfinite(losses) & jnp.isfinite(alone)
  sizes = jnp.maximum(jnp.abs(losses), jnp.abs(alone))
  largest = jnp.max(jnp.where(is_finite, sizes, jnp.zeros_like(sizes)))
  # All losses may be small, as those of a good network are. `smallest` is the rounding
  # error of a small loss that is the difference of numbers near 200.
  smallest = 200 * float(jnp.finfo(losses.dtype).eps)
  tolerance = epsilon**0.5 * largest + smallest
  same = jnp.all((jnp.abs(losses - alone) <= tolerance) | ~is_finite)
  if not isinstance(same, jax.core.Tracer):
    if not same:
      raise base.InputError(_MIXED)
    return carry, results
  checkify.debug_check(same, _MIXED)
  return jax.tree.map(lambda x: jnp.where(same, x, np.nan), (carry, results))
