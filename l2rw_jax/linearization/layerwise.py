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

In addition to the forward pass of the batch, recording, `directional` and
`weighted_gradient` cost 1, 1 and 1 forward passes; forward mode takes 0, 2, 2. No
per-example gradient is formed. Operations on parameters alone (casts, reshapes, weight
normalization) are differentiated as usual.

The engine works on the jaxpr of the losses, so that it supports any framework and any
sharing of parameters. `batch_axes` checks whether examples are processed independently.
In a `jax.lax.scan`, perturbations are rows of its input, and what the derivatives need
is recorded as rows of its output; two more loops go through these rows. The engine does
not support a `jax.custom_vjp` that takes parameters (its backward rule sums over
examples), `while` and `cond`.

For a `jax.checkpoint`, only its inputs and the gradients of its outputs are recorded.
Each pass recomputes what it needs, which costs 2, 3 and 3 forward passes instead of 1,
1 and 1.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import ordering
from l2rw_jax.linearization import parameter_uses

_MAX_LINKS = 64  # Of the gradients of layers that wait for each other.


def linearize(
  losses_fn: Callable[[list[base.Array], Any], tuple[base.Array, Any]],
  leaves: list[base.Array],
  batch: Any,
  names: list[str],
  *,
  recompute: bool | None = False,
) -> tuple[base.Array, Callable[..., Any], Callable[..., Any], Any]:
  """Linearizes losses in a list of parameters; see `linearization.linearize`.

  Args:
    losses_fn: `(leaves, batch) -> (losses [B], aux)`.
    leaves: floating-point or complex arrays.
    batch: pytree; arrays whose first axis is B contain the examples.
    names: names of the leaves, for error messages.
    recompute: whether a `jax.checkpoint` may take parameters. None allows it only if
      there is a `jax.custom_vjp`, for which the cheaper forward mode does not apply.

  Returns:
    A tuple of losses [B]; directional, `list like leaves -> [B]`; weighted_gradient,
    `[B] -> list like leaves`; aux.

  Raises:
    NotLayerwiseError: the losses are not known to process examples independently. Only
      operations that the losses depend on matter, not those of aux.
  """
  plan, env, outputs, tree = parameter_uses.trace(
    losses_fn, leaves, batch, names, recompute=recompute
  )

  def perturbed_losses(perturbations):
    values = env | dict(enumerate(leaves))
    plan.run(parameter_uses.Kind.PARAMS, values)
    plan.run(parameter_uses.Kind.DATA, values, perturbations)
    losses, *aux = [parameter_uses.value_of(output, values) for output in outputs]
    return losses, (values, aux)

  losses, vjp_fn, (values, aux) = jax.vjp(
    perturbed_losses, plan.perturbations(), has_aux=True
  )
  (gradients,) = vjp_fn(jnp.ones_like(losses))
  zeros = parameter_uses.zeros(jax.typeof(losses))
  in_turn = ordering.num_bytes(gradients) < ordering.num_bytes(leaves)

  def directional(vector):
    parameters, tangents = dict(enumerate(leaves)), dict(enumerate(vector))
    return _directional(plan, parameters, tangents, values, gradients, zeros)

  def weighted_gradient(weights):
    parameters = dict(enumerate(leaves))
    result = _weighted_gradient(
      plan, parameters, values, gradients, weights, in_turn=in_turn
    )
    return [result[i] for i in range(len(leaves))]

  return losses, directional, weighted_gradient, jax.tree.unflatten(tree, aux)


# Values by their place in a plan.
_Values: TypeAlias = dict[int, Any]


def _inputs_of_uses(
  plan: parameter_uses.Plan, values: _Values
) -> Callable[[_Values], list[Any]]:
  """The inputs of each use that depend on parameters alone, as a function of these."""

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
    gradients: for each use, the gradients of the losses in its perturbations.
    zeros: zeros, shaped like the losses, [B].

  Returns:
    [B].
  """
  inputs, input_tangents = jax.jvp(
    _inputs_of_uses(plan, values), (parameters,), (tangents,)
  )
  terms = []
  uses = plan.parameter_uses()
  for step, x, t, g in zip(uses, inputs, input_tangents, gradients, strict=True):
    terms += _TERMS[type(step)](step, x, t, g, values, zeros)
  if not terms:
    return zeros
  # Use a matrix product, because XLA repeats a chain of sums in every operation that
  # uses the result.
  ones = jnp.ones(len(terms), zeros.dtype)
  return jnp.matmul(ones, jnp.stack(terms), precision="highest")


def _terms(step, inputs, tangents, gradients, values, zeros):
  """The terms of `_directional` of an operation, [B] each."""
  if not step.is_broadcast:
    tangents = jax.jvp(_use(step, values), tuple(inputs), tuple(tangents))[1]
  terms = []
  for (_, axis), t, g in zip(
    step.differentiable_outputs, tangents, gradients, strict=True
  ):
    others = tuple(i for i in range(g.ndim) if i != axis)
    terms.append(jnp.sum(jnp.real(t * g).astype(zeros.dtype), others))
  return terms


def _loop_terms(loop, inputs, tangents, gradients, values, zeros):
  """The term of `_directional` of a loop, [B], in a list."""
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

  With `in_turn`, the gradient of a layer is not computed before that of the next one is
  finished, as in a backward pass. An optimizer can then use one after the other, and a
  compiler has no reason to hold all of them at the same time.

  Returns:
    Gradients, like `parameters`.
  """
  inputs, vjp_fn = jax.vjp(_inputs_of_uses(plan, values), parameters)
  cotangents = []
  uses = plan.parameter_uses()
  link = ordering.num_bytes(parameters) / _MAX_LINKS
  waiting, finished = weights, []
  for step, x, g in reversed(list(zip(uses, inputs, gradients, strict=True))):
    cotangents.append(_COTANGENTS[type(step)](step, x, g, values, waiting))
    finished.append(cotangents[-1])
    if in_turn and ordering.num_bytes(finished) >= link:
      waiting, finished = ordering.after(finished, weights), []
  (result,) = vjp_fn(cotangents[::-1])
  return result


def _cotangents(step, inputs, gradients, values, weights):
  """The weighted gradient in the parameters of an operation."""
  weighted = [
    _times(g, jnp.expand_dims(weights, [i for i in range(g.ndim) if i != axis]))
    for (_, axis), g in zip(step.differentiable_outputs, gradients, strict=True)
  ]
  if not step.is_broadcast:
    return list(jax.vjp(_use(step, values), *inputs)[1](weighted))
  ((_, axis),) = step.differentiable_outputs
  return [jnp.sum(weighted[0], axis, keepdims=True).reshape(inputs[0].shape)]


def _loop_cotangents(loop, inputs, gradients, values, weights):
  """The weighted gradient in the parameters of a loop."""
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
  """The term of `_directional` of a `jax.checkpoint`, [B], in a list."""
  parameters, known, gradients = _known(step, inputs, values, gradients)
  values, gradients = step.recompute(parameters | known, gradients)
  tangents = dict(zip(parameters, tangents, strict=True))
  return [_directional(step.body, parameters, tangents, values, gradients, zeros)]


def _recomputed_cotangents(step, inputs, gradients, values, weights):
  """The weighted gradient in the parameters of a `jax.checkpoint`."""
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
  """`tree`, whose arrays a compiler does not know to be the same as before."""
  leaves, treedef = jax.tree.flatten(tree)
  is_key = [jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in leaves]
  others = [x for x, skip in zip(leaves, is_key, strict=True) if not skip]
  remaining = iter(jax.lax.optimization_barrier(others))
  pairs = zip(leaves, is_key, strict=True)
  return jax.tree.unflatten(
    treedef, [x if skip else next(remaining) for x, skip in pairs]
  )


def _consts_and_rows(loop, *lists):
  """The places of constants and of rows in a loop's body, and values of each."""
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
  """Zeros like `x`, of a type for sums."""
  aval = jax.typeof(x)
  return parameter_uses.zeros(aval.update(dtype=base.accumulator_dtype(x.dtype)))


def _use(step, values):
  """An operation as a function of its parameters alone."""
  reads = step.reads()

  def apply(*parameters):
    inputs = [
      parameter_uses.value_of(value, values)
      if i in reads or value.place is None
      else parameter_uses.zeros(value.aval)
      for i, value in enumerate(step.inputs)
    ]
    for i, parameter in zip(step.param_inputs, parameters, strict=True):
      inputs[i] = parameter
    results = parameter_uses.bind(step.eqn, inputs)
    return [results[i] for i, _ in step.differentiable_outputs]

  return apply


def _times(gradient: base.Array, weights: base.Array) -> base.Array:
  """The product, computed in the wider type and cast to the type of `gradient`."""
  dtype = base.common_dtype(gradient, weights)
  return (gradient.astype(dtype) * weights.astype(dtype)).astype(gradient.dtype)


_TERMS = {
  parameter_uses.Step: _terms,
  parameter_uses.Loop: _loop_terms,
  parameter_uses.Recomputed: _recomputed_terms,
}
_COTANGENTS = {
  parameter_uses.Step: _cotangents,
  parameter_uses.Loop: _loop_cotangents,
  parameter_uses.Recomputed: _recomputed_cotangents,
}
