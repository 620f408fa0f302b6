"""Floor 1: raw scores to example weights."""

import jax.numpy as jnp

from l2rw_jax import base


def sum_to_one(scores: base.Array, axis_name: base.AxisName = None) -> base.Array:
  """Divides non-negative scores [B] by their sum over all devices.

  All-zero scores stay all zero: the paper's delta guard,
  w_i = s_i / (S + delta(S)) with delta(S) = 1 if S = 0 else 0.
  NaN stays NaN, so that a broken score is never mistaken for a rejection, and
  the largest score is divided out first, so that no sum overflows. Sums and
  quotients of float16 and bfloat16 are taken in float32.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning" (2018),
    eq. (8)-(9).
  """
  base.check_vector("scores", scores)
  given = scores.dtype
  # A sum of small float16 numbers underflows, and so does its reciprocal.
  scores = scores.astype(base.accumulator_dtype(given))
  largest = base.pmax(jnp.max(scores, initial=0), axis_name)
  scores = scores / jnp.where(largest == 0, 1, largest)
  total = base.psum(jnp.sum(scores), axis_name)
  weights = scores / jnp.where(total == 0, 1, total)
  return weights.astype(given) if jnp.issubdtype(given, jnp.inexact) else weights


def rectify(scores: base.Array, axis_name: base.AxisName = None) -> base.Array:
  """max(scores, 0) made to sum to one over all devices, shape [B].

  >>> import jax.numpy as jnp
  >>> print(rectify(jnp.array([3., -2., 1.])))
  [0.75 0.   0.25]
  """
  return sum_to_one(jnp.maximum(scores, 0), axis_name)
