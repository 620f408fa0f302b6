"""Tables in CSV files: the label column, and the rows that have a label."""

from collections.abc import Sequence
import pathlib
import re

import numpy as np

from l2rw_jax import base
from l2rw_jax.data.own_data import containers
from l2rw_jax.data.own_data import csv_files

# In a shorter table, the values of a feature may number the rows or repeat the labels
# by chance.
_LEAST_ROWS = 20


def parse_name(place: str, label_column: str | None) -> tuple[pathlib.Path, str | None]:
  """Parses FILE or FILE#NAME into the path and the name of the label column.

  If `label_column` is given, or `place` is the path of an existing file, all of `place`
  is the path.
  """
  path = pathlib.Path(place).expanduser()
  if label_column is None and not path.exists() and "#" in place:
    file, _, label_column = place.rpartition("#")
    path = pathlib.Path(file).expanduser()
  return path, label_column


def read_table(path: pathlib.Path, label_column: str | None) -> containers.Raw:
  """Reads the rows of a CSV file that have a label and as many fields as the header.

  Args:
    path: the file.
    label_column: the name of the label column, or None, as in `reading.read`.

  Returns:
    The examples.

  Raises:
    InputError: the file cannot be read, has fewer than two columns, or lacks the label
      column.
  """
  header, *rows = csv_files.read_rows(path) or [[]]
  names = _unique([cell.strip() for cell in header])
  if len(names) < 2:
    raise base.InputError(
      f"{path} must have a header and two or more columns, one of them the labels"
    )
  if label_column is None:
    lower = [name.lower() for name in names]
    at = next(
      (lower.index(c) for c in csv_files.LABEL_COLUMNS if c in lower), len(names) - 1
    )
  elif label_column in names:
    at = names.index(label_column)
  else:
    raise base.InputError(
      f"{path} has no column {label_column!r}; it has {', '.join(names)}"
    )
  notes = [f"The labels are the column {names[at]!r}."]
  numbers = [c for c in map(str.strip, header) if csv_files.NUMBER.fullmatch(c)]
  fractions = [c for c in numbers if not c.isdecimal()]
  if fractions or len(set(numbers)) < len(numbers):
    notes.append(
      f"The first row, with {(fractions or numbers)[0]!r}, was read as the names of the"
      " columns. If it is an example, add a row of names."
    )
  kept, skipped = [], []
  for number, row in enumerate(rows):
    if len(row) != len(names):
      reason = f"it has {len(row)} fields, but the header has {len(names)}"
      skipped.append((f"row {number}", reason))
    elif row[at].strip().lower() in csv_files.MISSING:
      skipped.append((f"row {number}", csv_files.reason_without_label(row[at].strip())))
    else:
      kept.append(number)
  cells = np.array(
    [[csv_files.unquoted(c.strip()) for c in rows[n]] for n in kept], object
  )
  cells = cells.reshape(len(kept), len(names))
  columns = {name: cells[:, i] for i, name in enumerate(names) if i != at}
  counters = tuple(name for name, x in columns.items() if _counts_rows(x, kept))
  return containers.Raw(
    columns,
    cells[:, at],
    np.array([f"row {number}" for number in kept], object),
    np.array(kept, np.int64),
    skipped,
    notes,
    left_out=counters,
  )


def is_copy(column: np.ndarray, labels: np.ndarray) -> bool:
  """Whether each value of a column belongs to one label, and each label to one value.

  False if there are fewer than 20 rows or fewer than two labels.
  """
  number = len(set(labels))
  if len(labels) < _LEAST_ROWS or number < 2 or len(set(column)) != number:
    return False
  return len(set(zip(column, labels, strict=True))) == number


def _counts_rows(column: np.ndarray, rows: Sequence[int]) -> bool:
  """Whether a column numbers the rows, as the index that pandas writes does.

  If the rows are sorted by label, a network learns the labels from such a column,
  whether they are right or wrong.
  """
  if len(rows) < _LEAST_ROWS:
    return False
  offsets = (
    int(cell) - row if re.fullmatch(r"\d{1,18}", cell) else None
    for cell, row in zip(column, rows, strict=True)
  )
  first = next(offsets)  # For most columns, only the first two cells are read.
  return first is not None and all(offset == first for offset in offsets)


def _unique(names: Sequence[str]) -> list[str]:
  """Makes column names unique and nonempty."""
  unique: dict[str, None] = {}
  numbers: dict[str, int] = {}
  for i, name in enumerate(names):
    name = name or f"column {i}"
    candidate = name
    while candidate in unique:
      numbers[name] = numbers.get(name, 1) + 1
      candidate = f"{name}.{numbers[name]}"
    unique[candidate] = None
  return list(unique)
