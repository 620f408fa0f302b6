"""Unfair training sets: class sizes, attributes and independent draws."""

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import fairness
from l2rw_jax.data import sources

_CLASSES = 4


def source(split="train", per_class=50, dtype=np.uint8):
  """Images with different pixels, so that a test detects exchanged images."""
  labels = np.repeat(np.arange(_CLASSES), per_class + np.arange(_CLASSES)[::-1])
  labels = np.random.default_rng(1).permutation(labels).astype(np.int32)
  pixels = np.arange(len(labels))[:, None, None, None] % 200 + np.arange(4).reshape(
    1, 2, 2, 1
  )
  images = pixels.astype(np.uint8)
  if dtype != np.uint8:
    images = (images / 255).astype(dtype)
  return sources.Source("toy", "1.0.0", split, images, labels, _CLASSES, {})


def make(train=None, test=None, **options):
  arguments = {"groups": "class", "num_exemplars": 5, "seed": 0, **options}
  return fairness.fairness(
    train or source(), test or source("test", per_class=10), **arguments
  )


def test_class_sizes_of_the_long_tail():
  # After the 5 exemplars are taken, the smallest class of the source has 45 images
  # left. The first class keeps as many, and the last class 45 / 8, rounded down to 5.
  splits = make(imbalance=8.0)
  expected = [45, 22, 11, 5]
  np.testing.assert_array_equal(
    examples_lib.class_counts(splits.train, _CLASSES), expected
  )
  np.testing.assert_array_equal(
    examples_lib.class_counts(splits.meta, _CLASSES), [5] * 4
  )
  np.testing.assert_array_equal(splits.test.true_label, source("test", 10).labels)
  assert len(splits.validation.label) == 0
  for part in (splits.train, splits.meta, splits.test):
    np.testing.assert_array_equal(part.group, part.true_label)
    np.testing.assert_array_equal(part.label, part.true_label)


def test_images_match_their_source_rows():
  train = source()
  splits = make(train, imbalance=4.0)
  for part in (splits.train, splits.meta):
    np.testing.assert_array_equal(part.image, train.images[part.source_index])
    np.testing.assert_array_equal(part.true_label, train.labels[part.source_index])
  assert not set(splits.train.source_index) & set(splits.meta.source_index)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_groups_mark_the_inverted_images(dtype):
  train, test = source(dtype=dtype), source("test", 11, dtype=dtype)
  splits = make(train, test, groups="inverted", minority_share=0.1, imbalance=8.0)
  brightest = 255 if dtype == np.uint8 else 1
  for part, origin in (
    (splits.train, train),
    (splits.meta, train),
    (splits.test, test),
  ):
    plain = origin.images[part.source_index]
    expected = np.where(part.group[:, None, None, None] == 1, brightest - plain, plain)
    np.testing.assert_allclose(part.image, expected, atol=1e-6)
  # All images of each class, and the inverted ones: a tenth, but at least one.
  counts = [[40, 20, 10, 5], [4, 2, 1, 1]]
  for label in range(_CLASSES):
    groups = splits.train.group[splits.train.label == label]
    assert (len(groups), groups.sum()) == (counts[0][label], counts[1][label])
    groups = splits.meta.group[splits.meta.label == label]
    assert (len(groups), groups.sum()) == (10, 5)
    groups = splits.test.group[splits.test.label == label]
    assert groups.sum() == len(groups) // 2
  np.testing.assert_array_equal(train.images, source(dtype=dtype).images)


def test_noise_is_exact_and_in_train_only():
  splits = make(noise_fraction=0.25)
  assert np.sum(splits.train.label != splits.train.true_label) == round(0.25 * 180)
  np.testing.assert_array_equal(splits.meta.label, splits.meta.true_label)
  np.testing.assert_array_equal(splits.test.label, splits.test.true_label)


def test_fingerprint_depends_on_all_arguments():
  settings = [
    {},
    {"seed": 1},
    {"imbalance": 2.0},
    {"noise_fraction": 0.5},
    {"num_exemplars": 4},
    {"groups": "inverted", "num_exemplars": 4},
    {"groups": "inverted", "num_exemplars": 4, "minority_share": 0.2},
  ]
  fingerprints = [make(**s).fingerprint for s in settings]
  assert len(set(fingerprints)) == len(settings)
  assert fingerprints == [make(**s).fingerprint for s in settings]


def test_draws_are_independent_of_noise_and_share():
  one = make(groups="inverted", imbalance=4.0)
  other = make(groups="inverted", imbalance=4.0, noise_fraction=0.5, minority_share=0.3)
  for a, b in ((one.train, other.train), (one.meta, other.meta)):
    np.testing.assert_array_equal(a.source_index, b.source_index)
  np.testing.assert_array_equal(one.meta.group, other.meta.group)
  np.testing.assert_array_equal(one.test.group, other.test.group)


def test_class_sizes_of_digits():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  splits = make(train, test, groups="inverted", imbalance=10.0)
  np.testing.assert_array_equal(
    examples_lib.class_counts(splits.train, 10),
    [116, 89, 69, 53, 41, 32, 24, 19, 14, 11],
  )
  assert splits.num_classes == 10 and splits.train.image.shape == (468, 8, 8, 1)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"imbalance": 0.5}, "imbalance must be a number of at least 1; got 0.5"),
    ({"imbalance": float("nan")}, "imbalance must be a number of at least 1; got nan"),
    ({"imbalance": 46.0}, "leaves no image of class 3, .* use imbalance=45 or less"),
    (
      {"num_exemplars": 50},
      "class 3 has 50 images in toy train, and 50 exemplars of it",
    ),
    ({"num_exemplars": 25, "groups": "inverted"}, "lower num_exemplars"),
    ({"num_exemplars": -1}, "num_exemplars=-1 must be an integer of at least 0"),
    ({"groups": "gender"}, r"groups must be one of \('class', 'inverted'\)"),
    ({"groups": "inverted", "minority_share": 0.0}, "minority_share must lie between"),
    ({"noise_fraction": 1.5}, r"fraction must lie in \[0, 1\]"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
  ],
)
def test_invalid_arguments_raise(options, message):
  with pytest.raises(base.InputError, match=message):
    make(**options)


def test_numbers_that_are_not_pixels_are_not_inverted():
  # Standardized columns of a table, or 16-bit pixels.
  for change in (lambda x: x - 0.5, lambda x: 65535 * x):
    train, test = (
      part._replace(images=change(part.images))
      for part in (source(dtype=np.float32), source("test", 11, dtype=np.float32))
    )
    with pytest.raises(base.InputError, match="'inverted' need pixels from 0 to 255"):
      make(train, test, groups="inverted")
    make(train, test)


def test_a_class_without_images_raises():
  train, test = (
    source(split)._replace(num_classes=_CLASSES + 1) for split in ("train", "test")
  )
  message = "class 4 has 0 images in toy train: give a source with images of every"
  with pytest.raises(base.InputError, match=message):
    make(train, test, num_exemplars=0)
