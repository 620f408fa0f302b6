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

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[B, ...] to logits [B, num_outputs]."""
    del train
    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = nn.relu(nn.Dense(width)(x))
    return nn.Dense(self.num_outputs)(x)
