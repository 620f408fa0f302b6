"""BARE: an example is kept if its label is likelier than usual in its batch.

Needs no clean data, no noise rate and no second network: the threshold of every
class is a mean plus a deviation of posterior probabilities within the batch.

References:
  Patel, Sastry, "Adaptive Sample Selection for Robust Learning under Label Noise"
  (https://arxiv.org/abs/2106.15292), WACV 2023.
"""

import math

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import losses as losses_lib
from l2rw_jax import normalization

STATISTICS = ("batch_column", "own_label")
# The released code keeps probabilities this far from 0 and 1.
_MARGIN = 1e-8
# Relative rounding errors of a probability that lies on the mean, and then some.
_SLACK = 8


def select(
  logits: base.Array,
  labels: base.Array,
  *,
  kappa: float = 1.0,
  statistics: str = "batch_column",
  axis_name: base.AxisName = None,
) -> base.Array:
  """Which examples p_i[y_i] >= mu_{y_i} + kappa sigma_{y_i} keeps, bool [B].

  Mean mu_c and deviation sigma_c are of the class's probabilities p_i[c]

  - over all examples i of the global batch, deviation with B - 1 in the
    denominator ("batch_column": the released code), or
  - over the examples labeled c, with their number in the denominator
    ("own_label": the paper's formula as it is reported). By Cantelli's inequality
    this keeps at most 1 / (1 + kappa^2) of a class, and with a few wrong labels
    and a confident network nothing at all, which is why it is not the default.

  Nothing may be kept; what then is up to the caller (`example_weights`: all).
  In a batch of one example there is no deviation, and it is not kept. What lies on
  the threshold is: 8 eps mu_c (1e-6 mu_c in float32) are let pass, so that where all
  probabilities are alike rounding does not drop whole classes.

  An example whose label names no class, or whose logits hold a NaN, is not kept;
  `example_weights` gives NaN for the whole batch then, since NaN logits enter the
  statistics of all.

  Args:
    logits: [B, C], or [B, 1] of a binary classifier.
    labels: given classes, integers [B].
    kappa: deviations above the mean, at least 0, finite.
    statistics: "batch_column" or "own_label".
    axis_name: mapped device axis over which the batch is split.

  Raises:
    InputError: unknown statistics, `kappa` out of range, or wrong shapes.
  """
  _check(kappa, statistics)
  losses_lib.check_logits(logits, labels)
  # Constant before the collectives; statistics of half precision are in single.
  dtype = base.accumulator_dtype(logits.dtype)
  logits = jax.lax.stop_gradient(logits).astype(dtype)
  probabilities = jnp.exp(losses_lib.log_probabilities(logits))
  columns = jnp.clip(probabilities, _MARGIN, 1 - _MARGIN)
  is_label = losses_lib.label_mask(labels, columns.shape[1])
  at_label = jnp.where(is_label, columns, 0).sum(axis=1)
  if statistics == "own_label":
    members = is_label.astype(columns.dtype)
    mean, deviation, defined = _moments(columns, members, 0, axis_name)
  else:
    mean, deviation, defined = _moments(columns, jnp.ones_like(columns), 1, axis_name)
  slack = _SLACK * jnp.finfo(columns.dtype).eps
  # A lone example has no deviation, so that nothing is kept.
  threshold = jnp.where(defined, (1 - slack) * mean + kappa * deviation, jnp.inf)
  of_label = jnp.where(is_label, threshold[None, :], 0).sum(axis=1)
  return is_label.any(axis=1) & (at_label >= of_label)


def _moments(columns, members, lost, axis_name):
  """Of the members of each column, over all devices, [C] each.

  Returns:
    Means, deviations, and whether there are enough members for a deviation.
  """
  count = base.psum(members.sum(axis=0), axis_name)
  # From the least member on: the mean of equal numbers is this number, exactly.
  least = -base.pmax(jnp.where(members > 0, -columns, -1).max(axis=0), axis_name)
  excess = base.psum((members * (columns - least[None, :])).sum(axis=0), axis_name)
  mean = least + excess / jnp.maximum(count, 1)
  squares = (members * (columns - mean[None, :]) ** 2).sum(axis=0)
  left = count - lost
  variance = base.psum(squares, axis_name) / jnp.maximum(left, 1)
  return mean, jnp.sqrt(variance), left > 0


def example_weights(
  logits: base.Array,
  labels: base.Array,
  *,
  kappa: float = 1.0,
  statistics: str = "batch_column",
  axis_name: base.AxisName = None,
) -> base.Array:
  """Weights of the kept examples, all equal, of sum 1 over the global batch.

  If none is kept, all are: the released code then takes the plain mean. (The
  paper's text, as it is reported, does not say.)

  Args:
    logits: [B, C], or [B, 1] of a binary classifier.
    labels: given classes, [B].
    kappa: see `select`.
    statistics: see `select`.
    axis_name: mapped device axis over which the batch is split.

  Returns:
    Weights [B], constant in the logits. All are NaN if a logit is NaN or a label
    names no class.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[2., 0, 0], [0, 2, 0], [0, 0, 2], [1, 0, 0], [0, 1, 0]])
  >>> weights = example_weights(logits, jnp.array([0, 1, 2, 0, 1]))
  >>> print(jnp.array_str(weights, precision=2))
  [0.33 0.33 0.33 0.   0.  ]
  """
  kept = select(logits, labels, kappa=kappa, statistics=statistics, axis_name=axis_name)
  return _equal_weights(kept, logits, labels, logits.dtype, axis_name)


def _equal_weights(kept, logits, labels, dtype, axis_name):
  none = base.psum(kept.sum(), axis_name) == 0
  weights = normalization.sum_to_one((kept | none).astype(dtype), axis_name)
  is_label = losses_lib.label_mask(labels, max(logits.shape[1], 2))
  bad = jnp.isnan(jax.lax.stop_gradient(logits)).any(axis=1) | ~is_label.any(axis=1)
  any_bad = base.psum(bad.sum(), axis_name) > 0
  return weights * jnp.sqrt(jnp.where(any_bad, -1.0, 1.0)).astype(dtype)


def bare(kappa: float = 1.0, statistics: str = "batch_column") -> base.Method:
  """Trains on the examples that `select` keeps.

  Logs the `kept_share` of the batch, 0 where nothing is kept and all are trained
  on. Evaluation knows nothing of the selection (the released code selects there too
  before it averages the loss).

  Args:
    kappa: see `select`; the paper's is 1.
    statistics: see `select`.

  Raises:
    InputError: as `select`.
  """
  _check(kappa, statistics)

  def gradients(state, problem, inputs):
    def losses_fn(params, batch):
      outputs, model_state = problem.forward(
        params, inputs.model_state, batch, inputs.key, True
      )
      return problem.loss(outputs, batch), (outputs, model_state)

    linearized = problem.linearize(
      losses_fn,
      base.local(inputs.params, problem.axis_name),
      inputs.batch,
      has_aux=True,
    )
    outputs, model_state = linearized.aux
    kept = select(
      losses_lib.logits_of(outputs),
      inputs.batch["label"],
      kappa=kappa,
      statistics=statistics,
      axis_name=problem.axis_name,
    )
    weights = _equal_weights(
      kept,
      losses_lib.logits_of(outputs),
      inputs.batch["label"],
      linearized.losses.dtype,
      problem.axis_name,
    )
    grads = base.psum(linearized.weighted_gradient(weights), problem.axis_name)
    kept_share = base.pmean(kept.mean(), problem.axis_name)
    found = base.Gradients(
      grads, weights, linearized.losses, model_state, {"kept_share": kept_share}
    )
    return found, state

  return base.Method(gradients)


def _check(kappa, statistics):
  if statistics not in STATISTICS:
    raise base.InputError(
      f"statistics={statistics!r}: choose 'batch_column' or 'own_label'."
    )
  if not 0 <= kappa < math.inf:
    raise base.InputError(f"kappa={kappa} must be at least 0, and finite.")
