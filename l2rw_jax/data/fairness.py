"""Floor 4: training sets that are unfair on purpose, and exemplars that are not.

Two ways to be unfair, alone or together, and wrong labels on top: classes in a
long tail, and an attribute that few training images have. The meta set (the
exemplars) and test hold every group in equal parts, with true labels.

No image set that comes with this library has a protected attribute, so one is
made: some images are photographically *inverted* (1 - x). The construction is
ours; no published number belongs to it.
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
  """A long-tailed, noisy or under-represented training set and fair exemplars.

  First the exemplars are drawn, then the tail is cut from what is left: class 0
  keeps as many images as the rarest class has left, the last class that divided
  by `imbalance`. Then, with the attribute, `minority_share` of the training
  images of every class (rounded, at least one) are inverted, half of the
  exemplars and half of the test images of every class. Last, training labels are
  flipped. The draws do not depend on one another: neither another share nor
  another noise changes which images are drawn.

  Args:
    train: the split to draw train and exemplars from; N images.
    test: the split that is used whole as test.
    groups: what `Examples.group` is: "class" (the true class) or "inverted" (1
      where the image is inverted, else 0).
    imbalance: number of images of the first class over that of the last.
    noise_fraction: share of training labels that become another class.
    minority_share: share of inverted training images, in (0, 1); not used with
      groups "class".
    num_exemplars: exemplars of every group: of each class, or of each class with
      each attribute.
    seed: of all draws, at least 0.

  Returns:
    The parts; validation is empty.

  Raises:
    InputError: an argument out of range, too few images of a class, or nothing
      left of one to train on.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(num_exemplars=num_exemplars)
  _check(groups, minority_share)
  meta_rng, tail_rng, group_rng, test_rng, noise_rng = examples_lib.generators(seed, 5)
  copies = 1 if groups == "class" else 2
  drawn = _per_class(train, copies * num_exemplars, meta_rng)
  meta = np.concatenate(drawn)
  kept = _cut_tail(train, meta, imbalance, tail_rng)
  rows = np.concatenate(kept)
  labels = train.labels.copy()
  labels[rows] = label_noise.uniform_flip(
    train.labels[rows],
    fraction=noise_fraction,
    num_classes=train.num_classes,
    rng=noise_rng,
  )
  given: dict[str, Any] = {}
  test_labels, true_labels = test.labels, train.labels
  if groups == "inverted":
    minority = [max(1, round(minority_share * len(r))) for r in kept]
    chosen = [
      group_rng.choice(r, n, replace=False) for r, n in zip(kept, minority, strict=True)
    ]
    half = [r[num_exemplars:] for r in drawn]
    train, given["groups"] = _invert(train, np.concatenate(chosen + half))
    test, given["test_groups"] = _invert(test, _half_of_each_class(test, test_rng))
  return examples_lib.assemble(
    train,
    test,
    {"train": rows, "meta": meta, "test": np.arange(len(test_labels))},
    labels=labels,
    true_labels=true_labels,
    test_labels=test_labels,
    num_classes=train.num_classes,
    **given,
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
  for label in range(source.num_classes):
    pool = np.flatnonzero(source.labels == label)
    if len(pool) <= size:
      raise base.InputError(
        f"class {label} has {len(pool)} images in {source.name} {source.split}; {size}"
        " exemplars of it leave none to train on: lower num_exemplars"
      )
    drawn.append(rng.choice(pool, size, replace=False))
  return drawn


def _cut_tail(
  source: sources.Source,
  meta: np.ndarray,
  imbalance: float,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  left = np.setdiff1d(np.arange(len(source.labels)), meta)
  pools = [left[source.labels[left] == c] for c in range(source.num_classes)]
  most = min(len(pool) for pool in pools)
  sizes = long_tail.class_sizes("exponential", most, source.num_classes, imbalance)
  long_tail.check_sizes(sizes, imbalance)
  return [rng.permutation(p)[:n] for p, n in zip(pools, sizes, strict=True)]


def _half_of_each_class(source: sources.Source, rng: np.random.Generator) -> np.ndarray:
  pools = [np.flatnonzero(source.labels == c) for c in range(source.num_classes)]
  return np.concatenate([rng.permutation(p)[: len(p) // 2] for p in pools])


def _invert(
  source: sources.Source, rows: np.ndarray
) -> tuple[sources.Source, np.ndarray]:
  """The source with some images inverted, renamed, and where: int32 [N]."""
  images = source.images.copy()
  brightest = 255 if images.dtype == np.uint8 else 1
  images[rows] = brightest - images[rows]
  inverted = np.zeros(len(images), np.int32)
  inverted[rows] = 1
  name = f"{source.name}+inverted"
  return source._replace(name=name, images=images), inverted
