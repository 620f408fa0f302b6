"""Susceptibility: how readily a network learns labels that mean nothing.

A network that fits a randomly labelled batch in one step will fit wrong labels too.
The drop of such a batch's loss, averaged over training, is zeta; together with the
accuracy on the training set *as it is labelled* it tells good models from bad ones
without one clean label.

    loss_drop            one batch, one step: jit, vmap, several devices
    probe                the same as a probe of `training.loop.train`
    running_average      drops to zeta
    regions, selected    zeta and training accuracy of many models to a choice

Reference: Forouzesh, Sedghi, Thiran, "Leveraging Unlabeled Data to Track
Memorization", ICLR 2023 (https://arxiv.org/abs/2212.04461), and its released code
for what one step is. The measured quantity is the decrease of a loss, not a squared
change of outputs.
"""

from collections.abc import Callable, Sequence
import functools
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base

# A `training.evaluation.Snapshot`, of which only attributes are read.
Snapshot = Any
_KEY = 0x73757363


class Drop(NamedTuple):
  """Mean losses of a randomly labelled batch, in nats, scalars.

  Attributes:
    before: at the parameters given.
    after: one step of the optimiser later.
    drop: before - after; positive where the step fitted the random labels.
  """

  before: base.Array
  after: base.Array
  drop: base.Array


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
  """How far one step of the training optimiser lowers a batch's mean loss.

  The step has everything that a step of training has: the schedule and momentum in
  `opt_state`, weight decay, and optax's `value`, the loss before. So a drop is not
  of the random labels alone, but also of where momentum was going. For plain SGD at
  rate a it is a |gradient|^2 to first order. Nothing is changed: the parameters and
  the state after the step are dropped.

  Args:
    losses_fn: `(params, batch) -> [B]` (with `has_aux`, and aux), in training mode
      and with its dropout key fixed, so that both losses see one mask and, with
      BatchNorm, the batch's own statistics: `task.losses_fn(model_state, key)`.
    params: current parameters.
    batch: this device's examples, with random labels (`random_labels`).
    optimizer: that of training.
    opt_state: its state at `params`.
    has_aux: whether `losses_fn` returns something beside its losses.
    axis_name: mapped axis over which `batch` is sharded.

  Returns:
    A `Drop`, the same on every device. NaN or infinite where the step overflows.

  Raises:
    InputError: the losses are not one number an example.
  """

  def mean_loss(p):
    found = losses_fn(p, batch)
    losses = found[0] if has_aux else found
    base.check_vector("what losses_fn returns", losses)
    return jnp.mean(losses)

  own = jax.value_and_grad(mean_loss)(base.local(params, axis_name))
  before, gradient = base.pmean(own, axis_name)
  updates, _ = optax.with_extra_args_support(optimizer).update(
    gradient, opt_state, params, value=before
  )
  after = base.pmean(mean_loss(optax.apply_updates(params, updates)), axis_name)
  return Drop(before, after, before - after)


def random_labels(seed: int, num_examples: int, num_classes: int) -> np.ndarray:
  """A class for every example, uniform over all classes, int32 [N].

  Drawn once for a run, so that an image always has the same random label; one in C
  is the true one. The released code seeds them by the clock.

  Raises:
    InputError: there is no example, or less than two classes.
  """
  if num_examples < 1:
    raise base.InputError(
      "the unlabelled set is empty: susceptibility needs images to label at random."
    )
  if num_classes < 2:
    raise base.InputError(
      f"num_classes={num_classes}: random labels need at least 2 classes."
    )
  rng = np.random.default_rng([seed, *b"random labels"])
  return rng.integers(num_classes, size=num_examples, dtype=np.int32)


def probe(
  batch_size: int = 128,
  unlabelled: Any = "train",
  axis_name: base.AxisName = None,
) -> Callable[[Snapshot], dict[str, float]]:
  """A probe of `loop.train`: `susceptibility_drop`, the drop at this step.

  It takes the task's own loss, whatever the training method makes of it, on the
  first batch of an order that is drawn anew at every step, with random labels that
  stay those of an image throughout the run: functions of the run's seed and the
  step, and of nothing that training draws. Training is not touched.

  Args:
    batch_size: randomly labelled examples; the released code has 128, its training
      batch.
    unlabelled: the images: "train" for those of the training set, as the released
      code does; another part of the splits, such as "validation"; or rows of images
      like the training set's, [U, ...]. Labels are not looked at.
    axis_name: the axis that the network itself names (for BatchNorm over devices),
      if it does; here its only device holds the whole batch.

  Returns:
    The probe. It raises InputError when the unlabelled set is empty, smaller than a
    batch, or not like the training images, or examples have several labels.
  """
  if batch_size < 1:
    raise base.InputError(f"batch_size={batch_size} must be at least 1.")

  def measure(snapshot):
    images = unlabelled
    if isinstance(unlabelled, str):
      images = getattr(snapshot.splits, unlabelled).image
    _check_images(images, snapshot.splits.train, batch_size)
    labels = random_labels(snapshot.seed, len(images), snapshot.task.num_classes)
    rng = np.random.default_rng([snapshot.seed, *b"susceptibility", snapshot.step])
    rows = rng.permutation(len(images))[:batch_size]
    key = jax.random.fold_in(jax.random.key(snapshot.seed), _KEY)
    found = _drop_of_batch(
      snapshot.task.forward,
      snapshot.task.loss,
      snapshot.optimizer,
      axis_name,
      snapshot.state.params,
      snapshot.state.model_state,
      snapshot.state.opt_state,
      {"image": images[rows], "label": labels[rows], "index": rows.astype(np.int32)},
      jax.random.fold_in(key, snapshot.step),
    )
    return {"susceptibility_drop": float(found.drop)}

  return measure


def _check_images(images, train, batch_size):
  if len(images) == 0:
    raise base.InputError(
      "the unlabelled set is empty: hold images out, or probe on the training images."
    )
  if len(images) < batch_size:
    raise base.InputError(
      f"a batch of {batch_size} unlabelled images needs more than the {len(images)}"
      " there are; lower batch_size or hold out more."
    )
  if np.ndim(train.label) != 1:
    raise base.InputError(
      "susceptibility is of classifiers with one label an example; got labels of"
      f" shape {np.shape(train.label)}."
    )
  own, other = ((x.dtype, tuple(x.shape[1:])) for x in (images, train.image))
  if own != other:
    raise base.InputError(
      f"the unlabelled images are {own[0]} {own[1]} and the training images"
      f" {other[0]} {other[1]}; make them alike."
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _drop_of_batch(
  forward, loss, optimizer, axis_name, params, model_state, opt_state, batch, key
):
  def losses_fn(p, examples):
    outputs, _ = forward(p, model_state, examples, key, True)
    return loss(outputs, examples)

  def drop(_):
    return loss_drop(losses_fn, params, batch, optimizer=optimizer, opt_state=opt_state)

  if axis_name is None:
    return drop(None)
  found = jax.vmap(drop, axis_name=axis_name)(jnp.zeros(1))
  return jax.tree.map(lambda x: x[0], found)


def training_accuracy(snapshot: Snapshot) -> dict[str, float]:
  """A probe of `loop.train`: how much of the training set is known by heart.

  In evaluation mode, against the labels that training sees:

    train_accuracy          of all examples; needs no clean label
    train_accuracy_clean    of those whose label is the true one
    train_accuracy_wrong    of those whose label is not: what was memorised

  A share of no examples is left out.
  """
  right = snapshot.train.predicted == snapshot.train.labels
  train = snapshot.splits.train
  is_clean = train.label == train.true_label
  subsets = {
    "train_accuracy": np.ones_like(is_clean),
    "train_accuracy_clean": is_clean,
    "train_accuracy_wrong": ~is_clean,
  }
  return {name: float(right[own].mean()) for name, own in subsets.items() if own.any()}


def running_average(drops: Any, compat: bool = False) -> np.ndarray:
  """Drops to susceptibility zeta, from the first probe to each.

  Args:
    drops: one a probe, in order, [..., T]; one an epoch, before it, in the paper.
    compat: the curve of the released figures, which starts at the second probe,
      leaves the first (at initialisation) out and divides the sum of t - 1 drops
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
  | 2      | high              | high | trainable, memorises           |
  | 3      | low               | low  | not trainable                  |
  | 4      | low               | high | neither                        |

  High and low are against the mean over the models; an accuracy at the mean is high,
  a zeta at the mean low (the paper does not say).

  Args:
    zeta: susceptibility of each model, [n].
    train_accuracy: on the training set as it is labelled, [n].

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
