"""Several real processes: the same results as one process, and resuming with fewer."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import toy_runs

_WORKER = pathlib.Path(__file__).with_name("processes_worker.py")
_REPOSITORY = _WORKER.parents[2]
_TIMEOUT = 600
_TOLERANCE = 1e-6


def _port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def _environment(**more):
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  # The commit may change while this test runs, so leave it out of the results.
  return env | {"GIT_DIR": os.devnull, "JAX_PLATFORMS": "cpu"} | more


def _start(command, env):
  return subprocess.Popen(
    [sys.executable, *command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=env,
    cwd=_REPOSITORY,
  )


def _finish(started):
  """Exit statuses and (stdout, stderr) of processes; waits for them to end."""
  try:
    outputs = [process.communicate(timeout=_TIMEOUT) for process in started]
  finally:
    for process in started:
      process.kill()
  return [p.returncode for p in started], outputs


def _work(count, num_local, task, as_script=False, **arguments):
  """Runs a task in `count` processes with `num_local` devices each.

  Returns:
    The exit status and the stderr of each process.
  """
  address = f"localhost:{_port()}"
  started = [
    _start(
      [
        str(_WORKER),
        json.dumps(
          {
            "count": count,
            "process": process,
            "num_local": num_local,
            "address": address,
            "as_script": as_script,
            "task": task,
          }
          | arguments
        ),
      ],
      _environment(),
    )
    for process in range(count)
  ]
  statuses, outputs = _finish(started)
  return statuses, [stderr for _, stderr in outputs]


# Every process compiles, so these are only `uniform` and methods whose weights depend
# on the whole batch or training set: on a meta gradient, a rank, a mean and a
# deviation, a moving percentile, a normalizer, stored weights, group losses, or one
# draw. `sweep_test` runs every method on eight devices of one process.
_METHODS = (
  *("l2rw", "hard_mining", "absgd", "adacore"),
  *("uniform", "random", "bare", "meta_weight_net_imbalance", "mentornet"),
  *("nested_maml_clusters", "group_dro"),
)


@pytest.mark.slow
def test_weights_parameters_and_metrics_are_those_of_one_process(tmp_path):
  layouts = [(1, 8, "pmap"), (2, 4, "pmap"), (4, 2, "shard_map")]
  for count, num_local, kind in layouts:
    statuses, errors = _work(
      *(count, num_local, "sweep"),
      path=str(tmp_path / f"{count}.npz"),
      # Four processes on two cores take long to compile.
      names=_METHODS[:4] if count == 4 else _METHODS,
      kind=kind,
    )
    assert statuses == [0] * count, "\n".join(errors)
  with np.load(tmp_path / "1.npz") as whole:
    expected = dict(whole)
  for count, _, _ in layouts[1:]:
    with np.load(tmp_path / f"{count}.npz") as actual:
      names = _METHODS[:4] if count == 4 else _METHODS
      assert {key.partition("/")[0] for key in actual if "/" in key} == set(names)
      assert count == 4 or actual.keys() == expected.keys()
      for name in actual.files:
        np.testing.assert_allclose(
          *(actual[name], expected[name]),
          rtol=_TOLERANCE,
          atol=_TOLERANCE,
          err_msg=f"{count} processes, {name}",
        )


def _assert_same_runs(folder, expected):
  """Compares metrics, weights and parameters of two finished runs."""
  rows, expected_rows = (
    toy_runs.rows(folder / "seed-0"),
    toy_runs.rows(expected / "seed-0"),
  )
  assert [sorted(row) for row in rows] == [sorted(row) for row in expected_rows]
  for row, expected_row in zip(rows, expected_rows, strict=True):
    for name, value in row.items():
      np.testing.assert_allclose(
        value, expected_row[name], rtol=_TOLERANCE, atol=_TOLERANCE, err_msg=name
      )
  tables = [
    np.genfromtxt(f / "seed-0" / "weights.csv", delimiter=",", names=True)
    for f in (folder, expected)
  ]
  for column in tables[0].dtype.names:
    np.testing.assert_allclose(
      *(t[column] for t in tables), rtol=_TOLERANCE, atol=_TOLERANCE, err_msg=column
    )
  params, expected_params = map(toy_runs.saved_params, (folder, expected))
  assert params.keys() == expected_params.keys() and params
  for name, value in params.items():
    np.testing.assert_allclose(
      value, expected_params[name], rtol=_TOLERANCE, atol=_TOLERANCE, err_msg=name
    )


_RUN = {"num_steps": 14, "num_devices": 4, "log_every": 2, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """`name -> folder` of a run by one process with four devices."""

  @functools.cache
  def run(name):
    folder = tmp_path_factory.mktemp("one")
    statuses, errors = _work(1, 4, "train", folder=str(folder), names=[name], **_RUN)
    assert statuses == [0], "\n".join(errors)
    return folder / name

  return run


# AdaCore selects a subset from results of both processes.
@pytest.mark.ci
@pytest.mark.slow("adacore")
@pytest.mark.parametrize("name", ["l2rw", "adacore"])
def test_runs_of_two_processes_are_those_of_one(tmp_path, one_process, name):
  statuses, errors = _work(2, 2, "train", folder=str(tmp_path), names=[name], **_RUN)
  assert statuses == [0, 0], errors
  _assert_same_runs(tmp_path / name, one_process(name))


@pytest.mark.slow
def test_run_moves_from_four_processes_to_two_to_one(tmp_path, one_process):
  arguments = {"folder": str(tmp_path), "names": ["l2rw"], **_RUN}
  statuses, _ = _work(4, 1, "train", signal_at=[2, 7, "SIGKILL"], **arguments)
  assert statuses[2] == -signal.SIGKILL and 0 not in statuses
  assert toy_runs.saved(tmp_path / "l2rw")[0] == 4
  statuses, errors = _work(2, 2, "train", signal_at=[1, 9, "SIGTERM"], **arguments)
  assert statuses == [-signal.SIGTERM] * 2, errors
  # Both stop after the same step, soon after the signal.
  assert toy_runs.saved(tmp_path / "l2rw")[0] >= 10
  statuses, errors = _work(1, 4, "train", **arguments)
  assert statuses == [0], "\n".join(errors)
  _assert_same_runs(tmp_path / "l2rw", one_process("l2rw"))


_SCRIPT = ("-m", "experiments.digits_noise")
_FLAGS = ("--num_seeds=1", "--methods=uniform", "--batch_size=100")


def _start_scripts(flags, numbers=(0, 1)):
  """Starts those of the two processes that have the given numbers."""
  address = f"localhost:{_port()}"
  return [
    _start(
      [
        *_SCRIPT,
        *_FLAGS,
        *flags,
        f"--coordinator_address={address}",
        "--num_processes=2",
        f"--process_id={process}",
      ],
      _environment(JAX_NUM_CPU_DEVICES="2", JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
    )
    for process in numbers
  ]


@pytest.mark.slow
def test_lost_process_ends_the_others_and_the_same_command_continues(tmp_path):
  flags = (f"--workdir={tmp_path / 'run'}", "--num_steps=200", "--checkpoint_every=20")
  started = _start_scripts(flags)
  checkpoints = tmp_path / "run" / "uniform" / "checkpoints"
  _wait_until(lambda: (checkpoints / "40").exists(), started)
  started[0].kill()
  statuses, outputs = _finish(started)
  assert statuses[0] == -signal.SIGKILL and statuses[1] in (75, -signal.SIGABRT)
  (line,) = outputs[1][1].splitlines()
  assert (
    "ended or cannot be reached" in line
    and "rerun the same command to continue" in line
  )
  started = _start_scripts(flags)
  statuses, outputs = _finish(started)
  assert statuses == [0, 0], outputs
  # Only the first process prints the table.
  assert "| uniform" in outputs[0][0] and outputs[1][0] == ""
  assert (tmp_path / "run" / "results.json").exists()


def _wait_until(is_done, started):
  deadline = time.monotonic() + _TIMEOUT
  while not is_done() and time.monotonic() < deadline:
    assert all(process.poll() is None for process in started), _finish(started)
    time.sleep(0.05)


_MISTAKES = {
  "batch": "--batch_size=6 is not a multiple of the 4 devices of 2 processes",
  "settings": "seed 0, config, num_steps is 5 in process 0 and 7 in process 1",
  "data": "seed 0, data is ",
  "flags": "num_steps is 5 in process 0 and 7 in process 1",
  "folder": "is not shared: process 1",
}


@pytest.mark.ci
def test_mistakes_end_all_processes_with_one_line(tmp_path):
  statuses, errors = _work(2, 2, "mistakes", as_script=True, folder=str(tmp_path))
  assert statuses == [2, 2], errors
  lines = [stderr.splitlines() for stderr in errors]
  missing = "x.array_record-00001-of-00002: No such file"
  assert lines == [[f"error: process 1: {missing}"], [f"error: {missing}"]]
  first, second = (
    json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)
  )
  assert first == second and first.keys() == _MISTAKES.keys()
  for name, part in _MISTAKES.items():
    assert part in first[name] and "\n" not in first[name], first[name]
  assert not (tmp_path / "script").exists()


@pytest.mark.ci
def test_process_that_never_arrives_ends_the_other_with_one_line():
  flags = ("--num_steps=5", "--initialization_timeout=3")
  # Process 0 of one pair, and process 1 of another pair.
  alone = [_start_scripts(flags, numbers=(number,))[0] for number in range(2)]
  statuses, outputs = _finish(alone)
  assert statuses[0] in (2, -signal.SIGABRT) and statuses[1] in (2, -signal.SIGABRT)
  for _, stderr in outputs:
    (line,) = stderr.splitlines()
    assert "not all processes connected within --initialization_timeout=3" in line
