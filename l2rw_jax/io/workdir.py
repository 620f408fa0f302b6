"""The folder of a run: atomic writes, checksums, locks and provenance."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import tempfile
import time
from typing import IO, Any
import zipfile

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax import processes

_SETTINGS = "settings.json"
_LOCK = ".lock"
_SCRATCH = ".scratch-"
_SHARED = ".shared-"
_CHECKSUM = "sha256"
# These files and folders of a run must not be in a folder without settings.
_TRACES = ("results.json", "metrics.jsonl", "checkpoints", "mentor.json")
_log = logging.getLogger(__name__)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "l2rw_jax")


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes `text` to `path` atomically.

  If the process is killed or the power fails, `path` contains either all of its old
  content or all of its new content.

  Args:
    path: file to create or replace; its folder must exist.
    text: the content, stored as UTF-8 without newline translation.

  Raises:
    InputError: the file cannot be written; its old content is kept.
  """
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes `content` to `path` atomically, as `write_text` does.

  Args:
    path: file to create or replace; its folder must exist.
    content: the whole content.

  Raises:
    InputError: the file cannot be written; its old content is kept.
  """
  write_with(path, lambda file: file.write(content))


def write_with(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
  """Writes a file atomically, without holding its content in memory.

  Args:
    path: file to create or replace; its folder must exist.
    write: writes the whole content to the file that it receives.

  Raises:
    InputError: the file cannot be written; its old content is kept.
  """
  try:
    _replace(pathlib.Path(path), write)
  except OSError as error:
    raise base.InputError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
  # The process id prevents two runs in one folder from using the same file.
  partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(partial, "wb") as file:
      write(file)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_arrays(file: IO[bytes], arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an uncompressed `.npz` file, like `np.savez`, but accepts any array names.

  `np.savez` cannot store arrays named `file` or `allow_pickle`, because these are its
  arguments.

  Args:
    file: an open file.
    arrays: the arrays by name.

  Raises:
    ValueError: an array contains Python objects.
  """
  with zipfile.ZipFile(file, "w") as archive:
    for name, array in arrays.items():
      with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` atomically as JSON with sorted keys.

  Args:
    path: file to create or replace; its folder must exist.
    value: any value that `json` supports. NaN and infinities are refused, because
      JSON does not support them.

  Raises:
    InputError: the file cannot be written; its old content is kept.
    TypeError, ValueError: `value` cannot be written as JSON; nothing is written.
  """
  write_text(path, _dump(value))


def _dump(value: Any) -> str:
  return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def write_record(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
  """Writes a JSON object with its checksum under "sha256".

  Args:
    path: file to create or replace; its folder must exist.
    value: a JSON object with string keys; NaN and infinities are refused.

  Raises:
    InputError: the file cannot be written; its old content is kept.
    TypeError, ValueError: `value` cannot be written as JSON, or has a key "sha256";
      nothing is written.
  """
  if _CHECKSUM in value:
    raise ValueError(f"{path}: the key {_CHECKSUM!r} is reserved for the checksum.")
  plain = json.loads(_dump(dict(value)))
  write_json(path, {**plain, _CHECKSUM: _digest(plain)})


def read_record(path: str | os.PathLike) -> dict[str, Any]:
  """Reads a file that `write_record` wrote, and verifies its checksum.

  Args:
    path: the file.

  Returns:
    The JSON object, without its checksum.

  Raises:
    InputError: the file is missing, damaged, or has no checksum.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
      raise ValueError("not a JSON object")
  except OSError as error:
    raise base.InputError(f"{path} cannot be read ({error.strerror}).") from error
  except (ValueError, RecursionError) as error:
    raise base.InputError(f"{path} is damaged ({error}).") from error
  if _CHECKSUM not in value:
    raise base.InputError(
      f"{path} has no checksum: it is damaged, or an earlier version wrote it."
    )
  if value.pop(_CHECKSUM) != _digest(value):
    raise base.InputError(f"{path} is damaged (its checksum does not match).")
  return value


def _digest(value: dict[str, Any]) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | os.PathLike) -> str:
  """SHA-256 of the content of a file, in hex digits.

  Args:
    path: the file.

  Raises:
    InputError: the file cannot be read.
  """
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise base.InputError(f"{path} cannot be read ({error.strerror}).") from error


# These dictionaries have an entry for each folder that this process has prepared, by
# its resolved path: the content of `settings.json`, the names of extendable settings,
# and the file descriptor that holds the lock until the process ends.
_prepared: dict[pathlib.Path, dict[str, Any]] = {}
_extendable: dict[pathlib.Path, frozenset[str]] = {}
_locks: dict[pathlib.Path, int] = {}


def prepare(
  path: str | os.PathLike,
  settings: dict[str, Any],
  inputs: Mapping[str, str] | None = None,
  extendable: Iterable[str] = (),
) -> pathlib.Path:
  """Creates the folder of a run, or reopens it for the same run.

  The folder is locked until the process ends. Incomplete files of killed processes
  are removed from it. If there are several processes (see `processes`), all of them
  must call this function and see the same folder; only process 0 writes to it.

  Args:
    path: the folder; parents are created as needed.
    settings: everything that the results of the run depend on, as JSON. It is saved
      in `settings.json`, and compared with that file when the folder is reopened.
    inputs: paths of the files that the run reads, by the names of their flags. The
      results also depend on the contents of these files, so their checksums are saved.
      A later call may add a file, but must not replace one.
    extendable: names of settings that are not compared, because they do not change the
      results of a single run. They are not in `settings`, but an earlier version may
      have saved them.

  Returns:
    `path`, which exists and can be written to.

  Raises:
    InputError: the folder cannot be written to, contains a run without settings or
      with other settings or inputs, has a damaged `settings.json`, or is used by
      another process; an input cannot be read; or the processes have different
      settings or do not share the folder.
  """
  folder = pathlib.Path(path)
  digests = {name: file_digest(file) for name, file in (inputs or {}).items()}
  now = json.loads(_dump({**settings, "inputs": digests}))
  processes.check_same("the settings", now)
  names = frozenset(extendable)
  now = processes.on_first("prepare", lambda: _prepare(path, now, names))
  _check_shared(folder)
  _prepared[folder.resolve()], _extendable[folder.resolve()] = now, names
  return folder


def _prepare(
  path: str | os.PathLike, now: dict[str, Any], extendable: frozenset[str]
) -> dict[str, Any]:
  """Locks the folder, compares its settings with `now`, and writes and returns them."""
  folder = pathlib.Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # The root user passes every permission check, so test whether a write succeeds.
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(b"x")
    _lock_until_exit(folder)
  except OSError as error:
    raise base.InputError(
      f"--workdir={path}: cannot write ({error.strerror});"
      " choose a folder you may write to"
    ) from error
  _remove_leftovers(folder)
  if (folder / _SETTINGS).exists():
    before = _read_settings(folder)
    changes = setting_changes(before, now, extendable)
    if changes:
      raise base.InputError(
        f"--workdir={path} holds a run with other settings: {'; '.join(changes)}."
        " Choose another --workdir, or delete this one."
      )
    now["inputs"] = before["inputs"] | now["inputs"]
  else:
    before = None
    _refuse_traces(folder)
  if now != before:
    write_record(folder / _SETTINGS, now)
  return now


def settings_of(folder: str | os.PathLike) -> dict[str, Any]:
  """The settings with which a folder was prepared.

  Args:
    folder: a prepared folder, or one inside it.

  Returns:
    The settings passed to `prepare`, with the checksums of the inputs under
    "inputs"; {} if this process has prepared no such folder.
  """
  parent = _prepared_parent(folder)
  return {} if parent is None else _prepared[parent]


def saved_changes(folder: str | os.PathLike, old: dict[str, Any]) -> list[str]:
  """Describes the differences between saved settings and those of a prepared folder.

  Args:
    folder: a prepared folder, or one inside it.
    old: settings that `settings_of` returned when a run was saved in `folder`.

  Returns:
    The differences, as in `changes`; an empty list if `old` is empty or no such folder
    is prepared.
  """
  parent = _prepared_parent(folder)
  if parent is None or not old:
    return []
  return setting_changes(old, _prepared[parent], _extendable[parent])


def _prepared_parent(folder: str | os.PathLike) -> pathlib.Path | None:
  place = pathlib.Path(folder).resolve()
  return next((p for p in (place, *place.parents) if p in _prepared), None)


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  try:
    settings = read_record(folder / _SETTINGS)
    if not isinstance(settings.get("inputs"), dict):
      raise base.InputError(f"{folder / _SETTINGS} is damaged (it has no inputs).")
  except base.InputError as error:
    raise base.InputError(
      f"--workdir={folder}: {error} Choose another --workdir, or delete this one."
    ) from error
  return settings


def _refuse_traces(folder: pathlib.Path) -> None:
  """Raises InputError if a folder without settings contains files of a run."""
  for _, folders, files in os.walk(folder):
    trace = next((name for name in (*folders, *files) if name in _TRACES), None)
    if trace is not None:
      raise base.InputError(
        f"--workdir={folder} holds {trace} but {_SETTINGS} is missing, so its settings"
        " are unknown. Choose another --workdir, or delete this one."
      )


def _remove_leftovers(folder: pathlib.Path) -> None:
  """Removes incomplete files and scratch folders of killed processes."""
  for where, folders, files in os.walk(folder):
    for name in files:
      if re.fullmatch(r"\..+\.\d+\.tmp", name):
        pathlib.Path(where, name).unlink(missing_ok=True)
    for name in [n for n in folders if n.startswith(_SCRATCH)]:
      folders.remove(name)
      shutil.rmtree(pathlib.Path(where, name), ignore_errors=True)


@contextlib.contextmanager
def scratch(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A temporary folder inside a prepared one.

  It is removed at the end of the `with` or, if the process is killed, when the
  prepared folder is opened again.

  Args:
    folder: the prepared folder.
  """
  with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as path:
    yield pathlib.Path(path)


# -- locks -----------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
  """Locks a folder inside a `with` block, and removes incomplete files from it.

  The operating system frees the lock when the process ends for any reason. A folder
  inside one that this process has prepared is already locked. If there are several
  processes, process 0 holds the lock for all of them.

  Args:
    folder: an existing folder.

  Raises:
    InputError: another process uses the folder, it cannot be written to, or several
      processes do not share it.
  """
  place = pathlib.Path(folder).resolve()
  lock: int | None = None

  def acquire():
    nonlocal lock
    if any(parent in _locks for parent in (place, *place.parents)):
      return
    try:
      lock = _acquire(place)
      _remove_leftovers(place)
    except OSError as error:
      raise base.InputError(
        f"cannot write {folder}: {error.strerror}; choose a folder you may write to"
      ) from error

  try:
    processes.on_first("lock", acquire)
    _check_shared(place)
    yield
  finally:
    if lock is not None:
      (place / _LOCK).unlink(missing_ok=True)
      os.close(lock)


# Seconds after which a file that another host wrote is visible. Caches of network file
# systems may return old listings until then.
_VISIBLE_AFTER = 60


def _check_shared(folder: pathlib.Path) -> None:
  """Raises InputError unless all processes see the same folder."""
  if processes.count() == 1:
    return
  probe = None
  if processes.is_first():
    descriptor, path = tempfile.mkstemp(prefix=_SHARED, suffix=".0.tmp", dir=folder)
    os.close(descriptor)
    probe = pathlib.Path(path)
  try:
    name = processes.on_first("shared", lambda: probe and probe.name)
    deadline = time.monotonic() + _VISIBLE_AFTER
    while not (seen := (folder / name).exists()) and time.monotonic() < deadline:
      time.sleep(0.2)
    views = processes.exchange("seen", f"{int(seen)} {socket.gethostname()}")
  finally:
    if probe is not None:
      probe.unlink(missing_ok=True)
  for process, view in enumerate(views):
    is_seen, host = view.split(" ", 1)
    if is_seen == "0":
      raise base.InputError(
        f"--workdir={folder} is not shared: process {process} (host {host}) does not"
        " see what process 0 writes there. Choose a folder on a file system that all"
        " hosts share."
      )


def _lock_until_exit(folder: pathlib.Path) -> None:
  place = folder.resolve()
  if place in _locks:
    if _is_file(_locks[place], folder / _LOCK):
      return
    os.close(_locks.pop(place))  # The folder was deleted and created again.
  lock = _acquire(folder)
  if lock is not None:
    _locks[place] = lock


def _acquire(folder: pathlib.Path) -> int | None:
  """Locks a folder; returns None if the file system has no locks."""
  path = folder / _LOCK
  while True:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      with open(lock, encoding="utf-8", errors="replace") as file:
        holder = " ".join(file.read().split())
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise base.InputError(
          f"--workdir={folder}: another process ({holder or 'unknown'}) uses this"
          " folder. Wait until it ends or choose another --workdir."
        ) from error
      _log.warning("%s cannot be locked: %s", folder, error.strerror)
      return None
    # The previous process may have deleted the file after it was opened here.
    if _is_file(lock, path):
      break
    os.close(lock)
  os.ftruncate(lock, 0)
  os.pwrite(lock, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode(), 0)
  return lock


def _is_file(descriptor: int, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), path.stat())
  except OSError:
    return False


# -- settings and provenance -----------------------------------------------


def setting_changes(
  old: dict[str, Any], new: dict[str, Any], extendable: Collection[str] = ()
) -> list[str]:
  """Describes the differences between two sets of settings, as `changes` does.

  An input that only one of the two has is not a difference.

  Args:
    old: settings with "inputs", as `settings_of` returns them.
    new: current settings, likewise.
    extendable: names of settings that are not compared.
  """

  def flat(settings, other):
    common = settings.get("inputs", {}).keys() & other.get("inputs", {}).keys()
    skipped = {"inputs", *extendable}
    rest = {name: value for name, value in settings.items() if name not in skipped}
    contents = {f"the content of --{n}": settings["inputs"][n] for n in common}
    return rest | contents

  return changes(flat(old, new), flat(new, old))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Describes the differences between two JSON objects, such as "x was 1, now 2".

  Args:
    old: the earlier object.
    new: the current object.
  """

  def show(settings, name):
    return json.dumps(settings[name]) if name in settings else "absent"

  names = sorted(old.keys() | new.keys())
  pairs = [(name, show(old, name), show(new, name)) for name in names]
  return [f"{name} was {was}, now {now}" for name, was, now in pairs if was != now]


@functools.cache
def code_digest() -> str:
  """SHA-256 over the names and contents of the package's source files."""
  digest = hashlib.sha256()
  root = pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    digest.update(f"{path.relative_to(root).as_posix()} {file_digest(path)};".encode())
  return digest.hexdigest()


def made_by() -> dict[str, Any]:
  """The versions, code and hardware on which a run's numbers depend.

  Returns:
    Strings: the version of each package under its name, a checksum of this package's
    source under "code", and the device under "platform" and "device_kind".
  """
  device = jax.devices()[0]
  return {
    **{name: _version(name) for name in _PACKAGES},
    "code": code_digest(),
    "platform": device.platform,
    "device_kind": device.device_kind,
  }


def run_info() -> dict[str, Any]:
  """The code, versions and hardware that produced a result.

  Returns:
    Strings under "commit" (with "+dirty" if tracked files differ from the commit;
    "unknown" outside of a git checkout), "python", "jax", "jaxlib", "flax", "optax",
    "numpy", "l2rw_jax" ("unknown" if not installed), "platform" ("cpu", "gpu", ...) and
    "device_kind"; an int under "device_count".
  """
  device = jax.devices()[0]
  return {
    "commit": _commit(),
    "python": platform.python_version(),
    **{name: _version(name) for name in _PACKAGES},
    "platform": device.platform,
    "device_kind": device.device_kind,
    "device_count": jax.device_count(),
  }


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _commit() -> str:
  try:
    # An installed copy may be inside the checkout of another project, so check that
    # git tracks this file.
    _git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    commit = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return commit + ("+dirty" if dirty else "")


def _git(*arguments: str) -> str:
  command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
  return subprocess.run(
    command, check=True, capture_output=True, text=True
  ).stdout.strip()
