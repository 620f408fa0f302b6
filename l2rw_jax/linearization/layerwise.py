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

Costs in forward passes of the batch beyond the first: 1 for recording, 1 for
`directional`, 1 for `weighted_gradient`; forward mode takes 0, 2, 2. No per-example
gradient is formed. Operations on parameters alone (casts, reshapes, weight
normalization) are differentiated as usual.

The engine works on the jaxpr of the losses, so that it supports any framework and any
sharing of parameters. `batch_axes` checks whether examples are processed independently.
Not supported are also `jax.custom_vjp` (its backward rule is not followed),
`jax.checkpoint` (the recording would undo it) and loops over data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.linearization import parameter_uses


def linearize(
  losses_fn: Callable[[list[base.Array], Any], tuple[base.Array, Any]],
  leaves: list[base.Array],
  batch: Any,
  names: list[str],
) -> tuple[base.Array, Callable[..., Any], Callable[..., Any], Any]:
  """Linearizes losses in a list of parameters; see `linearization.linearize`.

  Args:
    losses_fn: `(leaves, batch) -> (losses [B], aux)`.
    leaves: floating-point or complex arrays.
    batch: pytree; arrays whose first axis is B hold the examples.
    names: names of the leaves, for error messages.

  Returns:
    A tuple of losses [B]; directional, `list like leaves -> [B]`; weighted_gradient,
    `[B] -> list like leaves`; aux.

  Raises:
    NotLayerwiseError: the losses are not known to process examples independently. Only
      operations that the losses depend on matter, not those of aux.
  """
  plan, env, outputs, tree = parameter_uses.trace(losses_fn, leaves, batch, names)
  steps = plan.parameter_uses()

  def param_inputs(leaves):
    """For each parameter use, the inputs that depend on parameters alone (q)."""
    values = env | dict(enumerate(leaves))
    plan.run(parameter_uses.Kind.PARAMS, values, run_refused=False)
    return [
      [parameter_uses.value_of(step.inputs[i], values) for i in step.param_inputs]
      for step in steps
    ]

  def perturbed_losses(perturbations):
    values = env | dict(enumerate(leaves))
    plan.run(parameter_uses.Kind.PARAMS, values)
    plan.run(parameter_uses.Kind.DATA, values, perturbations)
    losses, *aux = [parameter_uses.value_of(output, values) for output in outputs]
    return losses, (values, aux)

  zeros = [[_zeros(step, i) for i, _ in step.differentiable_outputs] for step in steps]
  losses, vjp_fn, (values, aux) = jax.vjp(perturbed_losses, zeros, has_aux=True)
  (output_gradients,) = vjp_fn(jnp.ones_like(losses))
  output_gradients = [
    _sum_broadcast(step, gradients)
    for step, gradients in zip(steps, output_gradients, strict=True)
  ]

  def use_fn(step, gradients):
    """The operation as a function of its parameter inputs, and these inputs."""
    inputs = [parameter_uses.value_of(value, values) for value in step.inputs]
    if _broadcast_axes(step):  # Only the shape of the other summand matters.
      inputs[1 - step.param_inputs[0]] = jnp.zeros_like(gradients[0])

    def apply(*parameters):
      replaced = dict(zip(step.param_inputs, parameters, strict=True))
      results = parameter_uses.bind(
        step.eqn, [replaced.get(i, x) for i, x in enumerate(inputs)]
      )
      return [results[i] for i, _ in step.differentiable_outputs]

    return apply, [inputs[i] for i in step.param_inputs]

  def directional(vector):
    _, tangents = jax.jvp(param_inputs, (leaves,), (vector,))
    terms = []
    for step, tangent, gradients in zip(steps, tangents, output_gradients, strict=True):
      apply, parameters = use_fn(step, gradients)
      _, output_tangents = jax.jvp(apply, tuple(parameters), tuple(tangent))
      for (_, axis), t, g in zip(
        step.differentiable_outputs, output_tangents, gradients, strict=True
      ):
        other_axes = tuple(i for i in range(g.ndim) if i != axis)
        terms.append(jnp.sum((t * g).astype(losses.dtype), other_axes))
    if not terms:
      return jnp.zeros_like(losses)
    # A matrix product, because XLA repeats a chain of sums in every operation that uses
    # the result.
    ones = jnp.ones(len(terms), losses.dtype)
    return jnp.matmul(ones, jnp.stack(terms), precision="highest")

  def weighted_gradient(weights):
    cotangents = []
    for step, gradients in zip(steps, output_gradients, strict=True):
      apply, parameters = use_fn(step, gradients)
      weighted = [
        _times(g, jnp.expand_dims(weights, [i for i in range(g.ndim) if i != axis]))
        for (_, axis), g in zip(step.differentiable_outputs, gradients, strict=True)
      ]
      cotangents.append(list(jax.vjp(apply, *parameters)[1](weighted)))
    return jax.vjp(param_inputs, leaves)[1](cotangents)[0]

  return losses, directional, weighted_gradient, jax.tree.unflatten(tree, aux)


def _times(gradient: base.Array, weights: base.Array) -> base.Array:
  """The product, computed in the wider type and cast to the type of `gradient`."""
  with jax.numpy_dtype_promotion("standard"):
    dtype = jnp.promote_types(gradient.dtype, weights.dtype)
  return (gradient.astype(dtype) * weights.astype(dtype)).astype(gradient.dtype)


def _broadcast_axes(step: parameter_uses.Step) -> list[int]:
  """Axes, other than the batch's, along which an added parameter is broadcast."""
  if step.eqn.primitive.name not in ("add", "add_any") or len(step.param_inputs) > 1:
    return []
  _, batch_axis = step.differentiable_outputs[0]
  parameter_shape = step.eqn.invars[step.param_inputs[0]].aval.shape
  output_shape = step.eqn.outvars[0].aval.shape
  if len(parameter_shape) != len(output_shape):  # A scalar.
    return []
  sizes = zip(parameter_shape, output_shape, strict=True)
  return [
    axis
    for axis, (parameter_size, output_size) in enumerate(sizes)
    if parameter_size == 1 < output_size and axis != batch_axis
  ]


def _sum_broadcast(
  step: parameter_uses.Step, gradients: list[base.Array]
) -> list[base.Array]:
  """Output gradients, summed over the axes along which a bias is broadcast."""
  axes = _broadcast_axes(step)
  return [jnp.sum(g, axes, keepdims=True) for g in gradients] if axes else gradients


def _zeros(step: parameter_uses.Step, output: int) -> base.Array:
  """A perturbation of an output of an operation, with the sharding of the output."""
  aval = step.eqn.outvars[output].aval
  zeros = jax.lax.full(aval.shape, 0, aval.dtype, sharding=aval.sharding)
  return base.varying(zeros, aval)
