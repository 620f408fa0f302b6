"""Crops, flips and scaling: values, frequencies, number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp


def keys(number, seed=0):
  return jax.random.split(jax.random.key(seed), number)


@pytest.mark.parametrize("padding", augmentation.PADDINGS)
def test_crops_are_uniform_over_windows_of_the_padded_image(padding):
  image = np.arange(1.0, 13.0).reshape(3, 4, 1)
  mode = {"zero": "constant", "reflect": "reflect"}[padding]
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode=mode)
  windows = [padded[i : i + 3, j : j + 4].tobytes() for i in range(3) for j in range(3)]
  images = jnp.tile(image[None], (1800, 1, 1, 1))
  result = augmentation.random_crop(images, keys(1800), 1, padding)
  assert result.shape == images.shape
  counts = [0] * 9
  for crop in np.asarray(result, padded.dtype):
    counts[windows.index(crop.tobytes())] += 1
  # 200 each, with a standard deviation of 13.3.
  assert min(counts) > 140 and max(counts) < 260


def test_half_of_the_images_are_mirrored_left_to_right():
  images = jnp.tile(jnp.arange(6.0).reshape(1, 2, 3, 1), (1000, 1, 1, 1))
  result = np.asarray(augmentation.random_flip(images, keys(1000)))
  mirrored = (result == np.asarray(images)[:, :, ::-1]).all((1, 2, 3))
  same = (result == np.asarray(images)).all((1, 2, 3))
  assert (mirrored ^ same).all()
  assert 437 < mirrored.sum() < 563  # Four standard deviations.


def test_bytes_are_divided_by_255_as_numpy_does():
  """The results are exact, although XLA may multiply by 1 / 255 instead of dividing."""
  pixels = np.arange(256, dtype=np.uint8)
  expected = np.divide(pixels, np.float32(255), dtype=np.float32)
  for function in (augmentation.to_float, jax.jit(augmentation.to_float)):
    np.testing.assert_array_equal(function(pixels), expected)
  assert np.any(pixels * np.float32(1 / 255) != expected)
  images = pixels.reshape(1, 16, 16, 1)
  output = jax.jit(lambda x: augmentation.Preprocess()(x, None, False))(images)
  np.testing.assert_array_equal(np.ravel(output), expected)
  labels, floats = np.arange(3), expected.astype(np.float16)
  np.testing.assert_array_equal(augmentation.to_float(labels), np.float32([0, 1, 2]))
  assert augmentation.to_float(floats).dtype == jnp.float16


def test_scaling_matches_hand_computed_values():
  images = jnp.array([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3)
  np.testing.assert_allclose(
    augmentation.normalize(images, (0.5,), (0.5,)).ravel(), [-1, -0.5, 1]
  )
  np.testing.assert_allclose(
    augmentation.normalize(images, (0.0, 0.5, 0.5), (1.0, 0.25, 2.0)).ravel(),
    [0, -1, 0.25],
  )
  pair = jnp.stack([jnp.array([1.0, 3.0]), jnp.array([4.0, 4.0])]).reshape(2, 1, 2, 1)
  np.testing.assert_allclose(
    augmentation.standardize(pair).ravel(), [-1, 1, 0, 0], atol=1e-6
  )
  # A nearly constant image is divided by 1 / sqrt(2), not by its standard deviation.
  flat = jnp.array([0.0, 0.2]).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(
    augmentation.standardize(flat).ravel(), [-0.1 * 2**0.5, 0.1 * 2**0.5], rtol=1e-5
  )


CIFAR = augmentation.Preprocess(
  pad=4, padding="reflect", flip=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
)


def test_evaluation_only_scales():
  images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 3))
  np.testing.assert_array_equal(
    CIFAR(images, None, False), augmentation.normalize(images, CIFAR.mean, CIFAR.std)
  )
  standardize = augmentation.Preprocess(standardize=True)
  np.testing.assert_array_equal(
    standardize(images, None, False), augmentation.standardize(images)
  )


def test_padding_is_black_before_the_scaling():
  images = jnp.ones((200, 3, 3, 1))
  to_one = augmentation.Preprocess(pad=2, mean=(0.5,), std=(0.5,))
  result = to_one(images, keys(200), True)
  assert set(np.unique(result)) == {-1, 1}


def test_crop_and_flip_are_independent():
  marked = jnp.zeros((1, 5, 5, 1)).at[0, 2, 1].set(1)
  images = jnp.tile(marked, (3000, 1, 1, 1))
  both = augmentation.Preprocess(pad=1, flip=True)
  result = np.asarray(both(images, keys(3000), True))
  _, row, column, _ = (result == 1).nonzero()
  # The pixel moves to rows 1 to 3, and to columns 0 to 2 or, mirrored, 4 to 2: column 2
  # is twice as likely.
  shares = np.array([[1, 1, 2, 1, 1]] * 3) / 18
  counts = np.zeros((5, 5))
  np.add.at(counts, (row, column), 1 / 3000)
  np.testing.assert_allclose(counts[1:4], shares, atol=0.025)


@pytest.mark.parametrize("devices", [2, 8])
def test_augmentation_depends_only_on_the_key(devices):
  images = jax.random.uniform(jax.random.key(1), (16, 8, 8, 3))
  alone = jax.jit(lambda x, k: CIFAR(x, k, True))(images, keys(16))
  shards = images.reshape(devices, -1, 8, 8, 3)
  spread = jax.pmap(lambda x, k: CIFAR(x, k, True))(
    shards, keys(16).reshape(devices, -1)
  )
  np.testing.assert_allclose(spread.reshape(alone.shape), alone, atol=1e-6)
  order = np.random.default_rng(0).permutation(16)
  shuffled = jax.jit(lambda x, k: CIFAR(x, k, True))(images[order], keys(16)[order])
  np.testing.assert_allclose(shuffled, alone[order], atol=1e-6)


def test_classifier_augments_differently_at_every_training_step():
  model = classifier.Classifier(mlp.MLP(2, hidden=()), 2, preprocess=CIFAR)
  batch = {
    "image": jax.random.uniform(jax.random.key(0), (4, 8, 8, 3)),
    "label": jnp.zeros(4, jnp.int32),
    "index": jnp.arange(4),
  }
  params, state = model.init(jax.random.key(1), batch)

  def logits(train, step, batch=batch):
    key = jax.random.key(step)
    return np.asarray(model.forward(params, state, batch, key, train)[0])

  np.testing.assert_array_equal(logits(False, 0), logits(False, 1))
  np.testing.assert_array_equal(logits(True, 0), logits(True, 0))
  assert (logits(True, 0) != logits(True, 1)).any(1).all()
  same = {**batch, "image": jnp.tile(batch["image"][:1], (4, 1, 1, 1))}
  assert len(np.unique(logits(True, 0, same), axis=0)) == 4


@pytest.mark.slow("2")
@pytest.mark.parametrize("devices", [2, 4])
def test_classifier_augments_alike_on_any_number_of_devices(devices):
  model = classifier.Classifier(mlp.MLP(2, hidden=()), 2, preprocess=CIFAR)
  batch = {
    "image": jax.random.uniform(jax.random.key(0), (8, 8, 8, 3)),
    "index": jnp.array([3, 1, 4, 15, 9, 2, 6, 5]),
  }
  params, state = model.init(jax.random.key(1), batch)

  def logits(batch):
    return model.forward(params, state, batch, jax.random.key(2), True)[0]

  shards = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
  np.testing.assert_allclose(
    jax.pmap(logits)(shards).reshape(8, 2), jax.jit(logits)(batch), atol=1e-5
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pad": 8, "padding": "reflect"}, "pad=8 must lie between 0 and 7 .* 8x9 pixels"),
    ({"pad": -1}, "pad=-1 must be at least 0"),
    ({"pad": 1, "padding": "black"}, "padding must be one of zero, reflect.*'black'"),
  ],
)
def test_bad_settings_are_refused(options, message):
  preprocess = augmentation.Preprocess(**options)
  with pytest.raises(base.InputError, match=message) as error:
    preprocess(jnp.zeros((2, 8, 9, 3)), keys(2), True)
  assert "\n" not in str(error.value)


def test_numbers_for_each_channel_must_fit_the_images():
  preprocess = augmentation.Preprocess(std=(0.5, 0.5, 0.5))
  with pytest.raises(
    base.InputError, match=r"^std has 3 numbers, .* do not fit .* of 1 channels"
  ):
    preprocess(jnp.zeros((2, 4, 4, 1)), keys(2), False)


def test_flips_need_a_key_for_each_image():
  with pytest.raises(base.InputError, match=r"keys must have shape \[B\] = \[4\]"):
    augmentation.random_flip(jnp.zeros((4, 2, 2, 1)), keys(1))


def test_bools_are_not_pixels():
  with pytest.raises(base.InputError, match="pixels must be numbers, not bools"):
    augmentation.to_float(np.ones((1, 2, 2, 1), bool))


def test_half_precision_is_standardized_in_float32():
  # The variance is infinite in float16.
  images = jnp.linspace(0, 2000, 48).reshape(1, 4, 4, 3)
  actual = augmentation.standardize(images.astype(jnp.float16))
  assert actual.dtype == jnp.float16
  np.testing.assert_allclose(actual, augmentation.standardize(images), atol=2e-3)


def test_one_number_for_all_channels_may_be_a_scalar():
  images = jnp.linspace(0, 1, 24).reshape(1, 2, 4, 3)
  np.testing.assert_array_equal(
    augmentation.normalize(images, 0.5, 0.5),
    augmentation.normalize(images, (0.5,), (0.5,)),
  )
