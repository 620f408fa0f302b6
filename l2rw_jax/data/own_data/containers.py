"""A user's data set as it is stored and as `read` returns it, and its format."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import pathlib
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax.data.own_data import pixel_scale
from l2rw_jax.data.own_data import table_encoder


class Form(NamedTuple):
  """The format that other examples must have to be used with a data set.

  Attributes:
    class_names: the name of each class, in the order of the labels.
    shape: the shape of the features of one example.
    encoder: converts the columns of a table, or of an array [N, D], to features; None
      for other data.
    pixels: the scale of the features; None for tables, for arrays [N, D], and if any
      scale fits.
  """

  class_names: tuple[str, ...]
  shape: tuple[int, ...]
  encoder: table_encoder.Encoder | None = None
  pixels: pixel_scale.Pixels | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class OwnData:
  """A user's data set of N examples.

  Attributes:
    features: uint8 [N, H, W, 1 or 3] for image files, a row source if they were not
      read into memory; standardized float32 for tables and for arrays [N, D] in
      archives; uint8 or float32 [N, ...] for other arrays.
    labels: the labels, int32 [N].
    form: the class names, and the format that other examples must have.
    names: the name of each example: its path relative to the folder, or "row 12",
      counted from 0.
    rows: the position of each example in the source, where skipped examples count too,
      int64 [N]; for images, the position among the files that have a label.
    columns: the raw columns of a table by name, N strings each.
    skipped: the name of each example that cannot be used, and the reason.
    notes: sentences that describe changes to the data.
    duplicate_of: the index, from 0 to N - 1, of the first example with exactly the same
      features, or -1 if there is no such example before this one; int64 [N]. Always -1
      if the features were not read into memory.
    root: the folder of the images; None for archives and tables.
  """

  features: Any
  labels: np.ndarray
  form: Form
  names: tuple[str, ...]
  rows: np.ndarray
  columns: Mapping[str, Sequence[str]]
  skipped: tuple[tuple[str, str], ...]
  notes: tuple[str, ...]
  duplicate_of: np.ndarray
  root: pathlib.Path | None = None


class Raw(NamedTuple):
  """N examples before they are converted to one format."""

  values: Any  # Paths of images, an array, or a table (column name -> N strings).
  labels: np.ndarray  # Strings.
  names: np.ndarray
  rows: np.ndarray
  skipped: list[tuple[str, str]]
  notes: list[str]
  root: pathlib.Path | None = None
  left_out: tuple[str, ...] = ()  # Columns of a table that are not features.

  def take(self, chosen: np.ndarray) -> "Raw":
    """Returns the examples that `chosen`, row indices or a mask, selects."""
    if isinstance(self.values, dict):
      values: Any = {name: column[chosen] for name, column in self.values.items()}
    else:
      values = self.values[chosen]
    return self._replace(
      values=values,
      labels=self.labels[chosen],
      names=self.names[chosen],
      rows=self.rows[chosen],
    )


def report(data: OwnData) -> list[str]:
  """Describes the changes to the data, the skipped examples and the duplicates.

  Args:
    data: the data as `read` returns it.

  Returns:
    Sentences. The first three skipped examples are listed by name.
  """
  lines = list(data.notes)
  if data.skipped:
    shown = "; ".join(f"{name}: {reason}" for name, reason in data.skipped[:3])
    more = "; ..." if len(data.skipped) > 3 else ""
    lines.append(f"{len(data.skipped)} skipped ({shown}{more}).")
  is_copy = data.duplicate_of >= 0
  if is_copy.any():
    originals = data.labels[data.duplicate_of[is_copy]]
    conflicts = int((originals != data.labels[is_copy]).sum())
    lines.append(
      f"exact duplicates of other examples: {int(is_copy.sum())} ({conflicts} with"
      " another label)."
    )
  return lines


def duplicates(features: np.ndarray) -> np.ndarray:
  """Finds exact duplicates.

  Args:
    features: the features of N examples, [N, ...].

  Returns:
    For each example, the index of the first example that is exactly equal, or -1 if
    there is no such example before this one; int64 [N]. 0.0 and -0.0 are equal.

  >>> duplicates(np.array([[1], [2], [1], [1]])).tolist()
  [-1, -1, 0, 0]
  """
  features = np.asarray(features)
  first: dict[bytes, int] = {}
  duplicate_of = np.full(len(features), -1, np.int64)
  for row, digest in enumerate(_digests(features)):
    if first.setdefault(digest, row) != row:
      duplicate_of[row] = first[digest]
  return duplicate_of


def num_copies(features: np.ndarray, others: np.ndarray) -> int:
  """The number of examples that have an exact copy among some other examples.

  Args:
    features: the features of the examples, [N, ...].
    others: the features of the other examples, [M, ...], of the same type.

  >>> num_copies(np.array([[1], [2], [1]]), np.array([[1], [3]]))
  2
  """
  known = set(_digests(others))
  return sum(digest in known for digest in _digests(features))


def _digests(features: np.ndarray) -> Iterator[bytes]:
  zero = np.zeros((), features.dtype)
  for example in features:
    content = np.add(example, zero).tobytes()  # The sum of -0.0 and 0.0 is 0.0.
    yield hashlib.blake2b(content, digest_size=16).digest()


def skipped_suffix(raw: Raw) -> str:
  """The end of an error message: the number of skipped examples, and a reason."""
  if not raw.skipped:
    return ""
  name, reason = raw.skipped[0]
  return f"; {len(raw.skipped)} skipped, the first is {name}: {reason}"
