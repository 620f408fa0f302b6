"""A network inside the loss, taught on several devices by any map."""

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from l2rw_jax import base
from l2rw_jax import linearization
from l2rw_jax import losses as losses_lib
from l2rw_jax import meta_network
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.methods import warpi
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

_AXIS = "devices"
_NET = meta_weight_net.WeightNet((4,))
_RECTIFIER = warpi.RectifierNet(3, hidden=4)


def _problem():
  rng = np.random.default_rng(0)

  def examples(size):
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return {"x": x, "label": rng.integers(3, size=size).astype(np.int32)}

  return {"w": rng.normal(size=(4, 3)).astype(np.float32)}, examples(8), examples(4)


def _losses_fn(params, batch):
  return losses_lib.softmax_cross_entropy(batch["x"] @ params["w"], batch["label"])


def _weight_net(normalization, params, batch, meta_batch, axis_name):
  phi = _NET.init(jax.random.key(0), jnp.zeros(1))
  return meta_weight_net.network_gradient(
    _NET.apply,
    phi,
    _losses_fn,
    params,
    batch,
    meta_batch,
    optimizer=optax.sgd(0.3),
    normalization=normalization,
    axis_name=axis_name,
  )


def _rectifier(params, batch, meta_batch, axis_name):
  phi = _RECTIFIER.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros(1, jnp.int32))

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
    optimizer=optax.sgd(0.3),
    axis_name=axis_name,
  )


_LESSONS = {
  "mean": lambda *given: _weight_net("mean", *given),
  "sum": lambda *given: _weight_net("sum", *given),
  "rectifier": _rectifier,
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", _LESSONS)
def test_a_lesson_is_the_same_under_shard_map(name, check_vma):
  params, batch, meta_batch = _problem()
  expected = jax.jit(lambda *given: _LESSONS[name](*given, None))(
    params, batch, meta_batch
  )
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), (_AXIS,))
  whole, split = PartitionSpec(), PartitionSpec(_AXIS)
  found = jax.jit(
    jax.shard_map(
      lambda *given: _LESSONS[name](*given, _AXIS),
      mesh=mesh,
      in_specs=(whole, split, split),
      out_specs=whole,
      check_vma=check_vma,
    )
  )(params, batch, meta_batch)
  assert optax.tree.norm(expected.gradient) > 1e-4
  chex.assert_trees_all_close(
    jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-7
  )


def test_clean_examples_have_their_own_augmentation():
  def noisy(images, keys, train):
    if not train:
      return images
    return images + jax.vmap(lambda k: jax.random.normal(k, images.shape[1:]))(keys)

  model = classifier.Classifier(mlp.MLP(3, (4,)), 3, preprocess=noisy)
  batch = {
    "image": np.ones((2, 4), np.float32),
    "label": np.zeros(2, np.int32),
    "index": np.arange(2),
  }
  problem = model.problem(class_counts=jnp.ones(3), num_examples=2, num_steps=1)
  params, state = model.init(jax.random.key(0), batch)
  key = jax.random.key(1)
  own, _ = problem.losses_fn(state, key)(params, batch)
  again, _ = problem.losses_fn(state, key)(params, batch)
  clean, _ = problem.meta_losses_fn(state, key)(params, batch)
  np.testing.assert_array_equal(own, again)
  assert not np.isclose(own, clean).any()
