"""Whole runs of `loop.train`: every method, several devices, resumption."""

import contextlib
import logging
import signal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices
from l2rw_jax.training import evaluation
from l2rw_jax.training import interruption
from l2rw_jax.training import loop
from l2rw_jax.training import memorization
from l2rw_jax.training import sampling


def _with_weakly_typed_state():
  """A method with uniform weights and a state that is weakly typed at first."""
  uniform = baselines.uniform()

  def gradients(state, problem, inputs):
    result, _ = uniform.gradients((), problem, inputs)
    return result, base.pmean(result.losses.mean(), problem.axis_name)

  return base.Method(gradients, init=lambda *_: jnp.asarray(0.5))


# Each method is one object, so that its compiled functions are shared by the tests.
_METHODS = {
  "uniform": baselines.uniform(),
  "random": baselines.random(),
  "class_proportion": baselines.class_proportion(),
  "resampling": baselines.resampling(),
  "hard_mining": baselines.hard_mining(),
  "clean_only": baselines.clean_only(),
  "fine_tuning": baselines.fine_tuning(2),
  "l2rw": l2rw.l2rw(),
  "weak_state": _with_weakly_typed_state(),
}


def _assert_rows_close(actual, expected):
  assert [row.keys() for row in actual] == [row.keys() for row in expected]
  for row, expected_row in zip(actual, expected, strict=True):
    for name, value in row.items():
      np.testing.assert_allclose(value, expected_row[name], rtol=1e-5, atol=1e-5)


def _assert_tables_close(actual, expected):
  assert actual.keys() == expected.keys()
  for name, column in actual.items():
    np.testing.assert_allclose(column, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l2rw", "resampling"])
def test_runs_side_by_side_match_single_runs(tmp_path, name):
  method = _METHODS[name]
  together = toy_runs.train(tmp_path / "all", method, seeds=(0, 1, 2))
  params = toy_runs.saved_params(tmp_path / "all")
  for seed, result in enumerate(together):
    alone = tmp_path / f"alone-{seed}"
    (expected,) = toy_runs.train(alone, method, seeds=(seed,))
    for path, value in toy_runs.saved_params(alone).items():
      np.testing.assert_allclose(params[path][seed], value[0], rtol=1e-5, atol=1e-5)
    folder = f"seed-{seed}"
    _assert_rows_close(
      toy_runs.rows(tmp_path / "all" / folder), toy_runs.rows(alone / folder)
    )
    _assert_tables_close(result.weights, expected.weights)
    assert result.metrics["seed"] == seed


class _NormNet(nn.Module):
  """The smallest network with batch statistics shared over the devices."""

  axis_name: str | None = devices.AXIS_NAME

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(6)(x)
    x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
    return nn.Dense(toy_runs.CLASSES)(nn.tanh(x))


_NORM_MODEL = classifier.Classifier(_NormNet(), toy_runs.CLASSES)


@pytest.mark.ci
@pytest.mark.slow(unless=("8",))
@pytest.mark.parametrize("num_meta", [8, 5])  # Two and eight do not divide five.
def test_one_two_and_eight_devices_agree(tmp_path, num_meta):
  splits = [toy_runs.make_splits(num_train=60, num_meta=num_meta)]
  results = {
    count: toy_runs.train(
      tmp_path / str(count),
      _METHODS["l2rw"],
      splits,
      _NORM_MODEL,
      batch_size=16,
      num_devices=count,
    )[0]
    for count in (1, 2, 8)
  }
  one = results.pop(1)
  assert 0 < (one.weights["mean_weight"] > 0).sum() < 60
  for count, result in results.items():
    np.testing.assert_allclose(
      result.metrics["last"]["loss"], one.metrics["last"]["loss"], rtol=1e-5
    )
    _assert_tables_close(result.weights, one.weights)
    _assert_rows_close(
      toy_runs.rows(tmp_path / str(count) / "seed-0"),
      toy_runs.rows(tmp_path / "1" / "seed-0"),
    )


@pytest.mark.ci
def test_finished_run_is_not_repeated(tmp_path, monkeypatch):
  method = _METHODS["l2rw"]
  first = toy_runs.train(tmp_path, method, seeds=(0, 1, 2))
  times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  monkeypatch.setattr(sampling.Sampler, "next", None)
  second = toy_runs.train(tmp_path, method, seeds=(0, 1, 2))
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times
  for one, other in zip(first, second, strict=True):
    assert one.metrics == other.metrics
    _assert_tables_close(one.weights, other.weights)


def test_reading_a_finished_run_of_another_method_is_logged(tmp_path, caplog):
  caplog.set_level(logging.WARNING, logger="absl")
  (first,) = toy_runs.train(tmp_path, _METHODS["uniform"], num_steps=1)
  assert not caplog.messages
  (second,) = toy_runs.train(tmp_path, _METHODS["l2rw"], num_steps=1)
  assert second.metrics == first.metrics
  (message,) = caplog.messages
  assert f"the results of the finished runs in {tmp_path} are read" in message
  assert "The model, the method and the optimizer are not compared." in message


def test_a_run_without_accuracy_stops_at_the_first_evaluation(tmp_path):
  config = config_lib.Config(9, batch_size=8, num_devices=1, eval_every=2)
  with pytest.raises(base.InputError, match="no evaluator computes accuracy; add"):
    loop.train(
      config,
      toy_runs.MODEL,
      _METHODS["uniform"],
      toy_runs.OPTIMIZER,
      [toy_runs.make_splits()],
      tmp_path,
      evaluators=(evaluation.equal_opportunity,),
    )
  assert [row["step"] for row in toy_runs.rows(tmp_path / "seed-0")] == [2]


def test_a_signal_before_the_first_step_does_not_repeat_the_probes(
  tmp_path, monkeypatch
):
  def train():
    probes = [memorization.accuracy]
    return toy_runs.train(tmp_path, _METHODS["uniform"], probes=probes, num_steps=3)

  def interrupted(_):
    signal.raise_signal(signal.SIGINT)
    return contextlib.nullcontext(lambda: True)

  # Shells start commands in the background with SIGINT ignored.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(interruption, "agreed", interrupted)
      train()
  finally:
    signal.signal(signal.SIGINT, before)
  assert toy_runs.saved(tmp_path)[0] == 0
  (result,) = train()
  assert result.metrics["probes"]["step"] == [0, 3]


@pytest.mark.ci(unless=("uniform",))
@pytest.mark.slow(unless=("uniform", "l2rw", "class_proportion"))
@pytest.mark.parametrize("name", list(_METHODS))
def test_every_method_runs_and_compiles_once(tmp_path, caplog, monkeypatch, name):
  compiled = []  # The functions that were compiled before each step.
  original = sampling.Sampler.next

  def count(self, step):
    messages = [r.getMessage() for r in caplog.records]
    compiled.append([m for m in messages if m.startswith("Compiling")])
    return original(self, step)

  monkeypatch.setattr(sampling.Sampler, "next", count)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    results = toy_runs.train(
      tmp_path, _METHODS[name], seeds=(0, 1), num_steps=11, eval_every=1
    )
  assert len(compiled) == 11 and compiled[1]
  # An epoch has five steps. Nothing is compiled after the first step, not even at the
  # first or last step of an epoch.
  assert compiled[-1][len(compiled[1]) :] == []
  for result in results:
    assert np.isfinite(result.metrics["last"]["loss"])
    assert result.weights["seen"].sum() == 11 * 8


@pytest.mark.ci
# The first, a middle and the last step.
@pytest.mark.parametrize("interrupted_step", [0, 2, 6])
def test_interrupted_run_with_batch_statistics_ends_with_the_same_bytes(
  tmp_path, monkeypatch, whole_run, interrupted_step
):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, interrupted_step)
    _train_norm_net(tmp_path)
  _train_norm_net(tmp_path)
  assert toy_runs.outcome(tmp_path) == toy_runs.outcome(whole_run)
  step, arrays = toy_runs.saved(tmp_path)
  expected_step, expected = toy_runs.saved(whole_run)
  assert step == expected_step == 7
  assert any("batch_stats" in path for path in arrays)
  for path, array in arrays.items():
    np.testing.assert_array_equal(array, expected[path])


def _train_norm_net(folder):
  splits = [toy_runs.make_splits(num_train=30)]
  return toy_runs.train(
    folder, _METHODS["random"], splits, _NORM_MODEL, checkpoint_every=2
  )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  """The folder of a run that was not interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir, "_commit", lambda: "unknown")
    _train_norm_net(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adacore", "random_fixed"])
def test_interrupted_coreset_run_ends_with_the_same_bytes(tmp_path, monkeypatch, name):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  # Two passes over 16 of 40 examples in batches of 8 take four steps, and then the next
  # selection follows.
  methods = {
    "adacore": adacore.adacore(0.4, 2, greedy="stochastic"),
    "random_fixed": adacore.random_subset(0.4, None),
  }
  method = methods[name]
  toy_runs.train(tmp_path / "whole", method, num_steps=11, checkpoint_every=3)
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, 5)  # The second selection was before step 4.
    toy_runs.train(tmp_path / "run", method, num_steps=11, checkpoint_every=3)
  toy_runs.train(tmp_path / "run", method, num_steps=11, checkpoint_every=3)
  whole, run = (toy_runs.outcome(tmp_path / name) for name in ("whole", "run"))
  assert run == whole
