"""Files x damage: a run is made whole again, or refused in one line, or as it was."""

import json
import pathlib
import shutil

import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import results

_METHOD = baselines.uniform()


def _train(folder, **settings):
  return toy_runs.train(folder, _METHOD, **({"checkpoint_every": 3} | settings))


def _runs():
  """A finished run, and one stopped after the checkpoint of step 6 of 7."""
  return {"finished": None, "interrupted": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir, "_commit", lambda: "unknown")
    for name, at in _runs().items():
      found[name] = tmp_path_factory.mktemp(name) / "run"
      if at is None:
        _train(found[name])
        continue
      with patch.context() as stop, pytest.raises(KeyboardInterrupt):
        toy_runs.interrupt(stop, at)
        _train(found[name])
  return found


def _flip(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


_DAMAGE = {
  "cut in half": lambda content: content[: len(content) // 2],
  "without its last line": lambda content: b"".join(content.splitlines(True)[:-1]),
  "without its first line": lambda content: b"".join(content.splitlines(True)[1:]),
  "a bit flipped": _flip,
  "empty": lambda content: b"",
  "garbage": lambda content: b"\xff\x00{]" * 9,
  "other JSON": lambda content: b"{}",
  "deeply nested": lambda content: b"[" * 100_000,
  "deleted": None,
}
_FILES = {
  "finished": (
    "timing.json",
    *(f"seed-0/{n}" for n in ("metrics.jsonl", "metrics.csv", "weights.csv")),
    "seed-0/results.json",
  ),
  "interrupted": ("timing.json", "seed-0/metrics.jsonl"),
}


@pytest.mark.parametrize("kind", _FILES)
def test_damage_is_undone_or_named_in_one_line(runs, tmp_path, monkeypatch, kind):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  expected = toy_runs.outcome(runs["finished"])
  for number, (name, how) in enumerate(
    (name, how) for name in _FILES[kind] for how in _DAMAGE
  ):
    folder = pathlib.Path(shutil.copytree(runs[kind], tmp_path / str(number)))
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if _DAMAGE[how] is not None:
      path.write_bytes(_DAMAGE[how](content))
    _train(folder)
    assert toy_runs.outcome(folder) == expected, (name, how)
    timing = workdir.read_record(folder / "timing.json")
    was_timing = name == "timing.json"
    assert (timing["untimed_steps"] > 0) == was_timing, (name, how)
    shutil.rmtree(folder)


def test_a_damaged_file_is_named(runs, tmp_path, caplog):
  folder = pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "run"))
  (folder / "seed-0" / "weights.csv").write_text("index\n")
  with pytest.raises(base.InputError, match=r"weights\.csv is damaged"):
    results.read(folder / "seed-0")
  caplog.set_level("WARNING", logger="absl")
  _train(folder)
  (message,) = [m for m in caplog.messages if "damaged" in m]
  assert "weights.csv" in message and "\n" not in message


def test_all_checkpoints_lost_too(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  folder = pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "run"))
  shutil.rmtree(folder / "checkpoints")
  (folder / "seed-0" / "results.json").unlink()
  _train(folder)
  assert toy_runs.outcome(folder) == toy_runs.outcome(runs["finished"])


def _other_data():
  splits = toy_runs.make_splits()
  image = splits.train.image.copy()
  image[3, 1] += 1
  return [splits._replace(train=splits.train._replace(image=image))]


@pytest.mark.parametrize("kind", ["finished", "interrupted"])
@pytest.mark.parametrize(
  "changed, said",
  [
    ({"splits": _other_data()}, "data was"),
    ({"num_steps": 8}, "num_steps was 7, now 8"),
    ({"eval_every": 2}, "eval_every was 3, now 2"),
    ({"meta_batch_size": 4}, "meta_batch_size was null, now 4"),
  ],
)
def test_another_run_is_refused(runs, tmp_path, kind, changed, said):
  folder = pathlib.Path(shutil.copytree(runs[kind], tmp_path / "run"))
  before = toy_runs.files(folder)
  with pytest.raises(base.InputError, match=said) as caught:
    _train(folder, **changed)
  assert "\n" not in str(caught.value)
  assert toy_runs.files(folder) == before


@pytest.mark.parametrize(
  "name, said", [("jax", 'jax was ".*", now "9'), ("num_devices", "num_devices was 1")]
)
def test_only_a_finished_run_may_come_to_other_machines(
  runs, tmp_path, monkeypatch, name, said
):
  changed = {}
  if name == "jax":
    made_by = workdir.made_by() | {"jax": "99.9"}
    monkeypatch.setattr(workdir, "made_by", lambda: made_by)
  else:
    changed["num_devices"] = 2
  _train(pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "a")), **changed)
  folder = pathlib.Path(shutil.copytree(runs["interrupted"], tmp_path / "b"))
  with pytest.raises(base.InputError, match=said) as caught:
    _train(folder, **changed)
  assert "\n" not in str(caught.value)


def test_runs_of_earlier_versions_are_refused_in_one_line(runs, tmp_path):
  folder = pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "run"))
  path = folder / "seed-0" / "results.json"
  old = json.loads(path.read_text())
  for name in ("identity", "files", "sha256"):
    del old[name]
  workdir.write_record(path, old)
  with pytest.raises(base.InputError, match="an earlier version wrote it") as caught:
    _train(folder)
  assert "\n" not in str(caught.value)


def test_several_processes_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(base.InputError, match="JAX runs in 2 processes"):
    _train(tmp_path)
  assert not list(tmp_path.iterdir())
