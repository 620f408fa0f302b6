"""Training sets that are unfair to some groups, with fair exemplars.

A training set can have a long tail of classes, an attribute that few images have, or
both, and also wrong labels. The meta set (the exemplars) has the same number of
examples of every group. The test set consists of all images of another source. Both
have true labels.

None of the image data sets used here has a protected attribute, so one is
constructed: some images are photographically *inverted* (1 - x). There are no
published results for this construction.
"""

from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import label_noise
from l2rw_jax.data import long_tail
from l2rw_jax.data import sources

GROUPS = ("class", "inverted")


def fairness(
  train: sources.Source,
  test: sources.Source,
  *,
  groups: str,
  imbalance: float = 1.0,
  noise_fraction: float = 0.0,
  minority_share: float = 0.05,
  num_exemplars: int = 10,
  seed: int,
) -> examples_lib.Splits:
  """A training set with a long tail, a rare attribute or noise, and fair exemplars.

  First the exemplars are drawn. Then a long tail is drawn from the other images: class
  0 keeps as many images as the rarest class has left, and the last class keeps that
  number divided by `imbalance`. If the groups are "inverted", `minority_share` of the
  training images of every class (rounded, at least one), half of the exemplars and half
  of the test images of every class are inverted. Finally training labels are flipped.
  `minority_share` and `noise_fraction` do not affect which images are drawn.

  Args:
    train: the source of the training set and the exemplars; N images.
    test: the source whose images are all used as the test set.
    groups: the meaning of `Examples.group`: "class" (the true class) or "inverted"
      (1 if the image is inverted, and 0 otherwise).
    imbalance: number of images of the first class divided by that of the last.
    noise_fraction: share of training labels that are flipped to another class.
    minority_share: share of inverted training images, in (0, 1); not used if
      `groups` is "class".
    num_exemplars: number of exemplars of each class. If `groups` is "inverted", each
      class has this many inverted exemplars and as many others.
    seed: seed of all draws, at least 0.

  Returns:
    The splits; the validation set is empty.

  Raises:
    InputError: an argument is out of range, the sources do not match, a class has too
      few images, or no image of a class is left to train on.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(num_exemplars=num_exemplars)
  _check(groups, minority_share)
  meta_rng, tail_rng, group_rng, test_rng, noise_rng = examples_lib.generators(seed, 5)
  num_attributes = 1 if groups == "class" else 2
  drawn = _per_class(train, num_attributes * num_exemplars, meta_rng)
  meta = np.concatenate(drawn)
  rows_of_classes = _draw_tail(train, meta, imbalance, tail_rng)
  rows = np.concatenate(rows_of_classes)
  labels = train.labels.copy()
  labels[rows] = label_noise.uniform_flip(
    train.labels[rows],
    fraction=noise_fraction,
    num_classes=train.num_classes,
    rng=noise_rng,
  )
  group_options: dict[str, Any] = {}
  test_labels, true_labels = test.labels, train.labels
  if groups == "inverted":
    minority = [max(1, round(float(minority_share) * len(r))) for r in rows_of_classes]
    chosen = [
      group_rng.choice(r, n, replace=False)
      for r, n in zip(rows_of_classes, minority, strict=True)
    ]
    exemplars = [r[num_exemplars:] for r in drawn]
    train, group_options["groups"] = _invert(train, np.concatenate(chosen + exemplars))
    test, group_options["test_groups"] = _invert(
      test, _half_of_each_class(test, test_rng)
    )
  return examples_lib.assemble(
    train,
    test,
    {"train": rows, "meta": meta, "test": np.arange(len(test_labels))},
    labels=labels,
    true_labels=true_labels,
    test_labels=test_labels,
    num_classes=train.num_classes,
    **group_options,
  )


def _check(groups: str, minority_share: float) -> None:
  if groups not in GROUPS:
    raise base.InputError(f"groups must be one of {GROUPS}; got {groups!r}")
  if groups == "inverted" and not 0 < minority_share < 1:
    raise base.InputError(
      f"minority_share must lie between 0 and 1; got {minority_share}"
    )


def _per_class(
  source: sources.Source, size: int, rng: np.random.Generator
) -> list[np.ndarray]:
  drawn = []
  pools = base.rows_by_class(source.labels, np.arange(source.num_classes))
  for label, pool in enumerate(pools):
    class_ = sources.class_of(source, label)
    where = f"{class_} has {len(pool)} images in {source.name} {source.split}"
    if not len(pool):
      raise base.InputError(f"{where}: give a source with images of every class")
    if len(pool) <= size:
      raise base.InputError(
        f"{where}, and {size} exemplars of it leave none to train on: lower"
        " num_exemplars"
      )
    drawn.append(rng.choice(pool, size, replace=False))
  return drawn


def _draw_tail(
  source: sources.Source,
  meta: np.ndarray,
  imbalance: float,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  left = np.setdiff1d(np.arange(len(source.labels)), meta)
  members = base.rows_by_class(source.labels[left], np.arange(source.num_classes))
  pools = [left[rows] for rows in members]
  most = min(len(pool) for pool in pools)
  sizes = long_tail.class_sizes("exponential", most, source.num_classes, imbalance)
  long_tail.check_sizes(sizes, imbalance)
  return [rng.permutation(p)[:n] for p, n in zip(pools, sizes, strict=True)]


def _half_of_each_class(source: sources.Source, rng: np.random.Generator) -> np.ndarray:
  pools = base.rows_by_class(source.labels, np.arange(source.num_classes))
  return np.concatenate([rng.permutation(p)[: len(p) // 2] for p in pools])


def _invert(
  source: sources.Source, rows: np.ndarray
) -> tuple[sources.Source, np.ndarray]:
  """Inverts some rows; returns the renamed source, and 1 for each inverted row, [N]."""
  # `read_rows` copies the images, so that those of the source do not change.
  images = examples_lib.read_rows(source.images, np.arange(len(source.labels)))
  brightest = 255 if images.dtype == np.uint8 else 1
  # Rounding can make pixels that were divided by 255 slightly larger than 1.
  if images.size and not 0 <= images.min() <= images.max() <= 1.001 * brightest:
    raise base.InputError(
      "the groups 'inverted' need pixels from 0 to 255 (uint8) or from 0 to 1;"
      f" {source.name} has numbers from {images.min():g} to {images.max():g}"
    )
  images[rows] = brightest - images[rows]
  inverted = np.zeros(len(images), np.int32)
  inverted[rows] = 1
  name = f"{source.name}+inverted"
  return source._replace(name=name, images=images), inverted
