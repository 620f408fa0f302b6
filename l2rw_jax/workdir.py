"""Floor 4: the folder of a run, files that are whole or absent, and provenance."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from typing import Any

import jax

from l2rw_jax import base

_SETTINGS = "settings.json"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "l2rw_jax")


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes `text` to `path` so that a reader sees all of it or none of it.

  Survives a kill and a power cut at any moment: `path` then holds either its
  old content or the new one.

  Args:
    path: file to create or replace; its folder must exist.
    text: the content, stored as UTF-8 without newline translation.

  Raises:
    InputError: the file cannot be written; what was there is untouched.
  """
  write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes `content` to `path` as `write_text` does.

  Args:
    path: file to create or replace; its folder must exist.
    content: all of it.

  Raises:
    InputError: the file cannot be written; what was there is untouched.
  """
  try:
    _replace(pathlib.Path(path), content)
  except OSError as error:
    raise base.InputError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: pathlib.Path, content: bytes) -> None:
  # The process id keeps two runs that share a folder out of each other's file.
  partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(partial, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes `value` as JSON with sorted keys, as `write_text` does.

  Args:
    path: file to create or replace; its folder must exist.
    value: anything `json` takes; NaN and infinities are refused, for JSON has
      no such numbers.

  Raises:
    InputError: the file cannot be written; what was there is untouched.
    TypeError, ValueError: `value` is not JSON; nothing is written.
  """
  write_text(path, _dump(value))


def _dump(value: Any) -> str:
  return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def prepare(path: str | os.PathLike, settings: dict[str, Any]) -> pathlib.Path:
  """Creates the folder of a run, or reopens it for the very same run.

  Args:
    path: the folder; parents are made as needed.
    settings: everything that decides the outcome of the run, as JSON. Kept in
      `settings.json`, and compared with it when the run comes back.

  Returns:
    `path`, which exists and can be written to.

  Raises:
    InputError: the folder cannot be written, or holds a run with other
      settings, or its `settings.json` cannot be read.
  """
  folder = pathlib.Path(path)
  text = _dump(settings)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # Root passes every permission check, so only writing proves anything.
    with tempfile.TemporaryFile(dir=folder) as probe:
      probe.write(b"x")
    if not (folder / _SETTINGS).exists():
      _replace(folder / _SETTINGS, text.encode())
      return folder
  except OSError as error:
    raise base.InputError(
      f"--workdir={path}: cannot write ({error.strerror});"
      " choose a folder you may write to"
    ) from error
  changes = _changes(_read_settings(folder), json.loads(text))
  if changes:
    raise base.InputError(
      f"--workdir={path} holds a run with other settings: {'; '.join(changes)}."
      " Choose another --workdir or delete it."
    )
  return folder


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
  try:
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
      raise ValueError("not a JSON object")
  except (OSError, ValueError) as error:
    raise base.InputError(
      f"--workdir={folder}: {_SETTINGS} is damaged ({error})."
      " Choose another --workdir or delete it."
    ) from error
  return settings


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  def show(settings, name):
    return json.dumps(settings[name]) if name in settings else "absent"

  names = sorted(old.keys() | new.keys())
  pairs = [(name, show(old, name), show(new, name)) for name in names]
  return [f"{name} was {was}, now {now}" for name, was, now in pairs if was != now]


def run_info() -> dict[str, Any]:
  """What produced a result: code, versions and hardware.

  Returns:
    Strings under "commit" ("+dirty" appended when tracked files differ from it,
    "unknown" outside a git checkout), "python", "jax", "jaxlib", "flax",
    "optax", "numpy", "l2rw_jax" ("unknown" when not installed), "platform"
    ("cpu", "gpu", ...) and "device_kind"; an int under "device_count".
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
    # An installed copy may lie inside the checkout of something else: only a
    # file that git tracks tells that the checkout is ours.
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
