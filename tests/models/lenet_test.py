"""LeNet: sizes and initialization."""

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax.models import lenet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_parameters_of_the_released_network():
  logits, variables = _shapes(lenet.LeNet(1), 5, 28, 28, 1)
  assert logits.shape == (5, 1)
  assert _size(variables) == 167_113
  assert variables["params"]["Conv_0"]["kernel"].shape == (5, 5, 1, 16)
  assert variables["params"]["Dense_0"]["kernel"].shape == (4 * 4 * 64, 100)


def test_initial_weights_are_truncated_and_biases_zero():
  params = jax.jit(lenet.LeNet(2).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  for layer in params["params"].values():
    assert not layer["bias"].any()
    # A normal distribution with the standard deviation 0.1 / 0.88 is truncated at 2 of
    # these. The standard deviation of the weights is then 0.1.
    assert np.abs(layer["kernel"]).max() < 0.1 * 2 / 0.87
