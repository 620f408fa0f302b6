"""The four-layer convolutional network of few-shot learning.

In few-shot learning, every task has different, adapted weights. `jax.vmap` converts a
convolution with such weights to a grouped convolution, which is slow on XLA:CPU. This
module computes a convolution by shifted slices and one matrix product, which becomes a
batched matrix product under `jax.vmap`. A second-order step of four Omniglot tasks took
13 times as long with grouped convolutions.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax.models import activations
from l2rw_jax.models import pooling

_glorot = nn.initializers.glorot_uniform()


class Conv4(nn.Module):
  """Four convolution blocks and a dense layer.

  A block consists of a 3x3 convolution, normalization and ReLU, and halves the size.
  The normalization is BatchNorm with the statistics of the given images, in training
  and in evaluation, without running statistics. This is the usual *transductive*
  protocol of few-shot learning, in which the queries of a task are classified together.
  There is no model state.

  Attributes:
    num_outputs: logits per image.
    width: number of channels of every layer; 32 and 64 are common.
    pool: whether to halve the size by 2x2 max-pooling (84x84 images: 84, 42, 21, 10, 5;
      an odd last row or column is dropped, and a side of 1 ends pooling). If False, the
      size is halved by a stride of 2, which is four times cheaper (28x28 images: 28,
      14, 7, 4, 2).

  References:
    Vinyals et al., "Matching Networks for One Shot Learning", NeurIPS 2016.
    Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", ICML 2017.
  """

  num_outputs: int
  width: int = 32
  pool: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, channels] to logits [B, num_outputs]."""
    del train  # The network is the same in training and evaluation.
    for layer in range(4):
      x = Conv3x3(self.width, 1 if self.pool else 2, name=f"Conv_{layer}")(x)
      x = activations.relu(_Standardize(name=f"BatchNorm_{layer}")(x))
      if self.pool and min(x.shape[1:3]) > 1:
        height, width = (size // 2 * 2 for size in x.shape[1:3])
        x = pooling.max_pool(x[:, :height, :width], 2, 2)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_outputs, kernel_init=_glorot, name="Dense_0")(x)


class Conv3x3(nn.Module):
  """`nn.Conv(features, (3, 3), stride)` with SAME padding, as one matrix product.

  Attributes:
    features: number of output channels.
    stride: stride along both axes.
  """

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, channels] to [B, ceil(H / stride), ceil(W / stride), features]."""
    shape = (3, 3, x.shape[-1], self.features)
    kernel = self.param("kernel", _glorot, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    # In this order the last axis is (row, column, channel), as in the kernel.
    for axis in (2, 1):
      x = _windows(x, self.stride, axis)
    return x @ kernel.reshape(-1, self.features) + bias[None, None, None, :]


def _windows(x: jax.Array, stride: int, axis: int) -> jax.Array:
  """Windows of three along an axis; (offset, channel) becomes the last axis."""
  size = -(-x.shape[axis] // stride)
  missing = max((size - 1) * stride + 3 - x.shape[axis], 0)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (missing // 2, missing - missing // 2)
  x = jnp.pad(x, padding)
  end = (size - 1) * stride + 1
  shifted = [jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(3)]
  return jnp.concatenate(shifted, -1)


class _Standardize(nn.Module):
  """BatchNorm with the statistics of the given batch, then a scale and a shift."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, H, W, channels] to the same shape."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    scale, bias = scale[None, None, None, :], bias[None, None, None, :]
    dtype = x.dtype
    # In float16, squares overflow above 255.
    x, scale, bias = (a.astype(base.accumulator_dtype(dtype)) for a in (x, scale, bias))
    mean = jnp.mean(x, (0, 1, 2), keepdims=True)
    variance = jnp.mean((x - mean) ** 2, (0, 1, 2), keepdims=True)
    result = (x - mean) * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias
    return result.astype(dtype)
