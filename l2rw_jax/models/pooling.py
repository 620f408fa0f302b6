"""Max pooling whose gradient is cheap on every backend."""

import functools

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
  """Max pooling with SAME padding over the two middle axes of [B, H, W, C].

  The values are those of `flax.linen.max_pool`. They are computed as maxima of shifted
  slices, first over rows and then over columns, because the gradient of `reduce_window`
  (select-and-scatter) took 40% of a LeNet step on XLA:CPU. If several inputs are tied
  for the maximum, one of them gets the gradient: among those in the leftmost column,
  the topmost one.
  """
  for axis in (1, 2):
    x = _pool_axis(x, window, stride, axis)
  return x


def _pool_axis(x, window, stride, axis):
  size = -(-x.shape[axis] // stride)
  before = max((size - 1) * stride + window - x.shape[axis], 0) // 2
  # Split the axis into phases modulo `stride` first, so that the slices below have no
  # stride: the gradient of each strided slice would be an array as large as x.
  length = size + -(-window // stride) - 1
  padding = [(0, 0)] * x.ndim
  padding[axis] = (before, length * stride - before - x.shape[axis])
  x = jnp.pad(x, padding, constant_values=-jnp.inf)
  x = x.reshape(*x.shape[:axis], length, stride, *x.shape[axis + 1 :])
  phases = [
    jnp.squeeze(phase, axis + 1) for phase in jax.lax.split(x, (1,) * stride, axis + 1)
  ]
  shifted = [
    jax.lax.slice_in_dim(phases[i % stride], i // stride, i // stride + size, axis=axis)
    for i in range(window)
  ]
  return functools.reduce(_first_maximum, shifted)


def _first_maximum(a, b):
  # a >= b alone would ignore a NaN in a.
  return jnp.where((a >= b) | jnp.isnan(a), a, b)
