"""A checksum of all data that a run uses."""

import hashlib
from typing import Any

import numpy as np

from l2rw_jax.data import examples as examples_lib


def fingerprint(splits: examples_lib.Splits) -> str:
  """SHA-256 over the content of all four parts and `splits.fingerprint`.

  uint8 pixels x are hashed as x / 255 in float32, the default input of a network.

  Args:
    splits: the data of one run. A row source with an attribute `fingerprint` is
      represented by this string; every row of other row sources is read once, in
      blocks.

  Returns:
    64 hex digits.
  """
  digest = hashlib.sha256(f"{splits.num_classes};{splits.fingerprint};".encode())
  for name in ("train", "meta", "validation", "test"):
    for field, column in getattr(splits, name)._asdict().items():
      if column is None:
        continue
      dtype = np.dtype(np.float32 if column.dtype == np.uint8 else column.dtype)
      digest.update(f"{name} {field} {dtype} {tuple(column.shape)};".encode())
      update(digest, column)
  return digest.hexdigest()


def update(digest: Any, column: Any) -> None:
  """Adds the content of an array or a row source to a digest of `hashlib`.

  Args:
    digest: the digest.
    column: [N, ...], as in `Examples.image`.
  """
  if not isinstance(column, np.ndarray) and hasattr(column, "fingerprint"):
    digest.update(f"fingerprint {column.fingerprint};".encode())
    return
  for rows in examples_lib.blocks(column):
    if rows.dtype == np.uint8:
      rows = np.divide(rows, np.float32(255), dtype=np.float32)
    digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
