"""Long tails: the class sizes of the papers, and draws independent of these sizes."""

import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import long_tail
from l2rw_jax.data import sources


def source(counts, split="train"):
  """`counts[c]` images of each class c, in random order; the pixels encode the row."""
  labels = np.repeat(np.arange(len(counts)), counts)
  labels = np.random.default_rng(1).permutation(labels).astype(np.int32)
  rows = np.arange(len(labels))
  images = np.stack([rows % 251, rows // 251], -1)[:, None, None]
  return sources.Source(
    "toy", "1.0.0", split, images.astype(np.uint8), labels, len(counts), {}
  )


def make(counts, **options):
  arguments = {"builder": "mwn", "shape": "exponential", "imbalance": 10.0, "seed": 0}
  arguments |= {"num_meta_per_class": 10, **options}
  test = source([3] * len(counts), "test")
  return long_tail.long_tail_splits(source(counts), test, **arguments)


def train_counts(splits):
  return examples_lib.class_counts(splits.train, splits.num_classes)


CIFAR10, CIFAR100 = [5000] * 10, [500] * 100
# Totals computed from the formulas in the code of LDAM, and of ABSGD for 20 and 50.
LDAM_TOTALS = [
  (CIFAR10, "exponential", 100, 12406),
  (CIFAR10, "exponential", 50, 13996),
  (CIFAR10, "exponential", 20, 17023),
  (CIFAR10, "exponential", 10, 20431),
  (CIFAR100, "exponential", 100, 10847),
  (CIFAR100, "exponential", 50, 12608),
  (CIFAR100, "exponential", 20, 15907),
  (CIFAR100, "exponential", 10, 19573),
  (CIFAR10, "step", 100, 25250),
  (CIFAR10, "step", 10, 27500),
  (CIFAR100, "step", 100, 25250),
  (CIFAR100, "step", 10, 27500),
]
# Totals computed from the formula in the code of Meta-Weight-Net, for each imbalance in
# FACTORS.
FACTORS = [1, 10, 20, 50, 100, 200]
MWN_TOTALS = [
  (CIFAR10, [49900, 20391, 16989, 13967, 12380, 11177]),
  (CIFAR100, [49000, 19183, 15594, 12354, 10626, 9304]),
]


@pytest.mark.parametrize(("counts", "shape", "imbalance", "total"), LDAM_TOTALS)
def test_ldam_total_sizes(counts, shape, imbalance, total):
  splits = make(
    counts, builder="ldam", shape=shape, imbalance=imbalance, num_meta_per_class=0
  )
  assert len(splits.train.label) == total and len(splits.meta.label) == 0


@pytest.mark.parametrize(("counts", "totals"), MWN_TOTALS)
def test_meta_weight_net_total_sizes(counts, totals):
  sizes = [len(make(counts, imbalance=factor).train.label) for factor in FACTORS]
  assert sizes == totals


def test_class_sizes():
  sizes = long_tail.class_sizes("exponential", 5000, 10, 100)
  assert list(sizes) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  sizes = train_counts(make(CIFAR10, imbalance=100))
  assert list(sizes) == [4990, 2991, 1793, 1075, 644, 386, 231, 138, 83, 49]
  sizes = long_tail.class_sizes("step", 5000, 10, 100)
  assert list(sizes) == [5000] * 5 + [50] * 5
  # With five classes, two have the large size.
  assert list(long_tail.class_sizes("step", 10, 5, 10)) == [10, 10, 1, 1, 1]


@pytest.mark.parametrize("factor", [1, 2, 3, 7, 10, 20, 50, 100, 125, 200, 250, 500])
def test_size_of_the_last_class_is_exact(factor):
  for shape in long_tail.SHAPES:
    for num_most in (500, 4990, 5000):
      sizes = long_tail.class_sizes(shape, num_most, 10, float(factor))
      assert sizes[0] == num_most and sizes[-1] == num_most // factor
      assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("shape", long_tail.SHAPES)
def test_sizes_for_numpy_numbers(shape):
  # In half precision, 70,000 is infinite, which as an integer would be -2^63 images.
  for kind in (np.float16, np.float32, np.int64, np.uint8):
    sizes = long_tail.class_sizes(shape, np.int32(70_000), 4, kind(100))
    expected = long_tail.class_sizes(shape, 70_000, 4, 100.0)
    np.testing.assert_array_equal(sizes, expected)
  assert expected.tolist()[::3] == [70_000, 700]


def test_rarest_class_limits_the_size_of_class_0():
  # MNIST has 5,421 fives; ten images of each class are meta images.
  mnist = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
  splits = make(mnist, imbalance=100)
  assert list(train_counts(splits)) == list(
    long_tail.class_sizes("exponential", 5411, 10, 100)
  )
  assert train_counts(splits)[0] == 5411 and train_counts(splits)[-1] == 54
  splits = make(mnist, imbalance=1, builder="ldam")
  # Only the fives have no spare images, so ten of them leave the training set.
  assert list(train_counts(splits)) == [5421] * 5 + [5411] + [5421] * 4


@pytest.mark.parametrize("builder", long_tail.BUILDERS)
@pytest.mark.parametrize("shape", long_tail.SHAPES)
def test_parts_are_disjoint_and_images_match_their_rows(builder, shape):
  counts = [60, 50, 55, 70]
  train = source(counts)
  splits = make(counts, builder=builder, shape=shape, num_meta_per_class=4)
  assert len(set(splits.train.source_index) & set(splits.meta.source_index)) == 0
  for part in (splits.train, splits.meta):
    assert len(set(part.source_index)) == len(part.source_index)
    np.testing.assert_array_equal(part.image, train.images[part.source_index])
    np.testing.assert_array_equal(part.label, train.labels[part.source_index])
    np.testing.assert_array_equal(part.label, part.true_label)
  assert list(examples_lib.class_counts(splits.meta, 4)) == [4] * 4
  assert len(splits.test.label) == 12 and len(splits.validation.label) == 0


def test_ldam_takes_meta_images_from_the_head_only():
  without, with_meta = (
    make(CIFAR10, builder="ldam", imbalance=100, num_meta_per_class=n) for n in (0, 10)
  )
  assert list(train_counts(without) - train_counts(with_meta)) == [10] + [0] * 9
  assert set(with_meta.train.source_index) < set(without.train.source_index)


def test_draws_are_independent_of_imbalance_and_shape():
  large, small, step, other = (
    make(CIFAR100, **options)
    for options in (
      {},
      {"imbalance": 100.0},
      {"shape": "step"},
      {"seed": 1},
    )
  )
  for splits in (small, step):
    np.testing.assert_array_equal(splits.meta.source_index, large.meta.source_index)
  assert set(small.train.source_index) < set(large.train.source_index)
  assert set(other.meta.source_index) != set(large.meta.source_index)


def test_fingerprint_depends_on_all_arguments():
  settings = [
    {},
    {"seed": 1},
    {"imbalance": 20.0},
    {"shape": "step"},
    {"num_meta_per_class": 9},
    {"builder": "ldam"},
    {"builder": "ldam", "shape": "step"},
  ]
  fingerprints = [make(CIFAR100, **s).fingerprint for s in settings]
  assert len(set(fingerprints)) == len(settings)
  assert fingerprints == [make(CIFAR100, **s).fingerprint for s in settings]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"imbalance": 0.5}, "imbalance must be a number of at least 1; got 0.5"),
    ({"imbalance": float("nan")}, "imbalance must be a number of at least 1; got nan"),
    ({"imbalance": float("inf")}, "imbalance must be a number of at least 1; got inf"),
    ({"imbalance": 46.0}, "leaves no image of class 3, .* use imbalance=40 or less"),
    (
      {"imbalance": 41.0, "shape": "step"},
      "leaves no image of class 2, because class 0 has",
    ),
    (
      {"num_meta_per_class": 50},
      "class 3 has 50 images in toy train, and 50 meta images",
    ),
    ({"num_meta_per_class": -1}, "num_meta_per_class=-1 must be an integer of at"),
    ({"builder": "cui"}, r"builder must be one of \('ldam', 'mwn'\); got 'cui'"),
    ({"shape": "linear"}, r"shape must be one of \('exponential', 'step'\); got"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
  ],
)
def test_invalid_arguments_raise(options, message):
  with pytest.raises(base.InputError, match=message):
    make([60, 60, 60, 50], **options)


def test_class_without_images_raises():
  with pytest.raises(base.InputError, match="class 1 has 0 images in toy train"):
    make([60, 0, 60], num_meta_per_class=0)


@pytest.mark.parametrize(
  "most, classes, match",
  [
    (10, 1, "num_classes=1 must be an integer of at least 2"),
    (10, 2.5, r"num_classes=2\.5 must be an integer"),
    (-10, 2, "num_most=-10 must be an integer of at least 0"),
    (np.nan, 2, "num_most=nan must be an integer"),
  ],
)
def test_wrong_sizes_are_refused(most, classes, match):
  with pytest.raises(base.InputError, match=match):
    long_tail.class_sizes("exponential", most, classes, 2.0)
