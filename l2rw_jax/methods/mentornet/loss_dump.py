"""Floor 4: a student's losses over its training, recorded, kept and read back.

MentorNet-DD is fitted to such a dump. Record with `recording`, giving it a
`Writer`; when the run is done, `combine` what the writer kept and `write_dump` it.
"""

from collections.abc import Callable
import functools
import io
import os
import pathlib
import struct
from typing import NamedTuple
import zipfile
import zlib

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.io import workdir

_DTYPES = {
  "sample": np.int32,
  "epoch_percent": np.int32,
  "label": np.int32,
  "true_label": np.int32,
  "loss": np.float32,
}
_ANY_ROW = (0, np.iinfo(np.int32).max)
_ANY_CLASS = (0, 999_999)
# What the integers may be; a cast would turn larger ones into others.
_RANGES = {
  "sample": _ANY_ROW,
  "index": _ANY_ROW,
  "epoch_percent": (0, 99),
  "label": _ANY_CLASS,
  "true_label": _ANY_CLASS,
}


class LossDump(NamedTuple):
  """N recorded losses, NumPy arrays.

  Attributes:
    sample: the example's row in its training set, int32 [N].
    epoch_percent: percent of training done, 0 to 99, int32 [N].
    label: what the student was trained on, int32 [N].
    true_label: int32 [N].
    loss: float32 [N].
  """

  sample: np.ndarray
  epoch_percent: np.ndarray
  label: np.ndarray
  true_label: np.ndarray
  loss: np.ndarray


# (seed of the run, epoch, indices [n], losses [n])
Sink = Callable[[int, int, np.ndarray, np.ndarray], None]


def recording(
  method: base.Method,
  sink: Sink,
  *,
  every: int = 1,
  num_examples: int | None = None,
  batch_size: int = 500,
) -> base.Method:
  """`method`, with the training set's losses shown to `sink` before an epoch.

  Losses are those of the network as it is evaluated, not as it is trained (no
  dropout, running batch statistics). A run that is continued after a kill shows
  the epochs since its last checkpoint a second time.

  Args:
    method: trains as without this.
    sink: called on the host with the run's seed, the epoch, counted from 0, the
      examples' indices and their losses.
    every: epochs between two records.
    num_examples: records a random sample of so many, new each time; all if None.
    batch_size: examples a forward pass.

  Raises:
    InputError: `every` or `num_examples` is less than 1.
  """
  if every < 1 or (num_examples is not None and num_examples < 1):
    raise base.InputError("recording: every and num_examples must be at least 1.")

  def refresh(state, problem, view):
    if view.epoch % every == 0:
      index = np.asarray(view.train["index"])
      # A generator of its own leaves the draws of the method's refresh alone.
      rows = np.random.default_rng([view.seed, view.epoch]).permutation(len(index))
      rows = np.sort(rows[:num_examples])
      found = _losses(problem, view, rows, batch_size)
      sink(view.seed, view.epoch, index[rows], found)
    return method.refresh(state, problem, view)

  return method._replace(refresh=refresh)


def _losses(problem, view, rows, batch_size):
  found = []
  for start in range(0, len(rows), batch_size):
    chosen = rows[start : start + batch_size]
    batch = {k: v[chosen] for k, v in view.train.items()}
    found.append(
      _batch_losses(problem.forward, problem.loss, view.params, view.model_state, batch)
    )
  return np.concatenate(jax.device_get(found))


@functools.partial(jax.jit, static_argnames=("forward", "loss"))
def _batch_losses(forward, loss, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  return loss(outputs, batch)


class Writer:
  """A sink that keeps each epoch in a file of its own, so that runs can resume.

  folder/seed-S/epoch-E.npz   "index" and "loss"
  """

  def __init__(self, folder: str | os.PathLike):
    """Keeps everything in `folder`, which must belong to one set of runs."""
    self.folder = pathlib.Path(folder)

  def __call__(
    self, seed: int, epoch: int, index: np.ndarray, losses: np.ndarray
  ) -> None:
    """Keeps an epoch; one that is there already is replaced by the same.

    Raises:
      InputError: what is there is of other settings, or it cannot be written.
    """
    path = self._of_run(seed) / f"epoch-{epoch:05d}.npz"
    if path.exists():
      kept = _load_epoch(path)
      same = np.array_equal(kept["index"], index)
      # Not to the last bit: the run may have resumed on another machine.
      if not (
        same and np.allclose(kept["loss"], losses, rtol=1e-2, atol=1e-3, equal_nan=True)
      ):
        raise base.InputError(
          f"{path} holds the losses of other settings; delete {self.folder} or record"
          " in another --workdir."
        )
    _save(path, index=index.astype(np.int32), loss=losses.astype(np.float32))

  def combine(
    self,
    seed: int,
    label: np.ndarray,
    true_label: np.ndarray,
    *,
    batch_size: int,
    num_steps: int,
  ) -> LossDump:
    """All that was recorded of a run, in order of epoch and example.

    Args:
      seed: of the run.
      label: of the training set, [N].
      true_label: of the training set, [N].
      batch_size: of the run.
      num_steps: of the run.

    Raises:
      InputError: nothing was recorded, a file is damaged, or of more examples.
    """
    columns = []
    for path in sorted(self._of_run(seed).glob("epoch-*.npz")):
      kept = _load_epoch(path)
      index = kept["index"]
      if len(index) and index.max() >= len(label):
        raise base.InputError(
          f"{path} is of more than these {len(label)} examples; delete {self.folder}"
          " and record again."
        )
      steps = int(path.stem.removeprefix("epoch-")) * (len(label) // batch_size)
      percent = np.full(len(index), min(100 * steps // num_steps, 99))
      columns.append((index, percent, label[index], true_label[index], kept["loss"]))
    if not columns:
      raise base.InputError(
        f"{self._of_run(seed)} holds no recorded losses: record the run from its start."
      )
    return _dump(*(np.concatenate(c) for c in zip(*columns, strict=True)))

  def _of_run(self, seed):
    return self.folder / f"seed-{seed}"


def _dump(*columns):
  dtypes = _DTYPES.values()
  with np.errstate(over="ignore"):  # A loss beyond float32 becomes infinite.
    return LossDump(*(c.astype(d) for c, d in zip(columns, dtypes, strict=True)))


def write_dump(path: str | os.PathLike, dump: LossDump) -> None:
  """Writes a dump, whole or not at all: CSV if `path` ends so, else NumPy's npz.

  Makes the folder if need be.

  Raises:
    InputError: the file cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix != ".csv":
    _save(path, **dump._asdict())
    return
  text = io.StringIO()
  # Nine digits tell float32 numbers apart.
  formats = ["%d"] * 4 + ["%.9g"]
  table = np.column_stack([c.astype(np.float64) for c in dump])
  np.savetxt(text, table, formats, delimiter=",", header=",".join(_DTYPES), comments="")
  _write(path, text.getvalue().encode())


def read_dump(path: str | os.PathLike) -> LossDump:
  """Reads what `write_dump` wrote.

  Raises:
    InputError: there is no such file, it is damaged, or a column is missing.
  """
  path = pathlib.Path(path)
  try:
    columns = _read_csv(path) if path.suffix == ".csv" else _load(path, *_DTYPES)
    _check_columns(columns)
    if not len(columns["loss"]):
      raise ValueError("it has no rows")
  except ValueError as error:
    raise base.InputError(
      f"--dump={path}: cannot read it ({error}); name a dump that was recorded with"
      " --dump_losses, as .npz or .csv."
    ) from error
  return _dump(*(columns[name] for name in _DTYPES))


def _check_columns(columns):
  """Raises ValueError unless `_dump` keeps every number of the columns as it is."""
  for name, column in columns.items():
    if column.dtype.kind not in "iuf" or column.ndim != 1:
      raise ValueError(f"its column {name} is not a list of numbers")
    if name == "loss":
      continue
    if not np.isfinite(column).all():
      raise ValueError("a number is missing")
    least, most = _RANGES[name]
    if ((column < least) | (column > most) | (column != np.floor(column))).any():
      raise ValueError(f"{name} must hold whole numbers from {least} to {most}")
  if len({column.shape for column in columns.values()}) != 1:
    raise ValueError("its columns differ in length")


def _read_csv(path):
  try:
    with open(path, encoding="utf-8") as file:
      if file.readline().strip() != ",".join(_DTYPES):
        raise ValueError(f"its first line is not {','.join(_DTYPES)}")
      lines = [line for line in file if line.strip()]
  except OSError as error:
    raise ValueError(error.strerror) from error
  if not lines:
    raise ValueError("it has no rows")
  table = np.loadtxt(lines, delimiter=",", ndmin=2)
  if table.shape[1] != len(_DTYPES):
    raise ValueError("a column is missing")
  return dict(zip(_DTYPES, table.T, strict=True))


# What NumPy and zipfile raise for archives that are cut, encrypted, compressed in
# ways they do not know, or whose headers promise more than there is memory for.
_UNREADABLE = (
  *(OSError, ValueError, EOFError, TypeError, RuntimeError, MemoryError),
  *(OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)


def _load(path, *names):
  """Arrays by name; a ValueError tells what is wrong with the file."""
  try:
    with np.load(path, allow_pickle=False) as kept:
      return {name: kept[name] for name in names}
  except KeyError as error:
    raise ValueError(f"no column {error.args[0].split()[0]}") from error
  except _UNREADABLE as error:
    # np.load takes anything that is no archive for a pickle.
    reason = getattr(error, "strerror", None) or "damaged, or not an npz file"
    raise ValueError(reason) from error


def _load_epoch(path):
  try:
    if not path.stem.removeprefix("epoch-").isdecimal():
      raise ValueError("its name has no epoch")
    columns = _load(path, "index", "loss")
    _check_columns(columns)
    return columns
  except ValueError as error:
    raise base.InputError(
      f"{path}: cannot read it ({error}); delete its folder and record again."
    ) from error


def _save(path, **arrays):
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  _write(path, buffer.getvalue())


def _write(path, content):
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise base.InputError(f"cannot write {path}: {error.strerror}") from error
  workdir.write_bytes(path, content)
