"""Convolutions whose kernel gradients are fast on a CPU.

XLA:CPU computes the gradient of a kernel as a convolution of the inputs with the
gradient of the outputs, which acts as a kernel of the size of the whole image. If this
gradient takes more than a few megabytes, the computation can be 10 times slower than
the convolution itself, which has the same number of operations. `conv_general_dilated`
therefore computes large outputs in blocks of rows. The gradient of the kernel is then
the sum over the blocks. docs/speed.md has the measurements.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

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
  *,
  block_bytes: int = BLOCK_BYTES,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, in blocks of rows on a CPU if outputs are large.

  Values and derivatives are the same up to the rounding of the sum over the blocks. On
  other devices, and if the inputs are dilated or the batch has groups, this is one
  convolution. Use it in any flax network with
  `nn.Conv(..., conv_general_dilated=convolution.conv_general_dilated)`.

  Args:
    lhs: see `jax.lax.conv_general_dilated`, as for the other arguments.
    rhs: the kernel.
    window_strides: strides, one for each spatial axis.
    padding: "SAME", "SAME_LOWER", "VALID", or pairs of the padding before and after.
    lhs_dilation: dilation of the inputs.
    rhs_dilation: dilation of the kernel.
    dimension_numbers: order of the axes.
    feature_group_count: number of groups of channels.
    batch_group_count: number of groups of examples.
    precision: precision on accelerators.
    preferred_element_type: type of the result.
    block_bytes: the size of the outputs above which there are blocks. A block is
      smaller than that, unless it would have fewer rows than the kernel.

  Returns:
    The convolution. The axis of which the blocks have a few rows is the first spatial
    axis.
  """
  convolve: Callable[..., jax.Array] = functools.partial(
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
  )
  is_dilated = lhs_dilation is not None and any(size != 1 for size in lhs_dilation)
  if jax.default_backend() != "cpu" or is_dilated or batch_group_count != 1:
    return plain(lhs, rhs)
  output = jax.eval_shape(plain, lhs, rhs)
  numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  if len(numbers.out_spec) < 3:  # It has no spatial axes.
    return plain(lhs, rhs)
  axis, kernel_axis, output_axis = (
    spec[2] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
  )
  dilations = rhs_dilation or [1] * len(window_strides)
  size = (rhs.shape[kernel_axis] - 1) * dilations[0] + 1
  num_rows, num_inputs = output.shape[output_axis], lhs.shape[axis]
  num_blocks = min(
    math.ceil(output.size * output.dtype.itemsize / block_bytes),
    # Blocks have inputs in common, so each of them has as many rows as the kernel.
    num_rows // size,
  )
  if num_blocks < 2:
    return plain(lhs, rhs)
  pads = _pads(lhs, rhs, window_strides, padding, dilations, numbers)
  edges = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
  blocks = []
  for first, end in itertools.pairwise(edges):
    # The rows of the padded inputs that this block needs, counted from the first input.
    start = first * window_strides[0] - pads[0][0]
    stop = (end - 1) * window_strides[0] + size - pads[0][0]
    begin, limit = (min(max(row, 0), num_inputs) for row in (start, stop))
    rows = jax.lax.slice_in_dim(lhs, begin, limit, axis=axis)
    # A block of wide padding has no inputs.
    around = tuple(min(max(n, 0), stop - start) for n in (-start, stop - num_inputs))
    blocks.append(convolve(rows, rhs, padding=[around, *pads[1:]]))
  return jnp.concatenate(blocks, output_axis)


def _pads(lhs, rhs, strides, padding, dilations, numbers):
  """The padding as pairs, one for each spatial axis."""
  if not isinstance(padding, str):
    return [tuple(pair) for pair in padding]
  window = [
    (rhs.shape[a] - 1) * d + 1
    for a, d in zip(numbers.rhs_spec[2:], dilations, strict=True)
  ]
  sizes = [lhs.shape[a] for a in numbers.lhs_spec[2:]]
  return jax.lax.padtype_to_pads(sizes, window, strides, padding)
