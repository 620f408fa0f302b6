"""The coreset experiment on digits: curves, accuracy at equal times, errors."""

import csv

import numpy as np
import pytest
import scripts

from experiments import coreset as script
from experiments.lib import curves

_NAME = "coreset"
_SMALL = (
  "--dataset=digits",
  "--model=logistic",
  "--num_steps=8",
  "--eval_every=2",
  "--fraction=0.1",
  "--refresh_every=1",
  "--num_seeds=1",
  "--num_devices=1",
)
_METHODS = ["full", "random", "random_fixed", "craig", "adacore"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a short run, and the text that the run printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  done = scripts.run(_NAME, *_SMALL, cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


def test_a_file_that_has_changed_is_read_again(tmp_path):
  path = tmp_path / "data.npz"
  for value in (7, 9):
    images = np.full((40, 4, 4, 1), value, np.uint8)
    labels = np.arange(40) % 2
    np.savez(path, X=images, y=labels, X_test=images, y_test=labels)
    settings = script.Settings(dataset=f"npz:{path}", fraction=(0.5,)).resolve()
    (split,) = script.make_splits(settings, (0,))
    assert (np.asarray(split.train.image) == value).all()
    assert script.make_splits(settings, (0,))[0] is split


@pytest.mark.ci
def test_the_table_has_a_line_for_each_method(run):
  _, printed = run
  header, *lines = scripts.table(printed)
  assert header[:4] == ["network", "fraction", "method", "test accuracy %"]
  assert [line[2] for line in lines] == _METHODS
  assert [line[1] for line in lines] == ["1"] + 4 * ["0.1"]
  assert {line[-1] for line in lines} == {"1"}


@pytest.mark.ci
def test_rows_describe_runs_and_curves(run):
  folder, _ = run
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert flags["fraction"] == [0.1] and len(rows) == len(csv_rows) == 5
  with open(folder / "curves.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 5 * 4
  for number, row in enumerate(rows):
    curve_lines = lines[4 * number : 4 * number + 4]
    assert {line["method"] for line in curve_lines} == {row["method"]}
    assert [int(line["step"]) for line in curve_lines] == [2, 4, 6, 8]
    seconds = [float(line["seconds"]) for line in curve_lines]
    assert seconds == sorted(seconds)
    assert row["seconds"] == pytest.approx(seconds[-1], abs=1e-4)
    last = float(curve_lines[-1]["accuracy_percent"])
    assert row["accuracy_percent"] == pytest.approx(last, abs=0.01)
    assert 0 < row["equal_seconds"] <= row["seconds"]
    # A subset has 129 or 130 of the 1,297 images, in batches of 20: after six steps
    # another subset is selected.
    expected = {"full": 0, "random_fixed": 1}.get(row["method"], 2)
    assert row["num_selections"] == expected
    assert row["selection_seconds"] < row["seconds"]
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_call_repeats_the_first_and_imbalance_makes_a_tail(run):
  folder, printed = run
  before = (folder / "results.csv").read_bytes()
  tail = folder.parent / "tail"
  again, imbalanced = scripts.run_many(
    _NAME,
    [
      [*_SMALL, f"--workdir={folder}"],
      [
        *_SMALL,
        "--imbalance=4",
        "--methods=full,craig",
        "--greedy=lazy",
        f"--workdir={tail}",
      ],
    ],
  )
  assert again.status == 0 and again.stderr == "", again
  assert scripts.table(again.stdout) == scripts.table(printed)
  assert (folder / "results.csv").read_bytes() == before
  assert imbalanced.status == 0 and imbalanced.stderr == "", imbalanced
  rows, _, _ = scripts.saved_rows(tail)
  assert {row["imbalance"] for row in rows} == {4.0}
  assert rows[0]["num_train"] < 1000


# -- functions of the script, without training -------------------------------


def _curve(seconds, percent):
  steps = np.arange(1, len(seconds) + 1)
  return curves.Curve(steps, np.array(seconds), np.array(percent))


def test_a_curve_by_hand():
  curve = _curve([1.0, 2.0, 4.0], [50.0, 80.0, 90.0])
  assert curve.at(3.0) == 85.0
  assert np.isnan(curve.at(0.5)) and curve.at(9.0) == 90.0
  assert [curve.reaches(x) for x in (50, 75, 90, 91)] == [1.0, 2.0, 4.0, None]


def test_equal_seconds_are_those_of_the_shortest_run():
  curves = [_curve([1.0, 4.0], [60.0, 90.0]), _curve([2.0, 8.0], [70.0, 100.0])]
  rows = [
    {"network": "mlp", "seed": 0, "seconds": c.seconds[-1], "curve": c} for c in curves
  ]
  rows.append({**rows[0], "network": "logistic", "seconds": 2.0})
  rows.append({**rows[1], "seed": 1})
  result = script.with_equal_seconds(rows)
  assert [r["equal_seconds"] for r in result] == [4.0, 4.0, 2.0, 8.0]
  assert [r["percent_at_equal"] for r in result] == [90.0, 80.0, 70.0, 100.0]
  assert [r["percent_at_half"] for r in result] == [70.0, 70.0, 60.0, 80.0]


def test_the_curve_of_full_is_in_every_panel():
  rows = [
    {"network": "mlp", "method": "full", "fraction": 1.0},
    {"network": "mlp", "method": "craig", "fraction": 0.1},
    {"network": "mlp", "method": "craig", "fraction": 0.3},
  ]
  result = script.panels(rows)
  assert result == {("mlp", 0.1): [0, 1], ("mlp", 0.3): [0, 2]}
  assert script.panels(rows[:1]) == {("mlp", 1.0): [0]}


# -- mistakes ----------------------------------------------------------------

_MISTAKES = {
  "unknown_method": (["--methods=magic"], "--methods=magic: choose among full, random"),
  "no_method": (["--methods="], "--methods= is empty: choose among full"),
  "unknown_model": (["--model=lenet"], "--network=lenet: choose among logistic, mlp"),
  "fraction_0": (
    ["--fraction=0"],
    "--fraction=0 must lie between 1e-06 and 1",
  ),
  "fraction_2": (["--fraction=2"], "--fraction=2 must lie between 1e-06 and 1"),
  "fraction_nan": (["--fraction=nan"], "--fraction=nan is not a finite number"),
  "few": (
    ["--fraction=0.005"],
    "--fraction=0.005: cannot choose size=6 of 1297 examples in 10 classes: size"
    " must lie between 10 and 1297. Raise --fraction.",
  ),
  "batch": (
    ["--fraction=0.01", "--batch_size=20"],
    "--fraction=0.01 keeps 13 of 1297 images, fewer than --batch_size=20: raise",
  ),
  "epsilon": (["--greedy_epsilon=1e-320"], "--greedy_epsilon=1e-320 must lie"),
  "imbalance": (["--imbalance=0.5"], "--imbalance=0.5 must lie between 1 and"),
  "refresh": (["--refresh_every=0"], "=0 must lie between 1 and"),
  "budget": (["--budget=fair"], "should be one of <proportional|equal>"),
  "no_data": (["--dataset=mnist", "--data_dir={tmp}/none"], "'mnist' does not exist"),
  "other_settings": (["--workdir={run}", "--momentum=0.9"], "momentum was 0.0, now"),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  small = [flag for flag in _SMALL if not flag.startswith("--fraction")]
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *small, kept=run[0], tmp=folder, run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])
