"""Estimates of a label transition matrix from a network's predictions.

T_ij is the probability that an example of class i is given the label j; rows sum to 1.
Both estimators use the predictions of a network that was trained on the given labels.
`estimate_transition` assumes that every class i has an anchor, an example that surely
belongs to it, for which the network predicts row i of T. `confusion` counts the given
labels of the examples that are predicted to be of each class.
"""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import inference
from l2rw_jax import losses

ESTIMATORS = ("anchor", "confusion")
_BATCH_SIZE = 500


def estimate_transition(
  probabilities: base.Array, percentile: float = 97.0
) -> base.Array:
  """Estimates T from the predictions of a network trained on the given labels.

  Row i is the prediction for the anchor of class i, the example whose probability of
  class i is at the given percentile. A high percentile is robust to outliers, unlike
  the maximum.

  Args:
    probabilities: predicted probabilities of the given labels, [N, C], N at least 1;
      rows sum to 1. Logits are refused outside `jit`.
    percentile: from 0 to 100. The anchor is the example at index
      floor(percentile / 100 (N - 1)) in ascending order of the probability. 100 is the
      maximum, as in the paper; 97, the value of the released code, requires that every
      class has more than 3% of the examples.

  Returns:
    T [C, C].

  Raises:
    InputError: the shape or the percentile is wrong; outside `jit` also if a row
      contains a negative number or NaN, or does not sum to 1.

  References:
    Patrini et al., "Making Deep Neural Networks Robust to Label Noise: a Loss
    Correction Approach", CVPR 2017, section 4.

  >>> import jax.numpy as jnp
  >>> print(estimate_transition(jnp.array([[.75, .25], [.5, .5], [.125, .875]]), 100))
  [[0.75  0.25 ]
   [0.125 0.875]]
  """
  probabilities = jnp.asarray(probabilities)
  if probabilities.ndim != 2 or not len(probabilities):
    raise base.InputError(
      f"probabilities must be [N, C] with N at least 1; got {probabilities.shape}."
    )
  percentile = check_percentile(percentile)
  _check_distributions(probabilities)
  probabilities = base.unsharded(probabilities)
  # Use exact arithmetic: in floating point, 64.1 * 1000 / 100 is less than 641.
  rank = math.floor(
    fractions.Fraction(str(percentile)) * (len(probabilities) - 1) / 100
  )
  rows = probabilities[jnp.argsort(probabilities, axis=0)[rank]]
  return rows / rows.sum(axis=1, keepdims=True)


def confusion(
  predicted: base.Array, labels: base.Array, num_classes: int, smoothing: float = 1.0
) -> base.Array:
  """Estimates T_ij as the share of label j among the examples predicted as class i.

  The estimate is good only if the network has not memorized the wrong labels. A network
  that has memorized them predicts them, and the estimate is the identity matrix.

  Args:
    predicted: predicted classes, [N].
    labels: given labels, [N].
    num_classes: C.
    smoothing: number of examples that are added to each row, spread evenly over its
      entries.

  Returns:
    T [C, C]; a class that is never predicted has the row of the identity matrix.

  Raises:
    InputError: the shapes differ, `predicted` or `labels` are not integers,
      `num_classes` is not a positive integer, `smoothing` is negative or not finite,
      or, outside `jit`, an entry is not a class. Under `jit`, such an entry makes T
      NaN.

  >>> import jax.numpy as jnp
  >>> print(confusion(jnp.array([0, 0, 0]), jnp.array([0, 0, 1]), 2))
  [[0.625 0.375]
   [0.    1.   ]]
  """
  num_classes = base.check_integer("confusion: num_classes", num_classes)
  predicted, labels = (base.host_or_jax_array(x) for x in (predicted, labels))
  if predicted.shape != labels.shape or labels.ndim != 1:
    raise base.InputError(
      f"predicted and labels must be [N]; got {predicted.shape} and {labels.shape}."
    )
  # Count with a scatter: one-hot labels, [N, C], could take much more memory than T.
  rows, columns = (
    base.wide_integers(
      base.unsharded(x) if isinstance(x, jax.Array) else x, num_classes
    )
    for x in (predicted, labels)
  )
  is_valid = (rows >= 0) & (rows < num_classes)
  is_valid &= (columns >= 0) & (columns < num_classes)
  if not isinstance(is_valid, jax.core.Tracer) and not is_valid.all():
    raise base.InputError(
      f"confusion: row {jnp.argmin(is_valid)} of predicted or labels is not one of the"
      f" {num_classes} classes; leave such rows out."
    )
  smoothing = base.setting(smoothing, jnp.result_type(float))
  if not base.is_traced(smoothing) and not 0 <= smoothing < math.inf:
    raise base.InputError(f"smoothing={smoothing} must be a number of at least 0.")
  # Count in integers: in float32, a sum of ones stops growing at 2^24.
  counts = jnp.zeros((num_classes, num_classes), jnp.int32)
  counts = counts.at[rows, columns].add(1).astype(float)
  # The counts become NaN if an entry is not a class.
  counts = counts * jnp.sqrt(jnp.where(is_valid.all(), 1.0, -1.0))
  totals = counts.sum(axis=1, keepdims=True)
  shares = (counts + smoothing / num_classes) / jnp.maximum(totals + smoothing, 1)
  return jnp.where(totals == 0, jnp.eye(num_classes), shares)


def estimate_from_network(
  estimator: str, problem: base.Problem, view: base.EpochView, percentile: float = 97.0
) -> base.Array:
  """Estimates T from predictions on the whole training set, on the host.

  With several processes, all of them must call this function, and each predicts a part
  of the set.

  Args:
    estimator: "anchor" for `estimate_transition` or "confusion" for `confusion`.
    problem: the learning problem.
    view: contains the network and the training set.
    percentile: the `percentile` of `estimate_transition`; "confusion" ignores it.

  Returns:
    T [C, C].

  Raises:
    InputError: `estimator` is unknown, `percentile` is not from 0 to 100, for
      "anchor" a prediction is NaN, or for "confusion" a label is not a class.
  """
  check_estimator(estimator)
  check_percentile(percentile)

  def predict(batch):
    return _log_probabilities(problem.forward, view.params, view.model_state, batch)

  def predicted_classes(batch):
    return jnp.argmax(predict(batch), axis=1)

  if estimator == "anchor":
    log_p = inference.map_batches(predict, view.train, _BATCH_SIZE, by_process=True)
    return estimate_transition(jnp.exp(log_p), percentile)
  # Keep only the classes, [N], because the probabilities, [N, C], are not needed.
  predicted = inference.map_batches(
    predicted_classes, view.train, _BATCH_SIZE, by_process=True
  )
  return confusion(predicted, view.train["label"], max(problem.num_classes, 2))


@functools.partial(jax.jit, static_argnames="forward")
def _log_probabilities(forward, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  return losses.log_probabilities(losses.logits_of(outputs))


def check_estimator(estimator: str) -> None:
  """Raises InputError if `estimator` is not one of `ESTIMATORS`."""
  if estimator not in ESTIMATORS:
    raise base.InputError(f"estimator={estimator!r}: choose one of {ESTIMATORS}.")


def check_percentile(percentile: float) -> float:
  """`percentile` as a Python number.

  Raises:
    InputError: it is traced, or not between 0 and 100.
  """
  percentile = base.known_setting("percentile", percentile)
  if not 0 <= percentile <= 100:
    raise base.InputError(f"percentile={percentile} must lie between 0 and 100.")
  return percentile


def _check_distributions(probabilities):
  if isinstance(probabilities, jax.core.Tracer):
    return
  rows = np.asarray(probabilities, np.float64)
  # The tolerance allows for rounding in bfloat16, which has about three digits.
  bad = (rows < 0).any(axis=1) | ~np.isclose(rows.sum(axis=1), 1, atol=2e-2)
  if bad.any():
    raise base.InputError(
      f"probabilities: row {np.argmax(bad)} is not a distribution (its sum is"
      f" {rows[np.argmax(bad)].sum():g}). Convert logits with jax.nn.softmax first; for"
      " NaN, check the network."
    )
