"""Floor 4: the metrics of a run, the same to the byte after a kill and a resume."""

from collections.abc import Mapping
import csv
import importlib
import io
import json
import logging
import math
import os
import pathlib
from typing import Any

from l2rw_jax import base
from l2rw_jax import workdir

_JSONL = "metrics.jsonl"
_CSV = "metrics.csv"
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
  ):
    """Drops the rows that the resumed run is going to write again.

    Args:
      folder: an existing folder.
      resume_step: the step of the restored checkpoint; later rows are dropped.
        None starts over: all rows are.
      tensorboard: whether to write TensorBoard events too, under `tensorboard/`.

    Raises:
      InputError: the files cannot be written, or a row other than the last,
        half-written one is damaged.
    """
    self._folder = pathlib.Path(folder)
    self._path = self._folder / _JSONL
    last = -math.inf if resume_step is None else resume_step
    kept = [line for line, row in _rows(self._path) if row["step"] <= last]
    workdir.write_text(self._path, "".join(f"{line}\n" for line in kept))
    self._file = open(self._path, "a", encoding="utf-8", newline="")  # noqa: SIM115
    self._board = None
    if tensorboard:
      first = 0 if resume_step is None else resume_step + 1
      self._board = _summary_writer(self._folder / _TENSORBOARD, first)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

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
    try:
      self._file.write(json.dumps(row) + "\n")
      self._file.flush()
    except OSError as error:
      raise base.InputError(
        f"cannot write {self._path}: {error.strerror}."
        " Free some space and run the same command again."
      ) from error
    self._write_board(int(step), finite)

  def _write_board(self, step: int, values: dict[str, float]) -> None:
    if self._board is None:
      return
    try:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)
      # A full disk kills the thread behind the queue of tensorboardX, and then
      # add_scalar blocks for ever. Flushing raises here, before that.
      self._board.flush()
    except OSError as error:
      _log.warning("TensorBoard events are not written any more: %s", error)
      self._board = None

  def close(self) -> None:
    """Writes `metrics.csv`: "step", then every metric by name; safe to repeat.

    A cell is empty where a row lacks the metric, "nan" where it was not finite.

    Raises:
      InputError: the file cannot be written.
    """
    if self._file.closed:
      return
    self._file.close()
    if self._board is not None:
      self._board.close()
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
      row["step"] + 0  # noqa: B018
    except (ValueError, TypeError, KeyError):
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


def _summary_writer(folder: pathlib.Path, first_step: int) -> Any:
  try:
    tensorboardx = importlib.import_module("tensorboardX")
  except ImportError:
    _log.info("no TensorBoard events: tensorboardX is not installed")
    return None
  return tensorboardx.SummaryWriter(str(folder), purge_step=first_step)
