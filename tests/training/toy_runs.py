"""Tiny problems whose runs take about a second, and access to their files."""

import json
import pathlib
from typing import Any

import numpy as np
import optax
import orbax.checkpoint as ocp

from l2rw_jax.data import examples as examples_lib
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop
from l2rw_jax.training import sampling

CLASSES = 3
NUM_TRAIN = 40
MODEL = classifier.Classifier(mlp.MLP(CLASSES, hidden=(8,)), CLASSES)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def examples(rng, size, shape, flipped=0.0) -> examples_lib.Examples:
  """Gaussian blobs, one per class. The first `flipped * size` labels are wrong."""
  centers = np.random.default_rng(99).normal(size=(CLASSES, *shape))
  true_label = rng.integers(CLASSES, size=size).astype(np.int32)
  image = centers[true_label] + 0.5 * rng.normal(size=(size, *shape))
  label = true_label.copy()
  wrong = slice(0, int(flipped * size))
  label[wrong] = (label[wrong] + 1) % CLASSES
  index = np.arange(size, dtype=np.int32)
  return examples_lib.Examples(
    image.astype(np.float32), label, true_label, index, 3 * index + 1
  )


def make_splits(
  seed=0, num_train=NUM_TRAIN, num_meta=8, shape=(4,)
) -> examples_lib.Splits:
  """Splits of one seed; a third of the training labels are wrong."""
  rng = np.random.default_rng(seed)
  return examples_lib.Splits(
    train=examples(rng, num_train, shape, flipped=1 / 3),
    meta=examples(rng, num_meta, shape),
    validation=examples(rng, 0, shape),
    test=examples(rng, 20, shape),
    num_classes=CLASSES,
    fingerprint=f"fingerprint-{seed}",
  )


def train(
  folder, method, splits=None, model=MODEL, probes=(), epoch_probes=(), **settings: Any
):
  """Calls `loop.train` with a batch of 8, one device and a row of metrics per step."""
  seeds = settings.setdefault("seeds", (0,))
  defaults = {"num_steps": 7, "batch_size": 8, "log_every": 1, "eval_every": 3}
  config = config_lib.Config(**(defaults | {"num_devices": 1} | settings))
  splits = splits or [make_splits(seed) for seed in seeds]
  return loop.train(
    config,
    model,
    method,
    OPTIMIZER,
    splits,
    folder,
    name="toy",
    probes=probes,
    epoch_probes=epoch_probes,
  )


def rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's `metrics.jsonl`."""
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def saved(folder: pathlib.Path) -> tuple[int, dict[str, np.ndarray]]:
  """Step of the latest checkpoint, and its arrays by their path in the state."""
  latest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
  leaves = json.loads((latest / "record" / "metadata").read_text())["leaves"]
  with ocp.StandardCheckpointer() as checkpointer:
    arrays = checkpointer.restore(latest / "arrays")
  return int(latest.name), {leaves[int(i)]["path"]: x for i, x in arrays.items()}


def saved_params(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The parameters of all runs in the latest checkpoint, [R, ...]."""
  return {name: x for name, x in saved(folder)[1].items() if ".params" in name}


def files(folder: pathlib.Path) -> dict[str, bytes]:
  """All files of a run by path, except times and TensorBoard events."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file() and "tensorboard" not in path.parts and path.stem != "timing"
  }


def outcome(folder: pathlib.Path) -> dict[str, bytes]:
  """`files` without checkpoints, whose file names are random."""
  return {k: v for k, v in files(folder).items() if "checkpoints" not in k}


def interrupt(monkeypatch, at: int) -> None:
  """Makes runs raise KeyboardInterrupt before they draw the rows of step `at`."""
  original = sampling.Sampler.next

  def stop(self, step):
    if step == at:
      raise KeyboardInterrupt
    return original(self, step)

  monkeypatch.setattr(sampling.Sampler, "next", stop)
