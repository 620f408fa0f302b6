"""Flags for several processes: invalid combinations, and the last line of an error."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from experiments import coreset
from experiments import digits_noise
from experiments.lib import distributed
from experiments.lib import runner
from l2rw_jax import base
from l2rw_jax import processes

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
# These scripts have the flags, but do not train networks for a table.
_SINGLE_PROCESS = {f"experiments.{x}" for x in ("coreset", "find_label_issues")}
_ADDRESS = {"coordinator_address": "localhost:1"}


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (digits_noise.Settings(**_ADDRESS), "--num_processes and --process_id must also"),
    (
      digits_noise.Settings(**_ADDRESS, num_processes=2, process_id=2),
      "--process_id=2 must be below --num_processes=2",
    ),
    (coreset.Settings(distributed=True), "--distributed: this script runs"),
    (
      coreset.Settings(num_processes=2, process_id=0),
      "start it without --num_processes and --process_id",
    ),
  ],
)
def test_wrong_flags_raise_in_one_line(settings, message):
  with pytest.raises(base.InputError, match=message) as caught:
    distributed.connect(settings)
  assert "\n" not in str(caught.value)


_SCRIPTS = sorted(
  f"{folder.name}.{path.stem}"
  for folder in (_REPOSITORY / "experiments", _REPOSITORY / "benchmarks")
  for path in folder.glob("*.py")
  if "launch.main(" in path.read_text()
)


@pytest.mark.parametrize("name", _SCRIPTS)
def test_scripts_that_cannot_use_several_processes_refuse_them(name, monkeypatch):
  script = importlib.import_module(name)
  settings = script.Settings()
  if not hasattr(settings, "distributed"):
    return  # The script does not have these flags.
  is_supported = name.startswith("experiments.") and name not in _SINGLE_PROCESS
  is_supported |= name == "benchmarks.device_maps"  # Measures several processes.
  assert is_supported == settings.SEVERAL_PROCESSES
  if not is_supported:
    with pytest.raises(base.InputError, match="--distributed: this script runs in one"):
      distributed.connect(settings.replace(distributed=True))
    # As in a program that connected its processes itself.
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(base.InputError, match=r"jax\.distributed: this script runs in"):
      runner.open_folder(settings, "x", "unused")


def test_without_flags_a_process_connects_to_no_other(capsys):
  distributed.connect(digits_noise.Settings())
  with pytest.raises(SystemExit, match=r"^3$"):
    distributed.leave(3, "error: reason.")
  assert capsys.readouterr().err == "error: reason.\n"


_LEAVE = """
import os, signal, sys
from experiments.lib import distributed
distributed._relay_c_output("not connected.")
print("before", flush=True)
if {is_killed}:
  distributed._relay.kill()
  distributed._relay.wait()
distributed.leave(3, "error: \\udcff reason.")
"""


@pytest.mark.ci
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_last_line_is_printed_with_and_without_the_relay(is_killed):
  done = subprocess.run(
    [sys.executable, "-c", _LEAVE.format(is_killed=is_killed)],
    capture_output=True,
    text=True,
    cwd=_REPOSITORY,
  )
  assert (done.returncode, done.stdout) == (3, "before\n")
  assert done.stderr == "error: \\udcff reason.\n"
