"""Data condensation: a training set reduced to the examples of highest weight."""

import numpy as np

from l2rw_jax.data import examples as examples_lib


def condensed(
  splits: examples_lib.Splits,
  last_weight: np.ndarray,
  percent: int,
  kept: str,
  seed: int,
) -> examples_lib.Splits:
  """The problem with a part of its training set.

  Args:
    splits: the whole.
    last_weight: the weight each training example had last, [N]; NaN, of one never
      seen, counts as the uniform 1 it began with. Ties are broken at random.
    percent: how much to keep.
    kept: "top" by weight, or "random".
    seed: of the draw.
  """
  rng = np.random.default_rng([seed, percent])
  order = rng.permutation(len(last_weight))
  if kept == "top":
    weights = np.nan_to_num(last_weight, nan=1.0)
    order = order[np.argsort(-weights[order], kind="stable")]
  return examples_lib.keep_train(splits, order[: num_kept(len(order), percent)])


def num_kept(size: int, percent: int) -> int:
  """How many of `size` examples are `percent` of them."""
  return round(size * percent / 100)
