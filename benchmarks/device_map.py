r"""The time of a training step under `jax.pmap` and under `jax.shard_map`.

Steps of the training loop, with the work of the host between two calls, on one and
on eight virtual CPU devices of one process. All of them take turns in random order, so
that other load on the machine affects all equally. Ratios compare times of the same
round.

Command: python -m benchmarks.device_map runs/device_map
Results: results/device_map; a row is a method on a number of devices under one map.
"""

import csv
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _turns
from l2rw_jax import base
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices
from l2rw_jax.training import run as run_lib

METHODS = {"uniform": baselines.uniform, "l2rw": l2rw.l2rw}
NUM_DEVICES = (1, 8)
_BATCH_SIZE = 128
_ROUNDS, _SECONDS = 200, 120.0


def make(method: base.Method, num_devices: int, kind: str) -> run_lib.Run:
  """A run on digits with wrong labels, by an MLP 64-256-10."""
  split = noisy_labels.noisy_labels(
    sources.load("digits", "train"),
    sources.load("digits", "test"),
    builder="uniform_flip",
    fraction=0.4,
    num_meta_per_class=10,
    seed=0,
  )
  config = config_lib.Config(
    num_steps=10**6,
    batch_size=_BATCH_SIZE,
    meta_batch_size=96,
    num_devices=num_devices,
    device_map=kind,
    steps_per_call=1,
  )
  model = classifier.Classifier(mlp.MLP(10, (256,)), 10)
  return run_lib.Run(config, model, method, optax.sgd(0.1), [split])


def implementation(name: str, num_devices: int, kind: str) -> _turns.Implementation:
  """A run as `_turns` times it; its program is compiled."""
  run = make(METHODS[name](), num_devices, kind)

  def take(num_steps):
    for _ in range(num_steps):
      run.take_steps()
    return float(run.fetch()[-1].metrics["loss"][0, -1])

  take(1)
  return _turns.Implementation(name, kind, "jax", take, {"num_devices": num_devices})


def rows(rounds: int = _ROUNDS, seconds: float = _SECONDS) -> list[dict[str, Any]]:
  """Times all of them; eight devices are needed."""
  made = [
    implementation(name, num_devices, kind)
    for num_devices in NUM_DEVICES
    for name in METHODS
    for kind in devices.MAPS
  ]
  results = []
  turns = _turns.take(made, rounds, seconds)
  for i, (each, measured) in enumerate(zip(made, turns, strict=True)):
    pmap = turns[i - i % len(devices.MAPS)]
    ratio = measured.seconds / pmap.seconds
    results.append(
      {
        "method": each.method,
        "num_devices": each.info["num_devices"],
        "device_map": each.engine,
        **_quartiles("step_ms", 1000 * measured.seconds),
        **_quartiles("ratio_to_pmap", ratio),
        "rounds": len(measured.seconds),
        "steps_per_turn": measured.steps,
        "batch_size": _BATCH_SIZE,
      }
    )
  return results


def _quartiles(name, values):
  low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
  return {
    name: round(float(median), 3),
    f"{name}_quartile_1": round(float(low), 3),
    f"{name}_quartile_3": round(float(high), 3),
  }


def main(folder: pathlib.Path) -> None:
  """Measures, prints the rows and writes them to a folder."""
  jax.config.update("jax_num_cpu_devices", max(NUM_DEVICES))
  info = {**workdir_lib.run_info(), "cores": _turns.num_cpus()}
  measured = rows()
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, [*measured[0], *info], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **info} for row in measured)
  for row in measured:
    print(" ".join(f"{name}={value}" for name, value in row.items()))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
