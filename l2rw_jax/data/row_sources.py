"""Images that are decoded when they are read, for sets that do not fit in memory.

The classes of this module are row sources (see `examples.Examples.image`), which may be
read from several threads at a time and can be pickled for the workers of
`training.read_workers`. Their fingerprint covers the content of all files.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import cache
from l2rw_jax.data import image_files

# The control groups of this process, and the folder of their limits.
_GROUPS, _LIMITS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")
# Share of the memory for the pixels of a set and their copy in splits.
_SHARE = 1 / 2
_READ_BYTES = 2**20


def fit_in_memory(size: int, shape: Sequence[int]) -> bool:
  """Whether uint8 images and a copy of them take at most half of the memory.

  Args:
    size: number of images.
    shape: the shape of an image.
  """
  num_bytes = size * int(np.prod(shape, dtype=np.int64)) * 2
  return num_bytes <= _SHARE * memory()


def memory() -> int:
  """The number of bytes of memory that this process may use.

  It is the size of the machine's memory, or the smallest limit of the control groups of
  this process if that is less. Containers and cluster jobs have such groups, and a
  process that exceeds a limit is killed.
  """
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return min([physical, *_limits()])


def _limits() -> Iterator[int]:
  """The memory limits of the control groups of this process, in bytes."""
  try:
    lines = _GROUPS.read_text().splitlines()
  except OSError:  # Only Linux has control groups.
    return
  for line in lines:
    _, controllers, place = line.split(":", 2)
    root, name = _LIMITS, "memory.max"
    if controllers:  # Version 1 has a tree of groups for each controller.
      root, name = _LIMITS / "memory", "memory.limit_in_bytes"
      if "memory" not in controllers.split(","):
        continue
    # The limits of the enclosing groups apply, too.
    group = root / place.lstrip("/")
    for folder in (group, *group.parents):
      # A file has "max" if there is no limit.
      with contextlib.suppress(OSError, ValueError):
        yield int((folder / name).read_text())
      if folder == root:
        break


def hash_of_files(
  paths: Sequence[str | os.PathLike], cache_dir: str | os.PathLike | None = None
) -> str:
  """SHA-256 over the contents of files, in order.

  The hash is cached in `cache_dir` for these paths, sizes and modification times, so
  that files are read again only if one of them has changed. A change that preserves
  both the size and the modification time of a file is not detected.

  Args:
    paths: the files.
    cache_dir: folder of the cache, see `sources.load`.

  Returns:
    64 hex digits.
  """
  states = hashlib.sha256()
  for path in paths:
    status = os.stat(path)
    state = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    states.update(repr(state).encode())

  def build():
    digest = hashlib.sha256()
    for path in paths:
      with open(path, "rb") as file:
        digest.update(f"{os.fstat(file.fileno()).st_size};".encode())
        while block := file.read(_READ_BYTES):
          digest.update(block)
    return {"digest": np.frombuffer(digest.digest(), np.uint8)}

  key = f"hash of {len(paths)} files/{states.hexdigest()}"
  arrays = cache.cached_arrays(cache.folder(cache_dir), key, build)
  return arrays["digest"].tobytes().hex()


class _Images:
  """Base class of the row sources of this module.

  Attributes:
    shape: [N, H, W, channels].
    dtype: uint8.
    fingerprint: a string that changes whenever a file changes. It is computed when it
      is first needed.
  """

  dtype = np.dtype(np.uint8)

  def __init__(self, shape: tuple[int, ...], make_fingerprint: Callable[[], str]):
    self.shape, self._make_fingerprint = shape, make_fingerprint

  @functools.cached_property
  def fingerprint(self) -> str:
    return self._make_fingerprint()

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Any) -> np.ndarray:
    if isinstance(rows, slice):
      rows = range(*rows.indices(len(self)))
    chosen = np.asarray(rows)
    if chosen.dtype == np.bool_ and chosen.shape == (len(self),):
      chosen = np.flatnonzero(chosen)
    if not chosen.size:
      chosen = chosen.astype(np.int64)
    if not np.issubdtype(chosen.dtype, np.integer):
      raise IndexError(f"rows must be integers, or {len(self)} bools")
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
      raise IndexError(f"rows must lie between 0 and {len(self) - 1}")
    images = np.empty((*chosen.shape, *self.shape[1:]), np.uint8)
    self._fill(images.reshape(-1, *self.shape[1:]), np.ravel(chosen))
    return images

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Reads all images, for functions that change the images of a whole set."""
    del copy
    return self[:].astype(dtype or self.dtype, copy=False)

  def _fill(self, images: np.ndarray, rows: np.ndarray) -> None:
    raise NotImplementedError


class StoredImages(_Images):
  """Images of a set that tensorflow-datasets has prepared."""

  def __init__(
    self,
    records: Any,
    shape: tuple[int, ...],
    make_fingerprint: Callable[[], str],
    place: pathlib.Path,
  ):
    """Stores the arguments without reading files.

    Args:
      records: a data source of tensorflow-datasets with a field "image".
      shape: shape of an image.
      make_fingerprint: a function that computes the fingerprint.
      place: folder of the set, for messages.
    """
    super().__init__((len(records), *shape), make_fingerprint)
    self._records, self._place = records, place

  def _fill(self, images, rows):
    try:
      for i, record in enumerate(self._records.__getitems__(rows.tolist())):
        images[i] = record["image"]
    # A damaged file can raise any error.
    except Exception as error:
      reason = f"{type(error).__name__}: {error}".partition("\n")[0]
      raise base.InputError(
        f"an image in {self._place} cannot be read; copy or prepare the set again"
        f" ({reason})"
      ) from error


class ImageFiles(_Images):
  """Image files, resized to one shape."""

  def __init__(
    self, paths: Sequence[pathlib.Path], size: tuple[int, int], channels: int
  ):
    """Stores the arguments without reading files.

    Args:
      paths: the files.
      size: height and width of the images.
      channels: 1 or 3.
    """
    self._paths = list(paths)
    fingerprint = functools.partial(hash_of_files, self._paths)
    super().__init__((len(paths), *size, channels), fingerprint)

  def _fill(self, images, rows):
    _, height, width, channels = self.shape
    for i, row in enumerate(rows):
      try:
        images[i] = image_files.read(self._paths[row], (height, width), channels)
      except ValueError as error:
        raise base.InputError(
          f"{self._paths[row]} cannot be read: {error}; repair or remove it"
        ) from error
