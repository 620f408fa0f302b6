"""Runs without files, and methods that choose the order of the examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import run as run_lib
from l2rw_jax.training import sampling
from l2rw_jax.training import step as step_lib

_BATCHES = toy_runs.NUM_TRAIN // 8  # Batches in an epoch.
_STEPS = 2 * _BATCHES + 3


class _Toy:
  """A method that rotates the order by a new random number in every epoch."""

  def __init__(self):
    self.views: list[base.EpochView] = []
    self.method = baselines.uniform()._replace(
      gradients=self._gradients,
      init=lambda key, problem, params: {"roll": jnp.zeros((), jnp.int32), "steps": 0},
      refresh=self._refresh,
      sample=self._sample,
    )

  def _gradients(self, state, problem, inputs):
    result, _ = baselines.uniform().gradients((), problem, inputs)
    return result, {**state, "steps": state["steps"] + 1}

  def _refresh(self, state, problem, view):
    assert problem.num_examples == len(view.train["label"]) == toy_runs.NUM_TRAIN
    self.views.append(jax.device_get(view._replace(rng=None)))
    return {**state, "roll": jnp.int32(view.rng.integers(1, toy_runs.NUM_TRAIN))}

  def _sample(self, state, problem, train, rng):
    del problem, rng
    return np.roll(train["index"], int(state["roll"]))


def _visited(monkeypatch):
  """Records the rows of every step that is drawn after this call, by step."""
  drawn = {}
  original = sampling.Sampler.next

  def record(self, step):
    rows = original(self, step)
    drawn.setdefault(step, []).append(rows.train)
    return rows

  monkeypatch.setattr(sampling.Sampler, "next", record)
  return drawn


def _expected_rows(seed, step):
  epoch, offset = divmod(step, _BATCHES)
  roll = sampling.generator(seed, "refresh", epoch).integers(1, toy_runs.NUM_TRAIN)
  order = np.roll(np.arange(toy_runs.NUM_TRAIN), roll)
  return order[8 * offset : 8 * (offset + 1)]


def test_refresh_is_called_before_every_epoch(tmp_path, monkeypatch):
  drawn = _visited(monkeypatch)
  toy = _Toy()
  toy_runs.train(tmp_path, toy.method, seeds=(3, 5), num_steps=_STEPS)
  # In each epoch, the two runs are refreshed one after the other.
  assert [view.epoch for view in toy.views] == [0, 0, 1, 1, 2, 2]
  for step in range(_STEPS):
    (rows,) = drawn[step]
    for run, seed in enumerate((3, 5)):
      np.testing.assert_array_equal(rows[run], _expected_rows(seed, step))
  assert not np.array_equal(_expected_rows(3, 0), _expected_rows(5, 0))
  arrays = toy_runs.saved(tmp_path)[1]
  assert next(x for p, x in arrays.items() if "steps" in p).tolist() == [_STEPS] * 2


@pytest.mark.slow
def test_refresh_receives_parameters_and_training_set(tmp_path):
  toy = _Toy()
  toy_runs.train(tmp_path / "long", toy.method, seeds=(1,), num_steps=_STEPS)
  first, second, _ = toy.views
  toy_runs.train(tmp_path / "short", toy.method, seeds=(1,), num_steps=_BATCHES)
  saved = toy_runs.saved_params(tmp_path / "short")
  kernel = next(path for path in saved if "Dense_0" in path and "kernel" in path)
  kernels = [view.params["Dense_0"]["kernel"] for view in (first, second)]
  np.testing.assert_array_equal(kernels[1], saved[kernel][0])
  assert not np.array_equal(kernels[0], kernels[1])
  train = toy_runs.make_splits(1).train
  # Groups default to the true classes.
  train = train._replace(group=train.true_label)
  assert first.train.keys() == {"image", "label", "index", "group"}
  for name in first.train:
    np.testing.assert_array_equal(first.train[name], getattr(train, name))


# Training continues within the second epoch, or at its start.
@pytest.mark.ci
@pytest.mark.parametrize(("at", "saved", "epochs"), [(8, 7, [2]), (6, 5, [1, 2])])
def test_interrupted_epoch_continues_in_the_same_order(
  tmp_path, monkeypatch, at, saved, epochs
):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  toy = _Toy()

  def train(folder):
    toy_runs.train(
      folder, toy.method, seeds=(1,), num_steps=_STEPS, checkpoint_every=saved
    )

  train(tmp_path / "whole")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, at)
    train(tmp_path / "run")
  toy.views.clear()
  drawn = _visited(monkeypatch)
  train(tmp_path / "run")
  assert [view.epoch for view in toy.views] == epochs
  assert list(drawn) == list(range(saved, _STEPS))
  for step, (rows,) in drawn.items():
    np.testing.assert_array_equal(rows[0], _expected_rows(1, step))
  whole, run = (toy_runs.outcome(tmp_path / name) for name in ("whole", "run"))
  assert run == whole
  timings = [
    workdir.read_record(tmp_path / x / "timing.json") for x in ("whole", "run")
  ]
  starts = [0, _BATCHES, 2 * _BATCHES]
  assert [[step for step, _ in t["refreshes"]] for t in timings] == [starts, starts]


def test_new_epochs_compile_nothing(tmp_path, caplog, monkeypatch):
  counts = []
  original = sampling.Sampler.next

  def count(self, step):
    counts.append(sum(r.getMessage().startswith("Compiling") for r in caplog.records))
    return original(self, step)

  monkeypatch.setattr(sampling.Sampler, "next", count)
  with jax.log_compiles():
    toy_runs.train(tmp_path, _Toy().method, num_steps=_STEPS, eval_every=1)
  assert counts[1] > counts[0]
  # The first refresh of a trained state may compile functions.
  assert counts[2 * _BATCHES] == counts[-1] == counts[_BATCHES + 1]


def test_run_in_another_loop_matches_the_training_loop(tmp_path):
  method = baselines.uniform()
  toy_runs.train(tmp_path, method, seeds=(3, 5), num_steps=7)
  config = config_lib.Config(7, batch_size=8, seeds=(3, 5), num_devices=1)
  splits = [toy_runs.make_splits(seed) for seed in (3, 5)]
  run = run_lib.Run(config, toy_runs.MODEL, method, toy_runs.OPTIMIZER, splits)
  while run.step < config.num_steps:
    assert run.take_steps() == 1
  outputs = run.fetch()
  rows = [toy_runs.rows(tmp_path / f"seed-{seed}") for seed in (3, 5)]
  losses = [[r["train/loss"] for r in rs if "train/loss" in r] for rs in rows]
  assert run.fetch() == [] and step_lib.first_failed_run(run.failure()) is None
  for step, output in enumerate(outputs):
    assert output.weights.shape == (2, 1, 8)
    assert output.metrics["loss"].shape == (2, 1)
    for index in (0, 1):
      loss = output.metrics["loss"][index, 0]
      np.testing.assert_allclose(loss, losses[index][step], rtol=1e-5)
  kernel = run.snapshot(1).state.params["Dense_0"]["kernel"]
  saved = next(
    x
    for p, x in toy_runs.saved_params(tmp_path).items()
    if "Dense_0" in p and "kernel" in p
  )
  np.testing.assert_allclose(kernel, saved[1], rtol=1e-5, atol=1e-6)
