"""The wide residual network of Meta-Weight-Net."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax.models import activations
from l2rw_jax.models import convolution
from l2rw_jax.models import dropout as dropout_lib
from l2rw_jax.models import split


class WideResNet(split.SplitNetwork):
  """Wide residual network (Zagoruyko and Komodakis, 2016), as used by Meta-Weight-Net.

  It consists of a 3x3 stem of 16 features; three stages of pre-activation blocks (BN,
  ReLU, 3x3 convolution, BN, ReLU, dropout, 3x3 convolution) with strides 1, 2, 2; and
  BN, ReLU and global average pooling. If a block changes the width, its shortcut starts
  after the first BN and ReLU and is a 1x1 convolution. With the default sizes and 10
  outputs, there are 36,479,194 parameters.

  Convolutions are initialized from N(0, 2 / (k^2 C_out)), and the output layer on d
  features from U(+-1 / sqrt(d)) with bias 0.

  Attributes:
    num_outputs: number of logits per example.
    blocks: number of blocks per stage, (depth - 4) / 6; 4 is WRN-28.
    widen: factor by which the widths 16, 32 and 64 are multiplied.
    dropout: dropout rate; 0 in Meta-Weight-Net.
    axis_name: mapped axis whose devices share batch statistics.
    dtype: floating-point type of the computation.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.
  """

  num_outputs: int
  blocks: int = 4
  widen: int = 10
  dropout: float = 0.0
  axis_name: str | None = None
  dtype: Any = jnp.float32
  cosine: bool = False

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = split.output_layer(
      self.num_outputs,
      self.cosine,
      kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
      dtype=self.dtype,
      name="Dense_0",
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return 64 * self.widen

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to non-negative features [B, 64 widen]."""
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      axis_name=self.axis_name,
      dtype=self.dtype,
    )
    conv = functools.partial(
      nn.Conv,
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      dtype=self.dtype,
      conv_general_dilated=convolution.conv_general_dilated,
    )
    # As in PyTorch, pad one pixel on every side. With a stride of 2, "SAME" would pad
    # only below and on the right.
    conv_3x3 = functools.partial(conv, kernel_size=(3, 3), padding=1)
    x = conv_3x3(16)(x)
    for stage in range(3):
      width = 16 * self.widen * 2**stage
      for block in range(self.blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        y = activations.relu(norm()(x))
        if x.shape[-1] != width:
          x = conv(width, (1, 1), stride, padding=0)(y)
        y = activations.relu(norm()(conv_3x3(width, strides=stride)(y)))
        y = dropout_lib.Dropout(self.dropout, self.axis_name)(y, train)
        x = x + conv_3x3(width)(y)
    return activations.relu(norm()(x)).mean(axis=(1, 2))
