"""Signals save a checkpoint, and the continued run writes the same bytes."""

import os
import signal

import pytest
import toy_runs

from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import interruption
from l2rw_jax.training import sampling


class _Ended(Exception):
  pass


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_a_checkpoint_at_any_step(tmp_path, monkeypatch, number):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  method = baselines.uniform()
  intervals = {"log_every": 5, "eval_every": 7, "steps_per_call": 1}
  whole, folder = tmp_path / "whole", tmp_path / "run"
  toy_runs.train(whole, method, **intervals)

  def end(*_):
    raise _Ended

  original = sampling.Sampler.next

  def interrupted(self, step):
    if step == 2:
      os.kill(os.getpid(), number)
    return original(self, step)

  before = signal.signal(number, end)
  try:
    with monkeypatch.context() as patch, pytest.raises(_Ended):
      patch.setattr(sampling.Sampler, "next", interrupted)
      toy_runs.train(folder, method, **intervals)
    assert signal.getsignal(number) is end
  finally:
    signal.signal(number, before)
  assert toy_runs.saved(folder)[0] == 3
  toy_runs.train(folder, method, **intervals)
  assert toy_runs.outcome(folder) == toy_runs.outcome(whole)


def test_ignored_signal_stays_ignored_and_second_signal_is_raised():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with interruption.deferred() as signals:
      signal.raise_signal(signal.SIGHUP)
    assert not signals
  finally:
    signal.signal(signal.SIGHUP, before)
  # Set the handler, because a process in the background starts with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.raises(KeyboardInterrupt), interruption.deferred() as signals:
      signal.raise_signal(signal.SIGINT)
      assert signals == [signal.SIGINT]
      signal.raise_signal(signal.SIGINT)
      pytest.fail("the second signal was deferred")
  finally:
    signal.signal(signal.SIGINT, before)
