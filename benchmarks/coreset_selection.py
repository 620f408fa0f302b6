r"""The time to select 10% of MNIST, in epochs of training on MNIST.

The benchmark times what AdaCore and CRAIG do every few epochs: they select 6,000 of
60,000 examples, class by class, by the 10-dimensional gradients with respect to the
logits of a partly trained MLP (784-256-10). An epoch is 600 steps of that MLP in
batches of 100, with the compiled step of the training loop. The epoch and all
selections are timed in turn, round by round, and the results are medians over rounds,
so that other load on the machine affects all of them equally. The naive greedy
selection stores the whole distance matrix of each class and computes every gain at
every step. It is timed on a tenth of the examples only, and the lazy selection is also
timed on these examples for comparison.
Command: python -m benchmarks.coreset_selection --data_dir=DIR
Results: results/coreset_selection.
"""

from collections.abc import Callable, Sequence
import ctypes
import dataclasses
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.spatial import distance

from benchmarks import _turns
from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from experiments.tables import catalog
from l2rw_jax import base
from l2rw_jax import coresets
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.io import workdir
from l2rw_jax.methods import adacore
from l2rw_jax.methods import baselines
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import compilation
from l2rw_jax.training import device_data
from l2rw_jax.training import devices as devices_lib
from l2rw_jax.training import sampling


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  dataset: str = flag("mnist")
  fraction: float = flag(
    0.1,
    "Share of the training set to select, in (0, 1].",
    bounds=settings_lib.Bounds(1e-6, 1),
    group="data",
  )
  epsilon: tuple[float, ...] = flag(
    (0.1, 0.01),
    "Epsilon of stochastic greedy selection.",
    bounds=settings_lib.INNER_SHARE,
    group="method",
  )
  repeats: int = flag(5, "Number of rounds of timing.", bounds=settings_lib.REPEATS)
  epochs: int = flag(
    2,
    "Number of epochs of training before the gradients are taken.",
    bounds=settings_lib.EPOCHS,
  )
  part: int = flag(
    10,
    "Stride through the examples for the naive selection and for a second lazy one.",
    bounds=settings_lib.Bounds(1, 10**6),
    group="data",
  )


TABLE = catalog.CORESET_SELECTION
_BATCH_SIZE = 100


class Training:
  """Trains an MLP, one epoch at a time, with the step of the training loop."""

  def __init__(self, split: examples_lib.Splits):
    """Initializes the parameters; compilation happens in the first epoch."""
    self._size = len(split.train.label)
    classes = split.num_classes
    self._model = classifier.Classifier(mlp.MLP(classes, (256,)), classes)
    counts = examples_lib.class_counts(split.train, split.num_classes)
    self._counts = jnp.asarray(counts, jnp.int32)[None]
    self._devices = devices_lib.choose(1, _BATCH_SIZE)
    self._sampler = sampling.Sampler(
      (0,), self._order, num_train=self._size, batch_size=_BATCH_SIZE
    )
    self._data = device_data.DeviceData([split], self._devices, needs_meta=False)
    init, self._step = compilation.functions(
      self._model,
      baselines.uniform(),
      optax.sgd(0.1),
      self._size,
      self._size,
      1,
      tuple(self._devices),
    )
    self._train = examples_lib.as_batch(split.train)
    key = jax.random.key(0)[None]
    first = {k: v[None, :1] for k, v in self._train.items()}
    self._state = devices_lib.replicate(init(key, self._counts, first), self._devices)
    self._constants = devices_lib.replicate((key, self._counts), self._devices)

  def _order(self, run, epoch, rng):
    del run, epoch
    return rng.permutation(self._size)

  def epoch(self) -> None:
    """Trains for one epoch; examples that do not fill the last batch are left out."""
    for _ in range(self._size // _BATCH_SIZE):
      batch = self._data.load([self._sampler.next(0)])
      self._state, _ = self._step(self._state, *batch, *self._constants)
    jax.block_until_ready(self._state)

  def gradients(self) -> np.ndarray:
    """Returns the gradients of the losses with respect to the logits, [N, C]."""
    state = devices_lib.take(devices_lib.unreplicate(self._state), 0)
    problem = self._model.problem(
      class_counts=self._counts[0], num_examples=self._size, num_steps=1
    )
    view = base.EpochView(
      0, 0, state.params, state.model_state, self._train, np.random.default_rng(0)
    )
    derivatives = adacore.loss_derivatives(
      problem, view, jax.random.key(0), scope=None, last_layer=False, num_probes=1
    )
    return np.asarray(derivatives.gradients)


def naive_greedy(proxies: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
  """Selects the same rows as lazy `coresets.select`, from all distances and gains.

  Args:
    proxies: the vectors that represent the examples, [N, D].
    labels: the labels, [N].
    size: the number of rows to select.

  Returns:
    The selected rows, ascending.
  """
  classes, counts = np.unique(labels, return_counts=True)
  selected = []
  for c, budget in zip(
    classes, coresets.class_budgets(counts.tolist(), size), strict=True
  ):
    members = np.flatnonzero(labels == c)
    distances = distance.cdist(proxies[members], proxies[members])
    nearest = np.full(len(members), 2 * distances.max())
    rows: list[int] = []
    for _ in range(budget):
      gains = np.maximum(nearest - distances, 0).sum(axis=1)
      gains[rows] = -np.inf
      rows.append(int(np.argmax(gains)))
      nearest = np.minimum(nearest, distances[rows[-1]])
    selected.append(members[rows])
  return np.sort(np.concatenate(selected))


def cost(proxies: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> float:
  """The sum of the distances of examples to the nearest selected one of their class."""
  total = 0.0
  for c in np.unique(labels):
    selected = rows[labels[rows] == c]
    total += distance.cdist(proxies[labels == c], proxies[selected]).min(axis=1).sum()
  return float(total)


def extra_mib(run: Callable[[], Any]) -> float | None:
  """Measures how much the memory of this process grows while `run` runs.

  Args:
    run: the function to measure.

  Returns:
    The peak increase in MiB, or None on systems other than Linux.
  """
  try:
    # Return freed memory to the kernel, and reset the peak that it reports.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except (AttributeError, OSError, TypeError):
    return None
  before = _status_mib("VmRSS")
  run()
  return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
  text = pathlib.Path("/proc/self/status").read_text()
  match = re.search(rf"{name}:\s+(\d+) kB", text)
  return int(match[1]) / 1024 if match else float("nan")


def selections(
  settings: Settings, proxies: np.ndarray, labels: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray, Callable[[], np.ndarray]]]:
  """Returns the selections to time.

  Args:
    settings: the flags of the benchmark.
    proxies: the vectors that represent the examples, [N, D].
    labels: the labels, [N].

  Returns:
    By name, the proxies and labels to select from, and a function that returns the
    selected rows.
  """

  def make(proxies, labels, greedy, epsilon=0.1):
    size = adacore.subset_size(settings.fraction, len(labels))

    def select():
      if greedy == "naive":
        return naive_greedy(proxies, labels, size)
      key = jax.random.key(0)
      return coresets.select(
        proxies, labels, size, greedy=greedy, epsilon=epsilon, key=key
      ).rows

    return proxies, labels, select

  whole, part = (proxies, labels), (proxies[:: settings.part], labels[:: settings.part])
  return {
    "lazy": make(*whole, "lazy"),
    **{
      f"stochastic {epsilon:g}": make(*whole, "stochastic", epsilon)
      for epsilon in settings.epsilon
    },
    "naive, of a part": make(*part, "naive"),
    "lazy, of a part": make(*part, "lazy"),
  }


class Turn(NamedTuple):
  """One measurement.

  Attributes:
    seconds: the wall-clock time.
    cpu_seconds: the CPU time of all processor cores together.
  """

  seconds: float
  cpu_seconds: float


def _turn(run: Callable[[], Any]) -> Turn:
  started, cpu_started = time.perf_counter(), time.process_time()
  run()
  return Turn(time.perf_counter() - started, time.process_time() - cpu_started)


def load(settings: Settings) -> examples_lib.Splits:
  """Loads the data set, all of whose training examples have their true labels.

  Raises:
    InputError: --fraction selects fewer examples than there are classes, either from
      all examples or from those that the naive selection uses.
  """
  train, test = settings.load("train"), settings.load("test")
  split = noisy_labels.noisy_labels(
    train, test, builder="uniform_flip", fraction=0.0, num_meta_per_class=0, seed=0
  )
  for every in (1, settings.part):
    labels = split.train.label[::every]
    size, classes = adacore.subset_size(settings.fraction, len(labels)), set(labels)
    if size < len(classes):
      part, advice = "", ""
      if every > 1:
        part, advice = f" with --part={every}", " or lower --part"
      raise base.InputError(
        f"--fraction={settings.fraction:g}{part} selects {size} of {len(labels)}"
        f" examples in {len(classes)} classes; raise --fraction{advice}, so that there"
        " is one for each class."
      )
  return split


def measure(settings: Settings, split: examples_lib.Splits) -> runner.Rows:
  """Returns a row for the epoch and for each selection."""
  training = Training(split)
  for _ in range(settings.epochs):
    training.epoch()
  proxies, labels = training.gradients(), split.train.label
  timed = selections(settings, proxies, labels)
  # The first call compiles.
  selected = {name: select() for name, (_, _, select) in timed.items()}
  extra = {name: extra_mib(select) for name, (_, _, select) in timed.items()}
  turns: dict[str, list[Turn]] = {name: [] for name in ("epoch", *timed)}
  for _ in range(settings.repeats):
    turns["epoch"].append(_turn(training.epoch))
    for name, (_, _, select) in timed.items():
      turns[name].append(_turn(select))
  columns = {"dataset": settings.dataset, "fraction": settings.fraction}
  columns |= {"repeats": settings.repeats, "cpus": _turns.num_cpus()}
  columns |= {"seed": 0, "data": split.fingerprint}
  rows = []
  for name in turns:
    row = {"method": name, **columns, "num_examples": len(labels)}
    row |= {"num_chosen": None, "cost": None}
    if name in timed:
      proxies_of, labels_of, _ = timed[name]
      row |= {"num_examples": len(labels_of), "num_chosen": len(selected[name])}
      row["cost"] = cost(proxies_of, labels_of, selected[name])
    row |= summary(turns[name], turns["epoch"])
    rows.append({**row, "extra_mib": extra.get(name), **workdir.run_info()})
  return rows


def summary(turns: Sequence[Turn], epochs: Sequence[Turn]) -> dict[str, float]:
  """Computes the columns of a row: medians over rounds, and the range of the seconds.

  Args:
    turns: the measurements of a selection, one per round.
    epochs: the measurements of an epoch, in the same rounds.

  Returns:
    Times in seconds, and relative to the epoch of the same round.
  """
  times, epoch_times = np.array(turns), np.array(epochs)
  seconds, cpu_seconds = np.median(times, axis=0)
  ratio, cpu_ratio = np.median(times / epoch_times, axis=0)
  return {
    "seconds": float(seconds),
    "seconds_least": float(times[:, 0].min()),
    "seconds_most": float(times[:, 0].max()),
    "epochs": float(ratio),
    "cpu_seconds": float(cpu_seconds),
    "cpu_epochs": float(cpu_ratio),
  }


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws a bar for the epoch and for each selection, and a line at one epoch."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, ax = plt.subplots(figsize=(7, 0.8 + 0.45 * len(rows)))
  names = [f"{r['method']} ({r['num_examples']:,} examples)" for r in rows]
  bars = ax.barh(names, [r["epochs"] for r in rows])
  labels = [f"{r['epochs']:.2f} ({r['seconds']:.2f} s)" for r in rows]
  # The background hides the line behind a label.
  background = {"facecolor": "white", "linewidth": 0, "pad": 1}
  ax.bar_label(bars, labels, padding=4, bbox=background)
  ax.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
  ax.invert_yaxis()
  ax.margins(x=0.28)
  ax.set_xlabel(
    f"epochs of training, median of {rows[0]['repeats']} ratios (median seconds)"
  )
  ax.set_title(f"Time to select {rows[0]['fraction']:.0%} of {rows[0]['dataset']}")
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: a flag is invalid, or the data set cannot be read.
  """
  adacore.check_fraction("--fraction", settings.fraction)
  for epsilon in settings.epsilon:
    coresets.check_greedy("stochastic", epsilon)
  split = load(settings)  # Raises before anything is written.
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows = measure(settings, split)
  draw(rows, folder / "figure.png")
  return runner.report(settings, TABLE, folder, rows)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
