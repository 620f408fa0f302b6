"""Arrays on several devices, and runs mapped side by side."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import classifier
from l2rw_jax.training import devices


def _choose(count):
  return devices.choose(count, 8)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("shape", [(3, 16), (3, 5, 16)])
def test_shard_and_unshard_are_inverse(count, shape):
  rows = np.arange(np.prod(shape)).reshape(shape)
  sharded = devices.shard(rows, _choose(count))
  assert sharded.shape == (count, *shape[:-1], 16 // count)
  np.testing.assert_array_equal(devices.unshard(sharded), rows)


def test_shard_keeps_examples_in_order():
  sharded = devices.shard(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), _choose(2))
  assert sharded.tolist() == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_spread_divides_rows_or_repeats_them():
  steps = [np.array([[0, 1, 2, 3]]), np.array([[4, 5, 6, 7]])]  # K = 2, R = 1, B = 4.
  spread = devices.spread(steps, _choose(2))
  assert spread.dtype == np.int32
  assert spread.tolist() == [[[[0, 1], [4, 5]]], [[[2, 3], [6, 7]]]]
  repeated = devices.spread([rows[:, :3] for rows in steps], _choose(2))
  assert repeated.tolist() == [[[[0, 1, 2], [4, 5, 6]]]] * 2


def test_repeat_gives_all_devices_the_same_rows():
  repeated = devices.repeat(np.arange(6).reshape(2, 3), _choose(4))
  assert repeated.shape == (4, 2, 3)
  assert (repeated == np.arange(6).reshape(2, 3)).all()


@pytest.mark.parametrize("count", [1, 8])
def test_replicate_and_unreplicate_are_inverse(count):
  chosen = _choose(count)
  tree = {"a": jnp.arange(3.0), "key": jax.random.key(7), "n": np.int32(4), "empty": ()}
  copies = devices.replicate(tree, chosen)
  assert copies["a"].shape == (count, 3) and copies["n"].shape == (count,)
  assert copies["a"].sharding.device_set == set(chosen)
  back = devices.unreplicate(copies)
  np.testing.assert_array_equal(back["a"], tree["a"])
  assert back["n"] == 4 and back["n"].dtype == jnp.int32 and back["empty"] == ()
  np.testing.assert_array_equal(
    jax.random.key_data(back["key"]), jax.random.key_data(tree["key"])
  )
  assert back["a"].sharding.device_set == {chosen[0]}


@pytest.mark.parametrize("kind", devices.MAPS)
def test_mapped_step_is_not_traced_again_for_its_outputs(kind):
  chosen, traces = _choose(2), []

  def step(state, x):
    traces.append(0)
    total = jax.lax.psum(x.sum(), devices.AXIS_NAME)
    return state + total, total

  mapped = devices.map_step(step, 3, chosen, kind)
  state = devices.replicate(jnp.zeros(3), chosen)
  batch = devices.shard(np.arange(12.0, dtype=np.float32).reshape(3, 4), chosen)
  for _ in range(3):
    state, _ = mapped(state, batch)
  assert len(traces) == 1
  np.testing.assert_array_equal(devices.unreplicate(state), [18.0, 66.0, 114.0])


def test_choose_takes_the_first_devices_or_the_largest_divisor():
  available = jax.local_devices()
  assert devices.choose(3, 9) == available[:3]
  for batch_size, count in {16: 8, 100: 5, 9: 3, 7: 7, 11: 1, 1: 1, 2: 2}.items():
    assert devices.choose(None, batch_size) == available[:count]


@pytest.mark.parametrize("count", [0, -1, 9])
def test_choose_with_a_number_of_devices_out_of_range_raises(count):
  with pytest.raises(base.InputError, match=f"--num_devices={count}: .* has 8 cpu"):
    devices.choose(count, 72)


def test_choose_with_an_indivisible_batch_raises():
  with pytest.raises(base.InputError, match=r"--batch_size=8 .* --num_devices=3"):
    devices.choose(3, 8)


@pytest.mark.parametrize("num_runs", [1, 3])
def test_over_runs_maps_all_arguments(num_runs):
  x = jnp.arange(2.0 * num_runs).reshape(num_runs, 2)
  total, constant = devices.over_runs(lambda a, b: ((a * b).sum(), 1.0), num_runs)(x, x)
  np.testing.assert_array_equal(total, (x**2).sum(axis=1))
  assert constant.shape == (num_runs,)


def test_on_one_device_binds_the_axis_of_shared_statistics():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      norm = nn.BatchNorm(use_running_average=not train, axis_name=devices.AXIS_NAME)
      return nn.Dense(3)(norm(x))

  model = classifier.Classifier(Net(), 3)
  x = {"image": jnp.arange(12.0).reshape(6, 2), "index": jnp.arange(6)}
  params, model_state = model.init(jax.random.key(0), x)

  def outputs(params):
    return model.forward(params, model_state, x, jax.random.key(1), True)

  logits, new_state = devices.on_one_device(outputs)(params)
  expected = 0.99 * 0.0 + 0.01 * x["image"].mean(0)
  np.testing.assert_allclose(
    new_state["batch_stats"]["BatchNorm_0"]["mean"], expected, rtol=1e-5
  )
  assert logits.shape == (6, 3)


def test_one_of_many_runs_is_taken_without_a_copy_of_all():
  state = {"x": jnp.arange(48.0).reshape(1, 8, 6)}
  for run in (0, 5):
    taken = devices.unreplicate(state, run)
    np.testing.assert_array_equal(taken["x"], state["x"][0, run])
  cost = devices._take_of_first.lower(state, 5).compile().cost_analysis()
  assert cost["bytes accessed"] < state["x"].nbytes
