r"""What a training step costs: time, operations, memory, beside plain SGD and PyTorch.

Networks by sizes of the clean batch by methods by engines. All contestants of one
network and one clean batch are compiled first, then take turns in an order by chance;
of each the median counts, and of ratios the median of those within the same turn, so
that other work on the machine meets all alike. A step is the method's gradients and
SGD, with the state donated, on batches that lie on the device. Compilation is apart.
Methods without a clean batch have one row, and engines only those that look ahead:

  literal     `jax.grad` through the unrolled inner step, then a second pass
  forward     `linearization.linearize`, by forward mode
  layerwise   the same, layer by layer; not for BatchNorm

With --peer=torch the same networks and batches in PyTorch, as its users write it
(`benchmarks._torch_steps`), take their turns among ours. Its threads wait for each
other by spinning: on a CPU that is not idle that made a step of the MLP 100 times as
long, and OMP_WAIT_POLICY=passive in the environment mended it. On a GPU where both
frameworks do not fit together, --peer_only makes the peer's rows alone, in another
--workdir.
Memory that XLA and PyTorch free stays with the process (`experiments.lib.launch`).
Each group is saved as it is done, and the same command continues on the same machine;
with all of them there it draws the figures anew.
Command: python -m benchmarks.step_time --peer=torch
Ours: results/step_time.
"""

import dataclasses
import functools
import hashlib
import json
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
class Settings(settings_lib.Settings):
  """The flags of this benchmark."""

  EXTENDABLE = ("networks", "meta_sizes")

  networks: tuple[str, ...] | None = flag(
    None,
    "Networks to train, separated by commas. The default is all; on a CPU all but"
    " wrn_28_10.",
  )
  methods: tuple[str, ...] | None = flag(
    None,
    "Methods to time, separated by commas. The default is all; of large networks on a"
    " CPU those that look ahead.",
  )
  engines: tuple[str, ...] = flag(
    tuple(_steps.ENGINES),
    "Engines of the methods that look ahead, separated by commas.",
    group="method",
  )
  meta_sizes: tuple[str, ...] = flag(
    ("1", "0.1"),
    "Number of clean examples in a step over --batch_size, separated by commas.",
  )
  batch_size: int | None = flag(
    None,
    "Number of examples in a step. The default is 100; of wrn_28_10 on a CPU 10.",
  )
  repeats: int = flag(
    30, "Largest number of turns of each contestant.", bounds=settings_lib.REPEATS
  )
  seconds: float = flag(
    20.0,
    "Number of seconds after which no new round of turns begins, except for the first"
    " five.",
    bounds=settings_lib.Bounds(0, 1e7),
  )
  dtype: str = flag(
    "float32", "Type of the computation.", choices=["float32", "bfloat16"]
  )
  peer: str | None = flag(
    None, "Framework to measure as well.", choices=["torch"], group="method"
  )
  peer_only: bool = flag(False, "Measure the peer alone.", group="method")
  peer_compile: bool = flag(
    False, "Measure torch.compile too, where that runs.", group="method"
  )


TABLE = catalog.STEP_TIME


class Group(NamedTuple):
  """Contestants that take turns.

  Attributes:
    setting: what they share.
    share: M / B, or None without a clean batch.
    pairs: methods and engines of ours beside plain training.
  """

  setting: _networks.Setting
  share: float | None
  pairs: list[tuple[str, str | None]]

  @property
  def name(self) -> str:
    """Of its file."""
    return f"{self.setting.network}-{'none' if self.share is None else self.share}"


def plan(settings: Settings) -> list[Group]:
  """What the flags ask for.

  Raises:
    InputError: they ask for what there is not.
  """
  on_cpu = jax.default_backend() == "cpu"
  offered = list(_networks.NETWORKS)
  usual = [n for n in offered if n != "wrn_28_10" or not on_cpu]
  given = settings.networks
  names = _chosen("networks", usual if given is None else given, offered)
  engines = _chosen("engines", settings.engines, _steps.ENGINES)
  shares = [_share(text) for text in settings.meta_sizes]
  if not shares:
    raise base.InputError("--meta_sizes= is empty: give shares of the batch, as 1,0.1.")
  groups: list[Group] = []
  for name in names:
    groups += _groups(settings, name, on_cpu, engines, shares)
  return groups


def _groups(settings, name, on_cpu, engines, shares):
  network = _networks.NETWORKS[name]
  if not network.half and settings.dtype != "float32":
    raise base.InputError(
      f"--dtype={settings.dtype}: {name} computes in float32; choose other --networks."
    )
  few = network.large and on_cpu
  usual = _steps.LOOKING_AHEAD if few else list(_steps.METHODS)
  given = settings.methods
  methods = _chosen("methods", usual if given is None else given, _steps.METHODS)
  size = settings.batch_size or (
    network.cpu_batch_size if on_cpu else network.batch_size
  )
  found: dict[int | None, Group] = {}
  for share in (None, *shares):
    meta_size = None if share is None else max(1, round(share * size))
    own = [m for m in methods if (m in _steps.NEED_META) == (share is not None)]
    pairs = _steps.pairs(name, [m for m in own if m != "plain"], engines)
    setting = _networks.Setting(name, settings.dtype, size, meta_size)
    if pairs or own == ["plain"]:
      found.setdefault(meta_size, Group(setting, share, pairs))
  if not found:
    raise base.InputError(
      f"--engines={','.join(engines)}: examples of {name} see each other (BatchNorm);"
      " add forward or literal."
    )
  return list(found.values())


def _chosen(flag, names, offered):
  for name in names or [""]:
    if name not in offered:
      raise base.InputError(f"--{flag}={name}: choose among {', '.join(offered)}.")
  return list(dict.fromkeys(names))


def _share(text):
  try:
    share = float(text)
  except ValueError:
    share = 0.0
  if not 0 < share <= 10:
    raise base.InputError(f"--meta_sizes={text}: give shares above 0, at most 10.")
  return share


def _torch_steps() -> Any:
  """The peer's steps, which are imported only where they are asked for.

  Raises:
    InputError: PyTorch is not there, or not for this device.
  """
  platform = jax.default_backend()
  if platform not in ("cpu", "gpu"):
    raise base.InputError(
      f"--peer=torch: JAX computes on a {platform.upper()}, PyTorch here on a CPU or"
      " GPU; set JAX_PLATFORMS=cpu."
    )
  try:
    from benchmarks import _torch_steps as found
  except ImportError as error:
    raise base.InputError(
      f"--peer=torch: PyTorch cannot be imported ({error}); run pip install"
      " '.[benchmarks]' in the checkout."
    ) from error
  if found.device(platform == "gpu") is None:
    raise base.InputError(
      "--peer=torch: JAX computes on a GPU and PyTorch sees none; install PyTorch for"
      " CUDA, or set JAX_PLATFORMS=cpu."
    )
  return found


def measure(settings: Settings, group: Group) -> list[dict[str, Any]]:
  """A row for every contestant that could run, plain training first.

  Raises:
    InputError: there is no memory for plain training.
  """
  started = time.perf_counter()
  contestants = [c for c in _contestants(settings, group) if c is not None]
  if not contestants:
    raise base.InputError(f"{group.name}: no memory for it; lower --batch_size.")
  ready = time.perf_counter()
  turns = _turns.take(contestants, settings.repeats, settings.seconds)
  by_name = dict(
    zip([(c.framework, c.method) for c in contestants], turns, strict=True)
  )
  facts = _facts(settings, group.setting) | {"meta_share": group.share}
  rows = []
  for contestant, own in zip(contestants, turns, strict=True):
    framework, method = contestant.framework, contestant.method
    peer = by_name.get(("torch", method)) if framework == "jax" else None
    row = {"method": method, "engine": contestant.engine, "framework": framework}
    row |= facts | contestant.facts
    if method == "plain":
      row |= {"meta_size": None, "meta_share": None}
    rows.append(row | _turns.summary(own, by_name[framework, "plain"], peer))
  print(
    f"{group.name}: {len(contestants)} contestants, {ready - started:.0f} s to compile,"
    f" {len(turns[0].seconds)} turns in {time.perf_counter() - ready:.0f} s",
    flush=True,
  )
  return [_derived(row, rows) for row in rows]


def _contestants(settings, group):
  setting = group.setting
  if not settings.peer_only:
    plain = _plain(setting._replace(meta_size=None))
    yield plain
    for pair in group.pairs if plain else ():
      make = functools.partial(_steps.contestant, setting, *pair)
      yield _attempt(make, f"{pair[0]} by {pair[1]} of {group.name}")
  if not settings.peer:
    return
  peer = _torch_steps()
  where = peer.device(jax.default_backend() == "gpu")
  own = {method for method, _ in group.pairs}
  for compiled in (False, True)[: 1 + settings.peer_compile]:
    for method in ("plain", *(m for m in peer.METHODS if m in own)):
      make = functools.partial(
        peer.contestant, setting, method, _steps.LEARNING_RATE, where, compiled
      )
      found = _attempt(make, f"{method} of {group.name} in PyTorch", compiled)
      yield found
      if found is None and method == "plain":
        break  # There is nothing to compare the others with.


@functools.lru_cache(maxsize=1)
def _plain(setting):
  """One for all groups of a network."""
  make = functools.partial(_steps.contestant, setting, "plain")
  return _attempt(make, f"plain training of {setting.network}")


def _attempt(make, what, forgiving=False):
  """A contestant that has taken a step, or None where memory is short, told."""
  try:
    contestant = make()
    _turns.run(contestant, 1)
    return contestant
  except Exception as error:
    short = "RESOURCE_EXHAUSTED" in str(error) or "OutOfMemory" in type(error).__name__
    if not (short or forgiving):
      raise
    said = next(iter(str(error).splitlines()), "")
    print(f"left out: {what}: {type(error).__name__}: {said}", file=sys.stderr)
    return None


def _facts(settings, setting):
  """What all rows of a group say."""
  digest = hashlib.sha256()
  for part in setting.batches():
    for array in (part or {}).values():
      digest.update(array.tobytes())
  facts = setting._asdict() | {"seed": 0, "data": digest.hexdigest()[:16]}
  peak = None if settings.peer_only else _steps.matrix_peak(setting.dtype)
  return (
    facts | {"matrix_flops_per_second": peak} | _machine(settings) | workdir.run_info()
  )


def _machine(settings):
  """On what was measured; times of two machines do not compare."""
  info = workdir.run_info()
  found = {name: info[name] for name in ("platform", "device_kind", "jax")}
  found |= {"cpus": _turns.num_cpus(), "torch": None, "omp_wait_policy": None}
  if settings.peer:
    found["torch"] = str(_torch_steps().torch.__version__)
    found["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "default")
  return found


def _derived(row, rows):
  """`row` with its costs a second, and beside those of plain training."""
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
  """Of an earlier call if it got so far, else measured and kept."""
  path = folder / f"{group.name}.json"
  if path.exists():
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return kept
  rows = measure(settings, group)
  workdir.write_json(path, rows)
  return rows


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Measures, prints and writes."""
  if (settings.peer_only or settings.peer_compile) and not settings.peer:
    raise base.InputError("--peer_only and --peer_compile need --peer=torch.")
  if settings.seconds <= 0:
    raise base.InputError(f"--seconds={settings.seconds} must be above 0.")
  if settings.peer:
    # Or else JAX would take the GPU's memory as a whole.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    _torch_steps()
  # A program from the cache would be compiled in no time.
  jax.config.update("jax_enable_compilation_cache", False)
  groups = plan(settings)
  folder = runner.open_folder(settings, TABLE.name, workdir, **_machine(settings))
  rows: list[dict[str, Any]] = []
  for group in groups:
    known = {(r["network"], r["framework"]) for r in rows if r["method"] == "plain"}
    found = _rows_of(settings, group, folder)
    # Plain training took its turns in every group, and is told once.
    new = [r for r in found if (r["network"], r["framework"]) not in known]
    rows += [r for r in found if r["method"] != "plain" or r in new]
  figures = _step_time_figure.draw(rows, folder)
  return runner.report(settings, TABLE, folder, rows, figures)


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
