"""Floor 4: the splits of the papers, wrong on purpose.

Every builder draws train, meta and validation from one source split and test
from another, is a function of its seed alone, and says by `Splits.fingerprint`
exactly which examples and labels came out.
"""

import math

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noise_builders
from l2rw_jax.data import sources

# Named here too, for callers see no other file of splits.
Examples = examples_lib.Examples
Splits = examples_lib.Splits
class_counts = examples_lib.class_counts
BUILDERS = noise_builders.BUILDERS
ANNOTATIONS = tuple(noise_builders.ANNOTATIONS)


def four_versus_nine(
  train: sources.Source,
  test: sources.Source,
  *,
  majority: float,
  seed: int,
  num_train: int = 5000,
  num_meta: int = 10,
  include_meta: bool = False,
  num_test: int | None = None,
) -> Splits:
  """Fours (label 0, minority) against nines (label 1), out of proportion.

  As in the authors' program, floor(num_train (1 - majority)) fours and
  floor(num_train majority) nines are drawn, in floating point: one image less
  than `num_train` at 0.9. Half of the meta set is then taken out of either.
  Test is balanced.

  Args:
    train: the split to draw train and meta from.
    test: the split to draw test from.
    majority: share of nines, in (0, 1); the paper's are 0.9, 0.95, 0.98, 0.99
      and 0.995.
    seed: of all draws, at least 0.
    num_train: images drawn for train and meta together.
    num_meta: size of the meta set, even.
    include_meta: leaves the meta images in train too. The authors' baselines
      have no meta set and so train on all images; this gives them the same ones.
    num_test: size of test, even (the authors take 500); None for all images of
      the rarer digit and as many of the other.

  Returns:
    The parts; validation is empty.

  Raises:
    InputError: an argument out of range, more images asked for than there are,
      or nothing left of a class to train on.

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
  kept = 0 if include_meta else num_meta // 2
  drawn = _draw_digits(train, majority, num_train, max(kept + 1, num_meta // 2), rng)
  labels = (train.labels == 9).astype(np.int32)
  return examples_lib.assemble(
    train,
    test,
    {
      "train": np.concatenate([rows[kept:] for rows in drawn]),
      "meta": np.concatenate([rows[: num_meta // 2] for rows in drawn]),
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
  least: int,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Rows of the fours and of the nines, `least` or more of either."""
  sizes = [math.floor(num_train * (1 - majority)), math.floor(num_train * majority)]
  asked = (
    f"num_train={num_train} at majority={majority} draws {sizes[0]} fours and"
    f" {sizes[1]} nines"
  )
  pools = [np.flatnonzero(train.labels == digit) for digit in (4, 9)]
  fours, nines = (len(pool) for pool in pools)
  if sizes[0] > fours or sizes[1] > nines:
    most = int(min(fours / (1 - majority), nines / majority))
    raise base.InputError(
      f"{asked}; {train.name} {train.split} has {fours} and {nines}."
      f" Use num_train={most} or less, or a larger data set"
    )
  if min(sizes) < least:
    raise base.InputError(
      f"nothing is left to train on: {asked}, and at least {least} of each are"
      " needed to fill the meta set and train; raise num_train or lower num_meta"
      " or majority"
    )
  return [rng.permutation(pool)[:size] for pool, size in zip(pools, sizes, strict=True)]


def _balanced_test(
  test: sources.Source, num_test: int | None, rng: np.random.Generator
) -> np.ndarray:
  pools = [np.flatnonzero(test.labels == digit) for digit in (4, 9)]
  most = min(len(pool) for pool in pools)
  half = most if num_test is None else num_test // 2
  if not 0 < half <= most:
    raise base.InputError(
      f"num_test={num_test} needs {half} fours and {half} nines; {test.name}"
      f" {test.split} has {len(pools[0])} and {len(pools[1])}. Use an even num_test"
      f" from 2 to {2 * most}, or another data set"
    )
  return np.concatenate([rng.choice(pool, half, replace=False) for pool in pools])


def noisy_labels(
  train: sources.Source,
  test: sources.Source,
  *,
  builder: str,
  fraction: float | None = None,
  num_meta_per_class: int,
  num_validation: int = 0,
  seed: int,
  variant: str = "paper",
  annotation: str | None = None,
) -> Splits:
  """Flipped labels in train and validation, none in meta and test.

  First the meta set is drawn, the same number of every class; then, from the
  rest, validation; what remains is train: disjoint for every seed, where several
  released programs leak the meta set into train. Train and validation are
  corrupted each by itself, so that the number of flips is exact in both where the
  builder's is, with one shared background class or transition matrix. The draws
  do not depend on one another: neither another fraction nor another validation
  size changes the meta set.

  Args:
    train: the split to draw train, meta and validation from; N images.
    test: the split that is used whole as test.
    builder: one of `BUILDERS`; `l2rw_jax.data.noise_builders` tells what they do.
    fraction: the builder's parameter, in [0, 1]; what it truly flips differs
      between builders. None for `human`.
    num_meta_per_class: meta images of every class.
    num_validation: validation images.
    seed: of all draws, at least 0.
    variant: of the builder, `"paper"` or `"official_code"`; the `bare_` builders,
      `mwn_uniform` and `human` have but one.
    annotation: of the builder `human`, one of `ANNOTATIONS`.

  Returns:
    The parts.

  Raises:
    InputError: an argument out of range, a builder that does not fit the data
      set, too few images of a class, or nothing left to train on.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, CIFAR noisy label experiments. The
    authors' program draws its meta set at random, unbalanced.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(
    num_meta_per_class=num_meta_per_class, num_validation=num_validation
  )
  meta_rng, rows_rng, shared_rng, *noise_rngs = examples_lib.generators(seed, 5)
  request = noise_builders.Request(train, fraction, variant, annotation, shared_rng)
  flip = noise_builders.flip(builder, request)
  meta = _per_class(train, num_meta_per_class, meta_rng)
  rest = np.setdiff1d(np.arange(len(train.labels)), meta)
  if len(rest) <= num_validation:
    raise base.InputError(
      f"nothing is left to train on: {train.name} {train.split} has"
      f" {len(train.labels)} images, num_meta_per_class={num_meta_per_class} takes"
      f" {len(meta)} and num_validation={num_validation}; lower one of them"
    )
  rest = rows_rng.permutation(rest)
  rows = {"train": rest[num_validation:], "validation": rest[:num_validation]}
  labels = train.labels.copy()
  for part, rng in zip(rows.values(), noise_rngs, strict=True):
    labels[part] = flip(part, rng)
  return examples_lib.assemble(
    train,
    test,
    {**rows, "meta": meta, "test": np.arange(len(test.labels))},
    labels=labels,
    true_labels=train.labels,
    test_labels=test.labels,
    num_classes=train.num_classes,
  )


def _per_class(
  source: sources.Source, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Rows of `size` random images of every class, int [C size]."""
  drawn = [np.zeros(0, np.int64)]
  for label in range(source.num_classes):
    pool = np.flatnonzero(source.labels == label)
    if len(pool) < size:
      raise base.InputError(
        f"class {label} has {len(pool)} images in {source.name} {source.split};"
        f" the meta set needs {size}: lower num_meta_per_class"
      )
    drawn.append(rng.choice(pool, size, replace=False))
  return np.concatenate(drawn)


def _check_even(**sizes: int) -> None:
  for name, size in sizes.items():
    if size % 2:
      raise base.InputError(
        f"{name} must be even, half of it for either digit; got {size}"
      )
