"""Kills one of two training processes repeatedly, and counts the runs that are lost.

Two processes train digits_noise together. After a random time, one of them, chosen at
random, is killed by SIGKILL. The script measures how long the other one takes to end,
and starts both again with the same command. At the end, it compares the files of all
runs with those of runs that were never interrupted.

    python -m benchmarks.process_kills runs/kills

The script writes FOLDER/kills.csv and prints a summary. A run is lost if it does not
finish, or if it ends with other metrics, weights or parameters.
"""

from collections.abc import Sequence
import csv
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

NUM_KILLS = 20
_FLAGS = (
  *("--methods=uniform,l2rw", "--num_seeds=1", "--num_steps=400"),
  *("--eval_every=100", "--checkpoint_every=20"),
)
# Seconds between the first file of a start and the kill, drawn uniformly.
_DELAY = (0.0, 6.0)
_LIMIT = 300.0
_COMPARED = ("metrics.jsonl", "weights.csv", "variables.msgpack")


def start(folder: pathlib.Path) -> list[subprocess.Popen]:
  """Starts two processes of one run, with two devices each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "2",
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
  """Waits for processes and returns their errors; kills them after `_LIMIT`."""
  try:
    return [process.communicate(timeout=_LIMIT)[1] for process in started]
  finally:
    for process in started:
      process.kill()


def kill_one(started: Sequence[subprocess.Popen], rng: random.Random) -> dict | None:
  """Kills a process after a random time; None if both had finished before."""
  deadline = time.monotonic() + rng.uniform(*_DELAY) + _START_SECONDS
  while time.monotonic() < deadline:
    if any(process.poll() is not None for process in started):
      return None
    time.sleep(0.01)
  victim = rng.randrange(2)
  started[victim].kill()
  killed = time.monotonic()
  errors = finish(started)
  other = started[1 - victim]
  return {
    "victim": victim,
    "seconds": round(time.monotonic() - killed, 2),
    "status": other.returncode,
    "line": errors[1 - victim].strip().replace("\n", " / "),
  }


# Seconds that Python and JAX take to start; some kills come earlier than training.
_START_SECONDS = 5.0


def outcome(folder: pathlib.Path) -> dict[str, bytes]:
  """The files of finished runs that must be the same."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.name in _COMPARED
  }


def main(folder: pathlib.Path, num_kills: int = NUM_KILLS) -> None:
  """Runs the experiment in `folder`, which must not exist."""
  folder.mkdir(parents=True)
  errors = finish(start(folder / "whole"))
  expected = outcome(folder / "whole")
  if len(expected) != 2 * len(_COMPARED):
    sys.exit(f"the uninterrupted runs failed: {errors}")
  rng, lost, number = random.Random(0), 0, 0
  rows: list[dict] = []
  while len(rows) < num_kills:
    run = folder / f"run-{number}"
    row = kill_one(started := start(run), rng)
    if row is not None:
      rows.append({"run": number, **row})
      print(rows[-1], flush=True)
      if len(rows) < num_kills:
        continue
      started = start(run)
    finish(started)
    number += 1
    lost += outcome(run) != expected
  with open(folder / "kills.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
  slowest = max(row["seconds"] for row in rows)
  one_line = sum(" / " not in row["line"] and bool(row["line"]) for row in rows)
  print(
    f"{len(rows)} kills in {number} runs of two methods: {lost} runs lost; the other"
    f" process ended after at most {slowest} seconds, {one_line} times with one line."
  )


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
