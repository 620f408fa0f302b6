"""Accuracy against the number of clean examples, at small scale: data, rows, errors."""

import re

import numpy as np
import pytest
import scripts

from experiments import clean_examples as script
from experiments.lib import early_stopping
from experiments.lib import report
from experiments.lib import runner
from l2rw_jax.io import metric_writer
from l2rw_jax.training import results as results_lib

_NAME = "clean_examples"
_SMALL = (
  *("--datasets=digits", "--num_clean=1", "--num_clean=3", "--num_validation=50"),
  *("--largest_class=60", "--imbalance=10", "--num_steps=4", "--eval_every=2"),
  *("--batch_size=10", "--num_devices=1", "--problems=symmetric"),
  # One learning rate, so that methods share compiled programs.
  "--learning_rate=1e-3",
)
_SETTINGS = script.Settings(
  datasets=("digits",),
  num_clean=(1, 3),
  num_validation=50,
  largest_class=60,
  imbalance=10.0,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run's folder and what it printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  methods = "early_stopped,uniform,clean_only"
  done = scripts.run(_NAME, *_SMALL, "--num_seeds=2", f"--methods={methods}", cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.ci
def test_rows_of_every_number_of_clean_images(run):
  folder, printed = run
  rows, _, _ = scripts.saved_rows(folder)
  counts = {"uniform": [0], "clean_only": [1, 3], "early_stopped": [1, 3]}
  assert [(r["method"], r["num_clean"], r["seed"]) for r in rows] == [
    (method, count, seed)
    for method in counts
    for count in counts[method]
    for seed in (0, 1)
  ]
  assert all(re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", r["commit"]) for r in rows)
  assert len(scripts.table(printed)) == 1 + 1 + 2 + 2
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_methods_are_not_trained_again_for_settings_that_have_no_effect():
  cells = script.make_cells(_SETTINGS, tuple(script.METHODS))
  trained = {}
  for cell in cells:
    facts = (cell.facts["problem"], cell.facts["num_clean"])
    trained.setdefault(cell.method_name, []).append(facts)
  once = [(problem, 3) for problem in script.PROBLEMS]
  each = [(problem, count) for problem in script.PROBLEMS for count in (1, 3)]
  clean_only = [("symmetric", count) for count in (1, 3)]
  assert trained == {
    **dict.fromkeys(script.METHODS, each),
    **dict.fromkeys(("uniform", "no_clean_data", "early_stopped"), once),
    "clean_only": clean_only,
  }
  # Training on the clean images alone has a row under every problem.
  (cell,) = (c for c in cells if c.folder == "digits-symmetric-3-clean_only")
  fields = {**dict.fromkeys(report.RUN_FIELDS), "last": {"accuracy": 0.5}}
  result = results_lib.Result(fields, {}, {}, {}, {})
  rows = script.make_rows(_SETTINGS, cell, result)
  assert [(row["problem"], row["accuracy_percent"]) for row in rows] == [
    (problem, 50.0) for problem in script.PROBLEMS
  ]


def test_accuracy_on_held_out_images_is_not_called_test_accuracy(
  tmp_path, monkeypatch, capsys
):
  fields = {**dict.fromkeys(report.RUN_FIELDS), "last": {"accuracy": 0.5}}
  result = results_lib.Result(fields, {}, {}, {}, {})
  monkeypatch.setattr(runner, "train", lambda *_: [result])
  settings = _SETTINGS.replace(evaluate_on="validation", methods=("uniform",))
  script.run(settings.replace(problems=("symmetric",)), tmp_path)
  (heading,) = scripts.table(capsys.readouterr().out)[0][-2:-1]
  assert heading == "validation accuracy %"


@pytest.mark.ci
def test_early_stopping_chooses_by_the_clean_images_alone(run):
  folder, _ = run
  rows, _, _ = scripts.saved_rows(folder)
  chosen = [row for row in rows if row["method"] == "early_stopped"]
  assert len(chosen) == 2 * 2
  for row in chosen:
    place = f"digits-{row['problem']}-3-early_stopped/seed-{row['seed']}"
    measured = [
      m for m in metric_writer.read(folder / place) if "probe/test/accuracy" in m
    ]
    assert [m["step"] for m in measured] == [0, 2, 4]
    best = min(measured, key=lambda m: m[f"probe/clean_loss_{10 * row['num_clean']}"])
    assert row["kept_step"] == best["step"]
    assert row["accuracy_percent"] == 100 * best["probe/test/accuracy"]


def test_only_the_meta_set_depends_on_its_size():
  sizes = set()
  for problem in script.PROBLEMS:
    (few,) = script.make_splits(_SETTINGS, "digits", problem, 1, (0,))
    (many,) = script.make_splits(_SETTINGS, "digits", problem, 3, (0,))
    np.testing.assert_array_equal(few.train.image, many.train.image)
    np.testing.assert_array_equal(few.train.label, many.train.label)
    np.testing.assert_array_equal(few.meta.label, np.tile(np.arange(10), 3))
    np.testing.assert_array_equal(few.meta.image[:10], many.meta.image[:10])
    # Few clean images are repeated up to the number of the largest clean set.
    np.testing.assert_array_equal(few.meta.image[10:20], few.meta.image[:10])
    assert len(np.unique(many.meta.image.reshape(30, -1), axis=0)) == 30
    both = np.concatenate([many.meta.image, few.train.image]).reshape(-1, 64)
    assert len(np.unique(both, axis=0)) == len(both)
    sizes.add(len(few.train.label))
    is_wrong = few.train.label != few.train.true_label
    assert (is_wrong.mean() > 0.3) == (problem != "long_tail")
  assert len(sizes) == 1


def test_held_out_images_are_neither_in_the_test_set_nor_trained_on():
  settings = _SETTINGS.replace(evaluate_on="validation")
  (tuned,) = script.make_splits(settings, "digits", "symmetric", 3, (0,))
  (final,) = script.make_splits(_SETTINGS, "digits", "symmetric", 3, (0,))
  np.testing.assert_array_equal(tuned.train.image, final.train.image)
  assert len(tuned.test.label) == 50
  parts = (tuned.test, tuned.train, tuned.meta, final.test)
  images = np.concatenate([part.image.reshape(-1, 64) for part in parts])
  assert len(np.unique(images, axis=0)) == len(images)


def test_flags_without_effect_on_the_chosen_methods_are_noted():
  settings = script.Settings(fine_tuning_share=0.9, lookahead_learning_rate=7.0)
  settings = settings.replace(eval_every=1)
  assert settings.notes([*script.METHODS], ["uniform"]).count("has no effect") == 3


_MISTAKES = {
  "method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "no_data": (["--datasets="], "--datasets has no value, or an empty one: give"),
  "comma": (["--datasets=digits,"], "--datasets has no value, or an empty one: give"),
  "unknown_data": (["--datasets=nmist"], "--datasets=nmist: unknown data set 'nmist'"),
  "held_out": (
    ["--evaluate_on=validation", "--num_validation=0"],
    "--evaluate_on=validation needs --num_validation",
  ),
  "problem": (["--problems=magic"], "should be one of <symmetric|pair_flip|long_tail>"),
  "divides": (["--num_clean=2"], "--num_clean=2 does not divide the largest, 3:"),
  "many": (["--largest_class=150"], "--largest_class=150 and --num_clean=3 need more"),
  "other_settings": (["--workdir={run}", "--num_steps=5"], "num_steps was 4, now 5"),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  shared = (*_SMALL, "--num_seeds=2", "--methods=uniform")
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *shared, kept=run[0], run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


@pytest.mark.parametrize(
  ("losses", "step"),
  [
    ((3.0, 1.0, 2.0), 20),
    ((None, 2.0, 1.0), 30),
    ((-float("inf"), 2.0, 1.0), 30),
    ((None, float("inf"), None), 10),
  ],
)
def test_early_stopping_keeps_the_lowest_finite_loss(losses, step):
  probes = {
    "step": [10, 20, 30],
    "clean_loss_5": list(losses),
    "test/accuracy": [0.1, 0.2, 0.3],
  }
  kept = early_stopping.at_lowest_loss({"probes": probes}, 5)
  assert kept == {"accuracy": step / 100, "kept_step": step}
