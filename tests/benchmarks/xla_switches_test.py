"""The benchmark of XLA's switches: its rows, and a switch that XLA does not know."""

import csv

import pytest

from benchmarks import xla_switches


@pytest.mark.slow
def test_rows_of_a_switch_and_of_an_unknown_one(tmp_path):
  settings = xla_switches.Settings(
    switches=("--xla_cpu_mine=true",),
    layouts=("NHWC",),
    batch_size=1,
    repeats=1,
    num_rounds=1,
  )
  plain, unknown = xla_switches.run(settings, tmp_path)
  assert plain["switch"] == "none" and plain["ratio"] == 1
  assert not plain["changes_program"]
  # Each output is a sum of 9 * 32 products, at two operations for each. In the backward
  # pass, a layer has one convolution for the gradient of its kernel and, except for the
  # first layer, one for the gradient of its input.
  outputs = 32 * 3 * 32**2, 32 * 16**2
  forward = 2 * 9 * 32 * sum(outputs)
  first = 2 * 9 * 32 * 32 * 32**2
  flops = plain["gflop_per_cpu_second"] * plain["cpu_seconds"] * 1e9
  assert 0.8 < flops / (3 * forward - first) < 1.2
  assert "--xla_cpu_mine=true" in unknown["error"]
  (file,) = tmp_path.iterdir()
  with file.open() as opened:
    assert [row["switch"] for row in csv.DictReader(opened)] == [
      "none",
      "--xla_cpu_mine=true",
    ]
