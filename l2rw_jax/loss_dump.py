"""Floor 4: a student's losses over its training, recorded, kept and read back.

MentorNet-DD is fitted to such a dump. Record with `recording`, giving it a
`Writer`; when the run is done, `combine` what the writer kept and `write_dump` it.
"""

from collections.abc import Callable
import functools
import io
import os
import pathlib
from typing import NamedTuple
import zipfile

import jax
import numpy as np

from l2rw_jax import base

_DTYPES = {
  "sample": np.int32,
  "epoch_percent": np.int32,
  "label": np.int32,
  "true_label": np.int32,
  "loss": np.float32,
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


# (epoch, indices [n], losses [n])
Sink = Callable[[int, np.ndarray, np.ndarray], None]


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
  dropout, running batch statistics). An interrupted run shows the epoch that it
  resumes in again only if it had not begun. Train one run at a time: several
  side by side would all speak to the same sink.

  Args:
    method: trains as without this.
    sink: called on the host with the epoch, counted from 0, the examples'
      indices and their losses.
    every: epochs between two records.
    num_examples: records a random sample of so many, new each time; all if None.
    batch_size: examples a forward pass.

  Raises:
    InputError: `every` or `num_examples` is less than 1.
  """
  if every < 1 or (num_examples is not None and num_examples < 1):
    raise base.InputError("recording: every and num_examples must be at least 1.")

  def refresh(state, task, view):
    if view.epoch % every == 0:
      index = np.asarray(view.train["index"])
      # A generator of its own leaves the draws of the method's refresh alone.
      rows = np.random.default_rng(view.epoch).permutation(len(index))
      rows = np.sort(rows[:num_examples])
      sink(view.epoch, index[rows], _losses(task, view, rows, batch_size))
    return method.refresh(state, task, view)

  return method._replace(refresh=refresh)


def _losses(task, view, rows, batch_size):
  found = []
  for start in range(0, len(rows), batch_size):
    chosen = rows[start : start + batch_size]
    batch = {k: v[chosen] for k, v in view.train.items()}
    found.append(
      _batch_losses(task.forward, task.loss, view.params, view.model_state, batch)
    )
  return np.concatenate(jax.device_get(found))


@functools.partial(jax.jit, static_argnames=("forward", "loss"))
def _batch_losses(forward, loss, params, model_state, batch):
  outputs, _ = forward(params, model_state, batch, jax.random.key(0), False)
  return loss(outputs, batch)


class Writer:
  """A sink that keeps each epoch in a file of its own, so that runs can resume."""

  def __init__(self, folder: str | os.PathLike):
    """Makes `folder`, which must belong to one run.

    Raises:
      InputError: it cannot be written.
    """
    self.folder = pathlib.Path(folder)
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise base.InputError(f"cannot write {folder}: {error.strerror}") from error

  def __call__(self, epoch: int, index: np.ndarray, losses: np.ndarray) -> None:
    """Keeps an epoch; one that is there already is replaced by the same.

    Raises:
      InputError: what is there is of another run, or the disk is full.
    """
    path = self.folder / f"epoch-{epoch:05d}.npz"
    if path.exists():
      kept = _load(path, "index", "loss")
      same = np.array_equal(kept["index"], index)
      # Not to the last bit: the run may have resumed on another machine.
      if not (same and np.allclose(kept["loss"], losses, rtol=1e-2, atol=1e-3)):
        raise base.InputError(
          f"{path} holds other losses: record one run at a time, in its own folder."
        )
    _save(path, index=index.astype(np.int32), loss=losses.astype(np.float32))

  def combine(
    self,
    label: np.ndarray,
    true_label: np.ndarray,
    *,
    batch_size: int,
    num_steps: int,
  ) -> LossDump:
    """All that was recorded, in order of epoch and example.

    Args:
      label: of the training set, [N].
      true_label: of the training set, [N].
      batch_size: of the run.
      num_steps: of the run.

    Raises:
      InputError: nothing was recorded, a file is damaged, or of more examples.
    """
    columns = []
    for path in sorted(self.folder.glob("epoch-*.npz")):
      kept = _load(path, "index", "loss")
      index = kept["index"]
      if len(index) and index.max() >= len(label):
        raise base.InputError(
          f"{path} is of more than these {len(label)} examples; delete the folder and"
          " record again."
        )
      steps = int(path.stem.removeprefix("epoch-")) * (len(label) // batch_size)
      percent = np.full(len(index), min(100 * steps // num_steps, 99))
      columns.append((index, percent, label[index], true_label[index], kept["loss"]))
    if not columns:
      raise base.InputError(f"{self.folder} holds no recorded losses.")
    return _dump(*(np.concatenate(c) for c in zip(*columns, strict=True)))


def _dump(*columns):
  dtypes = _DTYPES.values()
  return LossDump(*(c.astype(d) for c, d in zip(columns, dtypes, strict=True)))


def write_dump(path: str | os.PathLike, dump: LossDump) -> None:
  """Writes a dump, whole or not at all: CSV if `path` ends so, else NumPy's npz.

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
  _replace(path, text.getvalue().encode())


def read_dump(path: str | os.PathLike) -> LossDump:
  """Reads what `write_dump` wrote.

  Raises:
    InputError: there is no such file, it is damaged, or a column is missing.
  """
  path = pathlib.Path(path)
  if path.suffix != ".csv":
    columns = _load(path, *_DTYPES)
    return _dump(*(columns[name] for name in _DTYPES))
  try:
    with open(path, encoding="utf-8") as file:
      if file.readline().strip() != ",".join(_DTYPES):
        raise ValueError(f"its first line is not {','.join(_DTYPES)}")
      table = np.loadtxt(file, delimiter=",", ndmin=2)
    if table.shape[1:] != (len(_DTYPES),):
      raise ValueError("it has no rows" if not table.size else "a column is missing")
  except OSError as error:
    raise _unreadable(path, error.strerror) from error
  except ValueError as error:
    raise _unreadable(path, error) from error
  return _dump(*table.T)


def _load(path, *names):
  try:
    with np.load(path, allow_pickle=False) as kept:
      return {name: kept[name] for name in names}
  except OSError as error:
    raise _unreadable(path, error.strerror or "not an npz file") from error
  except KeyError as error:
    raise _unreadable(path, f"there is no column {error}") from error
  except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
    raise _unreadable(path, "damaged, or not an npz file") from error


def _unreadable(path, reason):
  return base.InputError(
    f"--dump={path}: cannot read it ({reason}); name a dump that was recorded with"
    " --dump_losses, as .npz or .csv."
  )


def _save(path, **arrays):
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  _replace(path, buffer.getvalue())


def _replace(path, content):
  partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(partial, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise base.InputError(f"cannot write {path}: {error.strerror}") from error
