"""Floor 1: label noise, added once on the host before training.

"40% noise" means different things in different papers and programs: name the
builder and its variant beside every number. N labels, C classes.
"""

from typing import Any

import numpy as np

from l2rw_jax import base

VARIANTS = ("paper", "official_code")


def uniform_flip(
  labels: Any,
  *,
  fraction: float,
  num_classes: int,
  rng: np.random.Generator,
  variant: str = "paper",
) -> np.ndarray:
  """Labels of which round(fraction N), chosen at random, are drawn anew.

  Variants, with the share of labels that is truly wrong afterwards:

  * `"paper"`: "any class may flip to any other"; the new label is uniform over
    the C - 1 *other* classes. Truly wrong: `fraction`, exactly.
  * `"official_code"`: the new label is floor(U(0, C - 1)), uniform over
    0 .. C - 2; the last class is never drawn and the true one may be. Truly
    wrong in expectation, with p_c the share of class c: fraction
    (1 - (1 - p_{C-1}) / (C - 1)), which is fraction (1 - 1/C) for balanced
    classes: 0.36, not 0.40, of CIFAR-10.

  Args:
    labels: integers in 0 .. C - 1, shape [N]; not modified.
    fraction: share of the examples to relabel, in [0, 1].
    num_classes: C, at least 2.
    rng: source of all randomness.
    variant: one of `VARIANTS`.

  Returns:
    Noisy labels, int32 [N].

  Raises:
    InputError: an argument is out of range; the message names it.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, "UniformFlip" in the CIFAR noisy label
    experiments.
  """
  noisy = check_labels("labels", labels, num_classes)
  _check_variant(variant, num_classes)
  chosen = _choose(len(noisy), fraction, rng)
  if variant == "paper":
    shift = rng.integers(1, num_classes, size=len(chosen))
    noisy[chosen] = (noisy[chosen] + shift) % num_classes
  else:
    noisy[chosen] = rng.integers(0, num_classes - 1, size=len(chosen))
  return noisy


def background_flip(
  labels: Any,
  *,
  fraction: float,
  num_classes: int,
  rng: np.random.Generator,
  background: int | None = None,
  variant: str = "paper",
) -> np.ndarray:
  """Labels of which round(fraction N), chosen at random, become one class.

  Noise and imbalance at once. Examples of the background class itself are
  chosen like any other and stay right, so that the truly wrong share is
  fraction (1 - p_b) in expectation, with p_b the share of the background class:
  fraction (1 - 1/C) for balanced classes. The variants differ only in which
  background `draw_background` may draw.

  Args:
    labels: integers in 0 .. C - 1, shape [N]; not modified.
    fraction: share of the examples to relabel, in [0, 1].
    num_classes: C, at least 2.
    rng: source of all randomness.
    background: the class that takes the flipped labels; drawn once when None.
    variant: one of `VARIANTS`.

  Returns:
    Noisy labels, int32 [N].

  Raises:
    InputError: an argument is out of range; the message names it.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, "BackgroundFlip" in the CIFAR noisy
    label experiments.
  """
  noisy = check_labels("labels", labels, num_classes)
  _check_variant(variant, num_classes)
  if background is None:
    background = draw_background(num_classes, rng=rng, variant=variant)
  if not 0 <= background < num_classes:
    raise base.InputError(
      f"background must be a class from 0 to {num_classes - 1}; got {background}"
    )
  noisy[_choose(len(noisy), fraction, rng)] = background
  return noisy


def draw_background(
  num_classes: int, *, rng: np.random.Generator, variant: str = "paper"
) -> int:
  """A background class for several calls of `background_flip` to share.

  Args:
    num_classes: C, at least 2.
    rng: source of all randomness.
    variant: `"paper"` draws from all C classes, `"official_code"` never the
      last: floor(U(0, C - 1)).

  Returns:
    A class.

  Raises:
    InputError: an unknown variant, or fewer than 2 classes.
  """
  _check_variant(variant, num_classes)
  return int(rng.integers(0, num_classes - (variant == "official_code")))


def check_labels(what: str, labels: Any, num_classes: int) -> np.ndarray:
  """A copy of `labels` as int32 [N], once they are seen to be classes.

  Args:
    what: how the message calls the labels.
    labels: integers, shape [N].
    num_classes: C; every label must lie in 0 .. C - 1.

  Returns:
    The labels, int32 [N].

  Raises:
    InputError: wrong rank or type, or a label out of range.
  """
  array = np.asarray(labels)
  if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
    raise base.InputError(
      f"{what} must be integers of shape [N]; got {array.dtype} of shape {array.shape}"
    )
  wrong = np.flatnonzero((array < 0) | (array >= num_classes))
  if len(wrong):
    raise base.InputError(
      f"{what} must lie in 0 .. {num_classes - 1} (num_classes={num_classes});"
      f" {len(wrong)} do not, the first is {array[wrong[0]]} at index {wrong[0]}"
    )
  return array.astype(np.int32)


def _check_variant(variant: str, num_classes: int) -> None:
  if variant not in VARIANTS:
    raise base.InputError(f"variant must be one of {VARIANTS}; got {variant!r}")
  if num_classes < 2:
    raise base.InputError(
      f"num_classes must be at least 2 to flip labels; got {num_classes}"
    )


def _choose(size: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
  if not 0 <= fraction <= 1:
    raise base.InputError(
      f"fraction must lie in [0, 1] (0.4 flips 40% of the labels); got {fraction}"
    )
  return rng.choice(size, size=round(fraction * size), replace=False)
