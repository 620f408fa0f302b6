"""Exchange between processes, seen from one of them."""

import contextlib

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax import processes


def test_one_process_exchanges_nothing():
  assert processes.is_first() and processes.count() == 1
  assert processes.exchange("x", "a") == ["a"]
  assert processes.smallest("x", 3) == 3
  assert processes.on_first("x", lambda: [1, 2]) == [1, 2]
  processes.check_same("x", {"a": 1})
  arrays = [np.arange(3)]
  assert processes.concatenate(arrays)[0] is arrays[0]
  assert processes.from_first(arrays) is arrays
  processes.publish_failure("x")
  with pytest.raises(base.InputError, match="is not connected to other processes"):
    processes.wait_for("x")


def test_bytes_restore_arrays_bit_for_bit():
  arrays = [np.array([-0.0, np.nan], np.float32), np.zeros((2, 0)), np.array(True)]
  back = processes._from_bytes(processes._as_bytes(arrays), arrays)
  for array, restored in zip(arrays, back, strict=True):
    assert restored.dtype == array.dtype and restored.shape == array.shape
    assert restored.tobytes() == array.tobytes()


class _Store:
  """The key-value store that two processes share, as the second process sees it."""

  def __init__(self, first):
    self._first = first
    self.sent = {}

  def key_value_set(self, key, value):
    self.sent[key] = value

  def blocking_key_value_get(self, key, timeout_ms):
    assert timeout_ms > 0
    if self._first is None and key not in self.sent:
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no value")
    return self.sent.get(key, self._first)


@pytest.fixture
def second_of_two(monkeypatch):
  """Makes this the second of two processes; `first` is what the first one publishes."""

  def make(first):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "client", lambda: store)
    store = _Store(first)

  return make


def test_difference_of_nested_values_is_named():
  one, two = ({"seed": 1, "config": {"a": 1, **x}} for x in ({"b": 2}, {}))
  text = processes._difference(one, two, 3)
  assert text == "config, b is 2 in process 0 and absent in process 3"


def test_difference_of_types_is_named():
  # In Python, these numbers are equal.
  text = processes._difference({"a": 1, "b": 2}, {"a": 1, "b": 2.0}, 1)
  assert text == "b is 2 in process 0 and 2.0 in process 1"


@pytest.mark.parametrize(
  ("outcome", "error"),
  [('{"error": "no"}', base.InputError), ('{"ended": "no"}', processes.EndedError)],
)
def test_errors_of_the_first_process_are_raised_in_all(second_of_two, outcome, error):
  second_of_two(outcome)
  with pytest.raises(error, match="no"):
    processes.on_first("x", lambda: pytest.fail("this is the second process"))


@pytest.mark.parametrize(
  ("result", "outcome"),
  [([1, 2], '{"value": [1, 2]}'), ({1}, '{"ended": "process 0 ended (TypeError)"}')],
)
def test_the_first_process_publishes_its_outcome(
  second_of_two, monkeypatch, result, outcome
):
  second_of_two(None)
  monkeypatch.setattr(processes, "index", lambda: 0)
  with pytest.raises(TypeError) if "ended" in outcome else contextlib.nullcontext():
    assert processes.on_first("x", lambda: result) == result
  assert list(processes.client().sent.values()) == [outcome]


def test_waiting_ends_with_the_reason_of_a_process_that_failed(second_of_two):
  second_of_two(None)
  processes.publish_failure("no such file")
  with pytest.raises(base.InputError, match="process 1: no such file"):
    processes.wait_for("x")


def test_different_values_raise_in_one_line(second_of_two):
  second_of_two('{"batch_size": 8, "seed": 1}')
  processes.check_same("the settings", {"seed": 1, "batch_size": 8})
  message = "batch_size is 8 in process 0 and 9 in"
  with pytest.raises(base.InputError, match=message) as caught:
    processes.check_same("the settings", {"seed": 1, "batch_size": 9})
  assert "\n" not in str(caught.value)


def test_errors_of_a_lost_process_are_recognized(monkeypatch):
  def lost(text):
    return processes.is_lost(jax.errors.JaxRuntimeError(text))

  closed = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer"
  assert not lost(closed)  # There is no other process.
  monkeypatch.setattr(processes, "count", lambda: 2)
  assert lost(closed) and lost("UNAVAILABLE: Socket closed")
  assert not lost("RESOURCE_EXHAUSTED: Out of memory in gloo")
  assert not lost("INVALID_ARGUMENT: shape") and not processes.is_lost(OSError("gloo"))
