"""A ReLU whose gradient is cheap on every backend."""

import jax
import jax.numpy as jnp


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0) as `jax.nn.relu`: the derivative at 0 is 0, and NaN stays NaN.

  It is written with `jnp.where` because XLA:CPU fuses a chain of maxima into all of its
  consumers and recomputes it there, down to the first convolution, also in the
  transposes for the gradients of kernels. `jnp.where` reads its input twice, which
  prevents this fusion: a step of ResNet-32 took 1.0 s of processor time instead of 1.8
  (BatchNorm), and 1.1 s instead of 2.0 (GroupNorm).
  """
  return jnp.where(x <= 0, 0, x)
