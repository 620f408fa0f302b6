"""Preprocessing of images on the device: crops, flips, scaling.

Every image has a different PRNG key. If the keys are derived from the examples' indices
(`Classifier.preprocess`), the result does not depend on how a batch is divided among
devices.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

PADDINGS = {"zero": "constant", "reflect": "reflect"}


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Crops, flips and scales images; use it as `Classifier.preprocess`.

  Pixels of uint8 are first scaled to [0, 1]; `mean` and `std` refer to scaled pixels.
  Training and meta batches are augmented in the same way, as in the released code of
  L2RW, Meta-Weight-Net and WarPI. In evaluation, images are only scaled.

  Attributes:
    pad: number of pixels that are added on every side before cropping to the original
      size; 0 disables cropping.
    padding: `"zero"` (black) or `"reflect"` (mirrored, without repeating the border).
    flip: whether images are mirrored left to right with probability 1/2.
    mean: numbers that are subtracted after the crop, one per channel or one for all.
    std: numbers by which the images are divided, one per channel or one for all.
    standardize: whether to apply `standardize` instead of `mean` and `std`.
  """

  pad: int = 0
  padding: str = "zero"
  flip: bool = False
  mean: tuple[float, ...] = (0.0,)
  std: tuple[float, ...] = (1.0,)
  standardize: bool = False

  def __call__(self, images: base.Array, keys: Any, train: bool) -> base.Array:
    """Preprocesses images [B, H, W, C]; typed keys [B] are used only in training."""
    images = to_float(images)
    if train:
      crop_keys, flip_keys = (
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i) for i in (0, 1)
      )
      if self.pad:
        images = random_crop(images, crop_keys, self.pad, self.padding)
      if self.flip:
        images = random_flip(images, flip_keys)
    if self.standardize:
      return standardize(images)
    return normalize(images, self.mean, self.std)


# 1 / 255 = _HIGH + _LOW. The product of _HIGH, which has 16 bits, and a byte is exact.
_HIGH = 32_897 / 2**23
_LOW = 1 / 255 - _HIGH


def to_float(images: Any) -> jax.Array:
  """Scales uint8 pixels to [0, 1], casts other integers, and keeps floats.

  Pixels become x / 255, correctly rounded to float32, as NumPy computes it. XLA may
  replace the division with a multiplication by 1 / 255, which rounds differently.

  Args:
    images: [B, ...], such as [B, H, W, C].

  Returns:
    Images of the same shape; integers become float32.

  Raises:
    InputError: the pixels are bools.
  """
  images = jnp.asarray(images)
  if images.dtype == jnp.bool_:
    raise base.InputError("pixels must be numbers, not bools: use images.astype(float)")
  if not jnp.issubdtype(images.dtype, jnp.integer):
    return images
  floats = images.astype(jnp.float32)
  if images.dtype != jnp.uint8:
    return floats
  return floats * np.float32(_HIGH) + floats * np.float32(_LOW)


def random_crop(
  images: base.Array, keys: base.Array, pad: int, padding: str = "zero"
) -> base.Array:
  """Pads every side, then crops a random window of the original size.

  Args:
    images: [B, H, W, C].
    keys: one typed key per image, [B].
    pad: number of pixels, at least 0; all (2 pad + 1)^2 windows are equally likely.
    padding: one of `PADDINGS`; `"reflect"` needs pad < H and W.

  Returns:
    [B, H, W, C].

  Raises:
    InputError: `padding` is unknown, or `pad` is negative or too large for the images.
  """
  if padding not in PADDINGS:
    raise base.InputError(
      f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}"
    )
  limit = min(images.shape[1:3])
  if pad < 0 and padding == "zero":
    raise base.InputError(f"pad={pad} must be at least 0")
  if pad < 0 or (padding == "reflect" and pad >= limit):
    raise base.InputError(
      f"pad={pad} must lie between 0 and {limit - 1} for images of"
      f" {images.shape[1]}x{images.shape[2]} pixels"
    )
  sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
  padded = jnp.pad(images, sides, mode=PADDINGS[padding])

  def crop(image, key):
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

  return jax.vmap(crop)(padded, keys)


def random_flip(images: base.Array, keys: base.Array) -> base.Array:
  """Mirrors each image left to right with probability 1/2.

  Args:
    images: [B, H, W, C].
    keys: one typed key per image, [B].

  Raises:
    InputError: there is not one key per image.
  """
  if keys.shape[:1] != images.shape[:1]:
    raise base.InputError(
      f"keys must have shape [B] = [{images.shape[0]}]; got {keys.shape}"
    )
  flipped = jax.vmap(jax.random.bernoulli)(keys)
  return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def normalize(
  images: base.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> base.Array:
  """(images - mean) / std, per channel; mean = std = 1/2 maps [0, 1] to [-1, 1].

  Args:
    images: [..., C].
    mean: C numbers, or one for all channels.
    std: likewise.

  Raises:
    InputError: the number of means or deviations is neither 1 nor C.
  """

  def per_channel(name, values):
    if np.size(values) not in (1, images.shape[-1]):
      raise base.InputError(
        f"{name} has {np.size(values)} numbers, which do not fit images of"
        f" {images.shape[-1]} channels: give one for each channel, or one for all"
      )
    return jnp.asarray(values, images.dtype).reshape((1,) * (images.ndim - 1) + (-1,))

  return (images - per_channel("mean", mean)) / per_channel("std", std)


def standardize(images: base.Array) -> base.Array:
  """Subtracts each image's mean and divides by max(std, 1 / sqrt(number of values)).

  Args:
    images: [B, H, W, C]; half precision is processed in float32.
  """
  images = jnp.asarray(images)
  dtype = images.dtype
  images = images.astype(base.accumulator_dtype(dtype))
  axes = tuple(range(1, images.ndim))
  size = math.prod(images.shape[1:])
  mean = images.mean(axes, keepdims=True)
  deviation = images.std(axes, keepdims=True)
  result = (images - mean) / jnp.maximum(deviation, size**-0.5)
  return result.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else result
