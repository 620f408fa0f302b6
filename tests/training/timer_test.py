"""Seconds of training, without pauses and across resumptions."""

import json
import time

import pytest

from l2rw_jax.io import workdir
from l2rw_jax.training import timer as timer_lib


@pytest.fixture
def advance(monkeypatch):
  """Replaces the clock with one that only this fixture advances."""
  current = [100.0]
  monkeypatch.setattr(time, "perf_counter", lambda: current[0])

  def wait(seconds):
    current[0] += seconds

  return wait


def test_stopped_timer_does_not_count(advance):
  timer = timer_lib.Timer()
  advance(5)
  assert timer.read() == 0
  timer.start()
  advance(1)
  timer.start()  # It is running already.
  advance(1)
  with timer.stopped():
    advance(10)
    assert timer.read() == 2
  advance(1)
  assert timer.read() == 3


def test_restored_timer_continues(advance, tmp_path):
  path = tmp_path / "timing.json"
  timer = timer_lib.Timer()
  timer.start()
  for step in (10, 20, 30):
    timer.note_refresh(step - 10, 0.5)
    advance(2)
    timer.note(step)
    if step == 20:
      timer.write(path, step)
  resumed = timer_lib.Timer.restore(path, 20)
  assert resumed.read() == 4
  resumed.start()
  resumed.note_refresh(20, 0.25)
  advance(1)
  resumed.note(30)
  resumed.write(path, 30, {"steps_per_call": 2})
  assert workdir.read_record(path) == {
    "seconds": 5,
    "steps": 30,
    "untimed_steps": 0,
    "evaluations": [[10, 2], [20, 4], [30, 5]],
    "refreshes": [[0, 0.5], [10, 0.5], [20, 0.25]],
    "saved": {"20": 4, "30": 5},
    "steps_per_call": 2,
  }
  # If the newest checkpoint is damaged, the run continues from an earlier one.
  assert timer_lib.Timer.restore(path, 20).read() == 4


def test_an_error_while_the_timer_is_stopped_starts_it_again(advance):
  timer = timer_lib.Timer()
  timer.start()
  with pytest.raises(ValueError), timer.stopped():
    raise ValueError
  advance(2)
  assert timer.read() == 2


def test_restore_discards_later_steps(advance, tmp_path):
  path = tmp_path / "timing.json"
  timer = timer_lib.Timer()
  timer.start()
  for step in (10, 20):
    advance(4)
    timer.note(step)
    advance(0.5)
    timer.write(path, step)
  assert timer_lib.Timer.restore(path, 20).read() == 9
  assert timer_lib.Timer.restore(path, 10).read() == 4.5
  assert timer_lib.Timer.restore(path, 15).read() == 4
  timer_lib.Timer.restore(path, 10).write(path, 10)
  assert json.loads(path.read_text())["evaluations"] == [[10, 4.0]]
  assert timer_lib.Timer.restore(path, 0).read() == 0
  assert timer_lib.Timer.restore(tmp_path / "none.json", 5).read() == 0


def test_a_record_of_another_version_is_a_warning(tmp_path, caplog):
  workdir.write_record(tmp_path / "timing.json", {"seconds": 3, "saved": {}})
  assert timer_lib.Timer.restore(tmp_path / "timing.json", 5).read() == 0
  (message,) = caplog.messages
  assert "has no evaluations: another version wrote it" in message
