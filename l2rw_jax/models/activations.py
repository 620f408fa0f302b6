"""Rectification whose gradient is cheap on every backend."""

import jax
import jax.numpy as jnp


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), with derivative 0 at 0 and NaN kept: `jax.nn.relu`, as a choice.

  XLA:CPU computes a chain of maxima anew wherever it is read, down to the first
  convolution, and does so inside of the transposes that the gradient of each kernel
  needs. A choice reads its input twice, which ends the chain: a step of ResNet-32
  took 1.0 s of processor time instead of 1.8 (BatchNorm), 1.1 instead of 2.0
  (GroupNorm).
  """
  return jnp.where(x <= 0, 0, x)
