"""Label noise, added once on the host before training.

"40% noise" means different things in different papers and programs: report the kind
of noise and its variant with every number. N is the number of labels, and C is the
number of classes.

There are two families. `uniform_flip` and `background_flip` relabel an exact number
of examples. The functions whose names end in `_matrix` make a row-stochastic transition
matrix T [C, C], from which `resample` draws every label, P(new = j | true = i) =
T[i, j]. With `resample`, the number of wrong labels varies slightly with the seed.
"""

from collections.abc import Mapping
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
  """Replaces round(fraction N) randomly chosen labels with random labels.

  The variants differ in the resulting share of wrong labels:

  * `"paper"`: the new label is uniform over the C - 1 *other* classes. The share of
    wrong labels is round(fraction N) / N.
  * `"official_code"`: the new label is floor(U(0, C - 1)), which is uniform over
    0 .. C - 2: the last class is never drawn, and the true class may be drawn. The
    expected share of wrong labels is fraction (1 - (1 - p_{C-1}) / (C - 1)), where p_c
    is the share of class c. For balanced classes this is fraction (1 - 1/C): for a
    fraction of 0.4 and CIFAR-10, it is 0.36.

  Args:
    labels: integers in 0 .. C - 1, shape [N]; not modified.
    fraction: share of the examples to relabel, in [0, 1].
    num_classes: C, at least 2.
    rng: random number generator.
    variant: one of `VARIANTS`.

  Returns:
    Noisy labels, int32 [N].

  Raises:
    InputError: an argument is out of range, `labels` are not integers [N], or the
      variant is unknown.

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
  """Replaces round(fraction N) randomly chosen labels with one background class.

  This is noise and imbalance at the same time. Examples of the background class are
  chosen like all others and keep their label, so that the expected share of wrong
  labels is fraction (1 - p_b), with p_b the share of the background class. For
  balanced classes this is fraction (1 - 1/C). The variants differ only in the
  classes that `draw_background` may draw.

  Args:
    labels: integers in 0 .. C - 1, shape [N]; not modified.
    fraction: share of the examples to relabel, in [0, 1].
    num_classes: C, at least 2.
    rng: random number generator.
    background: the background class; None draws one.
    variant: one of `VARIANTS`.

  Returns:
    Noisy labels, int32 [N].

  Raises:
    InputError: an argument is out of range, `labels` are not integers [N], or the
      variant is unknown.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, "BackgroundFlip" in the CIFAR noisy
    label experiments.
  """
  noisy = check_labels("labels", labels, num_classes)
  _check_variant(variant, num_classes)
  if background is None:
    background = draw_background(num_classes, rng=rng, variant=variant)
  if background not in range(num_classes):
    raise base.InputError(
      f"background must be a class from 0 to {num_classes - 1}; got {background}"
    )
  noisy[_choose(len(noisy), fraction, rng)] = background
  return noisy


def draw_background(
  num_classes: int, *, rng: np.random.Generator, variant: str = "paper"
) -> int:
  """Draws a background class, which can be used in several calls of `background_flip`.

  Args:
    num_classes: C, at least 2.
    rng: random number generator.
    variant: `"paper"` draws from all C classes, `"official_code"` from all but the
      last one: floor(U(0, C - 1)).

  Returns:
    A class.

  Raises:
    InputError: the variant is unknown, or there are fewer than 2 classes.
  """
  _check_variant(variant, num_classes)
  return int(rng.integers(0, num_classes - (variant == "official_code")))


def symmetric_matrix(num_classes: int, rate: float) -> np.ndarray:
  """A transition matrix with 1 - rate on its diagonal and rate / (C - 1) elsewhere.

  The expected share of wrong labels is `rate`.

  Args:
    num_classes: C, at least 2.
    rate: probability of a wrong label, in [0, 1].

  Returns:
    T, float64 [C, C].

  Raises:
    InputError: an argument is out of range.

  References:
    Patel, Sastry, "Adaptive Sample Selection for Robust Learning under Label
    Noise" (BARE), WACV 2023: symmetric noise.
  """
  rate = _checked_rate(num_classes, rate)
  matrix = np.full((num_classes, num_classes), rate / (num_classes - 1))
  np.fill_diagonal(matrix, 1 - rate)
  return matrix


def uniform_matrix(num_classes: int, rate: float) -> np.ndarray:
  """The transition matrix (1 - rate) I + rate / C.

  Labels are replaced by a class drawn from all classes, including the true one. The
  expected share of wrong labels is rate (1 - 1/C): 0.36 for rate 0.4 and 10 classes.

  Args:
    num_classes: C, at least 2.
    rate: probability that a label is replaced, in [0, 1].

  Returns:
    T, float64 [C, C].

  Raises:
    InputError: an argument is out of range.

  References:
    Shu et al., "Meta-Weight-Net" (NeurIPS 2019), released code: uniform noise.
  """
  rate = _checked_rate(num_classes, rate)
  return (1 - rate) * np.eye(num_classes) + rate / num_classes


def pair_matrix(num_classes: int, rate: float, pairs: Mapping[int, int]) -> np.ndarray:
  """A transition matrix that confuses some classes with one other class each.

  The expected share of wrong labels is rate times the share of the classes in
  `pairs`.

  Args:
    num_classes: C, at least 2.
    rate: probability of a wrong label in these classes, in [0, 1].
    pairs: maps a true class to the class with which it is confused. Other classes keep
      their labels.

  Returns:
    T, float64 [C, C].

  Raises:
    InputError: an argument is out of range.

  References:
    Patel, Sastry, "Adaptive Sample Selection for Robust Learning under Label
    Noise" (BARE), WACV 2023: class-conditional noise.
  """
  rate = _checked_rate(num_classes, rate)
  matrix = np.eye(num_classes)
  for true, wrong in pairs.items():
    if true == wrong or not {true, wrong} <= set(range(num_classes)):
      raise base.InputError(
        f"pairs must map a class to another class, from 0 to {num_classes - 1};"
        f" got {true}: {wrong}"
      )
    # 1.0 is equal to a class, but it is not an index.
    matrix[int(true), int(true)] -= rate
    matrix[int(true), int(wrong)] += rate
  return matrix


def flip_matrix(
  num_classes: int,
  rate: float,
  *,
  num_targets: int,
  rng: np.random.Generator | np.random.RandomState,
) -> np.ndarray:
  """A transition matrix that confuses each class with a few random other classes.

  The expected share of wrong labels is `rate`, divided equally among the targets. If
  the rate is 1/2 or more (2/3 or more with two targets), the true label is not the most
  frequent label of a class.

  Args:
    num_classes: C, more than `num_targets`.
    rate: probability of a wrong label, in [0, 1].
    num_targets: number of targets of each class. 1 is "flip" in Meta-Weight-Net's code;
      2 is "flip2", which the tables of the paper use.
    rng: random number generator, which draws the targets of each class in order.

  Returns:
    T, float64 [C, C].

  Raises:
    InputError: an argument is out of range.

  References:
    Shu et al., "Meta-Weight-Net" (NeurIPS 2019), released code: flip noise.
  """
  rate = _checked_rate(num_classes, rate)
  base.check_integer("num_targets", num_targets)
  if num_targets >= num_classes:
    raise base.InputError(
      f"num_targets must be between 1 and num_classes - 1 = {num_classes - 1}; got"
      f" {num_targets}"
    )
  matrix = np.eye(num_classes) * (1 - rate)
  for true in range(num_classes):
    others = np.delete(np.arange(num_classes), true)
    # For one target, the released code draws with replacement.
    targets = rng.choice(others, num_targets, replace=num_targets == 1)
    matrix[true, targets] = rate / num_targets
  return matrix


def resample(
  labels: Any, matrix: np.ndarray, *, rng: np.random.Generator
) -> np.ndarray:
  """Draws a new label for every label y from the row T[y], independently.

  Args:
    labels: integers in 0 .. C - 1, shape [N]; not modified.
    matrix: T [C, C], rows non-negative with sum 1, up to rounding in float32.
    rng: random number generator.

  Returns:
    Noisy labels, int32 [N].

  Raises:
    InputError: `labels` are not integers [N] or are out of range, or T is masked or is
      not row-stochastic.
  """
  base.refuse_mask("matrix", matrix)
  matrix = np.asarray(matrix, np.float64)
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
    raise base.InputError(f"matrix must have shape [C, C]; got {matrix.shape}")
  wrong = ~((matrix >= 0).all(1) & (abs(matrix.sum(1) - 1) < 1e-5))
  if wrong.any():
    raise base.InputError(
      f"matrix must have non-negative rows with sum 1; row {np.argmax(wrong)} is"
      f" {matrix[np.argmax(wrong)].tolist()}"
    )
  true = check_labels("labels", labels, len(matrix))
  noisy = true.copy()
  groups = base.rows_by_class(true, np.arange(len(matrix)))
  for members, row in zip(groups, matrix, strict=True):
    noisy[members] = rng.choice(len(row), size=len(members), p=row / row.sum())
  return noisy


def check_labels(what: str, labels: Any, num_classes: int) -> np.ndarray:
  """Copies `labels` to int32 [N], and checks that they are classes.

  Args:
    what: name of the labels in the message.
    labels: integers, shape [N].
    num_classes: C; every label must lie in 0 .. C - 1.

  Returns:
    The labels, int32 [N].

  Raises:
    InputError: the rank or the type is wrong, a label is out of range, `num_classes` is
      not an integer, or the labels are a masked array.
  """
  num_classes = base.check_integer("num_classes", num_classes, 0)
  base.refuse_mask(what, labels)
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
  base.check_integer("num_classes", num_classes, 2)


def _checked_rate(num_classes: int, rate: float) -> float:
  """`rate` as a Python float: a NumPy scalar would determine the type of the matrix."""
  _check_variant(VARIANTS[0], num_classes)
  check_share("rate", rate)
  return float(rate)


def check_share(name: str, share: float) -> None:
  """Raises InputError unless `share`, the argument `name`, lies in [0, 1]."""
  if not 0 <= share <= 1:
    raise base.InputError(f"{name} must lie in [0, 1], such as 0.4; got {share}")


def _choose(size: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
  check_share("fraction", fraction)
  # A product with a NumPy scalar in half precision would overflow.
  return rng.choice(size, size=round(float(fraction) * size), replace=False)
