"""What is measured of a run itself, and examples that are more than an image."""

import json

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices
from l2rw_jax.training import evaluation
from l2rw_jax.training import loop

pytestmark = pytest.mark.usefixtures("quick_compilation")
_UNIFORM = baselines.uniform()


def _norm(snapshot):
  leaves = jax.tree.leaves(snapshot.state.params)
  return {"norm": float(np.sqrt(sum(np.sum(np.square(x)) for x in leaves)))}


def _wrong(snapshot):
  right = snapshot.train.predicted == snapshot.train.labels
  return {"wrong": float(1 - right.mean())}


def test_probes_look_at_the_start_and_at_every_evaluation(tmp_path):
  plain = toy_runs.train(tmp_path / "plain", _UNIFORM, seeds=(0, 1))
  probed = toy_runs.train(
    tmp_path / "probed", _UNIFORM, seeds=(0, 1), probes=(_norm, _wrong)
  )
  for seed, (one, other) in enumerate(zip(plain, probed, strict=True)):
    assert one.metrics["params_sha256"] == other.metrics["params_sha256"]
    assert "probes" not in one.metrics
    probes = other.metrics["probes"]
    assert probes["step"] == [0, 3, 6, 7]
    assert len(set(probes["norm"])) == 4
    assert probes["wrong"][-1] < probes["wrong"][0]
    files, others = (run.metrics.pop("files") for run in (one, other))
    assert files["weights.csv"] == others["weights.csv"]
    del other.metrics["probes"]
    assert other.metrics == one.metrics
    rows = toy_runs.rows(tmp_path / "probed" / f"seed-{seed}")
    assert rows[0] == {
      "step": 0,
      "probe/norm": probes["norm"][0],
      "probe/wrong": probes["wrong"][0],
    }


def test_a_resumed_run_has_probed_the_start_once(tmp_path):
  short = {"seeds": (0,), "probes": (_norm,), "checkpoint_every": 3}

  def interrupt(snapshot):
    if snapshot.step == 6:
      raise KeyboardInterrupt
    return _norm(snapshot)

  with pytest.raises(KeyboardInterrupt):
    toy_runs.train(tmp_path / "a", _UNIFORM, **(short | {"probes": (interrupt,)}))
  (resumed,) = toy_runs.train(tmp_path / "a", _UNIFORM, **short)
  (whole,) = toy_runs.train(tmp_path / "b", _UNIFORM, **short)
  assert resumed.metrics == whole.metrics
  timing = json.loads((tmp_path / "a" / "timing.json").read_text())
  assert [step for step, _ in timing["evaluations"]] == [3, 6, 7]
  assert timing["steps"] == 7


def test_a_network_with_shared_statistics_can_be_looked_at_from_outside():
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

  (found, new_state) = devices.on_one_device(outputs)(params)
  moved = 0.99 * 0.0 + 0.01 * x["image"].mean(0)
  np.testing.assert_allclose(
    new_state["batch_stats"]["BatchNorm_0"]["mean"], moved, rtol=1e-5
  )
  assert found.shape == (6, 3)


class _Rows:
  """Images that are made when asked for."""

  dtype = np.dtype(np.uint8)

  def __init__(self, bank, rows):
    self._bank, self._rows = bank, rows
    self.shape = (*rows.shape, *bank.shape[1:])

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, chosen):
    return self._bank[self._rows[chosen]]


class _Pairs(classifier.Classifier):
  """An example is two images with a label each."""

  def forward(self, params, model_state, batch, key, train):
    image = batch["image"].astype(jnp.float32) / 255
    pairs = {**batch, "image": image.reshape(-1, image.shape[-1])}
    outputs, state = super().forward(params, model_state, pairs, key, train)
    return outputs.reshape(-1, 2, outputs.shape[-1]), state

  def init(self, key, batch):
    image = batch["image"].astype(jnp.float32).reshape(-1, batch["image"].shape[-1])
    return super().init(key, {**batch, "image": image})

  def check(self, batch, num_classes):
    assert num_classes == self.num_classes

  def loss(self, outputs, batch):
    flat = {"label": batch["label"].reshape(-1)}
    return super().loss(outputs.reshape(-1, 3), flat).reshape(-1, 2).mean(1)


def _pairs(examples, rng):
  rows = rng.integers(len(examples.label), size=(len(examples.label), 2))
  bank = np.clip(60 * examples.image + 128, 0, 255).astype(np.uint8)
  return examples._replace(
    image=_Rows(bank, rows),
    label=examples.label[rows],
    true_label=examples.true_label[rows],
  )


def test_an_example_may_be_made_when_asked_for_and_have_several_labels(tmp_path):
  splits = toy_runs.make_splits(num_train=80)
  rng = np.random.default_rng(0)
  pairs = {name: _pairs(getattr(splits, name), rng) for name in ("train", "test")}
  splits = splits._replace(**pairs)
  model = _Pairs(toy_runs.MODEL.model, 3)
  config = config_lib.Config(num_steps=40, batch_size=8, num_devices=1, eval_every=20)
  (found,) = loop.train(
    config,
    model,
    _UNIFORM,
    toy_runs.OPTIMIZER,
    [splits],
    tmp_path,
    probes=(lambda s: {"shape": float(np.prod(s.train.predicted.shape))},),
  )
  assert found.metrics["last"]["accuracy"] > 0.8
  assert found.metrics["probes"]["shape"] == [160.0] * 3
  assert set(found.weights) == {
    *("index", "source_index", "mean_weight", "last_weight", "seen", "rejected")
  }
  by_hand = evaluation.Predictions(
    np.array([[0, 1], [2, 2]]), np.array([[0, 1], [0, 2]]), np.zeros(2), 3
  )
  assert evaluation.accuracy(by_hand)["accuracy"] == 0.75
  bad = splits.train._replace(label=splits.train.label + 1)
  with pytest.raises(base.InputError, match=r"example .* has label 3"):
    loop.train(
      config,
      model,
      _UNIFORM,
      toy_runs.OPTIMIZER,
      [splits._replace(train=bad)],
      tmp_path / "bad",
    )
