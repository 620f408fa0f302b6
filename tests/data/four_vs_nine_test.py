"""Splits of fours against nines."""

import pathlib

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import four_vs_nine
from l2rw_jax.data import sources


def source(split, counts):
  """Images whose pixels are their class."""
  labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
  labels = np.random.default_rng(1).permutation(labels)
  images = np.broadcast_to(labels[:, None, None, None], (len(labels), 2, 2, 1))
  return sources.Source(
    "toy", "1.0.0", split, images.astype(np.uint8), labels, len(counts), {}
  )


DIGITS = source("train", [7] * 4 + [5842] + [7] * 4 + [5949])
DIGITS_TEST = source("test", [3] * 4 + [982] + [3] * 4 + [1009])
NO_NINES = source("test", [3] * 9 + [0])


def make_splits(train=DIGITS, test=DIGITS_TEST, **options):
  return four_vs_nine.four_vs_nine(
    train, test, **{"majority": 0.995, "seed": 0, **options}
  )


def rows(part):
  return set(part.source_index.tolist())


@pytest.mark.parametrize(
  ("majority", "fours", "nines"),
  [
    (0.9, 494, 4495),
    (0.95, 245, 4745),
    (0.98, 95, 4895),
    (0.99, 45, 4945),
    (0.995, 20, 4970),
  ],
)
def test_class_counts_match_the_authors_program(majority, fours, nines):
  splits = make_splits(majority=majority)
  np.testing.assert_array_equal(
    examples_lib.class_counts(splits.train, 2), [fours, nines]
  )
  np.testing.assert_array_equal(examples_lib.class_counts(splits.meta, 2), [5, 5])
  np.testing.assert_array_equal(examples_lib.class_counts(splits.test, 2), [982, 982])
  assert len(splits.validation.label) == 0
  assert splits.num_classes == 2


def test_labels_match_the_digits():
  splits = make_splits(num_test=500)
  for part in (splits.train, splits.meta, splits.test):
    digit = part.image[:, 0, 0, 0]
    np.testing.assert_array_equal(digit, np.where(part.label == 0, 4, 9))
    np.testing.assert_array_equal(part.label, part.true_label)
  np.testing.assert_array_equal(examples_lib.class_counts(splits.test, 2), [250, 250])
  assert not rows(splits.train) & rows(splits.meta)


def test_include_meta_keeps_the_same_images():
  disjoint = make_splits()
  overlapping = make_splits(include_meta=True)
  assert rows(overlapping.meta) == rows(disjoint.meta)
  assert rows(overlapping.train) == rows(disjoint.train) | rows(disjoint.meta)
  np.testing.assert_array_equal(
    examples_lib.class_counts(overlapping.train, 2), [25, 4975]
  )


def test_without_meta_set():
  splits = make_splits(num_meta=0)
  assert len(splits.meta.label) == 0
  np.testing.assert_array_equal(examples_lib.class_counts(splits.train, 2), [25, 4975])


def test_the_seed_determines_the_splits():
  one, same, other = (make_splits(seed=seed) for seed in (3, 3, 4))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  assert rows(one.train) == rows(same.train) != rows(other.train)
  assert rows(one.meta) == rows(same.meta) != rows(other.meta)


def test_splits_of_digits_never_change():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  imbalanced = four_vs_nine.four_vs_nine(
    train, test, majority=0.9, seed=0, num_train=130
  )
  np.testing.assert_array_equal(
    examples_lib.class_counts(imbalanced.train, 2), [7, 112]
  )
  assert imbalanced.fingerprint == "56adc42f22c14f3f"


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"majority": 0.0}, "majority must lie between 0 and 1; got 0.0"),
    ({"majority": 1.0}, "majority must lie between 0 and 1; got 1.0"),
    ({"majority": 99.5}, "majority must lie between 0 and 1; got 99.5"),
    ({"majority": float("nan")}, "majority must lie between 0 and 1; got nan"),
    ({"num_meta": 9}, "num_meta must be even.*got 9"),
    ({"num_meta": -2}, "num_meta=-2 must be an integer of at least 0"),
    ({"num_train": 99.5}, "num_train=99.5 must be an integer of at least 0"),
    ({"num_test": 501}, "num_test must be even.*got 501"),
    ({"num_test": 1966}, "983 nines; toy test has 982 and 1009. Use .* 2 to 1964"),
    ({"num_test": 0}, "num_test=0 needs 0 fours"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ({"num_train": 6000}, "needs 30 fours and 5970 nines; toy train has 5842 and 5949"),
    (
      {"num_train": 1000},
      "nothing is left.*needs 5 fours and 995 nines, .* at least 6 ",
    ),
    ({"num_train": 100, "num_meta": 0}, "nothing is left.*needs 0 fours and 99 nines"),
    ({"num_train": 100, "include_meta": True}, "nothing is left.*needs 0 fours"),
    ({"test": NO_NINES}, "the test set needs fours and nines; toy test has 3 and 0"),
    ({"num_train": 0}, "nothing is left.*needs 0 fours and 0 nines"),
  ],
)
def test_invalid_arguments_raise(options, message):
  with pytest.raises(base.InputError, match=message) as error:
    make_splits(**options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("majority", "most"), [(0.3, 184), (0.9, 143), (0.99, 130)])
def test_error_names_the_largest_possible_size(majority, most):
  train, test = source("train", [129] * 10), source("test", [50] * 10)
  options = {"majority": majority, "num_meta": 0}
  message = f"has 129 and 129. Use num_train={most} or less"
  with pytest.raises(base.InputError, match=message):
    make_splits(train, test, **options)
  splits = make_splits(train, test, num_train=most, **options)
  assert len(splits.train.label) >= most - 1
  with pytest.raises(base.InputError, match=message):
    make_splits(train, test, num_train=most + 2, **options)


def test_one_minority_image_suffices():
  splits = make_splits(num_train=1200)
  np.testing.assert_array_equal(examples_lib.class_counts(splits.train, 2), [1, 1189])


@pytest.mark.slow
@pytest.mark.real_data
def test_real_mnist_has_the_sizes_of_the_paper(
  tfds_dir: pathlib.Path, decoded: pathlib.Path
):
  train, test = (
    sources.load("mnist", split, data_dir=tfds_dir, cache_dir=decoded)
    for split in ("train", "test")
  )
  splits = four_vs_nine.four_vs_nine(train, test, majority=0.995, seed=0, num_test=500)
  np.testing.assert_array_equal(examples_lib.class_counts(splits.train, 2), [20, 4970])
  np.testing.assert_array_equal(examples_lib.class_counts(splits.test, 2), [250, 250])
  np.testing.assert_array_equal(
    train.labels[splits.train.source_index], np.where(splits.train.label, 9, 4)
  )
  assert splits.train.image.shape == (4990, 28, 28, 1)
  assert splits.train.image.min() == 0 and splits.train.image.max() == 255
