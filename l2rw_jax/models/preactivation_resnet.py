"""Pre-activation residual networks, as released by L2RW and by MentorNet."""

import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax.models import activations
from l2rw_jax.models import convolution
from l2rw_jax.models import dropout as dropout_lib
from l2rw_jax.models import split


class PreActivationResNet(split.SplitNetwork):
  """Residual network with BatchNorm before its convolutions, as released by L2RW.

  The network consists of a 3x3 stem, BN and ReLU; three stages of units (BN, ReLU,
  dropout, 3x3 convolution, BN, ReLU, 3x3 convolution) with strides 1, 2, 2; and BN,
  ReLU and global average pooling. Shortcuts have no parameters: they use average
  pooling by the stride, and padding with zero channels on both sides. BN shifts but
  does not scale. Dropout precedes the first convolution of a unit.

  The released code differs from the usual network in the first stage, where a flag is
  set for the first unit and not reset for the others: all units of this stage begin
  with their convolution, without BN, ReLU or dropout. With `full_first_stage`, only the
  first unit does, because the stem has already activated its input.

  Convolutions are initialized from N(0, 2 / (k^2 C_out)) truncated at two standard
  deviations, and the output layer on d features from U(+-sqrt(3 / d)). Biases start at
  0.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning", ICML
    2018, released code. He et al., "Identity Mappings in Deep Residual Networks",
    2016.

  Attributes:
    num_outputs: number of logits per example.
    blocks: number of units per stage; 5 is ResNet-32, 4 is WRN-28.
    widths: numbers of features of the three stages, in ascending order (equal numbers
      are allowed), and each at least that of the stem.
    stem: number of features of the first convolution.
    dropout: dropout rate.
    full_first_stage: whether all units of the first stage except the first one begin
      with BN, ReLU and dropout, see above.
    axis_name: mapped axis whose devices share batch statistics.
    dtype: floating-point type of the computation.
  """

  num_outputs: int
  blocks: int = 5
  widths: tuple[int, int, int] = (16, 32, 64)
  stem: int = 16
  dropout: float = 0.0
  full_first_stage: bool = False
  axis_name: str | None = None
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = nn.Dense(
      self.num_outputs,
      kernel_init=nn.initializers.lecun_uniform(),
      dtype=self.dtype,
      name="Dense_0",
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return self.widths[-1]

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to non-negative features [B, widths[-1]]."""
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      use_scale=False,
      momentum=0.999,
      epsilon=1e-3,
      axis_name=self.axis_name,
      dtype=self.dtype,
    )
    x = activations.relu(norm()(_conv(self.stem, 1, self.dtype)(x)))
    for stage, width in enumerate(self.widths):
      for block in range(self.blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        y = x
        if stage > 0 or (self.full_first_stage and block > 0):
          y = activations.relu(norm()(y))
          y = dropout_lib.Dropout(self.dropout, self.axis_name)(y, train)
        y = activations.relu(norm()(_conv(width, stride, self.dtype)(y)))
        x = _shortcut(x, width, stride) + _conv(width, 1, self.dtype)(y)
    return activations.relu(norm()(x)).mean(axis=(1, 2))


class LeakyWideResNet(split.SplitNetwork):
  """MentorNet's "ResNet-101" student: pre-activation, wide, leaky ReLU.

  The network consists of a 3x3 stem; three stages of units (BN, leaky ReLU and a 3x3
  convolution, twice) with strides 1, 2, 2 and the shortcuts of `PreActivationResNet`;
  and BN, leaky ReLU and global average pooling. In the first unit, the leaky ReLU comes
  before BN, and the shortcut starts after both, as in the released code.

  Convolutions are initialized from N(0, 2 / (k^2 C_out)), and the output layer on d
  features from U(+-sqrt(3 / d)) with bias 0.

  References:
    Jiang et al., "MentorNet: Learning Data-Driven Curriculum for Very Deep Neural
    Networks on Corrupted Labels", ICML 2018, released code.

  Attributes:
    num_outputs: number of logits per example.
    blocks: number of units per stage.
    widths: numbers of features of the three stages, in ascending order (equal numbers
      are allowed), and each at least that of the stem.
    stem: number of features of the first convolution.
    slope: slope of the leaky ReLU below 0.
    axis_name: mapped axis whose devices share batch statistics.
    dtype: floating-point type of the computation.
  """

  num_outputs: int
  blocks: int = 9
  widths: tuple[int, int, int] = (160, 320, 640)
  stem: int = 16
  slope: float = 0.1
  axis_name: str | None = None
  dtype: Any = jnp.float32

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = nn.Dense(
      self.num_outputs,
      kernel_init=nn.initializers.lecun_uniform(),
      dtype=self.dtype,
      name="Dense_0",
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return self.widths[-1]

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, widths[-1]]."""
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-3,
      axis_name=self.axis_name,
      dtype=self.dtype,
    )
    conv = functools.partial(
      nn.Conv,
      kernel_size=(3, 3),
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      dtype=self.dtype,
      conv_general_dilated=convolution.conv_general_dilated,
    )
    rectify = functools.partial(nn.leaky_relu, negative_slope=self.slope)
    x = conv(self.stem)(x)
    for stage, width in enumerate(self.widths):
      for block in range(self.blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        if stage == 0 and block == 0:
          x = y = norm()(rectify(x))
        else:
          y = rectify(norm()(x))
        y = rectify(norm()(conv(width, strides=stride)(y)))
        x = _shortcut(x, width, stride) + conv(width)(y)
    return rectify(norm()(x)).mean(axis=(1, 2))


resnet_32 = PreActivationResNet
wrn_28_10 = functools.partial(
  PreActivationResNet, blocks=4, widths=(160, 320, 640), dropout=0.3
)


def _conv(features: int, stride: int, dtype: Any) -> nn.Conv:
  return nn.Conv(
    features,
    (3, 3),
    stride,
    use_bias=False,
    kernel_init=nn.initializers.truncated_normal(math.sqrt(2 / (9 * features))),
    dtype=dtype,
    conv_general_dilated=convolution.conv_general_dilated,
  )


def _shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
  if stride > 1:
    window = (stride, stride)
    x = nn.avg_pool(x, window, window, "SAME", count_include_pad=False)
  extra = features - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * 3 + [(extra // 2, extra - extra // 2)])
