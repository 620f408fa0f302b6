r"""Whether convolutions in blocks of rows are faster on a CPU, by number of blocks.

Each layer of `LAYERS` is a convolution with a 3x3 kernel on a batch of images. For each
layer, the benchmark times the convolution, its gradient with respect to the images, and
its gradient with respect to the kernel; all three have the same number of operations.
The variants with different numbers of blocks take turns, round by round. A ratio is the
time divided by that of a single convolution in the same round. The column is_default
marks the number of blocks that `convolution.conv_general_dilated` chooses.
Command: python -m benchmarks.convolution_blocks
Results: results/convolution_blocks, one file for each version of jax.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.models import convolution

# (height and width, channels of the images, channels of the outputs): some layers of
# `whitened.WhitenedNet` at widths 32 and 64 and of ResNet-32.
LAYERS = {
  "whitened_half_1": (31, 24, 32),
  "whitened_half_3": (15, 32, 128),
  "whitened_half_5": (7, 128, 128),
  "whitened_3": (15, 64, 256),
  "resnet_32_stage_1": (32, 16, 16),
  "resnet_32_stage_2": (16, 32, 32),
  "resnet_32_stage_3": (8, 64, 64),
}
# Largest sizes of a block in bytes. The first size gives a single convolution.
BLOCKS = (2**40, *(n * 2**20 for n in (8, 4, 2, 1)))


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  batch_size: int = flag(128)
  repeats: int = flag(15, "Number of rounds.", bounds=settings_lib.REPEATS)
  layers: tuple[str, ...] = flag(
    tuple(LAYERS), "Layers to time, separated by commas.", choices=LAYERS
  )


class Layer(NamedTuple):
  """A layer whose outputs are computed in blocks.

  Attributes:
    num_blocks: number of blocks.
    parts: the convolution and its two gradients, by their names, as compiled functions
      of the arrays that `arguments` returns.
  """

  num_blocks: int
  parts: dict[str, Callable[..., base.Array]]


def arguments(
  size: int, inputs: int, outputs: int, batch_size: int
) -> tuple[base.Array, base.Array, base.Array]:
  """Random images, a kernel, and a gradient with respect to the outputs of a layer.

  Args:
    size: height and width of the images.
    inputs: number of channels of the images.
    outputs: number of channels of the outputs.
    batch_size: B.
  """
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  images = normal(batch_size, size, size, inputs)
  return images, normal(3, 3, inputs, outputs), normal(batch_size, size, size, outputs)


def make_layer(block_bytes: int, given: Sequence[base.Array]) -> Layer:
  """Returns a layer computed in blocks of at most `block_bytes`.

  Args:
    block_bytes: the largest size of a block, in bytes.
    given: the result of `arguments`.
  """

  def convolve(images, kernel):
    return convolution.conv_general_dilated(
      images,
      kernel,
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      block_bytes=block_bytes,
    )

  def image_gradient(images, kernel, cotangents):
    return jax.vjp(lambda x: convolve(x, kernel), images)[1](cotangents)[0]

  def kernel_gradient(images, kernel, cotangents):
    return jax.vjp(lambda x: convolve(images, x), kernel)[1](cotangents)[0]

  jaxpr = str(jax.make_jaxpr(convolve)(*given[:2]))
  functions = {
    "convolution": lambda images, kernel, cotangents: convolve(images, kernel),
    "image_gradient": image_gradient,
    "kernel_gradient": kernel_gradient,
  }
  return Layer(
    jaxpr.count("= conv_general_dilated["),
    {name: jax.jit(function) for name, function in functions.items()},
  )


def make_rows(settings: Settings) -> list[dict[str, Any]]:
  """A row for each layer, part and number of blocks.

  Raises:
    InputError: --layers is empty.
  """
  rows = []
  for name in settings_lib.choose("layers", settings.layers, LAYERS):
    size, inputs, outputs = LAYERS[name]
    given = arguments(*LAYERS[name], settings.batch_size)
    default = make_layer(convolution.BLOCK_BYTES, given).num_blocks
    all_layers = [make_layer(block_bytes, given) for block_bytes in BLOCKS]
    # Several sizes can give the same number of blocks.
    layers = list({layer.num_blocks: layer for layer in all_layers}.values())
    for part in layers[0].parts:
      seconds: list[list[float]] = [[] for _ in layers]
      for turn in range(settings.repeats + 1):
        for layer, times in zip(layers, seconds, strict=True):
          start = time.perf_counter()
          jax.block_until_ready(layer.parts[part](*given))
          if turn:  # The first turn compiles.
            times.append(time.perf_counter() - start)
      flops = 2 * 9 * settings.batch_size * size**2 * inputs * outputs
      for layer, times in zip(layers, seconds, strict=True):
        ratios = [a / b for a, b in zip(times, seconds[0], strict=True)]
        quartiles = np.quantile(ratios, [0.25, 0.5, 0.75])
        median = float(np.median(times))
        rows.append(
          {
            "layer": name,
            "part": part,
            "num_blocks": layer.num_blocks,
            "is_default": layer.num_blocks == default,
            "milliseconds": round(1000 * median, 2),
            "gflop_per_second": round(flops / median / 1e9, 1),
            "ratio": round(float(quartiles[1]), 3),
            "ratio_lower_quartile": round(float(quartiles[0]), 3),
            "ratio_upper_quartile": round(float(quartiles[2]), 3),
          }
        )
  return rows


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: --layers is empty.
  """
  rows = make_rows(settings)
  facts = {"batch_size": settings.batch_size, "repeats": settings.repeats}
  _rows.report(rows, facts, workdir)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "convolution_blocks")
