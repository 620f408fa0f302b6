"""The C++ output of a process that lost another process becomes one line."""

import io

import pytest

from experiments.lib import last_words

_LOST = (
  b"E1 1 coordination_service_agent.cc:288] Polled an error from coordination\n",
  b"F1 1 client.h:86] Terminating process because the JAX distributed service detected"
  b" fatal errors. UNAVAILABLE: Failed to send RPC\n",
  b"*** Check failure stack trace: ***\n",
)
_SILENT = (
  b"E1 1 coordination_service.cc:1518] Use error polling to propagate the following"
  b" error: The following tasks are unhealthy (stopped sending heartbeats):\n",
  b"3\n",
  b"The tasks have crashed.\n",
)


def _relayed(*lines):
  output = io.BytesIO()
  last_words.relay(lines, output, "never connected.")
  return output.getvalue().decode()


@pytest.mark.parametrize(
  ("lines", "expected"),
  [
    ((last_words.CONNECTED, *_LOST), "error: process 0 ended or cannot be reached;"),
    ((last_words.CONNECTED, *_SILENT), "error: process 3 ended or cannot be reached;"),
    (_LOST, "error: never connected."),
  ],
)
def test_report_of_a_lost_process_becomes_one_line(lines, expected):
  (line,) = _relayed(*lines).splitlines()
  assert line.startswith(expected)


def test_other_output_passes():
  noise = b"[Gloo] Rank 0 is connected to 3 peer ranks.\n"
  assert _relayed(b"a\n", noise, last_words.CONNECTED, b"b") == "a\nb"


# The process writes its reason before, after or within the report of JAX.
@pytest.mark.parametrize("before", range(len(_LOST) + 1))
def test_reason_of_the_process_replaces_the_report(before):
  reason = last_words.REASON + b"error: reason.\n"
  lines = (*_LOST[:before], reason, *_LOST[before:])
  assert _relayed(last_words.CONNECTED, *lines) == "error: reason.\n"


def test_reason_may_arrive_in_the_middle_of_a_line():
  first, *others = _LOST
  lines = (first[:20] + last_words.REASON + b"error: reason.\n", first[20:], *others)
  assert _relayed(last_words.CONNECTED, *lines) == "error: reason.\n"


def test_output_before_and_after_a_reason_passes():
  lines = (b"W1 warning" + last_words.REASON + b"stopped.\n", b"rest\n")
  assert _relayed(last_words.CONNECTED, *lines) == "W1 warning\nstopped.\nrest\n"


def test_reports_of_both_formats_are_recognized():
  for line in (
    b"E1130 09:41:00 coordination_service.cc:7] failed: I give up\n",
    b"2026-11-30 09:41:00.1: E xla/coordination_service.cc:7] failed\n",
  ):
    assert "error: process 0 ended" in _relayed(last_words.CONNECTED, line)
    reason = line[:30] + last_words.REASON + b"stopped.\n"
    assert _relayed(last_words.CONNECTED, reason, line[30:]) == "stopped.\n"


def test_information_about_connections_is_not_a_report():
  lines = (
    b"I1130 09:41:00.1 1 coordination_service.cc:7] task 0 has connected.\n",
    b"W1130 09:41:00.1 1 coordination_service.cc:7] task 1 is slow.\n",
    b"2026-11-30 09:41:00.1: I xla/coordination_service.cc:7] task 1 has connected.\n",
    b"rest\n",
  )
  assert _relayed(last_words.CONNECTED, *lines) == b"".join(lines).decode()


def test_connection_may_be_reported_in_the_middle_of_a_line():
  lines = (b"W1 warning " + last_words.CONNECTED, b"rest\n", *_LOST)
  text = _relayed(*lines)
  assert text.startswith("W1 warning rest\nerror: process 0 ended")


def test_reason_may_have_several_lines():
  lines = (last_words.REASON + b"\n", last_words.REASON + b"stopped.\n", *_LOST)
  assert _relayed(last_words.CONNECTED, *lines) == "\nstopped.\n"
