"""Streamed examples: the same runs, exact resumption, bounded memory."""

import gc
import sys
import threading
import weakref

import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import device_data
from l2rw_jax.training import run as run_lib
from l2rw_jax.training import streaming

_TUNED = baselines.fine_tuning(2)  # Uses training and meta examples.


def _in_reverse(state, problem, train, rng):
  """A `sample` that the host has to call at every epoch; its epochs differ in size."""
  del state, problem, train
  return np.arange(toy_runs.NUM_TRAIN)[:: rng.integers(-2, 0)]


@pytest.mark.ci
@pytest.mark.slow(unless=("orders_of_the_method",))
@pytest.mark.parametrize(
  "method",
  [_TUNED, baselines.uniform()._replace(sample=_in_reverse)],
  ids=["orders_known", "orders_of_the_method"],
)
def test_streamed_runs_end_with_the_same_bytes(tmp_path, monkeypatch, method):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  # An epoch has five batches, or two if it takes every second row.
  settings = {"seeds": (0, 1), "num_steps": 18, "log_every": 6, "eval_every": 6}
  settings |= {"steps_per_call": 1, "checkpoint_every": 4}
  for data in ("resident", "stream"):
    toy_runs.train(tmp_path / data, method, data=data, **settings)
  # Step 7, counted from 0, is not in the first epoch, and is three steps after a
  # checkpoint.
  with monkeypatch.context() as patch:
    toy_runs.interrupt(patch, at=7)
    with pytest.raises(KeyboardInterrupt):
      toy_runs.train(tmp_path / "continued", method, data="stream", **settings)
  toy_runs.train(tmp_path / "continued", method, data="stream", **settings)
  expected = toy_runs.outcome(tmp_path / "resident")
  for folder in ("stream", "continued"):
    assert toy_runs.outcome(tmp_path / folder) == expected


class _Generated:
  """A source that makes rows when they are read, and counts them."""

  dtype = np.dtype(np.float32)

  def __init__(self, size):
    self.shape, self.num_read = (size, 4), 0
    self.fingerprint = f"generated {size}"
    self._lock = threading.Lock()

  def __len__(self):
    return self.shape[0]

  def __getitem__(self, rows):
    numbers = np.arange(len(self))[rows]
    with self._lock:
      self.num_read += len(numbers)
    return np.stack([np.sin(numbers + i) for i in range(4)], axis=1).astype(np.float32)


def _batch_counter(monkeypatch):
  """Returns a list whose only item tracks the largest number of batches in memory."""
  alive, most, original = set(), [0], device_data.OnHost.part

  def part(self, rows):
    result = original(self, rows)
    image = result.examples["image"]
    alive.add(id(image))
    weakref.finalize(image, alive.discard, id(image))
    most[0] = max(most[0], len(alive))
    return result

  monkeypatch.setattr(device_data.OnHost, "part", part)
  return most


def test_memory_is_bounded_for_a_set_of_ten_times_the_buffer(tmp_path, monkeypatch):
  batch_size, buffer = 8, streaming.STEPS_AHEAD + streaming.MOST_THREADS
  num_train = 10 * buffer * batch_size
  split = toy_runs.make_splits(num_train=num_train)
  source = _Generated(num_train)
  split = split._replace(train=split.train._replace(image=source))
  most = _batch_counter(monkeypatch)
  num_steps = num_train // batch_size
  settings = {"log_every": num_steps, "eval_every": num_steps}
  toy_runs.train(
    tmp_path, baselines.uniform(), [split], num_steps=num_steps, **settings
  )
  # Every row is read once, and a row or two more for the shapes of the model.
  assert num_train <= source.num_read <= num_train + 2
  # Queued calls also hold their batches.
  assert streaming.STEPS_AHEAD < most[0] <= buffer + run_lib.MOST_QUEUED + 1


def test_no_thread_is_left(tmp_path):
  toy_runs.train(tmp_path, _TUNED, data="stream")
  gc.collect()
  names = [thread.name for thread in threading.enumerate()]
  for thread in threading.enumerate():
    if thread.name.startswith("grain-prefetch"):
      thread.join(timeout=10)
  assert not [t for t in threading.enumerate() if t.name.startswith("grain")], names


def test_an_error_of_the_source_ends_the_run(tmp_path):
  class Broken(_Generated):
    def __getitem__(self, rows):
      if len(np.arange(len(self))[rows]) > 1:
        raise base.InputError("row 3 cannot be read")
      return super().__getitem__(rows)

  split = toy_runs.make_splits()
  source = Broken(toy_runs.NUM_TRAIN)
  split = split._replace(train=split.train._replace(image=source))
  with pytest.raises(base.InputError, match="row 3 cannot be read"):
    toy_runs.train(tmp_path, baselines.uniform(), [split])


def test_grain_is_needed_to_stream(monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(
    base.InputError, match="needs the package grain: pip install grain"
  ):
    streaming.Stream(lambda rows: rows).start(1, lambda i: np.zeros((1, 1, 1, 1)))


def test_unknown_kind_of_data_raises(tmp_path):
  with pytest.raises(base.InputError, match="--data=disk: choose among auto, resident"):
    toy_runs.train(tmp_path, _TUNED, data="disk")
