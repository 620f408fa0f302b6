"""Class weights from the number of examples of each class."""

import math

import jax
import jax.numpy as jnp

from l2rw_jax import base
from l2rw_jax import normalization


def inverse_frequency(class_counts: base.Array) -> base.Array:
  """Class weights in proportion to 1 / count, with mean 1 over the examples.

  sum_c counts_c * weight_c = sum_c counts_c, so that the weighted average of a loss has
  the scale of the plain average. A class without examples has weight 0.

  Args:
    class_counts: [C], non-negative.

  Returns:
    Weights [C].

  Raises:
    InputError: `class_counts` does not have shape [C], or holds a negative number, a
      NaN or an infinity. Under `jit` such a count makes every weight NaN instead.

  >>> import jax.numpy as jnp
  >>> print(inverse_frequency(jnp.array([30, 10])))
  [0.6666667 2.       ]
  """
  counts = as_counts(class_counts)
  present = counts != 0
  inverse = jnp.where(present, 1 / jnp.where(present, counts, 1), 0)
  num_present = jnp.maximum(present.sum(), 1).astype(counts.dtype)
  return inverse * counts.sum() / num_present


def effective_number(class_counts: base.Array, beta: float = 0.9999) -> base.Array:
  """Class weights in proportion to (1 - beta) / (1 - beta^n), with n the class's count.

  The weights have mean 1 over the classes that have examples; a class without examples
  has weight 0. beta = 0 gives equal weights, beta -> 1 weights in proportion to 1 / n.

  Args:
    class_counts: [C], non-negative.
    beta: in [0, 1).

  Returns:
    Weights [C].

  Raises:
    InputError: `beta` is out of range, or for the reasons of `inverse_frequency`.

  Reference:
    Cui, Jia, Lin, Song, Belongie, "Class-Balanced Loss Based on Effective Number of
    Samples", CVPR 2019. Scale and default are those of LDAM-DRW's released code.

  >>> import jax.numpy as jnp
  >>> print(effective_number(jnp.array([30, 10]), beta=0.9))
  [0.8096331 1.190367 ]
  """
  check_beta(beta)
  counts = as_counts(class_counts)
  present = counts != 0
  # `expm1` computes 1 - beta^n without cancellation. Absent classes avoid 0 * log 0.
  exponent = jnp.where(present, counts, 1) * (math.log(beta) if beta else -math.inf)
  weights = jnp.where(present, -1 / jnp.expm1(exponent), 0)
  num_present = present.sum().astype(weights.dtype)
  return weights * num_present / jnp.where(present.any(), weights.sum(), 1)


def example_weights(
  class_weights: base.Array, labels: base.Array, axis_name: base.AxisName = None
) -> base.Array:
  """Example weights [B] in proportion to the class weights, with sum 1.

  This also works under a mesh with explicit sharding, where `class_weights[labels]` is
  an error.

  Args:
    class_weights: non-negative, [C], for instance from `effective_number`.
    labels: integer class of each example, [B].
    axis_name: mapped axis over which the batch is sharded.

  >>> import jax.numpy as jnp
  >>> print(example_weights(jnp.array([1., 3.]), jnp.array([0, 1, 1, 0])))
  [0.125 0.375 0.375 0.125]
  """
  return normalization.sum_to_one(base.take(class_weights, labels), axis_name)


def check_beta(beta: float) -> None:
  """Raises InputError unless `beta` is valid for `effective_number`."""
  if not 0 <= beta < 1:
    raise base.InputError(
      f"beta={beta} of the effective number of examples must be in [0, 1)."
    )


def as_counts(class_counts: base.Array) -> base.Array:
  """Checks class counts and converts them to floating-point numbers.

  Integers get the default floating-point type, which is float64 where it is enabled;
  half precision becomes float32.

  Args:
    class_counts: [C], non-negative.

  Returns:
    Counts [C]. Under `jit`, all are NaN if one is negative, NaN or infinite.

  Raises:
    InputError: for the reasons of `inverse_frequency`.
  """
  check_counts(class_counts)
  counts = jnp.asarray(class_counts)
  dtype = counts.dtype if jnp.issubdtype(counts.dtype, jnp.inexact) else float
  dtype = base.accumulator_dtype(jax.dtypes.canonicalize_dtype(dtype))
  counts = counts.astype(dtype)
  is_count = jnp.isfinite(counts) & (counts >= 0)
  if not isinstance(is_count, jax.core.Tracer):
    if not is_count.all():
      first = int(jnp.argmin(is_count))
      raise base.InputError(
        "class_counts must not be negative, NaN or infinite; the count of class"
        f" {first} is {counts[first]}."
      )
    return counts
  # Unlike a constant NaN, sqrt(-1) raises no error under `jax_debug_nans` for good
  # counts.
  return counts * jnp.sqrt(jnp.where(is_count.all(), 1.0, -1.0)).astype(dtype)


def check_counts(class_counts: base.Array, num_classes: int | None = None) -> None:
  """Raises InputError unless `class_counts` has the shape [C].

  Args:
    class_counts: the counts; their values are not checked.
    num_classes: C, or None for any.
  """
  shape = jnp.shape(class_counts)
  if len(shape) != 1 or num_classes not in (None, shape[0]):
    each, size = ("class", "C")
    if num_classes is not None:
      each, size = f"of the {num_classes} classes", str(num_classes)
    raise base.InputError(
      f"class_counts must be one number for each {each}, shape [{size}]; got shape"
      f" {list(shape)}."
    )
