r"""The speed and the memory of training with streamed examples.

Each network is trained on the same rows of CIFAR-10 in four ways. The examples stay
on the device (resident), are copied from an array in memory (memory), or are decoded
from the files of TFDS, by threads (files) or by worker processes (workers). The four
runs take turns, so that other load on the machine affects all equally; the results are
medians over rounds. The column input_share is the time that the loop waits for the
examples of its steps, divided by the time of the steps. The same files are also decoded
without training, by threads and by workers in alternating turns.

Before these measurements, a network is trained on a set of generated examples that is
ten times as large as the read-ahead buffer, to measure how much the memory of the
process grows. This needs Linux.
Command: python -m benchmarks.streaming --data_dir=DIR
Results: results/streaming.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import os
import pathlib
import time
from typing import Any

from flax import linen as nn
import numpy as np
import optax

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import read_workers
from l2rw_jax.training import run as run_lib
from l2rw_jax.training import streaming

_NETWORKS: dict[str, Callable[[], nn.Module]] = {
  "mlp": lambda: mlp.MLP(10, (256,)),
  "lenet": lambda: lenet.LeNet(10),
}
# Whether the images are in memory, for each way of reading the data.
_IN_MEMORY = {"files": False, "workers": False, "memory": True, "resident": True}
_MIB = 2**20
# Number of values of a generated example, which are 256 KiB of float32.
_VALUES = 2**16


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  dataset: str = flag("cifar10")
  networks: tuple[str, ...] = flag(
    tuple(_NETWORKS), "Networks to train.", choices=_NETWORKS
  )
  batch_size: int = flag(100)
  num_steps: int = flag(20, "Number of timed steps of each run in a round.")
  repeats: int = flag(4, "Number of rounds.", bounds=settings_lib.REPEATS)
  data_workers: int = flag(
    2,
    "Number of worker processes.",
    bounds=settings_lib.Bounds(1, streaming.MOST_THREADS),
  )


class Generated:
  """A set of examples that are computed when they are read."""

  dtype = np.dtype(np.float32)
  fingerprint = "generated"

  def __init__(self, size: int):
    """A set of `size` examples."""
    self.shape = (size, _VALUES)

  def __len__(self) -> int:
    """The number of examples."""
    return self.shape[0]

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Returns some examples; example i of N has the value i / N everywhere."""
    numbers = np.arange(len(self), dtype=np.float32)[rows] / len(self)
    return np.broadcast_to(numbers[:, None], (len(numbers), _VALUES)).copy()


def _peak_mib() -> float:
  """The largest resident memory of the process since the last reset."""
  status = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (x for x in status if x.startswith("VmHWM"))
  return int(line.split()[1]) / 1024


def _reset_peak() -> None:
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def _make_run(
  network: nn.Module,
  split: examples_lib.Splits,
  batch_size: int,
  num_steps: int,
  data: str,
  num_workers: int = 0,
) -> run_lib.Run:
  method = l2rw.l2rw()
  config = config_lib.Config(
    num_steps=num_steps,
    batch_size=batch_size,
    meta_batch_size=min(batch_size, len(split.meta.label)),
    num_devices=1,
    steps_per_call=1,
    data=data,
    data_workers=num_workers,
  )
  model = classifier.Classifier(network, split.num_classes)
  return run_lib.Run(config, model, method, optax.sgd(0.01), [split])


def _take_steps(run: run_lib.Run, num_steps: int) -> None:
  for _ in range(num_steps):
    run.take_steps()
  run.fetch()


def memory_row() -> dict[str, Any]:
  """Trains on a generated set of ten times the buffer, and measures the memory."""
  batch_size = 32
  num_steps = 10 * streaming.STEPS_AHEAD
  size = num_steps * batch_size
  labels = np.arange(size) % 10
  meta = (np.zeros((10, _VALUES), np.float32), np.arange(10))
  source = Generated(size)
  split = examples_lib.from_arrays((source, labels), meta=meta, test=meta)
  run = _make_run(mlp.MLP(10, (8,)), split, batch_size, num_steps, "stream")
  _take_steps(run, 2)
  _reset_peak()
  before = _peak_mib()
  _take_steps(run, num_steps - 2)
  growth = _peak_mib() - before
  run.close()
  return {
    "part": "memory",
    "network": "mlp of width 8",
    "data": "generated",
    "set_mib": size * _VALUES * 4 / _MIB,
    "buffer_mib": streaming.STEPS_AHEAD * batch_size * _VALUES * 4 / _MIB,
    "growth_mib": round(growth, 1),
  }


def make_splits(settings: Settings) -> dict[bool, examples_lib.Splits]:
  """Splits with images in memory (True), and with images decoded when read (False)."""
  splits = {}
  for in_memory in (False, True):
    train, test = (
      sources.load(
        settings.dataset,
        part,
        data_dir=settings.data_dir,
        cache_dir=settings.cache_dir,
        in_memory=in_memory,
      )
      for part in ("train", "test")
    )
    splits[in_memory] = noisy_labels.noisy_labels(
      train, test, builder="uniform_flip", fraction=0.4, num_meta_per_class=10, seed=0
    )
  return splits


def speed_rows(
  settings: Settings, network: str, splits: dict[bool, examples_lib.Splits]
) -> list[dict[str, Any]]:
  """Times the steps of a network for each way of reading the data."""
  num_steps = (settings.num_steps + streaming.STEPS_AHEAD) * (settings.repeats + 1)
  runs = {
    name: _make_run(
      _NETWORKS[network](),
      splits[in_memory],
      settings.batch_size,
      num_steps,
      "resident" if name == "resident" else "stream",
      settings.data_workers if name == "workers" else 0,
    )
    for name, in_memory in _IN_MEMORY.items()
  }
  turns: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
  for _ in range(settings.repeats + 1):
    for name, run in runs.items():
      time.sleep(0.5)  # The other runs read ahead until their buffers are full.
      _take_steps(run, streaming.STEPS_AHEAD)  # Their examples were read ahead.
      start, waited = time.perf_counter(), run.input_seconds
      _take_steps(run, settings.num_steps)
      seconds = time.perf_counter() - start
      turns[name].append((seconds, run.input_seconds - waited))
  for run in runs.values():
    run.close()
  # Programs are compiled in the first turn.
  return [_speed_row(settings, network, name, turns[name][1:]) for name in runs]


def decoding_rows(
  settings: Settings, split: examples_lib.Splits
) -> list[dict[str, Any]]:
  """Times the decoding of batches by threads and by workers, without training."""
  source = split.train.image
  (remote,), workers = read_workers.read_by_workers(
    [{"image": source}], settings.data_workers
  )
  assert workers is not None
  rng, readers = np.random.default_rng(0), {"files": source, "workers": remote["image"]}
  turns: dict[str, list[float]] = {name: [] for name in readers}
  with futures.ThreadPoolExecutor(settings.data_workers) as pool:
    for _ in range(settings.repeats + 1):
      for name, reader in readers.items():
        shape = (settings.num_steps, settings.batch_size)
        batches = rng.integers(len(source), size=shape)
        start = time.perf_counter()
        list(pool.map(reader.__getitem__, batches))
        turns[name].append(time.perf_counter() - start)
  workers.close()
  # Workers start in the first turn.
  return [
    {
      "part": "decoding",
      "data": name,
      "examples_per_second": round(
        settings.num_steps * settings.batch_size / float(np.median(seconds[1:]))
      ),
      "batch_size": settings.batch_size,
      "num_steps": settings.num_steps,
      "repeats": settings.repeats,
    }
    for name, seconds in turns.items()
  ]


def _speed_row(
  settings: Settings, network: str, name: str, turns: Sequence[tuple[float, float]]
) -> dict[str, Any]:
  seconds, waited = np.array(turns).T
  step_ms = 1000 * seconds / settings.num_steps
  return {
    "part": "speed",
    "network": network,
    "data": name,
    "step_ms": round(float(np.median(step_ms)), 2),
    "step_ms_least": round(float(step_ms.min()), 2),
    "step_ms_most": round(float(step_ms.max()), 2),
    "examples_per_second": round(
      1000 * settings.batch_size / float(np.median(step_ms))
    ),
    "input_share": round(float(np.median(waited / seconds)), 4),
    "batch_size": settings.batch_size,
    "num_steps": settings.num_steps,
    "repeats": settings.repeats,
  }


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: the data set cannot be read.
  """
  info = {**workdir_lib.run_info(), "cores": os.cpu_count()}
  path = pathlib.Path(workdir) / "streaming.csv"
  rows = [memory_row()]
  splits = make_splits(settings)
  rows += decoding_rows(settings, splits[False])
  for network in settings.networks:
    rows += speed_rows(settings, network, splits)
    _rows.write(path, [{**row, **info} for row in rows])
  _rows.show(rows, path)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "streaming")
