"""Settings and data that do not fit together."""

import logging

import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import config as config_lib

_UNIFORM = baselines.uniform()
_L2RW = l2rw.l2rw()


@pytest.mark.parametrize(
  ("method", "data", "settings", "message"),
  [
    (_L2RW, {"num_meta": 0}, {}, "needs a meta set of clean.*--num_meta.*--methods"),
    (_L2RW, {}, {"meta_batch_size": 9}, "--meta_batch_size=9.*8 clean examples"),
    (_L2RW, {}, {"meta_batch_size": 0}, "--meta_batch_size=0 must be an integer"),
    (_UNIFORM, {}, {"seeds": (0, 1)}, "there are 1 splits for 2 seeds; give one"),
    (_UNIFORM, {"num_train": 7}, {}, "--batch_size=8 is larger than the 7 training"),
    (_UNIFORM, {}, {"num_devices": 9}, "--num_devices=9: this machine has 8 cpu"),
    (
      _UNIFORM,
      {},
      {"num_devices": 3},
      "--batch_size=8 is not a multiple of --num_dev",
    ),
  ],
)
def test_invalid_settings_raise_before_anything_is_written(
  tmp_path, method, data, settings, message
):
  with pytest.raises(base.InputError, match=message) as error:
    toy_runs.train(tmp_path / "run", method, [toy_runs.make_splits(**data)], **settings)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "meta", "test"])
@pytest.mark.parametrize("label", [-1, toy_runs.CLASSES])
def test_label_out_of_range_raises(tmp_path, part, label):
  splits = toy_runs.make_splits()
  getattr(splits, part).label[5] = label
  message = f"{part} of seed 0: example 5 has label {label}, but classes are 0 to 2"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path / "run", _UNIFORM, [splits])
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["train", "meta", "test"])
def test_non_finite_pixel_raises(tmp_path, part):
  splits = toy_runs.make_splits()
  getattr(splits, part).image[5, 0] = np.nan
  with pytest.raises(base.InputError, match=f"1 of the {part} images of seed 0 .*5"):
    toy_runs.train(tmp_path / "run", _UNIFORM, [splits])
  assert not (tmp_path / "run").exists()


def test_splits_of_different_sizes_raise(tmp_path):
  splits = [toy_runs.make_splits(0), toy_runs.make_splits(1, num_train=48)]
  with pytest.raises(base.InputError, match="one size; the train sets have 40 and"):
    toy_runs.train(tmp_path / "run", _UNIFORM, splits, seeds=(0, 1))
  splits = [toy_runs.make_splits(0), toy_runs.make_splits(1, num_meta=9)]
  with pytest.raises(base.InputError, match="one size; the meta sets have 8 and 9"):
    toy_runs.train(tmp_path / "run", _L2RW, splits, seeds=(0, 1))
  toy_runs.train(tmp_path / "other", _UNIFORM, splits, seeds=(0, 1), num_steps=1)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda image: image[:, :2], r"one image shape.* \(2,\) and \(4,\)"),
    (lambda image: image.astype(np.float16), "one image dtype.* float16 and float32"),
  ],
)
def test_images_of_different_shapes_or_types_raise(tmp_path, change, message):
  splits = [toy_runs.make_splits(seed) for seed in (0, 1)]
  train = splits[1].train._replace(image=change(splits[1].train.image))
  splits[1] = splits[1]._replace(train=train)
  with pytest.raises(base.InputError, match=message) as error:
    toy_runs.train(tmp_path / "run", _UNIFORM, splits, seeds=(0, 1))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()


_COUNTS = ("num_steps", "batch_size", "log_every", "eval_every", "checkpoint_every")
_OPTIONAL_COUNTS = ("meta_batch_size", "num_devices", "steps_per_call")


@pytest.mark.parametrize("name", [*_COUNTS, *_OPTIONAL_COUNTS])
@pytest.mark.parametrize("value", [0, -3, 2.5, 8.0, True, "8"])
def test_counts_are_positive_integers(name, value):
  with pytest.raises(base.InputError, match=f"--{name}={value} must be an integer of"):
    config_lib.Config(**({"num_steps": 7} | {name: value}))
  config = config_lib.Config(**({"num_steps": 7} | {name: np.int64(8)}))
  assert type(getattr(config, name)) is int


@pytest.mark.parametrize(
  ("seeds", "message"),
  [
    # Both runs would write the same folder.
    ((0, 0), r"seeds=\[0, 0\] must be one or more distinct integers"),
    ((), r"seeds=\[\] must be one or more distinct integers"),
    ((-1,), "seeds=-1 must be an integer of at least 0"),
    ((0.0,), "seeds=0.0 must be an integer of at least 0"),
    # `jax.random.key` would return the key of seed 1.
    ((1, 2**32 + 1), r"the seed 4294967297 must be below 2\^32"),
  ],
)
def test_seeds_are_different_integers(seeds, message):
  with pytest.raises(base.InputError, match=message):
    config_lib.Config(7, seeds=seeds)


def test_seeds_may_be_numpy_integers():
  config = config_lib.Config(7, seeds=np.arange(3))
  assert config.seeds == (0, 1, 2) and {type(seed) for seed in config.seeds} == {int}


@pytest.mark.parametrize(
  ("parts", "method", "missing"),
  [
    (("train",), _UNIFORM, "for train, but not for test: the true labels"),
    (("train", "test"), _L2RW, "for train and test, but not for meta: the true labels"),
    (("train", "test"), _UNIFORM, None),
    ((), _L2RW, None),
  ],
)
def test_parts_without_groups_are_logged(caplog, parts, method, missing):
  caplog.set_level(logging.WARNING, logger="absl")
  splits = toy_runs.make_splits()
  groups = {part: getattr(splits, part).label % 2 for part in parts}
  changed = {
    part: getattr(splits, part)._replace(group=group) for part, group in groups.items()
  }
  config_lib.warn_of_missing_groups(
    splits._replace(**changed), needs_meta=method.needs_meta
  )
  assert [missing in message for message in caplog.messages] == [True] * bool(missing)


def test_an_empty_test_set_raises(tmp_path):
  splits = toy_runs.make_splits()
  splits = splits._replace(test=splits.validation)
  with pytest.raises(base.InputError, match="the test set of seed 0 is empty"):
    toy_runs.train(tmp_path / "run", _UNIFORM, [splits])
  assert not (tmp_path / "run").exists()


def test_is_due_at_multiples_of_the_intervals_and_at_the_end():
  config = config_lib.Config(10, log_every=2, eval_every=3, checkpoint_every=4)
  assert config.intervals == (2, 3, 4)
  due = [step for step in range(1, 11) if config.is_due(step, 3, 4)]
  assert due == [3, 4, 6, 8, 9, 10]
