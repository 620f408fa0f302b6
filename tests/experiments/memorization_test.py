"""The sweep, its numbers by other computations, and --probes of other scripts."""

import json
import re

import numpy as np
import pytest
import scripts

from experiments import memorization as script
from l2rw_jax import susceptibility

_NAME = "memorization"
_SMALL = (
  *("--dataset=digits", "--num_train=150", "--num_epochs=2", "--batch_size=50"),
  *("--networks=mlp-4,mlp-8x2", "--learning_rate=0.1", "--num_seeds=2"),
  "--num_devices=1",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a small sweep at two noise fractions, and what it printed."""
  folder = tmp_path_factory.mktemp(_NAME) / "run"
  noises = ("--noise_fraction=0.5", "--noise_fraction=0")
  done = scripts.run(_NAME, *_SMALL, *noises, f"--workdir={folder}")
  assert done.status == 0 and done.stderr == "", done.stderr
  return folder, done.stdout


@pytest.mark.ci
def test_rows_are_what_the_runs_measured(run):
  folder, _ = run
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert len(rows) == len(csv_rows) == 2 * 2 * 2
  assert flags["dataset"] == "digits" and flags["num_seeds"] == 2
  for row in rows:
    place = f"noise-{row['noise_fraction']}/{row['network']}-rate-0.1-decay-0.0005"
    path = folder / place / f"seed-{row['seed']}" / "results.json"
    results = json.loads(path.read_text())
    probes = results["probes"]
    # Before each of two epochs of three steps, and at the end.
    assert probes["step"] == [0, 3, 6] and results["num_steps"] == 6
    assert row["susceptibility"] == np.mean(probes["susceptibility_drop"][:2])
    assert row["accuracy_percent"] == 100 * results["last"]["accuracy"]
    assert row["train_percent"] == 100 * probes["train_accuracy"][-1]
    wrong = row["wrong_labels_percent"] / 100
    if row["noise_fraction"] == 0:
      assert wrong == 0 and row["wrong_subset_percent"] is None
      assert row["clean_subset_percent"] == row["train_percent"]
    else:
      # Half of the 150 labels are drawn from all ten classes, so that a tenth of this
      # half stays right.
      assert wrong == pytest.approx(0.45, abs=0.15)
      mean = wrong * row["wrong_subset_percent"]
      mean += (1 - wrong) * row["clean_subset_percent"]
      assert mean == pytest.approx(row["train_percent"], rel=1e-5)
  # Each noise fraction and seed has one training set, the same for all networks.
  training_sets = {(row["noise_fraction"], row["seed"], row["data"]) for row in rows}
  assert len(training_sets) == 4


@pytest.mark.ci
def test_each_model_is_in_a_region_of_its_noise(run):
  folder, printed = run
  rows, _, _ = scripts.saved_rows(folder)
  keys = [(row["noise_fraction"], row["region"]) for row in rows]
  assert keys == sorted(keys)
  for fraction in (0.0, 0.5):
    runs = [row for row in rows if row["noise_fraction"] == fraction]
    result = susceptibility.regions(
      [row["susceptibility"] for row in runs], [row["train_percent"] for row in runs]
    )
    assert [row["region"] for row in runs] == result.tolist()
  header, *lines = scripts.table(printed.split("Clean test accuracy")[0])
  assert header[:2] == ["noise_fraction", "models of"] and header[-1] == "models"
  actual = [(float(line[0]), line[1], int(line[-1])) for line in lines]
  counts = {key: keys.count(key) for key in keys}
  assert actual == [(f, f"region {r}", count) for (f, r), count in counts.items()]


@pytest.mark.ci
def test_figures_and_correlations(run):
  folder, printed = run
  for name in ("figure.png", "curves.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / name).stat().st_size > 10_000
  header, clean, noisy = scripts.table(printed.split("Rank correlations")[1])
  assert header[1] == "susceptibility, accuracy on wrong labels"
  assert clean[:2] == ["0", "-"] and noisy[0] == "0.5"
  assert all(re.fullmatch(r"[+-]\d\.\d\d", cell) for cell in noisy[1:])
  assert printed.splitlines()[-1].endswith("results.csv, figure.png, curves.png")


def _rows():
  """Four models at one noise fraction, and a fifth whose loss overflowed."""
  zeta = [0.1, 0.5, 0.2, 0.8, None]
  train = [60.0, 90.0, 30.0, 35.0, 40.0]
  wrong = [10.0, 80.0, 20.0, 90.0, 5.0]
  test = [90.0, 70.0, 50.0, 40.0, 10.0]
  return [
    {
      **{"dataset": "digits", "noise_fraction": 0.5, "network": "mlp-4"},
      **{"learning_rate": 0.1, "susceptibility": z, "train_percent": a},
      **{"wrong_subset_percent": w, "accuracy_percent": t},
    }
    for z, a, w, t in zip(zeta, train, wrong, test, strict=True)
  ]


def test_regions_skip_models_without_susceptibility():
  # The means are 0.4 and 53.75; with the fifth model the latter would be 51.
  result = script.with_regions(_rows())
  assert [row["region"] for row in result] == [1, 2, 3, 4, None]
  (alone,) = script.with_regions(_rows()[:1])
  assert alone["region"] is None


def test_accuracy_by_region_by_hand():
  rows = script.with_regions([*_rows(), {**_rows()[0], "seed": 1}])
  (line,) = scripts.table(script.accuracy_by_region(rows))[1:]
  # The mean of zeta is 0.34, of training accuracy 55.
  assert line[0] == "0.5" and line[2] == "90.00 ± 0.00 (2)"
  assert line[1] == f"68.00 ± {np.std([90, 70, 50, 40, 90], ddof=1):.2f} (5)"
  # One model has no spread.
  assert line[3:] == ["70.00 (1)", "50.00 (1)", "40.00 (1)"]
  (line,) = scripts.table(script.accuracy_by_region(_rows()[4:]))[1:]
  assert line == ["0.5", *5 * ["-"]]


def test_correlations_by_hand():
  text = script.correlations(_rows())
  # Ranks of zeta 1 3 2 4; wrong 1 3 2 4; test 4 3 2 1, so 1 - 6 * 18 / 60.
  # Ranks of training accuracy 3 4 1 2 against 4 3 2 1: 1 - 6 * 4 / 60.
  assert scripts.table(text)[1] == ["0.5", "+1.00", "-0.80", "+0.60"]


def test_a_model_without_curves_is_not_drawn(tmp_path):
  (overflowed,) = _rows()[4:]
  path = tmp_path / "curves.png"
  assert not script.draw_curves([(overflowed, {})], path)
  assert not path.exists()
  script.draw([overflowed], tmp_path / "figure.png")
  assert (tmp_path / "figure.png").exists()


_MISTAKES = {
  "network": (["--networks=mlp-x"], "--networks=mlp-x: give lenet, mlp-WIDTH or"),
  "network_wide": (["--networks=mlp-99999999999"], "a width of at most 65536"),
  "network_deep": (["--networks=mlp-9999x100"], "at most 1073741824 weights in all"),
  "network_zero": (["--networks=mlp-0"], "--networks=mlp-0: give lenet"),
  "one_model": (
    ["--networks=mlp-4,mlp-4", "--num_seeds=1"],
    "a comparison needs at least two models: give more --networks",
  ),
  "no_network": (["--networks="], "a comparison needs at least two models"),
  "fraction": (["--noise_fraction=1.5"], "=1.5 must lie between 0 and 1"),
  "few": (["--num_unlabeled=5"], "--num_unlabeled=5, --batch_size="),
  "num_train": (["--num_train=1298"], "--num_train=1298 exceeds the 1297 images"),
  "unlabeled": (
    ["--num_unlabeled=40"],
    "a batch needs 50 unlabeled images, but there are 40",
  ),
  "all_unlabeled": (["--num_unlabeled=1297"], "nothing is left to train on"),
  "batch": (["--batch_size=151"], "is larger than the 150 training examples"),
  "learning_rate": (["--learning_rate=-1"], "=-1 must lie between"),
}
_DIGITS = ("--num_steps=1", "--num_seeds=1", "--methods=uniform", "--num_devices=1")
_PROBES = ("susceptibility", "training_accuracy")


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  return scripts.run_mistakes(_NAME, _MISTAKES, folder, *_SMALL, kept=run[0])


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
  """The folder of two runs of digits_noise: without probes, and with both probes."""
  folder = tmp_path_factory.mktemp("probes")
  done = scripts.run_many(
    "digits_noise",
    [
      [*_DIGITS, f"--workdir={folder}/plain"],
      [*_DIGITS, f"--workdir={folder}/probed", f"--probes={','.join(_PROBES)}"],
    ],
  )
  assert all(outcome.status == 0 for outcome in done), done
  return folder


@pytest.mark.slow
def test_probes_do_not_change_training(probed):
  (plain,), _, plain_flags = scripts.saved_rows(probed / "plain")
  (row,), _, flags = scripts.saved_rows(probed / "probed")
  drop = row.pop("susceptibility")
  assert row == plain and abs(drop) > 1e-4
  extra = {"probes": list(_PROBES), "probe_images": "train", "probe_batch_size": 128}
  assert flags == {**plain_flags, **extra}
  path = probed / "probed" / "uniform" / "seed-0" / "results.json"
  probes = json.loads(path.read_text())["probes"]
  assert probes["step"] == [0, 1] and probes["susceptibility_drop"][0] == drop
  subsets = {"train_accuracy", "train_accuracy_clean", "train_accuracy_wrong"}
  assert subsets < set(probes)
