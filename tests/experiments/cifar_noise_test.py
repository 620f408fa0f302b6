"""CIFAR presets against the numbers of the papers, short runs, and mistakes."""

import dataclasses
import io
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scripts

from experiments import cifar_noise as script
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.tables import published_cifar
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import sources
from l2rw_jax.models import whitened

_NAME = "cifar_noise"
_NO_IMAGES = np.zeros((0, 32, 32, 3), np.uint8)
_SMALL = ("--smoke", "--num_devices=1", "--num_seeds=1")


def _prepare(root, name, num_classes, sizes):
  """Random images in TFDS's format, with human labels for cifar10_n."""
  from PIL import Image
  import tensorflow_datasets as tfds

  label = tfds.features.ClassLabel(num_classes=num_classes)
  fields = noisy_labels.ANNOTATIONS.values() if name == "cifar10_n" else ()
  features = {
    "image": tfds.features.Image(shape=(32, 32, 3)),
    "label": label,
    **dict.fromkeys(fields, label),
  }

  class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, _):
      return {split: self._generate_examples(size) for split, size in sizes.items()}

    def _generate_examples(self, size):
      rng = np.random.default_rng(size)
      for i in range(size):
        file = io.BytesIO()
        image = rng.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(image).save(file, "PNG", compress_level=0)
        file.seek(0)
        wrong = dict.fromkeys(fields, (i + 1) % num_classes)
        yield i, {"image": file, "label": i % num_classes, **wrong}

  Prepared.name = name
  tfds.disable_progress_bar()
  Prepared(data_dir=root, file_format="array_record").download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A folder of small cifar10, cifar100 and cifar10_n, with their decoded images."""
  root = tmp_path_factory.mktemp("data")
  _prepare(root, "cifar10", 10, {"train": 200, "test": 50})
  _prepare(root, "cifar10_n", 10, {"train": 200, "test": 50})
  _prepare(root, "cifar100", 100, {"train": 500, "test": 100})
  for name, split in itertools.product(
    ("cifar10", "cifar10_n", "cifar100"), ("train", "test")
  ):
    sources.load(name, split, data_dir=root, cache_dir=root / "cache")
  return root


def _shared(data_dir):
  return [*_SMALL, f"--data_dir={data_dir}", f"--cache_dir={data_dir}/cache"]


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
  """The folder of a short run, and the text that the run printed."""
  cwd = tmp_path_factory.mktemp(_NAME)
  done = scripts.run(_NAME, *_shared(data_dir), "--methods=uniform", cwd=cwd)
  assert done.status == 0 and done.stderr == "", done.stderr
  return cwd / "runs" / _NAME, done.stdout


@pytest.mark.slow
def test_run_writes_rows_and_figures(run):
  folder, printed = run
  header, *lines = scripts.table(printed)
  assert header[:5] == ["dataset", "noise", "fraction", "num_steps", "method"]
  expected = ["cifar10", "background_flip", "0.4", "3", "uniform"]
  assert [line[:5] for line in lines] == [expected]
  (row,), csv_rows, flags = scripts.saved_rows(folder)
  assert len(csv_rows) == 1 and flags["smoke"] and flags["preset"] == "l2rw_background"
  assert (row["network"], row["augmentation"]) == ("resnet_8", "l2rw")
  # 20 clean images and 20 for validation are taken out of 200.
  assert (row["num_train"], row["num_meta"], row["num_steps"]) == (160, 20, 3)
  assert 20 < row["wrong_percent"] <= 40 and row["published_percent"] is None
  assert 0 <= row["accuracy_percent"] <= row["best_percent"] <= 100
  assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_flags_override_the_preset(data_dir, tmp_path):
  many_flags = """--network=mlp --preset=warpi --dataset=cifar100 --methods=uniform
    --noise=bare_symmetric --noise_fraction=0.9 --num_steps=6 --decay_steps=2,4
    --learning_rate=0.5 --momentum=0 --nesterov --weight_decay=0.25 --batch_size=10
    --num_meta=0 --num_validation=100 --augmentation=none --dump_losses"""
  given = [
    ["--network=mlp", "--preset=mwn_flip", "--methods=meta_weight_net"],
    many_flags.split(),
    ["--network=mlp", "--noise=human", "--annotation=aggre", "--methods=uniform"],
  ]
  commands = [
    [*_shared(data_dir), f"--workdir={tmp_path}/{i}", *flags]
    for i, flags in enumerate(given)
  ]
  for done in scripts.run_many(_NAME, commands):
    assert done.status == 0 and done.stderr == "", done
  (flip,), (overridden,), (human,) = (
    scripts.saved_rows(tmp_path / str(i))[0] for i in range(3)
  )
  assert flip["method"] == "meta_weight_net"
  assert flip["noise"] == "mwn_flip2" and flip["nesterov"] and flip["decay_all"]
  assert (tmp_path / "0" / "curve.png").exists()
  expected = {
    "dataset": "cifar100",
    "noise": "bare_symmetric",
    "fraction": 0.9,
    "num_steps": 6,
    "learning_rate": 0.5,
    "momentum": 0,
    "nesterov": True,
    "weight_decay": 0.25,
    "batch_size": 10,
    "num_meta": 0,
    "num_train": 400,
    "augmentation": "none",
    "drops": "0.333333:0.1 0.666667:0.1",
  }
  assert {name: overridden[name] for name in expected} == expected
  assert list((tmp_path / "1").glob("**/losses-seed-0.npz"))
  assert (human["dataset"], human["annotation"]) == ("cifar10_n", "aggre")
  assert human["fraction"] is None and human["wrong_percent"] == 100


_MISTAKES = {
  "preset": (["--preset=mine"], "should be one of <l2rw_uniform|"),
  "method": (["--methods=magic"], "--methods=magic: choose among uniform"),
  "dataset": (["--dataset=cifar"], "unknown data set 'cifar'; did you mean cifar10"),
  "network": (["--network=vgg"], "should be one of <resnet_32|"),
  "noise": (["--noise=flip"], "should be one of <uniform_flip|"),
  "no_data": (["--data_dir=nowhere"], "'cifar10' does not exist"),
  "human_data": (["--noise=human", "--dataset=cifar10"], "needs the data set cifar10"),
  "human_share": (["--noise=human", "--noise_fraction=0.2"], "human has no fraction"),
  "not_human": (["--annotation=aggre"], "is for the builder human only"),
  "fraction": (["--noise_fraction=1.5"], "--noise_fraction=1.5 must lie between 0"),
  "class_pairs": (
    ["--noise=bare_class_conditional", "--dataset=cifar100"],
    "choose another builder for cifar100",
  ),
  "decay": (["--decay_steps=40k"], "--decay_steps=40k: give numbers of updates"),
  "decay_late": (["--decay_steps=2,3"], "--decay_steps=3: give numbers of updates"),
  "decay_of_a_cosine": (
    ["--preset=whitened", "--decay_steps=2"],
    "--decay_steps has no effect with --preset=whitened",
  ),
  "decay_not_ascii": (["--decay_steps=\u0664"], "write it in ASCII"),
  "momentum": (["--momentum=2"], "--momentum=2 must lie between 0 and"),
  "no_meta": (["--num_meta=0"], "needs a meta set of clean examples"),
  "large_meta": (["--num_meta=30"], "the meta set needs 30: lower --num_meta"),
  "meta_batch": (["--meta_batch_size=21"], "larger than the meta set of 20 clean"),
  "batch": (["--batch_size=161"], "larger than the 160 training examples"),
  "nothing_left": (["--num_validation=180"], "nothing is left to train on"),
  "mentor": (["--methods=mentornet_pd"], "needs a mentor of that curriculum"),
  "other_settings": (["--workdir={begun}", "--momentum=0"], "momentum was"),
}


@pytest.fixture(scope="module")
def mistakes(data_dir, tmp_path_factory):
  """Outcomes of command lines with mistakes, in one process."""
  folder, cwd = (tmp_path_factory.mktemp(name) for name in ("mistakes", "begun"))
  shared = _shared(data_dir)
  begun = scripts.begin(_NAME, *shared, "--methods=uniform", cwd=cwd)
  return scripts.run_mistakes(
    _NAME, _MISTAKES, folder, *shared, kept=begun, begun=begun
  )


@pytest.mark.parametrize("name", _MISTAKES)
def test_mistake_is_a_one_line_error_and_writes_nothing(mistakes, name):
  scripts.assert_one_line(mistakes[name], _MISTAKES[name][1])


@pytest.mark.parametrize(
  ("name", "facts"),
  [
    # network, num_steps, decay_steps, nesterov, weight_decay, decay_all, batch_size,
    # and num_meta for 10 and for 100 classes
    (
      "l2rw_uniform",
      ("l2rw_wrn_28_10", 60000, (40000, 50000), False, 2e-4, False, 100, 100, 10),
    ),
    (
      "l2rw_background",
      ("l2rw_resnet_32", 80000, (40000, 60000), False, 2e-4, False, 100, 10, 10),
    ),
    (
      "mwn_uniform",
      ("wrn_28_10", 20000, (18000, 19000), True, 5e-4, True, 100, 100, 10),
    ),
    ("mwn_flip", ("resnet_32", 30000, (20000, 25000), True, 5e-4, True, 100, 100, 10)),
    (
      "mwn_stable",
      ("resnet_32", 58800, (39200, 49000), False, 5e-4, True, 100, 100, 10),
    ),
    (
      "mentornet",
      (
        "mentornet_wrn_56_10",
        39000,
        (19531, 25000, 30000),
        False,
        2e-4,
        False,
        128,
        0,
        0,
      ),
    ),
    ("warpi", ("resnet_32", 58800, (39200, 49000), False, 5e-4, True, 100, 100, 10)),
  ],
)
def test_presets_match_the_released_code(name, facts):
  preset = script.PRESETS[name]
  result = script.make_optimizer(preset)
  assert facts == (
    preset.network,
    preset.num_steps,
    preset.decay_steps,
    result.nesterov,
    result.weight_decay,
    result.decay_all,
    preset.batch_size,
    preset.num_meta[10],
    preset.num_meta[100],
  )
  assert (result.momentum, result.learning_rate) == (0.9, 0.1)
  rates = result.schedule(preset.num_steps)
  for i, step in enumerate(preset.decay_steps):
    assert float(rates(step - 1)) == pytest.approx(0.1 ** (i + 1))
    assert float(rates(step + 1)) == pytest.approx(0.1 ** (i + 2))


def test_the_rate_of_the_fast_network_rises_and_then_falls_to_zero():
  preset = script.PRESETS["whitened"]
  rates = script.make_optimizer(preset).schedule(preset.num_steps)
  peak = round(preset.warmup * preset.num_steps)
  values = [float(rates(step)) for step in (0, peak, preset.num_steps)]
  # In the warm-up, the cosine schedule is multiplied by 1/5, 2/5, ... and 1.
  cosine = (1 + math.cos(math.pi * preset.warmup)) / 2
  expected = [preset.learning_rate / 5, preset.learning_rate * cosine, 0]
  np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.slow(unless=("10-mwn_stable", "100-mentornet"))
@pytest.mark.parametrize("name", script.PRESETS)
@pytest.mark.parametrize("num_classes", [10, 100])
def test_networks_of_presets_fit_the_data(name, num_classes):
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  model = script.make_classifier(script.PRESETS[name], num_classes, images)
  model.check({"image": jnp.zeros((1, 32, 32, 3))}, num_classes)


def test_whitening_filters_are_those_of_the_first_training_images():
  images = np.random.default_rng(0).integers(0, 256, (1100, 9, 9, 3), np.uint8)
  preset = script.PRESETS["l2rw_background"]
  preset = dataclasses.replace(preset, network="whitened_half_gn")
  model = script.make_classifier(preset, 10, images).model
  assert (model.width, model.norm) == (32, "group")
  # L2RW's scaling maps [0, 1] to [-1, 1].
  expected = whitened.whitening_filters(images[:1000] / 127.5 - 1)
  np.testing.assert_allclose(model.whitening, expected, rtol=1e-3, atol=1e-3)
  assert hash(model) == hash(script.make_classifier(preset, 10, images).model)


def test_warpi_scales_cifar_100_by_its_statistics():
  gray = jnp.full((1, 1, 1, 3), 0.5)
  for num_classes, mean, std in (
    (10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    (100, (0.507, 0.487, 0.441), (0.267, 0.265, 0.276)),
  ):
    model = script.make_classifier(script.PRESETS["warpi"], num_classes, _NO_IMAGES)
    result = model.preprocess(gray, None, False).ravel()
    np.testing.assert_allclose(result, (0.5 - np.array(mean)) / std, rtol=1e-4)


@pytest.mark.parametrize(
  ("nesterov", "decay_all", "kernel", "bias"),
  [
    # The first step with momentum 0.9: the gradient is 1, and the weight decay adds 0.5
    # times the parameter, which is 2.
    (False, True, 2 - 0.1 * 2, 2 - 0.1 * 2),
    (False, False, 2 - 0.1 * 2, 2 - 0.1 * 1),
    (True, True, 2 - 0.1 * 1.9 * 2, 2 - 0.1 * 1.9 * 2),
  ],
)
def test_decay_is_an_l2_loss_before_momentum(nesterov, decay_all, kernel, bias):
  tx = optimizers.OptimizerConfig(
    nesterov=nesterov, decay_all=decay_all, weight_decay=0.5
  ).optimizer(10)
  params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  result = optax.apply_updates(params, updates)
  np.testing.assert_allclose(
    [result["kernel"][0, 0], result["bias"][0]], [kernel, bias]
  )


def test_one_optimizer_for_all_seeds():
  make = optimizers.OptimizerConfig
  first, same, other = (make(weight_decay=d) for d in (0.5, 0.5, 0.1))
  assert first.optimizer(10) is same.optimizer(10)
  assert first.optimizer(10) is not other.optimizer(10)


def test_lookup_of_published_numbers():
  lookup = published_cifar.lookup
  result = lookup("l2rw_uniform", "cifar10", "uniform_flip", 0.4, "l2rw")
  assert result == (86.92, 0.19)
  result = lookup("mwn_flip", "cifar100", "mwn_flip2", 0.4, "meta_weight_net")
  assert result == (58.64, 0.47)
  result = lookup("mwn_uniform", "cifar10", "mwn_uniform", 0.6, "uniform")
  assert result == (53.12, 3.03)
  # The two papers use "Focal" for different methods.
  assert lookup("mwn_uniform", "cifar10", "mwn_uniform", 0.4, "focal") == (75.96, 1.31)
  mentornet = lookup("mentornet", "cifar10", "mwn_uniform", 0.4, "focal_weight")
  assert mentornet == (65.0, None)
  assert lookup("mentornet", "cifar10", "mwn_uniform", 0.4, "focal") == (None, None)
  for preset, data, builder, fraction, method in (
    ("l2rw_uniform", "cifar10", "uniform_flip", 0.2, "l2rw"),
    ("l2rw_uniform", "cifar10", "mwn_uniform", 0.4, "l2rw"),
    ("l2rw_uniform", "cifar10_n", "uniform_flip", 0.4, "l2rw"),
    ("warpi", "cifar10", "mwn_uniform", 0.4, "warpi"),
    ("mwn_flip", "cifar10", "mwn_flip2", 0.4, "advisor"),
  ):
    assert lookup(preset, data, builder, fraction, method) == (None, None)
  for preset, (builder, fractions, table) in published_cifar._TABLES.items():
    assert script.PRESETS[preset].noise == builder and 0.4 in fractions
    for methods in table.values():
      assert set(methods) <= set(registries.NOISE)
