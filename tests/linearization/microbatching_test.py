"""Microbatches give the numbers of the whole batch, in float64."""

import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import group_objectives
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax.linearization import microbatching
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

pytestmark = pytest.mark.usefixtures("x64")

_B, _M = 5, 3
_close = functools.partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-14)


@pytest.fixture(params=["cpu", "gpu"])
def unrolled_or_loop(request, monkeypatch):
  """Tests unrolled microbatches, as on CPU, and a loop, as on other devices."""
  monkeypatch.setattr(jax, "default_backend", lambda: request.param)


def _examples(seed, size):
  rng = np.random.default_rng(seed)
  return {
    "x": rng.normal(size=(size, 3)),
    "label": rng.integers(3, size=size),
  }


def _params(seed=2):
  rng = np.random.default_rng(seed)
  shapes = {"kernel": (3, 4), "out": (4,)}
  floats = {k: jnp.asarray(rng.normal(size=v)) for k, v in shapes.items()}
  return {**floats, "count": jnp.int32(4)}


def _losses_fn(params, batch):
  outputs = jnp.tanh(batch["x"] @ params["kernel"]) @ params["out"]
  return (outputs - batch["label"].astype(outputs.dtype)) ** 2


def _with_aux(params, batch):
  return _losses_fn(params, batch), {"sums": batch["x"].sum(1), "none": {}}


def _results(linearize, **options):
  """The results of a `Linearized`, compiled."""
  rng = np.random.default_rng(5)
  vector = jax.tree.map(lambda x: rng.normal(size=x.shape), _params())
  weights = jnp.asarray(rng.normal(size=_B))

  @jax.jit
  def run(params, batch):
    actual = linearize(_with_aux, params, batch, has_aux=True, **options)
    return (
      actual.losses,
      actual.aux,
      actual.directional(vector),
      actual.weighted_gradient(weights),
    )

  return run(_params(), _examples(0, _B))


@functools.cache
def _results_of_the_whole_batch():
  return _results(linearization.linearize)


@pytest.mark.slow(unless=("cpu-2", "gpu-5"))
@pytest.mark.usefixtures("unrolled_or_loop")
@pytest.mark.parametrize("size", [1, 2, _B, 100])
def test_any_microbatch_size_gives_the_numbers_of_the_whole_batch(size):
  actual = _results(microbatching.microbatched(linearization.linearize, size))
  _close(actual, _results_of_the_whole_batch())
  assert actual[3]["count"] == 0


@pytest.mark.parametrize("engine", ["forward", "layerwise", "reverse"])
def test_any_engine_gives_the_numbers_of_the_whole_batch(engine):
  linearize = microbatching.microbatched(linearization.linearize, 3)
  _close(_results(linearize, engine=engine), _results_of_the_whole_batch())


def _without_engine(info):
  """Removes the engine's name, which differs between microbatches and whole batches."""
  return info._replace(engine=base.StaticStr())


def _l2rw(params, batch, meta_batch, size, axis_name=None):
  run = l2rw.weighted_value_and_grad(
    _losses_fn, microbatch_size=size, axis_name=axis_name
  )
  (loss, info), grads = run(params, batch, meta_batch)
  return loss, _without_engine(info), grads


def _mwn(params, batch, meta_batch, size, axis_name=None):
  result = meta_weight_net.network_gradient(
    lambda phi, values: jax.nn.sigmoid(phi["a"] * values + phi["b"]),
    {"a": jnp.array(0.3), "b": jnp.array(-0.2)},
    _losses_fn,
    params,
    batch,
    meta_batch,
    optimizer=optax.sgd(0.5),
    normalization="sum",
    detached=False,
    axis_name=axis_name,
    microbatch_size=size,
  )
  return _without_engine(result)


@pytest.mark.ci
@pytest.mark.slow(unless=("gpu-_mwn",))
@pytest.mark.usefixtures("unrolled_or_loop")
@pytest.mark.parametrize("run", [_l2rw, _mwn])
def test_methods_under_vmap(run):
  data = _examples(0, 4), _examples(1, 4)  # two microbatches of each
  many = jax.tree.map(lambda *x: jnp.stack(x), _params(0), _params(1))
  actual, expected = (
    jax.jit(jax.vmap(lambda params, size=size: run(params, *data, size)))(many)
    for size in (2, None)
  )
  _close(actual, expected)


@pytest.mark.slow(unless=("False-_l2rw",))
@pytest.mark.parametrize("run", [_l2rw, _mwn])
@pytest.mark.parametrize("check_vma", [False, True])
def test_eight_devices_equal_one(run, check_vma):
  params, batch, meta_batch = _params(), _examples(0, 24), _examples(1, 16)

  def results(batch, meta_batch, size, axis_name=None):
    actual = jax.tree.leaves(run(params, batch, meta_batch, size, axis_name))
    # Results for each example are left out, because they differ between devices.
    return [x for x in actual if x.shape != batch["label"].shape]

  mapped = jax.shard_map(
    functools.partial(results, size=2, axis_name="devices"),
    mesh=jax.sharding.Mesh(jax.devices(), ("devices",)),
    in_specs=P("devices"),
    out_specs=P(),
    check_vma=check_vma,
  )
  expected = jax.jit(lambda *data: results(*data, None))(batch, meta_batch)
  _close(jax.jit(mapped)(batch, meta_batch), expected)


def test_weights_may_be_computed_inside_a_differentiated_loss():
  data = _examples(0, _B), _examples(1, _M)
  params = {k: v for k, v in _params().items() if k != "count"}

  def weighted(params):
    actual = l2rw.example_weights(_losses_fn, params, *data, microbatch_size=2)
    return jnp.sum(actual.weights * _losses_fn(params, data[0]))

  *_, expected = jax.jit(_l2rw, static_argnums=3)(params, *data, None)
  _close(jax.jit(jax.grad(weighted))(params), expected)


def _small_weights(x, meta_x, size):
  """Weights of a small problem, whose compiled operations the tests can share."""
  params = jnp.array([1.0, -2.0])
  return l2rw.example_weights(
    lambda p, x: (x @ p) ** 2, params, x, meta_x, microbatch_size=size
  )


@pytest.mark.slow
def test_microbatches_work_outside_jit():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  actual, expected = (_small_weights(x, x, size) for size in (2, None))
  assert (actual.engine, expected.engine) == ("microbatched", "layerwise")
  _close(_without_engine(actual), _without_engine(expected))


def test_objectives_other_than_the_mean():
  groups = jnp.arange(_M) % 2

  def direction(params, size):
    return hypergradient.direction(
      _losses_fn,
      params,
      _examples(1, _M),
      optimizer=optax.sgd(0.1),
      opt_state=optax.sgd(0.1).init(params),
      objective=lambda values: group_objectives.worst(values, groups, 2),
      microbatch_size=size,
    )._asdict()

  run = jax.jit(direction, static_argnums=1)
  actual, expected = (run(_params(), size) for size in (2, None))
  # With microbatches, fewer activations are stored at a time.
  assert actual.pop("activation_ratio") != expected.pop("activation_ratio")
  _close(actual, expected)


def test_half_precision_gradients_are_summed_in_float32(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  x, one = jnp.ones(600, jnp.bfloat16), jnp.ones((), jnp.bfloat16)
  actual = microbatching.weighted_gradient(lambda p, x: p * x, one, x, 1.0, 1)
  # A sum in bfloat16 would stop at 256, where adding 1 changes nothing.
  assert actual.gradient == 600 and actual.gradient.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
  "make",
  [
    lambda size: l2rw.l2rw(microbatch_size=size),
    lambda size: meta_weight_net.meta_weight_net(0.1, microbatch_size=size),
  ],
)
def test_methods_in_the_loop_and_their_errors(make):
  for size in (0, -2, 2.5):
    with pytest.raises(base.InputError, match=f"microbatch_size={size}: must be"):
      make(size)
  actual, expected = (_gradients(make(size), mlp.MLP(2, (3,))) for size in (2, None))
  _close(actual.grads, expected.grads, rtol=1e-5, atol=1e-6)
  _close(actual.weights, expected.weights, rtol=1e-5, atol=1e-6)
  with pytest.raises(base.InputError, match=r"BatchNorm_0.*no row per example"):
    _gradients(make(4), _Normed())


class _Normed(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    # With as many channels as examples, statistics have the shape of losses.
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x[..., 0, 0]))
    return nn.Dense(2)(x)


def _gradients(method, net):
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.normal(size=(4, 8, 8, 1)).astype(np.float32),
    "label": np.array([0, 1, 1, 0]),
    "index": np.arange(4),
  }
  model = classifier.Classifier(net, 2)
  problem = model.problem(class_counts=jnp.array([2, 2]), num_examples=4, num_steps=1)
  # Random values from NumPy, since an initialization would have to be compiled.
  params, model_state = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
    jax.eval_shape(model.init, jax.random.key(0), batch),
  )

  @jax.jit
  def run(batch):
    key = jax.random.key(0)
    state = method.init(key, problem, params)
    inputs = base.Inputs(params, model_state, (), batch, batch, jnp.int32(0), key)
    return method.gradients(state, problem, inputs)[0]

  return run(batch)


def test_keys_per_example_are_split_with_the_examples():
  keys = jax.random.split(jax.random.key(0), 3)

  def losses_fn(params, keys):
    return params * jax.vmap(jax.random.normal)(keys)

  linearize = microbatching.microbatched(linearization.linearize, np.int64(2))

  @jax.jit
  def both(keys):
    output = linearize(losses_fn, jnp.array(2.0), keys)
    actual = output.losses, output.directional(jnp.array(1.0))
    return actual, (losses_fn(2.0, keys), losses_fn(1.0, keys))

  _close(*both(keys))


def test_arrays_without_a_row_per_example_are_refused():
  linearize = microbatching.microbatched(linearization.linearize, 2)
  x = jnp.ones((4, 2))

  def losses_fn(params, batch):
    return batch["x"] @ params * batch.get("scale", 1.0)

  for batch, message in (
    ({"x": x, "scale": jnp.array(2.0)}, r"batch\['scale'\] has no row"),
    ({"x": x, "scale": 2.0}, r"batch\['scale'\] has no row"),
    ({"x": x, "scale": jnp.ones(2)}, r"have \[2, 4\] rows"),
  ):
    with pytest.raises(base.InputError, match=message):
      linearize(losses_fn, jnp.ones(2), batch)
  with pytest.raises(base.InputError, match="one number per loss"):
    linearize(losses_fn, jnp.ones(2), {"x": x}).weighted_gradient(jnp.ones(3))
  with pytest.raises(base.InputError, match="Do not average"):
    linearize(lambda p, b: losses_fn(p, b).mean(), jnp.ones(2), {"x": x})


def test_explicitly_sharded_arrays_are_refused():
  mesh = jax.make_mesh(
    (2,), ("d",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
  )
  with jax.set_mesh(mesh):
    split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.ones((4, 3)), split)
    microbatched = microbatching.microbatched(linearization.linearize, 2)
    with pytest.raises(base.InputError, match=r"spread it by shard_map or pmap"):
      jax.jit(lambda p, x: microbatched(lambda p, x: x @ p, p, x).losses)(
        jnp.ones(3), x
      )


def test_weights_of_another_shape_are_refused():
  microbatched = microbatching.microbatched(linearization.linearize, 2)
  actual = microbatched(lambda p, x: x @ p, jnp.ones(3), jnp.ones((4, 3)))
  with pytest.raises(base.InputError, match=r"one number per loss, \(4,\); got \(\)"):
    actual.weighted_gradient(1.0)


def test_a_nan_in_one_microbatch_of_the_meta_batch_is_reported():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
  meta_x = jnp.array([[1.0, 2.0], [2.0, 1.0], [jnp.nan, 1.0]])  # in microbatch 2
  with pytest.raises(FloatingPointError, match=r"1 of 3 meta losses .* in row 2"):
    _small_weights(x, meta_x, 2)
  output = jax.jit(functools.partial(_small_weights, size=2))(x, meta_x)
  assert not output.finite and output.fault == base.Fault.META_LOSSES


def test_losses_that_ignore_their_batch_are_refused():
  targets = jnp.arange(4.0)
  linearize = microbatching.microbatched(linearization.linearize, 2)
  params, batch = jnp.ones(4), jnp.ones((4, 4))
  with pytest.raises(base.InputError, match="returned 4 losses for a microbatch of 2"):
    linearize(lambda p, x: targets * p.sum(), params, batch)
  with pytest.raises(TypeError) as caught:
    linearize(lambda p, x: x @ p - targets, params, batch)
  assert "microbatch of 2 examples" in caught.value.__notes__[0]
