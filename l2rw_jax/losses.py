"""Per-example losses [B], in nats, of logits and labels.

These rules hold for every loss of this module. Other formulas of the library that take
logits and labels follow them as far as they apply, unless a docstring says otherwise.

- Shapes and types are checked when the function is traced; a mismatch raises
  `base.InputError`. Logits are floating-point numbers; labels are integers [B], not
  one-hot and not of shape [B, 1]. Labels, `where`, class counts and transition
  matrices may be lists; logits are arrays.
- A single logit per row, [B, 1], is the logit of class 1 of two classes; class 0 has
  logit 0. Only `softmax_cross_entropy` refuses single logits.
- A label that is not a class (negative, or at least C) gives a NaN loss, and a NaN
  gradient unless the loss is constant there, so that the mistake is noticed. Exclude
  such examples with `where`.
- `where`, bool [B], selects the examples that count. All others have a loss of 0 and a
  gradient of 0, regardless of their labels and logits.
- Sums over half-precision logits are computed in float32; losses have the type of the
  logits.
- Settings (`gamma`, `q`, ...) may be traced, for instance by `jax.vmap` over several of
  them. They are then not checked.
- Losses and their gradients are finite if the logit of the label is finite, the others
  are finite or -inf (a single logit may be -inf if the label is 0), and differences of
  finite logits are far from the overflow of their type. Exceptions are the losses
  `balanced_softmax` and `logit_adjusted`, which are infinite for labels of classes
  without training examples, and `forward_corrected`, which is infinite if every class j
  with T_jy > 0 has a logit of -inf.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2rw_jax import base
from l2rw_jax import class_balance


def softmax_cross_entropy(
  logits: base.Array, labels: base.Array, *, where: base.Array | None = None
) -> base.Array:
  """The cross-entropy -log softmax(logits)[label].

  Args:
    logits: [B, C], C at least 2.
    labels: integer class of each example, [B].
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: the shapes or types do not match.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.zeros((3, 4)), jnp.array([0, 7, -1])
  >>> print(abs(softmax_cross_entropy(logits, labels, where=labels >= 0)))
  [1.3862944       nan 0.       ]
  """
  check_logits(logits, labels, where)
  if logits.shape[1] < 2:
    raise base.InputError(
      "softmax_cross_entropy: logits [B, 1] have a softmax of 1 everywhere; use"
      " sigmoid_cross_entropy for a single logit per example."
    )
  dtype = logits.dtype
  logits, labels, scale = _safe(logits, labels, where)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return (loss * scale).astype(dtype)


def sigmoid_cross_entropy(
  logits: base.Array, labels: base.Array, *, where: base.Array | None = None
) -> base.Array:
  """The cross-entropy of two classes with one logit per example.

  Args:
    logits: [B, 1].
    labels: 0 or 1, [B].
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: the shapes or types do not match.
  """
  check_logits(logits, labels, where)
  if logits.shape[1] != 1:
    raise base.InputError(
      f"sigmoid_cross_entropy: logits must be [B, 1]; got {logits.shape}. Use"
      " softmax_cross_entropy for a logit per class."
    )
  dtype = logits.dtype
  logits, labels, scale = _safe(logits, labels, where)
  # The logit of the label minus that of the other class. optax's sum over both classes
  # would multiply 0 and infinity if a logit is infinite.
  difference = jnp.where(labels == 1, logits[:, 0], -logits[:, 0])
  return (-jax.nn.log_sigmoid(difference) * scale).astype(dtype)


def predictions(logits: base.Array) -> base.Array:
  """Predicted classes [B] or [B, ...]: the largest logit, or the sign of a single one.

  Args:
    logits: [B, C] or [B, ..., C]; C = 1 is a single logit per prediction.

  Raises:
    InputError: the logits are not an array or have fewer than two axes.
  """
  _check_array("logits", logits)
  if logits.ndim < 2:
    raise base.InputError(f"logits must be [B, C] or [B, ..., C]; got {logits.shape}.")
  if logits.shape[-1] == 1:
    return (logits[..., 0] > 0).astype(jnp.int32)
  return jnp.argmax(logits, axis=-1)


def log_probabilities(logits: base.Array) -> base.Array:
  """Log-probabilities [B, max(C, 2)] of logits [B, C].

  >>> import jax.numpy as jnp
  >>> print(jnp.exp(log_probabilities(jnp.log(jnp.array([[3.]])))))
  [[0.25 0.75]]

  Raises:
    InputError: the logits are not an array or do not have two axes.
  """
  _check_array("logits", logits)
  if logits.ndim != 2:
    raise base.InputError(f"logits must be [B, C]; got {logits.shape}.")
  if logits.shape[1] == 1:
    return jax.nn.log_sigmoid(jnp.concatenate([-logits, logits], axis=1))
  return jax.nn.log_softmax(logits, axis=1)


def logits_of(outputs: Any) -> base.Array:
  """The logits [B, C] in the outputs of `base.Problem.forward`."""
  return outputs[0] if isinstance(outputs, tuple) else outputs


def focal(
  logits: base.Array,
  labels: base.Array,
  gamma: float = 2.0,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """The focal loss, (1 - p_y)^gamma times the cross-entropy.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    gamma: at least 0; 0 gives the cross-entropy. The experiments of LDAM use 1, with
      p_y = exp(-loss) of a loss that is already scaled by class weights.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: `gamma` is negative or infinite, or the shapes or types do not match.

  References:
    Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection",
    ICCV 2017, eq. (4).
  """
  gamma = base.setting(gamma)
  _check(
    base.is_traced(gamma) or 0 <= gamma < math.inf,
    f"focal: gamma={gamma} must be at least 0, and finite",
  )
  log_p, is_label, scale = label_rows(logits, labels, where)
  gamma = base.setting(gamma, log_p.dtype)
  others = jnp.where(is_label, -jnp.inf, log_p)
  # The power (1 - p_y)^gamma is computed from log(1 - p_y), so that neither the power
  # nor its gradient can be 0 / 0. If all other classes have a logit of -inf, 1 - p_y is
  # 0 and has no logarithm.
  is_sure = jnp.all(jnp.isneginf(others), axis=1)
  log_rest = jax.nn.logsumexp(jnp.where(is_sure[:, None], 0, others), axis=1)
  # This is 0^gamma. The derivative of the power with respect to gamma would be NaN.
  at_zero = jnp.asarray(gamma == 0, log_p.dtype)
  factor = jnp.where(is_sure, at_zero, jnp.exp(gamma * log_rest))
  return (-factor * _at(log_p, is_label) * scale).astype(logits.dtype)


def symmetric_cross_entropy(
  logits: base.Array,
  labels: base.Array,
  alpha: float = 0.1,
  beta: float = 1.0,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """alpha times the cross-entropy plus beta times the reverse cross-entropy.

  The reverse cross-entropy is -sum_j p_j log t_j with the one-hot target t. As in the
  release of ABSGD, log 0 is replaced by log 1e-4 = -9.21, and p_j is at least 1e-7.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    alpha: factor of the cross-entropy, at least 0.
    beta: factor of the reverse cross-entropy, at least 0.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: a factor is negative or infinite, both are 0, or the shapes or types do
      not match.

  References:
    Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric Cross Entropy for Robust Learning
    with Noisy Labels", ICCV 2019. The defaults are those of ABSGD (Qi et al., 2023)
    on Clothing1M.
  """
  alpha, beta = base.setting(alpha), base.setting(beta)
  _check(
    base.is_traced(alpha, beta) or min(alpha, beta) >= 0 < alpha + beta < math.inf,
    f"symmetric_cross_entropy: alpha={alpha}, beta={beta} must be finite and not"
    " negative, and one must be positive",
  )
  log_p, is_label, scale = label_rows(logits, labels, where)
  alpha, beta = (base.setting(x, log_p.dtype) for x in (alpha, beta))
  p = jnp.maximum(jnp.exp(log_p), 1e-7)
  elsewhere = jnp.where(is_label, 0, p).sum(axis=1)
  loss = -alpha * _at(log_p, is_label) - beta * math.log(1e-4) * elsewhere
  return (loss * scale).astype(logits.dtype)


def generalized_cross_entropy(
  logits: base.Array,
  labels: base.Array,
  q: float = 0.7,
  threshold: float | None = None,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """(1 - p_y^q) / q, the cross-entropy as q -> 0 and 1 - p_y at q = 1.

  With a threshold k, the loss is truncated: it is the constant (1 - k^q) / q where p_y
  is at most k. The release of ABSGD subtracts this constant from the loss and
  multiplies the difference by 0 or 1; the gradients are the same.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    q: in (0, 1], at least 1e-30.
    threshold: k, in (0, 1); None for no truncation.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: `q` or `threshold` is out of range, or the shapes or types do not match.

  References:
    Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
    Networks with Noisy Labels", NeurIPS 2018.
  """
  name = "generalized_cross_entropy"
  q, threshold = base.setting(q), base.setting(threshold)
  # In float32, 1e-40 would become 0.
  _check(
    base.is_traced(q) or 1e-30 <= q <= 1,
    f"{name}: q={q} must be in (0, 1], at least 1e-30",
  )
  log_p, is_label, scale = label_rows(logits, labels, where)
  q, threshold = (base.setting(x, log_p.dtype) for x in (q, threshold))
  log_p = _at(log_p, is_label)
  if threshold is not None:
    _check(
      base.is_traced(threshold) or 0 < threshold < 1,
      f"{name}: threshold={threshold} must be in (0, 1)",
    )
    # In float32, a known threshold of 1e-40 would become 0.
    is_traced = base.is_traced(threshold)
    limit = jnp.log(threshold) if is_traced else math.log(threshold)
    log_p = jnp.where(log_p <= limit, limit, log_p)
  return (-jnp.expm1(q * log_p) / q * scale).astype(logits.dtype)


def bootstrapping_soft(
  logits: base.Array,
  labels: base.Array,
  beta: float = 0.95,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """The cross-entropy between the target beta t + (1 - beta) p and p.

  t is the one-hot label, and p is the prediction. The gradient also flows through p in
  the target: the loss is beta times the cross-entropy plus (1 - beta) times the entropy
  of p.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    beta: weight of the label in the target, in [0, 1].
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: `beta` is outside [0, 1], or the shapes or types do not match.

  References:
    Reed, Lee, Anguelov, Szegedy, Erhan, Rabinovich, "Training Deep Neural Networks
    on Noisy Labels with Bootstrapping", 2014 (arXiv 1412.6596).
  """
  beta = _share("bootstrapping_soft", beta)
  log_p, is_label, scale = label_rows(logits, labels, where)
  beta = base.setting(beta, log_p.dtype)
  # A class with a logit of -inf contributes 0 log 0 = 0.
  finite = jnp.where(jnp.isneginf(log_p), 0, log_p)
  entropy = -jnp.sum(jnp.exp(log_p) * finite, axis=1)
  loss = -beta * _at(log_p, is_label) + (1 - beta) * entropy
  return (loss * scale).astype(logits.dtype)


def bootstrapping_hard(
  logits: base.Array,
  labels: base.Array,
  beta: float = 0.8,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """`bootstrapping_soft` with the one-hot prediction in place of the probabilities.

  The one-hot prediction is piecewise constant, so that no gradient flows through it.
  The arguments, the result and the errors are those of `bootstrapping_soft`.
  """
  beta = _share("bootstrapping_hard", beta)
  log_p, is_label, scale = label_rows(logits, labels, where)
  beta = base.setting(beta, log_p.dtype)
  predicted = jnp.max(log_p, axis=1)
  loss = -beta * _at(log_p, is_label) - (1 - beta) * predicted
  return (loss * scale).astype(logits.dtype)


def forward_corrected(
  logits: base.Array,
  labels: base.Array,
  transition: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """-log sum_j p_j T_jy, the cross-entropy of the noisy label y.

  Args:
    logits: [B, C] or [B, 1].
    labels: possibly wrong class of each example, [B].
    transition: T [C, C] (C = 2 for a single logit), where T_jy is the probability that
      an example of class j has the label y; rows sum to 1. If column y is zero, the
      loss is -log(tiny), where tiny is the smallest normal number, and its gradient is
      zero up to rounding.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: the shapes or types do not match.

  References:
    Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label
    Noise: a Loss Correction Approach", CVPR 2017, theorem 2.
  """
  log_p, is_label, scale = label_rows(logits, labels, where)
  classes = log_p.shape[1]
  _check(
    np.shape(transition) == (classes, classes),
    f"forward_corrected: transition has shape {np.shape(transition)}; {classes}"
    f" classes need ({classes}, {classes})",
  )
  transition = jnp.asarray(transition, log_p.dtype)
  tiny = jnp.finfo(log_p.dtype).tiny
  # Only the columns of the labels, [B, C], are needed: all C^2 logarithms would take
  # longer than the step of a small network.
  column = base.take(transition.T, jnp.argmax(is_label, axis=1))
  is_impossible = jnp.all(column == 0, axis=1, keepdims=True)
  column = jnp.where(is_impossible, tiny, column)
  log_column = jnp.where(
    column == 0, -jnp.inf, jnp.log(jnp.where(column == 0, 1, column))
  )
  loss = _transition_loss(log_p, log_column)
  return (loss * scale).astype(logits.dtype)


def balanced_softmax(
  logits: base.Array,
  labels: base.Array,
  class_counts: base.Array,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """-log(n_y exp(z_y) / sum_j n_j exp(z_j)), with n_j training examples of class j.

  Use the counts only in the training loss. For predictions, use the logits z alone,
  which then describe equally frequent classes. This loss is `logit_adjusted` with
  tau = 1, because a common factor of the counts cancels.

  Args:
    logits: z, [B, C] or [B, 1].
    labels: integer class of each example, [B].
    class_counts: n, [C] (C = 2 for a single logit), non-negative, in any unit. A class
      without examples has probability 0 in this loss, and its logit has no gradient. An
      example with the label of such a class has an infinite loss and no gradient.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: the shapes or types do not match, or `class_counts` are invalid, see
      `class_balance.inverse_frequency`.

  References:
    Ren, Yu, Sheng, Ma, Zhao, Yi, Li, "Balanced Meta-Softmax for Long-Tailed Visual
    Recognition", NeurIPS 2020; without its meta sampler.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.zeros((3, 2)), jnp.array([0, 1, 1])
  >>> losses = balanced_softmax(logits, labels, jnp.array([3, 1]))
  >>> print(jnp.exp(-losses).round(2))
  [0.75 0.25 0.25]
  """
  return _count_adjusted(logits, labels, class_counts, 1.0, where)


def logit_adjusted(
  logits: base.Array,
  labels: base.Array,
  class_counts: base.Array,
  tau: float = 1.0,
  *,
  where: base.Array | None = None,
) -> base.Array:
  """The cross-entropy of z + tau log pi, with pi_j the share of class j in training.

  Use the adjustment only in the training loss. For predictions, use the logits z alone.
  tau = 1 is `balanced_softmax`.

  Args:
    logits: z, [B, C] or [B, 1].
    labels: integer class of each example, [B].
    class_counts: number of training examples of each class; see `balanced_softmax`.
    tau: at least 0. 0 gives the cross-entropy, even for classes without examples.
    where: which examples count, bool [B]; None is all.

  Returns:
    Losses [B].

  Raises:
    InputError: `tau` is negative or infinite, or another argument is invalid, see
      `balanced_softmax`.

  References:
    Menon, Jayasumana, Rawat, Jain, Veit, Kumar, "Long-tail Learning via Logit
    Adjustment", ICLR 2021 (the logit-adjusted softmax cross-entropy).
  """
  tau = base.setting(tau)
  _check(
    base.is_traced(tau) or 0 <= tau < math.inf,
    f"logit_adjusted: tau={tau} must be at least 0, and finite",
  )
  return _count_adjusted(logits, labels, class_counts, tau, where)


def transition_loss(
  log_p: base.Array, is_label: base.Array, log_t: base.Array
) -> base.Array:
  """-log sum_j p_j T_jy from log-probabilities; see `forward_corrected`.

  Args:
    log_p: log p, [B, C].
    is_label: mask of the label's column, bool [B, C].
    log_t: log T, [C, C].

  Returns:
    Losses [B]. If the sum is 0, the loss is infinite and has no gradient.
  """
  log_p, is_label, log_t = jnp.asarray(log_p), jnp.asarray(is_label), jnp.asarray(log_t)
  return _transition_loss(log_p, base.take(log_t.T, jnp.argmax(is_label, axis=1)))


def _transition_loss(log_p, log_column):
  """`transition_loss` with the column of log T of each label, [B, C]."""
  joint = log_p + log_column
  is_possible = ~jnp.all(jnp.isneginf(joint), axis=1)
  safe = jnp.where(is_possible[:, None], joint, 0)
  return jnp.where(is_possible, -jax.nn.logsumexp(safe, axis=1), jnp.inf)


def label_mask(labels: base.Array, num_classes: int) -> base.Array:
  """One-hot labels, bool [B, C]; a row is all False if its label is not a class."""
  labels = base.wide_integers(labels, num_classes)
  columns = jnp.arange(num_classes, dtype=labels.dtype)
  return labels[:, None] == columns[None, :]


def check_logits(
  logits: base.Array, labels: base.Array, where: base.Array | None = None
) -> None:
  """Raises InputError unless logits are floats [B, C] and labels integers [B].

  `where` must be None or bool [B].
  """
  _check_array("logits", logits)
  labels, shape = base.host_or_jax_array(labels), logits.shape
  if len(shape) != 2 or shape[1] < 1 or labels.shape != shape[:1]:
    raise base.InputError(
      "logits must be [B, C] and labels must be integers of shape [B]; got logits of"
      f" shape {shape} and labels of shape {labels.shape}."
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise base.InputError(
      f"logits must be floating-point numbers; got {logits.dtype}, in which losses"
      " would be rounded. Convert them with logits.astype(jnp.float32)."
    )
  if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == jnp.bool_):
    raise base.InputError(
      f"labels must be integers of shape [B]; got an array of {labels.dtype}. Convert"
      " them with labels.astype(int)."
    )
  if where is None:
    return
  where = base.host_or_jax_array(where)
  if where.shape != shape[:1] or where.dtype != jnp.bool_:
    raise base.InputError(
      f"where must be bool of shape {shape[:1]}; got {where.dtype} of shape"
      f" {where.shape}."
    )


def _check_array(name, value):
  """Raises InputError for a list, because the dtype of its array would be a guess."""
  if not hasattr(value, "dtype"):
    raise base.InputError(
      f"{name} must be an array; got a value of type {type(value).__name__}. Convert it"
      f" with jnp.asarray({name})."
    )


def label_scale(is_label: base.Array, where: base.Array | None = None) -> base.Array:
  """Factors of the losses: 0 if `where` is False, NaN if the row has no label, else 1.

  Losses are multiplied by these factors, so that the gradient of an example whose label
  is not a class is also NaN.

  Args:
    is_label: the result of `label_mask`, [B, C].
    where: which examples count, bool [B]; None is all.

  Returns:
    Factors [B] of the default floating-point type.
  """
  exists = jnp.any(jnp.asarray(is_label), axis=1)
  if where is None:
    # A constant NaN would raise an error under `jax_debug_nans` for every batch.
    return jnp.sqrt(jnp.where(exists, 1.0, -1.0))
  where = jnp.asarray(where)
  return jnp.where(where, jnp.sqrt(jnp.where(exists | ~where, 1.0, -1.0)), 0.0)


def label_rows(
  logits: base.Array, labels: base.Array, where: base.Array | None = None
) -> tuple[base.Array, base.Array, base.Array]:
  """Checks logits and labels and prepares them for a loss.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    where: which examples count, bool [B]; None is all.

  Returns:
    A tuple of
    log p, [B, max(C, 2)], in float32 or wider, uniform for examples that do not count;
    one-hot labels of the same shape, with class 0 for a label that is not a class;
    a factor for each loss, [B], see `label_scale`.

  Raises:
    InputError: the shapes or types do not fit.
  """
  check_logits(logits, labels, where)
  logits = _where_rows(where, logits)
  log_p = log_probabilities(logits.astype(base.accumulator_dtype(logits.dtype)))
  is_label = label_mask(labels, log_p.shape[1])
  scale = label_scale(is_label, where).astype(log_p.dtype)
  # Labels that are not a class are replaced by class 0, so that the factor NaN reaches
  # the gradient of the row.
  is_impossible = ~jnp.any(is_label, axis=1, keepdims=True)
  first = jnp.arange(log_p.shape[1])[None] == 0
  return log_p, is_label | (is_impossible & first), scale


def _where_rows(where, logits):
  """The logits [B, C], with zeros for the examples that do not count."""
  if where is None:
    return logits
  return jnp.where(jnp.asarray(where)[:, None], logits, 0)


def _safe(logits, labels, where):
  """Logits in float32 or wider, labels that are all valid, and factors of losses."""
  logits = _where_rows(where, logits.astype(base.accumulator_dtype(logits.dtype)))
  is_label = label_mask(labels, max(logits.shape[1], 2))
  scale = label_scale(is_label, where).astype(logits.dtype)
  return logits, jnp.argmax(is_label, axis=1), scale


def _count_adjusted(logits, labels, class_counts, tau, where):
  """The cross-entropy of logits + tau log counts, [B]; see `logit_adjusted`."""
  check_logits(logits, labels, where)
  class_balance.check_counts(class_counts, max(logits.shape[1], 2))
  dtype = logits.dtype
  logits, labels, scale = _safe(logits, labels, where)
  if logits.shape[1] == 1:
    logits = jnp.concatenate([jnp.zeros_like(logits), logits], axis=1)
  counts = class_balance.as_counts(class_counts)
  # The sum of the counts would cancel in the softmax.
  tau = base.setting(tau, counts.dtype)
  offsets = tau * jnp.log(jnp.where(counts == 0, 1, counts))
  is_absent = (counts == 0) & (tau > 0)
  # Rows whose label is of an absent class keep all logits, so that nothing is
  # inf - inf; their loss is replaced.
  is_infinite = base.take(is_absent, labels)
  is_out = is_absent[None, :] & ~is_infinite[:, None]
  adjusted = jnp.where(is_out, -jnp.inf, logits + offsets[None, :].astype(logits.dtype))
  loss = optax.softmax_cross_entropy_with_integer_labels(adjusted, labels) * scale
  # The scale is 0 for an excluded example, and NaN if the label is not a class. In both
  # cases the loss is not replaced.
  return jnp.where(is_infinite & (scale == 1), jnp.inf, loss).astype(dtype)


def _at(values, is_label):
  """The entries [B] of `values` [B, C] at the one-hot labels; 0 for an empty row."""
  return jnp.sum(jnp.where(is_label, values, 0), axis=1)


def _share(name, beta):
  """The setting beta of bootstrapping, which must be in [0, 1] unless it is traced."""
  beta = base.setting(beta)
  _check(
    base.is_traced(beta) or 0 <= beta <= 1, f"{name}: beta={beta} must be in [0, 1]"
  )
  return beta


def _check(holds, message):
  if not holds:
    raise base.InputError(f"{message}.")
