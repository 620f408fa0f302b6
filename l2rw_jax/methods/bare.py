"""BARE: keeps examples whose labels are probable compared with the rest of the batch.

The threshold of a class is the mean plus a multiple of the standard deviation of the
predicted probabilities of that class within the batch. The method needs no clean data,
no noise rate and no second network.

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
# The released code clips probabilities to this distance from 0 and 1.
_MARGIN = 1e-8
# Tolerance for rounding of a probability that equals the mean, in units of epsilon.
_TOLERANCE = 8


def select(
  logits: base.Array,
  labels: base.Array,
  *,
  kappa: float = 1.0,
  statistics: str = "batch_column",
  axis_name: base.AxisName = None,
) -> base.Array:
  """Selects the examples with p_i[y_i] >= mu_{y_i} + kappa sigma_{y_i}, bool [B].

  The mean mu_c and the standard deviation sigma_c of the probabilities p_i[c] are taken

  - over all examples i of the global batch, with B - 1 in the denominator of the
    variance ("batch_column": the released code), or
  - over the examples labeled c, with their number in the denominator ("own_label": the
    paper's formula, as far as it is known to us). By Cantelli's inequality this keeps
    at most 1 / (1 + kappa^2) of a class whose sigma_c is not 0, and nothing at all if
    the network is confident and a few labels are wrong. It is therefore not the
    default.

  If no example is selected, `example_weights` gives all examples the same weight.
  In a batch of one example, the standard deviation of "batch_column" is undefined, and
  the example is not selected. Examples on the threshold are selected: a tolerance of
  8 eps mu_c (1e-6 mu_c in float32) prevents rounding from dropping whole classes when
  all probabilities are equal.

  An example whose label is not a class, or whose probabilities are NaN (because a
  logit is NaN or, with several logits, one is +inf or all are -inf), is not selected.
  `example_weights` gives NaN for the whole batch in both cases; NaN probabilities
  enter the statistics of all examples.

  Args:
    logits: [B, C], or [B, 1] of a binary classifier.
    labels: given labels, integers [B].
    kappa: number of standard deviations above the mean, at least 0, finite; may be
      traced.
    statistics: "batch_column" or "own_label".
    axis_name: mapped device axis over which the batch is split.

  Raises:
    InputError: `statistics` is unknown, `kappa` is out of range, the shapes or types do
      not match, or the batch is empty.
  """
  kappa = _checked(kappa, statistics)
  losses_lib.check_logits(logits, labels)
  base.check_not_empty("logits", logits)
  columns = jnp.clip(_probabilities(logits), _MARGIN, 1 - _MARGIN)
  is_label = losses_lib.label_mask(labels, columns.shape[1])
  at_label = jnp.where(is_label, columns, 0).sum(axis=1)
  if statistics == "own_label":
    members = is_label.astype(columns.dtype)
    mean, deviation, defined = _moments(columns, members, 0, axis_name)
  else:
    mean, deviation, defined = _moments(columns, jnp.ones_like(columns), 1, axis_name)
  tolerance = _TOLERANCE * jnp.finfo(columns.dtype).eps
  kappa = base.setting(kappa, columns.dtype)
  # If the deviation is undefined, nothing is selected.
  threshold = jnp.where(defined, (1 - tolerance) * mean + kappa * deviation, jnp.inf)
  of_label = jnp.where(is_label, threshold[None, :], 0).sum(axis=1)
  return is_label.any(axis=1) & (at_label >= of_label)


def _probabilities(logits):
  """Probabilities [B, max(C, 2)], constant under differentiation."""
  # Stop gradients before the collectives; half precision is accumulated in float32.
  dtype = base.accumulator_dtype(logits.dtype)
  logits = jax.lax.stop_gradient(logits).astype(dtype)
  return jnp.exp(losses_lib.log_probabilities(logits))


def _moments(columns, members, ddof, axis_name):
  """Moments of the members of each column, over all devices.

  Args:
    columns: [B, C].
    members: 1 for the entries that count and 0 for all others, [B, C].
    ddof: number that is subtracted from the number of members in the denominator of the
      variance.
    axis_name: mapped device axis.

  Returns:
    Means, standard deviations, and whether the latter are defined; [C] each.
  """
  count = base.psum(members.sum(axis=0), axis_name)
  # Values are relative to the smallest member, so that the mean of equal numbers is
  # exact.
  least = -base.pmax(jnp.where(members > 0, -columns, -1).max(axis=0), axis_name)
  excess = base.psum((members * (columns - least[None, :])).sum(axis=0), axis_name)
  mean = least + excess / jnp.maximum(count, 1)
  squares = (members * (columns - mean[None, :]) ** 2).sum(axis=0)
  denominator = count - ddof
  variance = base.psum(squares, axis_name) / jnp.maximum(denominator, 1)
  return mean, jnp.sqrt(variance), denominator > 0


def example_weights(
  logits: base.Array,
  labels: base.Array,
  *,
  kappa: float = 1.0,
  statistics: str = "batch_column",
  axis_name: base.AxisName = None,
) -> base.Array:
  """Equal weights for the selected examples, with sum 1 over the global batch.

  If no example is selected, all get equal weights, as in the released code. (The text
  of the paper, as far as it is known to us, does not cover this case.)

  Args:
    logits: [B, C], or [B, 1] of a binary classifier.
    labels: given labels, [B].
    kappa: see `select`.
    statistics: see `select`.
    axis_name: mapped device axis over which the batch is split.

  Returns:
    Weights [B], constant under differentiation. All are NaN if a probability is
    NaN (see `select`) or a label is not a class.

  Raises:
    InputError: see `select`.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[2., 0, 0], [0, 2, 0], [0, 0, 2], [1, 0, 0], [0, 1, 0]])
  >>> weights = example_weights(logits, jnp.array([0, 1, 2, 0, 1]))
  >>> print(jnp.array_str(weights, precision=2))
  [0.33 0.33 0.33 0.   0.  ]
  """
  kept = select(logits, labels, kappa=kappa, statistics=statistics, axis_name=axis_name)
  return _equal_weights(kept, logits, labels, logits.dtype, axis_name)


def _equal_weights(kept, logits, labels, dtype, axis_name):
  is_empty = base.psum(kept.sum(), axis_name) == 0
  weights = normalization.sum_to_one((kept | is_empty).astype(dtype), axis_name)
  is_label = losses_lib.label_mask(labels, max(logits.shape[1], 2))
  bad = jnp.isnan(_probabilities(logits)).any(axis=1) | ~is_label.any(axis=1)
  any_bad = base.psum(bad.sum(), axis_name) > 0
  return weights * jnp.sqrt(jnp.where(any_bad, -1.0, 1.0)).astype(dtype)


def bare(kappa: float = 1.0, statistics: str = "batch_column") -> base.Method:
  """Trains on the examples that `select` keeps.

  The method logs `kept_share`, the share of the batch that is selected. The share is 0
  if nothing is selected, although all examples are then used. Evaluation does not
  select examples (the released code does so before it averages the loss).

  Args:
    kappa: see `select`; 1 in the paper.
    statistics: see `select`.

  Returns:
    A `base.Method` without state.

  Raises:
    InputError: `statistics` is unknown, or `kappa` is out of range.
  """
  kappa = _checked(kappa, statistics)

  def gradients(state, problem, inputs):
    def losses_fn(params, batch):
      outputs, model_state = problem.forward(
        params, inputs.model_state, batch, inputs.key, True
      )
      return problem.loss(outputs, batch), (outputs, model_state)

    linearized = problem.linearize_batch(inputs, losses_fn)
    outputs, model_state = linearized.aux
    logits, labels = losses_lib.logits_of(outputs), inputs.batch["label"]
    kept = select(
      logits,
      labels,
      kappa=kappa,
      statistics=statistics,
      axis_name=problem.axis_name,
    )
    weights = _equal_weights(
      kept, logits, labels, linearized.losses.dtype, problem.axis_name
    )
    grads = base.summed_gradient(linearized, weights, problem.axis_name)
    metrics = {"kept_share": base.pmean(kept.mean(), problem.axis_name)}
    gradients = base.Gradients(grads, weights, linearized.losses, model_state, metrics)
    return gradients, state

  return base.Method(gradients)


def _checked(kappa, statistics):
  if statistics not in STATISTICS:
    raise base.InputError(
      f"statistics={statistics!r}: choose 'batch_column' or 'own_label'."
    )
  kappa = base.setting(kappa)
  if not (base.is_traced(kappa) or 0 <= kappa < math.inf):
    raise base.InputError(f"kappa={kappa} must be at least 0, and finite.")
  return kappa
