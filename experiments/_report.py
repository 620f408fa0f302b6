"""Rows of results to a table on the terminal, JSON and CSV."""

from collections.abc import Sequence
import csv
import io
import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from l2rw_jax import workdir


class Interval(NamedTuple):
  """A mean with its 95% confidence half-width (NaN for a single number)."""

  mean: float
  half_width: float
  repeats: int

  def __str__(self) -> str:
    """For a table cell."""
    if self.repeats < 2:
      return f"{self.mean:.2f}"
    return f"{self.mean:.2f} ± {self.half_width:.2f}"


def interval(values: Sequence[float]) -> Interval:
  """Mean and 95% Student-t interval of repeated runs."""
  count = len(values)
  if count < 2:
    return Interval(float(np.mean(values)), float("nan"), count)
  spread = np.std(values, ddof=1) / np.sqrt(count)
  quantile = stats.t.ppf(0.975, count - 1)
  return Interval(float(np.mean(values)), float(quantile * spread), count)


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
  """Writes `results.json` and `results.csv`, one row a run, flags in each row."""
  workdir.write_json(folder / "results.json", {"flags": flags, "rows": rows})
  text = io.StringIO()
  given = " ".join(f"--{k}={_flag_text(v)}" for k, v in flags.items() if v is not None)
  rows = [{**row, "flags": given} for row in rows]
  writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  workdir.write_text(folder / "results.csv", text.getvalue())


def _flag_text(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, list) else str(value)


RUN_FIELDS = (
  "seed",
  "num_steps",
  "best_accuracy",
  "best_step",
  "data",
  "params_sha256",
  "commit",
  "python",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "numpy",
  "l2rw_jax",
  "platform",
  "device_kind",
  "device_count",
)


def run_fields(metrics: dict[str, Any]) -> dict[str, Any]:
  """What every row says of its run: data, outcome's identity, versions, device."""
  return {name: metrics[name] for name in RUN_FIELDS}
