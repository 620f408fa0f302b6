"""Floor 4: the metrics of a run, the same to the byte after a kill and a resume."""

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

from l2rw_jax import base
from l2rw_jax.io import workdir

_JSONL = "metrics.jsonl"
_CSV = "metrics.csv"
FILES = (_JSONL, _CSV)
_TENSORBOARD = "tensorboard"
_log = logging.getLogger(__name__)


class MetricWriter:
  """Appends rows to `metrics.jsonl`; on close derives `metrics.csv` from it.

  A context manager. NaN and infinities become null, for JSON has no such
  numbers; `read` gives them back as NaN. To resume exactly, write the rows of a
  step before saving the checkpoint of that step.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    resume_step: int | None,
    tensorboard: bool = True,
    history: Sequence[str] | None = None,
  ):
    """Drops the rows that the resumed run is going to write again.

    Args:
      folder: an existing folder.
      resume_step: the step of the restored checkpoint; later rows are dropped.
        None starts over: all rows are.
      tensorboard: whether to write TensorBoard events too, under `tensorboard/`.
      history: the lines to begin with, as `history` of the earlier writer was when
        the checkpoint was saved: then it does not matter what happened to the file
        since. None takes them from the file.

    Raises:
      InputError: the files cannot be written, or a row other than the last,
        half-written one is damaged.
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
    """The lines of `metrics.jsonl` so far, without their newlines."""
    return list(self._history)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, kind: type | None, *exception: Any) -> None:
    try:
      self.close()
    except base.InputError:
      if kind is None:  # Else it would hide what went wrong first.
        raise

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one row and hands it to the operating system.

    Args:
      step: number of updates done.
      values: one number for each name: Python, NumPy or JAX scalars.

    Raises:
      InputError: the row cannot be written (the disk is full).
      ValueError: a metric is called "step".
    """
    if "step" in values:
      raise ValueError('"step" is the name of the row\'s own column')
    numbers = {name: float(values[name]) for name in sorted(values)}
    finite = {name: x for name, x in numbers.items() if math.isfinite(x)}
    row = {"step": int(step)} | {name: finite.get(name) for name in numbers}
    line = json.dumps(row)
    try:
      _append(self._file, f"{line}\n".encode())
    except OSError as error:
      raise base.InputError(
        f"cannot write {self._path}: {error.strerror}."
        " Free some space and run the same command again."
      ) from error
    self._history.append(line)
    try:
      self._events.write(int(step), finite)
    except OSError as error:
      _log.warning("TensorBoard events are not written any more: %s", error)
      self._events = _NoEvents()

  def close(self) -> None:
    """Writes `metrics.csv`: "step", then every metric by name; safe to repeat.

    A cell is empty where a row lacks the metric, "nan" where it was not finite.

    Raises:
      InputError: the file cannot be written.
    """
    if self._file.closed:
      return
    # What a full disk refuses here, `write` has reported already.
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      self._events.close()
    workdir.write_text(self._folder / _CSV, _table(read(self._folder)))


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows written so far, oldest first; a half-written last one is left out.

  Args:
    folder: the folder given to `MetricWriter`.

  Returns:
    One `{"step": int, name: float, ...}` a row; [] when nothing was written.

  Raises:
    InputError: a row other than the last one is damaged.
  """
  rows = [row for _, row in _rows(pathlib.Path(folder) / _JSONL)]
  return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def _rows(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Each line as it stands in the file, beside what it says."""
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
  """Writes all of `content` to a file without a buffer.

  With a buffer Python would try what a full disk refused again whenever the file is
  closed or collected, and complain of that as well.
  """
  while content:
    content = content[file.write(content) :]


class _NoEvents:
  def write(self, step: int, values: Mapping[str, float]) -> None:
    pass

  def close(self) -> None:
    pass


class _Events(_NoEvents):
  """A TensorBoard file, written by this thread.

  `tensorboardX.SummaryWriter` leaves that to a thread behind a queue. A full
  disk kills the thread, and then the next few values block the run for ever.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2
    from tensorboardX.proto import summary_pb2

    self._event_pb2, self._summary_pb2 = event_pb2, summary_pb2
    self._checksum = record_writer.masked_crc32c
    folder.mkdir(exist_ok=True)
    # The time has a resolution of one second: a quick restart must not get the same
    # name, for the old file would be emptied.
    name = (
      f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
      f".{os.getpid()}.{first_step}"
    )
    self._file = open(folder / name, "wb", buffering=0)  # noqa: SIM115
    self._write_event(0, file_version="brain.Event:2")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    # TensorBoard forgets what an earlier session wrote from this step on.
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


def _open_events(folder: pathlib.Path, first_step: int, wanted: bool) -> _NoEvents:
  if not wanted:
    return _NoEvents()
  try:
    return _Events(folder, first_step)
  except ImportError:
    _log.info("no TensorBoard events: tensorboardX is not installed")
  except OSError as error:
    _log.warning("TensorBoard events are not written: %s", error)
  return _NoEvents()
