"""Several steps per call: the same results, and no needless waiting."""

import contextlib
import json
import threading

import jax
from jax.experimental import io_callback
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import device_data
from l2rw_jax.training import devices
from l2rw_jax.training import steps_per_call
from l2rw_jax.training import timer as timer_lib

# Each method is one object, so that its compiled functions are shared by the tests.
_METHODS = {
  "uniform": baselines.uniform(),
  "l2rw": l2rw.l2rw(),
  "adacore": adacore.adacore(0.6, 1, greedy="stochastic"),
}


@pytest.fixture(autouse=True)
def _no_commit(monkeypatch):
  """Records no commit: it may change during the tests, which compare every byte."""
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")


def _lengths(config, most, steps_per_epoch=None):
  step, lengths = 0, []
  while step < config.num_steps:
    epoch = None
    if steps_per_epoch is not None:
      epoch = (steps_per_epoch - step % steps_per_epoch, steps_per_epoch)
    lengths.append(steps_per_call.length(config, step, most, epoch))
    step += lengths[-1]
  assert step == config.num_steps
  return lengths


def test_calls_end_at_every_interval():
  config = config_lib.Config(26, log_every=10, eval_every=12, checkpoint_every=99)
  assert _lengths(config, 5) == [
    *(5, 5),  # to 10
    *(1, 1),  # to 12
    *(5, 1, 1, 1),  # to 20
    *(1, 1, 1, 1),  # to 24
    *(1, 1),  # to 26
  ]
  assert _lengths(config, 1) == [1] * 26
  assert _lengths(config, 50) == [1] * 26


def test_calls_end_with_the_epoch():
  config = config_lib.Config(20, log_every=20, eval_every=20, checkpoint_every=20)
  assert _lengths(config, 5) == [5] * 4
  assert _lengths(config, 5, steps_per_epoch=7) == [5, 1, 1, 5, 1, 1, 5, 1]
  assert _lengths(config, 20, steps_per_epoch=8) == [8, 8, 1, 1, 1, 1]


def test_the_length_of_a_full_call_depends_on_platform_and_config():
  class Accelerator:
    platform = "gpu"

  config = config_lib.Config(100)
  assert steps_per_call.most(config, devices.choose(1, 8)) == 1
  assert steps_per_call.most(config, [Accelerator()]) == 20
  seven = config_lib.Config(100, steps_per_call=7)
  assert steps_per_call.most(seven, devices.choose(1, 8)) == 7
  often = config_lib.Config(100, log_every=10, eval_every=8)
  assert steps_per_call.most(often, [Accelerator()]) == 8
  assert steps_per_call.most(seven, [Accelerator()], is_streamed=True) == 1


def _train(folder, name, **settings):
  given = {"num_steps": 17, "log_every": 5, "eval_every": 8, "checkpoint_every": 8}
  # Five meta examples are not divisible by eight devices.
  splits = [toy_runs.make_splits(seed, num_meta=5) for seed in (0, 1)]
  toy_runs.train(folder, _METHODS[name], splits, seeds=(0, 1), **given, **settings)
  return toy_runs.outcome(folder)


@pytest.mark.ci
@pytest.mark.slow(unless=("l2rw-1",))
@pytest.mark.parametrize(
  ("name", "num_devices"), [("l2rw", 1), ("l2rw", 8), ("adacore", 8)]
)
def test_three_steps_per_call_match_three_calls(
  tmp_path, monkeypatch, name, num_devices
):
  settings = {"num_devices": num_devices}
  _train(tmp_path / "one", name, steps_per_call=1, **settings)
  settings["steps_per_call"] = 3
  three = _train(tmp_path / "three", name, **settings)
  _assert_same_up_to_rounding(tmp_path / "three", tmp_path / "one")
  # Interrupt while the batches of steps 10 to 12 are drawn, after checkpoint 8.
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    toy_runs.interrupt(patch, 12)
    _train(tmp_path / "run", name, **settings)
  assert _train(tmp_path / "run", name, **settings) == three
  for array, expected in zip(
    *(toy_runs.saved(tmp_path / f)[1].values() for f in ("run", "three")), strict=True
  ):
    np.testing.assert_array_equal(array, expected)


def _assert_same_up_to_rounding(folder, other):
  """Compares two runs whose compiled programs may round differently."""
  (step, arrays), (other_step, expected) = map(toy_runs.saved, (folder, other))
  assert step == other_step and arrays.keys() == expected.keys()
  for path, array in arrays.items():
    np.testing.assert_allclose(
      array, expected[path], rtol=1e-6, atol=1e-6, err_msg=path
    )
  seeds = sorted(path.name for path in folder.glob("seed-*"))
  assert seeds
  for seed in seeds:
    for row, expected_row in zip(
      *(toy_runs.rows(f / seed) for f in (folder, other)), strict=True
    ):
      assert row == pytest.approx(expected_row, rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "bad_step", [6, 9]
)  # Within a call of 3 steps, and in a call of 1 step.
def test_failure_within_a_call_is_reported_with_its_step(tmp_path, bad_step):
  order = np.random.default_rng([0, *b"order", 0]).permutation(80)
  splits = toy_runs.make_splits(num_train=80)
  splits.train.image[order[8 * bad_step]] = 3e38  # Finite; its loss is not.
  messages = []
  for most in (1, 3):
    folder = tmp_path / str(most)
    with pytest.raises(base.InputError, match=f"step {bad_step}: 1 of 8 los") as error:
      toy_runs.train(
        folder / "run",
        _METHODS["uniform"],
        [splits],
        num_steps=10,
        log_every=5,
        eval_every=10,
        steps_per_call=most,
      )
    messages.append(str(error.value).replace(str(folder), ""))
    assert toy_runs.saved(folder / "run")[0] == bad_step
  assert messages[0] == messages[1]
  _assert_same_up_to_rounding(tmp_path / "3/run", tmp_path / "1/run")


def test_two_programs_are_compiled(tmp_path, monkeypatch):
  traced, lengths, num_traced = [], [], []
  original = device_data.DeviceData.load

  def gradients(state, problem, inputs):
    traced.append(None)
    return _METHODS["uniform"].gradients(state, problem, inputs)

  def load(self, steps):
    lengths.append(len(steps))
    num_traced.append(len(traced))
    return original(self, steps)

  monkeypatch.setattr(device_data.DeviceData, "load", load)
  toy_runs.train(
    tmp_path,
    _METHODS["uniform"]._replace(gradients=gradients),
    num_steps=22,
    log_every=11,
    eval_every=22,
    steps_per_call=4,
  )
  assert lengths == [4, 4, 1, 1, 1] * 2
  # The first call of each length is traced, and no other call.
  assert num_traced[:4] == [0, num_traced[1], num_traced[1], num_traced[3]]
  assert 0 < num_traced[1] < num_traced[3] == len(traced)


def test_timer_includes_steps_but_no_compilation(tmp_path, monkeypatch):
  is_stopped, traced, taken = [False], [], []
  original = timer_lib.Timer.stopped

  @contextlib.contextmanager
  def stopped(self):
    with original(self):
      is_stopped[0] = True
      yield
      is_stopped[0] = False

  def record(step):
    taken.append((int(step), is_stopped[0]))
    return np.int32(0)

  def gradients(state, problem, inputs):
    traced.append(is_stopped[0])
    io_callback(record, jax.ShapeDtypeStruct((), np.int32), inputs.step)
    return _METHODS["uniform"].gradients(state, problem, inputs)

  monkeypatch.setattr(timer_lib.Timer, "stopped", stopped)
  toy_runs.train(
    tmp_path,
    _METHODS["uniform"]._replace(gradients=gradients),
    num_steps=8,
    log_every=8,
    eval_every=8,
    steps_per_call=3,
  )
  assert traced and all(traced)
  assert sorted(taken) == [(step, False) for step in range(8)]
  timing = json.loads((tmp_path / "timing.json").read_text())
  assert timing["steps"] == 8 and timing["steps_per_call"] == 3


@pytest.mark.ci
@pytest.mark.parametrize("most", [1, 3])
def test_steps_are_sent_without_waiting(tmp_path, monkeypatch, most):
  """The devices wait in their first step until all steps of the run are sent."""
  all_sent, waited = threading.Event(), []

  def hold(step):
    del step
    waited.append(all_sent.wait(timeout=20))
    return np.int32(0)

  def gradients(state, problem, inputs):
    io_callback(hold, jax.ShapeDtypeStruct((), np.int32), inputs.step)
    return _METHODS["uniform"].gradients(state, problem, inputs)

  original, sent = device_data.DeviceData.load, []

  def load(self, steps):
    sent.extend(steps)
    if len(sent) == 9:
      all_sent.set()
    return original(self, steps)

  monkeypatch.setattr(device_data.DeviceData, "load", load)
  # One CPU device runs its steps in the calling thread; two devices do not.
  toy_runs.train(
    tmp_path,
    _METHODS["uniform"]._replace(gradients=gradients),
    num_steps=9,
    log_every=9,
    eval_every=9,
    num_devices=2,
    steps_per_call=most,
  )
  assert len(waited) == 2 * 9 and all(waited)


def test_augmentation_is_traced_in_the_step_and_not_again_in_a_second_run(tmp_path):
  calls = []

  def preprocess(images, keys, train):
    calls.append((train, isinstance(images, jax.core.Tracer)))
    return images

  model = toy_runs.MODEL._replace(preprocess=preprocess)
  toy_runs.train(tmp_path / "first", _METHODS["uniform"], model=model, num_steps=8)
  num_first = len(calls)
  toy_runs.train(tmp_path / "second", _METHODS["uniform"], model=model, num_steps=8)
  in_training = [traced for train, traced in calls if train]
  assert in_training and all(in_training)
  assert not any(train for train, _ in calls[num_first:])
