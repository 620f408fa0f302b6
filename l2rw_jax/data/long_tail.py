"""Long-tailed training sets: classes of very different sizes.

Class 0 is the largest, and sizes decrease with the number of the class, as in the
released programs of LDAM and Meta-Weight-Net. All labels are right, and the test set is
unchanged.
"""

import math

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources

SHAPES = ("exponential", "step")
BUILDERS = ("ldam", "mwn")
# With this offset, 5000 / 100 is 50 regardless of how the power is rounded.
_ROUNDING = 1e-6


def class_sizes(
  shape: str, num_most: int, num_classes: int, imbalance: float
) -> np.ndarray:
  """The number of images in each class.

  With "exponential", class c has floor(n_0 imbalance^(-c / (C - 1))) images. With
  "step", the first half of the classes (rounded down) have n_0 images, and the others
  have floor(n_0 / imbalance).

  Args:
    shape: one of `SHAPES`.
    num_most: n_0, the size of class 0, at least 0.
    num_classes: C, at least 2.
    imbalance: n_0 / n_{C-1}, at least 1; the released programs take its inverse.

  Returns:
    Sizes, int [C]; the smallest ones may be 0.

  Raises:
    InputError: the shape is unknown, `imbalance` is less than 1 or not finite, or
      `num_most` or `num_classes` is not an integer or is too small.

  References:
    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR
    2019 ("exponential"); Buda et al., "A systematic study of the class imbalance
    problem in convolutional neural networks", 2018 ("step", with half of the classes).

  >>> print(class_sizes("exponential", 5000, 10, 100.))
  [5000 2997 1796 1077  645  387  232  139   83   50]
  """
  if shape not in SHAPES:
    raise base.InputError(f"shape must be one of {SHAPES}; got {shape!r}")
  if not 1 <= imbalance < math.inf:
    raise base.InputError(f"imbalance must be a number of at least 1; got {imbalance}")
  num_classes = base.check_integer("num_classes", num_classes, 2)
  # Products with NumPy scalars of a narrow type would overflow.
  num_most = base.check_integer("num_most", num_most, 0)
  imbalance = float(imbalance)
  classes = np.arange(num_classes)
  if shape == "exponential":
    shares = imbalance ** -(classes / (num_classes - 1))
  else:
    shares = np.where(classes < num_classes // 2, 1.0, 1 / imbalance)
  return np.floor(num_most * shares + _ROUNDING).astype(int)


def check_sizes(sizes: np.ndarray, imbalance: float) -> None:
  """Raises InputError if a class has no images.

  Args:
    sizes: the result of `class_sizes`, [C].
    imbalance: the argument of `class_sizes`.
  """
  if sizes.min() < 1:
    raise base.InputError(
      f"imbalance={imbalance} leaves no image of class {np.argmin(sizes > 0)}, because"
      f" class 0 has {sizes[0]}; use imbalance={sizes[0]} or less"
    )


def long_tail_splits(
  train: sources.Source,
  test: sources.Source,
  *,
  builder: str,
  shape: str,
  imbalance: float,
  num_meta_per_class: int,
  seed: int,
  trusted: sources.Source | None = None,
) -> examples_lib.Splits:
  """A long-tailed training set and a small, class-balanced, disjoint meta set.

  n_0, the size of class 0, is derived from the *rarest* class of `train`, so that
  every class has enough images. (All classes of CIFAR have the same size, but those of
  MNIST do not: it has 5,421 fives.) The two builders differ in n_0:

    mwn     The meta images are removed first: n_0 is the number of images that are
            left in the rarest class (4,990 on CIFAR-10 with 10 meta images per
            class), as in the released code of Meta-Weight-Net.
    ldam    n_0 is the number of images in the rarest class (5,000 on CIFAR-10), as in
            the released code of LDAM, which has no meta set. The meta set is drawn
            from images that are not in the long tail. If a class has too few of
            these, fewer of its images are left for training. On CIFAR-10 with
            "exponential", an imbalance of 100 and 10 meta images per class, 4,990
            images of class 0 are left, and every other class keeps its size and its
            images.

  The images of every class are shuffled with the seed. The training set takes the first
  ones, and the meta set takes the last ones. Therefore, the meta set does not depend on
  `imbalance` or `shape`, and a larger training set contains the smaller ones.

  Args:
    train: the source of the training and meta sets.
    test: the source whose images are all used as the test set.
    builder: one of `BUILDERS`.
    shape: one of `SHAPES`.
    imbalance: number of images of the first class divided by that of the last, at least
      1.
    num_meta_per_class: number of meta images of every class; 0 for none.
    seed: seed of the draws, at least 0. The released programs use one fixed seed.
    trusted: a source that becomes the whole meta set; `num_meta_per_class` must then
      be 0.

  Returns:
    The splits; the validation set is empty.

  Raises:
    InputError: an argument is out of range, the sources do not match, or a class has no
      images left.

  References:
    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin
    Loss", NeurIPS 2019; Shu et al., "Meta-Weight-Net", NeurIPS 2019.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(num_meta_per_class=num_meta_per_class)
  if trusted is not None:
    examples_lib.check_trusted(train, trusted, num_meta_per_class)
  if builder not in BUILDERS:
    raise base.InputError(f"builder must be one of {BUILDERS}; got {builder!r}")
  (rng,) = examples_lib.generators(seed, 1)
  pools = base.rows_by_class(train.labels, np.arange(train.num_classes))
  pools = [rng.permutation(pool) for pool in pools]
  _check_meta(train, [len(pool) for pool in pools], num_meta_per_class)
  most = min(len(pool) for pool in pools)
  if builder == "mwn":
    most -= num_meta_per_class
  sizes = class_sizes(shape, most, train.num_classes, imbalance)
  check_sizes(sizes, imbalance)
  rows = [
    pool[: min(size, len(pool) - num_meta_per_class)]
    for pool, size in zip(pools, sizes, strict=True)
  ]
  meta = [pool[len(pool) - num_meta_per_class :] for pool in pools]
  splits = examples_lib.assemble(
    train,
    test,
    {
      "train": np.concatenate(rows),
      "meta": np.concatenate(meta),
      "test": np.arange(len(test.labels)),
    },
    labels=train.labels,
    true_labels=train.labels,
    test_labels=test.labels,
    num_classes=train.num_classes,
  )
  return splits if trusted is None else examples_lib.with_meta(splits, trusted)


def _check_meta(source: sources.Source, sizes: list[int], num_meta: int) -> None:
  rarest = int(np.argmin(sizes))
  class_ = sources.class_of(source, rarest)
  where = f"{class_} has {sizes[rarest]} images in {source.name} {source.split}"
  if not sizes[rarest]:
    raise base.InputError(f"{where}: a long tail needs images of every class")
  if sizes[rarest] <= num_meta:
    raise base.InputError(
      f"{where}, and {num_meta} meta images leave none to train on: lower"
      " num_meta_per_class"
    )
