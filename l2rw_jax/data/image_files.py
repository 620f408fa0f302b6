"""Image files as arrays with 8 bits per channel."""

import os
from typing import Any, NamedTuple

import numpy as np

# Formats that Pillow reads without additional software.
SUFFIXES = frozenset(
  {".bmp", ".gif", ".jfif", ".jpeg", ".jpg"}
  | {".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_GRAY_MODES = frozenset({"1", "L", "LA", "La", "I", "F"})


class Header(NamedTuple):
  """The header of an image file, which is read without decoding the image.

  Attributes:
    height: height of the upright image in pixels.
    width: width of the upright image in pixels.
    is_gray: whether the image has no color.
    is_deep: whether pixels are integers of 16 or 32 bits, which `to_8_bits` scales.
  """

  height: int
  width: int
  is_gray: bool
  is_deep: bool = False


def header(path: str | os.PathLike) -> Header:
  """Reads the header of an image file.

  Args:
    path: the file.

  Raises:
    ValueError: the file is not an image that can be read; the message says why.
  """
  from PIL import Image

  try:
    with Image.open(path) as image:
      width, height = image.size
      if image.getexif().get(0x0112) in (5, 6, 7, 8):  # It is rotated by 90 degrees.
        width, height = height, width
      mode = image.mode.partition(";")[0]
      return Header(height, width, mode in _GRAY_MODES, mode == "I")
  # A damaged file can raise nearly any error.
  except Exception as error:
    raise ValueError(_reason(error)) from error


def read(
  path: str | os.PathLike,
  size: tuple[int, int],
  channels: int,
  *,
  keep_aspect_ratio: bool = False,
) -> np.ndarray:
  """Decodes an image file and resizes the image.

  The rotation that a camera stored in the file is applied, transparent pixels become
  white, and the first frame is used if there are several.

  Args:
    path: the file.
    size: height and width of the result, or the largest allowed height and width with
      `keep_aspect_ratio`.
    channels: 1 (gray) or 3 (RGB).
    keep_aspect_ratio: whether to make the image as large as `size` allows without
      distorting it, instead of stretching it to exactly this size.

  Returns:
    uint8 [height, width, channels].

  Raises:
    ValueError: the file is not an image that can be read; the message says why.
  """
  from PIL import Image
  from PIL import ImageOps

  try:
    with Image.open(path) as image:
      if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: convert it to 8 bits")
      upright = ImageOps.exif_transpose(image)
      small = _opaque(to_8_bits(upright)).convert("L" if channels == 1 else "RGB")
      if keep_aspect_ratio:
        scale = min(size[0] / small.height, size[1] / small.width)
        size = (
          max(1, round(small.height * scale)),
          max(1, round(small.width * scale)),
        )
      small = small.resize(size[::-1], Image.Resampling.BILINEAR)
      return np.asarray(small, np.uint8).reshape(*size, channels)
  # A damaged file can raise nearly any error.
  except Exception as error:
    raise ValueError(_reason(error)) from error


def to_8_bits(image: Any) -> Any:
  """Scales integers of 16 or 32 bits per pixel, from 0 to 65535, to 8 bits.

  Other images are returned unchanged. Pillow's `convert` would clip the values instead.

  Args:
    image: a Pillow image.

  Raises:
    ValueError: a pixel with 32 bits is not between 0 and 65535.
  """
  from PIL import Image

  if image.mode.partition(";")[0] != "I":
    return image
  pixels = np.asarray(image).astype(np.float64)
  least, most = np.min(pixels), np.max(pixels)
  if least < 0 or most > 65535:
    raise ValueError(
      f"its pixels lie between {least:.0f} and {most:.0f}: convert it to 8 or 16 bits"
    )
  return Image.fromarray(np.round(pixels / 257).astype(np.uint8))  # 257 = 65535 / 255.


def _opaque(image: Any) -> Any:
  """The image on a white background if it is transparent."""
  from PIL import Image

  if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA"):
    return image
  image = image.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _reason(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if type(error).__name__ == "UnidentifiedImageError":
    return "it is not an image"
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
