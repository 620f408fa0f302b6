"""Susceptibility: how readily a network learns labels that mean nothing.

A network that fits a randomly labeled batch in one step will fit wrong labels too.
The drop of such a batch's loss, averaged over training, is zeta; together with the
accuracy on the training set *as it is labeled* it tells good models from bad ones
without one clean label.

    loss_drop            one batch, one step: jit, vmap, several devices
    running_average      drops to zeta
    regions, selected    zeta and training accuracy of many models to a choice

`training.memorization` measures it beside a run.

Reference: Forouzesh, Sedghi, Thiran, "Leveraging Unlabeled Data to Track
Memorization", ICLR 2023 (https://arxiv.org/abs/2212.04461), and its released code
for what one step is. The measured quantity is the decrease of a loss, not a squared
change of outputs.
"""

from collections.abc import Sequence
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base


class Drop(NamedTuple):
  """Mean losses of a randomly labeled batch, in nats, scalars.

  Attributes:
    before: at the parameters given.
    after: one step of the optimizer later.
    drop: before - after; positive where the step fitted the random labels.
    finite: whether all three and the gradient are; bool scalar.
  """

  before: base.Array
  after: base.Array
  drop: base.Array
  finite: base.Array


def loss_drop(
  losses_fn: base.LossesFn,
  params: base.PyTree,
  batch: Any,
  *,
  optimizer: optax.GradientTransformation,
  opt_state: base.PyTree,
  has_aux: bool = False,
  axis_name: base.AxisName = None,
) -> Drop:
  """How far one step of the training optimizer lowers a batch's mean loss.

  The step has everything that a step of training has: the schedule and momentum in
  `opt_state`, weight decay, and optax's `value`, the loss before. So a drop is not
  of the random labels alone, but also of where momentum was going. For plain SGD at
  rate a it is a |gradient|^2 to first order. Nothing is changed: the parameters and
  the state after the step are dropped.

  Args:
    losses_fn: `(params, batch) -> [B]` (with `has_aux`, and aux), in training mode
      and with its dropout key fixed, so that both losses see one mask and, with
      BatchNorm, the batch's own statistics: `problem.losses_fn(model_state, key)`.
    params: current parameters.
    batch: this device's examples, with random labels (`random_labels`).
    optimizer: that of training.
    opt_state: its state at `params`.
    has_aux: whether `losses_fn` returns something beside its losses.
    axis_name: mapped axis over which `batch` is sharded.

  Returns:
    A `Drop`, the same on every device. Where the step overflows, `finite`
    is False.

  Raises:
    InputError: the losses are not one number an example.
    FloatingPointError: outside `jit`, if a loss or the gradient is not finite.
  """

  def mean_loss(p):
    losses, _ = base.losses_and_aux("losses_fn", losses_fn(p, batch), has_aux)
    dtype = base.accumulator_dtype(losses.dtype)
    return jnp.mean(losses.astype(dtype)).astype(losses.dtype)

  own = jax.value_and_grad(mean_loss)(base.local(params, axis_name))
  before, gradient = base.pmean(own, axis_name)
  with base.implicit_promotion():
    updates, _ = optax.with_extra_args_support(optimizer).update(
      gradient, opt_state, params, value=before
    )
    moved = optax.apply_updates(params, updates)
  after = base.pmean(mean_loss(moved), axis_name)
  drop = before - after
  # A NaN loss may have a slope of zero, and an infinite gradient a finite step.
  finite = base.all_finite((before, after, drop, gradient))
  if not isinstance(finite, jax.core.Tracer) and not finite:
    raise FloatingPointError(
      f"the loss is {before} before and {after} after the step, and one of the two or"
      " the gradient is NaN or infinite: check batch, params and the learning rate."
    )
  return Drop(before, after, drop, finite)


def random_labels(seed: int, num_examples: int, num_classes: int) -> np.ndarray:
  """A class for every example, uniform over all classes, int32 [N].

  Drawn once for a run, so that an image always has the same random label; one in C
  is the true one. The released code seeds them by the clock.

  Raises:
    InputError: there is no example, or less than two classes.
  """
  if num_examples < 1:
    raise base.InputError(
      "the unlabeled set is empty: susceptibility needs images to label at random."
    )
  if num_classes < 2:
    raise base.InputError(
      f"num_classes={num_classes}: random labels need at least 2 classes."
    )
  rng = np.random.default_rng([seed, *b"random labels"])
  return rng.integers(num_classes, size=num_examples, dtype=np.int32)


def running_average(drops: Any, compat: bool = False) -> np.ndarray:
  """Drops to susceptibility zeta, from the first probe to each.

  Args:
    drops: one a probe, in order, [..., T]; one an epoch, before it, in the paper.
    compat: the curve of the released figures, which starts at the second probe,
      leaves the first (at initialization) out and divides the sum of t - 1 drops
      by t.

  Returns:
    zeta(t), the mean of the first t drops, float64 [..., T]; with `compat`
    [..., T - 1], which begins with 0.

  Raises:
    InputError: there is no drop (with `compat`, no second), or one is NaN or
      infinite.

  >>> running_average([3.0, 1.0, 2.0])
  array([3., 2., 2.])
  >>> running_average([3.0, 1.0, 2.0], compat=True)
  array([0. , 0.5])
  """
  drops = np.asarray(drops, np.float64)
  least = 2 if compat else 1
  if drops.ndim < 1 or drops.shape[-1] < least:
    raise base.InputError(
      f"drops must hold at least {least} probe(s) in its last axis; got shape"
      f" {drops.shape}."
    )
  _check_finite("drops", drops)
  if compat:
    # The drop of epoch t itself is not yet in the sum at t.
    terms = np.concatenate([np.zeros_like(drops[..., :1]), drops[..., 1:-1]], axis=-1)
  else:
    terms = drops
  return np.cumsum(terms, axis=-1) / np.arange(1, terms.shape[-1] + 1)


def boundaries(zeta: Any, train_accuracy: Any) -> tuple[float, float]:
  """Where the regions meet: the means over the models of both, [n] each.

  Raises:
    InputError: less than two models, lengths that differ, NaN or infinity.
  """
  zeta, train_accuracy = _models(zeta=zeta, train_accuracy=train_accuracy)
  # Exact, where a mean of equal numbers in floating point may differ from them.
  return statistics.mean(zeta.tolist()), statistics.mean(train_accuracy.tolist())


def regions(zeta: Any, train_accuracy: Any) -> np.ndarray:
  """The region of each model, among models compared.

  | region | training accuracy | zeta |                                |
  |--------|-------------------|------|--------------------------------|
  | 1      | high              | low  | trainable, resistant: take it  |
  | 2      | high              | high | trainable, memorizes           |
  | 3      | low               | low  | not trainable                  |
  | 4      | low               | high | neither                        |

  High and low are against the mean over the models; an accuracy at the mean is high,
  a zeta at the mean low (the paper does not say).

  Args:
    zeta: susceptibility of each model, [n].
    train_accuracy: on the training set as it is labeled, [n].

  Returns:
    Integers 1 to 4, [n].

  Raises:
    InputError: as `boundaries`.

  >>> regions([0.1, 0.9, 0.1, 0.9], [0.8, 0.8, 0.2, 0.2])
  array([1, 2, 3, 4])
  """
  zeta_mean, accuracy_mean = boundaries(zeta, train_accuracy)
  low_accuracy = np.asarray(train_accuracy, np.float64) < accuracy_mean
  high_zeta = np.asarray(zeta, np.float64) > zeta_mean
  return 1 + 2 * low_accuracy + high_zeta


def selected(zeta: Any, train_accuracy: Any) -> np.ndarray:
  """The models to take, those of region 1; ints, possibly none.

  Arguments and errors as of `regions`.
  """
  return np.flatnonzero(regions(zeta, train_accuracy) == 1)


def rank_correlation(one: Any, other: Any) -> float | None:
  """Spearman's, over models; None where all of them are equal in one of the two.

  Args:
    one: a number a model, [n].
    other: likewise.

  Raises:
    InputError: less than two models, lengths that differ, NaN or infinity.
  """
  one, other = _models(one=one, other=other)
  if np.ptp(one) == 0 or np.ptp(other) == 0:
    return None
  from scipy import stats  # a fifth of a second that other users need not wait

  return float(stats.spearmanr(one, other).statistic)


def _models(**columns: Any) -> list[np.ndarray]:
  """The columns as float64 [n], once they are seen to be of the same models."""
  found = {name: np.asarray(values, np.float64) for name, values in columns.items()}
  for name, values in found.items():
    if values.ndim != 1:
      raise base.InputError(
        f"{name} must be one number a model, shape [n]; got shape {values.shape}."
      )
    _check_finite(name, values)
  sizes = {name: len(values) for name, values in found.items()}
  if len(set(sizes.values())) > 1:
    told = " and ".join(f"{size} of {name}" for name, size in sizes.items())
    raise base.InputError(f"there must be as many of each: {told}.")
  if min(sizes.values()) < 2:
    raise base.InputError(
      f"{min(sizes.values())} model(s) cannot be compared; give at least 2."
    )
  return list(found.values())


def _check_finite(name: str, values: np.ndarray | Sequence[float]) -> None:
  bad = np.argwhere(~np.isfinite(values))
  if len(bad):
    raise base.InputError(
      f"{len(bad)} of {name} are NaN or infinite, the first at index"
      f" {', '.join(map(str, bad[0]))}; leave that model or probe out."
    )
