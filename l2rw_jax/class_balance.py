"""Floor 1: class counts to class weights."""

import jax.numpy as jnp

from l2rw_jax import base


def inverse_frequency(class_counts: base.Array) -> base.Array:
  """Weight of each class in proportion to 1 / its count, mean 1 over examples.

  sum_c counts_c * weight_c = sum_c counts_c, so that a loss averaged with these
  weights keeps the scale of the plain average. A class without examples gets 0.

  Args:
    class_counts: [C], non-negative.

  Returns:
    Weights [C].

  >>> import jax.numpy as jnp
  >>> print(inverse_frequency(jnp.array([30, 10])))
  [0.6666667 2.       ]
  """
  counts = jnp.asarray(class_counts, jnp.float32)
  base.check_vector("class_counts", counts)
  present = counts > 0
  inverse = jnp.where(present, 1 / jnp.where(present, counts, 1), 0)
  return inverse * counts.sum() / jnp.maximum(present.sum(), 1)
