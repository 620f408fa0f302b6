"""Floor 4: arrays that are slow to make, kept in a file that is whole or absent."""

from collections.abc import Callable
import hashlib
import logging
import os
import pathlib
import re
import secrets

import numpy as np

_log = logging.getLogger(__name__)

_DIGEST = "__sha256__"

Arrays = dict[str, np.ndarray]


def cached_arrays(
  cache_dir: str | os.PathLike, key: str, build: Callable[[], Arrays]
) -> Arrays:
  """The arrays that `build()` makes, from the cache when they are there.

  One uncompressed `.npz` per key. It is written beside its final place and
  renamed, so that neither a kill nor a second writer leaves half a file, and
  its SHA-256 is verified at every reading. A damaged file is built again, and a
  folder that cannot be written costs only the time of the next building: both
  are one warning.

  Args:
    cache_dir: folder for the files; created where missing.
    key: everything the arrays depend on (data set, version, split, ...). What
      the key does not name, the cache cannot notice.
    build: makes the arrays; object arrays are refused.

  Returns:
    The arrays by name.
  """
  path = _path(pathlib.Path(cache_dir), key)
  arrays = _read(path, key)
  if arrays is None:
    arrays = build()
    _write(path, key, arrays)
  return arrays


def _path(folder: pathlib.Path, key: str) -> pathlib.Path:
  # The readable part may clash after its clean-up and cut; the digest does not.
  readable = re.sub(r"[^A-Za-z0-9.]+", "_", key)[:80]
  return folder / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def _digest(key: str, arrays: Arrays) -> np.ndarray:
  digest = hashlib.sha256(key.encode())
  for name in sorted(arrays):
    array = np.ascontiguousarray(arrays[name])
    digest.update(repr((name, array.dtype.str, array.shape)).encode())
    digest.update(array.data)
  return np.frombuffer(digest.digest(), np.uint8)


def _read(path: pathlib.Path, key: str) -> Arrays | None:
  try:
    with np.load(path, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    if not np.array_equal(arrays.pop(_DIGEST), _digest(key, arrays)):
      raise ValueError("its checksum does not match")
  except (FileNotFoundError, NotADirectoryError):
    return None
  # Damage shows as nearly any error, by where it hits: BadZipFile, EOFError,
  # KeyError, MemoryError, SyntaxError, ... All of them mean: make it again.
  except Exception as error:
    _log.warning(
      "cache file %s cannot be used (%s: %s); making it again",
      path,
      type(error).__name__,
      error,
    )
    return None
  return arrays


def _write(path: pathlib.Path, key: str, arrays: Arrays) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, {**arrays, _DIGEST: _digest(key, arrays)})
  except OSError as error:
    _log.warning(
      "cannot write the cache file %s (%s); the next run decodes again", path, error
    )


def _replace(path: pathlib.Path, arrays: Arrays) -> None:
  # Not `workdir.write_bytes`: arrays go to the disk without a copy of them in memory,
  # and machines that share a cache may have equal process ids.
  # Not `tempfile`: its files are private to the user.
  partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
  try:
    with open(partial, "xb") as file:
      np.savez(file, allow_pickle=False, **arrays)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
