"""Features from random patches, compared with a loop over windows; invalid images."""

import tracemalloc

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import random_patches


def _images(size, side=12):
  return np.random.default_rng(0).integers(256, size=(size, side, side, 3)).astype("u1")


def _reference(extractor, image):
  """Features of one image in float64, before they are standardized."""
  image = image.astype(np.float64) / 255
  kernel = extractor.kernel.reshape(-1, extractor.kernel.shape[-1]).astype(np.float64)
  responses = np.zeros((4, 4, 2 * kernel.shape[1]))
  for i in range(4):
    for j in range(4):
      window = image[2 * i : 2 * i + 6, 2 * j : 2 * j + 6].ravel()
      scaled = (window - window.mean()) / np.sqrt(window.var() + 0.01)
      response = scaled @ kernel - extractor.bias
      parts = (response - 0.5, -response - 0.5)
      responses[i, j] = np.maximum(np.concatenate(parts), 0)
  quadrants = [responses[a : a + 2, b : b + 2] for a in (0, 2) for b in (0, 2)]
  return np.concatenate([x.mean(axis=(0, 1)) for x in quadrants])


def test_features_are_those_of_a_loop_over_windows():
  images = _images(6)
  extractor, features = random_patches.fit(images)
  assert features.shape == (6, 2048) and features.dtype == np.float32
  expected = np.stack([_reference(extractor, image) for image in images])
  np.testing.assert_allclose(
    features * extractor.std + extractor.mean, expected, atol=1e-4
  )
  np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
  np.testing.assert_array_equal(extractor(images), features)
  again, _ = random_patches.fit(images)
  np.testing.assert_array_equal(extractor.kernel, again.kernel)
  other, _ = random_patches.fit(images, seed=1)
  assert not np.array_equal(extractor.kernel, other.kernel)


def test_constant_images_have_features_of_zero():
  _, features = random_patches.fit(np.full((2, 10, 10, 1), 7, np.uint8))
  np.testing.assert_array_equal(features, np.zeros((2, 2048)))


@pytest.mark.parametrize("images", [_images(2, 8), _images(2).astype(np.float32)])
def test_invalid_images_are_refused(images):
  with pytest.raises(base.InputError, match=r"images must be uint8 .* at least 10"):
    random_patches.fit(images)


def test_features_need_images_like_those_of_fit():
  images = _images(3)
  extractor, _ = random_patches.fit(images)
  with pytest.raises(base.InputError, match="images must be uint8"):
    extractor(images / np.float32(255))
  with pytest.raises(base.InputError, match="images must have 3 channels"):
    extractor(images[..., :1])
  assert extractor(images[:0]).shape == (0, 2048)


def test_features_of_many_images_are_stored_once_and_standardized():
  extractor, features = random_patches.fit(_images(1000))
  images = _images(2000)
  tracemalloc.start()
  tracemalloc.reset_peak()
  more = extractor(images)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1.2 * more.nbytes
  np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
  responses = features * extractor.std + extractor.mean
  np.testing.assert_allclose(extractor.std, responses.std(axis=0) + 1e-3, rtol=1e-3)
