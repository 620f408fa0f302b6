"""The script that fits mentors, and students that load them."""

import json
import shutil

import numpy as np
import optax
import pytest
import scripts

from l2rw_jax import base
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.methods import baselines
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop

_NAME = "mentornet_pretrain"
_SMALL = ("--num_steps=400", "--restarts=2")
_MODEL = classifier.Classifier(mlp.MLP(10, hidden=(32,)), 10)
_OPTIMIZER = optax.sgd(0.5)
_STEPS = 120


def _splits():
  return noisy_labels.noisy_labels(
    sources.load("digits", "train"),
    sources.load("digits", "test"),
    builder="uniform_flip",
    fraction=0.4,
    num_meta_per_class=1,
    seed=0,
  )


def _train(folder, method, epoch_probes=()):
  config = config_lib.Config(num_steps=_STEPS, log_every=10, num_devices=1)
  (result,) = loop.train(
    config,
    _MODEL,
    method,
    _OPTIMIZER,
    [_splits()],
    folder,
    epoch_probes=epoch_probes,
  )
  return result


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
  """A real student's recorded losses, as a script would dump them."""
  folder = tmp_path_factory.mktemp("student")
  writer = loss_dump.Writer(folder / "losses")
  probe = loss_dump.record_losses(writer)
  _train(folder / "run", baselines.uniform(), epoch_probes=[probe])
  train = _splits().train
  path = folder / "dump.npz"
  recorded = writer.combine(
    0, train.label, train.true_label, batch_size=100, num_steps=_STEPS
  )
  loss_dump.write_dump(path, recorded)
  return path


_RUNS = {
  "pd": ["--curriculum=pd", "--num_rows=2000"],
  "dd": ["--curriculum=dd", "--dump={dump}", "--percentile=60"],
  "labels": ["--curriculum=dd", "--dump={dump}", "--use_labels"],
}
_MISTAKES = {
  "curriculum": (
    ["--curriculum=easy"],
    "should be one of <self_paced|hard|focal|spcl|pd|dd>",
  ),
  "no_dump": (["--curriculum=dd"], "--curriculum=dd needs --dump=FILE: losses of a"),
  "missing_dump": (
    ["--curriculum=dd", "--dump=/nowhere/dump.csv"],
    "--dump=/nowhere/dump.csv: cannot read it (No such file",
  ),
  "dump_of_pd": (["--dump=x.npz"], "--dump is for --curriculum=dd: leave it out."),
  "labels_of_pd": (
    ["--use_labels"],
    "--use_labels is for --curriculum=dd: leave it out.",
  ),
  "fraction": (
    ["--curriculum=dd", "--dump={dump}", "--percentile=0.75"],
    "percentile=0.75 must be a number from 0 to 100, not a fraction: use 75.",
  ),
  "percentile": (
    ["--curriculum=dd", "--dump={dump}", "--percentile=101"],
    "--percentile=101 must lie between 0 and 100",
  ),
  "compat": (["--compat=keras"], "should be one of <official_code|paper>"),
  "rows": (
    ["--num_rows=1200001"],
    "--num_rows=1200001 must lie between 100 and 1200000",
  ),
  "seed": (["--seed=9223372036854775808"], "--seed=9223372036854775808 must lie"),
  "batch": (["--batch_size=100000000"], "--batch_size=100000000 must lie between"),
  "one_row": (["--num_rows=1"], "=1 must lie between 100 and"),
  "large_batch": (
    ["--num_rows=1000", "--batch_size=801"],
    "--batch_size is larger than the number of training rows",
  ),
  "rate_nan": (["--learning_rate=nan"], "--learning_rate=nan is not a finite number."),
  "restarts": (["--restarts=0"], "=0 must lie between 1 and"),
  "other_settings": (["--workdir={runs}/pd", "--seed=1"], "seed was 0, now 1"),
  "damaged": (
    ["--workdir={runs}/damaged", *_RUNS["pd"]],
    "damaged/mentor.json is damaged or not a mentor, because it is not JSON",
  ),
}


@pytest.fixture(scope="module")
def done(dump, tmp_path_factory):
  """Folder of the runs, their outcomes, and the outcomes of all mistakes."""
  folder = tmp_path_factory.mktemp(_NAME)
  places = {"dump": dump, "runs": folder}
  commands = [
    [*_SMALL, f"--workdir={folder}/{name}", *(a.format(**places) for a in arguments)]
    for name, arguments in _RUNS.items()
  ]
  runs = scripts.run_many(_NAME, commands)
  shutil.copytree(folder / "pd", folder / "damaged")
  (folder / "damaged" / "mentor.json").write_text('{"kind": ')
  mistakes = scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *_SMALL, kept=folder, **places
  )
  return folder, dict(zip(_RUNS, runs, strict=True)), mistakes


@pytest.mark.ci
@pytest.mark.parametrize("name", _RUNS)
def test_run_writes_rows_and_figures(done, name):
  folder, runs, _ = done
  assert runs[name].status == 0 and runs[name].stderr == "", runs[name]
  header, *lines = scripts.table(runs[name].stdout)
  assert header[:4] == ["rows", "curriculum", "accuracy %", "mean squared error"]
  assert [line[0] for line in lines] == ["train", "test"]
  assert (
    runs[name]
    .stdout.splitlines()[-1]
    .endswith(f"{name}/mentor.json, results.json, results.csv, figure.png")
  )
  rows, csv_rows, flags = scripts.saved_rows(folder / name)
  assert [row["rows"] for row in rows] == [row["rows"] for row in csv_rows]
  for row, line in zip(rows, lines, strict=True):
    assert f"{row['mse']:.5f}" == line[3] and row["num_rows"] == int(line[4])
    assert 0 <= row["accuracy"] <= 1
  assert rows[0]["num_rows"] == 4 * rows[1]["num_rows"] or name in ("dd", "labels")
  assert flags["restarts"] == 2 and flags["num_steps"] == 400
  assert (folder / name / "figure.png").read_bytes().startswith(b"\x89PNG")
  # mean (1 - mean) is the error of the best constant if all targets are 0 or 1, and
  # larger otherwise.
  assert rows[1]["mse"] < rows[1]["mean_target"] * (1 - rows[1]["mean_target"])


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error(done, name):
  scripts.assert_one_line(done[2][name], _MISTAKES[name][1])


@pytest.mark.ci
def test_a_finished_run_is_not_repeated_and_another_dump_is_a_one_line_error(
  done, dump
):
  folder = done[0]
  kept, before = dump.read_bytes(), scripts.contents(folder)
  recorded = loss_dump.read_dump(dump)
  loss_dump.write_dump(dump, recorded._replace(loss=recorded.loss + 1))
  again, other = scripts.run_many(
    _NAME,
    [
      [
        *_SMALL,
        f"--workdir={folder}/{name}",
        *(a.format(dump=dump) for a in _RUNS[name]),
      ]
      for name in ("pd", "dd")
    ],
  )
  dump.write_bytes(kept)
  assert again.status == 0
  scripts.assert_one_line(other, "the content of --dump was")
  mentors = [k for k in before if k.endswith("mentor.json")]
  after = scripts.contents(folder)
  assert len(mentors) == 4 and {k: after[k] for k in mentors} == {
    k: before[k] for k in mentors
  }


@pytest.mark.ci
@pytest.mark.slow(unless=("pd-pd",))
@pytest.mark.parametrize(
  ("name", "preset"), [("pd", "pd"), ("dd", "dd_resnet"), ("labels", "dd_inception")]
)
def test_student_learns_with_the_loaded_mentor(done, tmp_path, name, preset):
  mentor = mentor_file.load(done[0] / name / "mentor.json", num_classes=10)
  method = mentornet.mentornet(mentor, **mentornet.preset(preset, 0.4))
  result = _train(tmp_path / "run", method)
  assert result.metrics["last"]["accuracy"] > 0.5  # Chance is 0.1.
  rows = (tmp_path / "run" / "seed-0" / "metrics.jsonl").read_text().splitlines()
  last = [r for r in map(json.loads, rows) if "train/mean_weight" in r][-1]
  assert 0.1 < last["train/mean_weight"] < 0.99
  assert last["train/percentile"] > 0


@pytest.mark.ci
def test_a_mentor_of_other_classes_is_a_one_line_error(done):
  path = done[0] / "labels" / "mentor.json"
  with pytest.raises(
    base.InputError, match="labels of 10 classes, but the data have 2"
  ):
    mentor_file.load(path, num_classes=2)


@pytest.mark.ci
def test_mentor_of_recorded_losses_separates_right_from_wrong(done, dump):
  mentor = mentor_file.load(done[0] / "dd" / "mentor.json")
  recorded = loss_dump.read_dump(dump)
  late = recorded.epoch_percent > 50
  losses = recorded.loss[late]
  weights = mentor(losses, losses - np.percentile(recorded.loss, 60), None, 80)
  right = recorded.label[late] == recorded.true_label[late]
  assert np.mean(weights[right]) > np.mean(weights[~right]) + 0.3
