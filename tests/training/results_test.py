"""The files of a finished run."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import results

_UNIFORM, _L2RW = baselines.uniform(), l2rw.l2rw()


def test_content_of_results_and_weights(tmp_path):
  (result,) = toy_runs.train(tmp_path, _L2RW)
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
  # Five batches are an epoch, and two more belong to the next one.
  assert sorted(result.weights["seen"]) == [1] * 24 + [2] * 16
  total = np.nansum(result.weights["mean_weight"] * result.weights["seen"])
  np.testing.assert_allclose(total, 7 * 8, rtol=1e-5)


def test_hash_depends_on_the_parameters(tmp_path):
  runs = [
    toy_runs.train(tmp_path / name, _UNIFORM, seeds=(seed,))[0]
    for name, seed in (("a", 0), ("b", 0), ("c", 1))
  ]
  hashes = [run.metrics["params_sha256"] for run in runs]
  assert hashes[0] == hashes[1] != hashes[2]


def test_statistics_of_every_name_and_type_are_read_back(tmp_path):
  def report(_):
    values = np.arange(toy_runs.NUM_TRAIN)
    return {"file": values, "allow_pickle": jnp.asarray(values, jnp.bfloat16)}

  method = _UNIFORM._replace(report=report)
  (result,) = toy_runs.train(tmp_path, method, num_steps=1)
  assert result.statistics.keys() == {"file", "allow_pickle"}
  for column in result.statistics.values():
    np.testing.assert_array_equal(column, np.arange(toy_runs.NUM_TRAIN))


class _KeyedModel(NamedTuple):
  """The toy model with a PRNG key in its variables."""

  def __hash__(self):
    return 1

  def check(self, *args):
    toy_runs.MODEL.check(*args)

  def init(self, key, batch):
    params, _ = toy_runs.MODEL.init(key, batch)
    return params, {"key": jax.random.key(5)}

  def problem(self, **settings):
    problem = toy_runs.MODEL.problem(**settings)

    def forward(params, state, batch, key, train):
      return problem.forward(params, {}, batch, key, train)[0], state

    return dataclasses.replace(problem, forward=forward, features=None, head=None)


def test_a_run_with_a_key_in_its_variables_is_read_again(tmp_path):
  for _ in range(2):
    (result,) = toy_runs.train(tmp_path, _UNIFORM, model=_KeyedModel(), num_steps=1)
    assert jax.random.key_data(result.model_state["key"]).tolist() == [0, 5]


def test_damaged_file_is_named_and_written_again(tmp_path, caplog):
  toy_runs.train(tmp_path, _UNIFORM)
  (tmp_path / "seed-0" / "weights.csv").write_text("index\n")
  with pytest.raises(base.InputError, match=r"weights\.csv is damaged"):
    results.read(tmp_path / "seed-0")
  caplog.set_level("WARNING", logger="absl")
  toy_runs.train(tmp_path, _UNIFORM)
  (message,) = [m for m in caplog.messages if "damaged" in m]
  assert "weights.csv" in message and "\n" not in message
