"""Passes on what C++ libraries print, and says in one line that a process was lost.

`distributed` starts this program for each process of several and connects it to file
descriptors 1 and 2 of that process. When a connection is lost, JAX ends the process
from C++, after a report of many lines, so that no Python code of the process can say
what happened. This program imports nothing but the standard library.
"""

from collections.abc import Iterable
import re
import signal
import sys
from typing import BinaryIO

# The process writes these when it is connected to the others, and before it ends with
# a line that says why.
CONNECTED = b"\0connected\n"
REPORTED = b"\0reported\n"
# The lines with which the report of a lost connection begins.
_REPORT = re.compile(rb"coordination_service|the JAX distributed service detected")
_LOST_TASKS = re.compile(rb"stopped sending heartbeats\):\s+(\d+)")
# Progress of connections, for each device.
_NOISE = (b"[Gloo] Rank ",)


def relay(lines: Iterable[bytes], output: BinaryIO, not_connected: str) -> None:
  """Copies `lines` until they end, except for the report of a lost connection.

  Args:
    lines: what the process prints, with newlines.
    output: receives the lines.
    not_connected: what to say if the process was never connected.
  """
  report, is_connected, is_reported = b"", False, False
  for line in lines:
    if line == REPORTED:
      is_reported = True
    elif line == CONNECTED:
      is_connected = True
    elif report or _REPORT.search(line):
      report += line
    elif not line.startswith(_NOISE):
      output.write(line)
      output.flush()
  if report and not is_reported:
    why = explanation(report) if is_connected else not_connected
    output.write(f"error: {why}\n".encode())
    output.flush()


def explanation(report: bytes) -> str:
  """One line about a lost process.

  Args:
    report: of JAX's coordination service, which process 0 runs.
  """
  tasks = _LOST_TASKS.search(report)
  which = f"process {tasks[1].decode()}" if tasks else "process 0"
  return f"{which} ended or cannot be reached; the same command continues."


if __name__ == "__main__":
  # A terminal sends its signals to all processes; this one ends last.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  relay(sys.stdin.buffer, sys.stdout.buffer, sys.argv[1])
