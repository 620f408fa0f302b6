"""Seconds of training: what counts, what does not, and what a resume keeps."""

import json
import time

import pytest

from l2rw_jax.io import workdir
from l2rw_jax.training import timer as timer_lib


@pytest.fixture
def now(monkeypatch):
  """A time that moves only when told to."""
  current = [100.0]
  monkeypatch.setattr(time, "perf_counter", lambda: current[0])

  def wait(seconds):
    current[0] += seconds

  return wait


def test_what_is_done_while_it_is_stopped_does_not_count(now):
  clock = timer_lib.Timer()
  now(5)
  assert clock.read() == 0
  clock.start()
  now(2)
  with clock.stopped():
    now(10)
    assert clock.read() == 2
  now(1)
  assert clock.read() == 3


def test_a_resumed_clock_goes_on_from_its_file(now, tmp_path):
  path = tmp_path / "timing.json"
  clock = timer_lib.Timer()
  clock.start()
  for step in (10, 20, 30):
    now(2)
    clock.note(step)
    if step == 20:
      clock.write(path, step)
  resumed = timer_lib.Timer.restore(path, 20)
  assert resumed.read() == 4
  resumed.start()
  now(1)
  resumed.note(30)
  resumed.write(path, 30, {"steps_per_call": 2})
  assert workdir.read_record(path) == {
    "seconds": 5,
    "steps": 30,
    "untimed_steps": 0,
    "evaluations": [[10, 2], [20, 4], [30, 5]],
    "saved": {"30": 5},
    "steps_per_call": 2,
  }


def test_what_came_after_the_checkpoint_is_forgotten(now, tmp_path):
  path = tmp_path / "timing.json"
  clock = timer_lib.Timer()
  clock.start()
  for step in (10, 20):
    now(4)
    clock.note(step)
    now(0.5)
    clock.write(path, step)
  assert timer_lib.Timer.restore(path, 20).read() == 9
  assert timer_lib.Timer.restore(path, 10).read() == 4.5
  assert timer_lib.Timer.restore(path, 15).read() == 4
  timer_lib.Timer.restore(path, 10).write(path, 10)
  assert json.loads(path.read_text())["evaluations"] == [[10, 4.0]]
  assert timer_lib.Timer.restore(path, 0).read() == 0
  assert timer_lib.Timer.restore(tmp_path / "none.json", 5).read() == 0
