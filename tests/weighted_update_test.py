"""Gradients under weights that are functions of the losses, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import weighted_update

_X = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], np.float32)
# The loss of example i is the product x_i . p, so its gradient is x_i.
_PROBLEM = base.Problem(
  forward=lambda p, state, batch, key, train: (batch["x"] @ p, {"seen": jnp.array(1)}),
  loss=lambda outputs, batch: outputs,
  linearize=linearization.linearize,
  linearize_outputs=linearization.linearize_outputs,
  num_classes=2,
  class_counts=jnp.array([2, 1]),
  num_examples=3,
  num_steps=1,
)
_PARAMS = jnp.array([2.0, -1.0])
_INPUTS = base.Inputs(
  _PARAMS, {}, (), {"x": _X}, None, step=jnp.array(0), key=jax.random.key(0)
)
_LOSSES = [2.0, -2.0, 1.0]


def test_the_gradient_is_that_of_the_weighted_losses():
  result, threshold = weighted_update.weighted_gradients(
    _PROBLEM,
    _INPUTS,
    lambda losses: (jnp.where(losses > 0, losses, jnp.zeros_like(losses)), 0.0),
    has_aux=True,
  )
  assert threshold == 0.0 and result.model_state == {"seen": 1}
  np.testing.assert_allclose(result.losses, _LOSSES)
  np.testing.assert_allclose(result.weights, [2.0, 0.0, 1.0])
  # 2 x_0 + x_2: the weights are held constant, or it would be twice as large.
  np.testing.assert_allclose(result.grads, [3.0, 1.0])


def test_uniform_weights_give_the_gradient_of_the_mean():
  result = weighted_update.uniform_gradients(_PROBLEM, _INPUTS)
  np.testing.assert_allclose(result.weights, np.full(3, 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(result.grads, _X.mean(axis=0), rtol=1e-6)
