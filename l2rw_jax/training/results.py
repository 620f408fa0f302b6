"""The files of a finished run: writing, checking and reading them."""

import csv
import hashlib
import io
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.io import metric_writer
from l2rw_jax.io import workdir
from l2rw_jax.training import weight_log

RESULTS = "results.json"
_WEIGHTS = "weights.csv"
_FILES = "files"


class Result(NamedTuple):
  """One finished run.

  Attributes:
    metrics: the content of `results.json` without its checksum. "identity" holds
      everything that the numbers of the run depend on, "files" the checksums of its
      other files.
    weights: the columns of `weights.csv`, arrays [N] by name: index,
      source_index, label, true_label, mean_weight, last_weight (in units of the
      uniform weight), seen, rejected (in batches). The two columns of labels are
      missing if examples have several labels.
  """

  metrics: dict[str, Any]
  weights: dict[str, np.ndarray]


def write(
  folder: pathlib.Path,
  params: base.PyTree,
  log: weight_log.WeightLog,
  run: int,
  split: examples_lib.Splits,
  facts: dict[str, Any],
) -> None:
  """Writes `weights.csv` and then `results.json`, which marks the run finished.

  Args:
    folder: the folder of this run; its metrics are closed.
    params: parameters of this run, on the host.
    log: the weights of all runs.
    run: index of this run in `log`.
    split: data of this run.
    facts: further entries of `results.json`.
  """
  columns = {
    "index": split.train.index,
    "source_index": split.train.source_index,
    "label": split.train.label,
    "true_label": split.train.true_label,
    "mean_weight": log.mean()[run],
    "last_weight": log.last[run],
    "seen": log.seen[run],
    "rejected": log.rejected[run],
  }
  columns = {name: column for name, column in columns.items() if column.ndim == 1}
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
  workdir.write_text(folder / _WEIGHTS, text.getvalue())
  rows = metric_writer.read(folder)
  tables = (_WEIGHTS, *metric_writer.FILES)
  results = {
    **facts,
    "data": split.fingerprint,
    "params_sha256": _sha256(params),
    **_last_and_best(rows),
    **_probes(rows),
    _FILES: {name: workdir.file_digest(folder / name) for name in tables},
  }
  workdir.write_record(folder / RESULTS, results)


def damage(folder: pathlib.Path) -> str:
  """Describes damage to the files of a finished run; "" if they are intact.

  Args:
    folder: the folder of the run, with its `results.json`.
  """
  try:
    expected = workdir.read_record(folder / RESULTS).get(_FILES, {})
    for name, digest in expected.items():
      if workdir.file_digest(folder / name) != digest:
        return f"{folder / name} is damaged (its checksum does not match)."
  except base.InputError as error:
    return str(error)
  return ""


def read(folder: pathlib.Path) -> Result:
  """Reads a finished run.

  Args:
    folder: the folder of the run.

  Returns:
    The run.

  Raises:
    InputError: a file of the run is missing or damaged.
  """
  wrong = damage(folder)
  if wrong:
    raise base.InputError(wrong)
  table = np.genfromtxt(folder / _WEIGHTS, delimiter=",", names=True)
  table = np.atleast_1d(table)  # There may be one training example only.
  weights = {name: table[name] for name in table.dtype.names or ()}
  return Result(workdir.read_record(folder / RESULTS), weights)


def _last_and_best(rows: list[dict[str, Any]]) -> dict[str, Any]:
  tests = [row for row in rows if row.get("test/accuracy") is not None]
  last = {
    k.removeprefix("test/"): _json(v)
    for k, v in tests[-1].items()
    if k.startswith("test/")
  }
  best = max(tests, key=lambda row: row["test/accuracy"])
  return {
    "last": last,
    "best_accuracy": best["test/accuracy"],
    "best_step": best["step"],
  }


def _probes(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Values of each probe, from the start to the end, and their steps."""
  prefix = "probe/"
  probed = [row for row in rows if any(name.startswith(prefix) for name in row)]
  names = sorted({name for row in probed for name in row if name.startswith(prefix)})
  if not probed:
    return {}
  values = {
    name.removeprefix(prefix): [_json(row.get(name, math.nan)) for row in probed]
    for name in names
  }
  return {"probes": {"step": [row["step"] for row in probed], **values}}


def _json(value: float) -> float | None:
  """None for NaN and infinity: JSON has neither, and a loss can overflow."""
  return value if math.isfinite(value) else None


def _sha256(tree: base.PyTree) -> str:
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
