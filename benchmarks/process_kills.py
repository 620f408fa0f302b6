"""Kills one of two training processes repeatedly, and counts the runs that are lost.

Two processes train L2RW on digits_noise together. After a random time, which is at most
the duration of an uninterrupted run, SIGKILL ends one of the two, chosen at random. The
script measures how long the other process takes to end. It then starts both again with
the same command until the run finishes; a process may be killed again after such a
restart. The metrics, weights and parameters of finished runs are compared byte
for byte with those of an uninterrupted run.

The file results.csv has a row for each kill; a summary is printed.
Command: python -m benchmarks.process_kills
Results: results/process_kills.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
from typing import Any

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib

_FLAGS = (
  *("--methods=l2rw", "--num_seeds=1"),
  *("--num_steps=100", "--checkpoint_every=10"),
  # Seconds that a process waits for the other one if it was killed before the two
  # connected.
  "--initialization_timeout=30",
)
# Seconds after which processes that do not end are killed, and the benchmark fails.
_LIMIT = 300.0
# A run counts as lost after this many starts that failed without a kill.
_MOST_FAILURES = 5
_COMPARED = ("metrics.jsonl", "weights.csv", "variables.msgpack")


def start(folder: pathlib.Path) -> list[subprocess.Popen]:
  """Starts two processes of one run, with one device each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  common = [
    *(sys.executable, "-m", "experiments.digits_noise", *_FLAGS),
    *(f"--workdir={folder}", f"--coordinator_address=localhost:{port}"),
    "--num_processes=2",
  ]
  return [
    subprocess.Popen(
      [*common, f"--process_id={process}"],
      env=env,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]


def finish(started: Sequence[subprocess.Popen]) -> list[str]:
  """Waits for processes and returns what they print to stderr.

  Raises:
    subprocess.TimeoutExpired: a process does not end within `_LIMIT`; all are killed.
  """
  try:
    return [process.communicate(timeout=_LIMIT)[1] for process in started]
  finally:
    for process in started:
      process.kill()


def kill_one(
  started: Sequence[subprocess.Popen], victim: int, after: float
) -> dict[str, Any] | None:
  """Kills a process; returns a row of results, or None if one ends before the kill.

  Args:
    started: the two processes.
    victim: the number of the process to kill, 0 or 1.
    after: seconds until the kill.
  """
  deadline = time.monotonic() + after
  while time.monotonic() < deadline:
    if any(process.poll() is not None for process in started):
      return None
    time.sleep(0.01)
  started[victim].kill()
  killed = time.monotonic()
  errors = finish(started)
  other = 1 - victim
  return {
    "killed_process": victim,
    "killed_after_seconds": round(after, 1),
    "other_ended_after_seconds": round(time.monotonic() - killed, 1),
    "exit_status": started[other].returncode,
    "message": errors[other].strip().replace("\n", " / "),
  }


def outcome(folder: pathlib.Path) -> dict[str, bytes]:
  """The contents, by path, of the files that must be equal in all finished runs."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.name in _COMPARED
  }


def latest_step(folder: pathlib.Path) -> int:
  """The step of the last checkpoint; 0 if there is none."""
  steps = [path.name for path in folder.glob("*/checkpoints/*")]
  return max((int(step) for step in steps if step.isdigit()), default=0)


def complete(folder: pathlib.Path) -> tuple[int, list[str]]:
  """Starts both processes with the same command until their run finishes.

  Returns:
    The number of starts that failed although no process was killed, for instance
    because a collective timed out on a busy machine, and what the processes printed to
    stderr at the last start.
  """
  for failures in range(_MOST_FAILURES):
    errors = finish(started := start(folder))
    if not any(process.returncode for process in started):
      return failures, errors
  return _MOST_FAILURES, errors


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  workdir: str | None = flag(
    None,
    "Folder of the runs and the results, which must not exist. The default is"
    " runs/process_kills.",
    group="output",
  )
  num_kills: int = flag(20, "Number of kills.", bounds=settings_lib.REPEATS)


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: `workdir` exists, or a run that is not interrupted fails.
  """
  folder, info = pathlib.Path(workdir).absolute(), workdir_lib.run_info()
  if folder.exists():
    raise base.InputError(f"--workdir={workdir} exists: choose a new folder.")
  folder.mkdir(parents=True)
  # The first run also compiles; the second shows how long the runs below would take.
  for name in ("compiling", "whole"):
    began = time.monotonic()
    failures, errors = complete(folder / name)
    duration = (time.monotonic() - began) / (failures + 1)
  expected = outcome(folder / "whole")
  if len(expected) != len(_COMPARED):
    raise base.InputError(f"the runs that were not interrupted failed: {errors}")
  rng, lost, number, failures = random.Random(0), 0, 0, 0
  rows: list[dict] = []
  while len(rows) < settings.num_kills:
    place = folder / f"run-{number}"
    row = kill_one(started := start(place), rng.randrange(2), rng.uniform(0, duration))
    if row is not None:
      row = {"run": number, **row, "checkpoint_step": latest_step(place)}
      rows.append({**row, **info})
      _rows.write(folder / "results.csv", rows)
      print(row, flush=True)
      if len(rows) < settings.num_kills:
        continue
    else:
      finish(started)
    if any(process.returncode for process in started):
      more, _ = complete(place)
      failures += more + (row is None)
    lost += outcome(place) != expected
    number += 1
  slowest = max(row["other_ended_after_seconds"] for row in rows)
  one_line = sum(" / " not in row["message"] and bool(row["message"]) for row in rows)
  print(
    f"{len(rows)} kills in {number} runs ({duration:.0f} seconds if not interrupted):"
    f" {lost} runs lost, {failures} starts ended by other events; the other process"
    f" ended after at most {slowest} seconds, {one_line} times with one line."
  )
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "process_kills")
