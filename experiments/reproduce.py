r"""Reproduces published numbers, those that are most valuable per minute first.

The catalog has the published numbers on MNIST and CIFAR-10, but not those on CIFAR-100:
the MNIST figure and the CIFAR tables of L2RW (Ren et al., 2018), the tables of
Meta-Weight-Net (Shu et al., 2019), MentorNet-PD (Jiang et al., 2018), LDAM-DRW (Cao et
al., 2019) and BARE (Patel and Sastry, 2023), and the time of a step. Each number is a
cell: a run of its script, with several seeds except for the time of a step, in a
separate folder below --workdir. The value of a cell is 3 if its paper proposes its
method, and 1 otherwise; it is divided by 10 if the committed results have enough runs.
Command: python -m experiments.reproduce --list
  python -m experiments.reproduce --device=gpu --minutes=30
  python -m experiments.reproduce --rehearse  (a few steps of every cell)
Time: the value of --minutes. When the time is up, the running cell saves a checkpoint,
  and the same command continues from it. A cell that would take longer than the
  remaining time is not started.
Estimates: the FLOPs of a cell are the FLOPs of a forward pass, which XLA counts, times
  the numbers of passes, examples, steps and seeds. The estimates assume 40 GFLOP/s on
  two CPU cores, because convolutions reach 33 to 48 in results/step_time. Nothing was
  measured on a GPU: 20 TFLOP/s and 30 microseconds for each layer and pass are
  assumptions for an H100. The times of cells that have run in --workdir correct the
  estimates of the others.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import shlex
import signal
import statistics
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import cifar_long_tail
from experiments import cifar_noise
from experiments import mnist_imbalance
from experiments import mnist_noise
from experiments.lib import launch
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag
from experiments.tables import published
from experiments.tables import published_cifar
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.models import lenet

_RECORD = "reproduce.json"
DEVICES = ("cpu", "gpu")
# Floating-point operations per second, see the module docstring.
_SPEED = {"cpu": 40e9, "gpu": 20e12}
# Seconds of overhead for each layer and pass, whatever the size of the layer.
_LAUNCH = {"cpu": 5e-6, "gpu": 30e-6}
_COMPILE_MINUTES = {"cpu": 0.5, "gpu": 1.5}
# The committed mentor of MentorNet-PD. The mentor of MentorNet-DD was fitted to losses
# on MNIST, which is not the published protocol, so the cells of MentorNet-DD are left
# out.
_MENTOR = "results/mentornet_pretrain/pd/mentor.json"
_LEFT_OUT = ("mentornet_dd",)
_CIFAR, _MNIST = (32, 32, 3), (28, 28, 1)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this script."""

  list: bool = flag(False, "Print the catalog and run nothing.", group="output")
  rehearse: bool = flag(
    False,
    "Run a few steps of every cell (an epoch for mnist_noise) in WORKDIR/rehearsal,"
    " with one seed and, except on MNIST, a small network. The full networks are"
    " traced, but not trained.",
  )
  only: tuple[str, ...] = flag(
    (),
    "Names of cells, or parts of names, separated by commas: run or list only these.",
  )
  device: str | None = flag(
    None,
    "Device of the run and of the estimates.",
    unset="the one that JAX uses",
    choices=DEVICES,
  )
  minutes: float | None = flag(
    None, "Minutes after which to stop.", unset="no limit", bounds=(0.01, 1e6)
  )
  num_seeds: int = flag(
    3, "Number of seeds of a cell. Without this flag, the MNIST figure has 10 splits."
  )
  results: str = data_flag(
    "results",
    "Folder of committed results. Cells with enough runs there have a lower priority.",
  )


class Paper(NamedTuple):
  """A paper whose numbers are in the catalog.

  Attributes:
    table: the paper, and the table in it.
    proposed: the method that it proposes, whose cells have a higher value than the
      cells of the baselines.
    note: the part of the protocol that is uncertain, if any.
  """

  table: str
  proposed: str
  note: str = ""


_PAPERS = {
  "mnist_imbalance": Paper("Ren et al. 2018, figure 3", "l2rw"),
  "bare": Paper("Patel and Sastry 2023, MNIST table", "bare"),
  "l2rw_uniform": Paper("Ren et al. 2018, UniformFlip table", "l2rw"),
  "l2rw_background": Paper("Ren et al. 2018, BackgroundFlip table", "l2rw"),
  "mwn_uniform": Paper(
    "Shu et al. 2019, uniform noise",
    "meta_weight_net",
    "published baselines on a longer schedule",
  ),
  "mwn_flip": Paper(
    "Shu et al. 2019, flip noise",
    "meta_weight_net",
    "length of the schedule not verified",
  ),
  "mentornet": Paper(
    "Jiang et al. 2018, table 2",
    "mentornet_pd",
    "whether the true class is drawn too is not verified",
  ),
  "ldam": Paper("Cao et al. 2019, tables 2 and 5", "ldam_drw"),
  "mwn": Paper("Shu et al. 2019, long tails", "meta_weight_net"),
}


class Cell(NamedTuple):
  """A published number, and the run that reproduces it.

  Attributes:
    name: name of its folder.
    paper: the paper, and the table in it.
    module: module of the script.
    method: name of the method in --methods.
    facts: columns of the rows of this cell in addition to the method.
    settings: settings of the script, without folders and seeds.
    published: the published number; None if the cell is not a number in a table.
    spread: the published "±", or None.
    column: column of the rows that is compared with the published number.
    repeats: number of seeds unless --num_seeds is given; None is the value of that
      flag.
    size: the sizes that determine the cost; None if the cell is not a training run.
    is_proposed: whether the paper proposes the method.
    note: the part of the protocol that is uncertain, if any.
  """

  name: str
  paper: str
  module: str
  method: str
  facts: dict[str, Any]
  settings: dict[str, Any]
  published: float | None = None
  spread: float | None = None
  column: str = "accuracy_percent"
  repeats: int | None = None
  size: "Size | None" = None
  is_proposed: bool = False
  note: str = ""

  @property
  def command(self) -> str:
    """The command that makes the same run, without folders and seeds."""
    parts = ["python", "-m", self.module]
    for name, value in self.settings.items():
      several = isinstance(value, tuple)
      is_list = several and all(isinstance(one, str) for one in value)
      if is_list and name != "mentor":
        parts.append(f"--{name}={','.join(value)}")
      else:
        parts += [f"--{name}={one}" for one in (value if several else (value,))]
    return shlex.join(parts)


class Size(NamedTuple):
  """The sizes that determine the cost of a training run.

  Attributes:
    network: name of the network in `_network`.
    num_steps: number of updates.
    batch_size: B.
    meta_batch_size: M, for methods with a meta batch.
  """

  network: str
  num_steps: int
  batch_size: int
  meta_batch_size: int


def catalog() -> list[Cell]:
  """Every published cell, grouped by paper."""
  return [*_imbalance(), *_bare(), *_cifar_noise(), *_long_tail(), *_step_time()]


def _cell(
  *name: str, paper: str, facts: dict[str, Any], settings: dict[str, Any], **others: Any
) -> Cell:
  """A cell of a paper.

  Args:
    *name: the parts of its name: the script, the setting, and the method.
    paper: a key of `_PAPERS`.
    facts: columns of the rows of this cell in addition to the method.
    settings: settings of the script in addition to the method.
    **others: other attributes of the cell.
  """
  script, method = name[0], name[-1]
  table, proposed, note = _PAPERS[paper]
  return Cell(
    *("-".join(name), table, f"experiments.{script}", method, facts),
    {**settings, "methods": (method,)},
    is_proposed=method == proposed,
    note=note,
    **others,
  )


def _imbalance() -> Iterator[Cell]:
  size = Size("mnist_lenet", mnist_imbalance.PROTOCOLS["paper"].num_steps, 100, 10)
  for method, numbers in published.MNIST_IMBALANCE.items():
    for majority, (error, spread) in numbers.items():
      yield _cell(
        *("mnist_imbalance", f"{majority:g}", method),
        paper="mnist_imbalance",
        facts={"dataset": "mnist", "majority": majority, "protocol": "paper"},
        settings={"majority": (majority,)},
        published=error,
        spread=spread,
        column="error_percent",
        repeats=10,
        size=size,
      )


def _bare() -> Iterator[Cell]:
  preset = mnist_noise.PRESETS["bare"]
  # The training set has 48,000 of the 60,000 images; 11,000 are for validation, and
  # 1,000 are the clean ones.
  steps = preset.num_epochs * (48_000 // preset.batch_size)
  size = Size("mnist_mlp", steps, preset.batch_size, preset.meta_batch_size)
  for (noise, fraction), methods in published.MNIST_NOISE.items():
    shared = {"preset": "bare", "pixels": "raw", "noise": noise}
    for method, (accuracy, spread) in methods.items():
      yield _cell(
        *("mnist_noise", "bare", noise, f"{fraction:g}", method),
        paper="bare",
        facts={
          **{"dataset": "mnist", "initialization": preset.initialization},
          **shared,
          "fraction": fraction,
        },
        settings={**shared, "noise_fraction": (fraction,)},
        published=accuracy,
        spread=spread,
        size=size,
      )


def _cifar_noise() -> Iterator[Cell]:
  for name, noise, fraction, method in published_cifar.noise_cells("cifar10"):
    if method in _LEFT_OUT:
      continue
    preset = cifar_noise.PRESETS[name]
    sizes = (preset.num_steps, preset.batch_size, preset.meta_batch_size)
    number = published_cifar.lookup(name, "cifar10", noise, fraction, method)
    shared = {"preset": name, "dataset": "cifar10"}
    cell = _cell(
      *("cifar_noise", name, f"{fraction:g}", method),
      paper=name,
      facts={**shared, "noise": noise, "fraction": fraction, "network": preset.network},
      settings={**shared, "noise_fraction": fraction},
      published=number[0],
      spread=number[1],
      size=Size(preset.network, *sizes),
    )
    if method == "mentornet_pd":
      cell.settings["mentor"] = (_MENTOR,)
    yield cell


def _long_tail() -> Iterator[Cell]:
  for method, builder, shape, imbalance in published_cifar.long_tail_cells("cifar10"):
    preset = cifar_long_tail.PRESETS[builder]
    size = _tail_size(builder, shape, imbalance)
    num_steps = preset.num_epochs * (size // preset.batch_size)
    shared = {"preset": builder, "shape": shape}
    data = {"dataset": "cifar10", "builder": builder, "network": "resnet_32"}
    yield _cell(
      *("cifar_long_tail", builder, shape, f"{imbalance:g}", method),
      paper=builder,
      facts={**shared, **data, "imbalance": imbalance},
      settings={**shared, "imbalance": (imbalance,)},
      published=published_cifar.long_tail("cifar10", method, builder, shape, imbalance),
      size=Size("resnet_32", num_steps, preset.batch_size, 100),
    )


def _tail_size(builder: str, shape: str, imbalance: float) -> int:
  """Number of training images in a long-tailed CIFAR-10."""
  largest = 5000 - (10 if builder == "mwn" else 0)
  if shape == "step":
    return 5 * largest + 5 * int(largest / imbalance)
  return sum(int(largest * imbalance ** (-c / 9)) for c in range(10))


def _step_time() -> Iterator[Cell]:
  wide = {"networks": ("wrn_28_10",), "dtype": "bfloat16"}
  facts = {"network": "wrn_28_10", "dtype": "bfloat16"}
  for name, settings, of_rows in (
    ("step_time", {}, {"dtype": "float32"}),
    ("step_time-wrn_28_10", wide, facts),
  ):
    paper = "Ren et al. 2018: about 3 times plain training"
    cell = Cell(name, paper, "benchmarks.step_time", "l2rw", of_rows, settings)
    yield cell._replace(column="ratio", repeats=1, is_proposed=True)


# Minutes of cells without a size. The first number was measured on two CPU cores; the
# others are assumptions.
_FIXED_MINUTES = {
  "step_time": {"cpu": 20.0, "gpu": 5.0},
  "step_time-wrn_28_10": {"cpu": 240.0, "gpu": 3.0},
}


def _network(name: str) -> tuple[Any, tuple[int, ...]]:
  """A network by the name in `Size`, and the shape of its images."""
  if name == "mnist_lenet":
    return lenet.LeNet(1), _MNIST
  if name == "mnist_mlp":
    return registries.SMALL_NETWORKS["mlp"](10), _MNIST
  return registries.NETWORKS[name](10), _CIFAR


class Forward(NamedTuple):
  """The forward pass of one example.

  Attributes:
    flops: floating-point operations, as XLA counts them before optimization.
    layers: number of layers with a kernel.
    has_batch_norm: whether there is BatchNorm, which the layerwise engine refuses.
  """

  flops: float
  layers: int
  has_batch_norm: bool


@functools.cache
def forward(name: str) -> Forward:
  """Traces a network without compiling it; InputError if XLA counts no FLOPs."""
  model, shape = _network(name)
  image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  cost = jax.jit(model.apply).lower(variables, image).cost_analysis()
  cost = cost[0] if isinstance(cost, list) else cost
  if not cost or not cost.get("flops"):
    raise base.InputError(f"XLA does not count the FLOPs of {name} on this device.")
  kernels = sum(x.ndim > 1 for x in jax.tree.leaves(variables["params"]))
  return Forward(float(cost["flops"]), kernels, "batch_stats" in variables)


def passes(method: str, has_batch_norm: bool) -> tuple[int, int]:
  """Forward passes of a step for each training example and for each clean example.

  A backward pass counts as 2 forward passes. WarPI and the advisor cost as much as
  Meta-Weight-Net with BatchNorm (docs/speed.md).
  """
  if method == "l2rw":
    return (5 if has_batch_norm else 4), 3
  if method in ("meta_weight_net", "warpi", "advisor"):
    is_plain = method == "meta_weight_net" and not has_batch_norm
    return (5 if is_plain else 7), 3
  return 3, 0


def seeds(settings: Settings, cell: Cell) -> int:
  """Number of runs of a cell."""
  if cell.repeats is None or settings.is_given("num_seeds"):
    return settings.num_seeds
  return cell.repeats


def flops(settings: Settings, cell: Cell) -> float | None:
  """Floating-point operations of all runs of a cell; None if it has no size."""
  if cell.size is None:
    return None
  pass_ = forward(cell.size.network)
  train, meta = passes(cell.method, pass_.has_batch_norm)
  examples = train * cell.size.batch_size + meta * cell.size.meta_batch_size
  return seeds(settings, cell) * cell.size.num_steps * examples * pass_.flops


def estimated_minutes(settings: Settings, cell: Cell, device: str) -> float:
  """Estimated minutes of a cell, by the rules in the module docstring."""
  if cell.size is None:
    return _FIXED_MINUTES[cell.name][device]
  pass_ = forward(cell.size.network)
  num_passes = sum(passes(cell.method, pass_.has_batch_norm))
  launches = cell.size.num_steps * pass_.layers * num_passes * _LAUNCH[device]
  if device == "cpu":  # Seeds of convolutions run one after the other.
    launches *= seeds(settings, cell)
  computed = (flops(settings, cell) or 0.0) / _SPEED[device]
  return _COMPILE_MINUTES[device] + max(computed, launches) / 60


class State(NamedTuple):
  """The progress of a cell, from its folder and the committed results.

  Attributes:
    name: "done", "started" or "to do".
    minutes: minutes that it has taken so far, on the device of its record.
    device: device of the record, or None.
    measured: mean and interval of its rows; None if it is not done, or has no published
      number.
    committed: number of its runs among the committed results.
  """

  name: str
  minutes: float
  device: str | None
  measured: report.Interval | None
  committed: int


def read_state(settings: Settings, cell: Cell, root: pathlib.Path) -> State:
  """The state of a cell."""
  folder = root / cell.name
  path = folder / _RECORD
  record = workdir_lib.read_record(path) if path.exists() else {}
  measured = None
  name = "started" if record else "to do"
  if record.get("seeds", 0) >= seeds(settings, cell) and record.get("is_done"):
    name = "done"
    measured = _measured(cell, _rows(folder / "results.json"))
  committed = _matching(cell, _committed(settings.results, cell.module))
  if cell.size is None:  # Times are comparable only on one platform.
    platform = jax.default_backend()
    committed = [row for row in committed if row.get("platform") == platform]
  return State(
    name, record.get("minutes", 0.0), record.get("device"), measured, len(committed)
  )


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise base.InputError(f"{path} cannot be read as results ({error}).") from error


@functools.cache
def _committed(results: str, module: str) -> list[dict[str, Any]]:
  """All committed rows of a script."""
  name = module.rpartition(".")[2]
  paths = sorted(pathlib.Path(results).glob(f"{name}*/**/results.json"))
  return [row for path in paths for row in _rows(path)]


def _matching(cell: Cell, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  wanted = {"method": cell.method, **cell.facts}
  return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def _measured(cell: Cell, rows: Sequence[dict[str, Any]]) -> report.Interval | None:
  if cell.published is None:  # The rows of such a cell have several settings.
    return None
  values = [row[cell.column] for row in _matching(cell, rows) if cell.column in row]
  known = [value for value in values if value is not None]
  return report.interval(known) if known else None


class Entry(NamedTuple):
  """A cell of the queue with its estimate.

  Attributes:
    cell: the published cell.
    state: progress of the cell.
    minutes: estimated minutes that are left; 0 if it is done.
  """

  cell: Cell
  state: State
  minutes: float


def make_entries(
  settings: Settings, cells: Sequence[Cell], root: pathlib.Path, device: str
) -> list[Entry]:
  """The cells with their states and estimates.

  Cells that have been started come first, and then those with the highest value per
  minute.
  """
  states = [read_state(settings, cell, root) for cell in cells]
  first = [estimated_minutes(settings, cell, device) for cell in cells]
  ratios = [
    state.minutes / minutes
    for state, minutes in zip(states, first, strict=True)
    if state.name == "done" and state.device == device
  ]
  correction = statistics.median(ratios) if ratios else 1.0
  entries = []
  for cell, state, minutes in zip(cells, states, first, strict=True):
    # A cell that has already taken longer than estimated still needs some time.
    left = max(minutes * correction - state.minutes, minutes * correction / 10)
    left = 0.0 if state.name == "done" else left
    entries.append(Entry(cell, state, left))

  def order(entry):
    value = 3.0 if entry.cell.is_proposed else 1.0
    if entry.state.committed >= seeds(settings, entry.cell):
      value /= 10
    return entry.state.name != "started", -value / max(entry.minutes, 1e-6)

  return sorted(entries, key=order)


def _published(cell: Cell) -> str:
  if cell.published is None:
    return "-"
  spread = "" if cell.spread is None else f" ± {cell.spread:.2f}"
  return f"{cell.published:.2f}{spread}"


def _full_command(settings: Settings, cell: Cell) -> str:
  if cell.size is None:  # Such a cell has no seeds.
    return cell.command
  return f"{cell.command} --num_seeds={seeds(settings, cell)}"


def describe(settings: Settings, entries: Sequence[Entry]) -> str:
  """The catalog as a table."""
  header = ["cell", "paper", "published", "measured", "committed runs", "FLOPs"]
  header += [f"minutes on {device}, estimated" for device in DEVICES]
  header += ["state", "note", "command"]
  rows = []
  for cell, state, _ in entries:
    operations = flops(settings, cell)
    rows.append(
      [
        *(cell.name, cell.paper, _published(cell), state.measured or "-"),
        *(state.committed, "-" if operations is None else f"{operations:.1e}"),
        *(f"{estimated_minutes(settings, cell, d):.1f}" for d in DEVICES),
        *(state.name, cell.note, _full_command(settings, cell)),
      ]
    )
  return report.table(header, rows)


# Settings of a rehearsal, by script: fewer steps and, except on MNIST, a small network,
# because the full ones would take minutes to compile on a CPU.
_REHEARSALS: dict[str, dict[str, Any]] = {
  "experiments.mnist_imbalance": {
    **{"num_steps": 2, "l2rw_steps": 2, "eval_every": 2, "num_test": 100},
    **{"batch_size": 20, "hard_mining_batch": 20},
  },
  "experiments.mnist_noise": {"num_epochs": 1, "num_validation": 200, "num_meta": 10},
  "experiments.cifar_noise": {"smoke": True, "network": "mlp"},
  "experiments.cifar_long_tail": {"smoke": True, "network": "mlp"},
  "benchmarks.step_time": {
    **{"networks": ("mlp",), "methods": ("plain",), "meta_sizes": ("0.1",)},
    **{
      "engines": ("layerwise",),
      "dtype": "float32",
      "repeats": 1,
      "seconds": 0.01,
      "batch_size": 10,
    },
  },
}


def make_run(settings: Settings, cell: Cell) -> tuple[Callable[..., Any], Any]:
  """The script's `run` and its settings for a cell.

  Raises:
    InputError: the script refuses the settings.
  """
  # Imported by name, because benchmarks are on a higher floor (see BUILD.md).
  module = importlib.import_module(cell.module)
  values = dict(cell.settings)
  fields = settings_lib.flags_of(module.Settings)
  if "data_dir" in fields:
    values |= {"data_dir": settings.data_dir, "cache_dir": settings.cache_dir}
  if "num_seeds" in fields:
    values["num_seeds"] = seeds(settings, cell)
  if jax.default_backend() != "cpu" and "seeds_at_once" in fields:
    values["seeds_at_once"] = seeds(settings, cell)
  if settings.rehearse:
    values |= _REHEARSALS[cell.module]
    if "num_seeds" in fields:
      values["num_seeds"] = 1
    values.pop("seeds_at_once", None)
  return module.run, module.Settings(**values)


@contextlib.contextmanager
def _time_limit(seconds: float | None) -> Iterator[threading.Event]:
  """Sends this process the signal of Ctrl-C when its time is up.

  The training loop then saves a checkpoint, as it does when a user presses Ctrl-C.
  Yields an event that is set when the time is up.
  """
  is_over = threading.Event()

  def end():
    is_over.set()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

  timer = threading.Timer(seconds or 0.0, end)
  timer.daemon = True
  if seconds is not None:
    timer.start()
  try:
    yield is_over
  finally:
    timer.cancel()


def _run_cell(
  settings: Settings, entry: Entry, root: pathlib.Path, seconds: float | None
) -> bool:
  """Runs a cell and records its time; returns whether it is finished."""
  cell, folder = entry.cell, root / entry.cell.name
  run, its_settings = make_run(settings, cell)
  print(f"\n{cell.name}: {cell.command}", flush=True)
  started, rows = time.monotonic(), None
  try:
    with _time_limit(seconds) as is_over:
      rows = run(its_settings, folder)
  except KeyboardInterrupt:
    if not is_over.is_set():
      raise
  finally:
    if folder.is_dir():
      minutes = entry.state.minutes + (time.monotonic() - started) / 60
      record = {
        **{"minutes": minutes, "is_done": rows is not None},
        **{"seeds": seeds(settings, cell), "device": jax.default_backend()},
      }
      workdir_lib.write_record(folder / _RECORD, record)
  if rows is None:
    return False
  measured = _measured(cell, rows)
  if measured is not None and not settings.rehearse:
    print(f"\n{cell.name}: {measured}, published {_published(cell)}")
  return True


def choose_cells(settings: Settings) -> list[Cell]:
  """The cells that --only selects.

  Raises:
    InputError: a part of --only selects no cell.
  """
  cells = catalog()
  if not settings.is_given("only"):
    return cells
  names, chosen = {cell.name for cell in cells}, set()
  for part in settings.only or ("",):
    # An empty part, as after a trailing comma, would choose every cell.
    found = {name for name in names if part in name} if part else set()
    if not found:
      raise base.InputError(f"--only={part}: no cell has such a name; see --list.")
    chosen |= {part} if part in names else found
  return [cell for cell in cells if cell.name in chosen]


def run(settings: Settings, workdir: Any) -> list[Entry]:
  """Runs the queue or prints it, and returns its entries in their final state.

  Raises:
    InputError: --only or --results names nothing, JAX does not use the requested
      device, a script refuses a cell, or at least one cell failed.
  """
  started = time.monotonic()
  cells = choose_cells(settings)
  if settings.is_given("results") and not pathlib.Path(settings.results).is_dir():
    raise base.InputError(f"--results={settings.results} is not a folder: name one.")
  backend = jax.default_backend()
  used = backend if backend in DEVICES else "gpu"
  device = settings.device or used
  root = pathlib.Path(workdir)
  if settings.rehearse:
    root = root / "rehearsal"
  entries = make_entries(settings, cells, root, device)
  if settings.list:
    print(describe(settings, entries))
    return entries
  if device != used:
    raise base.InputError(
      f"--device={device}: JAX uses a {backend.upper()}; leave the flag out, or install"
      " jax for the other device."
    )
  limit = math.inf if settings.minutes is None else settings.minutes
  for entry in entries:  # Raises before anything is trained.
    make_run(settings.replace(rehearse=False), entry.cell)
  failed: dict[str, str] = {}
  while True:
    left = limit - (time.monotonic() - started) / 60
    waiting = [
      e for e in entries if e.state.name != "done" and e.cell.name not in failed
    ]
    fitting = [e for e in waiting if settings.rehearse or e.minutes <= left]
    if not fitting or left <= 0:
      break
    seconds = None if math.isinf(left) else 60 * left
    name = fitting[0].cell.name
    try:
      is_done = _run_cell(settings, fitting[0], root, seconds)
    except (base.InputError, MemoryError, jax.errors.JaxRuntimeError) as error:
      # Continue after a failed cell, because the minutes of a rented device are
      # expensive.
      failed[name] = " ".join(str(error).split())
      print(f"{name} failed: {failed[name]}", flush=True)
      continue
    entries = make_entries(settings, cells, root, device)
    if not is_done:
      print(
        f"{name}: the {limit:g} minutes are over; rerun the same command to continue."
      )
      break
  _summarize(entries, limit)
  if failed:
    raise base.InputError(
      f"{len(failed)} of {len(cells)} cells failed: {'; '.join(failed)}."
    )
  return entries


def _summarize(entries: Sequence[Entry], limit: float) -> None:
  waiting = [entry for entry in entries if entry.state.name != "done"]
  print(f"\n{len(entries) - len(waiting)} of {len(entries)} cells are done.")
  if waiting and not math.isinf(limit):
    least = min(entry.minutes for entry in waiting)
    total = sum(entry.minutes for entry in waiting)
    print(
      f"The others need {total:.0f} minutes, the shortest {least:.1f} (estimated): run"
      f" the same command again, or raise --minutes for those that need over {limit:g}."
    )


if __name__ == "__main__":
  launch.main(Settings, run, "reproduce")
