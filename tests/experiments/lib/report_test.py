"""Intervals, tables and AUROCs of results, compared with values computed by hand."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from experiments.lib import report
from l2rw_jax.io import workdir


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.5, 4.5, 4.0, 10.0, -2.0]])
def test_interval_is_that_of_student(values):
  interval = report.interval(values)
  low, high = stats.t.interval(
    0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values)
  )
  assert interval.mean == pytest.approx((low + high) / 2)
  assert interval.half_width == pytest.approx((high - low) / 2)
  assert interval.repeats == len(values)


def test_interval_by_hand():
  # Mean 20, standard deviation 10, t(0.975, 2) = 4.302653.
  interval = report.interval([10.0, 20.0, 30.0])
  assert interval.half_width == pytest.approx(4.302653 * 10 / math.sqrt(3), rel=1e-6)
  assert str(interval) == "20.00 ± 24.84" and f"{interval:.1f}" == "20.0 ± 24.8"


def test_interval_of_half_precision_is_computed_in_double_precision():
  values = [60000.0, 60000.0, 49984.0]  # Their sum is infinite in float16.
  assert report.interval(np.float16(values)) == report.interval(values)


def test_a_single_number_has_no_interval():
  interval = report.interval([2.345])
  assert math.isnan(interval.half_width) and str(interval) == "2.35"


def test_table_is_aligned_markdown():
  assert report.table(["a", "method"], [[1, "x"], ["long", None]]) == (
    "| a    | method |\n|------|--------|\n| 1    | x      |\n| long | None   |"
  )


def test_saved_rows_carry_the_flags(tmp_path):
  flags = {"steps": 3, "methods": ["a", "b"], "meta": None}
  rows = [
    {"method": "a, really", "score": 0.1},
    {"method": "b", "score": None, "plateau_data": "meta"},
  ]
  report.save(tmp_path, rows, flags)
  assert workdir.read_record(tmp_path / "results.json") == {
    "flags": flags,
    "rows": rows,
    "files": {"results.csv": workdir.file_digest(tmp_path / "results.csv")},
  }
  with open(tmp_path / "results.csv", newline="") as file:
    read = list(csv.DictReader(file))
  given = "--steps=3 --methods=a,b"
  assert read == [
    {"method": "a, really", "score": "0.1", "plateau_data": "", "flags": given},
    {"method": "b", "score": "", "plateau_data": "meta", "flags": given},
  ]


def test_run_fields_need_every_fact_of_a_run():
  metrics = {name: name for name in report.RUN_FIELDS}
  assert report.run_fields({**metrics, "last": {}}) == metrics
  with pytest.raises(KeyError):
    report.run_fields({"seed": 0})


@pytest.mark.parametrize(
  ("labels", "mean", "expected"),
  [
    ([0, 0, 1, 1], [3, 2, 1, 0], 1.0),
    ([0, 0, 1, 1], [0, 1, 2, 3], 0.0),
    ([0, 1, 0, 1], [2, 1, 0, np.nan], 0.5),
    ([0, 1, 0], [np.nan] * 3, None),
    ([0, 0], [1, 2], None),
    ([1, 1], [1, 2], None),
    ([0, 1], [1, 1 + 1e-12], None),
  ],
)
def test_auroc_by_hand(labels, mean, expected):
  # The true label of every example is 0.
  weights = {"label": np.array(labels), "mean_weight": np.array(mean, float)}
  weights["true_label"] = np.zeros(len(labels), int)
  assert report.auroc(weights) == expected


def test_rejection_auroc_by_hand():
  weights = {
    "label": np.array([0, 0, 1, 1, 1]),
    "true_label": np.zeros(5, int),
    "seen": np.array([4, 2, 4, 2, 0]),
    "rejected": np.array([0, 1, 2, 2, 0]),
    "mean_weight": np.array([1.0, 0.5, 2.0, 3.0, np.nan]),
  }
  np.testing.assert_array_equal(
    report.rejected_share(weights), [0, 0.5, 0.5, 1, np.nan]
  )
  # Of four pairs, three are in order and one is tied; by mean weight, none is in order.
  assert report.rejection_auroc(weights) == 3.5 / 4
  assert report.auroc(weights) == 0
  never = {**weights, "rejected": np.zeros(5, int)}
  assert report.rejection_auroc(never) is None
