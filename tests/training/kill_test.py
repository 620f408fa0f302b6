"""A script that is killed and restarted writes the same bytes as one that is not."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_MODULE = "experiments.digits_noise"
_FLAGS = (
  "--num_steps=60",
  "--num_seeds=2",
  "--methods=l2rw,uniform",
  "--checkpoint_every=20",
)
_RUNS = tuple(f"{m}/seed-{s}" for m in ("l2rw", "uniform") for s in (0, 1))
# Files that must have the same bytes. Other files contain times and paths.
_SAME = (
  "settings.json",
  "results.json",
  "results.csv",
  *(
    f"{run}/{name}"
    for run in _RUNS
    for name in ("metrics.jsonl", "metrics.csv", "weights.csv", "results.json")
  ),
)
# Runs the script, which kills itself at a given point.
_KILLED = """
import os, pathlib, runpy, signal, sys
from l2rw_jax.io import workdir
from l2rw_jax.training import sampling

def kill_before(module, function, is_here):
  original = getattr(module, function)
  def call(*args, **kwargs):
    if is_here(*args):
      os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
  setattr(module, function, call)

kind, where = sys.argv[1].split(":")
del sys.argv[1]
if kind == "step":
  kill_before(sampling.Sampler, "next", lambda _, step: step == int(where))
elif kind == "rename":
  kill_before(os, "rename", lambda _, path: pathlib.Path(path).name == where)
else:
  kill_before(workdir, "write_json", lambda path, _: str(path).endswith(where))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """A compilation cache that most processes share."""
  return tmp_path_factory.mktemp("compiled")


def _environment(cache):
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  # The commit may change while this test runs, so leave it out of the results.
  env |= {"JAX_PLATFORMS": "cpu", "GIT_DIR": os.devnull}
  env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # Compiles in a third of the time.
  if cache is not None:
    env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  return env


def _start(arguments, folder, cache):
  return subprocess.Popen(
    [sys.executable, *arguments, *_FLAGS, f"--workdir={folder}"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=_environment(cache),
    cwd=_REPOSITORY,
  )


def _run(folder, cache=None):
  """Runs the script to its end; returns its stdout and stderr."""
  process = _start(["-m", _MODULE], folder, cache)
  stdout, stderr = process.communicate(timeout=300)
  assert process.returncode == 0, stderr
  return stdout, stderr


def _run_until(point, folder, cache):
  """Runs the script until it kills itself; returns its stderr."""
  process = _start(["-c", _KILLED, point, _MODULE], folder, cache)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == -signal.SIGKILL, stderr
  return stderr


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The folder of an uninterrupted run, and its printed table."""
  folder = tmp_path_factory.mktemp("reference") / "run"
  stdout, stderr = _run(folder)
  assert stderr == ""
  return folder, stdout.splitlines()[:-1]


def _checkpoints(folder):
  """Steps of the finished checkpoints of L2RW."""
  paths = (folder / "l2rw" / "checkpoints").glob("*")
  return sorted(int(p.name) for p in paths if p.name.isdigit())


def _assert_same_end(folder, stdout, reference):
  expected, table = reference
  assert stdout.splitlines()[:-1] == table
  for name in _SAME:
    assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
  for method in ("l2rw", "uniform"):
    record, arrays = _last_checkpoint(folder / method)
    expected_record, expected_arrays = _last_checkpoint(expected / method)
    assert record["sha256"] == expected_record["sha256"]
    assert arrays.keys() == expected_arrays.keys() and len(arrays) > 6
    for name, array in arrays.items():
      assert array.dtype == expected_arrays[name].dtype
      np.testing.assert_array_equal(array, expected_arrays[name])
  assert not list(folder.rglob("*.tmp")) + list(folder.rglob("*orbax-checkpoint-tmp*"))


def _last_checkpoint(folder):
  saved = folder / "checkpoints" / "60"
  record = json.loads((saved / "record" / "metadata").read_text())
  with ocp.StandardCheckpointer() as checkpointer:
    return record, checkpointer.restore(saved / "arrays")


@pytest.mark.slow
def test_reference_is_complete(reference):
  folder, table = reference
  lines = [line.split()[1] for line in table if line.startswith("| ")]
  assert lines == ["method", "l2rw", "uniform"]
  assert _checkpoints(folder) == [40, 60]
  rows = json.loads((folder / "results.json").read_text())["rows"]
  assert [r["method"] for r in rows] == ["l2rw", "l2rw", "uniform", "uniform"]
  for row, run in zip(rows, _RUNS, strict=True):
    results = json.loads((folder / run / "results.json").read_text())
    assert results["params_sha256"] == row["params_sha256"]
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [20, 40, 60, 60]
  assert len({row["params_sha256"] for row in rows}) == 4


def _kill_before_the_first_checkpoint(folder):
  process = _start(["-m", _MODULE], folder, cache=None)
  metrics = folder / "l2rw" / "seed-1" / "metrics.jsonl"
  # When this file appears, the first steps are not compiled yet.
  deadline = time.monotonic() + 240
  while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
  process.kill()
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL, stderr


def _damage(checkpoint):
  files = [path for path in checkpoint.rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.slow
def test_killed_at_every_stage_and_with_a_damaged_checkpoint(
  reference, tmp_path, cache
):
  """One run is killed again and again, so that only one has to reach its end."""
  folder = tmp_path / "run"
  results = folder / "l2rw" / "seed-0" / "results.json"

  _kill_before_the_first_checkpoint(folder)
  assert _checkpoints(folder) == [] and not results.exists()

  # The run is killed while it writes the second checkpoint.
  assert _run_until("rename:40", folder, cache) == ""
  assert _checkpoints(folder) == [20]
  partial = [p.name for p in (folder / "l2rw" / "checkpoints").glob("40.*")]
  assert len(partial) == 1  # Written, but not renamed yet.

  # It is killed ten steps after that checkpoint.
  assert _run_until("step:50", folder, cache) == ""
  assert _checkpoints(folder) == [20, 40]

  # It continues from the checkpoint before the damaged one, and is killed before it
  # writes the last results of a method.
  _damage(folder / "l2rw" / "checkpoints" / "40")
  (warning,) = _run_until("write:seed-1/results.json", folder, cache).splitlines()
  assert "checkpoint of step 40" in warning and "is damaged" in warning
  assert _checkpoints(folder) == [40, 60] and results.exists()
  assert (folder / "l2rw" / "seed-1" / "weights.csv").exists()
  assert not (folder / "l2rw" / "seed-1" / "results.json").exists()

  stdout, stderr = _run(folder, cache)
  assert stderr == ""
  _assert_same_end(folder, stdout, reference)
