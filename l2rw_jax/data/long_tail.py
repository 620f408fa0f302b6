"""Floor 4: training sets whose classes are of very different sizes.

Class 0 is the largest and the order of the classes is that of their numbers, as
in the programs of both papers. All labels are right. Test stays as its makers
published it.
"""

import math

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources

SHAPES = ("exponential", "step")
BUILDERS = ("ldam", "mwn")
# So that 5000 / 100 is 50 however the power is rounded.
_ROUNDING = 1e-6


def class_sizes(
  shape: str, num_most: int, num_classes: int, imbalance: float
) -> np.ndarray:
  """How many images each class keeps.

  "exponential": floor(n_0 imbalance^(-c / (C - 1))), c = 0 .. C - 1. "step": the
  first half of the classes (rounded down) n_0, the others floor(n_0 / imbalance).

  Args:
    shape: one of `SHAPES`.
    num_most: n_0, of class 0.
    num_classes: C, at least 2.
    imbalance: n_0 / n_{C-1}, at least 1; the released codes ask for its inverse.

  Returns:
    Sizes, int [C]; the last may be 0.

  Raises:
    InputError: an unknown shape, `imbalance` less than 1, or less than 2 classes.

  References:
    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR
    2019; the step with half of the classes after Buda et al., "A systematic study
    of the class imbalance problem in convolutional neural networks", 2018.

  >>> print(class_sizes("exponential", 5000, 10, 100.))
  [5000 2997 1796 1077  645  387  232  139   83   50]
  """
  if shape not in SHAPES:
    raise base.InputError(f"shape must be one of {SHAPES}; got {shape!r}")
  if not 1 <= imbalance < math.inf:
    raise base.InputError(f"imbalance must be a number of at least 1; got {imbalance}")
  if num_classes < 2:
    raise base.InputError(f"num_classes must be at least 2; got {num_classes}")
  classes = np.arange(num_classes)
  if shape == "exponential":
    shares = imbalance ** -(classes / (num_classes - 1))
  else:
    shares = np.where(classes < num_classes // 2, 1.0, 1 / imbalance)
  return np.floor(num_most * shares + _ROUNDING).astype(int)


def check_sizes(sizes: np.ndarray, imbalance: float) -> None:
  """Raises InputError when the tail has lost a class altogether.

  Args:
    sizes: of `class_sizes`, [C].
    imbalance: that made them.
  """
  if sizes.min() < 1:
    raise base.InputError(
      f"imbalance={imbalance} leaves no image of class {np.argmin(sizes > 0)}: class 0"
      f" has {sizes[0]}; use imbalance={sizes[0]} or less"
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
) -> examples_lib.Splits:
  """A long-tailed training set and a small class-balanced meta set, disjoint.

  n_0, the size of class 0, is the number of images that the *rarest* class of
  `train` has, so that every class can be cut to its size; CIFAR's classes are all
  of one size, MNIST's are not (5,421 of its fives). The two builders differ in it:

    mwn     the meta images are taken out first: n_0 is what is left of the rarest
            class (4,990 on CIFAR-10 with 10 meta images a class), as released by
            Meta-Weight-Net;
    ldam    n_0 is the number of its images (5,000 on CIFAR-10), as released by
            LDAM, which has no meta set. A meta set is drawn from what the tail
            leaves over. A class that leaves too little (class 0 always) gives the
            missing images up from train: with 10 meta images a class, 4,990 of
            class 0 stay and every other class keeps its size and its images.

  Every class is shuffled by the seed; train is its beginning, meta its end. So
  neither another imbalance nor another shape changes the meta set, and a larger
  training set holds the smaller.

  Args:
    train: the split to draw train and meta from.
    test: the split that is used whole as test.
    builder: one of `BUILDERS`.
    shape: one of `SHAPES`.
    imbalance: images of the first class over those of the last, at least 1.
    num_meta_per_class: meta images of every class; 0 for none.
    seed: of the draws, at least 0. The released codes draw with one fixed seed.

  Returns:
    The parts; validation is empty.

  Raises:
    InputError: an argument out of range, or a class with nothing left of it.

  References:
    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin
    Loss", NeurIPS 2019; Shu et al., "Meta-Weight-Net", NeurIPS 2019.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(num_meta_per_class=num_meta_per_class)
  if builder not in BUILDERS:
    raise base.InputError(f"builder must be one of {BUILDERS}; got {builder!r}")
  (rng,) = examples_lib.generators(seed, 1)
  pools = [np.flatnonzero(train.labels == c) for c in range(train.num_classes)]
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
  return examples_lib.assemble(
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


def _check_meta(source: sources.Source, sizes: list[int], num_meta: int) -> None:
  rarest = int(np.argmin(sizes))
  has = f"class {rarest} has {sizes[rarest]} images in {source.name} {source.split}"
  if not sizes[rarest]:
    raise base.InputError(f"{has}: a long tail needs images of every class")
  if sizes[rarest] <= num_meta:
    raise base.InputError(
      f"{has}; {num_meta} meta images of it leave none to train on: lower"
      " num_meta_per_class"
    )
