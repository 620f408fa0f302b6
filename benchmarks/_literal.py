"""Baselines for `linearize`: plain training, and methods exactly as papers define them.

These literal implementations do not use the engines of this library. They differentiate
through the unrolled inner step with `jax.grad`
(`hypergradient.unrolled_weight_gradient`), and then compute the weighted gradient in a
second pass.
"""

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import meta_network
from l2rw_jax import normalization
from l2rw_jax.methods import meta_weight_net


def plain() -> base.Method:
  """Plain training: the gradient of the mean loss, computed by `jax.grad`."""

  def gradients(state, problem, inputs):
    size = inputs.batch["label"].shape[0]
    return _weighted_gradients(problem, inputs, jnp.full(size, 1 / size)), state

  return base.Method(gradients)


def l2rw() -> base.Method:
  """L2RW exactly as in Algorithm 1 of Ren et al. (2018), on one device."""

  def gradients(state, problem, inputs):
    zeros = jnp.zeros(inputs.batch["label"].shape[0])
    weight_gradient = _weight_gradient(problem, inputs, zeros, optax.sgd(1.0))
    weights = normalization.rectify(-weight_gradient)
    return _weighted_gradients(problem, inputs, weights), state

  return base.Method(gradients, needs_meta=True)


def mwn(learning_rate: float) -> base.Method:
  """Meta-Weight-Net with the preset "noise_stable", on one device.

  Args:
    learning_rate: the learning rate of the look-ahead step.
  """
  net = meta_weight_net.WeightNet()
  optimizer = meta_weight_net.PRESETS["noise_stable"].optimizer

  def init(key, problem, params):
    del problem, params
    return meta_network.init(net.init(key, jnp.zeros(1)), optimizer)

  def gradients(state, problem, inputs):
    losses = _losses_fn(problem, inputs)(inputs.params, inputs.batch)

    def weights_fn(phi):
      return meta_weight_net.example_weights(net.apply, phi, losses)

    def meta_gradient_fn(phi):
      weight_gradient = _weight_gradient(
        problem, inputs, weights_fn(phi), optax.sgd(learning_rate)
      )
      gradient = hypergradient.network_gradient(weights_fn, phi, weight_gradient)
      false, no_fault = jnp.array(False), jnp.zeros((), jnp.int32)
      return meta_network.MetaGradient(gradient, jnp.zeros(()), ~false, false, no_fault)

    state = meta_network.update(state, meta_gradient_fn, optimizer, inputs.step)
    return _weighted_gradients(problem, inputs, weights_fn(state.params)), state

  return base.Method(gradients, init, needs_meta=True)


def _losses_fn(problem, inputs):
  """Returns a function `(params, batch) -> losses [B]` without auxiliary outputs."""
  losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
  return lambda params, batch: losses_fn(params, batch)[0]


def _weight_gradient(problem, inputs, weights, optimizer):
  """The derivative dM/dw of the meta loss at `weights`, [B]."""
  meta_losses_fn = problem.meta_losses_fn(inputs.model_state, inputs.key)
  return hypergradient.unrolled_weight_gradient(
    _losses_fn(problem, inputs),
    lambda params, batch: meta_losses_fn(params, batch)[0],
    inputs.params,
    inputs.batch,
    inputs.meta_batch,
    weights,
    optimizer=optimizer,
    opt_state=optimizer.init(inputs.params),
  )


def _weighted_gradients(problem, inputs, weights):
  """`base.Gradients` of the weighted loss, for constant weights [B]."""

  def loss_fn(params):
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    losses, model_state = losses_fn(params, inputs.batch)
    return jnp.sum(weights * losses), (losses, model_state)

  grads, (losses, model_state) = jax.grad(loss_fn, has_aux=True)(inputs.params)
  return base.Gradients(grads, weights, losses, model_state, {})
