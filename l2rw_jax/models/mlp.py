"""Multilayer perceptron."""

from collections.abc import Sequence

from flax import linen as nn
import jax


class MLP(nn.Module):
  """Rectified dense layers on the flattened input.

  Attributes:
    num_outputs: logits per example.
    hidden: width of each hidden layer.
  """

  num_outputs: int
  hidden: Sequence[int] = (256, 256)

  def setup(self) -> None:
    """The output layer, named as in one plain sequence of layers."""
    self.output = nn.Dense(self.num_outputs, name=f"Dense_{len(self.hidden)}")

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return self.hidden[-1]

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, ...] to [B, hidden[-1]], non-negative."""
    del train
    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width)(x))
    return x

  def head(self, features: jax.Array) -> jax.Array:
    """Features to logits [B, num_outputs]."""
    return self.output(features)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, ...] to logits [B, num_outputs]."""
    return self.head(self.features(x, train))
