"""The benchmark of convolutions in blocks: its rows, and equal results."""

import csv

import numpy as np

from benchmarks import convolution_blocks

_LAYER = "resnet_32_stage_3"


def test_rows_of_a_layer(tmp_path, monkeypatch):
  # The outputs take 32 KiB. The last two sizes give the same number of blocks.
  monkeypatch.setattr(convolution_blocks, "BLOCKS", (2**20, 2**14, 2**14 + 1))
  settings = convolution_blocks.Settings(batch_size=2, repeats=2, layers=(_LAYER,))
  rows = convolution_blocks.run(settings, tmp_path)
  shown = [(row["part"], row["num_blocks"], row["is_default"]) for row in rows]
  assert shown == [
    (part, num, num == 1)
    for part in ("convolution", "image_gradient", "kernel_gradient")
    for num in (1, 2)
  ]
  for one, two in zip(rows[::2], rows[1::2], strict=True):
    assert one["ratio"] == 1
    quartiles = two["ratio_lower_quartile"], two["ratio_upper_quartile"]
    assert 0 < quartiles[0] <= two["ratio"] <= quartiles[1]
    # Each of 2 * 8^2 * 64 outputs is a sum of 9 * 64 products.
    flops = 2 * (2 * 8**2 * 64) * (9 * 64)
    expected = flops / one["milliseconds"] / 1e6  # Both columns are rounded.
    np.testing.assert_allclose(one["gflop_per_second"], expected, rtol=0.1, atol=0.1)
  (file,) = tmp_path.iterdir()
  with file.open() as opened:
    assert [row["part"] for row in csv.DictReader(opened)] == [r["part"] for r in rows]


def test_results_do_not_depend_on_the_number_of_blocks():
  given = convolution_blocks.arguments(*convolution_blocks.LAYERS[_LAYER], 2)
  one, two = (convolution_blocks.make_layer(size, given) for size in (2**20, 2**14))
  assert (one.num_blocks, two.num_blocks) == (1, 2)
  assert len(one.parts) == 3
  for part, function in one.parts.items():
    actual = two.parts[part](*given)
    np.testing.assert_allclose(actual, function(*given), rtol=1e-4, atol=1e-3)
