"""Probes that measure how much a run memorizes wrong labels.

    loop.train(..., probes=[memorization.susceptibility(), memorization.accuracy])

Probes do not change the training: a run ends with the same parameters without them.
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

# Distinguishes the keys of this probe from those of training ("susc" in ASCII).
_KEY = 0x73757363
_PARTS = ("train", "meta", "validation", "test")


def susceptibility(batch_size: int = 128, unlabeled: Any = "train") -> evaluation.Probe:
  """Makes a probe of susceptibility, see `susceptibility.loss_drop`.

  The name of its metric is `susceptibility_drop`.

  The probe uses the loss of the problem, even if the method trains with another one.
  For every measurement, it draws a batch of images at random. Their labels are also
  random, but each image keeps its label during the run. All draws depend only on the
  seed of the run and the step, not on the training.

  Args:
    batch_size: number of randomly labeled examples. The released code uses 128, its
      training batch size.
    unlabeled: the images: "train" for those of the training set, as in the released
      code; another part of the splits, such as "validation"; or an array of images
      like those of the training set, [U, ...]. Their labels are not used.

  Returns:
    The probe. When it is called, it raises InputError if the unlabeled set is empty, is
    smaller than a batch or does not match the training images, or if examples have
    several labels.

  Raises:
    InputError: `batch_size` is not an integer of at least 1, or the splits have no part
      `unlabeled`.
  """
  batch_size = base.check_integer("susceptibility: batch_size", batch_size)
  if isinstance(unlabeled, str) and unlabeled not in _PARTS:
    raise base.InputError(
      f"susceptibility: unlabeled={unlabeled!r} must be an array of images or one of"
      f" {_PARTS}."
    )

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
    result = _drop(
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
    return {"susceptibility_drop": float(result.drop)}

  return probe


def check(splits: examples_lib.Splits, unlabeled: Any, batch_size: int) -> None:
  """Raises InputError unless susceptibility can be probed on these images.

  Args:
    splits: the data of the run.
    unlabeled: images, [U, ...].
    batch_size: the batch size of the probe.
  """
  if len(unlabeled) == 0:
    raise base.InputError(
      "the unlabeled set is empty: hold images out, or use the training images."
    )
  if len(unlabeled) < batch_size:
    raise base.InputError(
      f"a batch needs {batch_size} unlabeled images, but there are {len(unlabeled)};"
      " lower the batch size of the probe or hold out more images."
    )
  train = splits.train
  if np.ndim(train.label) != 1:
    raise base.InputError(
      "susceptibility needs one label for each example; got labels of shape"
      f" {np.shape(train.label)}."
    )
  kind, train_kind = ((x.dtype, tuple(x.shape[1:])) for x in (unlabeled, train.image))
  if kind != train_kind:
    raise base.InputError(
      f"the unlabeled images are {kind[0]} {kind[1]}, but the training images are"
      f" {train_kind[0]} {train_kind[1]}; give both the same shape and type."
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

  return devices.on_one_device(drop)(params)


def zeta(metrics: dict[str, Any]) -> float | None:
  """Susceptibility of a finished run: the mean of its drops.

  The drop after the last step is left out, because the paper measures only before each
  epoch.

  Args:
    metrics: `Result.metrics` of the run.

  Returns:
    The mean, or None if a drop is NaN or infinite.

  Raises:
    InputError: the run had no probe of susceptibility.
  """
  probes = metrics.get("probes", {})
  if "susceptibility_drop" not in probes:
    raise base.InputError(
      "the run has no loss drops: train it with probes=[memorization.susceptibility()]."
    )
  pairs = zip(probes["step"], probes["susceptibility_drop"], strict=True)
  drops = [drop for step, drop in pairs if step < metrics["num_steps"]]
  if None in drops:
    return None
  return float(susceptibility_lib.running_average(drops)[-1])


def accuracy(snapshot: evaluation.Snapshot) -> dict[str, float]:
  """A probe of the accuracy on the training set and on two parts of it.

  Predictions are made in evaluation mode and compared with the given labels:

    train_accuracy          on all examples; this needs no true labels
    train_accuracy_clean    on examples whose label is the true one
    train_accuracy_wrong    on examples whose label is wrong, which shows memorization

  The accuracy on an empty set is left out.
  """
  right = snapshot.train.right()
  train = snapshot.splits.train
  is_clean = train.label == train.true_label
  subsets = {
    "train_accuracy": np.ones_like(is_clean),
    "train_accuracy_clean": is_clean,
    "train_accuracy_wrong": ~is_clean,
  }
  return {
    name: float(right[rows].mean()) for name, rows in subsets.items() if rows.any()
  }
