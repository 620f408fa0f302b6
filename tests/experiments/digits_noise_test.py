"""The script `digits_noise`: its files, its errors, interruptions."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import scripts
from sklearn import metrics

from experiments import digits_noise

_NAME = "digits_noise"
_SMALL = ("--num_steps=4", "--num_seeds=2", "--num_devices=1")
_FLAGS = {
  "methods": ["l2rw", "uniform"],
  "noise": "uniform_flip",
  "noise_fraction": 0.3,
  "num_meta": 5,
  "num_seeds": 2,
  "num_steps": 4,
  "batch_size": 100,
  "meta_batch_size": None,
  "learning_rate": 0.1,
  "momentum": 0.0,
  "schedule": "cosine",
  "num_devices": 1,
  "checkpoint_every": 1000,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder where a short run was started without --workdir, and its output."""
  cwd = tmp_path_factory.mktemp(_NAME)
  (cwd / "flags.txt").write_text("\n".join([*_SMALL, "--noise_fraction=0.3"]))
  done = scripts.run(_NAME, "--flagfile=flags.txt", "--methods=l2rw,uniform", cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd, done.stdout


def test_table_and_written_files_are_printed(run):
  _, printed = run
  header, *lines = scripts.table(printed)
  assert header[0] == "method" and header[-1] == "seeds"
  assert [(line[0], line[-1]) for line in lines] == [("l2rw", "2"), ("uniform", "2")]
  assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", line[1]) for line in lines)
  assert printed.splitlines()[-1] == (
    "written: runs/digits_noise/results.json, results.csv, figure.png, issues.csv,"
    " issues.html (open it in a browser)"
  )


def test_list_of_the_labels_of_the_first_seed(run):
  cwd, printed = run
  folder = cwd / "runs" / _NAME
  with open(folder / "issues.csv", newline="") as file:
    listed = list(csv.DictReader(file))
  (text,) = re.findall(
    r'id="data">(.*?)</script>', (folder / "issues.html").read_text()
  )
  content = json.loads(text)
  settings = digits_noise.Settings(noise_fraction=0.3)
  (split,) = digits_noise.make_splits(settings, (0,))
  is_wrong = dict(
    zip(
      split.train.source_index, split.train.label != split.train.true_label, strict=True
    )
  )
  # Four batches of a hundred examples: the other examples were never seen.
  known = [row for row in listed if row["score"]]
  hits = [is_wrong[int(row["index"])] for row in known]
  assert len(listed) == 1247 and len(known) == 400
  auroc = metrics.roc_auc_score(hits, [float(row["score"]) for row in known])
  rows, _, _ = scripts.saved_rows(folder)
  assert rows[0]["audit_auroc"] == pytest.approx(auroc, abs=1e-3)
  assert content["index"] == [int(row["index"]) for row in listed]
  assert all(content["pictures"]) and len(content["pictures"]) == 500
  assert "ranked by the run of l2rw:" in printed


def test_rows_describe_their_runs(run):
  cwd, printed = run
  folder = cwd / "runs" / _NAME
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert flags == _FLAGS
  order = [("l2rw", 0), ("l2rw", 1), ("uniform", 0), ("uniform", 1)]
  assert [(row["method"], row["seed"]) for row in rows] == order
  for row, csv_row in zip(rows, csv_rows, strict=True):
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", row["commit"])
    assert row["platform"] == "cpu" and row["device_count"] == 8
    for name in ("python", "jax", "jaxlib", "flax", "optax", "numpy"):
      assert re.match(r"\d+\.\d+", row[name])
    assert row["num_steps"] == 4 and 0 < row["accuracy_percent"] < 100
    assert len(row["params_sha256"]) == 64 and len(row["data"]) == 16
    expected = {k: "" if v is None else str(v) for k, v in row.items()}
    given = csv_row.pop("flags")
    assert csv_row == expected
    assert "--noise_fraction=0.3" in given and "--methods=l2rw,uniform" in given
  assert rows[0]["data"] == rows[2]["data"] != rows[1]["data"]
  mean = np.mean([row["accuracy_percent"] for row in rows[:2]])
  assert scripts.table(printed)[1][1].startswith(f"{mean:.2f} ")
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


_MISTAKES = {
  "unknown_flag": (["--nonsense=1"], "Unknown command line flag 'nonsense'"),
  "unknown_method": (["--methods=l2rw,magic"], "--methods=magic: choose among uniform"),
  "no_method": (["--methods="], "--methods= is empty: choose among uniform"),
  "unknown_noise": (
    ["--noise=salt"],
    "should be one of <uniform_flip|background_flip>",
  ),
  "noise_fraction": (["--noise_fraction=1.5"], "=1.5 must lie between 0 and 1"),
  "noise_nan": (
    ["--noise_fraction=nan"],
    "--noise_fraction=nan is not a finite number.",
  ),
  "meta_too_many": (["--num_meta=1000"], "class 0 has 128 images in digits train"),
  "meta_negative": (["--num_meta=-1"], "--num_meta=-1 must lie between 0 and"),
  "meta_none": (["--num_meta=0"], "needs a meta set of clean examples"),
  "meta_batch": (["--meta_batch_size=51"], "larger than the meta set of 50 clean"),
  "meta_batch_zero": (
    ["--meta_batch_size=0"],
    "=0 must lie between 1 and",
  ),
  "batch": (["--batch_size=1248"], "is larger than the 1247 training examples"),
  "batch_zero": (["--batch_size=0"], "=0 must lie between 1 and"),
  "indivisible": (["--num_devices=3"], "=100 is not a multiple of --num_devices=3"),
  "devices": (["--num_devices=9"], "--num_devices=9: this machine has 8 cpu device(s)"),
  "steps": (["--num_steps=many"], "--num_steps=many is not a whole number."),
  "learning_rate": (["--learning_rate=-1"], "=-1 must lie between"),
  "learning_rate_inf": (["--learning_rate=inf"], "is not a finite number"),
  "positional": (["l2rw"], "unexpected argument 'l2rw': flags begin with --."),
  "probe": (["--probes=magic"], "--probes=magic: choose among susceptibility, train"),
  "probe_held_out": (
    ["--probes=susceptibility", "--probe_images=validation"],
    "--probe_images=validation, --probe_batch_size=128: the unlabeled set is empty",
  ),
  "probe_batch": (
    ["--probes=susceptibility", "--probe_batch_size=1248"],
    "a batch needs 1248 unlabeled images, but there are 1247",
  ),
  "probes_later": (
    [
      *("--methods=l2rw", "--noise_fraction=0.3", "--probes=training_accuracy"),
      "--workdir={run}/runs/digits_noise",
    ],
    'probes was absent, now ["training_accuracy"]',
  ),
  "flagfile": (
    ["--flagfile=/nowhere/flags.txt"],
    "--flagfile=/nowhere/flags.txt: No such file",
  ),
  "not_a_folder": (["--workdir={tmp}/file/run"], "/file/run: cannot write (Not a dir"),
  "other_settings": (
    ["--workdir={run}/runs/digits_noise"],
    "holds a run with other settings: --noise_fraction was 0.3, now 0.4",
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder, cwd = tmp_path_factory.mktemp("mistakes"), run[0]
  (folder / "file").touch()
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *_SMALL, kept=cwd, tmp=folder, run=cwd
  )


@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


@pytest.mark.ci
def test_mistake_in_a_shell_is_a_one_line_error(tmp_path):
  done = scripts.start_script(_NAME, "--num_metas=3", cwd=tmp_path)
  scripts.assert_one_line(done, "Unknown command line flag 'num_metas'. Did you mean")
  assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag(tmp_path):
  done = scripts.run(_NAME, "--help", cwd=tmp_path)
  assert done.status == 1 and done.stderr == ""  # absl exits with 1 after --help.
  names = {field.name for field in dataclasses.fields(digits_noise.Settings)}
  for name in names - {"given"}:  # The names of the flags that were passed.
    assert re.search(rf"^  --(\[no\])?{name}:", done.stdout, re.MULTILINE), name
  assert done.stdout.startswith("L2RW against its baselines")


@pytest.mark.slow
def test_full_disk_is_a_one_line_error_and_the_command_continues(tmp_path):
  flags = [*_SMALL, "--methods=uniform", "--workdir=run"]
  module = f"experiments.{_NAME}"
  done = scripts.start("-c", scripts.FULL_DISK, module, 200_000, *flags, cwd=tmp_path)
  scripts.assert_one_line(done, "cannot write the checkpoint of step 4")
  assert "File too large. Correct this (if the disk is full, free" in done.stderr
  assert not list(tmp_path.rglob("results.json"))
  done = scripts.run(_NAME, *flags, cwd=tmp_path)
  assert done.status == 0 and done.stderr == ""
  assert len(scripts.table(done.stdout)) == 2


def test_run_with_settings_equals_the_command(run, tmp_path):
  settings = digits_noise.Settings(
    methods=("l2rw",), noise_fraction=0.3, num_steps=4, num_seeds=2, num_devices=1
  )
  rows = digits_noise.run(settings, tmp_path)
  recorded, _, _ = scripts.saved_rows(run[0] / "runs" / _NAME)
  assert json.loads(json.dumps(rows)) == recorded[:2]


@pytest.mark.slow
def test_divergence_is_the_same_error_when_the_command_is_repeated(tmp_path):
  small = ["--num_seeds=1", "--num_devices=1", "--methods=uniform"]
  small.append("--learning_rate=1e20")
  diverging = [*small, f"--workdir={tmp_path}/run", "--num_steps=9"]
  finished = [*small, f"--workdir={tmp_path}/short", "--num_steps=1"]
  first, again, short = scripts.run_many(_NAME, [diverging, diverging, finished])
  scripts.assert_one_line(first, "uniform, seed 0, step 1: ")
  assert "losses are NaN or infinite; the last good parameters" in first.stderr
  assert again == first
  assert not list((tmp_path / "run").rglob("results.json"))
  # Every loss of the single step was finite, so there is a result, although a bad one.
  assert short.status == 0 and len(scripts.table(short.stdout)) == 2
