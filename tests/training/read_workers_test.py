"""Row sources that worker processes read."""

import multiprocessing
import os
import threading

import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.data import examples
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines


def _with_source(source):
  split = toy_runs.make_splits()
  return [split._replace(train=split.train._replace(image=source))]


@pytest.mark.slow
def test_worker_processes_read_the_same_examples(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  images = toy_runs.make_splits().train.image
  splits = _with_source(examples.View(images, np.arange(len(images))))
  # Hosts may have different numbers of workers, so `check_same` must not compare them.
  compared = []
  monkeypatch.setattr(
    processes, "check_same", lambda what, values: compared.append(dict(values))
  )
  for workers in (0, 2):
    toy_runs.train(
      tmp_path / str(workers), baselines.uniform(), splits, data_workers=workers
    )
  assert toy_runs.outcome(tmp_path / "2") == toy_runs.outcome(tmp_path / "0")
  assert not multiprocessing.active_children()
  first, second = ({**values, "folder": ""} for values in compared)
  assert first == second and first["data"] == "auto"


class _EndsWorkers(examples.View):
  """A source that ends the worker process that reads it."""

  def __getitem__(self, rows):
    if multiprocessing.parent_process() is not None:
      os._exit(1)
    return super().__getitem__(rows)


@pytest.mark.ci
def test_worker_that_ends_is_a_one_line_error(tmp_path):
  images = toy_runs.make_splits().train.image
  splits = _with_source(_EndsWorkers(images, np.arange(len(images))))
  with pytest.raises(base.InputError, match="--data_workers=1: a process that reads"):
    toy_runs.train(tmp_path, baselines.uniform(), splits, data_workers=1)


def test_workers_cannot_receive_locks_and_are_limited_in_number(tmp_path):
  images = toy_runs.make_splits().train.image
  source = examples.View(images, np.arange(len(images)))
  source.lock = threading.Lock()  # It cannot be pickled.
  splits = _with_source(source)
  for workers, message in ((1, "cannot be sent to other"), (9, "between 0 and 8")):
    with pytest.raises(base.InputError, match=f"--data_workers={workers}.* {message}"):
      toy_runs.train(tmp_path, baselines.uniform(), splits, data_workers=workers)
