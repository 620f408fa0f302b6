"""The identity of a run: a folder of other settings, data or versions is refused."""

import json
import pathlib
import shutil

import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines

_METHOD = baselines.uniform()


def _train(folder, **settings):
  return toy_runs.train(folder, _METHOD, **({"checkpoint_every": 3} | settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A finished run, and one that stopped after the checkpoint of step 6 of 7."""
  folders = {name: tmp_path_factory.mktemp(name) / "run" for name in ("all", "six")}
  _train(folders["all"])
  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, 6)
    _train(folders["six"])
  return {"finished": folders["all"], "interrupted": folders["six"]}


def _other_data():
  splits = toy_runs.make_splits()
  image = splits.train.image.copy()
  image[3, 1] += 1
  return [splits._replace(train=splits.train._replace(image=image))]


@pytest.mark.parametrize("kind", ["finished", "interrupted"])
@pytest.mark.parametrize(
  "changed, message",
  [
    ({"splits": _other_data()}, "data was"),
    ({"num_steps": 8}, "num_steps was 7, now 8"),
    ({"eval_every": 2}, "eval_every was 3, now 2"),
    ({"meta_batch_size": 4}, "meta_batch_size was null, now 4"),
  ],
)
def test_folder_of_another_run_raises(runs, tmp_path, kind, changed, message):
  folder = pathlib.Path(shutil.copytree(runs[kind], tmp_path / "run"))
  before = toy_runs.files(folder)
  with pytest.raises(base.InputError, match=message) as caught:
    _train(folder, **changed)
  assert "\n" not in str(caught.value)
  assert toy_runs.files(folder) == before


def test_only_finished_runs_may_change_versions(runs, tmp_path, monkeypatch):
  made_by = workdir.made_by() | {"jax": "99.9"}
  monkeypatch.setattr(workdir, "made_by", lambda: made_by)
  _train(pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "a")))
  folder = pathlib.Path(shutil.copytree(runs["interrupted"], tmp_path / "b"))
  with pytest.raises(base.InputError, match=r'jax was ".*", now "9') as caught:
    _train(folder)
  assert "\n" not in str(caught.value)


def test_unfinished_run_may_change_the_number_of_devices(runs, tmp_path, caplog):
  folder = pathlib.Path(shutil.copytree(runs["interrupted"], tmp_path / "run"))
  (moved,) = _train(folder, num_devices=2)
  assert "on 1 device(s), and the run continues on 2" in caplog.text
  expected = toy_runs.rows(runs["finished"] / "seed-0")
  for row, wanted in zip(toy_runs.rows(folder / "seed-0"), expected, strict=True):
    assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
  assert moved.metrics["num_devices"] == 2


def test_runs_of_earlier_versions_raise_in_one_line(runs, tmp_path):
  folder = pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "run"))
  path = folder / "seed-0" / "results.json"
  old = json.loads(path.read_text())
  for name in ("identity", "files", "sha256"):
    del old[name]
  workdir.write_record(path, old)
  with pytest.raises(base.InputError, match="an earlier version wrote it") as caught:
    _train(folder)
  assert "\n" not in str(caught.value)
