"""Records the losses of a student (a classifier) and writes and reads them as a dump.

MentorNet-DD is fitted to such a dump. Train with the epoch probe
`record_losses(Writer(folder))`; when the run has finished, call `Writer.combine` and
pass its result to `write_dump`.
"""

from collections.abc import Callable
import functools
import io
import os
import pathlib
import struct
from typing import Any, NamedTuple
import zipfile
import zlib

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import inference
from l2rw_jax.data import examples as examples_lib
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
# The smallest and largest allowed integers. Beyond int32, a cast would change them.
_RANGES = {
  "sample": _ANY_ROW,
  "index": _ANY_ROW,
  "epoch_percent": (0, 99),
  "label": _ANY_CLASS,
  "true_label": _ANY_CLASS,
}


class LossDump(NamedTuple):
  """N recorded losses, as NumPy arrays.

  Attributes:
    sample: the example's row in its training set, int32 [N].
    epoch_percent: percent of the training that was done, 0 to 99, int32 [N].
    label: label that the student was trained on, int32 [N].
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


def record_losses(
  sink: Sink,
  *,
  every: int = 1,
  num_examples: int | None = None,
  batch_size: int = 500,
) -> Callable[[Any, int], None]:
  """An epoch probe that passes the training set's losses to `sink`.

  The losses are those of the network in evaluation mode (no dropout, running batch
  statistics). A run that is resumed after it was killed records the epochs since its
  last checkpoint again.

  Args:
    sink: called on the host with the run's seed, the epoch (counted from 0), the
      examples' indices and their losses.
    every: number of epochs between records.
    num_examples: size of the random sample to record, which is drawn again each time;
      None records all examples.
    batch_size: number of examples per forward pass.

  Returns:
    An `evaluation.EpochProbe`, for `loop.train(..., epoch_probes=[...])`.

  Raises:
    InputError: `every`, `num_examples` or `batch_size` is not a positive integer.
  """
  every = base.check_integer("record_losses: every", every)
  batch_size = base.check_integer("record_losses: batch_size", batch_size)
  if num_examples is not None:
    num_examples = base.check_integer("record_losses: num_examples", num_examples)

  def probe(snapshot, epoch):
    if epoch % every:
      return
    train, problem = snapshot.splits.train, snapshot.problem
    examples = examples_lib.as_batch(train)
    size = len(train.label)
    rows = np.random.default_rng([snapshot.seed, epoch]).permutation(size)
    rows = np.sort(rows[:num_examples])

    def losses(batch):
      return _batch_losses(
        problem.forward,
        problem.loss,
        snapshot.state.params,
        snapshot.state.model_state,
        {name: column[batch["row"]] for name, column in examples.items()},
      )

    recorded = inference.map_batches(losses, {"row": rows}, batch_size)
    sink(snapshot.seed, epoch, np.asarray(train.index)[rows], recorded)

  return probe


@functools.partial(jax.jit, static_argnames=("forward", "loss"))
def _batch_losses(forward, loss, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  return loss(outputs, batch)


class Writer:
  """A sink that writes each epoch to a separate file, so that runs can be resumed.

  folder/seed-S/epoch-E.npz   the arrays "index" and "loss"
  """

  def __init__(self, folder: str | os.PathLike):
    """Stores all files in `folder`, which must belong to one set of runs."""
    self.folder = pathlib.Path(folder)

  def __call__(
    self, seed: int, epoch: int, index: np.ndarray, losses: np.ndarray
  ) -> None:
    """Writes an epoch; an existing file of the same epoch must agree with it.

    Raises:
      InputError: the existing file is from other settings or damaged, or writing fails.
    """
    path = self._run_folder(seed) / f"epoch-{epoch:05d}.npz"
    if path.exists():
      previous = _load_epoch(path)
      same = np.array_equal(previous["index"], index)
      # The losses may differ by rounding if the run was resumed on another machine.
      if not (
        same
        and np.allclose(previous["loss"], losses, rtol=1e-2, atol=1e-3, equal_nan=True)
      ):
        raise base.InputError(
          f"{path} contains the losses of other settings; delete {self.folder} or"
          " record in another --workdir."
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
    """All recorded losses of a run, in order of epoch and example.

    Args:
      seed: seed of the run.
      label: labels of the training set, [N].
      true_label: true labels of the training set, [N].
      batch_size: batch size of the run.
      num_steps: number of steps of the run.

    Raises:
      InputError: nothing was recorded, or a file is damaged or has examples that are
        not in the training set.
    """
    columns = []
    for path in sorted(self._run_folder(seed).glob("epoch-*.npz")):
      record = _load_epoch(path)
      index = record["index"]
      if len(index) and index.max() >= len(label):
        raise base.InputError(
          f"{path} has an example beyond the {len(label)} training examples; delete"
          f" {self.folder} and record again."
        )
      steps = int(path.stem.removeprefix("epoch-")) * (len(label) // batch_size)
      percent = np.full(len(index), min(100 * steps // num_steps, 99))
      columns.append((index, percent, label[index], true_label[index], record["loss"]))
    if not columns:
      raise base.InputError(
        f"{self._run_folder(seed)} has no recorded losses: record the run from its"
        " start."
      )
    return _dump(*(np.concatenate(c) for c in zip(*columns, strict=True)))

  def _run_folder(self, seed):
    return self.folder / f"seed-{seed}"


def _dump(*columns):
  dtypes = _DTYPES.values()
  with np.errstate(over="ignore"):  # A loss beyond float32 becomes infinite.
    return LossDump(*(c.astype(d) for c, d in zip(columns, dtypes, strict=True)))


def write_dump(path: str | os.PathLike, dump: LossDump) -> None:
  """Writes a dump atomically, as CSV if `path` ends in .csv, otherwise as npz.

  The folder is created if it does not exist.

  Raises:
    InputError: the file cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix != ".csv":
    _save(path, **dump._asdict())
    return
  text = io.StringIO()
  # Nine digits represent a float32 number exactly.
  formats = ["%d"] * 4 + ["%.9g"]
  table = np.column_stack([c.astype(np.float64) for c in dump])
  np.savetxt(text, table, formats, delimiter=",", header=",".join(_DTYPES), comments="")
  _write(path, text.getvalue().encode())


def read_dump(path: str | os.PathLike) -> LossDump:
  """Reads a dump that `write_dump` wrote.

  Raises:
    InputError: the file does not exist, is damaged, or lacks a column.
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
  """Raises ValueError unless the columns are equally long lists of valid numbers."""
  for name, column in columns.items():
    if column.dtype.kind not in "iuf" or column.ndim != 1:
      raise ValueError(f"its column {name} is not a list of numbers")
    if name == "loss":
      continue
    if not np.isfinite(column).all():
      raise ValueError(f"a number in its column {name} is missing or infinite")
    least, most = _RANGES[name]
    if ((column < least) | (column > most) | (column != np.floor(column))).any():
      raise ValueError(f"{name} must be whole numbers from {least} to {most}")
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


# NumPy and zipfile raise these errors for archives that are truncated, encrypted,
# compressed by an unknown algorithm, or larger than memory according to their headers.
_UNREADABLE = (
  *(OSError, ValueError, EOFError, TypeError, RuntimeError, MemoryError),
  *(OverflowError, SyntaxError, zipfile.BadZipFile, zlib.error, struct.error),
)


def _load(path, *names):
  """Arrays by name; raises ValueError with a description if the file is damaged."""
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in names}
  except KeyError as error:
    raise ValueError(f"no column {error.args[0].split()[0]}") from error
  except _UNREADABLE as error:
    # np.load treats any file that is not an archive as a pickle.
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
