"""Checkpoints that were damaged, half written, or refused by the disk."""

import errno
import gc
import logging
import pathlib
import shutil
import signal
import subprocess
import sys

import checkpointing_test
import pytest

from l2rw_jax import base
from l2rw_jax.io import checkpointing

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
_state = checkpointing_test.make_state
_assert_same = checkpointing_test.assert_same


def _open(directory):
  return checkpointing.Checkpointer(directory)


def _two(directory):
  """A directory with checkpoints 1 and 2 of `_state(1)` and `_state(2)`."""
  checkpointer = _open(directory)
  for step in (1, 2):
    checkpointer.save(step, _state(step), {"epoch": step})
  checkpointer.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  directory = tmp_path_factory.mktemp("template")
  _two(directory)
  return directory


@pytest.fixture
def two(template, tmp_path):
  return pathlib.Path(shutil.copytree(template, tmp_path / "two"))


def _names(directory):
  return sorted(path.name for path in directory.iterdir())


def _warnings(caplog):
  return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _files(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def _assert_restores_a_good_one(directory, caplog) -> int:
  """The step restored; whichever it is, it must be right."""
  caplog.clear()
  checkpointer = _open(directory)
  restored = checkpointer.restore_latest(_state())
  _assert_same(restored.state, _state(restored.step))
  assert restored.host == {"epoch": restored.step}
  if restored.step == 1:
    (warning,) = _warnings(caplog)
    assert "checkpoint of step 2" in warning and "\n" not in warning
    assert _names(directory) == ["1"]
    checkpointer.save(2, _state(2), {"epoch": 2})
    _assert_same(checkpointer.restore_latest(_state()).state, _state(2))
  else:
    assert _warnings(caplog) == []
  checkpointer.close()
  return restored.step


# Orbax closes its event loop before TensorStore has answered everything.
_late_answers = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@_late_answers
@pytest.mark.parametrize("damage", [_truncate, _flip, pathlib.Path.unlink])
def test_damage_to_any_file_is_survived(template, tmp_path, caplog, damage):
  sizes = {path: path.stat().st_size for path in _files(template / "2")}
  restored = {}
  for path, size in sizes.items():
    if damage is _flip and size == 0:
      continue
    name = path.relative_to(template)
    directory = pathlib.Path(shutil.copytree(template, tmp_path / "copy"))
    damage(directory / name)
    restored[path] = _assert_restores_a_good_one(directory, caplog)
    shutil.rmtree(directory)
  caplog.clear()
  gc.collect()  # asyncio logs a failure that nobody asked for when it is collected.
  assert _warnings(caplog) == []
  # The damage was such as to matter, where it must.
  largest = max(sizes, key=lambda path: sizes[path])
  assert restored[largest] == 1
  assert restored[template / "2" / "record" / "metadata"] == 1


def _other_host(two):
  path = two / "2" / "record" / "metadata"
  text = path.read_text()
  path.write_text(text.replace('"epoch": 2', '"epoch": 3'))
  assert path.read_text() != text


def _other_arrays(two):
  shutil.rmtree(two / "2" / "arrays")
  shutil.copytree(two / "1" / "arrays", two / "2" / "arrays")


@pytest.mark.parametrize("tamper", [_other_host, _other_arrays])
def test_checksum_catches_what_can_be_read(two, caplog, tamper):
  tamper(two)
  assert _open(two).restore_latest(_state()).step == 1
  (warning,) = _warnings(caplog)
  assert "step 2" in warning and "checksum does not match" in warning


def test_checkpoint_under_another_step_is_not_believed(two, caplog):
  shutil.copytree(two / "1", two / "3")
  assert _open(two).restore_latest(_state()).step == 2
  assert len(_warnings(caplog)) == 1
  assert _names(two) == ["1", "2"]


@_late_answers
def test_all_damaged_starts_over(two, caplog):
  for path in _files(two):
    _truncate(path)
  checkpointer = _open(two)
  assert checkpointer.restore_latest(_state()) is None
  assert ["step 2" in x or "step 1" in x for x in _warnings(caplog)] == [True, True]
  assert _names(two) == []
  checkpointer.save(1, _state(1), {})
  _assert_same(checkpointer.restore_latest(_state()).state, _state(1))


@pytest.mark.parametrize(
  ("error", "raised"),
  [
    (PermissionError(errno.EACCES, "Permission denied"), base.InputError),
    (OSError(errno.EMFILE, "Too many open files"), base.InputError),
    (MemoryError(), MemoryError),
  ],
)
def test_what_is_not_damage_deletes_nothing(two, monkeypatch, error, raised):
  checkpointer = _open(two)

  def fail(*args):
    raise error

  monkeypatch.setattr(checkpointing, "_digest", fail)
  with pytest.raises(raised):
    checkpointer.restore_latest(_state())
  assert _names(two) == ["1", "2"]


_KILLED = """
import os, pathlib, shutil, signal, sys
from l2rw_jax.io import checkpointing
from tests import checkpointing_test
directory, function, name, keep = sys.argv[1:]

def killing(original):
  def call(*args, **kwargs):
    # The last argument is what is made (rename) or removed (rmtree).
    if pathlib.Path(args[-1]).name == name:
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
  return call

checkpointer = checkpointing.Checkpointer(directory, max_to_keep=int(keep))
checkpointer.save(1, checkpointing_test.make_state(1), {"epoch": 1})
module = {"rename": os, "rmtree": shutil}[function]
setattr(module, function, killing(getattr(module, function)))
checkpointer.save(2, checkpointing_test.make_state(2), {"epoch": 2})
"""


def _run(script, *arguments):
  return subprocess.run(
    [sys.executable, "-c", script, *map(str, arguments)],
    check=False,
    capture_output=True,
    text=True,
    timeout=120,
    cwd=_REPOSITORY,  # For the imports of the script.
  )


@pytest.mark.parametrize("made", ["arrays", "2"])
def test_killed_while_saving_goes_back_one(tmp_path, caplog, made):
  run = _run(_KILLED, tmp_path, "rename", made, 1)
  assert run.returncode == -signal.SIGKILL, run.stderr
  one, partial = _names(tmp_path)  # The old one is not deleted before its time.
  assert one == "1" and partial.startswith("2.")
  checkpointer = _open(tmp_path)
  assert _names(tmp_path) == ["1"]
  restored = checkpointer.restore_latest(_state())
  assert restored.step == 1
  _assert_same(restored.state, _state(1))
  assert _warnings(caplog) == []
  checkpointer.save(2, _state(2), {})
  _assert_same(checkpointer.restore_latest(_state()).state, _state(2))


def test_killed_while_deleting_the_old_has_the_new(tmp_path):
  run = _run(_KILLED, tmp_path, "rmtree", "1", 1)
  assert run.returncode == -signal.SIGKILL, run.stderr
  restored = _open(tmp_path).restore_latest(_state())
  assert restored.step == 2
  _assert_same(restored.state, _state(2))


_FULL_DISK = """
import os, resource, signal, sys
import numpy as np
from l2rw_jax import base, checkpointing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory, limit = sys.argv[1], int(sys.argv[2])
state = {"w": np.random.default_rng(0).normal(size=100_000)}
checkpointer = checkpointing.Checkpointer(directory, max_to_keep=1)

def save(step, limit):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  try:
    checkpointer.save(step, state, {"step": step})
  except base.InputError as error:
    print(error)
  print(os.listdir(directory))

save(1, limit)
save(1, resource.RLIM_INFINITY)
save(2, limit)
print(checkpointer.restore_latest(state).host)
save(2, resource.RLIM_INFINITY)
print(checkpointer.restore_latest(state).host)
"""


@pytest.mark.parametrize("limit", [0, 100_000])  # Refuses the record; the arrays.
def test_full_disk_is_one_line_and_leaves_the_last_one(tmp_path, limit):
  run = _run(_FULL_DISK, tmp_path, limit)
  message = (
    f"cannot write the checkpoint of step %d in {tmp_path}: File too large."
    " Free some space and run the same command again: it continues from %s"
  )
  assert run.stdout.splitlines() == [
    message % (1, "the start"),
    "[]",
    "['1']",
    message % (2, "step 1"),
    "['1']",
    "{'step': 1}",
    "['2']",
    "{'step': 2}",
  ]
  assert run.stderr == ""
