"""Residual network for small images, as in Meta-Weight-Net, WarPI and LDAM-DRW."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax.models import activations
from l2rw_jax.models import convolution
from l2rw_jax.models import group_norm
from l2rw_jax.models import split

_kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class ResNet(split.SplitNetwork):
  """Post-activation residual network (He et al., 2016, section 4.2).

  It has `6 * blocks + 2` layers: a 3x3 stem; three stages of `blocks` two-layer blocks
  with 16, 32 and 64 features, strides 1, 2, 2 and option-A shortcuts (subsampled,
  zero-padded channels, without parameters); and, after global average pooling, the
  output layer. Kernels are initialized from N(0, 2 / fan_in), and biases start at 0.
  There are 464,154 parameters for CIFAR-10 with 5 blocks. The ResNet-32 of L2RW
  differs; see `preactivation_resnet`.

  Attributes:
    num_outputs: number of logits per example.
    blocks: number of blocks per stage; 5 is ResNet-32.
    width: number of features of the first stage.
    norm: "batch", as published, or "group": GroupNorm with 8 groups. Group
      normalization treats examples separately, as the layerwise engine of
      `linearization.linearize` requires.
    axis_name: mapped axis whose devices share batch statistics.
    dtype: floating-point type of the computation.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.

  Raises:
    InputError: when the network is initialized or applied, if `norm` is unknown, or if
      `norm` is "group" and `width` is not a multiple of 8.
  """

  num_outputs: int
  blocks: int = 5
  width: int = 16
  norm: str = "batch"
  axis_name: str | None = None
  dtype: Any = jnp.float32
  cosine: bool = False

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = split.output_layer(
      self.num_outputs,
      self.cosine,
      kernel_init=_kaiming,
      dtype=self.dtype,
      name="Dense_0",
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return 4 * self.width

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to non-negative features [B, 4 width]."""
    conv = functools.partial(
      nn.Conv,
      kernel_size=(3, 3),
      # The padding is that of PyTorch. With a stride of 2, "SAME" would pad only below
      # and on the right, so the convolution would not be aligned with the shortcut.
      padding=1,
      use_bias=False,
      kernel_init=_kaiming,
      dtype=self.dtype,
      conv_general_dilated=convolution.conv_general_dilated,
    )
    norm = group_norm.batch_or_group(
      self.norm,
      width=self.width,
      train=train,
      axis_name=self.axis_name,
      dtype=self.dtype,
    )
    x = activations.relu(norm()(conv(self.width)(x)))
    for stage in range(3):
      for block in range(self.blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        features = self.width * 2**stage
        y = activations.relu(norm()(conv(features, strides=stride)(x)))
        y = norm()(conv(features)(y))
        x = activations.relu(y + _shortcut(x, features, stride))
    return x.mean(axis=(1, 2))


def _shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
  x = x[:, ::stride, ::stride]
  extra = features - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * 3 + [(extra // 2, extra - extra // 2)])
