"""A network and a loss as the pure functions of a task."""

import jax.numpy as jnp
import pytest

from l2rw_jax import base
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp

BATCH = {"image": jnp.zeros((2, 4, 4, 1)), "label": jnp.zeros(2, jnp.int32)}


@pytest.mark.parametrize(("outputs", "num_classes"), [(10, 10), (1, 2), (2, 2)])
def test_networks_that_fit_pass(outputs, num_classes):
  model = classifier.Classifier(mlp.MLP(outputs, (3,)), num_classes)
  model.check(BATCH, num_classes)


@pytest.mark.parametrize(
  ("outputs", "claimed", "num_classes"), [(1, 10, 10), (5, 10, 10), (10, 10, 2)]
)
def test_networks_that_do_not_fit_are_refused(outputs, claimed, num_classes):
  model = classifier.Classifier(mlp.MLP(outputs, (3,)), claimed)
  message = f"{claimed} classes with {outputs} logits .* {num_classes} classes"
  with pytest.raises(base.InputError, match=message):
    model.check(BATCH, num_classes)
