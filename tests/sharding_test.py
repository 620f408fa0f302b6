"""L2RW gives the same numbers on 1, 2 and 8 devices, for all ways to map over them."""

import functools
from typing import Any, NamedTuple

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from l2rw_jax import hypergradient
from l2rw_jax import losses
from l2rw_jax.methods import l2rw
from l2rw_jax.models import resnet

_AXIS = "devices"
_B, _M, _CLASSES = 16, 8, 3
_TOLERANCE = 1e-5


def _assert_close(actual, expected):
  actual, expected = jax.device_get((actual, expected))
  chex.assert_trees_all_close(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


class _Problem(NamedTuple):
  """Pure functions and data; `losses_fn(axis_name)` returns the function of the losses.

  All public functions use the network in the same way, so `all_functions` is needed
  for one cheap problem only.
  """

  losses_fn: Any
  params: Any
  batch: Any
  meta_batch: Any
  all_functions: bool = False


class _Net(nn.Module):
  """The smallest network with batch statistics shared over the devices."""

  axis_name: str | None

  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(6)(x)
    x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
    return nn.Dense(_CLASSES)(nn.tanh(x))


def _examples(rng, size, shape):
  return {
    "x": rng.normal(size=(size, *shape)).astype(np.float32),
    "label": rng.choice(_CLASSES, size, p=[0.7, 0.2, 0.1]).astype(np.int32),
  }


def _variables(model, x):
  """Random variables from NumPy, since an initialization would have to be compiled."""
  rng = np.random.default_rng(2)
  init = functools.partial(model.init, train=True)
  shapes = jax.eval_shape(init, jax.random.key(0), x)
  return jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)


def _network_problem(make_model, shape):
  rng = np.random.default_rng(0)
  batch, meta_batch = (_examples(rng, size, shape) for size in (_B, _M))
  variables = _variables(make_model(None), batch["x"])
  params = variables.pop("params")

  def losses_fn(axis_name):
    model = make_model(axis_name)

    def losses_of(params, batch):
      logits, _ = model.apply(
        {"params": params, **variables}, batch["x"], train=True, mutable="batch_stats"
      )
      return losses.softmax_cross_entropy(logits, batch["label"])

    return losses_of

  return _Problem(losses_fn, params, batch, meta_batch)


def _two_layers_problem():
  """Squared losses, with a hidden layer; several devices have positive weights."""
  rng = np.random.default_rng(3)
  shapes = {"hidden": (5, 8), "bias": (8,), "output": (8,)}
  params = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}

  def losses_fn(axis_name):
    del axis_name

    def losses_of(params, batch):
      hidden = jnp.tanh(batch["x"] @ params["hidden"] + params["bias"][None])
      return (hidden @ params["output"] - batch["label"].astype(jnp.float32)) ** 2

    return losses_of

  return _Problem(losses_fn, params, *(_examples(rng, n, (5,)) for n in (_B, _M)))


def _scan_problem():
  """Squared losses of a network whose layers are in a `lax.scan`."""
  rng = np.random.default_rng(4)
  shapes = {"kernel": (2, 5, 5), "bias": (2, 1, 5), "output": (5,)}
  params = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}

  def losses_fn(axis_name):
    del axis_name

    def losses_of(params, batch):
      def layer(hidden, weights):
        return jnp.tanh(hidden @ weights["kernel"] + weights["bias"]), None

      layers = {name: params[name] for name in ("kernel", "bias")}
      hidden, _ = jax.lax.scan(layer, batch["x"], layers)
      return (hidden @ params["output"] - batch["label"].astype(jnp.float32)) ** 2

    return losses_of

  return _Problem(losses_fn, params, *(_examples(rng, n, (5,)) for n in (_B, _M)))


def _one_shard_problem():
  """Squared losses; only the first two examples agree with the meta set."""
  rng = np.random.default_rng(1)

  def examples(targets):
    x = rng.uniform(0.5, 1.5, size=(len(targets), 4)).astype(np.float32)
    return {"x": x, "y": np.asarray(targets, np.float32)}

  def losses_fn(axis_name):
    del axis_name
    return lambda params, batch: (batch["x"] @ params["p"] - batch["y"]) ** 2

  batch = examples([1.0, 2.0] + [-1.0] * (_B - 2))
  params = {"p": np.zeros(4, np.float32)}
  return _Problem(losses_fn, params, batch, examples([1.0] * _M), all_functions=True)


@functools.cache
def _problem(name):
  if name == "two_layers":
    return _two_layers_problem()
  if name == "scan":
    return _scan_problem()
  if name == "batch_norm":
    return _network_problem(_Net, (5,))
  if name == "resnet":
    make_model = functools.partial(resnet.ResNet, _CLASSES, blocks=1, width=4)
    return _network_problem(lambda axis: make_model(axis_name=axis), (8, 8, 3))
  return _one_shard_problem()


def _make_results(problem, axis_name):
  """The public functions in one program, for the examples of one device."""
  losses_fn = problem.losses_fn(axis_name)

  def results(params, batch, meta_batch):
    data = (params, batch, meta_batch)
    fused = l2rw.weighted_value_and_grad(losses_fn, axis_name=axis_name)
    (loss, info), grads = fused(*data)
    local = {"weights": info.weights, "scores": info.scores, "losses": info.losses}
    shared = {"meta_loss": info.meta_loss, "loss": loss, "grads": grads}
    shared["finite"] = info.finite
    if problem.all_functions:
      separate = l2rw.example_weights(losses_fn, *data, axis_name=axis_name)
      local |= {"separate": separate.weights, "separate_scores": separate.scores}
      shared["network"] = hypergradient.network_gradient(
        lambda phi: jax.nn.sigmoid(phi[0] * info.losses + phi[1]),
        jnp.array([0.5, -0.1]),
        -info.scores,
        axis_name=axis_name,
      )
    return local, shared

  return results


@functools.cache
def _expected(name):
  problem = _problem(name)
  return jax.jit(_make_results(problem, None))(*problem[1:4])


def _shard(tree, num_devices):
  return jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), tree)


def _on_device(tree, index):
  return jax.tree.map(lambda x: x[index], tree)


def _stacked(problem, num_devices, map_fn):
  """Results of a map that stacks outputs; checks that devices agree on shared ones."""
  mapped = map_fn(_make_results(problem, _AXIS), axis_name=_AXIS, in_axes=(None, 0, 0))
  local, shared = jax.device_get(
    mapped(problem.params, *(_shard(x, num_devices) for x in problem[2:4]))
  )
  for index in range(1, num_devices):
    _assert_close(_on_device(shared, index), _on_device(shared, 0))
  return jax.tree.map(np.ravel, local), _on_device(shared, 0)


def _mesh(num_devices, axis_type=jax.sharding.AxisType.Auto):
  return jax.make_mesh(
    (num_devices,),
    (_AXIS,),
    axis_types=(axis_type,),
    devices=jax.devices()[:num_devices],
  )


def _shard_map(problem, num_devices, check_vma):
  whole, split = PartitionSpec(), PartitionSpec(_AXIS)
  mapped = jax.shard_map(
    _make_results(problem, _AXIS),
    mesh=_mesh(num_devices),
    in_specs=(whole, split, split),
    out_specs=(split, whole),
    check_vma=check_vma,
  )
  return jax.jit(mapped)(*problem[1:4])


def _sharded_arrays(problem, num_devices, split_params):
  """Plain jit without an axis name; XLA inserts the collectives."""
  mesh = _mesh(num_devices)
  whole, split = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), (_AXIS,)))

  def place(x):
    can_split = split_params and x.ndim and x.shape[0] % num_devices == 0
    return jax.device_put(x, split if can_split else whole)

  params = jax.tree.map(place, problem.params)
  batches = (jax.device_put(x, split) for x in problem[2:4])
  return jax.jit(_make_results(problem, None))(params, *batches)


def _explicit(problem, num_devices):
  """Plain jit without an axis name, with explicit sharding in the types."""
  mesh = _mesh(num_devices, jax.sharding.AxisType.Explicit)
  with jax.set_mesh(mesh):
    params = jax.device_put(problem.params, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec(_AXIS))
    batches = (jax.device_put(x, split) for x in problem[2:4])
    return jax.jit(_make_results(problem, None))(params, *batches)


_MAPS = {
  "pmap": functools.partial(_stacked, map_fn=jax.pmap),
  "vmap": functools.partial(
    _stacked, map_fn=lambda *a, **k: jax.jit(jax.vmap(*a, **k))
  ),
  "shard_map": functools.partial(_shard_map, check_vma=True),
  "shard_map_unchecked": functools.partial(_shard_map, check_vma=False),
  "jit_replicated": functools.partial(_sharded_arrays, split_params=False),
  "jit_sharded": functools.partial(_sharded_arrays, split_params=True),
  "jit_explicit": _explicit,
}


@pytest.mark.ci(
  unless=(
    "two_layers-8-pmap",
    "two_layers-8-shard_map",
    "two_layers-8-jit_sharded",
    "two_layers-8-jit_explicit",
  )
)
@pytest.mark.slow(
  "batch_norm-2-vmap",
  "batch_norm-2-jit_explicit",
  "batch_norm-2-jit_replicated",
  "batch_norm-2-shard_map_unchecked",
  "batch_norm-2-pmap",
  "one_shard-8-pmap",
  "one_shard-8-jit_replicated",
  "one_shard-8-vmap",
  "two_layers-8-jit_replicated",
  "two_layers-8-vmap",
  "two_layers-8-shard_map_unchecked",
)
@pytest.mark.parametrize("map_name", _MAPS)
@pytest.mark.parametrize(
  ("problem_name", "num_devices"),
  [("two_layers", 8), ("batch_norm", 2), ("one_shard", 8)],
)
def test_all_maps_match_one_device(map_name, problem_name, num_devices):
  actual = _MAPS[map_name](_problem(problem_name), num_devices)
  _assert_close(actual, _expected(problem_name))


@pytest.mark.ci
@pytest.mark.slow("shard_map")
@pytest.mark.parametrize("map_name", ["shard_map", "jit_sharded", "jit_explicit"])
def test_layers_in_a_loop_match_one_device(map_name):
  _assert_close(_MAPS[map_name](_problem("scan"), 2), _expected("scan"))


@pytest.mark.parametrize("map_name", ["pmap", "shard_map"])
def test_axis_of_one_device_matches_no_axis(map_name):
  _assert_close(_MAPS[map_name](_problem("one_shard"), 1), _expected("one_shard"))


@pytest.mark.slow
def test_resnet_with_shared_batch_statistics_matches_one_device():
  _assert_close(_MAPS["shard_map"](_problem("resnet"), 8), _expected("resnet"))


def test_weights_of_the_examples_differ():
  local, shared = _expected("two_layers")
  assert 2 < np.count_nonzero(local["weights"]) < _B
  assert abs(local["weights"].sum() - 1) < 1e-6
  assert bool(shared["finite"])
  scores = _expected("one_shard")[0]["scores"]
  assert (scores[:2] > 0).all()
  assert (scores[2:] < 0).all()
