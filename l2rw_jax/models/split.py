"""Base class of the networks: features, then a linear or a cosine head."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base


class SplitNetwork(nn.Module):
  """A network whose features and last layer can be computed separately.

  A subclass has `num_features`, creates the layer `output` in `setup`, and computes
  `features(x, train) -> [B, num_features]`. The layer is named as in an `nn.compact`
  network without this split, so that its initialization is the same.
  """

  def head(self, features: jax.Array) -> jax.Array:
    """Maps features [B, num_features] to logits [B, num_outputs]."""
    return self.output(features)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [B, ...] to logits [B, num_outputs]."""
    return self.head(self.features(x, train))


def output_layer(num_outputs: int, cosine: bool, **options: Any) -> nn.Module:
  """The last layer: `nn.Dense(num_outputs, **options)`, or a `Cosine` if `cosine`.

  `options` must contain `name`, the only option that a `Cosine` takes.
  """
  if cosine:
    return Cosine(num_outputs, name=options["name"])
  return nn.Dense(num_outputs, **options)


class Cosine(nn.Module):
  """Cosines of the angles between the features and the weights of each class.

  LDAM uses this layer, which has no bias. The cosines lie in [-1, 1], so training needs
  a loss that scales them. If the features are zero, the cosines are zero. Weights are
  initialized from U(-1, 1), and each column is normalized to length 1. Half-precision
  features are processed in float32.

  References:
    Cao, Wei, Gaidon, Arechiga, Ma, "Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss", NeurIPS 2019.

  Attributes:
    num_outputs: C.
  """

  num_outputs: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """Maps features [B, d] to cosines [B, C]."""
    kernel = self.param("kernel", _unit_columns, (features.shape[-1], self.num_outputs))
    with jax.numpy_dtype_promotion("standard"):  # Promotes half precision to float32.
      features, kernel = nn.dtypes.promote_dtype(features, kernel)
    return _normalize(features, -1) @ _normalize(kernel, 0)


def _unit_columns(key, shape):
  return _normalize(jax.random.uniform(key, shape, jnp.float32, -1, 1), 0)


def _normalize(x: jax.Array, axis: int) -> jax.Array:
  """x / |x| along an axis; x itself near zero, where x / |x| has no derivative."""
  # Dividing by a constant first does not change the result, but avoids overflow.
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
  is_zero = largest < 1e-12
  x = jnp.where(is_zero, x, base.divide_by_largest(x, largest))
  squares = jnp.sum(x**2, axis, keepdims=True)
  return x / jnp.sqrt(jnp.where(is_zero, 1, squares))
