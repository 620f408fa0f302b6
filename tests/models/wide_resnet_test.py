"""The wide residual network: sizes, padding, initialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.models import wide_resnet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ("model", "classes", "size"),
  [
    # PyTorch counts these numbers of parameters.
    (wide_resnet.WideResNet, 10, 36_479_194),
    (wide_resnet.WideResNet, 100, 36_536_884),
  ],
)
def test_parameters_of_the_released_networks(model, classes, size):
  logits, variables = _shapes(model(classes), 2, 32, 32, 3)
  assert logits.shape == (2, classes)
  assert _size(variables["params"]) == size


def test_batch_norm_shifts_and_scales():
  _, variables = _shapes(wide_resnet.WideResNet(10, widen=1), 2, 32, 32, 3)
  assert set(variables["params"]["BatchNorm_0"]) == {"bias", "scale"}


def _paddings(model):
  """Padding of every 3x3 convolution."""
  x = jnp.zeros((1, 8, 8, 3))
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return {
    equation.params["padding"]
    for equation in jax.make_jaxpr(model.apply)(variables, x).eqns
    if equation.primitive.name == "conv_general_dilated"
    and equation.invars[1].aval.shape[:2] == (3, 3)
  }


def test_padding_is_that_of_pytorch():
  assert _paddings(wide_resnet.WideResNet(3, blocks=1, widen=1)) == {((1, 1), (1, 1))}


def test_initial_kernels_are_those_of_the_released_code():
  model = wide_resnet.WideResNet(10, widen=2)

  @jax.jit
  def init(key):  # XLA compiles only what this kernel needs.
    return model.init(key, jnp.zeros((1, 8, 8, 3)))["params"]["Conv_27"]["kernel"]

  values = init(jax.random.key(0))
  # The kernel has 3 * 3 * 128 * 128 values, enough for this tolerance.
  assert np.std(values) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
