"""Pre-activation residual networks: sizes, padding, initialization, devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.models import preactivation_resnet


def _shapes(model, *shape):
  """Shapes of the logits and of the variables; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def _size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def _full(model):
  return functools.partial(model, full_first_stage=True)


@pytest.mark.parametrize(
  ("model", "classes", "size"),
  [
    # By hand, ResNet-32: convolutions 461,232, output 650, BN shifts 1,072. With
    # `full_first_stage`, four more BNs add 64 shifts.
    (preactivation_resnet.resnet_32, 10, 462_954),
    (_full(preactivation_resnet.resnet_32), 10, 463_018),
    (preactivation_resnet.wrn_28_10, 10, 36_211_178),
    (preactivation_resnet.wrn_28_10, 100, 36_268_868),
    # By hand: convolutions 84,580,272, output 6,410, BatchNorm 40,352.
    (preactivation_resnet.LeakyWideResNet, 10, 84_627_034),
  ],
)
def test_parameters_of_the_released_networks(model, classes, size):
  logits, variables = _shapes(model(classes), 2, 32, 32, 3)
  assert logits.shape == (2, classes)
  assert _size(variables["params"]) == size


def test_batch_norm_shifts_but_does_not_scale():
  _, variables = _shapes(preactivation_resnet.resnet_32(10), 2, 32, 32, 3)
  norms = [v for k, v in variables["params"].items() if k.startswith("BatchNorm")]
  # A unit of the first stage has one, the others two; the stem and the end have one.
  assert len(norms) == 5 + 2 * 10 + 2
  assert all(set(norm) == {"bias"} for norm in norms)


def test_shortcut_matches_hand_computed_values():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  result = preactivation_resnet._shortcut(x, 3, 2)
  np.testing.assert_array_equal(result[0, :, :, 1], [[2.5, 4.5], [10.5, 12.5]])
  assert not result[..., 0].any() and not result[..., 2].any()
  np.testing.assert_array_equal(preactivation_resnet._shortcut(x, 1, 1), x)


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


def test_padding_is_that_of_tensorflow():
  # For a stride of 2, TensorFlow pads only at the end of each axis.
  small = preactivation_resnet.PreActivationResNet(
    3, blocks=1, widths=(2, 4, 8), stem=2
  )
  assert _paddings(small) == {((1, 1), (1, 1)), ((0, 1), (0, 1))}


def test_initial_kernels_are_those_of_the_released_code():
  model = preactivation_resnet.resnet_32(10)

  @jax.jit
  def init(key):  # Only the kernel that it returns is compiled.
    return model.init(key, jnp.zeros((1, 8, 8, 3)))["params"]["Conv_30"]["kernel"]

  values = init(jax.random.key(0))
  # About 37,000 values. Truncation at two standard deviations leaves 0.88 of one.
  assert np.std(values) == pytest.approx((2 / (9 * 64)) ** 0.5 * 0.88, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_result_does_not_depend_on_the_number_of_devices(devices):
  """Statistics and dropout masks are those of the global batch."""
  model = preactivation_resnet.PreActivationResNet(
    3, blocks=1, widths=(2, 4, 8), stem=2, dropout=0.5, full_first_stage=True
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 8, 8, 3)).astype(np.float32)
  # Random values from NumPy, since an initialization would have to be compiled.
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0), x),
  )

  def apply(model, x):
    rngs = {"dropout": jax.random.key(2)}
    return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

  expected, expected_state = jax.jit(lambda x: apply(model, x))(x)
  shared = model.clone(axis_name="devices")
  shards = x.reshape(devices, -1, *x.shape[1:])
  result, state = jax.pmap(lambda x: apply(shared, x), "devices")(shards)
  np.testing.assert_allclose(result.reshape(16, 3), expected, atol=1e-5)
  first = jax.tree.map(lambda x: x[0], state)
  chex.assert_trees_all_close(first, expected_state, atol=1e-5)
