"""The results of a benchmark, as a CSV file and as lines of text."""

from collections.abc import Mapping, Sequence
import csv
import pathlib
from typing import Any


def write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes rows to a CSV file, whose folder is created if it does not exist.

  Args:
    path: the file, which is replaced.
    rows: the rows. Columns that a row lacks are empty.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  columns = dict.fromkeys(name for row in rows for name in row)
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def show(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Prints a line for each row, and the name of the file that was written."""
  for row in rows:
    print(" ".join(f"{name}={value}" for name, value in row.items()))
  print(f"\nwritten: {path}")
