"""Relays the output of C++ libraries, and reports a lost process in one line.

If there are several processes, `distributed` starts this program for each of them and
connects it to file descriptors 1 and 2 of the process. When a connection is lost, JAX
ends the process from C++, after a report of many lines, so that no Python code of the
process can report what happened. This program imports only the standard library.
"""

from collections.abc import Iterable
import re
import signal
import sys
from typing import BinaryIO

# The process writes the first marker when it is connected to the others, and the second
# before each line that says why it ends. The markers and JAX's report arrive through
# the same pipe, so that either the reason or one line about the report is printed, even
# if JAX ends the process at the same time.
CONNECTED = b"\0connected\n"
REASON = b"\0reason "
# How log lines begin: "E1130 09:41:00 1 file.cc:7]" or "2026-11-30 ...: E file". The
# letters of the levels replace %s.
_LEVEL = rb"([%s]\d|\d{4}-[^\]]*?: [%s] )"
# Matches the first line of the report of a lost connection: a line that names the
# service, unless its level is INFO or WARNING. Lines of these levels are about
# connections that work.
_REPORT = re.compile(
  b"(?!%s).*(coordination_service|the JAX distributed service detected)"
  % (_LEVEL % (b"IW", b"IW"))
)
# Matches the beginning of a line that may belong to the report.
_ERROR = re.compile(_LEVEL % (b"EF", b"EF"))
_LOST_TASKS = re.compile(rb"stopped sending heartbeats\):\s+(\d+)")
# Lines about the progress of connections, for each device.
_NOISE = (b"[Gloo] Rank ",)


def relay(lines: Iterable[bytes], output: BinaryIO, not_connected: str) -> None:
  """Copies `lines` until they end, except for the report of a lost connection.

  The markers and the lines about the progress of connections are left out, too.
  If the process gives a reason for ending, that reason is printed instead of the
  report. If there is a report but no reason, one line about the report is printed.

  Args:
    lines: lines that the process prints, with newlines.
    output: the stream to which the lines are copied.
    not_connected: the message if the process was never connected.
  """
  report, is_connected, has_reason = b"", False, False
  for line in lines:
    if REASON in line:
      # JAX may be in the middle of a line, of its report or of other output.
      before, _, reason = line.partition(REASON)
      if report or _ERROR.match(before):
        report += before
      elif before:
        output.write(before + b"\n")
      has_reason = True
      output.write(reason)
      output.flush()
    elif CONNECTED in line:
      is_connected = True
      output.write(line.partition(CONNECTED)[0])
    elif report or _REPORT.match(line):
      report += line
    elif not line.startswith(_NOISE):
      output.write(line)
      output.flush()
  if report and not has_reason:
    why = explanation(report) if is_connected else not_connected
    output.write(f"error: {why}\n".encode())
    output.flush()


def explanation(report: bytes) -> str:
  """One line about a lost process.

  Args:
    report: report of JAX's coordination service, which process 0 runs.
  """
  tasks = _LOST_TASKS.search(report)
  lost = f"process {tasks[1].decode()}" if tasks else "process 0"
  return f"{lost} ended or cannot be reached; rerun the same command to continue."


if __name__ == "__main__":
  # A cluster's scheduler may send a signal to every process of a job. This program
  # ignores the signal, so that it ends after the process whose output it relays.
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  relay(sys.stdin.buffer, sys.stdout.buffer, sys.argv[1])
