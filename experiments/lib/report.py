"""Rows of results: statistics of repeated runs, a Markdown table, JSON and CSV."""

from collections.abc import Iterable, Sequence
import csv
import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from l2rw_jax.io import workdir

Row = dict[str, Any]


class Interval(NamedTuple):
  """A mean and its 95% confidence interval.

  Attributes:
    mean: the mean.
    half_width: half the width of the interval; NaN for a single number.
    repeats: how many numbers were averaged.
  """

  mean: float
  half_width: float
  repeats: int

  def __format__(self, spec: str) -> str:
    """Formats a table cell; `spec` applies to both numbers."""
    if self.repeats < 2:
      return format(self.mean, spec)
    return f"{self.mean:{spec}} ± {self.half_width:{spec}}"

  def __str__(self) -> str:
    """Formats with two decimals."""
    return format(self, ".2f")


def interval(values: Sequence[float]) -> Interval:
  """Mean and 95% Student-t interval of repeated runs."""
  numbers = np.asarray(values, np.float64)
  count, mean = len(numbers), float(np.mean(numbers))
  if count < 2:
    return Interval(mean, float("nan"), count)
  standard_error = np.std(numbers, ddof=1) / np.sqrt(count)
  quantile = special.stdtrit(count - 1, 0.975)
  return Interval(mean, float(quantile * standard_error), count)


def auroc(weights: dict[str, np.ndarray]) -> float | None:
  """How well a low mean weight detects wrong labels.

  The mean weight is a poor indicator: a few steps with a large weight, whether the
  label is right or wrong, dominate it. See `rejection_auroc`.

  Args:
    weights: columns of a run's `weights.csv`.

  Returns:
    The area under the ROC curve: 0.5 is chance; None if it is undefined, or if
    the mean weights differ by less than 1e-9.
  """
  return ranking_auroc(-weights["mean_weight"], _is_wrong(weights))


def rejection_auroc(weights: dict[str, np.ndarray]) -> float | None:
  """How well a high share of steps with weight zero detects wrong labels.

  Args:
    weights: columns of a run's `weights.csv`.

  Returns:
    The area under the ROC curve: 0.5 is chance; None if it is undefined, as for methods
    that reject no example.
  """
  return ranking_auroc(rejected_share(weights), _is_wrong(weights))


def rejected_share(weights: dict[str, np.ndarray]) -> np.ndarray:
  """Share of the steps of each example in which its weight was zero, [N].

  It is NaN if the example was never in a batch.
  """
  seen = np.asarray(weights["seen"], np.float64)
  return weights["rejected"] / np.where(seen > 0, seen, np.nan)


def _is_wrong(weights: dict[str, np.ndarray]) -> np.ndarray:
  return weights["label"] != weights["true_label"]


def ranking_auroc(suspicion: np.ndarray, is_wrong: np.ndarray) -> float | None:
  """How well a number for each example detects wrong labels.

  Args:
    suspicion: numbers that are higher for suspicious examples, [N]; examples whose
      number is not finite are ignored.
    is_wrong: whether each label is wrong, bool [N].

  Returns:
    The area under the ROC curve: 0.5 is chance; None if it is undefined, or if
    the numbers differ by less than 1e-9.
  """
  known = np.isfinite(suspicion)
  is_wrong, suspicion = is_wrong[known], suspicion[known]
  if is_wrong.all() or not is_wrong.any() or np.ptp(suspicion) < 1e-9:
    return None
  # Imported here because scikit-learn imports scipy.stats, which took half of the time
  # of --help.
  from sklearn import metrics

  return float(metrics.roc_auc_score(is_wrong, suspicion))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table with aligned columns."""
  cells = [[str(c) for c in row] for row in [header, *rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = [
    "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
    for row in cells
  ]
  rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
  return "\n".join([lines[0], rule, *lines[1:]])


def save(folder: pathlib.Path, rows: list[dict[str, Any]], flags: dict) -> None:
  """Writes `results.json` and `results.csv`, with a row per run and the flags.

  Rows may lack columns of other rows; these cells are empty in `results.csv`.
  `results.json` contains its own checksum and that of `results.csv`.
  """
  everything = {"flags": flags, "rows": rows}
  text = io.StringIO()
  given = " ".join(f"--{k}={_flag_text(v)}" for k, v in flags.items() if v is not None)
  columns = dict.fromkeys(column for row in rows for column in row)
  writer = csv.DictWriter(text, [*columns, "flags"], lineterminator="\n")
  writer.writeheader()
  writer.writerows({**row, "flags": given} for row in rows)
  table_path = folder / "results.csv"
  workdir.write_text(table_path, text.getvalue())
  files = {table_path.name: workdir.file_digest(table_path)}
  workdir.write_record(folder / "results.json", {**everything, "files": files})


def grouped(rows: Iterable[Row], *columns: str) -> dict[Any, list[Row]]:
  """The rows of each value of a column, or of each tuple of values of several columns.

  The values are in the order of their first rows.
  """
  groups: dict[Any, list[Row]] = {}
  for row in rows:
    key = tuple(row[column] for column in columns)
    groups.setdefault(key if len(columns) > 1 else key[0], []).append(row)
  return groups


def _flag_text(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


RUN_FIELDS = (
  *("seed", "num_steps", "best_accuracy", "best_step", "data", "params_sha256"),
  *("commit", "python", "jax", "jaxlib", "flax", "optax", "numpy", "l2rw_jax"),
  *("platform", "device_kind", "device_count"),
)


def run_fields(metrics: dict[str, Any]) -> dict[str, Any]:
  """The columns that describe the run of a row: its seed, versions, device, etc."""
  return {name: metrics[name] for name in RUN_FIELDS}
