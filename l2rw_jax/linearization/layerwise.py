"""The layerwise engine: one backward pass serves all weights and directions.

A network uses its parameters in a few hundred operations: a product with a kernel, the
addition of a bias, a lookup in a table of embeddings. Write such an operation as
y = f(q, a), where q depends on parameters alone and a on the examples. If the network
processes examples independently, the derivative of the loss of example i along a
direction v of the parameters is

    (J v)_i = sum over parameter uses of < delta_i, (df/dq (dq/dp) v)_i >

where delta = d(sum of losses)/dy is computed for all uses in one backward pass that
never forms a gradient of parameters, and

    J^T w = sum over parameter uses of (dq/dp)^T (df/dq)^T (w_i delta_i)

The backward pass (called recording), `directional` and `weighted_gradient` cost one
forward pass each, in addition to the forward pass that computes the losses. With the
engine "forward", these three cost 0, 2 and 2 forward passes. Per-example gradients are
formed only for parameters that are broadcast over the examples, such as biases; they
take no more memory than activations. Operations on parameters alone (casts, reshapes,
weight normalization) are differentiated as usual.

The engine works on the jaxpr of the losses, so it supports any framework and any
sharing of parameters. `batch_axes` checks whether examples are processed independently.
The gradients delta are taken with respect to perturbations: arrays of zeros that are
added to the outputs of the uses, or to parameters that are broadcast over the examples,
such as biases. In a `jax.lax.scan`, each iteration reads its perturbations from a row
of the input. It records the values that are needed for the derivatives in a row of the
output, and `directional` and `weighted_gradient` each loop over these rows. The engine
does not support a `jax.custom_vjp` with an input that depends on parameters alone,
because its backward rule sums over examples, nor a `jax.lax.while_loop` or
`jax.lax.cond` with an input that depends on examples.

A `jax.checkpoint` that takes parameters is supported with `recompute`. Only its inputs
and the gradients of its outputs are recorded, and each pass recomputes the values that
it needs: recording, `directional` and `weighted_gradient` then cost 2, 3 and 3 forward
passes instead of one each.
"""

from collections.abc import Callable
import functools
import operator
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import parameter_uses

# Largest number of groups of layers whose gradients are computed one after the other.
_MAX_GROUPS = 64


def linearize(
  losses_fn: Callable[[list[base.Array], Any], tuple[base.Array, Any]],
  leaves: list[base.Array],
  batch: Any,
  names: list[str],
  *,
  recompute: bool | None = False,
) -> tuple[base.Array, Callable[..., Any], Callable[..., Any], Any]:
  """Linearizes losses as a function of leaves; see `linearization.linearize`.

  Args:
    losses_fn: `(leaves, batch) -> (losses [B], aux)`.
    leaves: floating-point or complex arrays.
    batch: pytree; arrays whose first axis is B contain the examples.
    names: names of the leaves, for error messages.
    recompute: whether a `jax.checkpoint` may take parameters. None allows it if
      forward mode would not be cheaper (because little is recomputed) or does not
      apply (because there is a `jax.custom_vjp`).

  Returns:
    A tuple of losses [B]; directional, `list like leaves -> [B]`; weighted_gradient,
    `[B] -> list like leaves`; aux.

  Raises:
    NotLayerwiseError: the network is not known to process examples independently, or an
      operation that takes parameters is not supported. Operations that only aux
      depends on do not matter.
  """
  plan, env, outputs, tree = parameter_uses.trace(
    losses_fn, leaves, batch, names, recompute=recompute
  )

  # Values that depend on parameters alone do not depend on perturbations, so they are
  # computed outside of the derivative.
  of_parameters = env | dict(enumerate(leaves))
  plan.run(parameter_uses.Kind.PARAMS, of_parameters)

  def perturbed_losses(perturbations):
    values = dict(of_parameters)
    plan.run(parameter_uses.Kind.DATA, values, perturbations)
    losses, *aux = [parameter_uses.value_of(output, values) for output in outputs]
    return losses, (values, aux)

  losses, vjp_fn, (values, aux) = jax.vjp(
    perturbed_losses, plan.perturbations(), has_aux=True
  )
  (gradients,) = vjp_fn(jnp.ones_like(losses))
  zeros = _accumulator(losses)
  in_turn = ordering.num_bytes(gradients) < ordering.num_bytes(leaves)

  def recorded() -> tuple[Any, Any]:
    # Without a barrier, XLA would share intermediate results (normalized and transposed
    # activations) among the derivatives, and store them, too. With `in_turn`, layers
    # are processed one after the other, so a layer must not wait for all values.
    return (values, gradients) if in_turn else _barrier((values, gradients))

  def directional(vector):
    parameters, tangents = dict(enumerate(leaves)), dict(enumerate(vector))
    total = _directional(plan, parameters, tangents, *recorded(), zeros)
    return total.astype(losses.dtype)

  def weighted_gradient(weights):
    parameters = dict(enumerate(leaves))
    # Without this barrier, XLA would recompute the weights from the scores in every
    # kernel that multiplies by them.
    weights = jax.lax.optimization_barrier(weights)
    result = _weighted_gradient(plan, parameters, *recorded(), weights, in_turn=in_turn)
    return [result[i] for i in range(len(leaves))]

  return losses, directional, weighted_gradient, jax.tree.unflatten(tree, aux)


# Values by their place in a plan.
_Values: TypeAlias = dict[int, Any]


def _inputs_of_uses(
  plan: parameter_uses.Plan, values: _Values
) -> Callable[[_Values], list[Any]]:
  """Maps parameters to those inputs of each use that depend on parameters alone."""

  def inputs(parameters):
    env = values | parameters
    plan.run(parameter_uses.Kind.PARAMS, env, run_refused=False)
    return [
      [parameter_uses.value_of(value, env) for value in step.parameters()]
      for step in plan.parameter_uses()
    ]

  return inputs


def _directional(
  plan: parameter_uses.Plan,
  parameters: _Values,
  tangents: _Values,
  values: _Values,
  gradients: list[Any],
  zeros: base.Array,
) -> base.Array:
  """The derivative of each loss along a direction of the parameters.

  Args:
    plan: the network, or the body of a loop.
    parameters: its inputs that depend on parameters alone.
    tangents: the direction, like `parameters`.
    values: other values that the derivatives of its uses need.
    gradients: for each use, the gradients of the losses with respect to its
      perturbations.
    zeros: zeros of the shape of the losses, [B], and of a type in which sums are
      accurate.

  Returns:
    [B], of the type of `zeros`.
  """
  inputs, input_tangents = jax.jvp(
    _inputs_of_uses(plan, values), (parameters,), (tangents,)
  )
  terms: list[Any] = []
  products: dict[Any, list[Any]] = {}
  uses = plan.parameter_uses()
  for step, x, t, g in zip(uses, inputs, input_tangents, gradients, strict=True):
    if isinstance(step, parameter_uses.Step):
      for product in _products(step, x, t, g, values):
        products.setdefault(product.key(), []).append(product)
    else:
      terms += _TERMS[type(step)](step, x, t, g, values, zeros)
  # A layer's kernel and bias often have the same gradient, so their tangents are added.
  for group in products.values():
    along = [product.tangent for product in group]
    _, gradient, axis = group[0]
    terms.append(_term(axis, zeros.dtype, along, gradient))
  if not terms:
    return zeros
  # Use a matrix product, because XLA repeats a chain of sums in every operation that
  # uses the result.
  ones = jnp.ones(len(terms), zeros.dtype)
  return jnp.matmul(ones, jnp.stack(terms), precision="highest")


class _Product(NamedTuple):
  """A tangent and a gradient whose product, summed over each example, is a term.

  Attributes:
    tangent: the derivative of an output of a use along the direction.
    gradient: the gradient of the losses with respect to the perturbation of this
      output.
    axis: the axis of the examples.
  """

  tangent: base.Array
  gradient: base.Array
  axis: int

  def key(self) -> tuple[Any, ...]:
    """A key that is equal for products whose tangents can be added."""
    return id(self.gradient), self.axis, self.tangent.dtype


def _products(step, inputs, tangents, gradients, values):
  """A `_Product` for each output of a use, or for the parameter that it broadcasts."""
  if not step.is_broadcast:
    use = _Use(step)
    known = _read_inputs(step, values)
    tangents = use.shared(_use_tangents)(use, known, inputs, tangents)
  return [
    _Product(t, g, axis)
    for (_, axis), t, g in zip(
      step.differentiable_outputs, tangents, gradients, strict=True
    )
  ]


def _use_tangents(use, known, inputs, tangents):
  """The derivatives of the outputs of a use along tangents of its parameters."""
  apply = functools.partial(use.apply, known)
  return jax.jvp(apply, tuple(inputs), tuple(tangents))[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _term(axis, dtype, tangents, gradient):
  """The inner products of the sum of tangents with a gradient, [B]."""
  others = tuple(i for i in range(gradient.ndim) if i != axis)
  # In float16, sums and products can overflow, and products of small numbers vanish.
  wide = base.accumulator_dtype(gradient.dtype)
  total = functools.reduce(operator.add, [t.astype(wide) for t in tangents])
  product = jnp.real(total * gradient.astype(wide))
  return jnp.sum(product.astype(dtype), others)


def _loop_terms(loop, inputs, tangents, gradients, values, zeros):
  """The term of a loop in `_directional`, [B], in a list."""
  (consts, const_tangents), (rows, row_tangents) = (
    [dict(zip(places, x, strict=True)) for x in (x_inputs, x_tangents)]
    for places, x_inputs, x_tangents in _consts_and_rows(loop, inputs, tangents)
  )
  const_values, row_values = _other_values(loop, values)

  def add(total, row):
    row, row_tangents, row_values, records, gradients = row
    term = _directional(
      loop.body,
      consts | row,
      const_tangents | row_tangents,
      const_values | row_values | records,
      gradients,
      zeros,
    )
    return total + term, None

  xs = (rows, row_tangents, row_values, values[loop.records], gradients)
  return [jax.lax.scan(add, zeros, xs, length=loop.length, unroll=loop.unroll)[0]]


def _weighted_gradient(
  plan: parameter_uses.Plan,
  parameters: _Values,
  values: _Values,
  gradients: list[Any],
  weights: base.Array,
  *,
  in_turn: bool = False,
) -> _Values:
  """The gradient of the weighted sum of losses; arguments as in `_directional`.

  With `in_turn`, the gradients are computed one group of layers after the other, from
  the last group to the first, as in a backward pass. An optimizer can then use the
  gradients of a group before those of the following group are computed, so a compiler
  need not store all gradients at once.

  Returns:
    Gradients, like `parameters`.
  """
  inputs, vjp_fn = jax.vjp(_inputs_of_uses(plan, values), parameters)
  cotangents = []
  uses = plan.parameter_uses()
  group_bytes = ordering.num_bytes(parameters) / _MAX_GROUPS
  # The weights of a group depend on the gradients of the group before it.
  group_weights, finished = weights, []
  for step, x, g in reversed(list(zip(uses, inputs, gradients, strict=True))):
    cotangents.append(_COTANGENTS[type(step)](step, x, g, values, group_weights))
    finished.append(cotangents[-1])
    if in_turn and ordering.num_bytes(finished) >= group_bytes:
      group_weights, finished = ordering.after(finished, weights), []
  (result,) = vjp_fn(cotangents[::-1])
  return result


def _cotangents(step, inputs, gradients, values, weights):
  """The weighted gradient with respect to the parameters of an operation."""
  use = _Use(step)
  known = {} if step.is_broadcast else _read_inputs(step, values)
  return use.shared(_use_cotangents)(use, known, inputs, gradients, weights)


def _use_cotangents(use, known, inputs, gradients, weights):
  """The weighted gradient with respect to the parameters of a use."""
  weighted = [
    _times(g, jnp.expand_dims(weights, [i for i in range(g.ndim) if i != axis]))
    for (_, axis), g in zip(use.step.differentiable_outputs, gradients, strict=True)
  ]
  if not use.step.is_broadcast:
    return list(jax.vjp(functools.partial(use.apply, known), *inputs)[1](weighted))
  ((_, axis),) = use.step.differentiable_outputs
  return [jnp.sum(weighted[0], axis, keepdims=True).reshape(inputs[0].shape)]


def _loop_cotangents(loop, inputs, gradients, values, weights):
  """The weighted gradient with respect to the parameters of a loop."""
  (consts, rows) = (
    dict(zip(places, x, strict=True)) for places, x in _consts_and_rows(loop, inputs)
  )
  const_values, row_values = _other_values(loop, values)

  def add(totals, row):
    row, row_values, records, gradients = row
    result = _weighted_gradient(
      loop.body, consts | row, const_values | row_values | records, gradients, weights
    )
    totals = {p: total + result[p].astype(total.dtype) for p, total in totals.items()}
    return totals, {place: result[place] for place in row}

  totals, row_gradients = jax.lax.scan(
    add,
    {place: _accumulator(x) for place, x in consts.items()},
    (rows, row_values, values[loop.records], gradients),
    length=loop.length,
    unroll=loop.unroll,
  )
  return [
    *(totals[place].astype(x.dtype) for place, x in consts.items()),
    *(row_gradients[place] for place in rows),
  ]


def _recomputed_terms(step, inputs, tangents, gradients, values, zeros):
  """The term of a `jax.checkpoint` in `_directional`, [B], in a list."""
  parameters, known, gradients = _known(step, inputs, values, gradients)
  values, gradients = step.recompute(parameters | known, gradients)
  tangents = dict(zip(parameters, tangents, strict=True))
  return [_directional(step.body, parameters, tangents, values, gradients, zeros)]


def _recomputed_cotangents(step, inputs, gradients, values, weights):
  """The weighted gradient with respect to the parameters of a `jax.checkpoint`."""
  parameters, known, gradients = _known(step, inputs, values, gradients)
  # Without this dependency on the weights, a compiler would compute the values once for
  # both derivatives, and store them.
  known, gradients, weights = _barrier((known, gradients, weights))
  values, gradients = step.recompute(parameters | known, gradients)
  result = _weighted_gradient(step.body, parameters, values, gradients, weights)
  return [result[place] for place in parameters]


def _known(step, inputs, values, gradients):
  """Parameters, other inputs and gradients, from which values are recomputed."""
  places = [place for place, value in step.given if value.is_parameter]
  known = {
    place: parameter_uses.value_of(value, values)
    for place, value in step.given
    if not value.is_parameter
  }
  known, gradients = _barrier((known, gradients))
  return dict(zip(places, inputs, strict=True)), known, gradients


def _barrier(tree):
  """`tree` as new arrays; a compiler does not know that their values are the same."""
  leaves, treedef = jax.tree.flatten(tree)
  # An array that occurs twice must stay one array, see `_Product.key`.
  arrays = {
    id(x): x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
  }
  new = dict(
    zip(arrays, jax.lax.optimization_barrier(list(arrays.values())), strict=True)
  )
  return jax.tree.unflatten(treedef, [new.get(id(x), x) for x in leaves])


def _consts_and_rows(loop, *lists):
  """The constants and the rows of a loop that are parameters.

  Args:
    loop: the loop.
    *lists: lists with an entry for each of these constants, then one for each row.

  Returns:
    For the constants, their places in the body and their part of each list; the same
    for the rows.
  """
  consts = [place for place, value in loop.consts if value.is_parameter]
  rows = [place for place, value in loop.rows if value.is_parameter]
  size = len(consts)
  return (consts, *(x[:size] for x in lists)), (rows, *(x[size:] for x in lists))


def _other_values(loop, values):
  """The constants and rows of a loop that derivatives need, except parameters."""
  return [
    {
      place: parameter_uses.value_of(value, values)
      for place, value in loop.other_inputs(inputs)
    }
    for inputs in (loop.consts, loop.rows)
  ]


def _accumulator(x):
  """Zeros like `x`, of a type in which sums are accurate."""
  aval = jax.typeof(x)
  return parameter_uses.zeros(aval.update(dtype=base.accumulator_dtype(x.dtype)))


class _Use:
  """An operation as a function of its parameters alone.

  Two uses are equal if they apply the same operation to arrays of the same types. The
  layers of a network have many equal uses. Their derivative is traced once, and becomes
  one function of the program that is called for each of them.
  """

  def __init__(self, step: parameter_uses.Step):
    # JAX's cache of traces keeps this object, so it must not refer to arrays.
    inputs = [value._replace(literal=None, error=None) for value in step.inputs]
    self.step, eqn = step._replace(inputs=inputs), step.eqn
    self._key: tuple[Any, ...] | None = (
      eqn.primitive,
      tuple(sorted(eqn.params.items())),
      eqn.ctx,
      tuple((value.aval, value.place is None) for value in step.inputs),
      tuple(step.param_inputs),
      tuple(step.differentiable_outputs),
    )
    try:
      self._hash = hash(self._key)
    except TypeError:  # A parameter of the operation is not hashable.
      self._key, self._hash = None, id(self)
    if any(True for _ in jax_core.jaxprs_in_params(eqn.params)):
      # Inner functions are equal only if they are the same object, and may refer to
      # large constants, which the cache of traces would keep.
      self._key, self._hash = None, id(self)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: object) -> bool:
    if self is other:
      return True
    return isinstance(other, _Use) and self._key is not None and self._key == other._key

  def shared(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled as one function of the program that equal uses share.

    The first argument of `function` is a use. `function` is returned unchanged if no
    other use can equal this use.
    """
    return function if self._key is None else _jitted(function)

  def apply(self, known: dict[int, Any], *parameters: base.Array) -> list[Any]:
    """The differentiable outputs."""
    step = self.step
    given = known | dict(zip(step.param_inputs, parameters, strict=True))
    inputs = [
      given[i] if i in given else parameter_uses.zeros(value.aval)
      for i, value in enumerate(step.inputs)
    ]
    results = parameter_uses.bind(step.eqn, inputs)
    return [results[i] for i, _ in step.differentiable_outputs]


def _read_inputs(step, values):
  """Values of the inputs that are literals or that the derivative needs, by index.

  Parameters are not included.
  """
  reads = step.reads()
  return {
    i: parameter_uses.value_of(value, values)
    for i, value in enumerate(step.inputs)
    if i in reads or value.place is None
  }


@functools.cache
def _jitted(function):
  return jax.jit(function, static_argnums=0)


def _times(gradient: base.Array, weights: base.Array) -> base.Array:
  """The product, computed in the wider type and cast to the type of `gradient`."""
  dtype = base.common_dtype(gradient, weights)
  return (gradient.astype(dtype) * weights.astype(dtype)).astype(gradient.dtype)


_TERMS = {
  parameter_uses.Loop: _loop_terms,
  parameter_uses.Recomputed: _recomputed_terms,
}
_COTANGENTS = {
  parameter_uses.Step: _cotangents,
  parameter_uses.Loop: _loop_cotangents,
  parameter_uses.Recomputed: _recomputed_cotangents,
}
