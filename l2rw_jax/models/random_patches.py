"""Features of small color images that are computed quickly and without labels.

    make_features, x = random_patches.fit(images)
    x_test = make_features(test_images)

Random patches of the images are the filters of one convolution, as in Coates, Ng, "The
Importance of Encoding Versus Training with Sparse Coding and Vector Quantization", ICML
2011, which shows that random examples can replace learned filters. A small network on
these features is far more accurate than one on pixels and, on one CPU core, far faster
than a convolutional network.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

_SIZE, _STRIDE, _FILTERS = 6, 2, 256
# Images of this size have three windows per side, of which pooling uses two.
LEAST_SIDE = 10
_SAMPLE = 20_000
# Constants of the contrast normalization, the whitening and the rectification.
_LEAST_VARIANCE, _RIDGE, _THRESHOLD = 0.01, 0.1, 0.5
_CHUNK = 250


@dataclasses.dataclass(frozen=True, eq=False)
class RandomPatches:
  """Pooled responses of images to fixed filters; made by `fit`.

  Attributes:
    kernel: the filters, float32 [6, 6, channels, 256].
    bias: numbers that are subtracted from the responses, float32 [256].
    mean: mean of the features, before they are standardized, of the images that the
      filters were fitted to, float32 [2048].
    std: standard deviation of these features plus 1e-3, float32 [2048].
  """

  kernel: np.ndarray
  bias: np.ndarray
  mean: np.ndarray
  std: np.ndarray

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Features of images.

    Args:
      images: uint8 [N, H, W, channels], with as many channels as those of `fit`.

    Returns:
      float32 [N, 2048].

    Raises:
      InputError: the images have a different type or number of channels, or are too
        small.
    """
    _check(images)
    if images.shape[-1] != self.kernel.shape[2]:
      raise base.InputError(
        f"images must have {self.kernel.shape[2]} channels, as those of fit; got"
        f" {list(images.shape)}."
      )
    return self._standardized(_responses(images, self.kernel, self.bias))

  def _standardized(self, responses):
    """Standardizes responses in place, because they take 8 KB per image."""
    responses -= self.mean
    responses /= self.std
    return responses


def fit(images: np.ndarray, seed: int = 0) -> tuple[RandomPatches, np.ndarray]:
  """Chooses filters from images, without labels, and computes features of the images.

  The features are the parts of the responses to 256 filters above 0.5 and below -0.5,
  averaged over four quadrants and standardized.

  Args:
    images: uint8 [N, H, W, channels], H and W at least 10.
    seed: seed of the choice of the patches.

  Returns:
    A function that computes the features of any images with as many channels, and the
    features of `images`, float32 [N, 2048].

  Raises:
    InputError: the images have another type or number of axes, or are too small.
  """
  _check(images)
  kernel, bias = _filters(_patches(images, np.random.default_rng(seed)))
  responses = _responses(images, kernel, bias)
  # The standard deviation of all columns at once would need a copy of the responses.
  columns = np.split(responses, range(_FILTERS, responses.shape[1], _FILTERS), axis=1)
  std = np.concatenate([part.std(axis=0) for part in columns])
  extractor = RandomPatches(
    kernel, bias, responses.mean(axis=0), std + np.float32(1e-3)
  )
  return extractor, extractor._standardized(responses)


def _check(images: np.ndarray) -> None:
  if (
    images.dtype != np.uint8 or images.ndim != 4 or min(images.shape[1:3]) < LEAST_SIDE
  ):
    raise base.InputError(
      f"images must be uint8 [N, H, W, channels] with H and W at least {LEAST_SIDE};"
      f" got {images.dtype} {list(images.shape)}."
    )


def _responses(images: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
  responses = np.empty((len(images), 8 * kernel.shape[-1]), np.float32)
  for start in range(0, len(images), _CHUNK):
    chunk = images[start : start + _CHUNK]
    responses[start : start + len(chunk)] = _respond(chunk, kernel, bias)
  return responses


@jax.jit
def _respond(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """Pooled responses before they are standardized, [N, 2048]."""
  images = images.astype(jnp.float32) / 255
  size = _SIZE**2 * images.shape[-1]
  average = jnp.full((_SIZE, _SIZE, images.shape[-1], 1), 1 / size, jnp.float32)

  def over_windows(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (_STRIDE,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  mean = over_windows(images, average)
  variance = over_windows(images**2, average) - mean**2
  # The filters sum to zero, so that the mean of a window has no effect.
  response = over_windows(images, kernel)
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


def _patches(images, rng):
  """Random patches of mean 0 and standard deviation below 1, [20000, 36 * channels]."""
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
  patches = patches.astype(np.float32) / 255
  patches -= patches.mean(axis=1, keepdims=True)
  return patches / np.sqrt(patches.var(axis=1, keepdims=True) + _LEAST_VARIANCE)


def _filters(patches):
  """Whitened patches as filters [6, 6, channels, 256], and their biases [256]."""
  mean = patches.mean(axis=0)
  values, vectors = np.linalg.eigh(np.cov((patches - mean).T))
  whiten = (vectors / np.sqrt(np.maximum(values, 0) + _RIDGE)) @ vectors.T
  chosen = ((patches - mean) @ whiten)[:_FILTERS]
  # The norm is 0 if all images are constant; the filters are then zero.
  chosen /= np.maximum(np.linalg.norm(chosen, axis=1, keepdims=True), 1e-12)
  kernel = whiten @ chosen.T
  bias = (mean @ kernel).astype(np.float32)
  kernel -= kernel.mean(axis=0)
  shape = (_SIZE, _SIZE, -1, _FILTERS)
  return kernel.reshape(shape).astype(np.float32), bias
