"""LeNet, as in the released code of L2RW."""

from flax import linen as nn
import jax

from l2rw_jax.models import activations
from l2rw_jax.models import pooling
from l2rw_jax.models import split

_normal = nn.initializers.truncated_normal(0.1)


class LeNet(split.SplitNetwork):
  """Three 5x5 convolutions, each with 3x3/2 max-pooling and ReLU, and two dense layers.

  The sizes for 28x28 inputs are 28 -> 14 -> 7 -> 4. There are 167,113 parameters with
  `num_outputs=1`. Weights are initialized from a normal distribution with a standard
  deviation of 0.1, truncated at two standard deviations. Biases start at 0.

  Attributes:
    num_outputs: number of logits per example (1 for the binary problem of the paper).
    cosine: whether the logits are cosines, as LDAM needs: `split.Cosine`.
  """

  num_outputs: int
  cosine: bool = False

  def setup(self) -> None:
    """Creates the output layer."""
    self.output = split.output_layer(
      self.num_outputs, self.cosine, kernel_init=_normal, name="Dense_1"
    )

  @property
  def num_features(self) -> int:
    """Width of the penultimate layer."""
    return 100

  @nn.compact
  def features(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to non-negative features [B, 100]."""
    del train
    for features in (16, 32, 64):
      x = nn.Conv(features, (5, 5), padding="SAME", kernel_init=_normal)(x)
      x = activations.relu(pooling.max_pool(x, 3, 2))
    x = x.reshape(x.shape[0], -1)
    return activations.relu(nn.Dense(100, kernel_init=_normal)(x))
