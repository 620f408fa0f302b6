"""A checksum of all data that a run uses."""

import hashlib

import numpy as np

from l2rw_jax.data import examples as examples_lib

# Number of rows read from a row source. It may decode every image again, so that
# reading all rows would take as long as an epoch.
_SAMPLED = 256


def fingerprint(splits: examples_lib.Splits) -> str:
  """SHA-256 over images, labels, groups and indices of all four parts.

  Args:
    splits: the data of one run. Of images in a row source, the checksum includes the
      shape, the dtype and 256 evenly spaced rows.

  Returns:
    64 hex digits.
  """
  digest = hashlib.sha256(f"{splits.num_classes};{splits.fingerprint};".encode())
  for name in ("train", "meta", "validation", "test"):
    for field, column in getattr(splits, name)._asdict().items():
      if column is None:
        continue
      digest.update(
        f"{name} {field} {np.dtype(column.dtype)} {tuple(column.shape)};".encode()
      )
      if not isinstance(column, np.ndarray):
        size = len(column)
        rows = np.unique(
          np.linspace(0, max(0, size - 1), min(size, _SAMPLED), dtype=int)
        )
        column = np.asarray(column[rows]) if size else np.zeros(0)
      digest.update(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
