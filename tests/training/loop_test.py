"""Whole runs of `loop.train`, tiny: every method, device and run gets its due."""

import logging

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import resnet
from l2rw_jax.training import devices
from l2rw_jax.training import sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _remembering():
  """Uniform weights, and a state that begins as a mere Python number."""
  uniform = baselines.uniform()

  def gradients(state, problem, inputs):
    found, _ = uniform.gradients((), problem, inputs)
    return found, base.pmean(found.losses.mean(), problem.axis_name)

  return base.Method(gradients, init=lambda *_: jnp.asarray(0.5))


# One object each: what was compiled for it serves every test.
_METHODS = {
  "uniform": baselines.uniform(),
  "random": baselines.random(),
  "class_proportion": baselines.class_proportion(),
  "resampling": baselines.resampling(),
  "hard_mining": baselines.hard_mining(),
  "clean_only": baselines.clean_only(),
  "fine_tuning": baselines.fine_tuning(2),
  "l2rw": l2rw.l2rw(),
  "remembering": _remembering(),
}


def _assert_rows_close(actual, expected):
  assert [row.keys() for row in actual] == [row.keys() for row in expected]
  for ours, theirs in zip(actual, expected, strict=True):
    for name, value in ours.items():
      np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-5)


def _assert_tables_close(actual, expected):
  assert actual.keys() == expected.keys()
  for name, column in actual.items():
    np.testing.assert_allclose(column, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["l2rw", "resampling"])
def test_runs_side_by_side_are_the_runs_alone(tmp_path, name):
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


@pytest.mark.parametrize("num_meta", [8, 5])  # Five do not divide among devices.
def test_one_two_and_eight_devices_agree(tmp_path, num_meta):
  model = classifier.Classifier(_NormNet(), toy_runs.CLASSES)
  splits = [toy_runs.make_splits(num_train=60, num_meta=num_meta)]
  results = {
    count: toy_runs.train(
      tmp_path / str(count),
      _METHODS["l2rw"],
      splits,
      model,
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


def test_a_batch_that_does_not_divide_names_the_flags(tmp_path):
  message = "--batch_size=8 does not divide among --num_devices=3"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path / "run", _METHODS["uniform"], num_devices=3)
  assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
  method = _METHODS["l2rw"]
  first = toy_runs.train(tmp_path, method, seeds=(0, 1, 2))
  times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  monkeypatch.setattr(sampling.Sampler, "next", None)
  second = toy_runs.train(tmp_path, method, seeds=(0, 1, 2))
  assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == times
  for one, other in zip(first, second, strict=True):
    assert one.metrics == other.metrics
    _assert_tables_close(one.weights, other.weights)


@pytest.mark.parametrize("name", list(_METHODS))
def test_every_method_runs_and_compiles_once(tmp_path, caplog, monkeypatch, name):
  compiled = []
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
  # Five steps an epoch: a new epoch, and its last step, compile nothing either.
  assert compiled[-1][len(compiled[1]) :] == []
  for result in results:
    assert np.isfinite(result.metrics["last"]["loss"])
    assert result.weights["seen"].sum() == 11 * 8


@pytest.mark.parametrize("at", [0, 2, 6])  # Before, between and at the end.
def test_an_interrupted_resnet_ends_with_the_same_bytes(
  tmp_path, monkeypatch, resnet_run, at
):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, at)
    _train_resnet(tmp_path)
  _train_resnet(tmp_path)
  assert toy_runs.outcome(tmp_path) == toy_runs.outcome(resnet_run)
  step, arrays = toy_runs.saved(tmp_path)
  expected_step, expected = toy_runs.saved(resnet_run)
  assert step == expected_step == 7
  assert any("batch_stats" in path for path in arrays)
  for path, array in arrays.items():
    np.testing.assert_array_equal(array, expected[path])


_RESNET = classifier.Classifier(
  resnet.ResNet(toy_runs.CLASSES, blocks=1, width=4), toy_runs.CLASSES
)


def _train_resnet(folder):
  splits = [toy_runs.make_splits(num_train=30, shape=(4, 4, 1))]
  return toy_runs.train(folder, _METHODS["random"], splits, _RESNET, checkpoint_every=2)


@pytest.fixture(scope="module")
def resnet_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("resnet")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(workdir, "_commit", lambda: "unknown")
    _train_resnet(folder)
  return folder


def test_what_results_json_and_the_tables_say(tmp_path):
  (result,) = toy_runs.train(tmp_path, _METHODS["l2rw"])
  folder = tmp_path / "seed-0"
  metrics = workdir.read_record(folder / "results.json")
  assert metrics == result.metrics
  assert metrics["data"] == "fingerprint-0"
  assert len(metrics["params_sha256"]) == 64
  assert (metrics["seed"], metrics["num_steps"]) == (0, 7)
  assert metrics["device_count"] == 8 and metrics["jax"] == jax.__version__
  tests = [row for row in toy_runs.rows(folder) if "test/accuracy" in row]
  assert [row["step"] for row in tests] == [3, 6, 7]
  assert metrics["last"] == {
    "accuracy": tests[-1]["test/accuracy"],
    "loss": tests[-1]["test/loss"],
  }
  best = max(row["test/accuracy"] for row in tests)
  assert metrics["best_accuracy"] == best
  assert metrics["best_step"] == next(
    row["step"] for row in tests if row["test/accuracy"] == best
  )
  header, *lines = (folder / "weights.csv").read_text().splitlines()
  assert header == (
    "index,source_index,label,true_label,mean_weight,last_weight,seen,rejected"
  )
  assert len(lines) == toy_runs.NUM_TRAIN
  train = toy_runs.make_splits().train
  for name in ("index", "source_index", "label", "true_label"):
    np.testing.assert_array_equal(result.weights[name], getattr(train, name))
  # Five batches are an epoch; two more begin the next.
  assert sorted(result.weights["seen"]) == [1] * 24 + [2] * 16
  total = np.nansum(result.weights["mean_weight"] * result.weights["seen"])
  np.testing.assert_allclose(total, 7 * 8, rtol=1e-5)


def test_the_hash_tells_parameters_apart(tmp_path):
  runs = [
    toy_runs.train(tmp_path / name, _METHODS["uniform"], seeds=(seed,))[0]
    for name, seed in (("a", 0), ("b", 0), ("c", 1))
  ]
  hashes = [run.metrics["params_sha256"] for run in runs]
  assert hashes[0] == hashes[1] != hashes[2]


def test_metrics_in_bfloat16_are_averaged_in_float32(tmp_path):
  uniform = baselines.uniform()

  def gradients(state, problem, inputs):
    found, state = uniform.gradients(state, problem, inputs)
    told = jnp.where(inputs.step == 0, 256, 1).astype(jnp.bfloat16)
    return found._replace(metrics={**found.metrics, "told": told}), state

  method = uniform._replace(gradients=gradients)
  toy_runs.train(tmp_path, method, num_steps=7, log_every=7, eval_every=7)
  rows = toy_runs.rows(tmp_path / "seed-0")
  # In bfloat16, 256 + 1 is 256.
  assert [r["train/told"] for r in rows if "train/told" in r] == [
    pytest.approx((256 + 6) / 7, rel=1e-6)
  ]
