"""The long-tail scripts on a small scale: presets, files and errors."""

import numpy as np
import pytest
import scripts

from experiments import cifar_long_tail
from experiments import mnist_long_tail
from experiments.lib import long_tail
from experiments.lib import registries
from experiments.tables import published
from experiments.tables import published_cifar
from l2rw_jax import base
from l2rw_jax.data import sources

_NAME = "mnist_long_tail"
_SMALL = (
  "--dataset=digits",
  "--imbalance=10",
  "--num_epochs=2",
  "--deferred=0.5",
  "--num_devices=1",
)
_METHODS = ["uniform", "absgd_ldam_drw", "meta_weight_net"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The folder of a short run, and the text that the run printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  methods = f"--methods={','.join(_METHODS)}"
  done = scripts.run(_NAME, *_SMALL, "--num_seeds=2", methods, cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.parametrize("name", ["npz:a", "digits"])
def test_unequal_class_sizes_of_user_data_are_noted(name):
  labels = np.repeat([0, 1], [9, 3]).astype(np.int32)
  train = sources.Source(name, "own", "train", np.zeros((12, 2)), labels, 2, {})
  note = long_tail.note_on_sizes(train)
  if name == "digits":
    assert note is None
  else:
    assert "npz:a have 3 to 9 training images" in note
    assert long_tail.note_on_sizes(train._replace(labels=np.sort(labels)[4:])) is None


@pytest.mark.ci
def test_run_writes_rows_and_figures(run):
  folder, printed = run
  header, *lines = scripts.table(printed)
  assert header[:4] == ["shape", "imbalance", "num_epochs", "method"]
  assert header[4:6] == ["test accuracy %", "balanced %"]
  assert header[6:9] == ["many-shot %", "medium-shot %", "few-shot %"]
  assert [line[3] for line in lines] == _METHODS and lines[0][-1] == "2"
  assert "digits, mlp, builder mwn, 10 meta images a class" in printed
  assert "more than 100 training images, few-shot classes fewer than 20." in printed
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert len(rows) == len(csv_rows) == 2 * len(_METHODS)
  assert flags["beta"] == 0.9999 and flags["deferred"] == 0.5
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
  for row in rows:
    # The rarest digit has 126 images, 10 of them in the meta set. The first class has
    # as many as remain, 116, and the last class a tenth of that.
    assert row["class_counts"] == "116 89 69 53 41 32 24 19 14 11"
    assert (row["many_above"], row["few_below"], row["num_meta"]) == (100, 20, 10)
    assert (row["builder"], row["shape"], row["imbalance"]) == (
      "mwn",
      "exponential",
      10,
    )
    assert row["num_steps"] == 2 * (row["num_train"] // 100)
    assert row["published_percent"] is None
    groups = [row[f"{name}_percent"] for name in ("many", "medium", "few")]
    assert sum(n * g for n, g in zip((1, 6, 3), groups, strict=True)) == pytest.approx(
      10 * row["balanced_percent"]
    )
  assert len({row["params_sha256"] for row in rows}) == len(rows)
  assert len({row["data"] for row in rows}) == 2  # a training set for each seed


@pytest.mark.slow
def test_more_imbalances_and_another_shape(run):
  folder, _ = run
  before = scripts.contents(folder / "seeds-0-1")
  more = [*_SMALL, "--num_seeds=2", "--methods=uniform", "--imbalance=5"]
  shape = ["--builder=ldam", "--shape=step", "--num_meta=0", "--num_seeds=1"]
  again, other = scripts.run_many(
    _NAME,
    [
      [*more, f"--workdir={folder}"],
      [*_SMALL, *shape, "--methods=focal", f"--workdir={folder.parent}/step"],
    ],
  )
  assert again.status == 0 and other.status == 0, (again, other)
  after = scripts.contents(folder / "seeds-0-1")
  assert before.items() <= after.items()  # nothing was repeated
  lines = scripts.table(again.stdout)[1:]
  assert [line[:4] for line in lines] == [
    ["exponential", "10", "2", "uniform"],
    ["exponential", "5", "2", "uniform"],
  ]
  (row,), _, _ = scripts.saved_rows(folder.parent / "step")
  assert row["class_counts"] == " ".join(["126"] * 5 + ["12"] * 5)
  # The classes have only two sizes, so none is in the middle group.
  assert row["medium_percent"] is None and row["few_percent"] is not None


def test_each_method_has_its_learning_rate_unless_one_is_given(tmp_path):
  settings = mnist_long_tail.Settings(
    dataset="digits",
    imbalance=(10.0,),
    num_epochs=1,
    num_seeds=1,
    methods=("ldam", "l2rw"),
  )
  rates, preset = mnist_long_tail.LEARNING_RATES, mnist_long_tail.PRESET
  assert "ldam" not in rates and rates["l2rw"] != preset.optimizer.learning_rate
  rows = mnist_long_tail.run(settings, tmp_path / "default")
  expected = [preset.optimizer.learning_rate, rates["l2rw"]]
  assert [row["learning_rate"] for row in rows] == expected
  rows = mnist_long_tail.run(settings.replace(learning_rate=0.5), tmp_path / "given")
  assert [row["learning_rate"] for row in rows] == [0.5, 0.5]


def test_a_folder_with_other_learning_rates_is_refused(tmp_path, monkeypatch):
  settings = mnist_long_tail.Settings(
    dataset="digits", imbalance=(10.0,), num_epochs=1, num_seeds=1, methods=("focal",)
  )
  mnist_long_tail.run(settings, tmp_path)
  preset = mnist_long_tail.PRESET._replace(learning_rates={"l2rw": 0.5})
  monkeypatch.setattr(mnist_long_tail, "PRESET", preset)
  with pytest.raises(base.InputError, match="learning_rates"):
    mnist_long_tail.run(settings, tmp_path)


_MISTAKES = {
  "method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "no_method": (["--methods="], "--methods= is empty: choose among uniform"),
  "shape": (["--shape=linear"], "should be one of <exponential|step>"),
  "builder": (["--builder=cui"], "should be one of <ldam|mwn>"),
  "imbalance": (["--imbalance=0.5"], "--imbalance=0.5 must lie between 1 and"),
  "nan": (["--imbalance=nan"], "--imbalance=nan is not a finite number"),
  "empty_class": (["--imbalance=500"], "use --imbalance=116 or less"),
  "meta_many": (["--num_meta=126"], "lower --num_meta"),
  "meta_none": (
    ["--num_meta=0", "--methods=l2rw"],
    "clean examples, but the set is empty: raise --num_meta",
  ),
  "meta_batch": (["--meta_batch_size=101"], "is larger than the meta set of 100 clean"),
  "batch": (["--batch_size=469"], "is larger than the 468 training examples"),
  "deferred": (["--deferred=1.5"], "--deferred=1.5 must lie"),
  "never": (
    ["--deferred=1", "--methods=ldam_drw"],
    "--methods=ldam_drw would begin after 2 epochs, and the run ends after 2: lower"
    " --deferred",
  ),
  "never_corrected": (
    ["--methods=forward_correction"],
    ": lower --transition_epoch or train longer",
  ),
  "beta": (["--beta=1", "--methods=class_balanced"], "--beta=1 must lie"),
  "beta_of_absgd": (["--beta=1", "--methods=absgd_ldam_drw"], "--beta=1 must lie"),
  "gamma": (["--focal_gamma=-1"], "--focal_gamma=-1 must lie"),
  "margin": (["--ldam_margin=-1"], "--ldam_margin=-1 must lie"),
  "scale": (["--ldam_scale=0", "--methods=ldam"], "--ldam_scale=0 must lie"),
  "lambda": (["--absgd_lambda=0", "--methods=absgd"], "at least 1e-06 away from 0"),
  "absgd_gamma": (["--absgd_gamma=0", "--methods=absgd"], "--absgd_gamma=0 must lie"),
  "absgd_alpha": (["--absgd_alpha=0", "--methods=absgd"], "--absgd_alpha=0 must lie"),
  "network": (["--network=cnn"], "should be one of <mlp|lenet>"),
  "data": (["--dataset=mnist", "--data_dir={run}/none"], "'mnist' does not exist"),
  "other_settings": (
    ["--workdir={run}", "--shape=step"],
    'shape was "exponential", now "step"',
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  shared = (*_SMALL, "--num_seeds=2", "--methods=uniform")
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *shared, kept=run[0], run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


def test_published_numbers():
  value_of = published_cifar.long_tail
  assert value_of("cifar10", "uniform", "ldam", "exponential", 100.0) == 70.36
  assert value_of("cifar10", "ldam_drw", "ldam", "exponential", 100.0) == 77.03
  assert value_of("cifar100", "ldam_drw", "ldam", "step", 10.0) == 59.46
  assert value_of("cifar10", "uniform_drw", "ldam", "step", 100.0) == 71.60
  assert value_of("cifar10", "l2rw", "mwn", "exponential", 200.0) == 66.51
  assert value_of("cifar100", "meta_weight_net", "mwn", "exponential", 1.0) == 70.37
  for absent in (
    ("cifar10", "uniform", "ldam", "exponential", 200.0),
    ("cifar10", "uniform", "mwn", "step", 100.0),
    ("cifar10", "l2rw", "ldam", "exponential", 100.0),
    ("digits", "uniform", "ldam", "exponential", 100.0),
  ):
    assert value_of(*absent) is None


def _random_source(name, split, **folders):
  """Random images of CIFAR's shape, few enough for a short test."""
  num_classes = 100 if name == "cifar100" else 10
  size = (1000 if num_classes == 100 else 600) if split == "train" else num_classes
  labels = (np.arange(size) % num_classes).astype(np.int32)
  images = np.random.default_rng(0).integers(0, 256, (size, 32, 32, 3), np.uint8)
  return sources.Source(name, "1.0.0", split, images, labels, num_classes, {})


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
  """Rows of short runs, by preset."""
  folder = tmp_path_factory.mktemp("cifar")
  shared = {"smoke": True, "network": "mlp", "num_seeds": 1, "num_devices": 1}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, "load", _random_source)
    return {
      settings.preset: cifar_long_tail.run(settings, folder / settings.preset)
      for settings in (
        cifar_long_tail.Settings(
          preset="ldam",
          imbalance=(5.0,),
          methods=("uniform", "ldam_drw"),
          data_dir=str(folder),
          **shared,
        ),
        cifar_long_tail.Settings(
          preset="mwn",
          imbalance=(2.0,),
          methods=("l2rw",),
          dataset="cifar100",
          data_dir=str(folder),
          **shared,
        ),
      )
    }


def _rates(preset):
  """Learning rates at the end of every epoch, with 97 steps in an epoch."""
  rate = preset.optimizer.schedule(preset.num_epochs * 97)
  return [float(rate(97 * epoch + 96)) for epoch in range(preset.num_epochs)]


def test_schedules_of_the_papers():
  ldam = [0.02, 0.04, 0.06, 0.08] + [0.1] * 156 + [1e-3] * 20 + [1e-5] * 20
  assert _rates(cifar_long_tail.PRESETS["ldam"]) == pytest.approx(ldam, rel=1e-5)
  mwn = [0.1] * 79 + [0.01] * 10 + [1e-3] * 11
  assert _rates(cifar_long_tail.PRESETS["mwn"]) == pytest.approx(mwn, rel=1e-5)


@pytest.mark.parametrize(
  ("preset", "num_meta", "comparable"),
  [("ldam", 10, True), ("mwn", 3, False), ("mwn", 10, True)],
)
def test_a_meta_set_that_changes_the_class_sizes_is_not_comparable(
  preset, num_meta, comparable
):
  settings = cifar_long_tail.Settings(preset=preset, num_meta=num_meta)
  experiment = long_tail.Experiment(
    *(cifar_long_tail.TABLE, None, None, None, cifar_long_tail.PRESETS[preset]),
    *({"dataset": "cifar10"}, (), 1, True),
  )
  assert long_tail.with_flags(settings, experiment).comparable == comparable


@pytest.mark.slow
def test_a_short_run_on_cifar(cifar):
  rows = cifar["ldam"]
  assert [row["method"] for row in rows] == ["uniform", "ldam_drw"]
  for row in rows:
    assert (row["dataset"], row["preset"], row["network"]) == ("cifar10", "ldam", "mlp")
    assert (row["builder"], row["num_meta"], row["imbalance"]) == ("ldam", 0, 5)
    assert row["class_counts"] == "60 50 41 35 29 24 20 17 14 12"
    # No class has more than 100 images, so the groups are thirds of the classes.
    assert (row["many_above"], row["few_below"]) == (40, 18)
    assert (row["weight_decay"], row["nesterov"]) == (2e-4, False)
    assert row["published_percent"] is None and row["batch_size"] == 100


@pytest.mark.slow
def test_the_other_preset_on_cifar_100(cifar):
  (row,) = cifar["mwn"]
  assert (row["builder"], row["num_meta"], row["nesterov"]) == ("mwn", 2, True)
  assert row["class_counts"].startswith("8 7 ") and row["class_counts"].endswith(" 4")


def test_every_published_method_is_one_of_the_registry():
  noise = [t for _, _, sets in published_cifar._TABLES.values() for t in sets.values()]
  noise += published.MNIST_NOISE.values()
  tails = [published_cifar._LDAM_ERRORS, published_cifar._MWN_ACCURACIES]
  assert {method for table in noise for method in table} <= set(registries.NOISE)
  assert {method for table in tails for method in table} <= set(registries.LONG_TAIL)
