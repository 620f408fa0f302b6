"""A fast network for small images, with a whitened first convolution.

The ideas are those of the public speed-runs on CIFAR-10 (Keller Jordan, "94% on
CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498). The first layer, whose
kernel is not trained, decorrelates patches of 2x2 pixels. Three pairs of 3x3
convolutions follow, with pooling after the first convolution of each pair, GELU, and no
residual connections. The convolutions start as the identity on their first channels,
and the logits are small at the start.
"""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax.models import convolution
from l2rw_jax.models import group_norm
from l2rw_jax.models import pooling
from l2rw_jax.models import split

PATCH = 2
# The features are divided by this number, so that the first logits are small.
_LOGIT_DIVISOR = 9.0
# The first layer reduces each side by one pixel, and each of three poolings halves it.
_LEAST_SIDE = 2**3 + 1
# This epsilon is relative to the mean variance of a pixel of a patch.
_EPSILON = 1e-3

# Numbers [PATCH * PATCH * C, K] for K filters. They are nested tuples, so that a module
# with filters can be hashed and compared.
Filters = tuple[tuple[float, ...], ...]


def whitening_filters(images: np.ndarray) -> Filters:
  """Filters that decorrelate the patches of images and give them equal variance.

  The patches of 2 x 2 pixels have a covariance matrix E diag(lambda) E^T. The filters
  are the columns of E diag(lambda + epsilon)^(-1/2) and their negatives, which are
  needed because GELU suppresses negative outputs. Epsilon is a thousandth of the mean
  of lambda.

  Args:
    images: images as the network receives them in evaluation mode, float [N, H, W, C].
      A thousand are enough; no labels are needed.

  Returns:
    Filters [4 C, 8 C] for `WhitenedNet.whitening`, in the order of rows, columns and
    channels of a patch.

  Raises:
    InputError: `images` does not have shape [N, H, W, C] or contains no patch, or a
      pixel is not finite.
  """
  images = np.asarray(images, np.float64)
  if images.ndim != 4 or not len(images) or min(images.shape[1:3]) < PATCH:
    raise base.InputError(
      f"images of shape {images.shape}: whitening needs [N, H, W, C] with at least"
      f" {PATCH}x{PATCH} pixels."
    )
  height, width = (size - PATCH + 1 for size in images.shape[1:3])
  patches = np.stack(
    [
      images[:, row : row + height, column : column + width]
      for row in range(PATCH)
      for column in range(PATCH)
    ],
    axis=3,
  )
  patches = patches.reshape(-1, PATCH * PATCH * images.shape[-1])
  if not np.isfinite(patches).all():
    raise base.InputError("whitening: a pixel is NaN or infinite; check the images.")
  patches = patches - patches.mean(axis=0)
  variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
  epsilon = max(_EPSILON * variances.mean(), 1e-12)
  # Rounding can make the smallest variances negative.
  filters = directions / np.sqrt(np.maximum(variances, 0) + epsilon)
  # The sign of an eigenvector is arbitrary, so make the largest entry positive.
  largest = np.argmax(np.abs(filters), axis=0)
  filters = filters * np.sign(filters[largest, np.arange(filters.shape[1])])
  both = np.concatenate([filters, -filters], axis=1)
  return tuple(tuple(float(value) for value in row) for row in both)


class Whitening(nn.Module):
  """A 2x2 convolution without padding whose kernel is constant; its bias is trained.

  Attributes:
    filters: result of `whitening_filters`.
    dtype: floating-point type of the computation.
  """

  filters: Filters
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to [B, H - 1, W - 1, K].

    Raises:
      InputError: the filters are for a different number of channels.
    """
    rows, outputs = len(self.filters), len(self.filters[0])
    if rows != PATCH * PATCH * x.shape[-1]:
      raise base.InputError(
        f"whitening has filters of {rows} numbers, but patches of {PATCH}x{PATCH}"
        f" pixels with {x.shape[-1]} channels have {PATCH * PATCH * x.shape[-1]}:"
        " compute the filters with whitening_filters from images like these."
      )
    shape = (PATCH, PATCH, x.shape[-1], outputs)
    kernel = jnp.asarray(self.filters, self.dtype).reshape(shape)
    bias = self.param("bias", nn.initializers.zeros, (outputs,))
    convolved = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel,
      (1, 1),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return convolved + bias.astype(self.dtype)[None, None, None, :]


class WhitenedNet(split.SplitNetwork):
  """Six 3x3 convolutions after a whitening layer, for images of 9x9 pixels or more.

  The network begins with a 2x2 convolution whose filters are the constants of
  `whitening_filters`, with a trained bias, and GELU. Three blocks with `width`,
  4 `width` and 4 `width` channels follow. A block consists of a 3x3 convolution, 2x2
  max pooling, normalization, GELU, a 3x3 convolution, normalization and GELU. The
  maximum over the remaining positions and a linear layer come last. For CIFAR-10 there
  are 1,972,514 parameters at width 64, and 497,826 at width 32, with BatchNorm.

  Differences from the speed-run: whitening centers the patches and has a relative
  epsilon; BatchNorm has a trained scale, a momentum of 0.9 (not 0.6) and an epsilon of
  1e-5 (not 1e-12); GELU is the tanh approximation; the head has a bias; and the
  training recipe is not used (learning rates of 10, a separate learning rate for
  biases, an average of weights).

  Attributes:
    num_outputs: number of logits per example.
    whitening: the result of `whitening_filters`. If None, the kernel of the first
      convolution is trained, and it has 8 C filters, too.
    width: number of channels of the first block; 64 in the speed-run.
    norm: "batch", or "group": GroupNorm with 8 groups, which treats examples
      separately, as the layerwise engine of `linearization.linearize` requires.
    axis_name: mapped axis whose devices share batch statistics.
    dtype: floating-point type of the computation.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.

  Raises:
    InputError: when the network is initialized or applied, if `norm` is unknown, `norm`
      is "group" and `width` is not a multiple of 8, the images are too small, or the
      filters are for a different number of channels.
  """

  num_outputs: int
  whitening: Filters | None = None
  width: int = 64
  norm: str = "batch"
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
    return 4 * self.width

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, 4 width].

    Raises:
      InputError: the images are too small.
    """
    if min(x.shape[1:3]) < _LEAST_SIDE:
      raise base.InputError(
        f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for this network:"
        f" it needs {_LEAST_SIDE} in both directions."
      )
    conv = functools.partial(
      nn.Conv,
      kernel_size=(3, 3),
      padding=1,
      use_bias=False,
      kernel_init=_identity,
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
    if self.whitening is None:
      filters = 2 * PATCH * PATCH * x.shape[-1]
      first: nn.Module = nn.Conv(
        filters, (PATCH, PATCH), padding=0, dtype=self.dtype, name="Whitening"
      )
    else:
      first = Whitening(self.whitening, dtype=self.dtype, name="Whitening")
    x = nn.gelu(first(x))
    for width in (self.width, 4 * self.width, 4 * self.width):
      x = nn.gelu(norm()(_halve(conv(width)(x))))
      x = nn.gelu(norm()(conv(width)(x)))
    return x.max(axis=(1, 2)) / jnp.asarray(_LOGIT_DIVISOR, x.dtype)


def _halve(x: jax.Array) -> jax.Array:
  """2x2 max pooling, which drops the last row or column of an odd side."""
  height, width = (size - size % 2 for size in x.shape[1:3])
  return pooling.max_pool(x[:, :height, :width], 2, 2)


def _identity(key, shape, dtype=jnp.float32):
  """U(+-1 / sqrt(fan-in)), but the first channels of a 3x3 kernel copy their input."""
  init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
  kernel = init(key, shape, dtype)
  copied = min(shape[-2:])
  identity = jnp.zeros((*shape[:-1], copied), dtype)
  channels = jnp.arange(copied)
  identity = identity.at[shape[0] // 2, shape[1] // 2, channels, channels].set(1)
  return jnp.concatenate([identity, kernel[..., copied:]], axis=-1)
