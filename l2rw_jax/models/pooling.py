"""Pooling whose gradient is cheap on every backend."""

import functools

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
  """Max pooling with SAME padding over the two middle axes of [B, H, W, C].

  The values of `flax.linen.max_pool`. Written as a maximum over shifted strided
  slices, because the gradient of `reduce_window` (select-and-scatter) took a
  third of a LeNet step on XLA:CPU. Where several inputs tie for the maximum
  they share its gradient equally instead of the first one taking it all.
  """
  size = [-(-n // stride) for n in x.shape[1:3]]
  total = [
    max((m - 1) * stride + window - n, 0)
    for n, m in zip(x.shape[1:3], size, strict=True)
  ]
  padding = [(0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)]
  x = jnp.pad(x, padding, constant_values=-jnp.inf)
  shifted = [
    x[:, i : i + size[0] * stride : stride, j : j + size[1] * stride : stride]
    for i in range(window)
    for j in range(window)
  ]
  return functools.reduce(jnp.maximum, shifted)
