r"""Cost of a training step, compared with plain SGD and PyTorch.

The benchmark measures the time, the FLOPs and the memory of a training step for each
network, size of the meta batch, method and engine. All implementations for one network
and one size of the meta batch form a group. They are compiled first, and are then timed
in rounds: in each round, every implementation takes one turn, in random order. The
results are medians over turns, and ratios are medians of the ratios within a round, so
that other load on the machine affects all implementations equally. A step computes the
gradients of the method and an SGD update, with the state donated and the batches on the
device. The time of compilation is reported separately. Except for plain training,
which is timed in every group, methods without a meta batch are timed once, not once for
each size of the meta batch. Only l2rw and meta_weight_net have engines:

  literal     `jax.grad` through the unrolled inner step, then a second pass
  forward     `linearization.linearize` in forward mode
  layerwise   `linearization.linearize` layer by layer; not for BatchNorm

With --peer=torch, the same networks and batches are also timed in PyTorch
(`benchmarks._torch_steps`), in the same rounds. PyTorch's threads busy-wait for each
other. On a CPU with other load, this made a step of the MLP 100 times slower, and
setting OMP_WAIT_POLICY=passive in the environment fixed it. On a GPU without enough
memory for both frameworks, measure PyTorch alone with --peer_only and another
--workdir.

Memory that XLA and PyTorch free is reused instead of being returned to the operating
system (see `experiments.lib.launch`). Each group is saved when it is finished, and the
same command continues an interrupted run on the same machine. When all groups are
finished, the figures are drawn.
Command: python -m benchmarks.step_time --peer=torch
Results: results/step_time.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax

from benchmarks import _networks
from benchmarks import _step_time_figure
from benchmarks import _steps
from benchmarks import _turns
from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from experiments.tables import catalog
from l2rw_jax import base
from l2rw_jax.io import workdir


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  EXTENDABLE = ("networks", "meta_sizes")

  networks: tuple[str, ...] | None = flag(
    None,
    f"Networks to train: any of {', '.join(_networks.NETWORKS)}. The default is all; on"
    " a CPU, all but wrn_28_10, gpt_scan and gpt_scan_remat.",
  )
  methods: tuple[str, ...] | None = flag(
    None,
    f"Methods to time: any of {', '.join(_steps.METHODS)}. The default is all; on a"
    " CPU, only l2rw and meta_weight_net for networks other than mlp and lenet. Plain"
    " training is always timed.",
  )
  engines: tuple[str, ...] = flag(
    tuple(_steps.ENGINES),
    "Engines of l2rw and meta_weight_net, separated by commas.",
    group="method",
  )
  meta_sizes: tuple[str, ...] = flag(
    ("1", "0.1"),
    "Sizes of the meta batch, relative to --batch_size, separated by commas. Each is"
    " rounded to a whole number of examples.",
  )
  batch_size: int | None = flag(
    None,
    "Number of training examples in a step. The default is 100; on a CPU, 10 for"
    " wrn_28_10 and 32 for gpt_scan and gpt_scan_remat.",
  )
  repeats: int = flag(
    30, "Largest number of turns of each implementation.", bounds=settings_lib.REPEATS
  )
  seconds: float = flag(
    20.0,
    "Number of seconds after which no new round of turns begins, except for the first"
    " five rounds.",
    bounds=settings_lib.Bounds(0, 1e7),
  )
  dtype: str = flag(
    "float32", "Data type of the computation.", choices=["float32", "bfloat16"]
  )
  peer: str | None = flag(
    None, "Other framework to measure as well.", choices=["torch"], group="method"
  )
  peer_only: bool = flag(False, "Measure only the other framework.", group="method")
  peer_compile: bool = flag(
    False,
    "Also measure torch.compile, for the methods that it can compile.",
    group="method",
  )


TABLE = catalog.STEP_TIME


class Group(NamedTuple):
  """Implementations that are timed in the same rounds.

  Attributes:
    setting: the settings that they share.
    share: the size of the meta batch divided by the batch size, M / B, before M is
      rounded. None without a meta batch.
    pairs: the methods and engines of this library, in addition to plain training.
  """

  setting: _networks.Setting
  share: float | None
  pairs: list[tuple[str, str | None]]

  @property
  def name(self) -> str:
    """The name of the group and of its file."""
    return f"{self.setting.network}-{'none' if self.share is None else self.share}"


def plan(settings: Settings) -> list[Group]:
  """Returns the groups that the flags select.

  Raises:
    InputError: if a name or a value is invalid, or no implementation remains.
  """
  on_cpu = jax.default_backend() == "cpu"
  offered = list(_networks.NETWORKS)
  default = [n for n in offered if _networks.NETWORKS[n].default_on_cpu or not on_cpu]
  given = settings.networks
  names = settings_lib.choose("networks", default if given is None else given, offered)
  engines = settings_lib.choose("engines", settings.engines, _steps.ENGINES)
  shares = [_share(text) for text in settings.meta_sizes]
  if not shares:
    raise base.InputError(
      "--meta_sizes= is empty: give shares of the batch, such as 1,0.1."
    )
  groups: list[Group] = []
  for name in names:
    groups += _groups(settings, name, on_cpu, engines, shares)
  return groups


def _groups(settings, name, on_cpu, engines, shares):
  network = _networks.NETWORKS[name]
  if not network.supports_bfloat16 and settings.dtype != "float32":
    raise base.InputError(
      f"--dtype={settings.dtype}: {name} computes in float32; choose other --networks."
    )
  if settings.peer_only and not network.has_peer:
    raise base.InputError(
      f"--peer_only: {name} does not exist in PyTorch; choose other --networks."
    )
  is_slow = network.slow_on_cpu and on_cpu
  default = _steps.ENGINE_METHODS if is_slow else list(_steps.METHODS)
  given = settings.methods
  methods = settings_lib.choose(
    "methods", default if given is None else given, _steps.METHODS
  )
  size = settings.batch_size or (
    network.cpu_batch_size if on_cpu else network.batch_size
  )
  groups: dict[int | None, Group] = {}
  share_of: dict[int, float] = {}
  for share in (None, *shares):
    of_share = [m for m in methods if (m in _steps.META_METHODS) == (share is not None)]
    pairs = _steps.pairs(name, [m for m in of_share if m != "plain"], engines)
    if pairs or of_share == ["plain"]:
      meta_size = None if share is None else _meta_size(name, share, size, share_of)
      setting = _networks.Setting(name, settings.dtype, size, meta_size)
      groups.setdefault(meta_size, Group(setting, share, pairs))
  if not groups:
    raise base.InputError(
      f"--engines={','.join(engines)}: layerwise does not support {name}, whose"
      " BatchNorm mixes examples; add forward or literal."
    )
  return list(groups.values())


def _meta_size(name, share, size, share_of):
  """M for a share of the batch. `share_of` maps each M so far to its share."""
  if share * size < 0.999:  # 1 / 3 may be given as 0.3333.
    raise base.InputError(
      f"--meta_sizes={share:g}: this is less than one example of the batch of {name},"
      f" which has {size} examples; give at least {math.ceil(1e4 / size) / 1e4:g}."
    )
  meta_size = round(share * size)
  other = share_of.setdefault(meta_size, share)
  if other != share:
    raise base.InputError(
      f"--meta_sizes={other:g},{share:g}: both give a meta batch of {meta_size} for"
      f" {name}; leave one of them out."
    )
  return meta_size


def _share(text):
  try:
    share = float(text)
  except ValueError:
    share = 0.0
  if not 0 < share <= 10:
    raise base.InputError(f"--meta_sizes={text}: give shares above 0, at most 10.")
  return share


def _import_torch_steps() -> Any:
  """Imports the steps in PyTorch, which is an optional dependency.

  Raises:
    InputError: if PyTorch is not installed or does not support the device of JAX.
  """
  platform = jax.default_backend()
  if platform not in ("cpu", "gpu"):
    raise base.InputError(
      f"--peer=torch: JAX computes on a {platform.upper()}, but PyTorch needs a CPU or"
      " GPU; set JAX_PLATFORMS=cpu."
    )
  try:
    from benchmarks import _torch_steps
  except ImportError as error:
    raise base.InputError(
      f"--peer=torch: PyTorch cannot be imported ({error}); run pip install"
      " '.[benchmarks]' in the checkout."
    ) from error
  if _torch_steps.select_device(platform == "gpu") is None:
    raise base.InputError(
      "--peer=torch: JAX computes on a GPU, but PyTorch has none; install PyTorch for"
      " CUDA, or set JAX_PLATFORMS=cpu."
    )
  return _torch_steps


def measure(settings: Settings, group: Group) -> list[dict[str, Any]]:
  """Times a group and returns a row for every implementation that ran.

  Plain training comes first.

  Raises:
    InputError: there is not enough memory for plain training in any framework, or
      PyTorch is requested and cannot be used.
    FloatingPointError: a loss is not finite.
  """
  started = time.perf_counter()
  implementations = [c for c in _implementations(settings, group) if c is not None]
  if not implementations:
    raise base.InputError(f"{group.name}: not enough memory; lower --batch_size.")
  ready = time.perf_counter()
  turns = _turns.take(implementations, settings.repeats, settings.seconds)
  by_name = dict(
    zip([(c.framework, c.method) for c in implementations], turns, strict=True)
  )
  columns = _shared_columns(settings, group.setting) | {"meta_share": group.share}
  rows = []
  for implementation, measured in zip(implementations, turns, strict=True):
    framework, method = implementation.framework, implementation.method
    peer = by_name.get(("torch", method)) if framework == "jax" else None
    row = {"method": method, "engine": implementation.engine, "framework": framework}
    row |= columns | implementation.info
    if method == "plain":
      row |= {"meta_size": None, "meta_share": None}
    rows.append(row | _turns.summary(measured, by_name[framework, "plain"], peer))
  print(
    f"{group.name}: {len(implementations)} implementations,"
    f" {ready - started:.0f} s to compile, {len(turns[0].seconds)} turns in"
    f" {time.perf_counter() - ready:.0f} s",
    flush=True,
  )
  return [_derived(row, rows) for row in rows]


def _implementations(settings, group):
  setting = group.setting
  if not settings.peer_only:
    plain = _plain(setting._replace(meta_size=None))
    yield plain
    for pair in group.pairs if plain else ():
      make = functools.partial(_steps.implementation, setting, *pair)
      label = " by ".join(filter(None, pair))
      yield _attempt(make, f"{label} of {group.name}")
  if not settings.peer or not _networks.NETWORKS[setting.network].has_peer:
    return
  peer = _import_torch_steps()
  device = peer.select_device(jax.default_backend() == "gpu")
  methods = {method for method, _ in group.pairs}
  for compiled in (False, True)[: 1 + settings.peer_compile]:
    for method in ("plain", *(m for m in peer.METHODS if m in methods)):
      make = functools.partial(
        peer.implementation, setting, method, _steps.LEARNING_RATE, device, compiled
      )
      implementation = _attempt(make, f"{method} of {group.name} in PyTorch", compiled)
      yield implementation
      if implementation is None and method == "plain":
        break  # The other methods have no baseline.


@functools.lru_cache(maxsize=1)
def _plain(setting):
  """Plain training, which is compiled once for all groups of a network."""
  make = functools.partial(_steps.implementation, setting, "plain")
  return _attempt(make, f"plain training of {setting.network}")


def _attempt(make, description, skip_errors=False):
  """Makes an implementation and takes a step.

  If there is not enough memory, or on any error with `skip_errors`, the error is
  printed and the result is None.
  """
  try:
    implementation = make()
    _turns.run(implementation, 1)
    return implementation
  except Exception as error:
    out_of_memory = (
      "RESOURCE_EXHAUSTED" in str(error) or "OutOfMemory" in type(error).__name__
    )
    if not (out_of_memory or skip_errors):
      raise
    message = next(iter(str(error).splitlines()), "")
    print(f"skipped {description}: {type(error).__name__}: {message}", file=sys.stderr)
    return None


def _shared_columns(settings, setting):
  """The columns that are the same for all rows of a group."""
  digest = hashlib.sha256()
  for batch in setting.batches():
    for array in (batch or {}).values():
      digest.update(array.tobytes())
  columns = setting._asdict() | {"seed": 0, "data": digest.hexdigest()[:16]}
  peak = None if settings.peer_only else _steps.matrix_peak(setting.dtype)
  return (
    columns
    | {"matrix_flops_per_second": peak}
    | _machine(settings)
    | workdir.run_info()
  )


def _machine(settings):
  """Describes the machine, because times of different machines are not comparable."""
  info = workdir.run_info()
  machine = {name: info[name] for name in ("platform", "device_kind", "jax")}
  machine |= {"cpus": _turns.num_cpus(), "torch": None, "omp_wait_policy": None}
  if settings.peer:
    machine["torch"] = str(_import_torch_steps().torch.__version__)
    machine["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
  return machine


def _derived(row, rows):
  """The row, with rates and with its ratios to the row of plain training."""
  plains = {r["framework"]: r for r in rows if r["method"] == "plain"}
  plain = plains[row["framework"]]
  seconds = row["milliseconds"] / 1e3
  row = row | {"examples_per_second": row["batch_size"] / seconds}
  for name in ("flops", "bytes_accessed", "temporary_bytes"):
    known = row[name] and plain[name]
    row[f"{name}_ratio"] = row[name] / plain[name] if known else None
  row["flops_per_second"] = row["flops"] / seconds if row["flops"] else None
  peak = row["matrix_flops_per_second"]
  known = row["flops"] and peak
  row["fraction_of_peak"] = row["flops_per_second"] / peak if known else None
  return row


def _rows_of(
  settings: Settings, group: Group, folder: pathlib.Path
) -> list[dict[str, Any]]:
  """Returns the saved rows of a group, or measures and saves them."""
  path = folder / f"{group.name}.json"
  if path.exists():
    saved: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return saved
  rows = measure(settings, group)
  workdir.write_json(path, rows)
  return rows


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Runs the benchmark, prints the results and writes them to a folder.

  Raises:
    InputError: a flag is invalid, or PyTorch is requested and cannot be used.
  """
  if (settings.peer_only or settings.peer_compile) and not settings.peer:
    raise base.InputError("--peer_only and --peer_compile need --peer=torch.")
  if settings.seconds <= 0:
    raise base.InputError(f"--seconds={settings.seconds} must be above 0.")
  if settings.peer:
    # Otherwise JAX would allocate most of the memory of the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _import_torch_steps()
  # A program from the cache would not be compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  groups = plan(settings)
  folder = runner.open_folder(settings, TABLE.name, workdir, **_machine(settings))
  rows: list[dict[str, Any]] = []
  for group in groups:
    known = {(r["network"], r["framework"]) for r in rows if r["method"] == "plain"}
    group_rows = _rows_of(settings, group, folder)
    # Plain training is timed in every group, but reported once.
    new = [r for r in group_rows if (r["network"], r["framework"]) not in known]
    rows += [r for r in group_rows if r["method"] != "plain" or r in new]
  figures = _step_time_figure.draw(rows, folder)
  return runner.report(settings, TABLE, folder, rows, figures)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
