"""What every network here is: a linear head after features."""

from flax import linen as nn
import jax


class SplitNetwork(nn.Module):
  """A network that methods may enter before its last layer.

  A subclass has `num_features`, makes the layer `output` in `setup` (named as in
  one plain sequence of layers, so that it starts as there), and computes
  `features(x, train) -> [B, num_features]`.
  """

  def head(self, features: jax.Array) -> jax.Array:
    """Features [B, num_features] to logits [B, num_outputs]."""
    return self.output(features)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, ...] to logits [B, num_outputs]."""
    return self.head(self.features(x, train))
