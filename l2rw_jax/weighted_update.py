"""Gradients under example weights that are a function of the losses."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from l2rw_jax import base


def weighted_gradients(
  problem: base.Problem,
  inputs: base.Inputs,
  weights_fn: Callable[[base.Array], Any],
  *,
  has_aux: bool = False,
) -> Any:
  """Gradients of a batch under weights that are a function of its losses.

  Args:
    problem: the learning problem.
    inputs: inputs of the training step.
    weights_fn: maps this device's losses [B] to its weights [B], which are held
      constant.
    has_aux: whether `weights_fn` returns `(weights, aux)`.

  Returns:
    `base.Gradients`, or with `has_aux` a pair `(base.Gradients, aux)`.
  """
  linearized = problem.linearize_batch(inputs)
  weights, aux = weights_fn(linearized.losses), None
  if has_aux:
    weights, aux = weights
  grads = base.summed_gradient(linearized, weights, problem.axis_name)
  gradients = base.Gradients(grads, weights, linearized.losses, linearized.aux, {})
  return (gradients, aux) if has_aux else gradients


def uniform_gradients(problem: base.Problem, inputs: base.Inputs) -> base.Gradients:
  """Gradients of the mean loss: every example has weight 1 / B_global.

  Args:
    problem: the learning problem.
    inputs: inputs of the training step.
  """

  def weights(losses):
    size = base.global_size(losses.shape[0], problem.axis_name)
    return jnp.full_like(losses, 1 / size)

  return weighted_gradients(problem, inputs, weights)
