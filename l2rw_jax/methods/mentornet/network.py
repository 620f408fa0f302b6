"""The mentor: MentorNet's network.

The released network processes one step (history length 1) with a bidirectional LSTM of
one unit per direction, concatenates the result with embeddings of the label and the
epoch percent, and applies dense layers of 20 and 1 units: 257 trained and 500 frozen
parameters. `compat` selects the released network or the network of the paper, with
standard choices where we could not check the text of the paper:

| | "official_code" | "paper" |
|---|---|---|
| output of the LSTM | cell states | hidden states |
| last bias | added to each of the 20 output weights | a bias |
| epoch embedding | frozen as initialized | trained |

The default is "official_code", because the mentors in the published student commands
are such networks, and the parts of the paper that we could read do not specify sizes.
Dense layers are initialized from N(0, 1), as released. This library chose to initialize
embeddings uniformly in [-1, 1] and LSTM kernels as in flax.

References:
  Jiang, Zhou, Leung, Li, Fei-Fei, "MentorNet: Learning Data-Driven Curriculum
  for Very Deep Neural Networks on Corrupted Labels", ICML 2018, section 3 and
  figure 1.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from l2rw_jax import base

COMPAT = ("official_code", "paper")
_NORMAL = nn.initializers.normal(1.0)
# Inputs are clipped to this value, so that sums of their products do not give
# inf - inf.
_LARGEST = 1e30


class MentorNetwork(nn.Module):
  """Maps (losses, differences, labels, epoch percent) to logits of weights, [B].

  Attributes:
    num_labels: number of rows of the label embedding; the released code has 2.
    compat: "official_code" or "paper", see the module docstring.
  """

  num_labels: int = 2
  compat: str = "official_code"

  @nn.compact
  def __call__(
    self, losses: Any, differences: Any, labels: Any, epoch: Any
  ) -> base.Array:
    """Logits [B]; the weights are their sigmoid.

    Args:
      losses: [B], or [B, k] with the last k losses of each example, oldest first.
      differences: losses minus the moving percentile, shaped like `losses`.
      labels: integers below `num_labels`, [B].
      epoch: percent of the training that is done, 0 to 99; [] or [B].

    Raises:
      InputError: `compat` is not one of `COMPAT`.
    """
    if self.compat not in COMPAT:
      raise base.InputError(f"compat={self.compat!r}: choose among {COMPAT}.")
    steps = jnp.stack([losses, differences], axis=-1).astype(jnp.float32)
    steps = jnp.clip(steps, -_LARGEST, _LARGEST)
    steps = steps.reshape(steps.shape[0], -1, 2)
    features = [
      self._label_embedding(labels),
      self._epoch_embedding(
        base.sharded_like(jnp.broadcast_to(epoch, labels.shape), labels)
      ),
      self._last_state(nn.LSTMCell(1, name="forward"), steps),
      self._last_state(nn.LSTMCell(1, name="backward"), steps[:, ::-1]),
    ]
    dense = nn.Dense(20, kernel_init=_NORMAL, bias_init=_NORMAL, name="hidden")
    return self._output(nn.tanh(dense(jnp.concatenate(features, axis=-1))))

  def _label_embedding(self, labels):
    shape = (self.num_labels, 2)
    return base.take(self.param("label_embedding", _uniform, shape), labels)

  def _epoch_embedding(self, epoch):
    name, shape = "epoch_embedding", (100, 5)
    if self.compat == "paper":
      return base.take(self.param(name, _uniform, shape), epoch)

    def init():
      return _uniform(self.make_rng("params"), shape)

    return base.take(self.variable("frozen", name, init).value, epoch)

  def _last_state(self, cell, steps):
    carry = (jnp.zeros_like(steps[:, 0, :1]),) * 2
    for t in range(steps.shape[1]):
      carry, hidden = cell(carry, steps[:, t])
    return carry[0] if self.compat == "official_code" else hidden

  def _output(self, hidden):
    kernel = self.param("output_kernel", _NORMAL, (20, 1), jnp.float32)
    bias = self.param("output_bias", _NORMAL, (1,), jnp.float32)
    if self.compat == "official_code":
      return (hidden @ (kernel + bias[None, :]))[:, 0]
    return (hidden @ kernel + bias[None, :])[:, 0]


def _uniform(key, shape):
  return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Mentor:
  """A fitted mentor, a curriculum for `mentornet.mentornet`.

  Attributes:
    curriculum: the curriculum that the mentor was fitted to: a key of
      `mentornet.CURRICULA`, or "dd" for a data-driven mentor.
    network: the flax module.
    variables: the fitted variables of the module.
    num_classes: C if the mentor uses labels. None if it replaces all labels by 0, as in
      the released code; such a mentor applies to any number of classes.
  """

  curriculum: str
  network: MentorNetwork
  variables: base.PyTree
  num_classes: int | None = None

  def __call__(
    self, losses: Any, differences: Any, labels: Any, epoch: Any
  ) -> base.Array:
    """Weights in [0, 1], [B]; arguments as in `MentorNetwork`."""
    if self.num_classes is None:
      labels = jnp.zeros(losses.shape[:1], jnp.int32)
      labels = base.sharded_like(labels, losses)
    return weights_of(self.network, self.variables, losses, differences, labels, epoch)


@functools.partial(jax.jit, static_argnums=0)
def weights_of(
  network: MentorNetwork,
  variables: base.PyTree,
  losses: Any,
  differences: Any,
  labels: Any,
  epoch: Any,
) -> base.Array:
  """The weights of a mentor's network, [B]; arguments as in `MentorNetwork`."""
  logits: Any = network.apply(variables, losses, differences, labels, epoch)
  return jax.nn.sigmoid(logits)
