"""Probes of a run that tell how much of the wrong labels it learns.

    loop.train(..., probes=[memorization.susceptibility(), memorization.accuracy])

Neither touches the training: a probed run ends with the same parameters.
"""

import functools
from typing import Any

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import susceptibility as susceptibility_lib
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.training import devices
from l2rw_jax.training import evaluation
from l2rw_jax.training import sampling

_KEY = 0x73757363


def susceptibility(batch_size: int = 128, unlabeled: Any = "train") -> evaluation.Probe:
  """A probe: `susceptibility_drop`, see `susceptibility.loss_drop`.

  It takes the task's own loss, whatever the method makes of it, on the first batch
  of an order that is drawn anew at every probe, with random labels that an image
  keeps throughout the run: functions of the run's seed and the step, and of nothing
  that training draws.

  Args:
    batch_size: randomly labeled examples; the released code has 128, its training
      batch.
    unlabeled: the images: "train" for those of the training set, as in the released
      code; another part of the splits, such as "validation"; or rows of images like
      the training set's, [U, ...]. Labels are not looked at.

  Returns:
    The probe. It raises InputError when the unlabeled set is empty, smaller than a
    batch, or not like the training images, or when examples have several labels.

  Raises:
    InputError: `batch_size` is below 1.
  """
  if batch_size < 1:
    raise base.InputError(f"batch_size={batch_size} must be at least 1.")

  def probe(snapshot):
    images = unlabeled
    if isinstance(unlabeled, str):
      images = getattr(snapshot.splits, unlabeled).image
    check(snapshot.splits, images, batch_size)
    seed, step = snapshot.seed, snapshot.step
    labels = susceptibility_lib.random_labels(
      seed, len(images), snapshot.problem.num_classes
    )
    order = sampling.generator(seed, "susceptibility", step).permutation(len(images))
    rows = order[:batch_size]
    key = jax.random.fold_in(jax.random.key(seed), _KEY)
    found = _drop(
      snapshot.problem.forward,
      snapshot.problem.loss,
      snapshot.optimizer,
      snapshot.state.params,
      snapshot.state.model_state,
      snapshot.state.opt_state,
      {
        "image": examples_lib.read_rows(images, rows),
        "label": labels[rows],
        "index": rows.astype(np.int32),
      },
      jax.random.fold_in(key, step),
    )
    return {"susceptibility_drop": float(found.drop)}

  return probe


def check(splits: examples_lib.Splits, unlabeled: Any, batch_size: int) -> None:
  """Raises InputError unless susceptibility can be probed on these images.

  Args:
    splits: of the run.
    unlabeled: images, [U, ...].
    batch_size: of the probe.
  """
  if len(unlabeled) == 0:
    raise base.InputError(
      "the unlabeled set is empty: hold images out, or probe on the training images."
    )
  if len(unlabeled) < batch_size:
    raise base.InputError(
      f"a batch of {batch_size} unlabeled images is more than the {len(unlabeled)}"
      " there are; lower the batch size of the probe or hold out more."
    )
  train = splits.train
  if np.ndim(train.label) != 1:
    raise base.InputError(
      "susceptibility is of classifiers with one label an example; got labels of"
      f" shape {np.shape(train.label)}."
    )
  own, other = ((x.dtype, tuple(x.shape[1:])) for x in (unlabeled, train.image))
  if own != other:
    raise base.InputError(
      f"the unlabeled images are {own[0]} {own[1]} and the training images"
      f" {other[0]} {other[1]}; make them alike."
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drop(forward, loss, optimizer, params, model_state, opt_state, batch, key):
  def losses_fn(p, examples):
    outputs, _ = forward(p, model_state, examples, key, True)
    return loss(outputs, examples)

  def drop(p):
    return susceptibility_lib.loss_drop(
      losses_fn, p, batch, optimizer=optimizer, opt_state=opt_state
    )

  return devices.alone(drop)(params)


def zeta(metrics: dict[str, Any]) -> float | None:
  """Susceptibility of a finished run: the mean of its drops.

  The last drop, taken when training was over, is left out: where the paper probes
  before each epoch there is none.

  Args:
    metrics: of the run's `Result`.

  Returns:
    The mean, or None if a drop was NaN or infinite.

  Raises:
    InputError: the run was not probed.
  """
  probes = metrics.get("probes", {})
  if "susceptibility_drop" not in probes:
    raise base.InputError(
      "the run has no drops: train it with probes=[memorization.susceptibility()]."
    )
  pairs = zip(probes["step"], probes["susceptibility_drop"], strict=True)
  drops = [drop for step, drop in pairs if step < metrics["num_steps"]]
  if None in drops:
    return None
  return float(susceptibility_lib.running_average(drops)[-1])


def accuracy(snapshot: evaluation.Snapshot) -> dict[str, float]:
  """A probe: how much of the training set is known by heart.

  In evaluation mode, against the labels that training sees:

    train_accuracy          of all examples; needs no clean label
    train_accuracy_clean    of those whose label is the true one
    train_accuracy_wrong    of those whose label is not: what was memorized

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
