"""The results of a benchmark, as a CSV file and as lines of text."""

from collections.abc import Mapping, Sequence
import csv
import os
import pathlib
from typing import Any

from l2rw_jax.io import workdir as workdir_lib


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


def report(
  rows: Sequence[Mapping[str, Any]],
  facts: Mapping[str, Any],
  workdir: str | os.PathLike,
) -> None:
  """Prints rows and writes them to `workdir`/jax-VERSION.csv.

  Args:
    rows: the rows.
    facts: columns that all rows share. The code, versions and hardware of
      `workdir.run_info` and the number of cores are added to them.
    workdir: the folder.
  """
  info = {**workdir_lib.run_info(), "cores": os.cpu_count()}
  path = pathlib.Path(workdir) / f"jax-{info['jax']}.csv"
  write(path, [{**row, **facts, **info} for row in rows])
  show(rows, path)
