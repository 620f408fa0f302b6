"""Multilayer perceptron."""

from collections.abc import Sequence
import math

from flax import linen as nn
import jax

from l2rw_jax.models import activations
from l2rw_jax.models import split


class MLP(split.SplitNetwork):
  """Dense layers with ReLU on the flattened input.

  Attributes:
    num_outputs: number of logits per example.
    hidden: width of each hidden layer. Without hidden layers this is logistic
      regression, which has no features for methods that act on features.
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.
  """

  num_outputs: int
  hidden: Sequence[int] = (256, 256)
  cosine: bool = False

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = split.output_layer(
      self.num_outputs, self.cosine, name=f"Dense_{len(self.hidden)}"
    )

  @property
  def num_features(self) -> int | None:
    """Width of the penultimate layer."""
    return self.hidden[-1] if self.hidden else None

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps [B, ...] to non-negative features [B, hidden[-1]]."""
    del train
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    for width in self.hidden:
      x = activations.relu(nn.Dense(width)(x))
    return x
