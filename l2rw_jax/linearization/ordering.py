"""Ordering of computations that do not depend on each other.

A compiler may run two independent passes over a network in any order or at the same
time, so that the activations of both are in memory. `jax.lax.optimization_barrier` does
not prevent this on XLA:CPU, which removes the barrier before operations are scheduled
(seen with jaxlib 0.10.2). A data dependency does: an arithmetic expression that is
always 0, but that no compiler can simplify.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import batch_axes
from l2rw_jax.linearization import parameter_uses


def zero_after(first: base.PyTree) -> base.Array:
  """A 0 in float32 that depends on the floating-point and complex arrays of `first`.

  Args:
    first: pytree of arrays.
  """
  entries = [
    _first_entry(x)
    for x in jax.tree.leaves(first)
    if isinstance(x, jax.Array) and x.size and jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  if not entries:
    return jnp.zeros((), jnp.float32)  # The type of the result below, even with x64.
  values = jnp.stack(entries)
  # Compilers do not simplify a product with 0, because it could be NaN. This product is
  # never NaN, because its other factor is finite.
  zeros = jnp.isnan(0 * jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values)))
  zeros = jax.lax.stop_gradient(zeros.astype(jnp.float32))
  # XLA repeats a chain of sums of scalars in every operation that uses the result, so
  # that the program would grow with the square of the number of scalars. XLA also turns
  # a product with constants into such a chain, but not the product of an array with
  # itself.
  return jnp.dot(zeros, zeros)


def _first_entry(x):
  """The real part of the first entry, or the largest of a sharded array, in float32."""
  x = jax.lax.stop_gradient(x)
  if any(jax.typeof(x).sharding.spec):
    # A sharded axis cannot be sliced, and gathering a large array is expensive. For the
    # largest entry, each device sends only one number.
    entry = jnp.real(x).max()
  else:
    entry = jnp.real(jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim)).reshape(())
  return entry.astype(jnp.float32)


def num_bytes(tree: base.PyTree) -> int:
  """The total size in bytes of the arrays of a pytree; PRNG keys are not counted."""
  return _num_bytes_of_types([jax.typeof(x) for x in jax.tree.leaves(tree)])


def _num_bytes_of_types(avals):
  is_key = [jnp.issubdtype(aval.dtype, jax.dtypes.extended) for aval in avals]
  return sum(
    aval.size * aval.dtype.itemsize
    for aval, skip in zip(avals, is_key, strict=True)
    if not skip
  )


def residual_bytes(vjp_fn: base.PyTree, known: base.PyTree) -> int:
  """The size in bytes of the arrays that are stored for a backward pass.

  Args:
    vjp_fn: the result of `jax.vjp`.
    known: pytree of arrays that are in memory anyway, and are not counted.
  """
  known_ids = {id(x) for x in jax.tree.leaves(known)}
  residuals = {id(x): x for x in jax.tree.leaves(vjp_fn) if id(x) not in known_ids}
  return num_bytes(list(residuals.values()))


def activation_ratio(
  losses_fn: Callable[[list[base.Array]], base.Array],
  vjp_fn: base.PyTree,
  leaves: list[base.Array],
  batch: Any,
  num_examples: int,
) -> float:
  """The memory of the activations divided by that of the parameters of layers.

  If all activations and cotangents are kept in memory, the gradients of one layer can
  be computed from them, used and freed before those of the next layer are computed.
  Activations that the backward pass recomputes (`jax.checkpoint`) would then have to be
  kept, so they are counted, too. Values that depend on parameters alone, such as
  transposed or cast parameters, do not grow with the batch, so they are not counted if
  they may take more than a tenth of the memory of all stored values. Parameters that
  enter a loop are not counted, because their gradients are known only after the whole
  loop.

  Args:
    losses_fn: maps parameters to losses.
    vjp_fn: the backward pass of `losses_fn`, see `residual_bytes`.
    leaves: the parameters.
    batch: the examples, a pytree of arrays that `losses_fn` closes over.
    num_examples: number of losses.

  Returns:
    The ratio; infinite if all parameters enter loops. In two cases, all stored values
    are divided by all parameters instead: outside of `jit` and similar transformations,
    where operations run in the order of the program; and if the stored values take at
    least `num_examples` times the memory of the parameters.
  """
  activations, parameters = residual_bytes(vjp_fn, (leaves, batch)), num_bytes(leaves)
  is_traced = any(isinstance(x, jax.core.Tracer) for x in (*leaves, *_arrays(batch)))
  # If the activations of a single example take more memory than the parameters, the
  # exact ratio is not needed, so the losses are not traced again.
  if is_traced and activations < parameters * num_examples:
    closed = jax.make_jaxpr(losses_fn)(leaves)
    batch_ids = {id(x) for x in jax.tree.leaves(batch)}
    sources = [_DATA if id(x) in batch_ids else _CONSTANT for x in closed.consts]
    sources += [
      _Source(parameter_uses.Kind.PARAMS, frozenset([i])) for i in range(len(leaves))
    ]
    in_loops, has_checkpoint, of_parameters, _ = _walk(closed.jaxpr, sources)
    parameters -= num_bytes([leaves[i] for i in in_loops])
    if has_checkpoint or of_parameters > activations / 10:
      activations = _stored_bytes(closed, leaves, batch)
  return activations / parameters if parameters else float("inf")


class _Source(NamedTuple):
  """What a value depends on.

  Attributes:
    kind: parameters, examples, or neither.
    leaves: indices of the parameters that the value depends on; empty if it depends on
      an example.
  """

  kind: parameter_uses.Kind
  leaves: frozenset[int] = frozenset()


_CONSTANT = _Source(parameter_uses.Kind.CONSTANT)
_DATA = _Source(parameter_uses.Kind.DATA)


def _union(sources):
  """The source of a value that is computed from others."""
  kind = max((s.kind for s in sources), default=parameter_uses.Kind.CONSTANT)
  if kind != parameter_uses.Kind.PARAMS:
    return _Source(kind)
  return _Source(kind, frozenset().union(*(s.leaves for s in sources)))


def _arrays(tree):
  return [x for x in jax.tree.leaves(tree) if base.is_array(x)]


def _walk(jaxpr, sources):
  """Finds what `activation_ratio` has to add or leave out.

  Args:
    jaxpr: the operations.
    sources: a `_Source` for each of its constants and inputs.

  Returns:
    The indices of the parameters that enter a loop together with examples; whether a
    `jax.checkpoint` outside of loops takes parameters and examples; the size in bytes
    of the values that are computed from parameters alone; the sources of the outputs.
  """
  source_of = dict(zip((*jaxpr.constvars, *jaxpr.invars), sources, strict=True))

  def read(atom):
    return _CONSTANT if isinstance(atom, jax_core.Literal) else source_of[atom]

  in_loops: frozenset[int] = frozenset()
  has_checkpoint, of_parameters = False, 0
  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    outputs = [_union(inputs)] * len(eqn.outvars)
    kinds = {source.kind for source in inputs}
    is_mixed = {parameter_uses.Kind.PARAMS, parameter_uses.Kind.DATA} <= kinds
    call = batch_axes.inner_jaxpr(eqn)
    if call is not None:
      inner, consts = call
      of_inner = [*[_CONSTANT] * len(consts), *inputs]
      in_inner_loops, has_inside, of_inner_parameters, outputs = _walk(inner, of_inner)
      in_loops |= in_inner_loops
      of_parameters += of_inner_parameters
      is_checkpoint = eqn.primitive.name in parameter_uses.CHECKPOINTS
      has_checkpoint |= has_inside or (is_checkpoint and is_mixed)
    elif eqn.primitive.name == "scan" and is_mixed:
      in_loops = in_loops.union(*(source.leaves for source in inputs))
    elif max(kinds, default=None) == parameter_uses.Kind.PARAMS:
      of_parameters += _num_bytes_of_types([v.aval for v in eqn.outvars])
    source_of |= dict(zip(eqn.outvars, outputs, strict=True))
  return in_loops, has_checkpoint, of_parameters, [read(v) for v in jaxpr.outvars]


def _may_be_data(x):
  """Whether a constant may be a batch, or a PRNG key for random numbers of a batch."""
  aval = jax.typeof(x)
  return aval.ndim > 0 or jnp.issubdtype(aval.dtype, jax.dtypes.extended)


def _stored_bytes(closed, leaves, batch):
  """The size of the values that depend on examples and are stored for a backward pass.

  Values under a `jax.checkpoint` outside of loops count as stored, not as recomputed.
  """
  consts = closed.consts

  def inlined(eqn, inputs, compute):
    """The outputs of an operation; a `jax.checkpoint` is replaced by its body."""
    if eqn.primitive.name not in parameter_uses.CHECKPOINTS:
      return compute(eqn, inputs)
    jaxpr, consts = batch_axes.inner_jaxpr(eqn)
    return run(jaxpr, consts, inputs, compute)

  def run(jaxpr, consts, inputs, compute):
    replace = functools.partial(inlined, compute=compute)
    return parameter_uses.run(jaxpr, consts, inputs, replace)

  def count(leaves):
    of_data = {
      id(x): x for x in (*jax.tree.leaves(batch), *filter(_may_be_data, consts))
    }
    of_parameters = {id(x): x for x in leaves}
    # The results of operations on parameters alone; None for other operations.
    results = []

    def compute(eqn, inputs):
      outputs = parameter_uses.bind(eqn, inputs)
      is_result = False
      if any(id(x) in of_data for x in inputs):
        of_data.update((id(x), x) for x in outputs)
      elif any(id(x) in of_parameters for x in inputs):
        of_parameters.update((id(x), x) for x in outputs)
        is_result = True
      results.append(outputs if is_result else None)
      return outputs

    run(closed.jaxpr, consts, leaves, compute)

    def losses_fn(leaves, results):
      remaining = iter(results)
      return run(closed.jaxpr, consts, leaves, lambda *_: next(remaining))[0]

    vjp_fn = jax.vjp(losses_fn, leaves, results)[1]
    sizes.append(residual_bytes(vjp_fn, (leaves, results, batch)))

  sizes: list[int] = []
  jax.eval_shape(count, leaves)
  return sizes[0]


def after(first: base.PyTree, then: base.PyTree) -> base.PyTree:
  """Returns a copy of `then`; computations that use the copy wait for `first`.

  Args:
    first: pytree of arrays. Only its floating-point and complex arrays have an effect.
    then: pytree of arrays. Typed PRNG keys, Python numbers, and arrays of strings or
      objects do not wait.

  Returns:
    A pytree with the values of `then`.

  >>> import jax.numpy as jnp
  >>> print(after(jnp.array([jnp.nan]), jnp.array([1., 2.])))
  [1. 2.]
  """
  is_ready = zero_after(first) == 0  # Always True.

  def wait(x):
    if not base.is_array(x):  # Python numbers and strings need no computation.
      return x
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # Typed PRNG keys.
      return x
    return jnp.where(is_ready, x, jnp.zeros_like(x))

  return jax.tree.map(wait, then)
