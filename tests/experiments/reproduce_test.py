"""The queue of published cells: its catalog, its order, and a rehearsal."""

import importlib
import signal
import types

import numpy as np
import pytest
import scripts

from experiments import reproduce
from experiments.lib import long_tail
from experiments.lib import registries
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.tables import published
from experiments.tables import published_cifar
from l2rw_jax import base
from l2rw_jax.data import sources


@pytest.fixture(scope="module")
def cells():
  return {cell.name: cell for cell in reproduce.catalog()}


def test_every_published_value_that_can_be_run_is_in_the_catalog(cells):
  assert len(cells) == len(reproduce.catalog())  # Every name is unique.
  numbers = [n for m in published.MNIST_IMBALANCE.values() for n in m.values()]
  numbers += [n for m in published.MNIST_NOISE.values() for n in m.values()]
  for preset, noise, fraction, method in published_cifar.noise_cells("cifar10"):
    if method != "mentornet_dd":
      number = published_cifar.lookup(preset, "cifar10", noise, fraction, method)
      numbers.append(number)
  for method, *tail in published_cifar.long_tail_cells("cifar10"):
    numbers.append((published_cifar.long_tail("cifar10", method, *tail), None))
  listed = [(c.published, c.spread) for c in cells.values() if c.published is not None]
  assert sorted(listed, key=str) == sorted(numbers, key=str)
  assert len(listed) > 150


def test_methods_and_settings_are_those_of_the_scripts(cells):
  for cell in cells.values():
    assert cell.method in registries.LONG_TAIL or cell.method == "class_proportion"
    for rehearse in (False, True):  # An invalid value of a flag raises InputError.
      reproduce.make_run(reproduce.Settings(rehearse=rehearse), cell)


# For each cell, flags that change its training, and a flag of other methods, which does
# not change it.
_CHANGED = {
  "mnist_imbalance-0.995-hard_mining": (
    [{"num_steps": 2}, {"batch_size": 7}, {"hard_mining_batch": 9}, {"num_train": 99}],
    {"l2rw_steps": 2},
  ),
  "mnist_noise-bare-bare_symmetric-0.5-bare": (
    [
      *(
        {"preset": "shared"},
        {"pixels": "unit"},
        {"num_epochs": 1},
        {"plateau": False},
        {"initialization": "flax"},
      ),
      *({"learning_rate": 1.0}, {"network": "lenet"}, {"bare_kappa": 2.0}),
    ],
    {"meta_every": 2},
  ),
  "cifar_noise-mwn_flip-0.4-l2rw": (
    [
      *({"num_steps": 10}, {"learning_rate": 5.0}, {"batch_size": 7}, {"smoke": True}),
      *({"network": "mlp"}, {"l2rw_refresh_every": 2}, {"num_meta": 1}),
    ],
    {"bare_kappa": 2.0},
  ),
  "cifar_long_tail-ldam-step-100-ldam": (
    [{"ldam_margin": 100.0}, {"num_epochs": 1}, {"schedule": "cosine"}],
    {"focal_gamma": 2.0},
  ),
}


@pytest.mark.parametrize("name", _CHANGED)
def test_published_values_are_shown_only_under_their_protocol(cells, name, monkeypatch):
  cell = cells[name]
  script = importlib.import_module(cell.module)
  monkeypatch.setattr(runner, "row", lambda *_, **facts: {"weight_auroc": 0, **facts})
  monkeypatch.setattr(reproduce.report, "run_fields", lambda _: {})
  digits = sources.load("digits", "train")
  monkeypatch.setattr(script.Settings, "load", lambda *_: digits)
  split = types.SimpleNamespace(
    train=types.SimpleNamespace(label=digits.labels, true_label=digits.labels),
    meta=types.SimpleNamespace(label=digits.labels),
    num_classes=10,
  )
  last = {"accuracy": 0.5, "balanced_accuracy": 0.5}
  run = types.SimpleNamespace(metrics={"last": last})
  runner_cell = types.SimpleNamespace(
    method_name=cell.method,
    facts={k: v for k, v in cell.facts.items() if k != "preset"},
    config=types.SimpleNamespace(batch_size=100),
    splits=lambda _: [split],
  )

  def published_value(**changed):
    settings = script.Settings(**{**cell.settings, **changed})
    if "long_tail" in name:
      runner_cell.facts = {k: cell.facts[k] for k in ("builder", "shape", "imbalance")}
      experiment = long_tail.Experiment(
        *(script.TABLE, digits, digits, None, script.PRESETS["ldam"]),
        *({"dataset": "cifar10"}, (), 1, True),
      )
      experiment = long_tail.with_flags(settings, experiment)
      (row,) = long_tail._rows(settings, experiment, runner_cell, [run])
    elif "cifar" in name:
      row = script.make_row(settings, runner_cell, split, run)
    else:
      row = script.make_row(settings, runner_cell, run)
    return row.get("published_percent", row.get("published_error_percent"))

  changes, other = _CHANGED[name]
  assert published_value() == published_value(**other, num_seeds=2) == cell.published
  assert [published_value(**one) for one in changes] == [None] * len(changes)


def test_cells_have_the_published_values_and_the_commands_of_their_runs(cells):
  for name, value in {
    "cifar_long_tail-ldam-exponential-100-ldam_drw": 77.03,
    "cifar_noise-l2rw_background-0.4-l2rw": 86.73,
    "cifar_noise-mwn_flip-0.4-meta_weight_net": 87.54,
    "cifar_noise-mwn_uniform-0.4-meta_weight_net": 89.27,
    "cifar_noise-mentornet-0.4-mentornet_pd": 77.0,
    "mnist_imbalance-0.995-l2rw": 3.62,
  }.items():
    assert cells[name].published == value and cells[name].is_proposed
  assert cells["step_time"].module == "benchmarks.step_time"
  wide = cells["step_time-wrn_28_10"].command
  assert wide.endswith("step_time --networks=wrn_28_10 --dtype=bfloat16")
  assert cells["mnist_imbalance-0.9-l2rw"].command == (
    "python -m experiments.mnist_imbalance --majority=0.9 --methods=l2rw"
  )


def test_flops_are_those_of_the_convolutions_times_the_passes(cells):
  settings = reproduce.Settings()
  lenet = reproduce.forward("mnist_lenet")
  # 5x5 convolutions with SAME padding, at 28, 14 and 7 pixels, and two dense layers;
  # XLA does not count products with padding.
  whole = 2 * (784 * 25 * 16 + 196 * 400 * 32 + 49 * 800 * 64 + 1024 * 100 + 100)
  assert 0.75 * whole < lenet.flops < 1.05 * whole
  assert lenet.layers == 5 and not lenet.has_batch_norm
  uniform, l2rw = (
    reproduce.flops(settings, cells[f"mnist_imbalance-0.99-{method}"])
    for method in ("uniform", "l2rw")
  )
  assert uniform == 10 * 8000 * 300 * lenet.flops
  assert l2rw == 10 * 8000 * (4 * 100 + 3 * 10) * lenet.flops
  more = settings.replace(num_seeds=5)
  assert reproduce.flops(more, cells["mnist_imbalance-0.99-uniform"]) == uniform / 2
  assert reproduce.passes("l2rw", True) == (5, 3)
  assert reproduce.forward("resnet_32").has_batch_norm


def test_the_number_of_images_of_a_long_tail_is_about_that_of_the_builder():
  from l2rw_jax.data import long_tail

  for builder, shape, imbalance in (
    ("ldam", "exponential", 100.0),
    ("mwn", "step", 10),
  ):
    largest = 5000 - (10 if builder == "mwn" else 0)
    counts = long_tail.class_sizes(shape, largest, 10, imbalance)
    assert abs(reproduce._tail_size(builder, shape, imbalance) - sum(counts)) <= 10


def _source(split: str, shape: tuple[int, ...], labels: np.ndarray) -> sources.Source:
  rng = np.random.default_rng(len(labels))
  images = rng.integers(0, 256, (len(labels), *shape), np.uint8)
  return sources.Source("made", "1", split, images, labels.astype(np.int32), 10, {})


@pytest.fixture
def random_images(monkeypatch):
  """Replaces every data set by random images, enough of them of classes 4 and 9."""

  def load(name, split, data_dir, cache_dir, in_memory):
    del data_dir, cache_dir, in_memory
    rest = np.tile(np.arange(10), 200)
    if name == "cifar10":
      return _source(split, (32, 32, 3), rest if split == "train" else rest[:500])
    more = [np.full(600, 4), np.full(4900, 9)] if split == "train" else []
    return _source(split, (28, 28, 1), np.concatenate([rest[:1000], *more]))

  monkeypatch.setattr(settings_lib, "_load", load)
  for module, values in reproduce._REHEARSALS.items():
    if module.startswith("experiments"):  # Programs for one device compile faster.
      monkeypatch.setitem(reproduce._REHEARSALS, module, values | {"num_devices": 1})


_KINDS = (
  "mnist_imbalance-0.9-uniform",
  "mnist_noise-bare-bare_symmetric-0.5-uniform",
  "cifar_noise-l2rw_background-0.4-uniform",
  "cifar_long_tail-ldam-step-100-uniform",
  "step_time",
)


@pytest.mark.ci
def test_a_cell_of_each_kind_is_rehearsed(random_images, tmp_path):
  settings = reproduce.Settings(rehearse=True, results=str(tmp_path), only=_KINDS)
  entries = reproduce.run(settings, tmp_path)
  assert {entry.cell.name for entry in entries} == set(_KINDS)
  assert [entry.state.name for entry in entries] == ["done"] * len(_KINDS)
  kinds = {cell.module for cell in reproduce.catalog()}
  assert {entry.cell.module for entry in entries} == kinds


def _record(folder, **values):
  folder.mkdir(parents=True)
  reproduce.workdir_lib.write_record(folder / "reproduce.json", values)


def test_the_queue_orders_by_value_per_minute_and_refuses_what_does_not_fit(
  cells, monkeypatch, tmp_path
):
  names = ("a", "b", "c", "d")
  small = [
    cells["step_time"]._replace(name=n, is_proposed=n == "c", module="x", published=3.0)
    for n in names
  ]
  minutes = dict(zip(names, (4.0, 2.0, 5.0, 50.0), strict=True))
  monkeypatch.setattr(reproduce, "catalog", lambda: small)
  monkeypatch.setattr(
    reproduce, "estimated_minutes", lambda settings, cell, device: minutes[cell.name]
  )
  done, now = [], [0.0]
  monkeypatch.setattr(reproduce.time, "monotonic", lambda: now[0])

  def make_run(settings, cell):
    def run(has_data, folder):
      if cell.name == "b" and not has_data:
        raise base.InputError("no data")
      folder.mkdir(parents=True, exist_ok=True)
      rows = [{"method": "l2rw", "dtype": "float32", "ratio": 1.5}]
      reproduce.workdir_lib.write_record(folder / "results.json", {"rows": rows})
      done.append(cell.name)
      now[0] += speed * 60 * minutes[cell.name]
      return rows

    return run, has_data  # `run` receives it instead of the script's settings.

  monkeypatch.setattr(reproduce, "make_run", make_run)
  has_data, speed = False, 1.0
  settings = reproduce.Settings(minutes=20.0, device="cpu", results=str(tmp_path))
  with pytest.raises(base.InputError, match="1 of 4 cells failed: b"):
    reproduce.run(settings, tmp_path / "w")
  # Value per minute: c 3 / 5, then b 1 / 2 (fails), a 1 / 4, d 1 / 50 (too long).
  assert done == ["c", "a"]
  has_data, speed = True, 0.1
  entries = reproduce.run(settings, tmp_path / "w")
  assert done == ["c", "a", "b"]
  by_name = {entry.cell.name: entry for entry in entries}
  assert by_name["c"].state.measured.mean == 1.5
  assert by_name["d"].state.name == "to do" and by_name["d"].minutes == 50
  # As two of three cells took a tenth of their estimates, the estimate of d shrinks.
  reproduce.workdir_lib.write_record(
    tmp_path / "w" / "a" / "reproduce.json",
    {"minutes": 0.4, "is_done": True, "seeds": 3, "device": "cpu"},
  )
  reproduce.run(settings, tmp_path / "w")
  assert done == ["c", "a", "b", "d"]


def test_a_started_cell_comes_first_and_needs_only_the_remaining_minutes(
  cells, tmp_path
):
  settings = reproduce.Settings(results=str(tmp_path))
  chosen = [cells["step_time"], cells["mnist_imbalance-0.9-l2rw"]]
  _record(tmp_path / chosen[1].name, minutes=7.0, is_done=False, seeds=10, device="cpu")
  entries = reproduce.make_entries(settings, chosen, tmp_path, "cpu")
  assert [entry.state.name for entry in entries] == ["started", "to do"]
  whole = reproduce.estimated_minutes(settings, chosen[1], "cpu")
  assert entries[0].minutes == pytest.approx(whole - 7)


@pytest.fixture
def ctrl_c():
  """Lets Ctrl-C raise an error even if a shell runs the tests in the background."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_the_time_limit_interrupts_as_ctrl_c_does(
  cells, ctrl_c, monkeypatch, tmp_path, capsys
):
  def make_run(settings, cell):
    def run(script_settings, folder):
      folder.mkdir(parents=True)
      reproduce.time.sleep(20)
      raise AssertionError("The run was not interrupted.")

    return run, None

  monkeypatch.setattr(reproduce, "make_run", make_run)
  monkeypatch.setattr(reproduce, "estimated_minutes", lambda *a: 0.001)
  settings = reproduce.Settings(
    only=("step_time-wrn_28_10",), minutes=0.02, device="cpu"
  )
  settings = settings.replace(results=str(tmp_path))
  (entry,) = reproduce.run(settings, tmp_path / "w")
  assert entry.state.name == "started"
  assert (
    "minutes are over; rerun the same command to continue" in capsys.readouterr().out
  )


def test_the_list_has_numbers_and_commands(tmp_path):
  done = scripts.run("reproduce", "--list", "--only=ldam-exponential-100", cwd=tmp_path)
  assert done.status == 0 and done.stderr == "", done.stderr
  header, *lines = scripts.table(done.stdout)
  rows = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
  row = rows["cifar_long_tail-ldam-exponential-100-ldam_drw"]
  assert row["published"] == "77.03" and row["state"] == "to do"
  assert float(row["FLOPs"]) > 1e15
  assert row["command"].endswith("--methods=ldam_drw --num_seeds=3")
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--only=sota"], "--only=sota: no cell has such a name; see --list"),
    # The part after the comma is empty, and would match every name.
    (["--only=mnist_imbalance-0.9-l2rw,"], "--only=: no cell has such a name"),
    (["--only="], "--only=: no cell has such a name"),
    (["--only=step_time,sota"], "--only=sota: no cell has such a name"),
    (["--list", "--results=nowhere"], "--results=nowhere is not a folder"),
    (["--device=gpu", "--only=step_time"], "--device=gpu: JAX uses a CPU"),
  ],
)
def test_a_mistake_is_a_one_line_error(arguments, message, tmp_path):
  done = scripts.run("reproduce", *arguments, cwd=tmp_path)
  assert done.status == 2 and message in done.stderr, done.stderr
