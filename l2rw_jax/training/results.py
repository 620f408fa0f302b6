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
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import variables
from l2rw_jax.training import weight_log

RESULTS = "results.json"
_WEIGHTS = "weights.csv"
_STATISTICS = "statistics.npz"
_FILES = "files"


class Result(NamedTuple):
  """One finished run.

  Attributes:
    metrics: the content of `results.json` without its checksum. "identity" contains
      the settings, the seed and a checksum of the data, and "files" contains the
      checksums of the other files of the run, except those for TensorBoard.
    weights: the columns of `weights.csv`, arrays [N] by name: index,
      source_index, label, true_label, mean_weight and last_weight (both in units of the
      uniform weight), seen (number of batches), rejected (number of batches with weight
      0). With L2RW, a high rejected / seen indicates a wrong label better than a low
      mean_weight does. The two columns of labels are missing if examples have several
      labels. For a user's data, source_index is a position in the result of
      `own_data.read(NAME, "train")`, whose `names` are the paths or rows in the files.
    statistics: what the method reports for each training example, arrays [N, ...] by
      name, as in `audit.recording`; empty if it reports nothing.
    params: the trained parameters after the last step, NumPy arrays.
    model_state: the variables of the network that are not trained, after the last step,
      NumPy arrays.
  """

  metrics: dict[str, Any]
  weights: dict[str, np.ndarray]
  statistics: dict[str, np.ndarray]
  params: base.PyTree
  model_state: base.PyTree


def write(
  folder: pathlib.Path,
  state: step_lib.TrainState,
  log: weight_log.WeightLog,
  run: int,
  split: examples_lib.Splits,
  facts: dict[str, Any],
  statistics: dict[str, np.ndarray] | None = None,
) -> None:
  """Writes the files of a run; `results.json` is last and marks the run as finished.

  Args:
    folder: the folder of this run; its metrics must be closed.
    state: the training state of this run, on the host.
    log: the weights of all runs.
    run: index of this run in `log`.
    split: data of this run.
    facts: additional entries of `results.json`.
    statistics: what the method reports for each example. If it is empty, its file is
      not written.
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
  variables.write(folder, state.params, state.model_state)
  rows = metric_writer.read(folder)
  files = [_WEIGHTS, variables.FILE, *metric_writer.FILES]
  if statistics:
    arrays = {k: _plain(x) for k, x in statistics.items()}
    workdir.write_with(
      folder / _STATISTICS, lambda file: workdir.write_arrays(file, arrays)
    )
    files.append(_STATISTICS)
  results = {
    **facts,
    "data": split.fingerprint,
    "params_sha256": _sha256(state.params),
    **_last_and_best(rows),
    **_probes(rows),
    _FILES: {name: workdir.file_digest(folder / name) for name in files},
  }
  workdir.write_record(folder / RESULTS, results)


def damage(folder: pathlib.Path) -> str:
  """Describes damage to the files of a finished run, or returns "" if they are intact.

  Args:
    folder: the folder of the run, with its `results.json`.
  """
  try:
    expected = workdir.read_record(folder / RESULTS).get(_FILES, {})
    if expected and variables.FILE not in expected:
      return f"{folder} has no trained parameters: an earlier version wrote it."
    for name, digest in expected.items():
      if workdir.file_digest(folder / name) != digest:
        return f"{folder / name} is damaged (its checksum does not match)."
  except base.InputError as error:
    return str(error)
  return ""


def read(
  folder: pathlib.Path, like: tuple[base.PyTree, base.PyTree] | None = None
) -> Result:
  """Reads a finished run.

  Args:
    folder: the folder of the run.
    like: params and model_state, or their shapes, for the structure of the result; if
      None, the params and the model_state are nested dictionaries.

  Returns:
    The run.

  Raises:
    InputError: a file of the run is missing or damaged, or the variables do not have
      the structure `like`.
  """
  wrong = damage(folder)
  if wrong:
    raise base.InputError(wrong)
  with open(folder / _WEIGHTS, encoding="utf-8") as file:
    names = file.readline().strip().split(",")
    # `np.genfromtxt` takes six times as long, which is 12 s for a million examples.
    table = np.loadtxt(file, delimiter=",", ndmin=2)
  weights = dict(zip(names, table.T.copy(), strict=True))
  metrics, statistics = workdir.read_record(folder / RESULTS), {}
  if _STATISTICS in metrics.get(_FILES, {}):
    with np.load(folder / _STATISTICS, allow_pickle=False) as stored:
      statistics = {name: stored[name] for name in stored.files}
  params, model_state = variables.read(folder)
  if like is not None:
    params = variables.restore(params, like[0])
    model_state = variables.restore(model_state, like[1])
  return Result(metrics, weights, statistics, params, model_state)


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
  """`value`, or None for NaN and infinity, which JSON does not have."""
  return value if math.isfinite(value) else None


def _plain(values: Any) -> np.ndarray:
  """An array of a type that `.npz` files support: float32 instead of bfloat16."""
  array = np.asarray(values)
  return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array


def _sha256(tree: base.PyTree) -> str:
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
