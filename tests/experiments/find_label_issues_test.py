"""The audit of a user's data: the files it writes, resumption, and every mistake."""

import csv
import dataclasses
import json
import pathlib
import re
import types

import numpy as np
from PIL import Image
import pytest
import scripts

from experiments import find_label_issues
from experiments.lib import issue_files
from l2rw_jax import audit
from l2rw_jax.data import own_data
from l2rw_jax.training import sampling

_NAME = "find_label_issues"
_WRONG = 12


def _points(seed=0, size=150):
  """Points around three centers; the first labels are wrong."""
  rng = np.random.default_rng(seed)
  truth = rng.integers(3, size=size)
  x = 4 * np.eye(3)[truth] + rng.normal(size=(size, 3))
  given = truth.copy()
  given[:_WRONG] = (given[:_WRONG] + 1 + rng.integers(2, size=_WRONG)) % 3
  return x, given, truth


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """A CSV file of `_points` and one row without a label; and the true classes."""
  x, given, truth = _points()
  path = tmp_path_factory.mktemp("data") / "points.csv"
  names = ["<b>ant</b>", "bee", "=cow()"]
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["a", "b", "c", "kind"])
    writer.writerow([0, 0, 0, ""])
    writer.writerows([*row.round(3), names[y]] for row, y in zip(x, given, strict=True))
  return path, [names[y] for y in truth]


def _flags(table, folder, *more):
  return [
    f"--csv={table[0]}",
    "--label_column=kind",
    "--num_devices=1",
    f"--workdir={folder}",
    *more,
  ]


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
  folder = tmp_path_factory.mktemp(_NAME) / "run"
  done = scripts.run(_NAME, *_flags(table, folder))
  assert done.status == 0 and done.stderr == "", done.stderr
  return folder, done.stdout


def _rows(folder):
  with open(folder / "issues.csv", newline="") as file:
    return list(csv.DictReader(file))


def _content(folder):
  html = (folder / "issues.html").read_text()
  (text,) = re.findall(r'id="data">(.*?)</script>', html)
  return json.loads(text)


def test_wrong_labels_come_first(run, table):
  folder, printed = run
  rows = _rows(folder)
  assert len(rows) == 150
  # Row 0 of the file has no label, so that `_points` begins at index 1.
  first = {int(row["index"]) - 1 for row in rows[:_WRONG]}
  assert len(first & set(range(_WRONG))) >= _WRONG - 1
  num_issues = sum(row["is_issue"] == "True" for row in rows)
  assert f"{num_issues} of 150 labels (" in printed
  assert abs(num_issues - _WRONG) <= 4
  scores = [float(row["score"]) for row in rows]
  assert scores == sorted(scores, reverse=True)
  for row in rows[: _WRONG - 1]:
    assert row["suggested"].removeprefix("'") == table[1][int(row["index"]) - 1]
  # Text that a spreadsheet would evaluate as a formula is quoted.
  assert {row["given"] for row in rows} == {"<b>ant</b>", "bee", "'=cow()"}
  assert all(float(row["mean_loss"]) > 0 and row["seen"] for row in rows)
  assert "mean_score" not in rows[0]


def test_skipped_rows_and_suggestions_are_printed(run):
  folder, printed = run
  assert "1 skipped (row 0: it has no label)." in printed
  assert "given " in printed and ", suggested " in printed
  assert printed.splitlines()[-1] == (
    f"written: {folder}/issues.csv, {folder}/issues.html (open it in a browser)"
  )


def test_page_has_the_rows_of_the_table(run):
  folder, _ = run
  html, content = (folder / "issues.html").read_text(), _content(folder)
  rows = _rows(folder)
  assert content["index"] == [int(row["index"]) for row in rows]
  assert "<b>ant" not in html and content["classes"][0] == "<b>ant</b>"
  assert content["columns"].keys() == {"a", "b", "c"}
  assert len(content["columns"]["a"]) == 150 and set(content["pictures"]) == {""}
  assert content["key"] == "index"
  assert "Skipped: row 0: it has no label" in content["notes"]


def test_same_command_reads_the_finished_run(run, table):
  folder, _ = run
  before = scripts.contents(folder)
  done = scripts.run(_NAME, *_flags(table, folder))
  assert done.status == 0 and done.stdout == run[1]
  assert scripts.contents(folder) == before
  done = scripts.run(_NAME, *_flags(table, folder, "--num_pictures=3"))
  assert done.status == 0 and len(_content(folder)["columns"]["a"]) == 3


@pytest.mark.ci
def test_interrupted_run_continues_to_the_same_list(run, table, tmp_path, monkeypatch):
  flags = _flags(table, tmp_path / "run", "--checkpoint_every=20")
  original = sampling.Sampler.next

  def interrupted(self, step):
    if step == 33:
      raise KeyboardInterrupt
    return original(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(sampling.Sampler, "next", interrupted)
    done = scripts.run(_NAME, *flags)
  assert done.status == 130 and "rerun the same command to continue" in done.stderr
  assert not (tmp_path / "run" / "issues.csv").exists()
  done = scripts.run(_NAME, *flags)
  assert done.status == 0 and done.stderr == ""
  assert _rows(tmp_path / "run") == _rows(run[0])


@pytest.mark.slow
def test_a_folder_of_images_may_have_trusted_images(tmp_path, capsys):
  rng = np.random.default_rng(0)
  for part, size in (("all", 40), ("trusted", 6)):
    for i in range(size):
      truth = i % 2
      given = 1 - truth if part == "all" and i < 4 else truth
      pixels = rng.integers(100, size=(8, 8)).astype(np.uint8)
      pixels[:, 4 * truth : 4 * truth + 4] += 120
      folder = tmp_path / part / f"side {given}"
      folder.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(folder / f"{i}.png")
  (tmp_path / "all" / "side 0" / "broken.png").write_text("no image")
  settings = find_label_issues.Settings(
    images=str(tmp_path / "all"),
    trusted=f"images:{tmp_path / 'trusted'}",
    num_epochs=12,
    num_devices=1,
  )
  issues = find_label_issues.run(settings, tmp_path / "run")
  printed = capsys.readouterr()
  assert "1 skipped (side 0/broken.png" in printed.out and printed.err == ""
  rows = _rows(tmp_path / "run")
  assert len(rows) == 40 and all(row["mean_score"] for row in rows)
  assert sum(row["is_issue"] == "True" for row in rows) == issues.num_issues
  worst = {row["path"].split("/")[1] for row in rows[:4]}
  assert len(worst & {"0.png", "1.png", "2.png", "3.png"}) >= 3
  content = _content(tmp_path / "run")
  assert content["key"] == "path" and all(content["pictures"])
  assert content["names"] == [row["path"] for row in rows]


def test_skipped_rows_and_missing_classes_of_trusted_data_are_printed(tmp_path, capsys):
  def table(name, header, labels):
    path = tmp_path / name
    rows = [f"{i * i},{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join([header, *rows]))
    return str(path)

  data = table("t.csv", "a,quality", np.resize(["x", "y", "z\x1b"], 12))
  mine = table("mine.csv", "a,checked", ["x", "", "x"])
  settings = find_label_issues.Settings(
    csv=data, label_column="quality", trusted=f"csv:{mine}#checked"
  )
  examples = find_label_issues.read_data(settings)
  checked = find_label_issues.read_trusted(settings, examples)
  assert checked.labels.tolist() == [0, 0]
  printed = capsys.readouterr().out
  assert "1 skipped (row 1: it has no label)" in printed
  assert "2 of 3 classes have no trusted example (y, z\\x1b)" in printed
  other = table("other.csv", "a,quality", ["x", "y", "z\x1b"])
  settings = settings.replace(trusted=f"csv:{other}")
  assert find_label_issues.read_trusted(settings, examples).labels.tolist() == [0, 1, 2]
  assert "trusted example" not in capsys.readouterr().out


def test_predictions_that_are_all_equal_give_no_issues(monkeypatch, tmp_path):
  # The network predicts 1/2 for images that are all black, and learns nothing.
  statistics = {"mean_probabilities": np.full((4, 2), 0.5), "seen": np.ones(4)}
  result = types.SimpleNamespace(statistics=statistics)
  monkeypatch.setattr(find_label_issues.loop, "train", lambda *a, **k: [result])
  np.savez(tmp_path / "a.npz", X=np.zeros((4, 8, 8), np.uint8), y=[0, 0, 1, 1])
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  settings = find_label_issues.Settings()
  issues = find_label_issues.train(settings, None, None, data, None, tmp_path)
  assert issues.num_issues == 0 and not issues.score.any()


def test_a_network_that_has_not_learned_is_noted(tmp_path):
  rng = np.random.default_rng(0)
  labels = np.resize([0, 0, 0, 1, 2], 300)  # Of different sizes.
  points = rng.normal(size=(300, 2))
  np.savez(tmp_path / "a.npz", X=points, y=labels)
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  random = rng.dirichlet(np.ones(3), size=300)
  learned = 0.8 * random + 0.2 * np.eye(3)[labels]
  printed = {}
  for name, p in (("random", random), ("learned", learned)):
    issues = audit.find_label_issues({"mean_probabilities": p}, labels)
    printed[name] = issue_files.summary(data, issues)
    issue_files.write(tmp_path, data, issues, name=name, num_pictures=0)
    printed[name] += (tmp_path / "issues.html").read_text()
  assert printed["random"].count("it has not learned the classes") == 2
  assert "and chance with 33%" in printed["random"]
  assert "not learned" not in printed["learned"]


def test_files_have_a_byte_order_mark_only_if_their_text_is_not_ascii(tmp_path):
  np.savez(tmp_path / "a.npz", X=np.eye(4), y=["a", "a", "é", "é"])
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  issues = audit.find_label_issues(
    {"mean_probabilities": np.eye(2)[data.labels]}, data.labels
  )
  issue_files.write(tmp_path, data, issues, name="x", num_pictures=0)
  content = (tmp_path / "issues.csv").read_bytes()
  assert content.startswith(b"\xef\xbb\xbfindex,") and "é" in content.decode()
  form = data.form._replace(class_names=("a", "e"))
  data = dataclasses.replace(data, form=form)
  issue_files.write(tmp_path, data, issues, name="x", num_pictures=0)
  assert (tmp_path / "issues.csv").read_bytes().startswith(b"index,given")


@pytest.mark.parametrize(
  ("flags", "title"),
  [
    ({"dataset": "mnist:3.0.1"}, "mnist:3.0.1"),
    ({"csv": "a:b/t.csv#kind"}, "t.csv#kind"),
    ({"images": "."}, pathlib.Path.cwd().name),
    ({"dataset": "npz:a/x.npz"}, "x.npz"),
  ],
)
def test_the_title_is_the_name_of_the_data(flags, title):
  assert find_label_issues.Settings(**flags).title == title


def test_pixels_are_standardized_whatever_the_order_of_the_examples():
  # The pixels of every third image are 90; a stride of three would see only zeros.
  images = np.zeros((3000, 4, 4, 1), np.uint8)
  images[2::3] = 90
  data = types.SimpleNamespace(features=images)
  data.form = types.SimpleNamespace(class_names=("a", "b"))
  scale = find_label_issues.make_model(data).preprocess
  np.testing.assert_allclose([scale.mean, scale.std], [30, 42.4], rtol=0.1)


_MISTAKES = {
  "nothing": ([], "give exactly one of --images=FOLDER, --npz=FILE, --csv=FILE and"),
  "two": (["--csv={csv}", "--npz=x"], "got --npz and --csv."),
  "no_folder": (["--images={tmp}/none"], "/none is not a folder of images"),
  "no_file": (["--npz={tmp}/none"], "none cannot be read: No such file"),
  "column": (["--csv={csv}", "--label_column=d"], "has no column 'd'; it has a, b, c"),
  "label_column": (["--npz=x", "--label_column=d"], "--label_column is for --csv"),
  "labels": (["--csv={csv}", "--labels=d"], "--labels is for --images: leave it out."),
  "split": (["--dataset=csv:x", "--split=test"], "--split is for a named data set:"),
  "no_split": (["--dataset=digits", "--split=all"], "--split=all: digits has the"),
  "no_dataset": (["--dataset=mnits"], "unknown data set 'mnits'"),
  "trusted": (["--csv={csv}", "--trusted=zip:x"], "--trusted=zip:x: the data 'zip:x'"),
  "no_trusted": (["--csv={csv}", "--trusted=csv:none"], "none cannot be read: No such"),
  "epochs": (["--csv={csv}", "--num_epochs=0"], "--num_epochs=0 must lie between 1"),
  "size": (["--images=x", "--image_size=1"], "--image_size=1 must lie between 4 and"),
  "batch": (["--csv={csv}", "--batch_size=151"], "is larger than the 150 training"),
  "other": (
    ["--csv={csv}", "--seed=1", "--workdir={run}"],
    'other settings: --label_column was "kind", now null; --num_devices was 1,',
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, table, tmp_path_factory):
  folder = tmp_path_factory.mktemp("mistakes")
  places = {"tmp": folder, "csv": table[0], "run": run[0]}
  return scripts.run_mistakes(_NAME, _MISTAKES, folder, kept=run[0], **places)


@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  outcome = mistakes[name]
  assert outcome.status == 2
  (line,) = outcome.stderr.splitlines()
  assert line.startswith("error: ") and _MISTAKES[name][1] in line, line
