"""The layerwise engine of `linearization`: one backward pass serves every weight.

A network meets its parameters a few hundred times: a product with a kernel, a
bias that is added, a row of an embedding. Call such an operation y = f(q, a), with
q made of parameters alone and a of the examples. If examples do not mix, the loss
of example i changes along a direction v of the parameters by

    (J v)_i = sum over meetings of < delta_i, (df/dq (dq/dp) v)_i >

where delta = d(sum of losses)/dy comes for all meetings from ONE backward pass that
never forms a gradient of parameters, and

    J^T w = sum over meetings of (dq/dp)^T (df/dq)^T (w_i delta_i)

Costs in forward passes of the batch beyond the first: recording 1, `directional` 1,
`weighted_gradient` 1; forward mode takes 0, 2, 2. No per-example gradient is formed,
and what is done to parameters alone (casts, reshapes, weight normalization) is
differentiated as it stands.

It works on the jaxpr of the losses, so any framework and any way to share
parameters will do. `batch_axes` tells whether examples mix. What is refused beside
that: `jax.custom_vjp` (its backward rule is not followed), `jax.checkpoint` (which the
recording would undo), loops over data.
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
  """Linearizes losses in the leaves of the parameters; `linearization` wraps it.

  Args:
    losses_fn: `(leaves, batch) -> (losses [B], aux)`.
    leaves: inexact arrays.
    batch: pytree; arrays whose first axis is B hold the examples.
    names: of the leaves, for messages.

  Returns:
    losses [B]; directional, `list like leaves -> [B]`; weighted_gradient,
    `[B] -> list like leaves`; aux.

  Raises:
    NotLayerwiseError: examples mix on the way to the losses, or may do so; what is
      mixed for aux alone is no matter.
  """
  plan, env, outputs, tree = parameter_uses.trace(losses_fn, leaves, batch, names)
  steps = plan.parameter_uses()

  def param_inputs(leaves):
    """What meets the examples, of parameters alone."""
    now = env | dict(enumerate(leaves))
    plan.run(parameter_uses.Kind.PARAMS, now, refused=False)
    return [
      [parameter_uses.value_of(step.inputs[i], now) for i in step.param_inputs]
      for step in steps
    ]

  def outcome(perturbations):
    now = env | dict(enumerate(leaves))
    plan.run(parameter_uses.Kind.PARAMS, now)
    plan.run(parameter_uses.Kind.DATA, now, perturbations)
    losses, *aux = [parameter_uses.value_of(known, now) for known in outputs]
    return losses, (now, aux)

  zeros = [[_zero(step, i) for i, _ in step.differentiable_outputs] for step in steps]
  losses, vjp_fn, (now, aux) = jax.vjp(outcome, zeros, has_aux=True)
  (output_gradients,) = vjp_fn(jnp.ones_like(losses))
  output_gradients = [
    _summed(step, delta) for step, delta in zip(steps, output_gradients, strict=True)
  ]

  def met(step, delta):
    values = [parameter_uses.value_of(known, now) for known in step.inputs]
    if _alike(step):  # What it is added to makes no difference but for the shape.
      values[1 - step.param_inputs[0]] = jnp.zeros_like(delta[0])

    def apply(*parameters):
      given = dict(zip(step.param_inputs, parameters, strict=True))
      results = parameter_uses.bind(
        step.eqn, [given.get(i, x) for i, x in enumerate(values)]
      )
      return [results[i] for i, _ in step.differentiable_outputs]

    return apply, [values[i] for i in step.param_inputs]

  def directional(vector):
    _, slopes = jax.jvp(param_inputs, (leaves,), (vector,))
    parts = []
    for step, slope, delta in zip(steps, slopes, output_gradients, strict=True):
      apply, parameters = met(step, delta)
      _, changes = jax.jvp(apply, tuple(parameters), tuple(slope))
      for (_, axis), change, d in zip(
        step.differentiable_outputs, changes, delta, strict=True
      ):
        others = tuple(i for i in range(d.ndim) if i != axis)
        parts.append(jnp.sum((change * d).astype(losses.dtype), others))
    if not parts:
      return jnp.zeros_like(losses)
    # Stacked, because a chain of sums is cheap enough for XLA to be repeated for
    # every element of what the weights made of it are multiplied with.
    ones = jnp.ones(len(parts), losses.dtype)
    return jnp.matmul(ones, jnp.stack(parts), precision="highest")

  def weighted_gradient(weights):
    cotangents = []
    for step, delta in zip(steps, output_gradients, strict=True):
      apply, parameters = met(step, delta)
      weighted = [
        _times(d, jnp.expand_dims(weights, [i for i in range(d.ndim) if i != axis]))
        for (_, axis), d in zip(step.differentiable_outputs, delta, strict=True)
      ]
      cotangents.append(list(jax.vjp(apply, *parameters)[1](weighted)))
    return jax.vjp(param_inputs, leaves)[1](cotangents)[0]

  return losses, directional, weighted_gradient, jax.tree.unflatten(tree, aux)


def _times(delta: base.Array, weights: base.Array) -> base.Array:
  """The product in the more precise type of the two, as the type of `delta`."""
  dtype = base.common_dtype(delta, weights)
  return (delta.astype(dtype) * weights.astype(dtype)).astype(delta.dtype)


def _alike(step: parameter_uses.Step) -> list[int]:
  """Axes along which one parameter is added to everything, as a bias to an image."""
  if step.eqn.primitive.name not in ("add", "add_any") or len(step.param_inputs) > 1:
    return []
  (_, batch_axis), parameter = (
    step.differentiable_outputs[0],
    step.eqn.invars[step.param_inputs[0]].aval,
  )
  shape = step.eqn.outvars[0].aval.shape
  if len(parameter.shape) != len(shape):  # a number added to all
    return []
  pairs = enumerate(zip(parameter.shape, shape, strict=True))
  return [
    i
    for i, (param_inputs, all_) in pairs
    if param_inputs == 1 < all_ and i != batch_axis
  ]


def _summed(step: parameter_uses.Step, delta: list[base.Array]) -> list[base.Array]:
  """The deltas, of a bias as one number for all that it is added to alike."""
  axes = _alike(step)
  return [jnp.sum(d, axes, keepdims=True) for d in delta] if axes else delta


def _zero(step: parameter_uses.Step, result: int) -> base.Array:
  """What is added to a result to ask for its slope, spread over devices as that is."""
  aval = step.eqn.outvars[result].aval
  zeros = jax.lax.full(aval.shape, 0, aval.dtype, sharding=aval.sharding)
  return base.varying(zeros, aval)
