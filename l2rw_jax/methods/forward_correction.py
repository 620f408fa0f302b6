r"""Forward correction of the loss by a label transition matrix (Patrini et al., 2017).

T_ij is the probability that an example of class i is given the label j; rows sum to
1. The loss -log (softmax(z) @ T)[label], `losses.forward_corrected`, compares the given
label with the network's prediction of the true class, corrupted by T. If T is
invertible, the loss has the same minimizer as the cross-entropy on true labels.
Evaluation uses only z.

T is either given, or estimated during training from the network's predictions on the
training set; see `label_transition`.

Differences from the released program (github.com/giorgiop/loss-correction):

- After it has estimated T, the release trains a new network; here, training of the same
  network continues. To train a new one, pass the estimate as `transition`.
- The release estimates T from the checkpoint with the lowest loss on a tenth of the
  training set, which is held out with its given labels; here, T is estimated from the
  network at a fixed epoch.
- The anchor of the release is the example with the largest p_i strictly below the 97th
  percentile (on CIFAR-100, the largest p_i of all). This is also the anchor of this
  library (with `percentile=100` on CIFAR-100), unless examples are tied for it or one
  lies exactly on the percentile. To skip the largest values, the release sets them to 0
  in place, class after class. If the anchor of class i is also among the top 3% of an
  earlier class j, T_ij of the release is therefore 0.

References:
  Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label Noise:
  a Loss Correction Approach", CVPR 2017, theorem 2.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from l2rw_jax import base
from l2rw_jax import label_transition
from l2rw_jax import losses
from l2rw_jax import weighted_update


def forward_correction(
  from_epoch: int | None = None,
  *,
  transition: Any = None,
  estimator: str = "anchor",
  percentile: float = 97.0,
) -> base.Method:
  """Minimizes the mean cross-entropy, forward-corrected from some epoch on.

  Args:
    from_epoch: the first epoch, counted from 0, that uses T; until then T is the
      identity. Without `transition`, T is estimated once before this epoch, from
      evaluation-mode predictions on the whole training set. In this case `from_epoch`
      must be at least 1, because an untrained network predicts nothing useful. With
      `transition`, None stands for 0.
    transition: T [C, C], if it is known.
    estimator: one of `label_transition.ESTIMATORS`.
    percentile: percentile of the estimator "anchor".

  Returns:
    A `base.Method` whose state is T, float32 [C, C]. It always trains on the corrected
    losses, even inside `changed_loss`, and logs the mean of T's diagonal.

  Raises:
    InputError: the estimator is unknown, the epoch or the percentile is out of range,
      `transition` is not square or its rows are not distributions, or (when training
      begins) its shape does not fit the number of classes of the data.
  """
  known = None if transition is None else _checked_transition(transition)
  first = base.check_integer("forward_correction: from_epoch", from_epoch or 0, 0)
  if known is None and first == 0:
    raise base.InputError(
      f"forward_correction: from_epoch={from_epoch} must be at least 1, because T is"
      " estimated from a trained network; or pass transition."
    )
  label_transition.check_estimator(estimator)
  label_transition.check_percentile(percentile)

  def init(key, problem, params):
    del key, params
    shape = (problem.num_classes, problem.num_classes)
    if known is not None and known.shape != shape:
      raise base.InputError(
        f"forward_correction: transition has shape {known.shape}; the data need"
        f" {shape}."
      )
    starts_known = known is not None and first == 0
    return jnp.asarray(known if starts_known else np.eye(shape[0]), jnp.float32)

  def gradients(state, problem, inputs):
    def corrected(outputs, batch):
      return losses.forward_corrected(losses.logits_of(outputs), batch["label"], state)

    problem = dataclasses.replace(problem, loss=corrected)
    gradients = weighted_update.uniform_gradients(problem, inputs)
    metrics = {"transition_diagonal": jnp.diag(state).mean()}
    return gradients._replace(metrics=metrics), state

  def refresh(state, problem, view):
    if view.epoch != first:
      return state
    if known is not None:
      return jnp.asarray(known, jnp.float32)
    estimate = label_transition.estimate_from_network(
      estimator, problem, view, percentile
    )
    return estimate.astype(jnp.float32)

  return base.Method(gradients, init=init, refresh=refresh)


def _checked_transition(transition):
  matrix = np.asarray(transition, np.float64)
  is_square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
  if not is_square or (matrix < 0).any() or not np.allclose(matrix.sum(axis=1), 1):
    raise base.InputError(
      "forward_correction: transition must be [C, C], and row i must be a distribution"
      f" of the labels given to class i, with sum 1; got shape {matrix.shape}."
    )
  return matrix
