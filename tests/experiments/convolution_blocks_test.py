"""The benchmark of convolutions in blocks: its rows, and equal results."""

import csv

import jax
import numpy as np

from benchmarks import convolution_blocks

_LAYER = "resnet_32_stage_3"


def test_rows_of_a_layer(tmp_path):
  settings = convolution_blocks.Settings(batch_size=2, repeats=2, layers=(_LAYER,))
  rows = convolution_blocks.run(settings, tmp_path)
  assert len(rows) == 3 * len(convolution_blocks.BLOCKS)
  for row in rows:
    assert row["layer"] == _LAYER
    # Each of 2 * 8^2 * 64 outputs is a sum of 9 * 64 products.
    flops = row["gflop_per_second"] * row["milliseconds"] * 1e6
    np.testing.assert_allclose(flops, 2 * (2 * 8**2 * 64) * (9 * 64), rtol=0.1)
    assert row["ratio"] == 1 or row["block_mebibytes"]
  (file,) = tmp_path.iterdir()
  with file.open() as opened:
    assert [row["part"] for row in csv.DictReader(opened)] == [r["part"] for r in rows]


def test_all_sizes_of_blocks_compute_the_same():
  shape = convolution_blocks.LAYERS[_LAYER]
  # A block of 16 KiB has half of the rows.
  whole, blocks = (
    convolution_blocks.parts(*shape, batch_size=2, block_bytes=size)
    for size in (0, 2**14)
  )
  for part, function in blocks[0].items():
    jaxpr = str(jax.make_jaxpr(function)(*blocks[1]))
    assert jaxpr.count("= conv_general_dilated[") >= 2, part
    expected = whole[0][part](*whole[1])
    np.testing.assert_allclose(function(*blocks[1]), expected, rtol=1e-4, atol=1e-3)
