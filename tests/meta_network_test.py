"""Meta-learning of a network inside the loss, on one device and on several."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import hypergradient
from l2rw_jax import linearization
from l2rw_jax import losses as losses_lib
from l2rw_jax import meta_network
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import warpi

_AXIS = "devices"
_NET = meta_weight_net.WeightNet((4,))
_RECTIFIER = warpi.RectifierNet(3, hidden=4)


def _data():
  """Parameters, a batch and a meta batch."""
  rng = np.random.default_rng(0)

  def examples(size):
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "label": rng.integers(3, size=size).astype(np.int32)}

  return {"w": rng.normal(size=(4, 3)).astype(np.float32)}, examples(8), examples(4)


def _losses_fn(params, batch):
  return losses_lib.softmax_cross_entropy(batch["x"] @ params["w"], batch["label"])


def _parameters(net, *inputs):
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def _weight_net(normalization, optimizer, params, batch, meta_batch, axis_name):
  phi = _parameters(_NET, jnp.zeros(1))
  return meta_weight_net.network_gradient(
    _NET.apply,
    phi,
    _losses_fn,
    params,
    batch,
    meta_batch,
    optimizer=optimizer,
    normalization=normalization,
    detached=normalization == "mean",
    axis_name=axis_name,
  )


def _rectifier(optimizer, params, batch, meta_batch, axis_name):
  phi = _parameters(_RECTIFIER, jnp.zeros((1, 3)), jnp.zeros(1, jnp.int32))

  def loss_fn(logits, phi):
    losses, _ = warpi.inner_loss(_RECTIFIER, phi, logits, batch["label"], None)
    return losses.sum() / base.global_size(losses.size, axis_name)

  linearized = linearization.linearize_outputs(
    lambda p, b: b["x"] @ p["w"], base.local(params, axis_name), batch
  )
  return meta_network.meta_gradient(
    linearized,
    loss_fn,
    phi,
    _losses_fn,
    params,
    meta_batch,
    optimizer=optimizer,
    axis_name=axis_name,
  )


_SGD, _POLYAK = optax.sgd(0.3), optax.polyak_sgd(max_learning_rate=1e6)
_META_GRADIENTS = {
  "mean": functools.partial(_weight_net, "mean", _SGD),
  "sum": functools.partial(_weight_net, "sum", _SGD),
  "sum, polyak": functools.partial(_weight_net, "sum", _POLYAK),
  "rectifier": functools.partial(_rectifier, _SGD),
  "rectifier, polyak": functools.partial(_rectifier, _POLYAK),
}


def _meta_gradients(axis_name, *data):
  return {name: fun(*data, axis_name) for name, fun in _META_GRADIENTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_meta_gradients_are_the_same_under_shard_map(check_vma):
  data = _data()
  expected = jax.jit(functools.partial(_meta_gradients, None))(*data)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (_AXIS,))
  replicated, sharded = PartitionSpec(), PartitionSpec(_AXIS)
  actual = jax.jit(
    jax.shard_map(
      functools.partial(_meta_gradients, _AXIS),
      mesh=mesh,
      in_specs=(replicated, sharded, sharded),
      out_specs=replicated,
      check_vma=check_vma,
    )
  )(*data)
  for meta_gradient in expected.values():
    assert optax.tree.norm(meta_gradient.gradient) > 1e-4
  chex.assert_trees_all_close(
    jax.device_get(actual), jax.device_get(expected), rtol=1e-4, atol=1e-7
  )


@pytest.mark.ci
@pytest.mark.parametrize("optimizer", [_SGD, _POLYAK])
def test_the_gradient_equals_that_of_the_unrolled_step(x64, optimizer):
  params, batch, meta_batch = jax.tree.map(
    lambda x: x.astype(float) if x.dtype == np.float32 else x, _data()
  )

  def loss_fn(logits, phi):
    losses = losses_lib.softmax_cross_entropy(logits, batch["label"])
    return jnp.mean(jax.nn.sigmoid(phi * losses) * losses)

  def unrolled(phi):
    def inner(params):
      return loss_fn(batch["x"] @ params["w"], phi)

    value, gradient = jax.value_and_grad(inner)(params)
    update = optax.with_extra_args_support(optimizer).update
    updates, _ = update(gradient, optimizer.init(params), params, value=value)
    return _losses_fn(optax.apply_updates(params, updates), meta_batch).mean()

  phi = jnp.array(0.3)
  actual = meta_network.meta_gradient(
    linearization.linearize_outputs(lambda p, b: b["x"] @ p["w"], params, batch),
    loss_fn,
    phi,
    _losses_fn,
    params,
    meta_batch,
    optimizer=optimizer,
  )
  np.testing.assert_allclose(actual.gradient, jax.grad(unrolled)(phi), rtol=1e-9)


def test_an_update_is_computed_once_in_every_n_steps():
  def meta_gradient_fn(phi):
    return meta_network.MetaGradient(
      phi, 3 * phi, jnp.array(True), jnp.array(False), jnp.zeros((), jnp.int32)
    )

  optimizer = optax.sgd(0.5)
  state = meta_network.init(jnp.array(1.0), optimizer)
  assert np.isposinf(state.meta_loss)
  for step, (phi, meta_loss) in enumerate([(0.5, 3), (0.5, 3), (0.25, 1.5)]):
    state = meta_network.update(
      state, meta_gradient_fn, optimizer, jnp.int32(step), every=2
    )
    assert (state.params, state.meta_loss) == (phi, meta_loss)


def test_the_value_of_the_meta_optimizer_is_the_meta_loss():
  def meta_gradient_fn(phi):
    return meta_network.MetaGradient(
      phi, 3 * phi, jnp.array(True), jnp.array(False), jnp.zeros((), jnp.int32)
    )

  # The gradient is 1 and the step size is (3 - 0) / 1^2 = 3: 1 - 3 * 1 = -2.
  optimizer = optax.polyak_sgd(max_learning_rate=10.0)
  state = meta_network.init(jnp.array(1.0), optimizer)
  state = meta_network.update(state, meta_gradient_fn, optimizer, jnp.int32(0))
  np.testing.assert_allclose(state.params, -2.0, rtol=1e-6)
  optimizer = optax.lookahead(optax.sgd(0.1), 2, 0.5)
  with pytest.raises(base.InputError, match=r"meta optimizer is optax\.lookahead"):
    meta_network.update(
      meta_network.init(jnp.array(1.0), optimizer),
      meta_gradient_fn,
      optimizer,
      jnp.int32(0),
    )


def test_a_gradient_that_is_not_finite_is_reported():
  direction = hypergradient.Direction(
    None, jnp.array(1.0), jnp.array(True), jnp.array(False), jnp.zeros((), jnp.int32)
  )

  def checked(gradient, losses_finite, direction=direction):
    return meta_network.checked_meta_gradient(
      gradient, direction, losses_finite, base.StaticStr("forward")
    )

  with pytest.raises(FloatingPointError, match="the gradient of the network"):
    checked(jnp.array([np.nan]), jnp.array(True))
  run = jax.jit(checked)
  assert run(jnp.array([np.nan]), jnp.array(True)).fault == base.Fault.SLOPES
  result = run(jnp.ones(1), jnp.array(False))
  assert result.fault == base.Fault.TRAINING_LOSSES and not result.finite
  assert result.engine == "forward"
  # The look-ahead uses the training losses, so they are named before the meta losses.
  direction = direction._replace(fault=jnp.int32(base.Fault.META_LOSSES))
  result = run(jnp.ones(1), jnp.array(False), direction)
  assert result.fault == base.Fault.TRAINING_LOSSES
  assert run(jnp.ones(1), jnp.array(True), direction).fault == base.Fault.META_LOSSES


def test_state_can_be_made_under_nan_checks():
  with jax.debug_nans(True):
    for make in (meta_network.init, jax.jit(meta_network.init, static_argnums=1)):
      state = make({"w": jnp.ones(2)}, optax.sgd(0.1))
      assert np.isposinf(state.meta_loss)


def test_a_step_is_traced_once():
  traces, optimizer = [], optax.sgd(0.1)

  @jax.jit
  def step(state):
    traces.append(None)
    gradient = meta_network.MetaGradient(
      *(state.params, jnp.zeros(()), jnp.array(True), jnp.array(False)),
      jnp.zeros((), jnp.int32),
    )
    return meta_network.update(state, lambda _: gradient, optimizer, jnp.int32(0))

  step(step(meta_network.init({"w": jnp.ones(2)}, optimizer)))
  assert len(traces) == 1
