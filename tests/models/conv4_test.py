"""Conv4: its convolution compared with flax's, its sizes, and finite derivatives."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.models import conv4


@pytest.mark.slow(unless=("shape1-1", "shape2-2"))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(7, 8, 3), (1, 1, 1), (2, 5, 4)])
def test_convolution_equals_flax(stride, shape):
  x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
  conv = conv4.Conv3x3(6, stride)
  variables = conv.init(jax.random.key(0), x)
  variables["params"]["bias"] += jnp.arange(6.0)
  expected = nn.Conv(6, (3, 3), stride, padding="SAME").apply(variables, x)
  np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("size", "channels", "pool", "num_positions"),
  [(28, 1, False, 2 * 2), (84, 3, True, 5 * 5), (28, 1, True, 1), (8, 1, True, 1)],
)
def test_sizes(size, channels, pool, num_positions):
  net = conv4.Conv4(5, width=4, pool=pool)
  x = jnp.zeros((2, size, size, channels))
  variables = jax.eval_shape(net.init, jax.random.key(0), x)
  assert list(variables) == ["params"]
  assert variables["params"]["Dense_0"]["kernel"].shape == (4 * num_positions, 5)
  logits = jax.eval_shape(net.apply, variables, x)
  assert logits.shape == (2, 5)


def test_parameters_of_the_omniglot_network():
  x = jnp.zeros((1, 28, 28, 1))
  params = jax.eval_shape(conv4.Conv4(5, 64).init, jax.random.key(0), x)["params"]
  convolutions = (9 * 1 + 3 * 9 * 64) * 64
  total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert total == convolutions + 4 * 3 * 64 + (4 * 64 + 1) * 5


def test_half_precision_does_not_overflow():
  # The square of 400 is infinite in float16.
  x = (400 * np.random.default_rng(0).normal(size=(4, 4, 4, 1))).astype(np.float16)
  layer = conv4._Standardize()
  variables = layer.init(jax.random.key(0), x.astype(np.float32))
  expected = layer.apply(variables, x.astype(np.float32))
  half = jax.tree.map(lambda v: v.astype(jnp.float16), variables)
  actual = layer.apply(half, x)
  assert actual.dtype == jnp.float16
  np.testing.assert_allclose(actual, expected, atol=2e-3)


@pytest.mark.slow
def test_statistics_are_those_of_the_given_images():
  net = conv4.Conv4(3, width=4)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(4, 8, 8, 1)).astype(np.float32)
  variables = net.init(jax.random.key(0), x)
  logits = net.apply(variables, x, train=True)
  np.testing.assert_array_equal(logits, net.apply(variables, x, train=False))
  # The logits of an image depend on the other images.
  alone = net.apply(variables, x[:2])
  assert np.abs(alone - logits[:2]).max() > 1e-2


@pytest.mark.ci
@pytest.mark.slow(unless=("1.0",))
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_images_of_one_color_have_finite_second_derivatives(value):
  net = conv4.Conv4(3, width=4)
  x = jnp.full((3, 8, 8, 1), value)
  variables = net.init(jax.random.key(0), x)

  def loss(params):
    return jnp.sum(net.apply({"params": params}, x) ** 2)

  def slope(params):
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(params)))

  for leaf in jax.tree.leaves(
    jax.jit(lambda p: jax.grad(slope)(p))(variables["params"])
  ):
    assert np.isfinite(leaf).all()
