"""Floor 1: per-example losses, arrays in, [B] out."""

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
  """Predicted class [B]: the largest logit, or the sign of a single one."""
  if logits.ndim != 2:
    raise base.InputError(f"logits must be [B, C]; got {logits.shape}.")
  if logits.shape[1] == 1:
    return (logits[:, 0] > 0).astype(jnp.int32)
  return jnp.argmax(logits, axis=-1)


def _check_logits(logits, labels):
  if logits.ndim != 2 or labels.shape != logits.shape[:1]:
    raise base.InputError(
      f"logits must be [B, C] and labels [B]; got {logits.shape} and {labels.shape}."
    )
