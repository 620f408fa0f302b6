"""A ReLU whose gradient is cheap on every backend."""

import jax
import jax.numpy as jnp


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), as in `jax.nn.relu`: the derivative at 0 is 0, and NaN stays NaN.

  It is implemented with `jnp.where`, because XLA:CPU fuses a chain of maxima into all
  of its consumers, including the transposes for the gradients of kernels. Each consumer
  then recomputes the chain down to the first convolution. `jnp.where` reads its input
  twice, which prevents this fusion: a step of ResNet-32 took 1.0 s of processor time
  instead of 1.8 s with BatchNorm, and 1.1 s instead of 2.0 s with GroupNorm.
  """
  return jnp.where(x <= 0, 0, x)
