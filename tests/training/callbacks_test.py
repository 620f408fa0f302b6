"""Failures, checkpoints and metrics of runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import checkpointing
from l2rw_jax.io import metric_writer
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import callbacks
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop
from l2rw_jax.training import sampling

_UNIFORM = baselines.uniform()
_L2RW = l2rw.l2rw()


def _first_step_of(row, seed=0):
  """The step of the first epoch whose batch has this row of the training set."""
  order = sampling.generator(seed, "order", 0).permutation(toy_runs.NUM_TRAIN)
  return int(np.flatnonzero(order == row)[0]) // 8


_HUGE = 3e38  # A finite pixel; the loss of its image is not finite.


def _broken_at(step, seed=0):
  """Splits with one image whose loss is not finite; `step` is the first to use it."""
  splits = toy_runs.make_splits(seed)
  row = next(r for r in range(toy_runs.NUM_TRAIN) if _first_step_of(r, seed) == step)
  splits.train.image[row] = _HUGE
  return splits


def _fail(folder, method, splits, pattern, **settings):
  with pytest.raises(base.InputError, match=pattern) as error:
    toy_runs.train(folder, method, splits, **settings)
  assert "\n" not in str(error.value)
  return str(error.value)


def _assert_last_good_params_are_saved(folder, other, method, step):
  """Compares the checkpoint with a run that ends before the failing step."""
  toy_runs.train(other, method, num_steps=step)
  good_step, good = toy_runs.saved(other)
  saved_step, saved = toy_runs.saved(folder)
  assert saved_step == good_step == step
  for path, array in good.items():
    if ".params" in path or ".opt_state" in path or path.endswith("[0].step"):
      np.testing.assert_array_equal(saved[path], array)


@pytest.mark.ci(unless=("uniform-100", "l2rw-100"))
@pytest.mark.parametrize("log_every", [1, 100])  # Detected at once, or at the end.
@pytest.mark.parametrize("method", [_UNIFORM, _L2RW], ids=["uniform", "l2rw"])
def test_non_finite_loss_stops_the_run(tmp_path, method, log_every):
  splits, folder = [_broken_at(step=3)], tmp_path / "run"
  settings = {"log_every": log_every, "eval_every": log_every}
  pattern = "toy, seed 0, step 3: 1 of 8 losses are NaN or infinite;"
  message = _fail(folder, method, splits, pattern, **settings)
  assert f"in {folder}/checkpoints." in message and "--workdir" in message
  _assert_last_good_params_are_saved(folder, tmp_path / "good", method, 3)
  assert max([row["step"] for row in toy_runs.rows(folder / "seed-0")], default=0) <= 3
  assert not (folder / "seed-0" / "results.json").exists()
  before = toy_runs.files(folder)
  assert _fail(folder, method, splits, ".", **settings) == message
  assert toy_runs.files(folder) == before


def test_message_counts_all_non_finite_losses(tmp_path):
  splits = toy_runs.make_splits()
  rows = [r for r in range(toy_runs.NUM_TRAIN) if _first_step_of(r) == 2]
  splits.train.image[rows[:3]] = _HUGE
  _fail(tmp_path, _UNIFORM, [splits], "seed 0, step 2: 3 of 8 losses are")


def test_message_names_the_first_run_that_fails(tmp_path):
  splits = [toy_runs.make_splits(0), _broken_at(4, 1), _broken_at(2, 2)]
  settings = {"seeds": (0, 1, 2), "log_every": 9, "eval_every": 9}
  _fail(tmp_path, _UNIFORM, splits, "seed 2, step 2: 1 of 8 losses", **settings)


def test_failure_at_the_first_step_saves_the_initial_parameters(tmp_path):
  folder = tmp_path / "run"
  message = _fail(folder, _UNIFORM, [_broken_at(step=0)], "seed 0, step 0: 1")
  step, saved = toy_runs.saved(folder)
  assert step == 0
  assert all(np.isfinite(x).all() for p, x in saved.items() if ".params" in p)
  before = toy_runs.files(folder)
  assert _fail(folder, _UNIFORM, [_broken_at(step=0)], ".") == message
  assert toy_runs.files(folder) == before


def test_failure_right_after_a_checkpoint_is_reported_again(tmp_path):
  folder, splits = tmp_path / "run", [_broken_at(step=2)]
  settings = {"checkpoint_every": 2, "log_every": 9, "eval_every": 9}
  message = _fail(folder, _UNIFORM, splits, "step 2: 1 of 8 losses", **settings)
  _assert_last_good_params_are_saved(folder, tmp_path / "good", _UNIFORM, 2)
  before = toy_runs.files(folder)
  assert _fail(folder, _UNIFORM, splits, ".", **settings) == message
  assert toy_runs.files(folder) == before


def _nan_gradient_at(step):
  def gradients(state, problem, inputs):
    result, state = _UNIFORM.gradients(state, problem, inputs)
    factor = jnp.where(inputs.step == step, jnp.nan, 1.0)
    grads = jax.tree.map(lambda g: g * factor, result.grads)
    return result._replace(grads=grads), state

  return _UNIFORM._replace(gradients=gradients)


def test_non_finite_gradient_stops_the_run(tmp_path):
  _fail(tmp_path / "run", _nan_gradient_at(4), None, "step 4: the update is NaN")
  _assert_last_good_params_are_saved(tmp_path / "run", tmp_path / "good", _UNIFORM, 4)


def test_non_finite_meta_loss_is_reported(tmp_path):
  splits = toy_runs.make_splits()
  splits.meta.image[0] = _HUGE
  _fail(tmp_path, _L2RW, [splits], "seed 0, step 0: a meta loss, or the objec")


def test_too_large_learning_rate_is_reported(tmp_path):
  config = config_lib.Config(num_steps=50, batch_size=8, num_devices=1)
  with pytest.raises(base.InputError, match=r"NaN or infinite.*Lower --learning_rate"):
    loop.train(
      config,
      toy_runs.MODEL,
      _UNIFORM,
      optax.sgd(1e20),
      [toy_runs.make_splits()],
      tmp_path,
    )


def test_checkpoint_of_another_model_raises(tmp_path):
  toy_runs.train(tmp_path, _UNIFORM, num_steps=2)
  (tmp_path / "seed-0" / "results.json").unlink()
  model = toy_runs.MODEL._replace(model=toy_runs.MODEL.model.clone(hidden=(5,)))
  before = toy_runs.files(tmp_path)
  message = r"another model, method or optimizer.*--workdir"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path, _UNIFORM, model=model, num_steps=2)
  assert toy_runs.files(tmp_path) == before


def test_errors_while_closing_do_not_hide_the_first_error(tmp_path, monkeypatch):
  def fail(what):
    def call(*args, **kwargs):
      raise base.InputError(what)

    return call

  closed = []
  original = checkpointing.Checkpointer.close
  monkeypatch.setattr(checkpointing.Checkpointer, "save", fail("no checkpoint"))
  monkeypatch.setattr(metric_writer.MetricWriter, "close", fail("no metrics"))
  monkeypatch.setattr(
    checkpointing.Checkpointer,
    "close",
    lambda self: (closed.append(self), original(self)),
  )
  with pytest.raises(base.InputError, match=re.escape("no checkpoint")):
    toy_runs.train(tmp_path, _UNIFORM, num_steps=1)
  assert len(closed) == 1


def test_bfloat16_metrics_are_averaged_in_float32(tmp_path):
  uniform = baselines.uniform()

  def gradients(state, problem, inputs):
    result, state = uniform.gradients(state, problem, inputs)
    values = jnp.where(inputs.step == 0, 256, 1).astype(jnp.bfloat16)
    return result._replace(metrics={**result.metrics, "value": values}), state

  method = uniform._replace(gradients=gradients)
  toy_runs.train(tmp_path, method, num_steps=7, log_every=7, eval_every=7)
  rows = toy_runs.rows(tmp_path / "seed-0")
  # In bfloat16, 256 + 1 is 256.
  assert [r["train/value"] for r in rows if "train/value" in r] == [
    pytest.approx((256 + 6) / 7, rel=1e-6)
  ]


def test_metrics_of_many_steps_are_joined_once(tmp_path, monkeypatch):
  joined = []
  concatenate = np.concatenate

  def counting(arrays, **options):
    result = concatenate(arrays, **options)
    joined.append(result.size)
    return result

  monkeypatch.setattr(callbacks.np, "concatenate", counting)
  with callbacks.Metrics([tmp_path / "0", tmp_path / "1"]) as metrics:
    for step in range(100):
      metrics.add({"loss": np.float32([[step], [-step]])})
    assert metrics.last("loss") == 0
    saved = metrics.to_json()
    metrics.write_means(100)
  assert sum(joined) <= 2 * 200
  assert saved["window"]["loss"]["values"][1] == [-step for step in range(100)]
  (row,) = toy_runs.rows(tmp_path / "1")
  assert row == {"step": 100, "train/loss": -49.5}
  with callbacks.Metrics([tmp_path / "0", tmp_path / "1"], 0, saved) as metrics:
    metrics.add({"loss": np.float32([[100], [100]])})
    metrics.write_means(101)
  (row,) = toy_runs.rows(tmp_path / "0")
  assert row == {"step": 101, "train/loss": 50}
