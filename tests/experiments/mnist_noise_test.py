"""The script mnist_noise at small scale: files, results and errors."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from experiments import mnist_noise as script
from experiments.lib import registries
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.io import metric_writer
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.methods.mentornet import network as mentornet_network
from l2rw_jax.training import validation

_NAME = "mnist_noise"
_SMALL = ("--dataset=digits", "--num_meta=5", "--num_epochs=1", "--num_devices=1")
_METHODS = ["early_stopped", "meta_weight_net", "mentornet_pd"]


def _save_mentor(path, num_classes=None):
  network = mentornet_network.MentorNetwork(num_classes or 2)
  values = np.zeros(1, np.float32)
  variables = jax.jit(network.init)(
    jax.random.key(1), values, values, np.zeros(1, int), 0
  )
  mentor = mentornet_network.Mentor("pd", network, variables, num_classes)
  mentor_file.save(path, mentor, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A short run's folder and what it printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  _save_mentor(cwd / "mentor.json")
  done = scripts.run(
    _NAME,
    *_SMALL,
    "--num_seeds=2",
    "--noise_fraction=0.5",
    f"--methods={','.join(_METHODS)}",
    "--mwn_preset=bare",  # Its weighting network has different widths from the default.
    "--mentor=mentor.json",
    "--dump_losses",
    cwd=cwd,
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.ci
def test_run_writes_rows_and_figures(run):
  folder, printed = run
  header, *lines = scripts.table(printed)
  # Nothing was published for digits.
  assert header[:3] == ["noise", "fraction", "method"] and "published" not in header
  cells = [(line[1], line[2], line[-1]) for line in lines]
  assert cells == [("0.5", name, "2") for name in _METHODS]
  rows, csv_rows, flags = scripts.saved_rows(folder)
  assert len(rows) == len(csv_rows) == 2 * len(_METHODS)
  assert flags["mentor"] == ["mentor.json"] and flags["warpi_samples"] == 3
  for row in rows:
    assert (row["name"], row["learning_rate"]) == ("adam", 1e-3)
    assert (row["noise"], row["fraction"], row["num_meta"]) == (
      "bare_symmetric",
      0.5,
      50,
    )
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", row["commit"])
  assert len({r["params_sha256"] for r in rows}) == len(rows)
  for name in ("figure.png", "curve-0.5.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")


def _first_step(name, **flags):
  """`key -> (params, gradients)` of a method on some images of digits."""
  settings = script.Settings(dataset="digits", num_meta=5, **flags)
  splits = functools.partial(script.make_splits, settings, 0.5)
  (split,) = splits((0,))
  cell = script.make_cell(settings, name, 0.5, splits, split)

  def batch(part, size):
    index = np.arange(size)
    return {"image": part.image[:size], "label": part.label[:size], "index": index}

  def gradients(key):
    train, meta = batch(split.train, 6), batch(split.meta, 4)
    params, model_state = cell.model.init(key, train)
    problem = cell.model.problem(
      class_counts=jnp.full(10, 120), num_examples=1247, num_steps=12
    )
    state = cell.method.init(key, problem, params)
    inputs = base.Inputs(params, model_state, (), train, meta, jnp.int32(0), key)
    return params, cell.method.gradients(state, problem, inputs)[0]

  return gradients


def test_methods_that_learn_weights_use_all_clean_images_with_preset_bare():
  settings = script.Settings(
    dataset="digits", preset="bare", num_meta=5, num_validation=100, num_devices=1
  )
  splits = functools.partial(script.make_splits, settings, 0.5)
  (split,) = splits((0,))
  for name, watched in (
    ("l2rw", "meta"),
    ("meta_weight_net", "meta"),
    ("uniform", "validation"),
    ("early_stopped", "validation"),
  ):
    cell = script.make_cell(settings, name, 0.5, splits, split)
    assert cell.config.meta_batch_size == 50
    assert cell.optimizer.plateau_steps and cell.optimizer.plateau_data == watched
  # The rows of versions without the flag lack the entry, too.
  assert "plateau_data" not in settings.record()


def test_a_schedule_replaces_the_plateau_of_a_preset():
  settings = script.Settings(
    dataset="digits", preset="bare", schedule="cosine", num_meta=5, num_validation=0
  )
  (split,) = script.make_splits(settings, 0.5, (0,))
  optimizer = script.make_optimizer(settings, "l2rw", split, 10)
  assert optimizer.cosine and optimizer.plateau_steps is None
  assert optimizer.plateau_data == "validation"  # The row has no such column.
  with pytest.raises(base.InputError, match="no effect without --plateau"):
    script.make_optimizer(settings.replace(plateau_data="meta"), "l2rw", split, 10)


@pytest.mark.parametrize("watched", ["validation", "meta"])
def test_the_plateau_follows_the_loss_of_the_named_images(watched, tmp_path):
  settings = script.Settings(
    dataset="digits",
    preset="bare",
    methods=("l2rw",),
    noise_fraction=(0.5,),
    num_meta=5,
    num_validation=100,
    num_epochs=2,
    num_seeds=1,
    num_devices=1,
    plateau_data=watched,
  )
  values = []
  original = validation.watched

  def recorded(method, examples, **options):
    method = original(method, examples, **options)

    def refresh(state, problem, view):
      state = method.refresh(state, problem, view)
      outputs, _ = problem.forward(
        view.params, {}, examples_lib.as_batch(examples[0]), jax.random.key(0), False
      )
      labels = examples[0].label
      log_likelihood = jax.nn.log_softmax(outputs)[np.arange(len(labels)), labels]
      values.append((len(labels), float(state.value), -float(log_likelihood.mean())))
      return state

    return method._replace(refresh=refresh)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(validation, "watched", recorded)
    rows = script.run(settings, tmp_path)
  assert len(values) == 2
  for size, value, expected in values:
    assert size == (50 if watched == "meta" else 100)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert rows[0].get("plateau_data", "validation") == watched


@pytest.mark.parametrize("name", ["warpi", "advisor", "forml"])
def test_other_methods_fit_the_network_and_the_data(name):
  params, result = jax.eval_shape(_first_step(name), jax.random.key(0))
  assert jax.tree.structure(result.grads) == jax.tree.structure(params)
  assert jax.tree.leaves(result.grads) == jax.tree.leaves(params)
  assert result.weights.shape == (6,)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "flags"),
  [
    ("l2rw", {"microbatch_size": 2}),
    ("meta_weight_net", {"microbatch_size": 4}),
    ("meta_weight_net", {"mwn_recompute": True}),
  ],
)
def test_flags_that_save_memory_change_the_program_but_no_result(name, flags):
  key = jax.random.key(0)
  step, saving = (jax.jit(_first_step(name, **f)) for f in ({}, flags))
  assert step.lower(key).as_text() != saving.lower(key).as_text()
  (_, expected), (_, actual) = step(key), saving(key)
  for field in ("grads", "weights", "losses"):
    chex.assert_trees_all_close(
      getattr(actual, field), getattr(expected, field), rtol=1e-4, atol=1e-6
    )


@pytest.mark.ci
def test_early_stopping_takes_the_step_of_the_lowest_loss_on_the_meta_set(run):
  rows, _, _ = scripts.saved_rows(run[0])
  for row in rows[:2]:
    (folder,) = run[0].glob(f"seeds-*/*-early_stopped/seed-{row['seed']}")
    measured = [m for m in metric_writer.read(folder) if "probe/clean_loss_50" in m]
    best = min(measured, key=lambda m: m["probe/clean_loss_50"])
    assert len(measured) == 2
    assert row["accuracy_percent"] == 100 * best["probe/test/accuracy"]


@pytest.mark.ci
def test_losses_are_kept_for_a_mentor(run):
  (path,) = run[0].glob("seeds-*/*-early_stopped/losses-seed-1.npz")
  dump = loss_dump.read_dump(path)
  assert len(dump.loss) == 1247 and (dump.epoch_percent == 0).all()
  assert 0.4 < np.mean(dump.label != dump.true_label) < 0.6


_MISTAKES = {
  "method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "no_method": (["--methods="], "--methods= is empty: choose among uniform"),
  "no_mentor": (["--methods=mentornet_pd"], "run experiments.mentornet_pretrain"),
  "other_mentor": (
    ["--methods=mentornet_dd", "--mentor={tmp}/mentor.json"],
    "--methods=mentornet_dd needs a mentor of that curriculum",
  ),
  "absent_mentor": (
    ["--methods=mentornet_pd", "--mentor={tmp}/none.json"],
    "cannot read it (No such file or directory)",
  ),
  "unused_mentor": (["--mentor={tmp}/none.json"], "none.json: cannot read it"),
  "old_mentor": (
    ["--methods=mentornet_pd", "--mentor={tmp}/old.json"],
    "has format version 0",
  ),
  "mentor_of_others": (
    ["--methods=mentornet_pd", "--mentor={tmp}/three.json"],
    "3 classes",
  ),
  "percentile": (
    ["--methods=pd_mixture", "--mentor_percentile=0.75"],
    "--mentor_percentile=0.75 must be a number from 0 to 100, not a fraction: use 75",
  ),
  "percentile_high": (
    ["--methods=self_paced", "--mentor_percentile=101"],
    "--mentor_percentile=101 must lie between 0 and 100",
  ),
  "mentor_preset": (["--mentor_preset=mine"], "should be one of <self_paced|"),
  "mwn_preset": (["--mwn_preset=mine"], "should be one of <imbalance|"),
  "meta_every": (["--meta_every=0"], "=0 must lie between 1 and"),
  "layers": (
    ["--methods=l2rw", "--l2rw_layers=0"],
    "--l2rw_layers=0.0: must be a share",
  ),
  "refresh": (["--l2rw_refresh_every=0"], "=0 must lie between 1 and"),
  "microbatch": (["--microbatch_size=0"], "=0 must lie between 1 and"),
  "memory": (
    ["--methods=meta_weight_net", "--microbatch_size=9", "--mwn_recompute"],
    "--mwn_recompute=True and --microbatch_size=9: microbatches are recomputed",
  ),
  "samples": (["--warpi_samples=0"], "=0 must lie between 1 and"),
  "preset": (["--preset=mine"], "should be one of <shared|bare|own>"),
  "network": (["--network=cnn"], "should be one of <mlp|lenet>"),
  "one_variant": (
    ["--noise_variant=official_code"],
    "--noise_variant has no effect with --noise=bare_symmetric",
  ),
  "own_data": (["--dataset=/a/b.npz"], "your own data are images:DIR, npz:FILE or"),
  "noise": (["--noise=mine"], "should be one of <uniform_flip|"),
  "variant": (
    ["--variant=mine"],
    "--noise_variant=mine: value should be one of <paper|official_code>",
  ),
  "fraction": (
    ["--noise_fraction=1.5"],
    "--noise_fraction=1.5 must lie between",
  ),
  "other_data": (
    ["--noise=bare_class_conditional"],
    "choose another builder for digits",
  ),
  "meta_none": (
    ["--num_meta=0", "--methods=warpi"],
    "clean examples, but the set is empty",
  ),
  "meta_many": (["--num_meta=500"], "lower --num_meta"),
  "meta_batch": (["--meta_batch_size=51"], "is larger than the meta set of 50 clean"),
  "plateau": (["--plateau"], "--plateau needs a validation set: give --num_validation"),
  "plateau_meta": (
    ["--plateau", "--plateau_data=meta", "--num_meta=0"],
    "--plateau needs a meta set: give --num_meta",
  ),
  "plateau_data": (["--plateau_data=meta"], "has no effect without --plateau"),
  "validation": (["--num_validation=-1"], "=-1 must lie between 0 and"),
  "validation_many": (["--preset=bare"], "num_validation=11000; lower one of them"),
  "pixels": (["--pixels=big"], "should be one of <unit|raw>"),
  "kappa": (["--methods=bare", "--bare_kappa=-1"], "=-1 must lie between 0 and"),
  "statistics": (["--bare_statistics=mine"], "should be one of <batch_column|"),
  "batch": (["--batch_size=1248"], "is larger than the 1247 training examples"),
  "devices": (["--num_devices=3"], "is not a multiple of --num_devices=3"),
  "data": (["--dataset=mnist", "--data_dir={tmp}/none"], "'mnist' does not exist"),
  "momentum": (
    ["--momentum=0"],
    "--momentum=0 is for SGD, but --preset=shared trains",
  ),
  "other_settings": (
    ["--workdir={run}", "--bare_kappa=2"],
    "bare_kappa was 1.0, now 2",
  ),
}


@pytest.fixture(scope="module")
def mistakes(run, tmp_path_factory):
  """Outcomes of command lines with mistakes."""
  folder = tmp_path_factory.mktemp("mistakes")
  inputs = tmp_path_factory.mktemp("inputs")
  _save_mentor(inputs / "mentor.json")
  _save_mentor(inputs / "three.json", num_classes=3)
  old = json.loads((inputs / "mentor.json").read_text())
  (inputs / "old.json").write_text(json.dumps({**old, "version": 0}))
  shared = (*_SMALL, "--methods=uniform")
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *shared, kept=run[0], tmp=inputs, run=run[0]
  )


@pytest.mark.ci
@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


def _run_seeds(folder, num_seeds, at_once):
  settings = script.Settings(
    **{"dataset": "digits", "methods": ("uniform",), "noise_fraction": (0.5,)},
    **{"num_epochs": 1, "batch_size": 500, "num_meta": 5, "num_devices": 1},
    num_seeds=num_seeds,
    seeds_at_once=at_once,
  )
  script.run(settings, folder)
  return {
    str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.glob("seeds-*/*/seed-*/results.json")
  }


def test_more_seeds_keep_the_finished_groups(tmp_path, monkeypatch):
  # The folder of a version that compared the number of seeds.
  old = set(script.Settings.EXTENDABLE) - {"num_seeds", "seeds_at_once"}
  with monkeypatch.context() as patch:
    patch.setattr(script.Settings, "EXTENDABLE", tuple(old))
    ((name, first),) = _run_seeds(tmp_path / "a", 1, 1).items()
  continued = _run_seeds(tmp_path / "a", 2, 1)
  assert continued[name] == first and len(continued) == 2
  # The files do not depend on the call that made them.
  fresh = _run_seeds(tmp_path / "b", 2, 1)
  contents = {path: content for path, (content, _) in fresh.items() if path != name}
  assert contents == {p: c for p, (c, _) in continued.items() if p != name}
  # Two seeds side by side are another group: they are trained, not taken from above.
  rows, _, _ = scripts.saved_rows(tmp_path / "a")
  _run_seeds(tmp_path / "a", 2, 2)
  grouped, _, _ = scripts.saved_rows(tmp_path / "a")
  assert [r["seed"] for r in grouped] == [r["seed"] for r in rows] == [0, 1]
  assert (tmp_path / "a" / "seeds-0-1").is_dir()


@pytest.mark.slow
@pytest.mark.real_data
def test_preset_own_on_mnist(tfds_dir, decoded, tmp_path):
  done = scripts.run(
    _NAME,
    f"--data_dir={tfds_dir}",
    f"--cache_dir={decoded}",
    "--preset=own",
    "--methods=l2rw",
    "--noise=bare_class_conditional",
    "--noise_fraction=0.45",
    "--num_seeds=1",
    "--num_epochs=1",
    "--num_meta=1",
    "--batch_size=20000",
    "--num_devices=8",
    cwd=tmp_path,
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  rows, _, _ = scripts.saved_rows(tmp_path / "runs" / _NAME)
  (row,) = rows
  assert (row["network"], row["preset"], row["num_steps"]) == ("mlp", "own", 2)
  assert (row["name"], row["learning_rate"]) == ("sgd", 1e-3)
  # BARE's table has this method and noise, but another preset.
  assert (row["published_percent"], row["published_spread"]) == (None, None)


@pytest.mark.slow
def test_lenet_trains_one_seed_at_a_time(tmp_path):
  done = scripts.run(
    _NAME,
    "--dataset=digits",
    "--network=lenet",
    "--methods=uniform",
    "--noise_fraction=0.5",
    "--num_seeds=2",
    "--num_epochs=1",
    "--num_meta=100",  # Leaves few images to train on.
    "--batch_size=200",
    "--num_devices=1",
    cwd=tmp_path,
  )
  assert done.status == 0 and done.stderr == "", done.stderr
  folder = tmp_path / "runs" / _NAME
  assert [r["seed"] for r in scripts.saved_rows(folder)[0]] == [0, 1]
  assert sorted(p.name for p in folder.glob("seeds-*")) == ["seeds-0-0", "seeds-1-1"]


def test_each_method_has_its_lookahead_rate_unless_one_is_given(monkeypatch):
  settings = script.Settings(dataset="digits", num_meta=5)
  splits = functools.partial(script.make_splits, settings, 0.5)
  (split,) = splits((0,))
  monkeypatch.setattr(script.runner, "method_cell", lambda *_, **problem: problem)

  def rates(**flags):
    changed = settings.replace(**flags)
    return {
      name: script.make_cell(changed, name, 0.5, splits, split).get(
        "lookahead_learning_rate"
      )
      for name in registries.META_LEARNED
    }

  assert rates() == script.LOOKAHEAD_LEARNING_RATES
  assert set(rates(lookahead_learning_rate=0.5).values()) == {0.5}
  # The other presets have one rate, or that of the classifier's optimizer.
  assert set(rates(preset="bare").values()) == {1e-4}
  assert set(rates(preset="own").values()) == {None}


def test_a_folder_with_other_lookahead_rates_is_refused(tmp_path, monkeypatch):
  settings = script.Settings(
    dataset="digits",
    num_meta=5,
    num_epochs=1,
    num_seeds=1,
    noise_fraction=(0.5,),
    methods=("uniform",),
  )
  script.run(settings, tmp_path)
  preset = dataclasses.replace(
    script.PRESETS["shared"], lookahead_by_method={"advisor": 7.0}
  )
  monkeypatch.setitem(script.PRESETS, "shared", preset)
  with pytest.raises(base.InputError, match="lookahead_learning_rates"):
    script.run(settings, tmp_path)
