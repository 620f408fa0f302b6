"""The MNIST imbalance figure on a small scale: its files and its errors."""

import json
import re

import pytest
import scripts

from experiments import mnist_imbalance as script
from experiments.lib import runner
from experiments.tables import published

_NAME = "mnist_imbalance"
_STEPS = ("--num_steps=2", "--l2rw_steps=2", "--num_devices=1")
_SMALL = (*_STEPS, "--dataset=digits", "--num_seeds=2", "--hard_mining_batch=50")
_FLAGS = (
  "dataset",
  "protocol",
  "l2rw_steps",
  "hard_mining_batch",
  "variant",
  "clean_in_train",
  "num_test",
  "majority",
  "methods",
  "num_seeds",
  "seeds_at_once",
  "num_steps",
  "batch_size",
  "learning_rate",
  "momentum",
  "num_train",
  "num_meta",
  "eval_every",
  "num_devices",
  "checkpoint_every",
)
# Flags that are not saved with the settings of a folder.
_UNSAVED = ("workdir", "data", "data_dir", "cache_dir", "steps_per_call", "flagfile")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a short run, and the text that the run printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  (cwd / "flags.txt").write_text("\n".join([*_SMALL, "--seeds_at_once=2"]))
  done = scripts.run(
    _NAME, "--flagfile=flags.txt", "--majority=0.9", "--methods=l2rw,uniform", cwd=cwd
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.slow
def test_run_writes_rows_and_figures(run):
  folder, printed = run
  header, *lines = scripts.table(printed)
  # Nothing was published for digits.
  assert header == ["majority", "method", "test error %", "splits"]
  outcomes = [(line[0], line[1], line[3]) for line in lines]
  assert outcomes == [("0.9", "l2rw", "2"), ("0.9", "uniform", "2")]
  assert printed.splitlines()[-1].startswith("written: runs/mnist_imbalance/results")
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert set(flags) == set(_FLAGS) and flags["majority"] == [0.9]
  order = [("l2rw", 0), ("l2rw", 1), ("uniform", 0), ("uniform", 1)]
  assert [(row["method"], row["seed"]) for row in rows] == order
  for row, csv_row in zip(rows, csv_rows, strict=True):
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", row["commit"])
    assert row["platform"] == "cpu" and re.match(r"\d+\.\d+", row["jax"])
    assert (row["dataset"], row["protocol"]) == ("digits", "paper")
    assert row["published_error_percent"] is None
    given = csv_row.pop("flags")
    assert csv_row == {k: "" if v is None else str(v) for k, v in row.items()}
    assert "--majority=0.9 " in given and "--seeds_at_once=2" in given
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_adding_methods_does_not_repeat_runs(run):
  folder, _ = run
  times = {p: p.stat().st_mtime_ns for p in folder.glob("majority-*/**/*")}
  flags = [*_SMALL, "--splits_at_once=2", "--majority=0.9", "--majority=0.9"]
  # A method or majority that is given twice is run once.
  methods = "--methods=hard_mining,hard_mining,uniform"
  (done,) = scripts.run_many(_NAME, [[*flags, methods, f"--workdir={folder}"]])
  assert done.status == 0 and done.stderr == "", done
  lines = scripts.table(done.stdout)[1:]
  assert [(line[1], line[-1]) for line in lines] == [
    ("hard_mining", "2"),
    ("uniform", "2"),
  ]
  assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.slow
def test_splits_side_by_side_equal_splits_alone(run, tmp_path):
  folder, _ = run
  flags = [*_SMALL, "--majority=0.9", "--methods=l2rw", f"--workdir={tmp_path}"]
  (done,) = scripts.run_many(_NAME, [[*flags, "--seeds_at_once=1"]])
  assert done.status == 0 and done.stderr == "", done
  for seed in (0, 1):
    together, alone = (
      [json.loads(line) for line in path.read_text().splitlines()]
      for path in (
        folder / f"majority-0.9-l2rw/splits-0-1/seed-{seed}/metrics.jsonl",
        tmp_path / f"majority-0.9-l2rw/splits-{seed}-{seed}/seed-{seed}/metrics.jsonl",
      )
    )
    assert len(together) == len(alone) and "test/loss" in alone[-1]
    for one, other in zip(together, alone, strict=True):
      assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_majorities_share_compiled_steps(monkeypatch, tmp_path):
  calls = []

  def note(config, model, method, optimizer, splits, *args, **kwargs):
    calls.append((config, model, method, optimizer, len(splits[0].train.label)))
    return []

  monkeypatch.setattr(runner.loop, "train", note)
  settings = script.Settings(
    dataset="digits", num_steps=2, l2rw_steps=2, num_seeds=2, seeds_at_once=2
  )
  for name in script.FIGURE_METHODS:
    for majority in (0.9, 0.95):
      runner.train(settings, script.make_cell(settings, name, majority), tmp_path)
    one, other = calls[-2:]
    assert one == other and hash(one) == hash(other), name
  assert len(calls) == 12


_MISTAKES = {
  "unknown_flag": (["--nonsense=1"], "Unknown command line flag 'nonsense'"),
  "unknown_method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "no_method": (["--methods="], "--methods= is empty: choose among uniform"),
  "unknown_data": (["--dataset=nmist"], "unknown data set 'nmist'; did you mean"),
  "no_data": (["--dataset=mnist", "--data_dir={tmp}/none"], "'mnist' does not exist"),
  "protocol": (["--protocol=mine"], "should be one of <paper|official_code>"),
  "majority_0": (["--majority=0"], "--majority=0 must lie between"),
  "majority_1": (["--majority=1"], "--majority=1 must lie between"),
  "majority_1.5": (["--majority=1.5"], "--majority=1.5 must lie between"),
  "majority_nan": (["--majority=nan"], "--majority=nan is not a finite number"),
  "majority_second": (
    ["--majority=0.9", "--majority=0.999"],
    "Use --num_train=130 or less",
  ),
  "majority_text": (["--majority=most"], "--majority=most is not a number."),
  "meta_many": (["--num_meta=140"], "nothing is left to train on"),
  "meta_odd": (["--num_meta=3"], "num_meta must be even"),
  "meta_negative": (["--num_meta=-2"], "--num_meta=-2 must lie between 0 and"),
  "meta_none": (["--num_meta=0"], "needs a meta set of clean examples"),
  "train_many": (["--num_train=5000"], "Use --num_train=144 or less"),
  "train_none": (["--num_train=0"], "=0 must lie between 1 and"),
  "batch": (["--batch_size=132"], "is larger than the 131 training examples"),
  "indivisible": (["--num_devices=3"], "=100 is not a multiple of --num_devices=3"),
  "devices": (["--num_devices=9"], "--num_devices=9: this machine has 8 cpu device(s)"),
  "steps_per_call": (["--steps_per_call=0"], "=0 must lie between 1 and"),
  "splits": (["--num_seeds=0"], "=0 must lie between 1 and"),
  "positional": (["digits"], "unexpected argument 'digits': flags begin with --."),
  "not_a_folder": (["--workdir={tmp}/file/run"], "/file/run: cannot write (Not a dir"),
  "other_settings": (
    ["--workdir={begun}", "--momentum=0"],
    "momentum was 0.9, now 0.0",
  ),
  "num_test": (["--num_test=100"], "--num_test has no effect with --dataset=digits"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
  """Outcomes of command lines with mistakes, and the parent folder of the workdirs."""
  folder, cwd = (tmp_path_factory.mktemp(name) for name in ("mistakes", "begun"))
  (folder / "file").touch()
  begun = scripts.begin(_NAME, *_SMALL, "--methods=l2rw,uniform", cwd=cwd)
  outcomes = scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *_SMALL, kept=begun, tmp=folder, begun=begun
  )
  return outcomes, folder


@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[0][name], _MISTAKES[name][1])


def test_missing_data_error_names_folder_and_remedy(mistakes):
  outcomes, folder = mistakes
  error = outcomes["no_data"].stderr
  assert f"{folder}/none/mnist" in error
  assert "--data_dir=" in error and "download_and_prepare()" in error


def test_helpfull_names_every_flag(tmp_path):
  done = scripts.run(_NAME, "--helpfull", cwd=tmp_path)
  assert done.status == 1 and done.stderr == ""  # As in every absl program.
  for name in (*_FLAGS, *_UNSAVED):
    assert re.search(rf"^  --(\[no\])?{name}:", done.stdout, re.MULTILINE), name
  assert "Ren et al." in done.stdout


@pytest.mark.slow
@pytest.mark.real_data
def test_the_largest_majority_of_the_figure_on_mnist(tfds_dir, decoded, tmp_path):
  done = scripts.run(
    _NAME,
    f"--data_dir={tfds_dir}",
    f"--cache_dir={decoded}",
    "--workdir=run",
    "--majority=0.995",
    "--methods=hard_mining",
    "--num_seeds=1",
    "--protocol=official_code",
    *_STEPS,
    cwd=tmp_path,
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  assert "Published: nothing for these settings." in done.stdout
  assert published.MNIST_IMBALANCE["l2rw"][0.995] == (3.62, 0.65)
  (row,), _, flags = scripts.saved_rows(tmp_path / "run")
  # Two steps are not the published protocol.
  assert (row["batch_size"], row["published_error_percent"]) == (500, None)
  settings = script.Settings(protocol="official_code")
  assert script.make_cell(settings, "l2rw", 0.995).config.batch_size == 100
  assert flags["dataset"] == "mnist"
  assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
