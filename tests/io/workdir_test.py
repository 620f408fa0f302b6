"""The folder of a run: atomic writes, settings, locks and provenance."""

import errno
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import tracemalloc

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.io import workdir


def test_write_json_sorts_keys_and_ends_in_a_newline(tmp_path):
  path = tmp_path / "a.json"
  workdir.write_json(path, {"b": [1, 2], "a": "é\n"})
  text = path.read_text(encoding="utf-8")
  assert json.loads(text) == {"a": "é\n", "b": [1, 2]}
  assert text.index('"a"') < text.index('"b"')
  assert text.endswith("}\n")
  assert list(tmp_path.iterdir()) == [path]


def test_write_text_does_not_translate_newlines(tmp_path):
  workdir.write_text(tmp_path / "a", "x\r\ny\n")
  assert (tmp_path / "a").read_bytes() == b"x\r\ny\n"
  workdir.write_bytes(tmp_path / "a", b"\xff\r\n")
  assert (tmp_path / "a").read_bytes() == b"\xff\r\n"


def _no_space(*args, **kwargs):
  raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, function):
  path = tmp_path / "a.json"
  workdir.write_json(path, "old")
  monkeypatch.setattr(workdir.os, function, _no_space)
  with pytest.raises(base.InputError, match=r"a\.json: No space left on device"):
    workdir.write_json(path, "new")
  assert json.loads(path.read_text()) == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_values_that_are_not_json_write_nothing(tmp_path):
  for value in ({"a": object()}, {"a": float("nan")}):
    with pytest.raises((TypeError, ValueError)):
      workdir.write_json(tmp_path / "a.json", value)
  assert not list(tmp_path.iterdir())


def test_prepare_creates_and_reopens_the_folder(tmp_path):
  settings = {"num_steps": 100, "lr": 0.1, "widths": (3, 4), "name": None}
  folder = workdir.prepare(tmp_path / "a" / "b", settings)
  assert folder == tmp_path / "a" / "b"
  written = (folder / "settings.json").read_bytes()
  assert json.loads(written)["widths"] == [3, 4]
  assert workdir.prepare(str(folder), dict(reversed(settings.items()))) == folder
  assert (folder / "settings.json").read_bytes() == written
  assert sorted(p.name for p in folder.iterdir()) == [".lock", "settings.json"]


def test_prepare_names_all_changed_settings(tmp_path):
  workdir.prepare(tmp_path, {"num_steps": 100, "lr": 0.1, "seed": 1, "on": True})
  before = (tmp_path / "settings.json").read_bytes()
  with pytest.raises(base.InputError) as caught:
    workdir.prepare(tmp_path, {"num_steps": 200, "lr": 0.1, "on": 1, "new": "x"})
  message = str(caught.value)
  assert message == (
    f"--workdir={tmp_path} holds a run with other settings:"
    ' new was absent, now "x"; num_steps was 100, now 200;'
    " on was true, now 1; seed was 1, now absent."
    " Choose another --workdir, or delete this one."
  )
  assert (tmp_path / "settings.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b'{"num_st', b"[1]\n", b"\xff\xfe{}"])
def test_prepare_with_damaged_settings_raises(tmp_path, content):
  (tmp_path / "settings.json").write_bytes(content)
  with pytest.raises(base.InputError, match=r"settings\.json is damaged") as caught:
    workdir.prepare(tmp_path, {"num_steps": 1})
  assert "\n" not in str(caught.value)
  assert (tmp_path / "settings.json").read_bytes() == content


def test_prepare_raises_if_the_path_is_a_file(tmp_path):
  (tmp_path / "file").write_text("")
  for path, reason in (("file", "File exists"), ("file/run", "Not a directory")):
    with pytest.raises(base.InputError) as caught:
      workdir.prepare(tmp_path / path, {})
    assert str(caught.value) == (
      f"--workdir={tmp_path / path}: cannot write ({reason});"
      " choose a folder you may write to"
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_prepare_checks_that_an_old_folder_is_writable(tmp_path, monkeypatch, code):
  workdir.prepare(tmp_path, {})

  def refuse(*args, **kwargs):
    raise OSError(code, "refused")

  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  with pytest.raises(base.InputError, match=r"cannot write \(refused\)"):
    workdir.prepare(tmp_path, {})


def test_run_info_has_versions_and_devices():
  info = workdir.run_info()
  assert json.loads(json.dumps(info)) == info
  assert info["jax"] == jax.__version__
  assert info["device_count"] == jax.device_count()
  assert info["platform"] == jax.default_backend()
  assert info["device_kind"]
  assert {"commit", "python", "jaxlib", "flax", "optax", "numpy", "l2rw_jax"} <= set(
    info
  )


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_run_info_has_the_commit(tmp_path, monkeypatch):
  def git(*arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *author, "-C", tmp_path, *arguments]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout.strip()

  source = tmp_path / "workdir.py"
  source.write_text("one\n")
  monkeypatch.setattr(workdir, "__file__", str(source))
  assert workdir.run_info()["commit"] == "unknown"
  git("init")
  git("commit", "--allow-empty", "-m", "of something else")
  assert workdir.run_info()["commit"] == "unknown"
  git("add", ".")
  git("commit", "-m", "x")
  commit = git("rev-parse", "HEAD")
  pathlib.Path(tmp_path, "result.json").write_text("{}")
  assert workdir.run_info()["commit"] == commit
  source.write_text("two\n")
  assert workdir.run_info()["commit"] == commit + "+dirty"


def test_run_info_without_git(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert workdir.run_info()["commit"] == "unknown"


def test_records_may_not_use_the_key_of_the_checksum(tmp_path):
  with pytest.raises(ValueError, match="reserved"):
    workdir.write_record(tmp_path / "a.json", {"sha256": "x"})
  assert not list(tmp_path.iterdir())


def test_records_verify_their_checksum(tmp_path):
  path = tmp_path / "a.json"
  value = {"b": [1, 0.1, None], "a": {"é": "x"}}
  workdir.write_record(path, value)
  assert workdir.read_record(path) == value
  content = path.read_bytes()
  for damaged in (
    content.replace(b"0.1", b"0.2"),
    content[:-9],
    b"",
    b"[1]",
    b"{}",
    b"[" * 100_000,
  ):
    path.write_bytes(damaged)
    with pytest.raises(base.InputError, match=r"a\.json (is damaged|has no checksum)"):
      workdir.read_record(path)
  path.unlink()
  with pytest.raises(base.InputError, match=r"a\.json cannot be read"):
    workdir.read_record(path)


def test_inputs_may_be_added_but_not_replaced(tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  first.write_text("1")
  second.write_text("2")
  run = tmp_path / "run"
  workdir.prepare(run, {"a": 1})
  workdir.prepare(run, {"a": 1}, {"mentor": str(first)})
  workdir.prepare(run, {"a": 1})
  with pytest.raises(base.InputError, match="the content of --mentor was") as caught:
    workdir.prepare(run, {"a": 1}, {"mentor": str(second)})
  assert "\n" not in str(caught.value)
  moved = first.rename(tmp_path / "moved")
  workdir.prepare(run, {"a": 1}, {"mentor": str(moved)})
  inside = workdir.settings_of(run / "x" / "seed-0")
  assert inside == {"a": 1, "inputs": {"mentor": workdir.file_digest(moved)}}
  assert workdir.settings_of(tmp_path / "elsewhere") == {}
  with pytest.raises(base.InputError, match="cannot be read"):
    workdir.prepare(run, {"a": 1}, {"mentor": str(first)})


def test_settings_that_became_extendable_are_not_compared(tmp_path):
  workdir.prepare(tmp_path, {"a": 1, "num_seeds": 1})
  old = workdir.settings_of(tmp_path)
  workdir.prepare(tmp_path, {"a": 1}, extendable=("num_seeds", "other"))
  assert workdir.settings_of(tmp_path) == {"a": 1, "inputs": {}}
  assert workdir.saved_changes(tmp_path / "seed-0" / "results.json", old) == []
  changed = workdir.saved_changes(tmp_path, {**old, "a": 2})
  assert changed == ["a was 2, now 1"]
  with pytest.raises(base.InputError, match="num_seeds was absent, now 1"):
    workdir.prepare(tmp_path, {"a": 1, "num_seeds": 1})


@pytest.mark.parametrize("file", ["seed-0/results.json", "x/checkpoints/5/data"])
def test_results_without_settings_are_refused(tmp_path, file):
  workdir.prepare(tmp_path, {"a": 1})
  (tmp_path / file).parent.mkdir(parents=True)
  (tmp_path / file).write_text("")
  workdir.prepare(tmp_path, {"a": 1})
  (tmp_path / "settings.json").unlink()
  with pytest.raises(base.InputError, match=r"settings\.json is missing"):
    workdir.prepare(tmp_path, {"a": 1})
  (tmp_path / "settings.json").write_text('{"a": 1}')
  with pytest.raises(base.InputError, match="an earlier version"):
    workdir.prepare(tmp_path, {"a": 1})


_HOLD_LOCK = """
import sys
from l2rw_jax.io import workdir
workdir.prepare(sys.argv[1], {})
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.ci
def test_another_process_is_locked_out(tmp_path):
  run = tmp_path / "run"
  holder = subprocess.Popen(
    [sys.executable, "-c", _HOLD_LOCK, run],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )
  try:
    assert holder.stdout.readline() == "here\n"
    for use in (lambda: workdir.prepare(run, {}), lambda: _enter(run)):
      with pytest.raises(base.InputError, match="another process") as caught:
        use()
      holder_name = f"(host {socket.gethostname()}, pid {holder.pid})"
      assert f"{holder_name} uses this folder" in str(caught.value)
      assert "\n" not in str(caught.value)
  finally:
    holder.kill()
    holder.communicate()
  for stale in (".a.json.1.tmp", ".scratch-x/big", "seed-0/.b.csv.22.tmp"):
    (run / stale).parent.mkdir(exist_ok=True)
    (run / stale).write_text("")
  (run / "notes.tmp").write_text("")
  _enter(run)
  assert {p.name for p in run.iterdir()} == {"settings.json", "seed-0", "notes.tmp"}
  assert not list((run / "seed-0").iterdir())
  workdir.prepare(run, {})
  workdir.prepare(run, {})
  _enter(run / "seed-0")


def _enter(folder):
  with workdir.locked(folder):
    pass


def test_locks_that_cannot_be_written_are_one_line_errors():
  # Nobody, not even root, can create files in this folder.
  with pytest.raises(
    base.InputError, match=r"cannot write /proc/self: .*choose"
  ) as caught:
    _enter("/proc/self")
  assert "\n" not in str(caught.value)


def test_arrays_are_written_without_a_copy_of_all(tmp_path):
  arrays = {"x": np.arange(2**22, dtype=np.float64), "file": np.zeros(3)}
  path = tmp_path / "x.npz"
  tracemalloc.start()
  workdir.write_with(path, lambda file: workdir.write_arrays(file, arrays))
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert most < 0.7 * arrays["x"].nbytes  # NumPy writes blocks of 16 MiB.
  with np.load(path) as stored:
    np.testing.assert_array_equal(stored["x"], arrays["x"])


def test_a_writer_that_fails_in_the_middle_keeps_the_old_file(tmp_path):
  def fail(file):
    file.write(b"x")
    _no_space()

  path = tmp_path / "a"
  path.write_bytes(b"old")
  with pytest.raises(base.InputError, match="No space left"):
    workdir.write_with(path, fail)
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
