"""Convolutions in blocks of rows: values, derivatives, and when they are used."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.methods import l2rw
from l2rw_jax.models import convolution

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


def test_only_large_outputs_have_blocks():
  def convolve(images, kernel, **options):
    return convolution.conv_general_dilated(
      images, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=_NHWC, **options
    )

  def num(shape, channels, dtype=np.float32, **options):
    kernel = jax.ShapeDtypeStruct((3, 3, shape[-1], channels), dtype)
    images = jax.ShapeDtypeStruct(shape, dtype)
    return _num_convolutions(lambda x, k: convolve(x, k, **options), images, kernel)

  assert num((128, 32, 32, 8), 8) == 1  # 4 MiB
  assert num((128, 32, 32, 8), 16) == 2
  assert num((128, 32, 32, 8), 16, jnp.bfloat16) == 1
  assert num((128, 32, 32, 8), 32) == 4
  # A block has at least as many rows as the kernel.
  assert num((1024, 32, 32, 8), 128) == 10
  assert num((1024, 1, 32, 8), 128) == 1
  # These are left to XLA.
  assert num((128, 32, 32, 8), 32, lhs_dilation=(2, 1)) == 1
  assert num((128, 32, 32, 8), 32, batch_group_count=2) == 1


def test_other_devices_have_no_blocks(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert (
    _num_convolutions(
      lambda x, k: convolution.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=_NHWC
      ),
      jax.ShapeDtypeStruct((128, 32, 32, 16), np.float32),
      jax.ShapeDtypeStruct((3, 3, 16, 32), np.float32),
    )
    == 1
  )


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


@pytest.mark.parametrize("engine", ["layerwise", "forward", "reverse"])
def test_weights_do_not_depend_on_blocks(engine, x64):
  rng = np.random.default_rng(1)
  batch, meta_batch = (
    {"image": rng.normal(size=(size, 8, 6, 2)), "label": rng.normal(size=(size, 4))}
    for size in (5, 3)
  )
  params = _Net(None).init(jax.random.key(0), jnp.asarray(batch["image"]))

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
