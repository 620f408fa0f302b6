"""Statistics of every example, recorded in the loop with any method."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax import changed_loss
from l2rw_jax.audit import recorded_method
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import step as step_lib
from l2rw_jax.training import validation

_L2RW = audit.recording(l2rw.l2rw())
_UNIFORM = audit.recording(baselines.uniform())
_STEPS = {"num_steps": 10, "eval_every": 10, "log_every": 10}


def _assert_close(actual, expected, rtol=1e-4, atol=1e-4):
  assert set(actual) == set(expected)
  for name, values in expected.items():
    np.testing.assert_allclose(actual[name], values, rtol, atol, err_msg=name)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
  """Two runs of L2RW side by side, two epochs each, on one device."""
  folder = tmp_path_factory.mktemp("recorded") / "run"
  return folder, toy_runs.train(folder, _L2RW, seeds=(0, 1), **_STEPS)


@pytest.mark.slow
def test_recording_changes_nothing_else(recorded, tmp_path):
  folder, results = recorded
  plain = toy_runs.train(tmp_path, l2rw.l2rw(), seeds=(0, 1), **_STEPS)
  for seed, (result, other) in enumerate(zip(results, plain, strict=True)):
    assert result.metrics["params_sha256"] == other.metrics["params_sha256"]
    assert other.statistics == {}
    for name in ("metrics.jsonl", "weights.csv"):
      files = [f / f"seed-{seed}" / name for f in (folder, tmp_path)]
      assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_statistics_agree_with_what_the_loop_logs(recorded):
  folder, results = recorded
  for seed, result in enumerate(results):
    actual, weights = result.statistics, result.weights
    np.testing.assert_array_equal(actual["seen"], weights["seen"])
    assert (actual["seen"] == 2).all()
    np.testing.assert_allclose(actual["mean_weight"], weights["mean_weight"], 1e-5)
    share = weights["rejected"] / weights["seen"]
    np.testing.assert_array_equal(actual["zero_weight_share"], share)
    # The mean over all steps; each example was in two of them.
    rows = toy_runs.rows(folder / f"seed-{seed}")
    (row,) = [row for row in rows if "train/loss" in row]
    np.testing.assert_allclose(actual["mean_loss"].mean(), row["train/loss"], 1e-5)
    assert np.isfinite(actual["mean_score"]).all()
    # A mean of positive parts is at least the positive part of a mean.
    assert ((actual["mean_score"] <= 0) | (actual["mean_weight"] > 0)).all()
  one, other = (result.statistics["mean_loss"] for result in results)
  assert not np.allclose(one, other)


@pytest.mark.slow
def test_a_resumed_run_and_eight_devices_have_the_same_statistics(
  recorded, tmp_path, monkeypatch
):
  _, expected = recorded
  settings = {**_STEPS, "checkpoint_every": 3, "seeds": (0, 1)}
  with monkeypatch.context() as patch:
    toy_runs.interrupt(patch, 5)
    with pytest.raises(KeyboardInterrupt):
      toy_runs.train(tmp_path / "a", _L2RW, **settings)
  resumed = toy_runs.train(tmp_path / "a", _L2RW, **settings)
  again = toy_runs.train(tmp_path / "a", _L2RW, **settings)  # Read from the disk.
  for one, other, result in zip(resumed, again, expected, strict=True):
    _assert_close(one.statistics, result.statistics)
    _assert_close(other.statistics, one.statistics, rtol=0, atol=0)
  (many,) = toy_runs.train(tmp_path / "b", _L2RW, num_devices=8, **_STEPS)
  _assert_close(many.statistics, expected[0].statistics)


@pytest.mark.ci
def test_a_damaged_file_is_written_again(recorded, tmp_path):
  folder, (run, _) = recorded
  copy = shutil.copytree(folder, tmp_path / "run")
  path = copy / "seed-0" / "statistics.npz"
  path.write_bytes(path.read_bytes()[:-10])
  again, _ = toy_runs.train(copy, _L2RW, seeds=(0, 1), **_STEPS)
  _assert_close(again.statistics, run.statistics, rtol=0, atol=0)


def test_the_wrong_labels_come_first(tmp_path):
  splits = [toy_runs.make_splits(num_train=120)]
  method = changed_loss.changed_loss(
    baselines.uniform(), lambda outputs, batch, _: toy_runs.MODEL.loss(outputs, batch)
  )
  (run,) = toy_runs.train(
    tmp_path, audit.recording(method), splits, num_steps=60, eval_every=60
  )
  train = splits[0].train
  issues = audit.find_label_issues(run.statistics, train.label)
  is_wrong = train.label != train.true_label
  assert is_wrong[issues.index][: is_wrong.sum()].mean() > 0.9
  suggested = issues.suggested == train.true_label[issues.index]
  assert suggested[is_wrong[issues.index]].mean() > 0.9


def test_wrapped_methods_report_too():
  wrapped = changed_loss.changed_loss(_UNIFORM, lambda outputs, batch, counts: None)
  recorded = recorded_method.Recorded(audit.init(2, 2), ())
  state = changed_loss.State(np.int32(0), recorded)
  assert wrapped.report(state)["seen"].tolist() == [0, 0]


def test_sampling_is_that_of_the_wrapped_method():
  def sample(state, problem, train, rng):
    return np.array([state])

  method = baselines.uniform()._replace(sample=sample)
  recorded = recorded_method.Recorded(audit.init(2, 2), 7)
  assert audit.recording(method).sample(recorded, None, None, None) == [7]
  assert audit.recording(baselines.uniform()).sample is base.permutation


def _step(method, num_examples):
  """A training step `(state, batch) -> state`, and its first state."""
  problem = toy_runs.MODEL.problem(
    class_counts=jnp.ones(toy_runs.CLASSES, jnp.int32),
    num_examples=num_examples,
    num_steps=1,
  )
  example = {"image": np.zeros((1, 4), np.float32)}
  params, model_state = toy_runs.MODEL.init(jax.random.key(0), example)
  method_state = method.init(jax.random.key(0), problem, params)
  optimizer = toy_runs.OPTIMIZER
  state = step_lib.init_state(params, model_state, method_state, optimizer)

  def step(state, batch):
    return step_lib.train_step(
      state,
      batch,
      None,
      jax.random.key(0),
      problem=problem,
      method=method,
      optimizer=optimizer,
    )[0]

  return step, state


def _batch(pixel=1.0):
  return {
    "image": np.full((2, 4), pixel, np.float32),
    "label": np.array([0, 1], np.int32),
    "index": np.array([5, 3], np.int32),
  }


def _wrapped(method):
  changed = changed_loss.changed_loss(
    method, lambda outputs, batch, _: toy_runs.MODEL.loss(outputs, batch)
  )
  return validation.watched(changed, {})


@pytest.mark.parametrize("method", [_UNIFORM, _wrapped(_UNIFORM)])
def test_a_step_writes_only_the_rows_of_its_batch(method):
  size = 1009
  step, state = _step(method, size)
  closed = jax.make_jaxpr(step)(state, _batch())

  def of_all_examples(jaxpr):
    """The operations that compute an array with a row for each example."""
    for eqn in jaxpr.eqns:
      inner = [x for x in eqn.params.values() if hasattr(x, "jaxpr")]
      if inner:
        yield from (name for x in inner for name in of_all_examples(x.jaxpr))
      elif any(v.aval.shape[:1] == (size,) for v in eqn.outvars):
        yield eqn.primitive.name

  assert set(of_all_examples(closed.jaxpr)) == {"scatter"}


@pytest.mark.parametrize("method", [_UNIFORM, _wrapped(_UNIFORM)])
def test_a_step_that_is_not_finite_records_nothing(method):
  step, state = _step(method, 6)
  step = jax.jit(step)
  first = step(state, _batch())
  np.testing.assert_array_equal(
    method.report(first.method_state)["seen"], [0, 0, 0, 1, 0, 1]
  )
  failed = step(first, _batch(np.nan))
  assert failed.failure.step == 1
  chex.assert_trees_all_equal(failed.method_state, first.method_state)
  later = step(failed, _batch())
  chex.assert_trees_all_equal(later.method_state, first.method_state)


@pytest.mark.slow
def test_l2rw_without_reweighting_is_plain_training_and_reports_scores(tmp_path):
  methods = {
    "plain": baselines.uniform(),
    "measured": audit.recording(l2rw.l2rw(reweight=False)),
    "l2rw": audit.recording(l2rw.l2rw()),
  }
  runs = {
    name: toy_runs.train(tmp_path / name, method, num_steps=1)[0]
    for name, method in methods.items()
  }
  for name, leaf in runs["plain"].params["Dense_0"].items():
    measured = runs["measured"].params["Dense_0"][name]
    np.testing.assert_allclose(measured, leaf, rtol=1e-5, atol=1e-7)
    assert not np.allclose(runs["l2rw"].params["Dense_0"][name], leaf)
  scores = [runs[name].statistics["mean_score"] for name in ("measured", "l2rw")]
  np.testing.assert_allclose(*scores, rtol=1e-5)
  assert np.isfinite(scores[0]).sum() == 8
  weights = runs["measured"].weights["mean_weight"]
  np.testing.assert_allclose(weights[np.isfinite(weights)], np.ones(8))
