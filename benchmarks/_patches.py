"""Features of small color images that need no labels and little time.

Random patches of the images are the filters of one convolution: Coates, Lee, Ng, "An
Analysis of Single-Layer Networks in Unsupervised Feature Learning", AISTATS 2011, where
random patches rank little below learned ones. A small network on these features is far
better than on pixels, and far faster than a convolutional network on one CPU core.
"""

import jax
import jax.numpy as jnp
import numpy as np

_SIZE, _STRIDE, _FILTERS = 6, 2, 256
_SAMPLE = 20_000
# Of the contrast normalization, the whitening and the rectification.
_LEAST_VARIANCE, _RIDGE, _THRESHOLD = 0.01, 0.1, 0.5
_CHUNK = 250


def features(images: np.ndarray, seed: int = 0) -> np.ndarray:
  """Pooled responses to random whitened patches, standardized.

  Args:
    images: uint8 [N, H, W, channels], H and W at least 8.
    seed: seed of the choice of the patches.

  Returns:
    float32 [N, 2048]: the positive and the negative parts of the responses to 256
    filters, averaged over four quadrants.
  """
  images = images.astype(np.float32) / 255
  kernel, bias = _filters(_patches(images, np.random.default_rng(seed)))

  @jax.jit
  def respond(images):
    convolve = jax.lax.conv_general_dilated
    numbers = ("NHWC", "HWIO", "NHWC")
    channels = images.shape[-1]
    mean = jnp.full((_SIZE, _SIZE, channels, 1), 1 / (_SIZE**2 * channels), jnp.float32)

    def over_windows(x, kernel):
      return convolve(x, kernel, (_STRIDE,) * 2, "VALID", dimension_numbers=numbers)

    first = over_windows(images, mean)
    variance = over_windows(images**2, mean) - first**2
    # The filters sum to zero, so that the mean of a window does not matter.
    response = over_windows(images, jnp.asarray(kernel))
    response /= jnp.sqrt(jnp.maximum(variance, 0) + _LEAST_VARIANCE)
    response -= bias[None, None, None, :]
    signs = (
      jnp.maximum(response - _THRESHOLD, 0),
      jnp.maximum(-response - _THRESHOLD, 0),
    )
    both = jnp.concatenate(signs, axis=-1)
    half = both.shape[1] // 2, both.shape[2] // 2
    both = both[:, : 2 * half[0], : 2 * half[1]]
    both = both.reshape(len(both), 2, half[0], 2, half[1], -1).mean(axis=(2, 4))
    return both.reshape(len(both), -1)

  chunks = range(0, len(images), _CHUNK)
  result = np.concatenate(
    [np.asarray(respond(images[start : start + _CHUNK])) for start in chunks]
  )
  return (result - result.mean(axis=0)) / (result.std(axis=0) + 1e-3)


def _patches(images, rng):
  """Random patches of mean 0 and deviation 1, [20000, 36 channels]."""
  size, height, width, _ = images.shape
  rows = rng.integers(size, size=_SAMPLE)
  tops = rng.integers(height - _SIZE + 1, size=_SAMPLE)
  lefts = rng.integers(width - _SIZE + 1, size=_SAMPLE)
  patches = np.stack(
    [
      images[row, top : top + _SIZE, left : left + _SIZE].ravel()
      for row, top, left in zip(rows, tops, lefts, strict=True)
    ]
  )
  patches -= patches.mean(axis=1, keepdims=True)
  return patches / np.sqrt(patches.var(axis=1, keepdims=True) + _LEAST_VARIANCE)


def _filters(patches):
  """Whitened patches as filters [6, 6, channels, 256], and their biases [256]."""
  mean = patches.mean(axis=0)
  values, vectors = np.linalg.eigh(np.cov((patches - mean).T))
  whiten = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)) @ vectors.T
  chosen = ((patches - mean) @ whiten)[:_FILTERS]
  chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
  kernel = whiten @ chosen.T
  bias = (mean @ kernel).astype(np.float32)
  kernel -= kernel.mean(axis=0)
  shape = (_SIZE, _SIZE, -1, _FILTERS)
  return kernel.reshape(shape).astype(np.float32), bias
