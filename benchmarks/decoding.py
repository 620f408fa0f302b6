"""How many images a second are decoded by threads, and by processes of grain.

Batches of CIFAR-10 are read from the files of TFDS as a streamed run reads them, at
random rows. All ways take turns, so that other load on the machine affects all equally.
When a way is not read, it reads ahead until its buffer is full, and waits.

Command: python -m benchmarks.decoding --data_dir=DIR
Results: results/decoding.
"""

import csv
import dataclasses
import os
import pathlib
import time
from typing import Any

import grain
import numpy as np

from benchmarks import _turns
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.training import streaming

# Numbers of threads, and of processes of one thread each.
_WAYS = {"1 thread": (1, 0), "2 threads": (2, 0), "2 processes": (1, 2)}


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of this benchmark."""

  SEVERAL_PROCESSES = False

  dataset: str = flag("cifar10")
  batch_size: int = flag(100)
  num_steps: int = flag(40, "Number of batches in a round.")
  repeats: int = flag(6, "Number of rounds.", bounds=settings_lib.REPEATS)


class _Batches:
  """Batches of images, decoded when they are read."""

  def __init__(self, images: Any, rows: np.ndarray):
    self._images, self._rows = images, rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, batch: int) -> np.ndarray:
    return self._images[self._rows[batch]]


def _reader(batches: _Batches, num_threads: int, num_processes: int) -> Any:
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=streaming.STEPS_AHEAD
  )
  data = grain.MapDataset.source(batches).to_iter_dataset(options)
  if num_processes:
    data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_processes))
  return iter(data)


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder."""
  info = {**workdir_lib.run_info(), "cores": _turns.num_cpus()}
  source = sources.load(
    settings.dataset,
    "train",
    data_dir=settings.data_dir,
    cache_dir=settings.cache_dir,
    in_memory=False,
  )
  per_round = settings.num_steps + streaming.STEPS_AHEAD
  shape = (per_round * (settings.repeats + 2), settings.batch_size)
  rows = np.random.default_rng(0).integers(len(source.images), size=shape)
  readers = {
    name: _reader(_Batches(source.images, rows), *way) for name, way in _WAYS.items()
  }
  seconds: dict[str, list[float]] = {name: [] for name in readers}
  for _ in range(settings.repeats + 1):
    for name, reader in readers.items():
      for _ in range(streaming.STEPS_AHEAD):  # Were read ahead before.
        next(reader)
      start = time.perf_counter()
      for _ in range(settings.num_steps):
        next(reader)
      seconds[name].append(time.perf_counter() - start)
  images = settings.num_steps * settings.batch_size
  results = []
  for name, taken in seconds.items():  # Processes are started in the first round.
    low, median, high = np.quantile(images / np.array(taken[1:]), (0.25, 0.5, 0.75))
    results.append(
      {
        "decoded_by": name,
        "images_per_second": round(median),
        "images_per_second_quartile_1": round(low),
        "images_per_second_quartile_3": round(high),
        "rounds": settings.repeats,
        "images_per_round": images,
      }
    )
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, [*results[0], *info], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **info} for row in results)
  for row in results:
    print(" ".join(f"{name}={value}" for name, value in row.items()))
  return results


if __name__ == "__main__":
  launch.main(Settings, run, "decoding")
