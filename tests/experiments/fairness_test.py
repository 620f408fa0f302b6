"""The fairness experiment on digits: its files, condensation, its errors."""

import numpy as np
import pytest
import scripts

_NAME = "fairness"
_SMALL = ("--dataset=digits", "--num_steps=4", "--num_seeds=2", "--num_devices=1")
_METHODS = ["forml_worst", "uniform", "l2rw"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a short run, and the text that the run printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  methods = f"--methods={','.join(_METHODS)}"
  done = scripts.run(_NAME, *_SMALL, methods, "--condense=50,30", cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.ci
def test_the_table(run):
  _, printed = run
  header, *lines = scripts.table(printed)
  assert header == [
    "method",
    "accuracy %",
    "worst group %",
    "largest TPR gap %",
    "mean TPR gap %",
    "seeds",
  ]
  assert [line[0] for line in lines] == [
    *_METHODS,
    "uniform on top 50% by forml_worst",
    "uniform on random 50%",
    "uniform on top 30% by forml_worst",
    "uniform on random 30%",
  ]
  assert {line[-1] for line in lines} == {"2"}
  last = printed.splitlines()[-1]
  assert last == "written: runs/fairness/results.json, results.csv, figure.png"


@pytest.mark.ci
def test_rows_describe_their_runs(run):
  folder, _ = run
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert flags["condense"] == ["50", "30"] and flags["groups"] == "class"
  assert len(rows) == 2 * 7
  for row, csv_row in zip(rows, csv_rows, strict=True):
    given = csv_row.pop("flags")
    assert csv_row == {k: "" if v is None else str(v) for k, v in row.items()}
    assert "--dataset=digits" in given and "--condense=50,30" in given
    assert row["worst_cell_percent"] is None
    assert 0 <= row["worst_group_percent"] <= row["accuracy_percent"] <= 100
    assert 0 <= row["gap_mean_percent"] <= row["gap_max_percent"] <= 100
  # Methods share their data; every seed and every condensation has different data.
  assert len({row["data"] for row in rows}) == 2 * 5
  assert rows[0]["data"] == rows[2]["data"] != rows[1]["data"]
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ci
def test_condensation_keeps_those_with_the_highest_last_weight(run):
  folder, _ = run

  def weights(setting, seed=0):
    path = folder / setting / "seeds-0-1" / f"seed-{seed}" / "weights.csv"
    return np.genfromtxt(path, delimiter=",", names=True)

  whole = weights("forml_worst")
  # An example that was never in a batch has the initial weight 1.
  last_weight = np.nan_to_num(whole["last_weight"], nan=1)
  by_row = dict(zip(whole["source_index"], last_weight, strict=True))
  assert len(set(by_row.values())) > 50
  kept = weights("condensed-forml_worst-top-30")["source_index"]
  assert len(kept) == round(0.3 * len(whole))
  dropped = set(by_row) - set(kept)
  assert min(by_row[i] for i in kept) >= max(by_row[i] for i in dropped)
  assert set(kept) < set(weights("condensed-forml_worst-top-50")["source_index"])
  other = weights("condensed-forml_worst-random-30")["source_index"]
  assert len(other) == len(kept) and set(other) != set(kept)


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_inverted_groups_have_cells(run):
  folder, printed = run
  metrics = {p: p.stat().st_mtime_ns for p in folder.rglob("metrics.jsonl")}
  methods = f"--methods={','.join(_METHODS)}"
  again, inverted = scripts.run_many(
    _NAME,
    [
      [*_SMALL, methods, "--condense=50,30", f"--workdir={folder}"],
      [
        *_SMALL,
        "--groups=inverted",
        "--methods=uniform,forml_gap",
        f"--workdir={folder.parent}/inverted",
      ],
    ],
  )
  assert again.status == 0 and again.stderr == "", again
  assert scripts.table(again.stdout) == scripts.table(printed)
  assert {p: p.stat().st_mtime_ns for p in metrics} == metrics
  assert inverted.status == 0 and inverted.stderr == "", inverted
  assert scripts.table(inverted.stdout)[0][3] == "worst class and group %"
  rows, _, _ = scripts.saved_rows(folder.parent / "inverted")
  for row in rows:
    assert row["groups"] == "inverted"
    assert row["worst_cell_percent"] <= row["worst_group_percent"]
    assert row["worst_group_percent"] <= row["accuracy_percent"]


_MISTAKES = {
  "unknown_method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "no_method": (["--methods="], "--methods= is empty: choose among uniform"),
  "unknown_groups": (["--groups=gender"], "should be one of <class|inverted>"),
  "no_data": (["--dataset=mnist", "--data_dir={tmp}/none"], "'mnist' does not exist"),
  "imbalance": (["--imbalance=0.5"], "--imbalance=0.5 must lie between 1 and"),
  "imbalance_large": (["--imbalance=500"], "use --imbalance=121 or less"),
  "imbalance_nan": (["--imbalance=nan"], "--imbalance=nan is not a finite number"),
  "share": (
    ["--groups=inverted", "--minority_share=1"],
    "--minority_share=1 must lie between",
  ),
  "share_small": (
    ["--groups=inverted", "--minority_share=0.0005"],
    "--minority_share=0.0005 is less than one image of the 116 of a class",
  ),
  "noise": (["--noise_fraction=2"], "=2 must lie between 0 and 1"),
  "no_exemplars": (
    ["--num_exemplars=0"],
    "group 0 has no member in the exemplar set (10 of 10 groups have none): add"
    " examples of it. Raise --num_exemplars.",
  ),
  "no_inverted_exemplars": (
    ["--groups=inverted", "--num_exemplars=0", "--methods=forml_gap"],
    "(2 of 2 groups have none): add examples of it. Raise --num_exemplars.",
  ),
  "exemplars_many": (["--num_exemplars=200"], "lower --num_exemplars"),
  "meta_batch": (["--meta_batch_size=51"], "larger than the meta set of 50 clean"),
  "batch": (["--batch_size=1000"], "is larger than the"),
  "temperature": (["--temperature=-1"], "=-1 must lie between"),
  "reduction": (["--reduction=sum"], "should be one of <mean|max>"),
  "condense_0": (["--condense=0"], "--condense=0: give whole percentages between 1"),
  "condense_text": (["--condense=ten"], "--condense=ten: give whole percentages"),
  "condense_small": (
    ["--condense=10"],
    "keeps 49 of 491 images, fewer than --batch_size=100",
  ),
  "condense_without": (
    ["--condense=50", "--methods=uniform"],
    "a forml_ method of --methods; --condense_by is not given. Choose among",
  ),
  "condense_by_alone": (
    ["--condense_by=nope"],
    "--condense_by=nope needs --condense: give percentages",
  ),
  "condense_by": (
    ["--condense=50", "--condense_by=forml_mean", "--methods=forml_gap"],
    "--condense_by is 'forml_mean'. Choose among forml_mean",
  ),
  "other_settings": (
    ["--workdir={run}", "--momentum=0.9"],
    "momentum was 0.0, now 0.9",
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *_SMALL, kept=run[0], tmp=folder, run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])
