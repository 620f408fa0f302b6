"""CSV files: how cells are escaped, and which labels count as missing."""

import csv
import io
import os
import pathlib
import re
from typing import Any

import numpy as np

from l2rw_jax import base

LABEL_COLUMNS = ("label", "labels", "class", "target", "y")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "<na>"})
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_cell(text: str) -> str:
  """Escapes text for a CSV file so that `read` and spreadsheets take it as text.

  Text that a spreadsheet would evaluate as a formula (it starts with =, +, -, @, a tab
  or a carriage return and is not a number) and text that `read` would treat as a
  missing label (such as None, the name of a folder) gets a leading apostrophe, which
  `read` removes. Such text that already starts with apostrophes gets one more.

  >>> csv_cell("=A1"), csv_cell("-1.5"), csv_cell("cat"), csv_cell("'=A1")
  ("'=A1", '-1.5', 'cat', "''=A1")
  >>> csv_cell("None")
  "'None"
  """
  bare = text.lstrip("'")
  is_formula = bare[:1] in tuple("=+-@\t\r") and not NUMBER.fullmatch(bare)
  is_missing = bare.strip().lower() in MISSING - {""}
  return f"'{text}" if is_formula or is_missing else text


def unquoted(text: str) -> str:
  """The inverse of `csv_cell`."""
  return text[1:] if text[:1] == "'" and csv_cell(text[1:]) == text else text


def reason_without_label(label: str) -> str:
  """Why an example without a label is skipped."""
  return f"its label {label!r} counts as missing" if label else "it has no label"


def read_rows(path: pathlib.Path) -> list[list[str]]:
  """The nonempty rows of a CSV file, with cells as they are stored; see `unquoted`.

  Raises an `InputError` if the file cannot be read, or if a quotation mark is not
  closed, because a single cell would then contain all rows that follow it.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except OSError as error:
    raise base.InputError(f"{path} cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise base.InputError(f"{path} is not encoded as UTF-8; convert it") from error
  try:
    # `csv.Sniffer` is not reliable if cells contain quotes or text.
    headers: dict[str, list[str]] = {
      d: next(filter(None, _parsed(text, d)), []) for d in ",;\t|"
    }
    delimiter = max(headers, key=lambda d: len(headers[d]))
    _check_quotes(path, text, delimiter)
    return [row for row in _parsed(text, delimiter) if row]
  except csv.Error as error:
    raise base.InputError(f"{path} is not a CSV file: {error}") from error


def _parsed(text: str, delimiter: str, is_strict: bool = False) -> Any:
  # Lines end only at line breaks, not at other line separators of Unicode.
  stream = io.StringIO(text, newline="")
  return csv.reader(stream, delimiter=delimiter, strict=is_strict)


def _check_quotes(path: pathlib.Path, text: str, delimiter: str) -> None:
  """Raises InputError if a cell with an opening quotation mark extends to other rows.

  Text after a closing quotation mark is allowed within a line.
  """
  reader = _parsed(text, delimiter, is_strict=True)
  while True:
    start = reader.line_num + 1
    try:
      if next(reader, None) is None:
        return
    except csv.Error as error:
      if reader.line_num > start:
        raise base.InputError(
          f"{path} has a quotation mark in line {start} that is closed in another row"
          " or not at all; close it, or write each quotation mark in a cell twice"
        ) from error


def corrected_labels(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
  """Reads the file that the page of label issues exports for tables and arrays.

  For images, pass the file to `read` as `labels`.

  Args:
    path: a CSV file with the columns index and label.

  Returns:
    The rows of the examples that were not removed, ascending int64 [n], and the names
    of their classes, n strings.

  Raises:
    InputError: the file cannot be read, lacks a column, or has a line whose row number
      is not a number or occurs twice, or whose label is empty.
  """
  path = pathlib.Path(path).expanduser()
  header, *lines = read_rows(path) or [[]]
  names = [cell.strip() for cell in header]
  if not {"index", "label"} <= set(names):
    raise base.InputError(
      f"{path} has the columns {', '.join(names)}; it must have index and label, as the"
      " page exports them for tables and arrays"
    )
  labels: dict[int, str] = {}
  for line in lines:
    cells = dict(zip(names, map(str.strip, line), strict=False))
    row, label = cells.get("index", ""), cells.get("label", "")
    if not re.fullmatch(r"[0-9]{1,18}", row) or int(row) in labels or not label:
      raise base.InputError(
        f"{path} has the line {','.join(line)[:100]!r}; each line must have a different"
        " row number and a label"
      )
    labels[int(row)] = unquoted(label)
  rows = sorted(labels)
  return np.array(rows, np.int64), np.array([labels[row] for row in rows], object)
