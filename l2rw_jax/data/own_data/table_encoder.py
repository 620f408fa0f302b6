"""Conversion of the rows of a table to standardized features."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.data.own_data import csv_files

# Larger numbers count as missing: they are infinite in float32.
_LARGEST = float(np.finfo(np.float32).max)
_INFINITY = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
# A column with a larger share of values that are not numbers is not numeric.
_STRAY_SHARE = 0.05
_MAX_CATEGORIES = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """Converts the rows of a table to standardized numbers and one-hot categories.

  A missing number is replaced by the median of the column. If the column had missing
  numbers when the encoder was fitted, an additional column indicates them. Missing
  categories form one more category. If a column has more than 30 categories, all but
  the 29 most frequent ones are merged. The means, standard deviations, medians and
  categories are those of the rows that the encoder was fitted to.

  Attributes:
    numeric: the names of the numeric columns; None for an array [N, D].
    categorical: the names of the categorical columns.
    transforms: the fitted scikit-learn transformers for numeric and for categorical
      columns, each None if there are no such columns.
    has_numbers: whether each numeric column, or each column of the array, had a number;
      the others are left out.
  """

  numeric: tuple[str, ...] | None
  categorical: tuple[str, ...]
  transforms: tuple[Any, Any]
  has_numbers: np.ndarray

  @classmethod
  def fit(cls, name: str, values: Any, notes: list[str]) -> "Encoder":
    """Fits an encoder.

    Args:
      name: the name of the data, for messages.
      values: numbers [N, D], or a table of strings by column name.
      notes: a list to which notes are appended: about columns that were left out or
        have values that are not numbers.

    Returns:
      The fitted encoder.

    Raises:
      InputError: no column is usable, or scikit-learn is not installed.
    """
    impute, pipeline, preprocessing = _sklearn()
    if isinstance(values, dict):
      numeric, categorical = _kinds_of_columns(values, notes)
      numbers = _numbers(values, numeric)
      labels: tuple[str, ...] | None = tuple(numeric)
    else:
      numbers, categorical, labels = values.astype(np.float64), [], None
      numbers[~(np.abs(numbers) <= _LARGEST)] = np.nan
    empty = np.isnan(numbers).all(axis=0)
    if empty.any():
      notes.append(f"{int(empty.sum())} columns have no number and were left out.")
    if empty.all() and not categorical:
      reason = f". {notes[-1].rstrip('.')}" if notes else ""
      raise base.InputError(f"{name} has no column to learn from{reason}")
    scaler = encoder = None
    if not empty.all():
      scaler = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="median", add_indicator=True),
        preprocessing.StandardScaler(),
      ).fit(numbers[:, ~empty])
    if categorical:
      encoder = preprocessing.OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        max_categories=_MAX_CATEGORIES,
        sparse_output=False,
      ).fit(_categories(values, categorical))
    return cls(labels, tuple(categorical), (scaler, encoder), ~empty)

  def __call__(self, name: str, values: Any) -> np.ndarray:
    """Returns the features of rows, float32 [N, D'].

    Args:
      name: the name of the data, for messages.
      values: numbers or a table, as in `fit`.

    Raises:
      InputError: columns are missing, their number differs, or `values` is not of the
        kind that was passed to `fit`.
    """
    scaler, encoder = self.transforms
    if isinstance(values, dict) != (self.numeric is not None):
      is_table = self.numeric is not None
      form = "a table with the columns of" if is_table else "an array [N, D] like"
      raise base.InputError(f"{name} must be {form} the other data")
    if self.numeric is None:
      numbers = np.asarray(values, np.float64).copy()
      numbers[~(np.abs(numbers) <= _LARGEST)] = np.nan
    else:
      missing = [c for c in (*self.numeric, *self.categorical) if c not in values]
      if missing:
        raise base.InputError(
          f"{name} has no column {missing[0]!r}, which the other data have"
        )
      numbers = _numbers(values, self.numeric)
    blocks = []
    if scaler is not None:
      if numbers.shape[1] != len(self.has_numbers):
        raise base.InputError(
          f"{name} has {numbers.shape[1]} features, but the other data have"
          f" {len(self.has_numbers)}"
        )
      blocks.append(scaler.transform(numbers[:, self.has_numbers]))
    if encoder is not None:
      blocks.append(encoder.transform(_categories(values, self.categorical)))
    return np.concatenate(blocks, axis=1).astype(np.float32)

  def unknown_values(self, name: str, values: Any) -> list[str]:
    """Notes on values that the rows of `fit` did not have; none for an array.

    Args:
      name: the name of the data, for messages.
      values: numbers or a table, for which `__call__` raises no error.

    Raises:
      InputError: no value of a numeric column is a number.
    """
    if self.numeric is None:
      return []
    notes = []
    for column in self.numeric:
      cells, strays = _strays(values[column])
      if strays and len(strays) == len(cells):
        raise base.InputError(
          f"{name} has {strays[0]!r} in the column {column!r}, and no number, but the"
          " other data have numbers there; write both in the same way"
        )
      if strays:
        notes.append(_note_on_strays(column, strays))
    _, encoder = self.transforms
    all_known = map(set, encoder.categories_) if self.categorical else []
    for column, known in zip(self.categorical, all_known, strict=True):
      texts = _categories(values, [column])[:, 0]
      new = [text for text in texts if text not in known]
      if new:
        notes.append(
          f"{len(new)} of {len(texts)} values of the column {column!r}, such as"
          f" {new[0]!r}, do not occur in the other data."
        )
    return notes


def _sklearn() -> tuple[Any, Any, Any]:
  try:
    from sklearn import impute
    from sklearn import pipeline
    from sklearn import preprocessing
  except ImportError:
    raise base.InputError(
      "rows of numbers and tables need scikit-learn: pip install scikit-learn"
    ) from None
  return impute, pipeline, preprocessing


def _strays(column: Iterable[str]) -> tuple[list[str], list[str]]:
  """The cells of a column that are not missing, and those that are not numbers."""
  cells = [c for c in column if c.lower() not in csv_files.MISSING]
  return cells, [
    c for c in cells if not csv_files.NUMBER.fullmatch(c) and not _INFINITY.fullmatch(c)
  ]


def _note_on_strays(column: str, strays: Sequence[str]) -> str:
  return (
    f"{len(strays)} values of the column {column!r}, such as {strays[0]!r}, are not"
    " numbers and count as missing."
  )


def _kinds_of_columns(
  table: Mapping[str, np.ndarray], notes: list[str]
) -> tuple[list[str], list[str]]:
  """The names of numeric and categorical columns; appends notes as in `Encoder.fit`."""
  numeric, categorical = [], []
  for name, column in table.items():
    cells, strays = _strays(column)
    different = set(cells)
    if not cells:
      notes.append(f"The column {name!r} is empty and was left out.")
    elif len(different) == 1 and len(cells) == len(column):
      notes.append(f"The column {name!r} has a single value and was left out.")
    elif len(strays) <= _STRAY_SHARE * len(cells):
      numeric.append(name)
      if strays:
        notes.append(_note_on_strays(name, strays))
    elif len(different) > max(_MAX_CATEGORIES, len(cells) // 2):
      notes.append(
        f"The column {name!r} has {len(different)} different texts in {len(cells)} rows"
        " and was left out. To learn from it, replace each text by numbers, such as an"
        " embedding."
      )
    else:
      categorical.append(name)
      if len(strays) <= len(cells) // 2:
        notes.append(
          f"{len(strays)} of {len(cells)} values of the column {name!r}, such as"
          f" {strays[0]!r}, are not numbers; it was read as {len(different)}"
          " categories."
        )
      elif sum(c[:1].isdigit() for c in strays) > len(cells) // 2:
        notes.append(
          f"The column {name!r} has texts such as {strays[0]!r}, which are not numbers"
          f" with a decimal point, and was read as {len(different)} categories."
        )
  return numeric, categorical


def _numbers(table: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
  def number(cell):
    value = float(cell) if csv_files.NUMBER.fullmatch(cell) else np.nan
    return value if abs(value) <= _LARGEST else np.nan

  size = max(map(len, table.values()), default=0)
  columns = [[number(cell) for cell in table[name]] for name in names]
  return np.array(columns, np.float64).reshape(len(names), size).T


def _categories(table: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
  def category(cell):
    return "" if cell.lower() in csv_files.MISSING else cell

  return np.array([[category(c) for c in table[n]] for n in names], object).T
