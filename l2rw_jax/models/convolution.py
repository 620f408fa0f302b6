"""Convolutions whose kernel gradients are fast on a CPU.

XLA:CPU computes the gradient of a kernel as a convolution of the inputs with the
gradient of the outputs, which acts as a kernel of the size of the whole image. If the
gradient of the outputs occupies 7 MiB or more, the computation takes several times as
long as the convolution itself, which has the same number of operations.
`conv_general_dilated` therefore computes large outputs in blocks of rows. The gradient
of the kernel is then the sum over the blocks. A forward pass alone becomes slower;
docs/speed.md has the measurements.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from l2rw_jax import base

Padding: TypeAlias = str | Sequence[tuple[int, int]]

# `benchmarks.convolution_blocks` compares other sizes.
BLOCK_BYTES = 4 * 2**20


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: Padding,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: Any = None,
  out_sharding: Any = None,
  *,
  block_bytes: int = BLOCK_BYTES,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, in blocks of rows on a CPU if outputs are large.

  Values and derivatives are the same up to the rounding of the sum over the blocks. Use
  it in any flax network with
  `nn.Conv(..., conv_general_dilated=convolution.conv_general_dilated)`.

  Blocks are ranges of the first spatial axis. The convolution is not divided into
  blocks if the default backend (`jax.default_backend()`) is not a CPU, if the inputs
  are dilated, if the batch has groups, if a shape is symbolic, if `out_sharding` is
  given, or if the first spatial axis is sharded over an explicit mesh.

  Args:
    lhs: the images; this and all arguments but `block_bytes` are those of
      `jax.lax.conv_general_dilated`.
    rhs: the kernel.
    window_strides: strides, one for each spatial axis.
    padding: "SAME", "SAME_LOWER", "VALID", or pairs of the padding before and after.
    lhs_dilation: dilation of the images.
    rhs_dilation: dilation of the kernel.
    dimension_numbers: order of the axes.
    feature_group_count: number of groups of channels.
    batch_group_count: number of groups of examples.
    precision: precision on accelerators.
    preferred_element_type: type of the result.
    out_sharding: sharding of the result.
    block_bytes: the largest size of a block of outputs in bytes. A block has at least
      as many rows as the kernel, so it can exceed this size by up to twice the size of
      these rows. The size is that of the traced array: without the axes of `vmap`, and
      of the whole array if it is sharded.

  Returns:
    The convolution.

  Raises:
    InputError: `block_bytes` is not positive.
  """
  if block_bytes < 1:
    raise base.InputError(f"block_bytes={block_bytes}: give a positive number.")
  if not isinstance(padding, str):
    padding = list(padding)
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=window_strides,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  plain = functools.partial(
    convolve,
    padding=padding,
    lhs_dilation=lhs_dilation,
    batch_group_count=batch_group_count,
    out_sharding=out_sharding,
  )
  if (
    jax.default_backend() != "cpu" or batch_group_count != 1 or out_sharding is not None
  ):
    return plain(lhs, rhs)
  # For wrong arguments, this raises the errors of JAX.
  output = jax.eval_shape(plain, lhs, rhs)
  numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  axes = [spec[2:] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)]
  is_dilated = lhs_dilation is not None and any(size != 1 for size in lhs_dilation)
  sizes = (*lhs.shape, *rhs.shape)
  is_static = all(isinstance(size, int | np.integer) for size in sizes)
  dilations = [1] * len(axes[0]) if rhs_dilation is None else list(rhs_dilation)
  # JAX refuses some wrong arguments only when it compiles.
  is_wrong = len(dilations) != len(axes[0]) or 0 in rhs.shape
  if is_dilated or is_wrong or not is_static or not axes[0]:
    return plain(lhs, rhs)
  window = [(rhs.shape[a] - 1) * d + 1 for a, d in zip(axes[1], dilations, strict=True)]
  axis, num_rows = axes[0][0], output.shape[axes[2][0]]
  num_blocks = _num_blocks(output, num_rows, window[0], block_bytes)
  if num_blocks == 1 or jax.typeof(lhs).sharding.spec[axis] is not None:
    return plain(lhs, rhs)
  if isinstance(padding, str):
    images = [lhs.shape[a] for a in axes[0]]
    padding = jax.lax.padtype_to_pads(images, window, window_strides, padding)
  stride, num_inputs = window_strides[0], lhs.shape[axis]
  edges = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
  blocks = []
  for first, end in itertools.pairwise(edges):
    # The rows of the padded images that this block needs, counted from the first image
    # row. Rows before and after those of the images are padding.
    start = first * stride - padding[0][0]
    stop = (end - 1) * stride + window[0] - padding[0][0]
    begin, limit = (min(max(row, 0), num_inputs) for row in (start, stop))
    rows = jax.lax.slice_in_dim(lhs, begin, limit, axis=axis)
    around = tuple(min(max(n, 0), stop - start) for n in (-start, stop - num_inputs))
    blocks.append(convolve(rows, rhs, padding=[around, *padding[1:]]))
  return jnp.concatenate(blocks, axes[2][0])


def _num_blocks(output, num_rows, kernel_rows, block_bytes):
  """The number of blocks, each with about the same number of rows."""
  num_bytes = output.size * output.dtype.itemsize
  if num_bytes <= block_bytes:
    return 1
  # Neighboring blocks have rows of the images in common. Each block has at least as
  # many rows as the kernel, so that no more than two blocks need the same row.
  rows = max(kernel_rows, num_rows * block_bytes // num_bytes)
  return max(1, min(-(-num_rows // rows), num_rows // kernel_rows))
