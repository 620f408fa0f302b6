"""Convolutions in blocks of rows: values, derivatives, and when they are used."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods import l2rw
from l2rw_jax.models import convolution
from l2rw_jax.models import preactivation_resnet
from l2rw_jax.models import resnet
from l2rw_jax.models import whitened
from l2rw_jax.models import wide_resnet

_NHWC = ("NHWC", "HWIO", "NHWC")
# With this function, blocks have as few rows as possible.
_in_blocks = functools.partial(convolution.conv_general_dilated, block_bytes=1)
_CASES = {
  "same": ((2, 9, 8, 3), (3, 3, 3, 4), {"padding": "SAME"}),
  "same_lower": ((2, 9, 8, 3), (2, 3, 3, 4), {"padding": "SAME_LOWER"}),
  "valid": ((2, 11, 8, 3), (3, 3, 3, 4), {"padding": "VALID"}),
  "stride": (
    (2, 13, 8, 3),
    (3, 3, 3, 4),
    {"window_strides": (2, 3), "padding": "SAME"},
  ),
  "wide_stride": ((2, 20, 5, 3), (2, 2, 3, 4), {"window_strides": (3, 1)}),
  "dilation": (
    (2, 12, 9, 3),
    (2, 3, 3, 4),
    {"rhs_dilation": (3, 2), "padding": "SAME"},
  ),
  "wide_padding": ((2, 2, 5, 3), (1, 3, 3, 4), {"padding": [(4, 3), (1, 1)]}),
  "negative_padding": ((2, 12, 5, 3), (2, 3, 3, 4), {"padding": [(-2, -1), (0, 2)]}),
  "groups": ((2, 9, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
  "channels_first": (
    (2, 3, 9, 8),
    (4, 3, 3, 3),
    {"dimension_numbers": None, "padding": "SAME"},
  ),
  "other_axes": (
    (8, 3, 9, 2),
    (3, 3, 4, 3),
    {"dimension_numbers": ("WCHN", "HWOI", "CNWH")},
  ),
  "one_axis": ((2, 9, 3), (3, 3, 4), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
}


def _num_convolutions(function, *args):
  jaxpr = str(jax.make_jaxpr(function)(*args))
  return jaxpr.count("= conv_general_dilated[")


@pytest.mark.slow(unless=("same", "stride", "groups", "channels_first"))
@pytest.mark.parametrize("case", _CASES)
def test_blocks_equal_one_convolution(case, x64):
  image_shape, kernel_shape, options = _CASES[case]
  rng = np.random.default_rng(0)
  images, kernel = rng.normal(size=image_shape), rng.normal(size=kernel_shape)
  options = {
    "window_strides": (1,) * (len(image_shape) - 2),
    "padding": "VALID",
    "dimension_numbers": _NHWC,
    **options,
  }
  assert (
    _num_convolutions(lambda x, k: _in_blocks(x, k, **options), images, kernel) >= 2
  )

  def results(convolve, images, kernel):
    outputs, vjp_fn = jax.vjp(lambda x, k: convolve(x, k, **options), images, kernel)
    cotangent = jnp.cos(jnp.arange(outputs.size, dtype=float)).reshape(outputs.shape)
    return outputs, vjp_fn(cotangent)

  actual, expected = (
    jax.jit(results, static_argnums=0)(convolve, images, kernel)
    for convolve in (_in_blocks, jax.lax.conv_general_dilated)
  )
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def _num_for(image_shape, channels, dtype=np.float32, **options):
  """The number of convolutions for 3x3 kernels."""
  return _num_convolutions(
    functools.partial(
      convolution.conv_general_dilated,
      window_strides=(1, 1),
      padding=[(1, 1)] * 2,
      dimension_numbers=_NHWC,
      **options,
    ),
    jax.ShapeDtypeStruct(image_shape, dtype),
    jax.ShapeDtypeStruct((3, 3, image_shape[-1], channels), dtype),
  )


def test_only_large_outputs_have_blocks():
  assert _num_for((128, 32, 32, 8), 8) == 1  # 4 MiB
  assert _num_for((128, 32, 32, 8), 16) == 2
  assert _num_for((128, 32, 32, 8), 16, jnp.bfloat16) == 1
  assert _num_for((128, 32, 32, 8), 32) == 4
  assert _num_for((128, 32, 32, 8), 32, block_bytes=2**30) == 1
  # A block has at least as many rows as the kernel.
  assert _num_for((1024, 32, 32, 8), 128) == 10
  assert _num_for((1024, 1, 32, 8), 128) == 1
  # These are left to JAX.
  assert _num_for((128, 32, 32, 8), 32, lhs_dilation=(2, 1)) == 1
  assert _num_for((128, 32, 32, 8), 32, batch_group_count=2) == 1


def test_other_devices_have_no_blocks(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert _num_for((128, 32, 32, 8), 32) == 1


def test_shapes_may_be_symbolic():
  (batch_size,) = jax.export.symbolic_shape("b")
  exported = jax.export.export(
    jax.jit(lambda x, k: _in_blocks(x, k, (1, 1), "SAME", dimension_numbers=_NHWC))
  )(
    jax.ShapeDtypeStruct((batch_size, 16, 4, 2), np.float32),
    jax.ShapeDtypeStruct((3, 3, 2, 3), np.float32),
  )
  rng = np.random.default_rng(0)
  images = rng.normal(size=(5, 16, 4, 2)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 2, 3)).astype(np.float32)
  np.testing.assert_allclose(
    exported.call(images, kernel),
    jax.lax.conv_general_dilated(
      images, kernel, (1, 1), "SAME", dimension_numbers=_NHWC
    ),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axes_may_be_sharded_over_an_explicit_mesh(axis):
  mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
  rng = np.random.default_rng(0)
  images = rng.normal(size=(4, 12, 8, 2)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 2, 3)).astype(np.float32)
  options = {
    "window_strides": (1, 1),
    "padding": "SAME",
    "dimension_numbers": _NHWC,
  }
  with jax.set_mesh(mesh):
    spec = jax.P(*(["d" if i == axis else None for i in range(4)]))
    placed = jax.device_put(images, spec)
    actual = jax.jit(functools.partial(_in_blocks, **options))(
      placed, jax.device_put(kernel, jax.P())
    )
    whole = jax.jit(functools.partial(_in_blocks, out_sharding=jax.P(), **options))(
      placed, jax.device_put(kernel, jax.P())
    )
    assert not any(jax.typeof(whole).sharding.spec)
  expected = jax.lax.conv_general_dilated(images, kernel, **options)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "wrong",
  [
    {"rhs": np.ones((0, 3, 3, 4))},
    {"rhs": np.ones((3, 3, 2, 4))},
    {"rhs_dilation": (2,)},
    {"lhs_dilation": 1},
    {"padding": [(1, 1)]},
    {"window_strides": (1,)},
    {"dimension_numbers": ("NHWX", "HWIO", "NHWC")},
  ],
  ids=str,
)
def test_wrong_arguments_raise_the_errors_of_jax(wrong):
  arguments = {
    "lhs": np.ones((2, 9, 8, 3)),
    "rhs": np.ones((3, 3, 3, 4)),
    "window_strides": (1, 1),
    "padding": "SAME",
    "dimension_numbers": _NHWC,
    **wrong,
  }
  messages = []
  for convolve in (jax.lax.conv_general_dilated, _in_blocks):
    with pytest.raises(Exception) as caught:
      convolve(**arguments)
    messages.append(str(caught.value).partition("at loc(")[0])
  assert messages[0] == messages[1]


def test_a_block_has_a_positive_size():
  with pytest.raises(base.InputError, match="block_bytes=0: give a positive number"):
    _num_for((2, 8, 8, 1), 2, block_bytes=0)


_NETWORKS = {
  "resnet": resnet.ResNet,
  "wide_resnet": functools.partial(wide_resnet.WideResNet, widen=1),
  "resnet_32": preactivation_resnet.resnet_32,
  "leaky": functools.partial(preactivation_resnet.LeakyWideResNet, blocks=1),
  "whitened": functools.partial(whitened.WhitenedNet, whitening=None),
}


@pytest.mark.parametrize("name", _NETWORKS)
def test_networks_use_blocks(name):
  net = _NETWORKS[name](10)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
  variables = jax.eval_shape(net.init, jax.random.key(0), images)

  def num(batch_size):
    batch = jax.ShapeDtypeStruct((batch_size, 32, 32, 3), np.float32)
    return _num_convolutions(net.apply, variables, batch)

  assert num(512) > num(1)


class _Net(nn.Module):
  """Two convolutions, the second one with a stride."""

  convolve: Any

  @nn.compact
  def __call__(self, x):
    for stride in (1, 2):
      x = nn.Conv(
        4,
        (3, 3),
        stride,
        param_dtype=float,
        conv_general_dilated=self.convolve,
      )(x)
      x = nn.tanh(x)
    return x.mean(axis=(1, 2))


@pytest.mark.ci
@pytest.mark.parametrize("engine", ["layerwise", "forward", "reverse"])
def test_weights_do_not_depend_on_blocks(engine, x64):
  rng = np.random.default_rng(1)
  batch, meta_batch = (
    {"image": rng.normal(size=(size, 16, 6, 2)), "label": rng.normal(size=(size, 4))}
    for size in (5, 3)
  )
  params = _Net(None).init(jax.random.key(0), jnp.asarray(batch["image"]))
  # The blocks of the first and of the second convolution.
  assert _num_convolutions(_Net(_in_blocks).apply, params, batch["image"]) == 5 + 2

  def results(net):
    def losses(params, batch):
      outputs = net.apply(params, jnp.asarray(batch["image"]))
      return jnp.square(outputs - batch["label"]).sum(axis=-1)

    step = l2rw.weighted_value_and_grad(losses, engine=engine)
    (_, info), grads = step(params, batch, meta_batch)
    return info.weights, info.scores, grads

  actual, expected = (
    jax.jit(results, static_argnums=0)(_Net(convolve))
    for convolve in (_in_blocks, None)
  )
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
