"""Metric files of a run, byte-identical even if the run is killed and resumed."""

from collections.abc import Mapping, Sequence
import contextlib
import csv
import io
import json
import logging
import math
import os
import pathlib
import socket
import struct
import time
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.io import workdir

_JSONL = "metrics.jsonl"
_CSV = "metrics.csv"
FILES = (_JSONL, _CSV)
_TENSORBOARD = "tensorboard"
_log = logging.getLogger(__name__)


class MetricWriter:
  """Appends rows to `metrics.jsonl`, and derives `metrics.csv` from it on close.

  The writer is a context manager. NaN and infinities are written as null, because
  JSON does not support them; `read` returns them as NaN. To resume exactly, write the
  rows of a step before you save the checkpoint of that step.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    resume_step: int | None,
    tensorboard: bool = True,
    history: Sequence[str] | None = None,
  ):
    """Opens the files and drops the rows that the resumed run will write again.

    Args:
      folder: an existing folder.
      resume_step: the step of the restored checkpoint; later rows of the file are
        dropped. None drops all of them.
      tensorboard: whether to also write TensorBoard events, in `tensorboard/`.
      history: the `history` that the earlier writer had when the checkpoint was saved.
        If it is given, these rows are kept instead of those of the file, so that a
        file that was damaged since then is repaired. None reads the rows from the file.

    Raises:
      InputError: the files cannot be written, or a row other than the last one is
        damaged.
    """
    self._folder = pathlib.Path(folder)
    self._path = self._folder / _JSONL
    if history is None and resume_step is not None:
      history = [line for line, row in _rows(self._path) if row["step"] <= resume_step]
    self._history = list(history or ())
    workdir.write_text(self._path, "".join(f"{line}\n" for line in self._history))
    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
    first = 0 if resume_step is None else resume_step + 1
    self._events = _open_events(self._folder / _TENSORBOARD, first, tensorboard)

  @property
  def history(self) -> list[str]:
    """The lines of `metrics.jsonl` so far, without newlines."""
    return list(self._history)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, kind: type | None, *exception: Any) -> None:
    try:
      self.close()
    except base.InputError:
      if kind is None:  # Otherwise this error would hide the first one.
        raise

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one row without buffering it.

    Args:
      step: number of updates done.
      values: metrics by name: Python, NumPy or JAX scalars.

    Raises:
      InputError: a metric is not one number, or the row cannot be written, for
        instance because the disk is full.
      ValueError: a metric is named "step".
    """
    if "step" in values:
      raise ValueError('no metric may be named "step", the name of the first column')
    numbers = {name: _number(name, values[name]) for name in sorted(values)}
    finite = {name: x for name, x in numbers.items() if math.isfinite(x)}
    row = {"step": int(step)} | {name: finite.get(name) for name in numbers}
    line = json.dumps(row)
    try:
      _append(self._file, f"{line}\n".encode())
    except OSError as error:
      raise base.InputError(
        f"cannot write {self._path}: {error.strerror}."
        " Correct this (if the disk is full, free some space) and run the same command"
        " again."
      ) from error
    self._history.append(line)
    try:
      self._events.write(int(step), finite)
    except OSError as error:
      _log.warning("TensorBoard events are no longer written: %s", error)
      self._events = _NoEvents()

  def close(self) -> None:
    """Writes `metrics.csv`, with "step" first and then all metrics by name.

    A cell is empty if the row lacks the metric, and "nan" if the metric was not finite.
    This function may be called twice.

    Raises:
      InputError: the file cannot be written, or `metrics.jsonl` is damaged.
    """
    if self._file.closed:
      return
    # `write` has already reported a full disk.
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      self._events.close()
    workdir.write_text(self._folder / _CSV, _table(read(self._folder)))


def _number(name: str, value: Any) -> float:
  try:
    if np.ndim(value) == 0:
      return float(value)
  except (TypeError, ValueError):
    pass
  raise base.InputError(
    f"the metric {name!r} must be one number; got {type(value).__name__} of shape"
    f" {list(np.shape(value))}"
  )


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the rows written so far; an incomplete last row is left out.

  Args:
    folder: the folder of the `MetricWriter`.

  Returns:
    A `{"step": int, name: float, ...}` for each row, the oldest first.

  Raises:
    InputError: a row other than the last one is damaged.
  """
  rows = [row for _, row in _rows(pathlib.Path(folder) / _JSONL)]
  return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def _rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """The lines of the file, each with its parsed row."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("not a row")
    except ValueError:
      if number == len(lines):
        break
      raise base.InputError(
        f"{path}: line {number} is damaged. Delete the folder to start over."
      ) from None
    rows.append((line, row))
  return rows


def _table(rows: list[dict[str, Any]]) -> str:
  names = sorted({name for row in rows for name in row} - {"step"})
  text = io.StringIO()
  table = csv.DictWriter(text, ["step", *names], lineterminator="\n")
  table.writeheader()
  table.writerows(rows)
  return text.getvalue()


def _append(file: io.FileIO, content: bytes) -> None:
  """Writes all of `content` to an unbuffered file.

  If the file had a buffer and the disk was full, Python would try to write the rest
  again when the file is closed or garbage-collected, and raise a second error.
  """
  while content:
    content = content[file.write(content) :]


class _NoEvents:
  def write(self, step: int, values: Mapping[str, float]) -> None:
    pass

  def close(self) -> None:
    pass


class _Events(_NoEvents):
  """A TensorBoard event file, written by this thread.

  `tensorboardX.SummaryWriter` writes in another thread behind a queue. A full disk
  ends that thread, and the next few values then block the run forever.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2
    from tensorboardX.proto import summary_pb2

    self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
    self._checksum = record_writer.masked_crc32c
    folder.mkdir(exist_ok=True)
    # The time has a resolution of one second. A quick restart must not use the same
    # name, because opening the file again would empty it.
    name = (
      f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
      f".{os.getpid()}.{first_step}"
    )
    self._file = open(folder / name, "wb", buffering=0)  # noqa: SIM115
    self._write_event(0, file_version="brain.Event:2")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    # TensorBoard discards events of earlier sessions from this step on.
    self._write_event(first_step, session_log=start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    value_type = self._summary_pb2.Summary.Value
    value = [value_type(tag=name, simple_value=x) for name, x in values.items()]
    self._write_event(step, summary=self._summary_pb2.Summary(value=value))

  def _write_event(self, step: int, **content: Any) -> None:
    event = self._event_pb2.Event(step=step, wall_time=time.time(), **content)
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
    _append(self._file, length + sums[0] + data + sums[1])

  def close(self) -> None:
    self._file.close()


def _open_events(folder: pathlib.Path, first_step: int, enabled: bool) -> _NoEvents:
  if not enabled:
    return _NoEvents()
  try:
    return _Events(folder, first_step)
  except ImportError:
    _log.info("no TensorBoard events: tensorboardX is not installed")
  except OSError as error:
    _log.warning("TensorBoard events are not written: %s", error)
  return _NoEvents()
