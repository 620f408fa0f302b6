"""Normalization of scores into example weights."""

import jax
import jax.numpy as jnp

from l2rw_jax import base


def sum_to_one(scores: base.Array, axis_name: base.AxisName = None) -> base.Array:
  """Divides non-negative scores [B] by their sum over all devices.

  If all scores are zero, so are the weights, as in the paper:
  w_i = s_i / (S + delta(S)) with delta(S) = 1 if S = 0 else 0.
  A NaN, infinite or negative score makes every weight NaN, so that it cannot be
  mistaken for a score of zero.
  Scores are first divided by the largest one, so that their sum cannot overflow. Sums
  and quotients of float16 and bfloat16 are computed in float32.

  Args:
    scores: non-negative scores of this device, [B].
    axis_name: mapped axis over which the batch is sharded.

  Returns:
    Weights [B] of the type of `scores`, or of the default floating-point type for
    integers.

  Raises:
    InputError: `scores` does not have shape [B].

  Reference:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning" (2018),
    eq. (8)-(9).
  """
  base.check_vector("scores", scores)
  dtype = scores.dtype
  # In float16, sums could overflow, and small numbers and reciprocals could underflow.
  scores = scores.astype(base.accumulator_dtype(dtype))
  # The weights do not depend on this number, so its derivative is not needed.
  largest = base.pmax(jax.lax.stop_gradient(jnp.max(scores, initial=0)), axis_name)
  # sqrt(-1) is computed only for bad scores. A constant NaN would also raise an error
  # under `jax_debug_nans` for good scores.
  sign = jnp.sqrt(jnp.where(jnp.any(scores < 0), -1.0, 1.0)).astype(scores.dtype)
  scores = base.divide_by_largest(scores, largest) * sign
  total = base.psum(jnp.sum(scores), axis_name)
  weights = scores / jnp.where(total == 0, 1, total)
  return weights.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else weights


def rectify(scores: base.Array, axis_name: base.AxisName = None) -> base.Array:
  """max(scores, 0), divided by its sum over all devices, [B].

  Everything else is as in `sum_to_one`, including the errors.

  >>> import jax.numpy as jnp
  >>> print(rectify(jnp.array([3., -2., 1.])))
  [0.75 0.   0.25]
  """
  return sum_to_one(jnp.maximum(scores, 0), axis_name)


def equal_weights(scores: base.Array, axis_name: base.AxisName = None) -> base.Array:
  """Equal weights for all positive scores, and 0 for the others, [B].

  The weights sum to 1 over all devices. With L2RW's scores, this rule is not that of
  the paper. Everything else is as in `sum_to_one`, including the errors; no gradient
  flows to the scores.

  >>> import jax.numpy as jnp
  >>> print(equal_weights(jnp.array([3., -2., 1.])))
  [0.5 0.  0.5]
  """
  base.check_vector("scores", scores)
  is_float = jnp.issubdtype(scores.dtype, jnp.inexact)
  dtype = scores.dtype if is_float else jnp.result_type(float)
  # The comparison would otherwise turn NaN and infinity into finite weights.
  bad = jnp.where(jnp.isfinite(scores) | (scores < 0), 0, scores).astype(dtype)
  chosen = (scores > 0).astype(dtype) + jax.lax.stop_gradient(bad)
  return sum_to_one(chosen, axis_name)
