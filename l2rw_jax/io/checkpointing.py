"""Checkpoints that survive a killed process, a full disk or a damaged file."""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from l2rw_jax import base
from l2rw_jax import processes

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """A restored checkpoint.

  Attributes:
    step: the step at which it was saved.
    state: the saved pytree, bit for bit.
    host: the JSON value that was saved with it.
  """

  step: int
  state: base.PyTree
  host: dict[str, Any]


class Checkpointer:
  """The latest checkpoints of one run; their checksums are verified on reading."""

  def __init__(
    self,
    directory: str | os.PathLike,
    *,
    max_to_keep: int = 2,
    read_only: bool = False,
  ):
    """Opens `directory`.

    Unless `read_only`, creates it if necessary and removes incomplete checkpoints.

    Args:
      directory: a folder for the checkpoints of one run and nothing else.
      max_to_keep: number of checkpoints to keep. An old one is deleted only after a
        new one is complete.
      read_only: whether to open an existing directory only for `restore`, without
        changing it. If several processes have the same state, one writes and the others
        read.

    Raises:
      InputError: the directory cannot be written.
    """
    # Orbax logs every failure with a traceback before raising it. The errors raised
    # here contain what the user needs, in one line.
    logging.getLogger("absl").addFilter(_not_from_orbax)
    logging.getLogger("asyncio").addFilter(_not_from_tensorstore)
    self._directory = pathlib.Path(directory).absolute()
    try:
      if not read_only:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._clear_partial()
      this = processes.index()
      options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else max_to_keep,
        read_only=read_only,
        create=False,
        enable_async_checkpointing=False,
        # With these options, Orbax does not wait for other processes.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=this, active_processes={this}
        ),
      )
      self._manager = ocp.CheckpointManager(self._directory, options=options)
    except OSError as error:
      raise base.InputError(
        f"cannot write checkpoints in {directory}: {error.strerror}"
      ) from error

  def save(self, step: int, state: base.PyTree, host: dict[str, Any]) -> None:
    """Saves a checkpoint; returns once it is complete on disk.

    Args:
      step: must be greater than the step of every checkpoint in the directory.
      state: pytree of JAX and NumPy arrays of any shape, typed PRNG keys and
        Python scalars. Sharded arrays must be addressable by this process.
      host: a JSON value, for instance the position of a data iterator.

    Raises:
      InputError: the checkpoint cannot be written. Earlier ones are intact.
      TypeError: a leaf of `state`, or `host`, has a type that cannot be saved.
      ValueError: `step` is not greater than the latest saved step.
    """
    last = self._manager.latest_step()
    if last is not None and step <= last:
      raise ValueError(f"step {step} does not come after the saved step {last}")
    leaves, arrays = _pack(state)
    # Convert the record to the form in which it will be read: tuples become lists, and
    # keys become strings.
    record = json.loads(json.dumps({"step": step, "leaves": leaves, "host": host}))
    record["sha256"] = _digest(record, arrays)
    items = ocp.args.Composite(
      arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
    )
    try:
      self._manager.save(step, args=items, force=True)
    except (OSError, ValueError, RuntimeError) as error:
      self._clear_partial()
      start = "the start" if last is None else f"step {last}"
      raise base.InputError(
        f"cannot write the checkpoint of step {step} in {self._directory}:"
        f" {_reason(error)}. Correct this (if the disk is full, free some space) and"
        f" run the same command again: it continues from {start}"
      ) from error

  def restore_latest(self, like: base.PyTree) -> Restored | None:
    """Restores the latest intact checkpoint, and deletes later, damaged ones.

    Args:
      like: pytree with the structure, shapes and dtypes of the saved state; its
        values are not used, so it may be the result of `jax.eval_shape`.

    Returns:
      The checkpoint, or None if there is none. Each leaf has the type that was
      saved. JAX arrays are on the default device, not sharded, and weakly typed
      only if their shape is []. NumPy scalars become NumPy arrays.

    Raises:
      InputError: the checkpoint is intact but does not match `like`, or the disk cannot
        be read.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        record, arrays = self._read(step)
      except MemoryError:
        raise  # The checkpoint may be intact, so do not delete it.
      except OSError as error:
        if isinstance(error, FileNotFoundError):
          self._drop(step, error)
          continue
        raise base.InputError(
          f"cannot read the checkpoint of step {step} in {self._directory}:"
          f" {_reason(error)}"
        ) from error
      except Exception as error:  # A damaged file can raise any exception.
        self._drop(step, error)
        continue
      return self._unpacked(step, record, arrays, like)
    return None

  def restore(self, step: int, like: base.PyTree) -> Restored:
    """Restores the checkpoint of `step`; the result is like that of `restore_latest`.

    Raises:
      InputError: the checkpoint cannot be read, or does not match `like`.
    """
    try:
      self._manager.reload()
      record, arrays = self._read(step)
    except MemoryError:
      raise
    except Exception as error:  # A damaged file can raise any exception.
      raise base.InputError(
        f"cannot read the checkpoint of step {step} in {self._directory}:"
        f" {_reason(error)}"
      ) from error
    return self._unpacked(step, record, arrays, like)

  def _unpacked(self, step, record, arrays, like):
    misfit = _misfit(record["leaves"], like)
    if misfit:
      raise base.InputError(
        f"{self._directory} holds checkpoints of another model, method or optimizer, or"
        f" of a different number of examples or seeds: {misfit}. Choose another"
        " --workdir, or delete this one."
      )
    return Restored(step, _unpack(record["leaves"], arrays, like), record["host"])

  def close(self) -> None:
    """Frees the resources of Orbax; the checkpointer cannot be used afterwards."""
    self._manager.close()

  def _read(self, step: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    items = ocp.args.Composite(
      arrays=ocp.args.StandardRestore(), record=ocp.args.JsonRestore()
    )
    saved = self._manager.restore(step, args=items)
    record = dict(saved.record)
    expected = record.pop("sha256")
    if record["step"] != step or _digest(record, saved.arrays) != expected:
      raise ValueError("checksum does not match")
    return record, saved.arrays

  def _drop(self, step: int, error: Exception) -> None:
    self._manager.delete(step)
    _log.warning(
      "checkpoint of step %d in %s is damaged and was deleted: %s",
      step,
      self._directory,
      _reason(error),
    )

  def _clear_partial(self) -> None:
    for partial in self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
      shutil.rmtree(partial, ignore_errors=True)


def _not_from_orbax(record: logging.LogRecord) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _not_from_tensorstore(record: logging.LogRecord) -> bool:
  # Orbax reads all arrays at once and raises the first failure. When Python frees the
  # other tasks, asyncio logs their failures, in addition to the error raised here.
  error = record.exc_info[1] if record.exc_info else None
  return "tensorstore_spec=" not in str(error)


def _pack(state: base.PyTree) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
  """Descriptions of all leaves in JSON, and the arrays by the number of their leaf.

  Orbax supports neither empty containers nor arrays of size 0. When a tree is restored,
  its structure comes from `like`, and empty arrays come from their description.
  """
  leaves: list[dict[str, Any]] = []
  raw = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    described = _describe(jax.tree_util.keystr(path), leaf)
    if described["kind"] == "scalar":
      described["value"] = leaf
    elif described["kind"] == "key":
      described["impl"] = str(jax.random.key_impl(leaf))
      raw[str(len(leaves))] = jax.random.key_data(leaf)
    elif leaf.size:
      raw[str(len(leaves))] = leaf
    leaves.append(described)
  arrays = {name: np.asarray(x) for name, x in jax.device_get(raw).items()}
  return leaves, arrays or {"none": np.zeros(1, np.uint8)}


def _describe(path: str, leaf: Any) -> dict[str, Any]:
  if type(leaf) in (bool, int, float):
    return {"path": path, "kind": "scalar", "dtype": type(leaf).__name__, "shape": []}
  if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
    raise TypeError(f"cannot save {path or 'the state'}, a {type(leaf).__name__}")
  dtype = leaf.dtype
  described = {"path": path, "dtype": str(dtype), "shape": list(leaf.shape)}
  if jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return described | {"kind": "key"}
  # Orbax would misread an array of non-native byte order as a native one, and would
  # refuse unsupported dtypes only after it has begun to write.
  numeric = jnp.issubdtype(dtype, np.number) or dtype == np.bool_
  if not numeric or not dtype.isnative:
    raise TypeError(f"cannot save {path or 'the state'}, an array of {dtype}")
  if not isinstance(leaf, jax.Array):
    return described | {"kind": "numpy"}
  return described | {"kind": "jax", "weak": leaf.weak_type}


def _unpack(
  leaves: list[dict[str, Any]], arrays: dict[str, np.ndarray], like: base.PyTree
) -> base.PyTree:
  # Leaves are matched by path, not by position, because dict and OrderedDict have
  # different orders.
  values = {
    leaf["path"]: _unpack_leaf(leaf, arrays.get(str(i)))
    for i, leaf in enumerate(leaves)
  }
  return jax.tree_util.tree_map_with_path(
    lambda path, _: values[jax.tree_util.keystr(path)], like
  )


def _unpack_leaf(leaf: dict[str, Any], array: np.ndarray | None) -> Any:
  if leaf["kind"] == "scalar":
    return leaf["value"]
  if array is None:
    array = np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
  if leaf["kind"] == "key":
    return jax.random.wrap_key_data(jnp.asarray(array), impl=leaf["impl"])
  if leaf["kind"] == "numpy":
    return array
  if leaf["weak"] and array.ndim == 0:
    # Weak types affect the dtypes of later computations, and only a Python scalar
    # creates a weakly typed array.
    weak = jnp.asarray(array.item())
    if weak.dtype == array.dtype:
      return weak
  return jnp.asarray(array)


def _misfit(leaves: list[dict[str, Any]], like: base.PyTree) -> str:
  """Describes the first leaf that differs from `like`; "" if there is none."""
  flat = jax.tree_util.tree_flatten_with_path(like)[0]
  expected = [_describe(jax.tree_util.keystr(path), leaf) for path, leaf in flat]
  old, new = ({x["path"]: _signature(x) for x in xs} for xs in (leaves, expected))
  for path in sorted(old.keys() | new.keys()):
    was, now = old.get(path, "absent"), new.get(path, "absent")
    if was != now:
      return f"{path or 'the state'} was {was}, now {now}"
  return ""


def _signature(leaf: dict[str, Any]) -> str:
  return f"{leaf['dtype']}{leaf['shape']}"


def _digest(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
  """SHA-256 over the whole record and every array's name, dtype, shape and bytes."""
  digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
  for name in sorted(arrays):
    array = arrays[name]
    digest.update(f"{name} {array.dtype} {array.shape};".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _reason(error: Exception) -> str:
  """Shortens the messages of Orbax and TensorStore, which have many lines, to one."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  first_line = (str(error).splitlines() or [""])[0]
  return f"{type(error).__name__}: {first_line[:200]}"
