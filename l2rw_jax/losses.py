"""Floor 1: per-example losses, logits and labels in, [B] out, in nats.

All are finite, with finite gradients, however sure the logits are of a class.
A single logit a row, [B, 1], is that of class 1 of two; class 0 has logit 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from l2rw_jax import base


def softmax_cross_entropy(logits: base.Array, labels: base.Array) -> base.Array:
  """-log softmax(logits)[label], in nats.

  Args:
    logits: [B, C].
    labels: integer class of each example, [B].

  Returns:
    Losses [B].
  """
  _check_logits(logits, labels)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def sigmoid_cross_entropy(logits: base.Array, labels: base.Array) -> base.Array:
  """Cross-entropy of one logit an example, in nats.

  Args:
    logits: [B, 1].
    labels: 0 or 1, [B].

  Returns:
    Losses [B].
  """
  _check_logits(logits, labels)
  return optax.sigmoid_binary_cross_entropy(logits[:, 0], labels.astype(logits.dtype))


def predictions(logits: base.Array) -> base.Array:
  """Predicted class [B] or [B, ...]: the largest logit, or the sign of a single one."""
  if logits.ndim < 2:
    raise base.InputError(f"logits must be [B, C] or [B, ..., C]; got {logits.shape}.")
  if logits.shape[-1] == 1:
    return (logits[..., 0] > 0).astype(jnp.int32)
  return jnp.argmax(logits, axis=-1)


def log_probabilities(logits: base.Array) -> base.Array:
  """log p, [B, max(C, 2)], of logits [B, C].

  >>> import jax.numpy as jnp
  >>> print(jnp.exp(log_probabilities(jnp.log(jnp.array([[3.]])))))
  [[0.25 0.75]]
  """
  if logits.ndim != 2:
    raise base.InputError(f"logits must be [B, C]; got {logits.shape}.")
  if logits.shape[1] == 1:
    return jax.nn.log_sigmoid(jnp.concatenate([-logits, logits], axis=1))
  return jax.nn.log_softmax(logits, axis=1)


def logits_of(outputs: Any) -> base.Array:
  """The logits [B, C] among what `base.Task.forward` returns."""
  return outputs[0] if isinstance(outputs, tuple) else outputs


def focal(logits: base.Array, labels: base.Array, gamma: float = 2.0) -> base.Array:
  """(1 - p_y)^gamma times the cross-entropy: easy examples count less.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    gamma: at least 0, where it is the cross-entropy. LDAM's experiments take 1;
      there p_y is exp(-loss) of a loss that class weights have already scaled.

  Returns:
    Losses [B].

  Raises:
    InputError: `gamma` is negative, or the shapes do not fit.

  References:
    Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection",
    ICCV 2017, eq. (4).
  """
  _check_logits(logits, labels)
  _check(0 <= gamma < math.inf, f"focal: gamma={gamma} must be at least 0")
  if logits.shape[1] == 1:
    targets = labels.astype(logits.dtype)
    return optax.sigmoid_focal_loss(logits[:, 0], targets, gamma=gamma)
  log_p = jax.nn.log_softmax(logits, axis=1)
  others = jnp.where(_is_own(log_p, labels), -jnp.inf, log_p)
  # 1 - p_y by its logarithm: neither its power nor its slope can be 0 / 0.
  return -jnp.exp(gamma * jax.nn.logsumexp(others, axis=1)) * _own(log_p, labels)


def symmetric_cross_entropy(
  logits: base.Array, labels: base.Array, alpha: float = 0.1, beta: float = 1.0
) -> base.Array:
  """alpha times the cross-entropy plus beta times the reverse one.

  The reverse cross-entropy -sum_j p_j log t_j takes log 0 of the one-hot target t
  as log 1e-4 = -9.21, and p_j as at least 1e-7, as the release of ABSGD has it.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    alpha: factor of the cross-entropy, at least 0.
    beta: factor of the reverse cross-entropy, at least 0.

  Returns:
    Losses [B].

  Raises:
    InputError: a factor is negative or both are 0, or the shapes do not fit.

  References:
    Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric Cross Entropy for Robust Learning
    with Noisy Labels", ICCV 2019. The defaults are those with which ABSGD
    (Qi et al., 2023) trains on Clothing1M.
  """
  _check_logits(logits, labels)
  _check(
    min(alpha, beta) >= 0 < alpha + beta < math.inf,
    f"symmetric_cross_entropy: alpha={alpha}, beta={beta} must not be negative, and"
    " one must be more",
  )
  log_p = log_probabilities(logits)
  p = jnp.maximum(jnp.exp(log_p), 1e-7)
  elsewhere = jnp.where(_is_own(p, labels), 0, p).sum(axis=1)
  return -alpha * _own(log_p, labels) - beta * math.log(1e-4) * elsewhere


def generalized_cross_entropy(
  logits: base.Array,
  labels: base.Array,
  q: float = 0.7,
  threshold: float | None = None,
) -> base.Array:
  """(1 - p_y^q) / q: the cross-entropy as q -> 0, 1 - p_y at q = 1.

  Truncated, it is (1 - k^q) / q, without gradient, where p_y is at most k. ABSGD's
  release subtracts this constant and multiplies what is left by 0 or 1; the
  gradients are the same.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    q: in (0, 1].
    threshold: k, in (0, 1); None does not truncate.

  Returns:
    Losses [B].

  Raises:
    InputError: `q` or `threshold` out of range, or the shapes do not fit.

  References:
    Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
    Networks with Noisy Labels", NeurIPS 2018.
  """
  where = "generalized_cross_entropy"
  _check_logits(logits, labels)
  _check(0 < q <= 1, f"{where}: q={q} must be in (0, 1]")
  log_p = _own(log_probabilities(logits), labels)
  if threshold is not None:
    _check(0 < threshold < 1, f"{where}: threshold={threshold} must be in (0, 1)")
    limit = math.log(threshold)
    log_p = jnp.where(log_p <= limit, limit, log_p)
  return -jnp.expm1(q * log_p) / q


def bootstrapping_soft(
  logits: base.Array, labels: base.Array, beta: float = 0.95
) -> base.Array:
  """Cross-entropy to the target beta t + (1 - beta) p, mixed with the prediction.

  The gradient flows through the target too: the loss is beta times the
  cross-entropy plus (1 - beta) times the entropy of p. Were p held constant in the
  target, the second part would pull p towards p, which is no gradient at all, and
  only beta times the cross-entropy would be left.

  Args:
    logits: [B, C] or [B, 1].
    labels: integer class of each example, [B].
    beta: share of the given label, in [0, 1].

  Returns:
    Losses [B].

  Raises:
    InputError: `beta` outside [0, 1], or the shapes do not fit.

  References:
    Reed, Lee, Anguelov, Szegedy, Erhan, Rabinovich, "Training Deep Neural Networks
    on Noisy Labels with Bootstrapping", 2014 (arXiv 1412.6596).
  """
  _check_logits(logits, labels)
  _check(0 <= beta <= 1, f"bootstrapping_soft: beta={beta} must be in [0, 1]")
  log_p = log_probabilities(logits)
  entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=1)
  return -beta * _own(log_p, labels) + (1 - beta) * entropy


def bootstrapping_hard(
  logits: base.Array, labels: base.Array, beta: float = 0.8
) -> base.Array:
  """As `bootstrapping_soft`, mixed with the one predicted class instead.

  The prediction is piecewise constant: nothing flows through it.
  """
  _check_logits(logits, labels)
  _check(0 <= beta <= 1, f"bootstrapping_hard: beta={beta} must be in [0, 1]")
  log_p = log_probabilities(logits)
  predicted = _own(log_p, predictions(logits))
  return -beta * _own(log_p, labels) - (1 - beta) * predicted


def forward_corrected(
  logits: base.Array, labels: base.Array, transition: base.Array
) -> base.Array:
  """-log sum_j p_j T_jy: the cross-entropy of the label after it was corrupted.

  Args:
    logits: [B, C] or [B, 1].
    labels: given, possibly wrong, class of each example, [B].
    transition: T [C, C] (C = 2 for a single logit), T_jy the probability that an
      example of class j is given the label y; rows sum to 1. A label that no class
      can turn into costs -log of the smallest float, without gradient.

  Returns:
    Losses [B].

  Raises:
    InputError: the shapes do not fit.

  References:
    Patrini, Rozza, Menon, Nock, Qu, "Making Deep Neural Networks Robust to Label
    Noise: a Loss Correction Approach", CVPR 2017, theorem 2.
  """
  _check_logits(logits, labels)
  log_p = log_probabilities(logits)
  classes = log_p.shape[1]
  _check(
    jnp.shape(transition) == (classes, classes),
    f"forward_corrected: transition has shape {jnp.shape(transition)}; {classes}"
    f" classes need ({classes}, {classes})",
  )
  into = base.take(jnp.asarray(transition).T, labels)
  tiny = jnp.finfo(log_p.dtype).tiny
  into = jnp.where(jnp.any(into != 0, axis=1, keepdims=True), into, tiny)
  log_t = jnp.where(into == 0, -jnp.inf, jnp.log(jnp.where(into == 0, 1, into)))
  return -jax.nn.logsumexp(log_p + log_t, axis=1)


def _is_own(values, labels):
  return jnp.arange(values.shape[1])[None, :] == labels[:, None]


def _own(values, labels):
  return jnp.take_along_axis(values, labels[:, None], axis=1)[:, 0]


def _check(holds, message):
  if not holds:
    raise base.InputError(f"{message}.")


def _check_logits(logits, labels):
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise base.InputError(
      f"logits must be [B, C] and labels [B]; got {logits.shape} and {labels.shape}."
    )
