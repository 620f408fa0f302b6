"""A method that looks at the training set every epoch and picks its own order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")

_BATCHES = toy_runs.NUM_TRAIN // 8  # An epoch.
_STEPS = 2 * _BATCHES + 3


class _Toy:
  """Rolls the order by a number drawn anew every epoch; counts its steps."""

  def __init__(self):
    self.views: list[base.EpochView] = []
    self.method = baselines.uniform()._replace(
      gradients=self._gradients,
      init=lambda key, problem, params: {"roll": jnp.zeros((), jnp.int32), "steps": 0},
      refresh=self._refresh,
      sample=self._sample,
    )

  def _gradients(self, state, problem, inputs):
    found, _ = baselines.uniform().gradients((), problem, inputs)
    return found, {**state, "steps": state["steps"] + 1}

  def _refresh(self, state, problem, view):
    assert problem.num_examples == len(view.train["label"]) == toy_runs.NUM_TRAIN
    self.views.append(jax.device_get(view._replace(rng=None)))
    return {**state, "roll": jnp.int32(view.rng.integers(1, toy_runs.NUM_TRAIN))}

  def _sample(self, state, problem, train, rng):
    del problem, rng
    return np.roll(train["index"], int(state["roll"]))


def _visited(monkeypatch):
  """Rows of every step that any run draws from now on, by step."""
  drawn = {}
  original = sampling.Sampler.next

  def note(self, step):
    found = original(self, step)
    drawn.setdefault(step, []).append(found.train)
    return found

  monkeypatch.setattr(sampling.Sampler, "next", note)
  return drawn


def _expected_rows(seed, step):
  epoch, offset = divmod(step, _BATCHES)
  roll = sampling.generator(seed, "refresh", epoch).integers(1, toy_runs.NUM_TRAIN)
  order = np.roll(np.arange(toy_runs.NUM_TRAIN), roll)
  return order[8 * offset : 8 * (offset + 1)]


def test_refresh_comes_once_an_epoch_and_decides_the_order(tmp_path, monkeypatch):
  drawn = _visited(monkeypatch)
  toy = _Toy()
  toy_runs.train(tmp_path, toy.method, seeds=(3, 5), num_steps=_STEPS)
  # Two runs side by side, one after the other.
  assert [view.epoch for view in toy.views] == [0, 0, 1, 1, 2, 2]
  for step in range(_STEPS):
    (rows,) = drawn[step]
    for run, seed in enumerate((3, 5)):
      np.testing.assert_array_equal(rows[run], _expected_rows(seed, step))
  assert not np.array_equal(_expected_rows(3, 0), _expected_rows(5, 0))
  arrays = toy_runs.saved(tmp_path)[1]
  assert next(x for p, x in arrays.items() if "steps" in p).tolist() == [_STEPS] * 2


def test_refresh_sees_what_was_learned_and_its_own_training_set(tmp_path):
  toy = _Toy()
  toy_runs.train(tmp_path / "long", toy.method, seeds=(1,), num_steps=_STEPS)
  first, second, _ = toy.views
  toy_runs.train(tmp_path / "short", toy.method, seeds=(1,), num_steps=_BATCHES)
  learned = toy_runs.saved_params(tmp_path / "short")
  kernel = next(path for path in learned if "Dense_0" in path and "kernel" in path)
  seen = [view.params["Dense_0"]["kernel"] for view in (first, second)]
  np.testing.assert_array_equal(seen[1], learned[kernel][0])
  assert not np.array_equal(seen[0], seen[1])
  train = toy_runs.make_splits(1).train
  # No groups were given: they are the true classes.
  train = train._replace(group=train.true_label)
  assert first.train.keys() == {"image", "label", "index", "group"}
  for name in first.train:
    np.testing.assert_array_equal(first.train[name], getattr(train, name))


# Inside the second epoch, after its first checkpoint; at its very start.
@pytest.mark.parametrize(("at", "saved", "epochs"), [(8, 7, [2]), (6, 5, [1, 2])])
def test_an_interrupted_epoch_goes_on_in_the_same_order(
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
    original = sampling.Sampler.next

    def stop(self, step):
      if step == at:
        raise KeyboardInterrupt
      return original(self, step)

    patch.setattr(sampling.Sampler, "next", stop)
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


def test_a_new_epoch_compiles_nothing(tmp_path, caplog, monkeypatch):
  counts = []
  original = sampling.Sampler.next

  def count(self, step):
    counts.append(sum(r.getMessage().startswith("Compiling") for r in caplog.records))
    return original(self, step)

  monkeypatch.setattr(sampling.Sampler, "next", count)
  with jax.log_compiles():
    toy_runs.train(tmp_path, _Toy().method, num_steps=_STEPS, eval_every=1)
  assert counts[1] > counts[0]
  # What the first refresh of a trained state needs is compiled with it.
  assert counts[2 * _BATCHES] == counts[-1] == counts[_BATCHES + 1]
