"""Headers and pixels of image files: sizes, modes, and files that are not images."""

import numpy as np
from PIL import Image
import pytest

from l2rw_jax.data import image_files


def _save(path, pixels, **options):
  Image.fromarray(np.asarray(pixels)).save(path, **options)
  return path


def test_a_gray_image_is_read_as_it_is(tmp_path):
  pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
  path = _save(tmp_path / "a.png", pixels)
  assert image_files.header(path) == (4, 6, True, False)
  np.testing.assert_array_equal(image_files.read(path, (4, 6), 1), pixels[..., None])
  color = image_files.read(path, (4, 6), 3)
  np.testing.assert_array_equal(color, np.repeat(pixels[..., None], 3, axis=2))


def test_the_rotation_that_a_camera_stored_is_applied(tmp_path):
  pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
  exif = Image.Exif()
  exif[0x0112] = 6  # The camera was turned: the upright image is rotated clockwise.
  path = _save(tmp_path / "a.png", pixels, exif=exif)
  assert image_files.header(path) == (6, 4, True, False)
  upright = image_files.read(path, (6, 4), 1)[..., 0]
  np.testing.assert_array_equal(upright, np.rot90(pixels, -1))


def test_the_aspect_ratio_is_kept_within_the_limits(tmp_path):
  path = _save(tmp_path / "a.png", np.full((10, 40), 7, np.uint8))
  small = image_files.read(path, (20, 20), 1, keep_aspect_ratio=True)
  assert small.shape == (5, 20, 1) and (small == 7).all()
  assert image_files.read(path, (20, 20), 1).shape == (20, 20, 1)


def test_transparent_pixels_become_white(tmp_path):
  pixels = np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], np.uint8)
  path = _save(tmp_path / "a.png", pixels)
  assert not image_files.header(path).is_gray
  np.testing.assert_array_equal(image_files.read(path, (1, 2), 1).ravel(), [255, 9])


def test_16_bits_are_scaled_and_not_clipped(tmp_path):
  path = _save(tmp_path / "a.png", np.array([[0, 257, 65535]], np.uint16))
  assert image_files.header(path).is_deep
  np.testing.assert_array_equal(image_files.read(path, (1, 3), 1).ravel(), [0, 1, 255])
  with pytest.raises(ValueError, match="between -1 and 70000: convert it to 8 or 16"):
    image_files.to_8_bits(Image.fromarray(np.array([[-1, 70_000]], np.int32)))


def test_what_cannot_be_read_is_explained(tmp_path):
  floats = _save(tmp_path / "a.tif", np.array([[0.5]], np.float32))
  text = tmp_path / "a.png"
  text.write_text("no image")
  for path, reason in {
    floats: "its pixels are floating-point numbers: convert it to 8 bits",
    text: "it is not an image",
    tmp_path / "b.png": "No such file or directory",
  }.items():
    with pytest.raises(ValueError) as error:
      image_files.read(path, (1, 1), 1)
    assert str(error.value) == reason
