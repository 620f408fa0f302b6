r"""Whether convolutions in blocks of rows are faster on a CPU, for several block sizes.

Each layer of `LAYERS` is a convolution with a 3x3 kernel on a batch of images. For each
layer, the benchmark times the convolution, its gradient with respect to the images, and
its gradient with respect to the kernel, which have the same number of operations. The
block sizes `BLOCKS` take turns, round by round. A ratio is the time divided by that of
one convolution without blocks in the same round.
Command: python -m benchmarks.convolution_blocks
Results: results/convolution_blocks, one file for each version of jax.
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.models import convolution

# (height and width, channels of the images, channels of the outputs): the layers of
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
_MEBIBYTE = 2**20
# Sizes of blocks in MiB; 0 is one convolution without blocks.
BLOCKS = (0, 1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  batch_size: int = flag(128)
  repeats: int = flag(9, "Number of rounds.", bounds=settings_lib.REPEATS)
  layers: tuple[str, ...] = flag(
    tuple(LAYERS), "Layers to time, separated by commas.", choices=LAYERS
  )


def parts(
  size: int, inputs: int, outputs: int, batch_size: int, block_bytes: int
) -> tuple[dict[str, Callable[..., base.Array]], tuple[base.Array, ...]]:
  """The compiled parts of a layer, by their names, and their arguments.

  Args:
    size: height and width of the images.
    inputs: number of channels of the images.
    outputs: number of channels of the outputs.
    batch_size: B.
    block_bytes: size of a block; 0 is one convolution without blocks.
  """
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(batch_size, size, size, inputs)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(3, 3, inputs, outputs)), jnp.float32)
  cotangents = jnp.asarray(
    rng.normal(size=(batch_size, size, size, outputs)), jnp.float32
  )
  convolve: Callable[..., base.Array] = jax.lax.conv_general_dilated
  if block_bytes:
    convolve = functools.partial(
      convolution.conv_general_dilated, block_bytes=block_bytes
    )
  convolve = functools.partial(
    convolve,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )

  def image_gradient(images, kernel, cotangents):
    return jax.vjp(lambda x: convolve(x, kernel), images)[1](cotangents)[0]

  def kernel_gradient(images, kernel, cotangents):
    return jax.vjp(lambda x: convolve(images, x), kernel)[1](cotangents)[0]

  return {
    "convolution": jax.jit(lambda images, kernel, cotangents: convolve(images, kernel)),
    "image_gradient": jax.jit(image_gradient),
    "kernel_gradient": jax.jit(kernel_gradient),
  }, (images, kernel, cotangents)


def make_rows(settings: Settings) -> list[dict[str, Any]]:
  """A row for each layer, part and size of the blocks."""
  rows = []
  for layer in settings_lib.choose("layers", settings.layers, LAYERS):
    shape = LAYERS[layer]
    compiled = [parts(*shape, settings.batch_size, n * _MEBIBYTE) for n in BLOCKS]
    for part in compiled[0][0]:
      seconds: list[list[float]] = [[] for _ in BLOCKS]
      for turn in range(settings.repeats + 1):
        for (functions, arguments), times in zip(compiled, seconds, strict=True):
          start = time.perf_counter()
          jax.block_until_ready(functions[part](*arguments))
          if turn:  # The first turn compiles.
            times.append(time.perf_counter() - start)
      size, inputs, outputs = shape
      flops = 2 * 9 * settings.batch_size * size**2 * inputs * outputs
      for block, times in zip(BLOCKS, seconds, strict=True):
        ratios = [a / b for a, b in zip(times, seconds[0], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append(
          {
            "layer": layer,
            "part": part,
            "block_mebibytes": block,
            "milliseconds": round(1000 * statistics.median(times), 2),
            "gflop_per_second": round(flops / statistics.median(times) / 1e9, 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_lower_quartile": round(quartiles[0], 3),
            "ratio_upper_quartile": round(quartiles[2], 3),
          }
        )
  return rows


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder."""
  info = {**workdir_lib.run_info(), "cores": os.cpu_count()}
  rows = make_rows(settings)
  facts = {"batch_size": settings.batch_size, "repeats": settings.repeats}
  path = pathlib.Path(workdir) / f"jax-{info['jax']}.csv"
  _rows.write(path, [{**row, **facts, **info} for row in rows])
  _rows.show(rows, path)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "convolution_blocks")
