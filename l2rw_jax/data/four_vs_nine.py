"""Imbalanced MNIST: fours against nines.

The meta set and the training set are drawn from one source split, and the test set is
drawn from another. The same seed always draws the same images.
"""

import math

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import sources


def four_vs_nine(
  train: sources.Source,
  test: sources.Source,
  *,
  majority: float,
  seed: int,
  num_train: int = 5000,
  num_meta: int = 10,
  include_meta: bool = False,
  num_test: int | None = None,
) -> examples_lib.Splits:
  """Fours (label 0, the minority) against nines (label 1), with a balanced test set.

  As in the authors' program, floor(num_train (1 - majority)) fours and
  floor(num_train majority) nines are drawn. Both numbers are computed in floating
  point, so that for a majority of 0.9 their sum is one less than `num_train`. The meta
  set is then chosen from these images, half of it fours and half nines.

  Args:
    train: the source of the training and meta sets.
    test: the source of the test set.
    majority: share of nines, in (0, 1). The paper uses 0.9, 0.95, 0.98, 0.99 and
      0.995.
    seed: seed of all draws, at least 0.
    num_train: number of images drawn for the training and meta sets together.
    num_meta: size of the meta set, even.
    include_meta: whether the meta images stay in the training set. The authors'
      baselines have no meta set and train on all images; this option reproduces that.
    num_test: size of the test set, even (the authors use 500). None takes all images
      of the rarer digit and the same number of images of the other.

  Returns:
    The splits; the validation set is empty.

  Raises:
    InputError: an argument is out of range, the sources do not match or have too few
      images, or a class has no image left to train on.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, MNIST data imbalance experiments.
  """
  examples_lib.check_sources(train, test)
  if not 0 < majority < 1:
    raise base.InputError(f"majority must lie between 0 and 1; got {majority}")
  examples_lib.check_sizes(
    num_train=num_train, num_meta=num_meta, num_test=num_test or 0
  )
  _check_even(num_meta=num_meta, num_test=num_test or 0)
  rng, test_rng = examples_lib.generators(seed, 2)
  num_removed = 0 if include_meta else num_meta // 2
  min_size = max(num_removed + 1, num_meta // 2)
  digits = _draw_digits(train, majority, num_train, min_size, rng)
  labels = (train.labels == 9).astype(np.int32)
  return examples_lib.assemble(
    train,
    test,
    {
      "train": np.concatenate([rows[num_removed:] for rows in digits]),
      "meta": np.concatenate([rows[: num_meta // 2] for rows in digits]),
      "test": _balanced_test(test, num_test, test_rng),
    },
    labels=labels,
    true_labels=labels,
    test_labels=(test.labels == 9).astype(np.int32),
    num_classes=2,
    meta_in_train=include_meta,
  )


def _draw_digits(
  train: sources.Source,
  majority: float,
  num_train: int,
  min_size: int,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Rows of the fours and rows of the nines, at least `min_size` of each."""
  # Products with NumPy scalars in half precision would overflow.
  majority = float(majority)
  sizes = [math.floor(num_train * (1 - majority)), math.floor(num_train * majority)]
  request = (
    f"num_train={num_train} at majority={majority} needs {sizes[0]} fours and"
    f" {sizes[1]} nines"
  )
  pools = [np.flatnonzero(train.labels == digit) for digit in (4, 9)]
  fours, nines = (len(pool) for pool in pools)
  if sizes[0] > fours or sizes[1] > nines:
    most = int(min(fours / (1 - majority), nines / majority))
    raise base.InputError(
      f"{request}; {train.name} {train.split} has {fours} and {nines}."
      f" Use num_train={most} or less, or a larger data set"
    )
  if min(sizes) < min_size:
    raise base.InputError(
      f"nothing is left to train on: {request}, but the meta and training sets need at"
      f" least {min_size} of each; raise num_train, lower num_meta, or move majority"
      " toward 0.5"
    )
  return [rng.permutation(pool)[:size] for pool, size in zip(pools, sizes, strict=True)]


def _balanced_test(
  test: sources.Source, num_test: int | None, rng: np.random.Generator
) -> np.ndarray:
  pools = [np.flatnonzero(test.labels == digit) for digit in (4, 9)]
  most = min(len(pool) for pool in pools)
  if not most:
    raise base.InputError(
      f"the test set needs fours and nines; {test.name} {test.split} has"
      f" {len(pools[0])} and {len(pools[1])}. Use another data set"
    )
  half = most if num_test is None else num_test // 2
  if not 0 < half <= most:
    raise base.InputError(
      f"num_test={num_test} needs {half} fours and {half} nines; {test.name}"
      f" {test.split} has {len(pools[0])} and {len(pools[1])}. Use an even num_test"
      f" from 2 to {2 * most}, or another data set"
    )
  return np.concatenate([rng.choice(pool, half, replace=False) for pool in pools])


def _check_even(**sizes: int) -> None:
  for name, size in sizes.items():
    if size % 2:
      raise base.InputError(
        f"{name} must be even, half of it for each digit; got {size}"
      )
