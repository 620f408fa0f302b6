"""The scale of the pixels of images and of other arrays."""

from typing import NamedTuple

import numpy as np

from l2rw_jax import base

# Rounding can make pixels that have been divided by 255 slightly larger than 1.
_WHITE = 1.001
# Data sets whose largest values differ by a larger factor count as differently scaled.
_SAME_SCALE = 10


class Pixels(NamedTuple):
  """The scale of the features of images, or of other arrays [N, ...] in an archive.

  Attributes:
    is_uint8: whether the features are uint8, which networks divide by 255. Otherwise,
      they are float32 and used as they are.
    factor: the number by which stored numbers are multiplied: 255 if numbers from 0 to
      1 (masks, or pixels that have been divided by 255) become uint8; otherwise 1.
    highest: the largest absolute value of the features.
  """

  is_uint8: bool
  factor: int
  highest: float


# The scale of 8-bit images, whether or not their pixels have been read.
BYTES = Pixels(is_uint8=True, factor=1, highest=255.0)


def pixels_of(features: np.ndarray) -> Pixels:
  """Returns the scale of features [N, ...] that are already uint8 or float32."""
  lowest, highest, _ = _range(features)
  return Pixels(features.dtype == np.uint8, 1, max(highest, -lowest))


def finite_rows(values: np.ndarray) -> np.ndarray:
  """Which of N rows have only finite values; values [N, ...], result bool [N]."""
  return np.isfinite(values).reshape(len(values), -1).all(axis=1)


def _range(values: np.ndarray) -> tuple[float, float, bool]:
  """The lowest and the highest value of finite rows, and whether all are whole numbers.

  Rows are read in blocks to save memory. If no row is finite, the result is
  (0, 0, True).
  """
  if values.dtype.kind != "f":
    return (
      (float(values.min()), float(values.max()), True) if values.size else (0, 0, True)
    )
  ranges = []
  for start in range(0, len(values), 1024):
    rows = values[start : start + 1024]
    rows = rows[finite_rows(rows)]
    if rows.size:
      is_whole = bool((rows == np.rint(rows)).all())
      ranges.append((float(rows.min()), float(rows.max()), is_whole))
  if not ranges:
    return 0, 0, True
  lowest, highest, are_whole = zip(*ranges, strict=True)
  return min(lowest), max(highest), all(are_whole)


def choose(
  name: str, values: np.ndarray, like: Pixels | None, notes: list[str]
) -> Pixels:
  """The scale that the features will have.

  Args:
    name: the name of the data, for messages.
    values: stored numbers, [N, ...].
    like: the scale of the other data, or None if there are none.
    notes: a list to which a note about unusual numbers is appended.

  Raises:
    InputError: the numbers cannot be converted to the scale `like`.
  """
  lowest, highest, is_whole = _range(values)
  is_float, is_mask = values.dtype.kind == "f", values.dtype.kind == "b"
  if like is None:
    # Small whole numbers that are stored as floats need not be pixels.
    is_uint8 = lowest >= 0 and highest <= 255 and is_whole
    is_uint8 = is_uint8 and (highest > 127 or not is_float)
    factor = 255 if is_uint8 and highest <= 1 else 1
    pixels = Pixels(is_uint8, factor, factor * max(highest, -lowest))
    if is_uint8 and pixels.highest <= 127:
      notes.append(
        "The pixels were read as those of 8-bit images, where white is 255; the largest"
        f" is {highest:g}."
      )
    if not is_uint8 and pixels.highest > 2 * _SAME_SCALE:
      notes.append(
        f"The values, from {lowest:g} to {highest:g}, are used as they are. Networks"
        " learn best from values between -1 and 1."
      )
    return pixels
  factor = like.factor if highest <= 1 and not is_float else 1
  if like.is_uint8 and (is_mask or (is_float and lowest >= 0 and highest <= _WHITE)):
    factor = 255  # Masks, and pixels that have been divided by 255.
  pixels = Pixels(like.is_uint8, factor, factor * max(highest, -lowest))
  smaller, larger = sorted((pixels.highest, like.highest))
  has_scale = larger <= _SAME_SCALE * smaller or smaller == 0
  can_be_uint8 = lowest >= 0 and pixels.highest <= 255 * _WHITE
  can_be_uint8 = can_be_uint8 and (is_whole or factor == 255)
  if not has_scale or (like.is_uint8 and not can_be_uint8):
    kind = "whole numbers" if is_whole else "numbers"
    others = "whole numbers" if like.is_uint8 else "numbers"
    raise base.InputError(
      f"{name} has {kind} from {lowest:g} to {highest:g} as pixels, but the other data"
      f" have {others} up to {like.highest:g}; give both the same scale"
    )
  return pixels


def convert(values: np.ndarray, pixels: Pixels) -> np.ndarray:
  """Converts stored numbers that are finite to features, uint8 or float32."""
  if not pixels.is_uint8:
    return values.astype(np.float32, copy=False)
  if values.dtype.kind == "f":
    return np.rint(values * np.float32(pixels.factor)).astype(np.uint8)  # At most 255.
  features = values.astype(np.uint8, copy=False)
  return features if pixels.factor == 1 else features * np.uint8(pixels.factor)
