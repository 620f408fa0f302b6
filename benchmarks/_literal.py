"""The rivals of `linearize`, as `base.Method`s: plain SGD, and the papers literally.

The literal forms are what their definitions say: `jax.grad` through the unrolled
inner step (`hypergradient.unrolled_weight_gradient`), then a second, weighted pass.
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
  """The gradient of the mean loss, by `jax.value_and_grad`."""

  def gradients(state, problem, inputs):
    size = inputs.batch["label"].shape[0]
    return _weighted(problem, inputs, jnp.full(size, 1 / size)), state

  return base.Method(gradients)


def l2rw() -> base.Method:
  """L2RW as its Algorithm 1 is written, on one device."""

  def gradients(state, problem, inputs):
    start = jnp.zeros(inputs.batch["label"].shape[0])
    slopes = _slopes(problem, inputs, start, optax.sgd(1.0))
    return _weighted(problem, inputs, normalization.rectify(-slopes)), state

  return base.Method(gradients, needs_meta=True)


def mwn(learning_rate: float) -> base.Method:
  """Meta-Weight-Net, preset "noise_stable", on one device."""
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
      slopes = _slopes(problem, inputs, weights_fn(phi), optax.sgd(learning_rate))
      gradient = hypergradient.network_gradient(weights_fn, phi, slopes)
      no, none = jnp.array(False), jnp.zeros((), jnp.int32)
      return meta_network.MetaGradient(gradient, jnp.zeros(()), ~no, no, none)

    state = meta_network.update(state, meta_gradient_fn, optimizer, inputs.step)
    return _weighted(problem, inputs, weights_fn(state.params)), state

  return base.Method(gradients, init, needs_meta=True)


def _losses_fn(problem, inputs):
  """`(params, batch) -> losses [B]`; what else the network returns is dropped."""
  losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
  return lambda params, batch: losses_fn(params, batch)[0]


def _slopes(problem, inputs, weights, optimizer):
  """dM/dw [B] at `weights`."""
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


def _weighted(problem, inputs, weights):
  """The ordinary gradient of a loss under constant weights."""

  def loss_fn(params):
    losses_fn = problem.losses_fn(inputs.model_state, inputs.key)
    losses, model_state = losses_fn(params, inputs.batch)
    return jnp.sum(weights * losses), (losses, model_state)

  grads, (losses, model_state) = jax.grad(loss_fn, has_aux=True)(inputs.params)
  return base.Gradients(grads, weights, losses, model_state, {})
