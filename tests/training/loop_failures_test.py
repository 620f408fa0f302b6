"""Runs that cannot start, that diverge, or that lose their disk."""

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
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop
from l2rw_jax.training import sampling

_UNIFORM = baselines.uniform()
_L2RW = l2rw.l2rw()


@pytest.mark.parametrize(
  ("method", "data", "settings", "message"),
  [
    (_L2RW, {"num_meta": 0}, {}, "needs a clean meta set.*--num_meta.*--methods"),
    (_L2RW, {}, {"meta_batch_size": 9}, "--meta_batch_size=9.*8 clean examples"),
    (_L2RW, {}, {"meta_batch_size": 0}, "--meta_batch_size=0.*between 1"),
    (_UNIFORM, {"num_train": 7}, {}, "--batch_size=8 is larger than the 7 training"),
    (_UNIFORM, {}, {"num_devices": 9}, "--num_devices=9: this machine has 8 cpu"),
    (
      _UNIFORM,
      {},
      {"num_devices": 3},
      "--batch_size=8 does not divide among --num_dev",
    ),
  ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
  tmp_path, method, data, settings, message
):
  with pytest.raises(base.InputError, match=message) as error:
    toy_runs.train(tmp_path / "run", method, [toy_runs.make_splits(**data)], **settings)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "meta", "test"])
@pytest.mark.parametrize("label", [-1, toy_runs.CLASSES])
def test_a_label_out_of_range_is_found(tmp_path, part, label):
  splits = toy_runs.make_splits()
  getattr(splits, part).label[5] = label
  message = f"{part} of seed 0: example 5 has label {label}, classes are 0 to 2"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path / "run", _UNIFORM, [splits])
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "meta", "test"])
def test_a_bad_pixel_is_found(tmp_path, part):
  splits = toy_runs.make_splits()
  getattr(splits, part).image[5, 0] = np.nan
  with pytest.raises(base.InputError, match=f"1 of the {part} images of seed 0 .*5"):
    toy_runs.train(tmp_path / "run", _UNIFORM, [splits])
  assert not (tmp_path / "run").exists()


def test_splits_of_two_sizes_are_refused(tmp_path):
  splits = [toy_runs.make_splits(0), toy_runs.make_splits(1, num_train=48)]
  with pytest.raises(base.InputError, match="of one size; the train sets have 40 and"):
    toy_runs.train(tmp_path / "run", _UNIFORM, splits, seeds=(0, 1))
  splits = [toy_runs.make_splits(0), toy_runs.make_splits(1, num_meta=9)]
  with pytest.raises(base.InputError, match="of one size; the meta sets have 8 and 9"):
    toy_runs.train(tmp_path / "run", _L2RW, splits, seeds=(0, 1))
  toy_runs.train(tmp_path / "other", _UNIFORM, splits, seeds=(0, 1), num_steps=1)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "what"),
  [
    (lambda image: image[:, :2], r"one image shape.* \(2,\) and \(4,\)"),
    (lambda image: image.astype(np.float16), "one image dtype.* float16 and float32"),
  ],
)
def test_images_of_two_kinds_are_refused(tmp_path, change, what):
  splits = [toy_runs.make_splits(seed) for seed in (0, 1)]
  train = splits[1].train._replace(image=change(splits[1].train.image))
  splits[1] = splits[1]._replace(train=train)
  with pytest.raises(base.InputError, match=what) as error:
    toy_runs.train(tmp_path / "run", _UNIFORM, splits, seeds=(0, 1))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


def _first_step_of(row, seed=0):
  """The step whose batch holds a row of the training set; in the first epoch."""
  order = sampling.generator(seed, "order", 0).permutation(toy_runs.NUM_TRAIN)
  return int(np.flatnonzero(order == row)[0]) // 8


_HUGE = 3e38  # Finite, as images must be; its losses are not.


def _broken_at(step, seed=0):
  """Splits with one bad image, first met at `step`."""
  splits = toy_runs.make_splits(seed)
  row = next(r for r in range(toy_runs.NUM_TRAIN) if _first_step_of(r, seed) == step)
  splits.train.image[row] = _HUGE
  return splits


def _fail(folder, method, splits, message, **settings):
  with pytest.raises(base.InputError, match=message) as error:
    toy_runs.train(folder, method, splits, **settings)
  assert "\n" not in str(error.value)
  return str(error.value)


def _assert_good_params_kept(folder, other, method, step):
  """They are those of a run that stopped one step before the bad one."""
  toy_runs.train(other, method, num_steps=step)
  good_step, good = toy_runs.saved(other)
  saved_step, saved = toy_runs.saved(folder)
  assert saved_step == good_step == step
  for path, array in good.items():
    if ".params" in path or ".opt_state" in path or path.endswith("[0].step"):
      np.testing.assert_array_equal(saved[path], array)


@pytest.mark.parametrize("log_every", [1, 100])  # Noticed at once, or at the end.
@pytest.mark.parametrize("method", [_UNIFORM, _L2RW], ids=["uniform", "l2rw"])
def test_a_nan_in_the_data_stops_the_run_where_it_was_good(tmp_path, method, log_every):
  splits, folder = [_broken_at(step=3)], tmp_path / "run"
  settings = {"log_every": log_every, "eval_every": log_every}
  message = "toy, seed 0, step 3: 1 of 8 losses are NaN or infinite;"
  said = _fail(folder, method, splits, message, **settings)
  assert f"in {folder}/checkpoints." in said and "--workdir" in said
  _assert_good_params_kept(folder, tmp_path / "good", method, 3)
  assert max([row["step"] for row in toy_runs.rows(folder / "seed-0")], default=0) <= 3
  assert not (folder / "seed-0" / "results.json").exists()
  before = toy_runs.files(folder)
  assert _fail(folder, method, splits, ".", **settings) == said
  assert toy_runs.files(folder) == before


def test_every_bad_loss_of_the_step_is_counted(tmp_path):
  splits = toy_runs.make_splits()
  rows = [r for r in range(toy_runs.NUM_TRAIN) if _first_step_of(r) == 2]
  splits.train.image[rows[:3]] = _HUGE
  _fail(tmp_path, _UNIFORM, [splits], "seed 0, step 2: 3 of 8 losses are")


def test_the_first_run_to_fail_is_named(tmp_path):
  splits = [toy_runs.make_splits(0), _broken_at(4, 1), _broken_at(2, 2)]
  settings = {"seeds": (0, 1, 2), "log_every": 9, "eval_every": 9}
  _fail(tmp_path, _UNIFORM, splits, "seed 2, step 2: 1 of 8 losses", **settings)


def test_a_failure_at_the_very_first_step_keeps_the_initial_parameters(tmp_path):
  folder = tmp_path / "run"
  said = _fail(folder, _UNIFORM, [_broken_at(step=0)], "seed 0, step 0: 1")
  step, saved = toy_runs.saved(folder)
  assert step == 0
  assert all(np.isfinite(x).all() for p, x in saved.items() if ".params" in p)
  before = toy_runs.files(folder)
  assert _fail(folder, _UNIFORM, [_broken_at(step=0)], ".") == said
  assert toy_runs.files(folder) == before


def test_a_failure_right_after_a_checkpoint_says_the_same_again(tmp_path):
  folder, splits = tmp_path / "run", [_broken_at(step=2)]
  settings = {"checkpoint_every": 2, "log_every": 9, "eval_every": 9}
  said = _fail(folder, _UNIFORM, splits, "step 2: 1 of 8 losses", **settings)
  _assert_good_params_kept(folder, tmp_path / "good", _UNIFORM, 2)
  before = toy_runs.files(folder)
  assert _fail(folder, _UNIFORM, splits, ".", **settings) == said
  assert toy_runs.files(folder) == before


def _nan_gradient_at(step):
  def gradients(state, problem, inputs):
    found, state = _UNIFORM.gradients(state, problem, inputs)
    factor = jnp.where(inputs.step == step, jnp.nan, 1.0)
    return found._replace(grads=jax.tree.map(lambda g: g * factor, found.grads)), state

  return _UNIFORM._replace(gradients=gradients)


def test_a_nan_gradient_of_good_losses_stops_the_run(tmp_path):
  _fail(tmp_path / "run", _nan_gradient_at(4), None, "step 4: the update is NaN")
  _assert_good_params_kept(tmp_path / "run", tmp_path / "good", _UNIFORM, 4)


def test_a_bad_clean_image_spoils_the_direction(tmp_path):
  splits = toy_runs.make_splits()
  splits.meta.image[0] = _HUGE
  _fail(tmp_path, _L2RW, [splits], "seed 0, step 0: a clean loss, or the objec")


def test_a_learning_rate_too_large_is_named(tmp_path):
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


def test_another_model_in_the_folder_is_refused(tmp_path):
  toy_runs.train(tmp_path, _UNIFORM, num_steps=2)
  (tmp_path / "seed-0" / "results.json").unlink()
  model = toy_runs.MODEL._replace(model=toy_runs.MODEL.model.clone(hidden=(5,)))
  before = toy_runs.files(tmp_path)
  with pytest.raises(base.InputError, match=r"another model or method.*--workdir"):
    toy_runs.train(tmp_path, _UNIFORM, model=model, num_steps=2)
  assert toy_runs.files(tmp_path) == before


def test_the_first_complaint_is_the_one_that_is_heard(tmp_path, monkeypatch):
  def refuse(what):
    def call(*args, **kwargs):
      raise base.InputError(what)

    return call

  closed = []
  original = checkpointing.Checkpointer.close
  monkeypatch.setattr(checkpointing.Checkpointer, "save", refuse("no checkpoint"))
  monkeypatch.setattr(metric_writer.MetricWriter, "close", refuse("no metrics"))
  monkeypatch.setattr(
    checkpointing.Checkpointer,
    "close",
    lambda self: (closed.append(self), original(self)),
  )
  with pytest.raises(base.InputError, match=re.escape("no checkpoint")):
    toy_runs.train(tmp_path, _UNIFORM, num_steps=1)
  assert len(closed) == 1
