"""Class weights from the number of examples of each class."""

import math

import jax
import jax.numpy as jnp
import numpy as np

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
    InputError: `class_counts` does not have shape [C], or, outside `jit`, contains a
      negative number, a NaN or an infinity. Under `jit`, such a count makes every
      weight NaN.

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
  """Class weights in proportion to (1 - beta) / (1 - beta^n), where n is the count.

  The weights have mean 1 over the classes that have examples; a class without examples
  has weight 0. beta = 0 gives equal weights, beta -> 1 weights in proportion to 1 / n.

  Args:
    class_counts: [C], non-negative.
    beta: in [0, 1).

  Returns:
    Weights [C].

  Raises:
    InputError: `beta` is out of range, or `class_counts` are invalid, see
      `inverse_frequency`.

  Reference:
    Cui, Jia, Lin, Song, Belongie, "Class-Balanced Loss Based on Effective Number of
    Samples", CVPR 2019. Scale and default are those of LDAM-DRW's released code.

  >>> import jax.numpy as jnp
  >>> print(effective_number(jnp.array([30, 10]), beta=0.9))
  [0.8096331 1.190367 ]
  """
  beta = check_beta(beta)
  counts = as_counts(class_counts)
  present = counts != 0
  # `expm1` computes 1 - beta^n without cancellation. A count of 1 in place of 0 avoids
  # 0 * log 0.
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

  Returns:
    Weights [B]. All are NaN if a label is not a class.

  Raises:
    InputError: the labels are not integers of shape [B], or the class weights do not
      have shape [C].

  >>> import jax.numpy as jnp
  >>> print(example_weights(jnp.array([1., 3.]), jnp.array([0, 1, 1, 0])))
  [0.125 0.375 0.375 0.125]
  """
  class_weights = base.host_or_jax_array(class_weights)
  shapes = np.shape(class_weights), np.shape(labels)
  if [len(shape) for shape in shapes] != [1, 1]:
    raise base.InputError(
      f"class_weights must have shape [C], and labels [B]; got {shapes[0]} and"
      f" {shapes[1]}."
    )
  if not jnp.issubdtype(class_weights.dtype, jnp.inexact):
    # A label that is not a class then gives NaN.
    class_weights = jnp.asarray(class_weights, float)
  return normalization.sum_to_one(base.take(class_weights, labels), axis_name)


def check_beta(beta: float) -> float:
  """`beta` of `effective_number`, as a Python number.

  Raises:
    InputError: it is out of range, or traced: 1 - beta needs double precision.
  """
  beta = base.known_setting("beta of the effective number of examples", beta)
  if not 0 <= beta < 1:
    raise base.InputError(
      f"beta={beta} of the effective number of examples must be in [0, 1)."
    )
  return beta


def as_counts(class_counts: base.Array) -> base.Array:
  """Checks class counts and converts them to floating-point numbers.

  Integers get the default floating-point type, which is float64 where it is enabled;
  half precision becomes float32.

  Args:
    class_counts: [C], non-negative.

  Returns:
    Counts [C]. Under `jit`, all are NaN if one is negative, NaN or infinite.

  Raises:
    InputError: `class_counts` are invalid, see `inverse_frequency`.
  """
  base.refuse_mask("class_counts", class_counts)
  check_counts(class_counts)
  if not isinstance(class_counts, jax.Array):
    # JAX would keep only the lower 32 bits of 64-bit integers.
    class_counts = np.asarray(class_counts)
    if np.issubdtype(class_counts.dtype, np.integer):
      class_counts = class_counts.astype(np.float64)
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
  # sqrt(-1) is computed only for bad counts. A constant NaN would also raise an error
  # under `jax_debug_nans` for good counts.
  return counts * jnp.sqrt(jnp.where(is_count.all(), 1.0, -1.0)).astype(dtype)


def check_counts(class_counts: base.Array, num_classes: int | None = None) -> None:
  """Raises InputError unless `class_counts` has the shape [C].

  Args:
    class_counts: the counts; their values are not checked.
    num_classes: C, or None for any.
  """
  shape = np.shape(class_counts)
  if len(shape) != 1 or num_classes not in (None, shape[0]):
    each, size = ("class", "C")
    if num_classes is not None:
      each, size = f"of the {num_classes} classes", str(num_classes)
    raise base.InputError(
      f"class_counts must be one number for each {each}, shape [{size}]; got shape"
      f" {list(shape)}."
    )


def deferred_example_weights(
  class_counts: base.Array,
  labels: base.Array,
  beta: float,
  epoch: base.Array | int,
  from_epoch: int,
  axis_name: base.AxisName = None,
) -> base.Array:
  """Example weights that are uniform at first, and class-balanced from some epoch on.

  This is deferred re-weighting (DRW). The weights [B] sum to 1 over the global batch.

  Args:
    class_counts: [C], non-negative.
    labels: integer class of each example, [B].
    beta: beta of `effective_number`.
    epoch: the current epoch, counted from 0; may be traced.
    from_epoch: the first epoch of class-balanced weights; 0 ignores `epoch`.
    axis_name: mapped axis over which the batch is sharded.

  Raises:
    InputError: an argument is invalid, see `effective_number` and `example_weights`.

  References:
    Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019, algorithm 1.
  """
  class_weights = effective_number(class_counts, beta)
  if from_epoch:
    class_weights = jnp.where(epoch >= from_epoch, class_weights, 1)
  return example_weights(class_weights, labels, axis_name)


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Rows of one epoch in which every class is equally frequent; on the host.

  Rows of a class are drawn with replacement. The order consists of rounds of one row
  of each class, so a batch whose size is a multiple of the number of classes is
  exactly balanced.

  Args:
    labels: class of each training example, [N].
    rng: a NumPy generator.

  Returns:
    Rows of the training set, int [(N // C) * C] for C classes that have examples.
  """
  classes = np.unique(labels)
  if not len(classes):
    return np.zeros(0, np.int64)
  num_rounds = len(labels) // len(classes)
  groups = base.rows_by_class(np.asarray(labels), classes)
  columns = [rng.choice(rows, size=num_rounds) for rows in groups]
  return rng.permuted(np.stack(columns, axis=1), axis=1).ravel()
