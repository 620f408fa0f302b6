"""A run with a damaged file is completed again, and its files have the same bytes."""

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
  folders = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir, "_commit", lambda: "unknown")
    for name, at in {"finished": None, "interrupted": 6}.items():
      folders[name] = tmp_path_factory.mktemp(name) / "run"
      if at is None:
        _train(folders[name])
        continue
      with patch.context() as stop, pytest.raises(KeyboardInterrupt):
        toy_runs.interrupt(stop, at)
        _train(folders[name])
  return folders


def _flip(content):
  # In JSON, another last digit can be the same float, so a letter is changed if there
  # is one.
  middle = len(content) // 2
  letters = (i for i in range(middle, len(content)) if content[i : i + 1].isalpha())
  place = next(letters, middle)
  return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


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
    "seed-0/variables.msgpack",
  ),
  "interrupted": ("timing.json", "seed-0/metrics.jsonl"),
}


@pytest.mark.ci
@pytest.mark.slow(unless=("interrupted",))
@pytest.mark.parametrize("kind", _FILES)
def test_damaged_files_are_written_again(runs, tmp_path, monkeypatch, kind):
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


@pytest.mark.ci
def test_run_without_checkpoints_is_repeated(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  folder = pathlib.Path(shutil.copytree(runs["finished"], tmp_path / "run"))
  shutil.rmtree(folder / "checkpoints")
  (folder / "seed-0" / "results.json").unlink()
  _train(folder)
  assert toy_runs.outcome(folder) == toy_runs.outcome(runs["finished"])


def test_several_processes_without_a_connection_raise(tmp_path, monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(base.InputError, match="is not connected to other processes"):
    _train(tmp_path)
  assert not list(tmp_path.iterdir())
