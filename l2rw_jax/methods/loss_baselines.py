"""Losses that papers compare with, as methods: the mean of another loss.

Each factory returns a `base.Method` whose weights are uniform unless said otherwise;
`changed_loss` puts any other weights on any of these losses.
"""

import functools

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import losses as losses_lib
from l2rw_jax.methods import baselines
from l2rw_jax.methods import changed_loss


def focal(gamma: float = 2.0) -> base.Method:
  """The mean of `losses.focal`.

  Raises:
    InputError: `gamma` is negative.
  """
  return _on(baselines.uniform(), functools.partial(losses_lib.focal, gamma=gamma))


def class_balanced_focal(
  gamma: float = 2.0, beta: float = 0.9999, from_epoch: int = 0
) -> base.Method:
  """`losses.focal` under the weights of `baselines.class_balanced`.

  The focal loss holds from the start, `from_epoch` is that of the weights.

  Raises:
    InputError: a setting out of range.
  """
  focal_loss = functools.partial(losses_lib.focal, gamma=gamma)
  return _on(baselines.class_balanced(beta, from_epoch), focal_loss)


def bootstrapping(kind: str, beta: float | None = None) -> base.Method:
  """The mean of `losses.bootstrapping_soft` or `losses.bootstrapping_hard`.

  Args:
    kind: "soft" or "hard".
    beta: share of the given label, in [0, 1]; None is the paper's, 0.95 or 0.8.

  Raises:
    InputError: a setting out of range.
  """
  kinds = {"soft": losses_lib.bootstrapping_soft, "hard": losses_lib.bootstrapping_hard}
  if kind not in kinds:
    raise base.InputError(f"bootstrapping: kind={kind!r}; choose 'soft' or 'hard'.")
  loss_fn = kinds[kind] if beta is None else functools.partial(kinds[kind], beta=beta)
  return _on(baselines.uniform(), loss_fn)


def symmetric_cross_entropy(alpha: float = 0.1, beta: float = 1.0) -> base.Method:
  """The mean of `losses.symmetric_cross_entropy`.

  Raises:
    InputError: a setting out of range.
  """
  loss_fn = losses_lib.symmetric_cross_entropy
  return _on(baselines.uniform(), functools.partial(loss_fn, alpha=alpha, beta=beta))


def generalized_cross_entropy(
  q: float = 0.7, threshold: float | None = None
) -> base.Method:
  """The mean of `losses.generalized_cross_entropy`, truncated given a threshold.

  Raises:
    InputError: a setting out of range.
  """
  loss_fn = losses_lib.generalized_cross_entropy
  return _on(baselines.uniform(), functools.partial(loss_fn, q=q, threshold=threshold))


def _on(method, loss_fn):
  """`method` on `(logits, labels) -> [B]`, whose settings are checked here already."""
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  jax.eval_shape(loss_fn, jax.ShapeDtypeStruct((1, 2), jnp.float32), label)

  def loss(outputs, batch, class_counts):
    del class_counts
    return loss_fn(losses_lib.logits_of(outputs), batch["label"])

  return changed_loss.changed_loss(method, loss)
