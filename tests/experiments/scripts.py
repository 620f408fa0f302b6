"""Runs scripts in this process or, as their users do, in a separate process."""

import contextlib
import csv
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import pytest

from experiments.lib import launch
from experiments.lib import runner
from l2rw_jax import base

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# The compilation cache that the separate processes share.
_COMPILED = tempfile.TemporaryDirectory(prefix="l2rw_jax-compiled-")

# Runs a script with a limit on the size of files, as a substitute for a full disk.
FULL_DISK = """
import resource, runpy, sys
limit = (int(sys.argv.pop(2)), resource.RLIM_INFINITY)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class Outcome(NamedTuple):
  """The exit status of a command, and what it wrote."""

  status: Any
  stdout: str
  stderr: str


def start(*arguments: Any, cwd=REPOSITORY, stdin: str | None = None) -> Outcome:
  """Runs Python with these arguments in a separate process with eight devices."""
  hidden = ("JAX_", "TFDS_", "GIT_")
  env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
  env |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "PYTHONPATH": str(REPOSITORY),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles faster.
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  process = subprocess.run(
    [sys.executable, *map(str, arguments)],
    check=False,
    capture_output=True,
    text=True,
    timeout=300,
    cwd=cwd,
    env=env,
    input=stdin,
  )
  return Outcome(process.returncode, process.stdout, process.stderr)


def run(name: str, *arguments: Any, cwd: Any = ".") -> Outcome:
  """Does what `python -m experiments.NAME` does in a folder, but in this process.

  A name with a dot, such as benchmarks.step_time, is that of the whole module.
  """
  module = importlib.import_module(name if "." in name else f"experiments.{name}")
  experiment = module.TABLE.name if hasattr(module, "TABLE") else ""
  stdout, stderr, status = io.StringIO(), io.StringIO(), 0
  with (
    contextlib.chdir(cwd),
    contextlib.redirect_stdout(stdout),
    contextlib.redirect_stderr(stderr),
  ):
    try:
      texts = [str(argument) for argument in arguments]
      launch.execute(module.Settings, module.run, experiment, texts)
    except SystemExit as error:
      status = error.code
  return Outcome(status, stdout.getvalue(), stderr.getvalue())


def begin(name: str, *arguments: Any, cwd: Any) -> pathlib.Path:
  """Records the settings of a script in a new folder, without training."""

  def stop(settings, cell, folder):
    del settings, cell, folder
    raise base.InputError("stopped before the first step")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(runner, "train", stop)
    done = run(name, *arguments, cwd=cwd)
  assert "stopped before the first step" in done.stderr, done.stderr
  (folder,) = (pathlib.Path(cwd) / "runs").iterdir()
  return folder


def start_script(name: str, *arguments: Any, cwd: Any = REPOSITORY) -> Outcome:
  """Runs `python -m experiments.NAME` in a separate process."""
  return start("-m", f"experiments.{name}", *arguments, cwd=cwd)


def run_many(name: str, commands: list[list[str]]) -> list[Outcome]:
  """Calls `run` for many command lines."""
  return [run(name, *arguments) for arguments in commands]


def run_mistakes(
  name: str,
  mistakes: dict[str, tuple[list[str], str]],
  folder: pathlib.Path,
  *shared: Any,
  kept: pathlib.Path,
  **places: Any,
) -> dict[str, Outcome]:
  """Runs command lines with mistakes, which must write nothing; returns the outcomes.

  Args:
    name: the name of the script.
    mistakes: the flags and a part of the error message of each mistake, by name. Flags
      may contain {NAME}, where NAME is a key of `places`.
    folder: the parent folder of each --workdir; its list of files must not change.
    *shared: flags of every command line, which `mistakes` may override.
    kept: folder of a finished run, which must not change.
    **places: the texts that replace {NAME} in the flags.
  """
  commands = [
    [*map(str, shared), f"--workdir={folder}/{mistake}"]
    + [argument.format(**places) for argument in arguments]
    for mistake, (arguments, _) in mistakes.items()
  ]
  before = sorted(folder.rglob("*")), contents(kept)
  outcomes = run_many(name, commands)
  assert (sorted(folder.rglob("*")), contents(kept)) == before
  return dict(zip(mistakes, outcomes, strict=True))


def assert_one_line(outcome: Outcome, message: str) -> None:
  """Checks for status 2, nothing printed, and a one-line error with `message`."""
  assert outcome.status == 2, outcome
  assert outcome.stdout == ""
  assert len(outcome.stderr.splitlines()) == 1, outcome.stderr
  line = outcome.stderr.rstrip("\n")
  assert line.startswith("error: ") and message in line, line


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """The content of all files in a folder except locks, which name the last process."""
  files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")
  return {str(p): p.read_bytes() for p in files}


def table(printed: str) -> list[list[str]]:
  """The cells of the Markdown table in the printed text, header first."""
  lines = [line for line in printed.splitlines() if line.startswith("| ")]
  return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def saved_rows(folder: pathlib.Path) -> tuple[list[dict], list[dict], dict]:
  """The rows of `results.json`, the rows of `results.csv`, and the flags."""
  results = json.loads((folder / "results.json").read_text())
  with open(folder / "results.csv", newline="") as file:
    return results["rows"], list(csv.DictReader(file)), results["flags"]
