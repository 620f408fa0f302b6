r"""Forward correction: the loss of labels that went wrong by a known or found matrix.

T_ij is the probability that an example of class i is given the label j; rows sum to
1. The loss -log (softmax(z) @ T)[label], `losses.forward_corrected`, matches what
the network says of the true class, corrupted by T, with the given labels; if T can be
inverted, its minimizer is that of the cross-entropy on true labels. Evaluation keeps
to z alone.

T is estimated from the network's predictions on its own training set. If class i has
an example that is surely of this class, a network trained on the given labels predicts
T_i. for it; this anchor is sought where p_i is largest, or nearly so, as a high
percentile spares outliers (`estimate_transition`). Or T is the `confusion` of given
labels with predicted classes.

Where the released program (github.com/giorgiop/loss-correction) differs:

- When it has T, it trains a new network; here the network goes on (for a new one,
  pass the matrix found as `transition`).
- It estimates T from the checkpoint of lowest loss on a tenth of the training set
  that it holds out, labels as given; here T is that of the network at a fixed epoch.
- Its anchor is the largest p_i strictly below the 97th percentile, which is ours
  unless examples tie there or one lies exactly on it, and on CIFAR-100 the largest of
  all. To pass over the largest it sets them to 0 in place, class after class: where
  the anchor of class i is among the top 3 % of an earlier class j too, its T_ij is 0.

References:
  Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label Noise:
  a Loss Correction Approach", CVPR 2017, theorem 2.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import losses
from l2rw_jax.methods import baselines
from l2rw_jax.methods import changed_loss

ESTIMATORS = ("anchor", "confusion")
_BATCH_SIZE = 500


def estimate_transition(
  probabilities: base.Array, percentile: float = 97.0
) -> base.Array:
  """T from the predictions of a network that was trained on the given labels.

  Row i is the prediction for the example whose p_i has the given rank among all.

  Args:
    probabilities: of the given labels, [N, C], N at least 1; rows sum to 1. Logits
      are refused outside `jit`.
    percentile: rank, from 0 to 100: the example at floor(percentile / 100 (N - 1))
      in ascending order. 100 is the largest, the paper's formula; 97, the
      release's, needs every class to be more than 3 % of the examples.

  Returns:
    T [C, C].

  Raises:
    InputError: the shape or the percentile is wrong; outside `jit` also if a row
      holds a negative number or does not sum to 1.

  >>> import jax.numpy as jnp
  >>> print(estimate_transition(jnp.array([[.75, .25], [.5, .5], [.125, .875]]), 100))
  [[0.75  0.25 ]
   [0.125 0.875]]
  """
  if probabilities.ndim != 2 or not len(probabilities):
    raise base.InputError(
      f"probabilities must be [N, C], N at least 1; got {probabilities.shape}."
    )
  _check_percentile(percentile)
  _check_distributions(probabilities)
  probabilities = base.unsharded(probabilities)
  rank = math.floor(percentile * (len(probabilities) - 1) / 100)
  rows = probabilities[jnp.argsort(probabilities, axis=0)[rank]]
  return rows / rows.sum(axis=1, keepdims=True)


def confusion(
  predicted: base.Array, labels: base.Array, num_classes: int, smoothing: float = 1.0
) -> base.Array:
  """Share of each given label among the examples predicted to be of a class.

  As an estimate of T it holds while the network has not learned the wrong labels
  by heart: one that has predicts them, and finds the identity.

  Args:
    predicted: classes, [N].
    labels: as given, [N].
    num_classes: C.
    smoothing: examples added to each row, spread evenly over its entries.

  Returns:
    T [C, C]; the row of a class that is never predicted is the identity's.

  Raises:
    InputError: the shapes differ, `smoothing` is negative, or, outside `jit`, an
      entry names no class. Under `jit` T is NaN then.

  >>> import jax.numpy as jnp
  >>> print(confusion(jnp.array([0, 0, 0]), jnp.array([0, 0, 1]), 2))
  [[0.625 0.375]
   [0.    1.   ]]
  """
  if predicted.shape != labels.shape or labels.ndim != 1:
    raise base.InputError(
      f"predicted and labels must be [N]; got {predicted.shape} and {labels.shape}."
    )
  predicted, labels = base.unsharded(predicted), base.unsharded(labels)
  rows, columns = (losses.label_mask(x, num_classes) for x in (predicted, labels))
  exists = rows.any(axis=1) & columns.any(axis=1)
  if not isinstance(exists, jax.core.Tracer) and not exists.all():
    raise base.InputError(
      f"confusion: row {jnp.argmin(exists)} of predicted or labels names none of the"
      f" {num_classes} classes; leave such rows out."
    )
  if smoothing < 0:
    raise base.InputError(f"smoothing={smoothing} must be at least 0.")
  rows, columns = jnp.argmax(rows, axis=1), jnp.argmax(columns, axis=1)
  counts = jnp.zeros((num_classes, num_classes)).at[rows, columns].add(1)
  counts = counts * jnp.sqrt(jnp.where(exists.all(), 1.0, -1.0))
  totals = counts.sum(axis=1, keepdims=True)
  shares = (counts + smoothing / num_classes) / jnp.maximum(totals + smoothing, 1)
  return jnp.where(totals == 0, jnp.eye(num_classes), shares)


def estimate_by(
  estimator: str, problem: base.Problem, view: base.EpochView, percentile: float = 97.0
) -> base.Array:
  """T from the network as it is before an epoch, in evaluation mode; on the host.

  Args:
    estimator: "anchor" or "confusion".
    task: the learning problem.
    view: holds the network and the training set.
    percentile: of "anchor".

  Returns:
    T [C, C].
  """

  @jax.jit
  def predict(params, model_state, batch):
    outputs, _ = problem.forward(params, model_state, batch, jax.random.key(0), False)
    return losses.log_probabilities(losses.logits_of(outputs))

  labels, parts = view.train["label"], []
  for start in range(0, len(labels), _BATCH_SIZE):
    batch = {k: v[start : start + _BATCH_SIZE] for k, v in view.train.items()}
    parts.append(predict(view.params, view.model_state, batch))
  log_p = jnp.concatenate(parts)
  if estimator == "anchor":
    return estimate_transition(jnp.exp(log_p), percentile)
  return confusion(jnp.argmax(log_p, axis=1), jnp.asarray(labels), log_p.shape[1])


def forward_correction(
  from_epoch: int | None = None,
  *,
  transition: Any = None,
  estimator: str = "anchor",
  percentile: float = 97.0,
) -> base.Method:
  """Cross-entropy, from some epoch on forward-corrected, weighing all alike.

  Args:
    from_epoch: before this epoch T is estimated, once, from predictions in
      evaluation mode on the whole training set; until then it is the identity. At
      least 1, as an untrained network has nothing to tell; or, with `transition`,
      when that begins to hold, 0 if None.
    transition: T [C, C], if it is known.
    estimator: "anchor", see `estimate_transition`, or "confusion", see there.
    percentile: of "anchor".

  Returns:
    A `base.Method` whose state is T, float32 [C, C]. Its losses are the corrected
    ones, whatever `changed_loss` says; it logs the mean of T's diagonal.

  Raises:
    InputError: an unknown estimator, an epoch or percentile out of range, a
      `transition` whose rows are not distributions or (when training begins) that
      has another number of classes.
  """
  known = None if transition is None else _checked_transition(transition)
  first = from_epoch or 0
  changed_loss.check_epoch("forward_correction", first)
  if known is None and first == 0:
    raise base.InputError(
      f"forward_correction: from_epoch={from_epoch} must be at least 1, for the"
      " network to have learned what T is estimated from; or pass transition."
    )
  if estimator not in ESTIMATORS:
    raise base.InputError(
      f"forward_correction: estimator={estimator!r}; choose 'anchor' or 'confusion'."
    )
  _check_percentile(percentile)
  uniform = baselines.uniform()

  def init(key, problem, params):
    del key, params
    shape = (problem.num_classes, problem.num_classes)
    if known is not None and known.shape != shape:
      raise base.InputError(
        f"forward_correction: transition is {known.shape}; the data need {shape}."
      )
    starts_known = known is not None and first == 0
    return jnp.asarray(known if starts_known else np.eye(shape[0]), jnp.float32)

  def gradients(state, problem, inputs):
    def corrected(outputs, batch):
      return losses.forward_corrected(losses.logits_of(outputs), batch["label"], state)

    changed = dataclasses.replace(problem, loss=corrected)
    found, _ = uniform.gradients((), changed, inputs)
    return found._replace(
      metrics={"transition_diagonal": jnp.diag(state).mean()}
    ), state

  def refresh(state, problem, view):
    if view.epoch != first:
      return state
    if known is not None:
      return jnp.asarray(known, jnp.float32)
    return estimate_by(estimator, problem, view, percentile).astype(jnp.float32)

  return base.Method(gradients, init=init, refresh=refresh)


def _check_distributions(probabilities):
  if isinstance(probabilities, jax.core.Tracer):
    return
  rows = np.asarray(probabilities, np.float64)
  # bfloat16 has three digits.
  bad = (rows < 0).any(axis=1) | ~np.isclose(rows.sum(axis=1), 1, atol=2e-2)
  if bad.any():
    raise base.InputError(
      f"probabilities: row {np.argmax(bad)} is no distribution (its sum is"
      f" {rows[np.argmax(bad)].sum():g}); of logits take jax.nn.softmax first."
    )


def _check_percentile(percentile):
  if not 0 <= percentile <= 100:
    raise base.InputError(f"percentile={percentile} must lie between 0 and 100.")


def _checked_transition(transition):
  matrix = np.asarray(transition, np.float64)
  is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
  if not is_square or (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1):
    raise base.InputError(
      "forward_correction: transition must be [C, C], row i the distribution of the"
      f" labels given to class i, summing to 1; got shape {matrix.shape}."
    )
  return matrix
