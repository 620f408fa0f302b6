"""Connection, output and exit of a script that runs in several processes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, NoReturn

import jax

from experiments.lib import last_words
from experiments.lib import settings as settings_lib
from l2rw_jax import base
from l2rw_jax import processes

# The exit status if another process was lost. The same command then continues the run,
# if all processes are started again.
LOST_STATUS = 75
# After this time, JAX notices that a process does not answer.
_HEARTBEAT_SECONDS = 30
# A process that ends waits at most this time for the others, because they read the
# key-value store of process 0.
_LEAVE_MS = 5000
# The process then waits at most this time for the relay (see `_relay_c_output`) to
# print its last lines and end. The relay does not end while a child process of this
# process still has the pipe open.
_RELAY_SECONDS = 1.0
_is_connected = False


def connect(settings: Any) -> None:
  """Connects this process to the others if the flags ask for it.

  Only process 0 prints to stdout; all processes print errors.

  Args:
    settings: settings of the script.

  Raises:
    InputError: the flags are incomplete or contradict each other, the script cannot use
      several processes, or the connection fails.
  """
  if not isinstance(settings, settings_lib.ProcessFlags):
    return
  names = ("coordinator_address", "num_processes", "process_id")
  given = {name: getattr(settings, name) for name in names}
  address, count, number = given.values()
  is_automatic = settings.distributed
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if not is_automatic and len(missing) == len(given):
    return
  if not settings.SEVERAL_PROCESSES:
    asking = ["--distributed"] if is_automatic else []
    asking += [f"--{name}" for name, value in given.items() if value is not None]
    raise base.InputError(refusal(" and ".join(asking)))
  if not is_automatic and missing:
    raise base.InputError(
      f"{' and '.join(missing)} must also be given: several processes need"
      " --coordinator_address, --num_processes and --process_id, or --distributed where"
      " JAX detects the cluster."
    )
  if count is not None and number is not None and number >= count:
    raise base.InputError(
      f"--process_id={number} must be below --num_processes={count}: processes are"
      " counted from 0."
    )
  late = _late(settings)
  _relay_c_output(late)
  # The preemption service of JAX would handle SIGTERM in place of the training loop.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator_address=address,
      num_processes=count,
      process_id=number,
      initialization_timeout=settings.initialization_timeout,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    num_processes = jax.process_count()
  except (ValueError, RuntimeError) as error:
    raise base.InputError(_failure(error, late)) from error
  global _is_connected
  _is_connected = True
  os.write(2, last_words.CONNECTED)
  if num_processes > 1 and not processes.is_first():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def refusal(cause: str) -> str:
  """The error if `cause` asks for several processes, but the script cannot use them."""
  return f"{cause}: this script runs in one process; start it without {cause}."


def _late(settings: Any) -> str:
  """The error of a process that waited too long for another one."""
  return (
    "not all processes connected within"
    f" --initialization_timeout={settings.initialization_timeout} seconds: start all of"
    " them with the same --coordinator_address and --num_processes and different"
    " --process_id, or wait longer."
  )


def _failure(error: Exception, late: str) -> str:
  """The error of a connection that failed, with the flags to change if known."""
  text = " ".join(str(error).split())
  if "DEADLINE_EXCEEDED" in text or "timed out" in text.lower():
    return late
  if "should be defined" in text or "must be defined" in text:
    return (
      "--distributed: JAX detects no cluster (TPU pod, Slurm, Open MPI or"
      " Kubernetes); give --coordinator_address, --num_processes and --process_id."
    )
  return f"the processes could not be connected: {text[:300]}"


def _relay_c_output(not_connected: str) -> None:
  """Sends the output of C++ through `last_words`, but not that of Python."""
  global _relay
  sys.stdout.flush()
  sys.stderr.flush()
  stdout, stderr = os.dup(1), os.dup(2)
  source, sink = os.pipe()
  program = pathlib.Path(last_words.__file__)
  _relay = subprocess.Popen(
    [sys.executable, "-S", "-E", str(program), not_connected],
    stdin=source,
    stdout=stderr,
    stderr=stderr,
    start_new_session=True,
  )
  os.close(source)
  os.dup2(sink, 1)
  os.dup2(sink, 2)
  os.close(sink)
  sys.stdout = os.fdopen(stdout, "w", buffering=1)
  sys.stderr = os.fdopen(stderr, "w", buffering=1)


_relay: subprocess.Popen | None = None


def leave(status: int, reason: str, *, is_mistake: bool = False) -> NoReturn:
  """Prints why this process ends, and ends it.

  If there are several processes, this one waits a few seconds for the others and then
  skips JAX's shutdown, which would wait until the others end, or report them as lost.

  Args:
    status: exit status.
    reason: what is printed to stderr.
    is_mistake: whether to publish the reason, so that the other processes end, too.
  """
  if _relay is None:
    with contextlib.suppress(OSError):  # The terminal may be closed.
      print(reason, file=sys.stderr, flush=True)
    sys.exit(status)
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # The process ends soon in any case.
  reason = reason.encode(errors="backslashreplace").decode()  # It may contain a path.
  # `sys.stderr` bypasses the relay. If the reason were printed there, JAX could end the
  # process before the relay knows the reason, and the relay would print another reason.
  lines = [last_words.REASON + line.encode() + b"\n" for line in reason.split("\n")]
  try:
    os.write(2, b"".join(lines))
  except OSError:  # The relay was killed.
    with contextlib.suppress(OSError):
      print(reason, file=sys.stderr, flush=True)
  if _is_connected:
    if is_mistake:
      processes.publish_failure(reason.removeprefix("error: "))
    # Other processes may still need the key-value store of process 0, in which they
    # read why they must end.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      processes.client().wait_at_barrier("l2rw_jax/leave", _LEAVE_MS)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  # The parent process may stop reading when this process ends, so the relay ends first.
  # Descriptors 1 and 2 are redirected, not closed, because another thread could open a
  # file that would reuse their numbers.
  null = os.open(os.devnull, os.O_WRONLY)
  for descriptor in (1, 2):
    os.dup2(null, descriptor)
  with contextlib.suppress(subprocess.TimeoutExpired):
    _relay.wait(_RELAY_SECONDS)
  os._exit(status)
