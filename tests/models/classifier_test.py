"""A network and a loss as the pure functions of a problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import resnet

BATCH = {"image": jnp.zeros((2, 4, 4, 1)), "label": jnp.zeros(2, jnp.int32)}


@pytest.mark.parametrize(("outputs", "num_classes"), [(10, 10), (1, 2), (2, 2)])
def test_matching_networks_are_accepted(outputs, num_classes):
  model = classifier.Classifier(mlp.MLP(outputs, (3,)), num_classes)
  model.check(BATCH, num_classes)


@pytest.mark.parametrize(
  ("outputs", "claimed", "num_classes"), [(1, 10, 10), (5, 10, 10), (10, 10, 2)]
)
def test_mismatched_networks_are_refused(outputs, claimed, num_classes):
  model = classifier.Classifier(mlp.MLP(outputs, (3,)), claimed)
  message = f"{claimed} classes with {outputs} logits .* {num_classes} classes"
  with pytest.raises(base.InputError, match=message):
    model.check(BATCH, num_classes)


@pytest.mark.slow(unless=("True-ResNet",))
@pytest.mark.parametrize(
  "model",
  [mlp.MLP(10, (3, 4)), lenet.LeNet(10), resnet.ResNet(10, blocks=1, width=2)],
  ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize("train", [False, True])
def test_network_is_the_head_of_its_features(model, train):
  images = np.random.default_rng(0).normal(size=(4, 12, 12, 1)).astype(np.float32)
  batch = {"image": images, "index": np.arange(4)}
  problem = classifier.Classifier(model, 10).problem(
    class_counts=jnp.ones(10), num_examples=4, num_steps=1
  )

  @jax.jit
  def both(key):
    params, state = classifier.Classifier(model, 10).init(key, batch)
    features, after = problem.features(params, state, batch, key, train)
    in_two_steps = features, (problem.head(params, features), after)
    return problem.forward(params, state, batch, key, train), in_two_steps

  (logits, state), (features, (logits_too, state_too)) = both(jax.random.key(0))
  assert features.shape == (4, model.num_features)
  np.testing.assert_allclose(logits_too, logits, rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, state, state_too)


def _jitter(images, keys, train):
  if not train:
    assert keys is None
    return images * 2
  noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
  return images * 2 + noise


def test_augmentation_follows_the_example_index():
  model = classifier.Classifier(mlp.MLP(3, (2,)), 3, preprocess=_jitter)
  images = np.random.default_rng(0).normal(size=(4, 2, 2, 1)).astype(np.float32)
  batch = {"image": images, "index": np.arange(4)}
  key = jax.random.key(0)
  params, state = model.init(key, batch)

  def forward(batch, key, train):
    return model.forward(params, state, batch, key, train)[0]

  whole = forward(batch, key, True)
  half = forward({k: v[2:] for k, v in batch.items()}, key, True)
  np.testing.assert_allclose(whole[2:], half, rtol=1e-5)
  assert not np.allclose(whole, forward(batch, jax.random.key(1), True))
  plain = model._replace(preprocess=None)
  doubled = {**batch, "image": 2 * images}
  expected = plain.forward(params, state, doubled, key, False)[0]
  np.testing.assert_allclose(forward(batch, key, False), expected, rtol=1e-6)
