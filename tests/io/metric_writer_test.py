"""Metric files: exact content, resumption, damage and full disks."""

import logging
import math
import pathlib
import signal
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.io import metric_writer

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _open(folder, resume_step=None, **kwargs):
  return metric_writer.MetricWriter(
    folder, resume_step=resume_step, **({"tensorboard": False} | kwargs)
  )


def _values(step):
  values = {"loss": np.float32(1 / step), "lr": jnp.float32(0.1)}
  return values | ({"accuracy": step / 7} if step % 5 == 0 else {})


def _write(writer, first, last):
  for step in range(first, last + 1):
    writer.write(step, _values(step))


def test_rows_are_valid_json(tmp_path):
  with _open(tmp_path) as writer:
    writer.write(np.int64(3), {"b": jnp.float32(0.1), "a": 2, "c": np.float64("nan")})
    writer.write(4, {"c": jnp.inf, "d": jnp.bfloat16(0.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
  assert text == (
    '{"step": 3, "a": 2.0, "b": 0.10000000149011612, "c": null}\n'
    '{"step": 4, "c": null, "d": 0.5}\n'
  )
  rows = metric_writer.read(tmp_path)
  assert rows[0]["b"] == float(np.float32(0.1))
  assert math.isnan(rows[0]["c"]) and math.isnan(rows[1]["c"])
  assert (tmp_path / "metrics.csv").read_text() == (
    "step,a,b,c,d\n3,2.0,0.10000000149011612,nan,\n4,,,nan,0.5\n"
  )


@pytest.mark.parametrize("value", [np.array([2.0]), "high", None])
def test_a_metric_that_is_not_a_number_is_named(tmp_path, value):
  with _open(tmp_path) as writer:
    with pytest.raises(base.InputError, match="the metric 'y' must be one number"):
      writer.write(2, {"x": 1, "y": value})
    assert writer.history == []


def test_order_of_the_values_does_not_matter(tmp_path):
  with _open(tmp_path) as writer:
    writer.write(1, {"b": 1, "a": 2})
    writer.write(1, {"a": 2, "b": 1})
  one, two = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert one == two


def test_metric_named_step_raises(tmp_path):
  with (
    _open(tmp_path) as writer,
    pytest.raises(ValueError, match="no metric may"),
  ):
    writer.write(1, {"step": 2})
  assert metric_writer.read(tmp_path) == []


_KILLED = """
import os, signal, sys
from tests.io import metric_writer_test
from l2rw_jax.io import metric_writer
writer = metric_writer.MetricWriter(sys.argv[1], resume_step=None, tensorboard=False)
metric_writer_test._write(writer, 1, 7)
with open(os.path.join(sys.argv[1], "metrics.jsonl"), "a") as file:
  file.write(sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.ci
@pytest.mark.parametrize("incomplete", ["", '{"step": 8, "lo'])
def test_files_are_the_same_bytes_after_kill_and_resume(tmp_path, incomplete):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  whole.mkdir()
  parts.mkdir()
  with _open(whole) as writer:
    _write(writer, 1, 10)
  killed = subprocess.run(
    [sys.executable, "-c", _KILLED, parts, incomplete], check=False, cwd=_REPOSITORY
  )
  assert killed.returncode == -signal.SIGKILL
  assert (parts / "metrics.jsonl").read_text().count("\n") == 7
  with _open(parts, resume_step=5) as writer:
    _write(writer, 6, 10)
  for name in ("metrics.jsonl", "metrics.csv"):
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("incomplete", ["\0\0\0", '{"ste', "{}", "7", '{"step": null}'])
def test_incomplete_last_line_is_dropped(tmp_path, incomplete):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "a": 1.0}\n' + incomplete)
  assert metric_writer.read(tmp_path) == [{"step": 1, "a": 1.0}]
  with _open(tmp_path, resume_step=9):
    pass
  assert path.read_text() == '{"step": 1, "a": 1.0}\n'


def test_complete_row_without_newline_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}')
  with _open(tmp_path, resume_step=2) as writer:
    writer.write(3, {})
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_damaged_row_in_the_middle_raises(tmp_path):
  content = '{"step": 1}\n{"st\n{"step": 3}\n'
  (tmp_path / "metrics.jsonl").write_text(content)
  with pytest.raises(base.InputError, match="line 2 is damaged"):
    _open(tmp_path, resume_step=3)
  with pytest.raises(base.InputError, match="line 2 is damaged"):
    metric_writer.read(tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == content


def test_new_run_drops_all_rows(tmp_path):
  with _open(tmp_path) as writer:
    writer.write(0, {"a": 1.0})
  assert metric_writer.read(tmp_path) == [{"step": 0, "a": 1.0}]
  with _open(tmp_path):
    pass
  assert metric_writer.read(tmp_path) == []
  assert (tmp_path / "metrics.csv").read_text() == "step\n"


def test_read_without_rows_is_empty(tmp_path):
  assert metric_writer.read(tmp_path) == []


_FULL_DISK = """
import resource, signal, sys
from l2rw_jax import base
from l2rw_jax.io import metric_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
  with metric_writer.MetricWriter(sys.argv[1], resume_step=None) as writer:
    for step in range(1000):
      writer.write(step, {"loss": step / 7})
except base.InputError as error:
  print(step, error)
"""


@pytest.mark.ci
def test_full_disk_is_a_one_line_error_and_the_run_can_continue(tmp_path):
  run = subprocess.run(
    [sys.executable, "-c", _FULL_DISK, tmp_path],
    check=True,
    capture_output=True,
    text=True,
    cwd=_REPOSITORY,
    timeout=60,  # A writer thread killed by the full disk must not hang the run.
  )
  step, message = run.stdout.strip().split(" ", 1)
  assert message == (
    f"cannot write {tmp_path / 'metrics.jsonl'}: File too large."
    " Correct this (if the disk is full, free some space) and run the same command"
    " again."
  )
  assert run.stderr.startswith("TensorBoard events are no longer written")
  assert run.stderr.count("\n") == 1
  rows = metric_writer.read(tmp_path)
  assert [row["step"] for row in rows] == list(range(int(step)))
  with _open(tmp_path, resume_step=3) as writer:
    writer.write(4, {"loss": 4 / 7})
  assert metric_writer.read(tmp_path) == rows[:5]


def test_failing_close_does_not_hide_an_earlier_error(tmp_path):
  (tmp_path / "metrics.csv").mkdir()
  with pytest.raises(base.InputError, match=r"metrics\.csv"), _open(tmp_path):
    pass
  with pytest.raises(KeyError), _open(tmp_path):
    raise KeyError


def _events(folder):
  """The events of TensorBoard as (step, {tag: value}, session status)."""
  event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
  events = []
  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:  # Length, checksum of the length, event, checksum of the event.
      (length,) = struct.unpack("Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      values = {value.tag: value.simple_value for value in event.summary.value}
      events.append((event.step, values, event.session_log.status))
      data = data[16 + length :]
  return events


def test_tensorboard_receives_finite_values(tmp_path):
  with _open(tmp_path, tensorboard=True) as writer:
    writer.write(1, {"loss": 0.5, "bad": math.nan})
    writer.write(2, {"loss": 0.25})
  written = [(step, values) for step, values, _ in _events(tmp_path) if values]
  assert written == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]


def test_tensorboard_discards_rows_that_are_written_again(tmp_path):
  with _open(tmp_path, resume_step=5, tensorboard=True) as writer:
    writer.write(6, {"loss": 1.0})
  # With SessionLog.START, TensorBoard drops earlier events of this and of later steps.
  start = 1
  assert 6 in [step for step, _, status in _events(tmp_path) if status == start]


def test_tensorboard_is_optional(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  caplog.set_level(logging.INFO)
  with _open(tmp_path, tensorboard=True) as writer:
    _write(writer, 1, 3)
  assert caplog.messages == ["no TensorBoard events: tensorboardX is not installed"]
  assert len(metric_writer.read(tmp_path)) == 3


def test_restart_within_a_second_keeps_earlier_events(tmp_path):
  for resume_step in (None, 1, 2):
    with _open(tmp_path, resume_step=resume_step, tensorboard=True) as writer:
      writer.write((resume_step or 0) + 1, {"loss": 1.0})
  assert [step for step, values, _ in _events(tmp_path) if values] == [1, 2, 3]


def test_rows_are_written_if_tensorboard_cannot_be(tmp_path, caplog):
  pytest.importorskip("tensorboardX")
  (tmp_path / "tensorboard").write_text("in the way")
  with _open(tmp_path, tensorboard=True) as writer:
    _write(writer, 1, 3)
  assert len(metric_writer.read(tmp_path)) == 3
  assert [record.levelname for record in caplog.records] == ["WARNING"]
