"""Susceptibility: how fast a network learns random labels.

A network that fits a randomly labeled batch in one step also fits wrong labels.
Susceptibility (zeta) is the decrease of the loss of such a batch, averaged over
training. Together with the accuracy on the given labels of the training set, which may
be wrong, it separates good models from bad ones without clean labels.

    loss_drop            the decrease for one batch and one step; works inside `jit`,
                         `vmap` and on several devices
    running_average      zeta from the decreases
    regions, selected    classify and select models by zeta and training accuracy

`training.memorization` measures susceptibility during a run.

Reference: Forouzesh, Sedghi, Thiran, "Leveraging Unlabeled Data to Track
Memorization", ICLR 2023 (https://arxiv.org/abs/2212.04461). As in its released code,
one step is measured by the decrease of the loss, not by the squared change of the
network's outputs.
"""

from collections.abc import Sequence
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax.linearization import trainable


class Drop(NamedTuple):
  """Mean losses of a randomly labeled batch, scalars in float32 or wider.

  Attributes:
    before: at the current parameters.
    after: after one step of the optimizer.
    drop: before - after; positive if the step fits the random labels.
    finite: whether all three and the gradient are finite; bool scalar.
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
  """The decrease of the mean loss of a batch in one step of the training optimizer.

  The step is the same as in training: it uses the schedule and the momentum in
  `opt_state`, weight decay, and optax's `value`, the loss before the step. The drop
  therefore depends not only on the random labels but also on the momentum. For plain
  SGD, the drop is to first order the learning rate times |gradient|^2. The parameters
  and the state after the step are discarded.

  Args:
    losses_fn: `(params, batch) -> losses [B]`, or `(losses [B], aux)` with `has_aux`,
      such as `problem.losses_fn(model_state, key)` with `has_aux`. It applies the
      network in training mode, so that BatchNorm uses the statistics of the batch, and
      with a fixed dropout key, so that both losses use the same mask.
    params: current parameters.
    batch: this device's examples, with random labels (`random_labels`).
    optimizer: the optimizer of training.
    opt_state: state of the optimizer at `params`.
    has_aux: whether `losses_fn` also returns an auxiliary output.
    axis_name: mapped axis over which `batch` is sharded.

  Returns:
    A `Drop`, the same on every device. If the step overflows, `finite` is False.

  Raises:
    InputError: the losses are not one floating-point number per example, the batch is
      empty, `params` has no trainable leaf, the result of `losses_fn` does not match
      `has_aux`, or `hypergradient.lookahead_params` refuses the optimizer.
    FloatingPointError: outside `jit`, if a loss or the gradient is not finite.
  """

  trainable.check(params)
  partition = trainable.Partition(params)

  def mean_loss(leaves):
    returned = losses_fn(partition.combine(leaves), batch)
    losses, _ = base.losses_and_aux("losses_fn", returned, has_aux)
    base.check_not_empty("losses", losses)
    # In half precision, the difference of two mean losses would be rounded away.
    return jnp.mean(losses.astype(base.accumulator_dtype(losses.dtype))), losses

  leaves = base.local(partition.leaves(params), axis_name)
  (loss, losses), local_gradient = jax.value_and_grad(mean_loss, has_aux=True)(leaves)
  base.check_finite("losses", losses, axis_name, ": check batch and params")
  before, gradient = base.pmean((loss, local_gradient), axis_name)
  updated = hypergradient.lookahead_params(
    params, partition.combine_gradient(gradient), optimizer, opt_state, value=before
  )
  after = base.pmean(mean_loss(partition.leaves(updated))[0], axis_name)
  drop = before - after
  # A NaN loss can have a zero gradient, and an infinite gradient a finite step.
  finite = base.all_finite((before, after, drop, gradient))
  if not isinstance(finite, jax.core.Tracer) and not finite:
    raise FloatingPointError(
      f"the loss is {before} before and {after} after the step, and one of the two or"
      " the gradient is NaN or infinite: check batch, params and the learning rate."
    )
  return Drop(before, after, drop, finite)


def random_labels(seed: int, num_examples: int, num_classes: int) -> np.ndarray:
  """A random class for every example, uniform over all classes, int32 [N].

  The labels are drawn once per run, so that an example always has the same random
  label. This label is the true one with probability 1 / C. (The released code seeds the
  generator with the time.)

  Args:
    seed: seed of the generator, at least 0.
    num_examples: N.
    num_classes: C.

  Raises:
    InputError: the seed is not an integer of at least 0, `num_examples` is not a
      positive integer, or `num_classes` is not an integer of at least 2.
  """
  seed = base.check_integer("random_labels: seed", seed, 0)
  num_examples = base.check_integer("random_labels: num_examples", num_examples, 0)
  if not num_examples:
    raise base.InputError(
      "the unlabeled set is empty: susceptibility needs images to label at random."
    )
  num_classes = base.check_integer("random_labels: num_classes", num_classes, 2)
  rng = np.random.default_rng([seed, *b"random labels"])
  return rng.integers(num_classes, size=num_examples, dtype=np.int32)


def running_average(drops: Any, compat: bool = False) -> np.ndarray:
  """Susceptibility zeta at each probe: the mean of the drops so far.

  Args:
    drops: one drop per probe, in order, [..., T]; the paper probes before every epoch.
    compat: whether to compute the curve of the released figures. It starts at the
      second probe, omits the first drop (at initialization) and divides the sum of
      t - 1 drops by t.

  Returns:
    zeta(t), the mean of the first t drops, float64 [..., T]; with `compat`
    [..., T - 1], starting with 0.

  Raises:
    InputError: there is no drop (with `compat`, fewer than two), or one is NaN or
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
      f"drops must hold at least {least} probe(s) in the last axis; got shape"
      f" {drops.shape}."
    )
  _check_finite("drops", drops)
  if compat:
    # The sum at epoch t does not include the drop of epoch t.
    terms = np.concatenate([np.zeros_like(drops[..., :1]), drops[..., 1:-1]], axis=-1)
  else:
    terms = drops
  return np.cumsum(terms, axis=-1) / np.arange(1, terms.shape[-1] + 1)


def boundaries(zeta: Any, train_accuracy: Any) -> tuple[float, float]:
  """The boundaries of the regions: the mean of each quantity over the models.

  Args:
    zeta: susceptibility of each model, [n].
    train_accuracy: accuracy on the given labels of the training set, [n].

  Raises:
    InputError: there are fewer than two models, the lengths differ, or a number is NaN
      or infinite.
  """
  zeta, train_accuracy = _columns(zeta=zeta, train_accuracy=train_accuracy)
  # The exact mean, because a floating-point mean of equal numbers may differ from them.
  return statistics.mean(zeta.tolist()), statistics.mean(train_accuracy.tolist())


def regions(zeta: Any, train_accuracy: Any) -> np.ndarray:
  """The region of each of several models.

  | region | training accuracy | zeta |                                        |
  |--------|-------------------|------|----------------------------------------|
  | 1      | high              | low  | trainable and resistant: use the model |
  | 2      | high              | high | trainable, but memorizes               |
  | 3      | low               | low  | not trainable                          |
  | 4      | low               | high | not trainable, and memorizes           |

  High and low are relative to the mean over the models. An accuracy equal to the mean
  is high, and a zeta equal to the mean is low (the paper leaves this open).

  Args:
    zeta: susceptibility of each model, [n].
    train_accuracy: accuracy on the given labels of the training set, [n].

  Returns:
    Integers 1 to 4, [n].

  Raises:
    InputError: the arguments are invalid, see `boundaries`.

  >>> regions([0.1, 0.9, 0.1, 0.9], [0.8, 0.8, 0.2, 0.2])
  array([1, 2, 3, 4])
  """
  zeta_mean, accuracy_mean = boundaries(zeta, train_accuracy)
  low_accuracy = np.asarray(train_accuracy, np.float64) < accuracy_mean
  high_zeta = np.asarray(zeta, np.float64) > zeta_mean
  return 1 + 2 * low_accuracy + high_zeta


def selected(zeta: Any, train_accuracy: Any) -> np.ndarray:
  """Indices of the models in region 1; possibly empty.

  Arguments and errors are those of `regions`.
  """
  return np.flatnonzero(regions(zeta, train_accuracy) == 1)


def rank_correlation(one: Any, other: Any) -> float | None:
  """Spearman's rank correlation over models.

  Args:
    one: one number per model, [n].
    other: one number per model, [n].

  Returns:
    The correlation, or None if one of the quantities is equal for all models.

  Raises:
    InputError: an argument is invalid, see `boundaries`.
  """
  one, other = _columns(one=one, other=other)
  if np.ptp(one) == 0 or np.ptp(other) == 0:
    return None
  from scipy import stats  # The import takes 0.2 seconds and is needed only here.

  return float(stats.spearmanr(one, other).statistic)


def _columns(**columns: Any) -> list[np.ndarray]:
  """Checks that the columns have one finite number per model; returns float64 [n]."""
  arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
  for name, values in arrays.items():
    if values.ndim != 1:
      raise base.InputError(
        f"{name} must be one number per model, shape [n]; got shape {values.shape}."
      )
    _check_finite(name, values)
  sizes = {name: len(values) for name, values in arrays.items()}
  if len(set(sizes.values())) > 1:
    counts = " and ".join(f"{size} of {name}" for name, size in sizes.items())
    raise base.InputError(f"the lengths must be equal: {counts}.")
  if min(sizes.values()) < 2:
    raise base.InputError(
      f"{min(sizes.values())} model(s) cannot be compared; give at least 2."
    )
  return list(arrays.values())


def _check_finite(name: str, values: np.ndarray | Sequence[float]) -> None:
  bad = np.argwhere(~np.isfinite(values))
  if len(bad):
    raise base.InputError(
      f"{len(bad)} of {name} are NaN or infinite, the first at index"
      f" {', '.join(map(str, bad[0]))}; leave that model or probe out."
    )
