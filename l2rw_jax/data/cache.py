"""A cache on disk for arrays that are slow to compute."""

from collections.abc import Callable
import hashlib
import logging
import os
import pathlib
import re
import secrets

import numpy as np

from l2rw_jax.io import workdir

_log = logging.getLogger(__name__)

_DIGEST = "__sha256__"

Arrays = dict[str, np.ndarray]


def cached_arrays(
  cache_dir: str | os.PathLike, key: str, build: Callable[[], Arrays]
) -> Arrays:
  """Reads arrays from the cache, or builds them and adds them to the cache.

  The cache has one uncompressed `.npz` file for each key. The file is written under a
  temporary name and renamed, so that it is complete even if a process is killed or two
  processes write it at once, and its SHA-256 is verified whenever it is read. If a file
  is damaged, its arrays are built again. If the folder cannot be written, the arrays
  are built again next time. In both cases a warning is logged.

  Args:
    cache_dir: folder of the files; created if missing.
    key: everything that the arrays depend on (data set, version, split, ...). The
      cache cannot detect changes of anything else.
    build: a function that returns the arrays; object arrays are refused.

  Returns:
    The arrays by name.

  Raises:
    ValueError: `build` returned an array of Python objects or of a type that is not
      NumPy's, such as bfloat16.
  """
  path = _path(pathlib.Path(cache_dir), key)
  arrays = _read(path, key)
  if arrays is None:
    arrays = build()
    _write(path, key, arrays)
  return arrays


def folder(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
  """The folder of the cache: `cache_dir`, or the default folder of the user."""
  if cache_dir is not None:
    return pathlib.Path(cache_dir).expanduser()
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(caches).expanduser() / "l2rw_jax"


def _path(folder: pathlib.Path, key: str) -> pathlib.Path:
  # The readable part is shortened and may not be unique; the digest is.
  readable = re.sub(r"[^A-Za-z0-9.]+", "_", key)[:80]
  return folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _digest(key: str, arrays: Arrays) -> np.ndarray:
  digest = hashlib.sha256(key.encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(repr((name, array.dtype.str, array.shape)).encode())
    # Some types, such as dates, have no buffer.
    digest.update(array.reshape(-1).view(np.uint8).data)
  return np.frombuffer(digest.digest(), np.uint8)


def _read(path: pathlib.Path, key: str) -> Arrays | None:
  try:
    with np.load(path, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    if not np.array_equal(arrays.pop(_DIGEST), _digest(key, arrays)):
      raise ValueError("its checksum does not match")
  except (FileNotFoundError, NotADirectoryError):
    return None
  # A damaged file can raise nearly any error: BadZipFile, EOFError, KeyError,
  # MemoryError, SyntaxError, ... In all cases the arrays are built again.
  except Exception as error:
    _log.warning(
      "cache file %s cannot be used (%s: %s); it is built again",
      path,
      type(error).__name__,
      error,
    )
    return None
  return arrays


def _write(path: pathlib.Path, key: str, arrays: Arrays) -> None:
  for name, array in arrays.items():
    dtype = np.asarray(array).dtype
    if dtype.hasobject:
      raise ValueError(f"cannot cache {name}: NumPy would pickle its Python objects.")
    if dtype.isbuiltin == 2:  # NumPy would store its bytes without the type.
      raise ValueError(f"cannot cache {name}: {dtype} is not a type of NumPy.")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, {**arrays, _DIGEST: _digest(key, arrays)})
  except OSError as error:
    _log.warning(
      "cannot write the cache file %s (%s); the next run builds the arrays again",
      path,
      error,
    )


def _replace(path: pathlib.Path, arrays: Arrays) -> None:
  # `workdir.write_bytes` is not used here, because it would copy the arrays in memory.
  # The temporary name has a random part, because machines that share a cache may have
  # equal process ids. `tempfile` is not used, because only this user could read its
  # files.
  partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
  try:
    with open(partial, "xb") as file:
      workdir.write_arrays(file, arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
