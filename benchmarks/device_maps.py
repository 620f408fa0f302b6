r"""The time of a training step under `jax.pmap` and under `jax.shard_map`.

Both run the same program on the devices of all processes, in alternating turns, so that
other load on the machine affects both equally. What differs is how the arguments and
results of a step are passed: with several processes, pmap converts arrays of a process
to arrays of all processes and back. The networks are small, so that the time of this
conversion is visible.

Command, on one machine with two processes of four virtual CPU devices each:
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
  for process in 0 1; do
    python -m benchmarks.device_maps --coordinator_address=localhost:8476 \
      --num_processes=2 --process_id=$process &
  done; wait
With one process: JAX_NUM_CPU_DEVICES=8 python -m benchmarks.device_maps.
Results: results/device_maps.
"""

import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import processes
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import run as run_lib

# The parameters of a network with these hidden units take 0.04, 0.3 and 5 MB.
_HIDDEN = ((64,) * 2, (256,) * 2, (1024,) * 2)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags, settings_lib.ProcessFlags):
  """The flags of this benchmark."""

  batch_size: int = flag(80)
  num_steps: int = flag(50, "Number of steps in a turn.")
  repeats: int = flag(
    10,
    "Number of timed rounds; each kind of map takes one turn in a round.",
    bounds=settings_lib.REPEATS,
  )


def _make_run(kind: str, hidden: tuple[int, ...], settings: Settings) -> run_lib.Run:
  train, test = (sources.load("digits", part) for part in ("train", "test"))
  split = noisy_labels.noisy_labels(
    train, test, builder="uniform_flip", fraction=0.4, num_meta_per_class=8, seed=0
  )
  config = config_lib.Config(
    num_steps=settings.num_steps * (settings.repeats + 1),
    batch_size=settings.batch_size,
    meta_batch_size=settings.batch_size,
    steps_per_call=1,
    device_map=kind,
  )
  model = classifier.Classifier(mlp.MLP(split.num_classes, hidden), split.num_classes)
  return run_lib.Run(config, model, l2rw.l2rw(), optax.sgd(0.01), [split])


def rows_of(hidden: tuple[int, ...], settings: Settings) -> list[dict[str, Any]]:
  """Times the steps of L2RW for one network; returns a row for each kind of map."""
  runs = {kind: _make_run(kind, hidden, settings) for kind in devices_lib.MAPS}
  turns: dict[str, list[float]] = {kind: [] for kind in runs}
  for _ in range(settings.repeats + 1):
    for kind, run in runs.items():
      processes.exchange("turn", "")  # All processes begin the turn together.
      start = time.perf_counter()
      for _ in range(settings.num_steps):
        run.take_steps()
      run.fetch()
      turns[kind].append(1000 * (time.perf_counter() - start) / settings.num_steps)
  # Both train from the same state with the same examples.
  first, second = (jax.device_get(run.host_state().params) for run in runs.values())
  same = all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))
  num_params = sum(x[0].size for x in jax.tree.leaves(first))
  for run in runs.values():
    run.close()
  # Programs are compiled in the first turn.
  ms = {kind: np.array(values[1:]) for kind, values in turns.items()}
  ratios = {kind: values / ms["pmap"] for kind, values in ms.items()}
  return [
    {
      "device_map": kind,
      "hidden": "-".join(map(str, hidden)),
      "num_params": num_params,
      "num_processes": processes.count(),
      "num_devices": len(jax.devices()),
      "step_ms": round(float(np.median(ms[kind])), 3),
      "step_ms_least": round(float(ms[kind].min()), 3),
      "step_ms_most": round(float(ms[kind].max()), 3),
      "ratio": round(float(np.median(ratios[kind])), 3),
      "ratio_least": round(float(ratios[kind].min()), 3),
      "ratio_most": round(float(ratios[kind].max()), 3),
      "same_params": same,
      "batch_size": settings.batch_size,
      "num_steps": settings.num_steps,
      "repeats": settings.repeats,
    }
    for kind in ms
  ]


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark; process 0 prints the results and writes them to a folder."""
  info = {**workdir_lib.run_info(), "cores": os.cpu_count()}
  path = pathlib.Path(workdir) / "results.csv"
  rows: list[dict[str, Any]] = []
  for hidden in _HIDDEN:
    rows += rows_of(hidden, settings)
    if processes.is_first():
      _rows.write(path, [{**row, **info} for row in rows])
  if processes.is_first():
    _rows.show(rows, path)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "device_maps")
