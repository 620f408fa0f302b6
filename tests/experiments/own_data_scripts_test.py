"""Users' data in the scripts: --dataset, and --trusted as the meta set."""

import csv
import types

import numpy as np
from PIL import Image
import pytest
import scripts

from experiments import cifar_long_tail
from experiments import cifar_noise
from experiments import digits_noise
from experiments import fairness
from experiments import memorization
from experiments import mnist_imbalance
from experiments import mnist_long_tail
from experiments import mnist_noise
from l2rw_jax import base
from l2rw_jax.data import examples
from l2rw_jax.data import long_tail
from l2rw_jax.data import own_data
from l2rw_jax.data import row_sources
from l2rw_jax.data import sources

_SMALL = {"num_seeds": 1, "num_devices": 1, "batch_size": 20}


def _save_table(path, size, seed=0):
  """Saves points around three centers; returns the name of the data set."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(3, size=size)
  points = 4 * np.eye(3)[labels] + rng.normal(size=(size, 3))
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["a", "b", "c", "kind"])
    writer.writerows(
      [*x.round(3), "xyz"[y]] for x, y in zip(points, labels, strict=True)
    )
  return f"csv:{path}"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tables")
  return (
    _save_table(folder / "points.csv", 90),
    _save_table(folder / "trusted.csv", 9, seed=1),
  )


@pytest.mark.ci
def test_trusted_examples_are_the_meta_set_of_digits_noise(tables, tmp_path):
  dataset, trusted = tables
  flags = [f"--dataset={dataset}", f"--trusted={trusted}", "--methods=l2rw"]
  flags += [*("--num_steps=2", "--num_seeds=1", "--num_devices=1", "--batch_size=20")]
  flags.append(f"--workdir={tmp_path / 'run'}")
  done = scripts.run("digits_noise", *flags)
  assert done.status == 0 and done.stderr == "", done.stderr
  notes = done.stdout.splitlines()[:2]
  assert notes == [f"{name}: The labels are the column 'kind'." for name in tables]
  assert "clean images a class" not in done.stdout
  rows, _, recorded = scripts.saved_rows(tmp_path / "run")
  assert (recorded["dataset"], recorded["trusted"]) == tables
  assert "num_meta" not in recorded and len(rows) == 1
  unused = scripts.run("digits_noise", *flags, "--num_meta=5")
  message = "error: --num_meta has no effect with --trusted: leave it out.\n"
  assert (unused.status, unused.stderr) == (2, message)
  other = scripts.run("digits_noise", *flags, f"--trusted={dataset}")
  assert other.status == 2 and "trusted was " in other.stderr


def test_the_list_of_digits_noise_shows_the_rows_of_the_users_table(tmp_path):
  settings = digits_noise.Settings(
    dataset=_save_table(tmp_path / "t.csv", 60), **_SMALL
  )
  (split,) = digits_noise.make_splits(settings, (0,))
  probabilities = np.full((len(split.train.label), 3), 1 / 3)
  result = types.SimpleNamespace(statistics={"mean_probabilities": probabilities})
  data = digits_noise.make_audit(settings, split, result).data
  with open(tmp_path / "t.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert max(data.rows) > len(split.train.label)  # A fifth is the test set.
  for i, row in enumerate(data.rows):
    assert data.names[i] == f"row {row}"
    assert data.columns["a"][i] == rows[row]["a"]
    assert rows[row]["kind"] == data.form.class_names[split.train.true_label[i]]
  np.testing.assert_array_equal(data.labels, split.train.label)


def test_trusted_images_have_the_scale_of_a_named_set(tmp_path):
  digits = sources.load("digits", "test")

  def trusted(images):
    np.savez(tmp_path / "trusted.npz", X=images, y=digits.labels)
    return digits_noise.Settings(trusted=f"npz:{tmp_path / 'trusted.npz'}")

  for images in (digits.images, digits.images / 255, digits.images.astype(float)):
    np.testing.assert_array_equal(trusted(images).trusted_source.images, digits.images)
  with pytest.raises(base.InputError, match=r"0 to 15 as pixels, but .* up to 255;"):
    _ = trusted(digits.images // 17).trusted_source


def test_trusted_examples_that_are_test_examples_are_reported(tmp_path, capsys):
  digits = {part: sources.load("digits", part) for part in ("train", "test")}
  rows = {"train": slice(0, 20), "test": slice(0, 3)}
  for parts, number in ((("train", "test"), 3), (("train",), 0)):
    images, labels = (
      np.concatenate([getattr(digits[part], name)[rows[part]] for part in parts])
      for name in ("images", "labels")
    )
    np.savez(tmp_path / "trusted.npz", X=images, y=labels)
    name = f"npz:{tmp_path / 'trusted.npz'}"
    _ = digits_noise.Settings(trusted=name).trusted_source
    printed = capsys.readouterr().out
    message = f"{name}: {number} of {len(labels)} trusted examples equal test examples."
    assert (message in printed) == ("equal test" in printed) == (number > 0)


def test_test_examples_that_are_training_examples_are_reported(tmp_path, capsys):
  images = np.random.default_rng(0).integers(256, size=(40, 4, 4), dtype=np.uint8)
  labels = np.arange(40) % 2
  for name, test in (("copies", [0, 5, 5, 9]), ("others", [])):
    rest = [row for row in range(40) if row % 10 == 1]
    np.savez(
      tmp_path / f"{name}.npz",
      **{"X": np.delete(images, rest, 0), "y": np.delete(labels, rest)},
      **{"X_test": images[test + rest], "y_test": labels[test + rest]},
    )
    settings = digits_noise.Settings(dataset=f"npz:{tmp_path / name}.npz")
    for part in ("test", "train", "test"):
      settings.load(part)
    printed = capsys.readouterr().out
    message = "copies.npz: 4 of 8 test examples equal training examples."
    assert printed.count(message) == printed.count("equal") == (name == "copies")


def test_all_trusted_examples_are_in_the_splits(tables):
  dataset, trusted = tables
  settings = digits_noise.Settings(dataset=dataset, trusted=trusted, **_SMALL)
  (split,) = digits_noise.make_splits(settings, (0,))
  assert split.meta.image.shape == (9, 3) and split.num_classes == 3
  num_wrong = (split.train.label != split.train.true_label).sum()
  assert num_wrong == round(0.4 * len(split.train.label))
  with pytest.raises(base.InputError, match="--num_meta has no effect with --trusted"):
    digits_noise.make_splits(settings.replace(num_meta=4), (0,))


@pytest.mark.ci
def test_trusted_images_are_the_meta_set_of_mnist_noise(tmp_path):
  rng = np.random.default_rng(0)
  labels = np.arange(60) % 3
  images = rng.integers(60, size=(60, 9, 9, 1)).astype(np.uint8)
  for image, label in zip(images, labels, strict=True):
    image[:, 3 * label : 3 * label + 3] += 150
  np.savez(tmp_path / "all.npz", X=images, y=labels)
  np.savez(tmp_path / "trusted.npz", X=images[:6], y=labels[:6])
  settings = mnist_noise.Settings(
    dataset=f"npz:{tmp_path / 'all.npz'}",
    trusted=f"npz:{tmp_path / 'trusted.npz'}",
    noise="uniform_flip",
    noise_fraction=(0.0,),
    methods=("l2rw",),
    num_epochs=1,
    **_SMALL,
  )
  (row,) = mnist_noise.run(settings, tmp_path / "run")
  assert row["num_meta"] == 6 and row["dataset"] == settings.dataset
  assert (row["num_steps"], row["published_percent"]) == (2, None)


@pytest.mark.slow
def test_streamed_images_have_the_results_of_images_in_memory(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  for label in range(3):
    (tmp_path / "images" / f"class {label}").mkdir(parents=True)
    for i in range(20):
      image = rng.integers(60, size=(6, 6)).astype(np.uint8)
      image[:, 2 * label : 2 * label + 2] += 150
      Image.fromarray(image).save(tmp_path / "images" / f"class {label}" / f"{i}.png")
  rows, data_sets = [], []
  for data in ("resident", "stream"):
    settings = digits_noise.Settings(
      dataset=f"images:{tmp_path / 'images'}",
      methods=("uniform",),
      num_steps=6,
      data=data,
      **_SMALL,
    )
    (row,) = digits_noise.run(settings, tmp_path / data)
    rows.append({k: v for k, v in row.items() if "seconds" not in k})
    data_sets.append(settings.load("train").images)
  assert rows[0] == rows[1]
  assert isinstance(data_sets[0], np.ndarray)
  assert isinstance(data_sets[1], row_sources.ImageFiles)


def test_each_settings_object_reads_a_users_data_once(tmp_path, capsys, monkeypatch):
  name = _save_table(tmp_path / "points.csv", 50)
  settings, calls, read = digits_noise.Settings(dataset=name), [], own_data.read
  monkeypatch.setattr(
    own_data, "read", lambda *a, **k: calls.append(a) or read(*a, **k)
  )
  train, test = settings.load("train"), settings.load("test")
  assert calls == [(name, "train"), (name, "test")]
  assert len(train.labels) + len(test.labels) == 50
  _save_table(tmp_path / "points.csv", 80)
  assert settings.load("train").images is train.images
  assert len(capsys.readouterr().out.splitlines()) == 1  # Reported once.
  train, test = (settings.replace().load(part) for part in ("train", "test"))
  assert len(train.labels) + len(test.labels) == 80


def test_without_users_data_the_flags_for_them_are_not_recorded():
  recorded = digits_noise.Settings().record()
  assert recorded["num_meta"] == 5 and not {"trusted", "dataset"} & set(recorded)


def test_trusted_examples_are_the_meta_set_of_the_other_scripts(tmp_path):
  rng = np.random.default_rng(0)
  images = rng.integers(256, size=(60, 8, 8, 3)).astype(np.uint8)
  labels = np.arange(60) % 3
  np.savez(tmp_path / "images.npz", X=images, y=labels)
  np.savez(tmp_path / "trusted.npz", X=images[:5], y=labels[:5])
  flags = {
    "dataset": f"npz:{tmp_path / 'images.npz'}",
    "trusted": f"npz:{tmp_path / 'trusted.npz'}",
  }
  settings = cifar_noise.Settings(preset="mwn_stable", num_validation=0, **flags)
  preset = cifar_noise.make_preset(settings)
  (noisy,) = cifar_noise.make_splits(settings, preset, (0,))
  # The meta set takes no training images, so the tail is cut from all of them.
  settings = mnist_long_tail.Settings(imbalance=(2.0,), **flags)
  tail = long_tail.long_tail_splits(
    settings.load("train"),
    settings.load("test"),
    builder="mwn",
    shape="exponential",
    imbalance=2.0,
    seed=0,
    **settings.meta_set(10),
  )
  assert examples.class_counts(tail.train, 3)[0] == 16
  for split in (noisy, tail):
    np.testing.assert_array_equal(split.meta.label, labels[:5])
    np.testing.assert_array_equal(split.meta.image, images[:5])
  with pytest.raises(base.InputError, match="--num_meta has no effect with --trusted"):
    cifar_noise.make_splits(cifar_noise.Settings(num_meta=2, **flags), preset, (0,))


@pytest.mark.parametrize(
  ("script", "flags", "where"),
  [
    (mnist_imbalance, {}, "this script"),
    (mnist_noise, {"network": "lenet"}, "--network=lenet"),
    (mnist_noise, {"pixels": "raw"}, "--pixels=raw"),
    (mnist_long_tail, {"network": "lenet"}, "--network=lenet"),
    (cifar_noise, {"smoke": True, "network": "mlp"}, "this script"),
    (cifar_long_tail, {"smoke": True, "network": "mlp"}, "this script"),
    (memorization, {"networks": ("mlp-4", "lenet")}, "--networks=lenet"),
    (fairness, {"network": "resnet", "imbalance": 2.0}, "--network=resnet"),
  ],
)
def test_scripts_and_networks_for_images_refuse_tables(tmp_path, script, flags, where):
  labels = np.arange(200) % 10
  points = np.random.default_rng(0).normal(size=(200, 3))
  np.savez(tmp_path / "rows.npz", X=points, y=labels)
  settings = script.Settings(dataset=f"npz:{tmp_path / 'rows.npz'}", **flags)
  message = rf"^{where} needs images \[N, H, W, C\], but --dataset=.* shape \[3\]"
  with pytest.raises(base.InputError, match=message):
    script.run(settings, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_schedule_replaces_the_drops_of_the_preset():
  settings = cifar_noise.Settings(schedule="cosine", num_steps=100)
  optimizer = cifar_noise.make_optimizer(cifar_noise.make_preset(settings))
  rate = settings.scheduled(optimizer).schedule(100)
  np.testing.assert_allclose([rate(0), rate(50), rate(100)], [0.1, 0.05, 0], atol=1e-8)
  constant = settings.replace(schedule="constant").scheduled(optimizer).schedule(100)
  assert constant(0) == constant(99) == np.float32(0.1)
  assert optimizer.schedule(100)(99) < 0.01
  recorded = cifar_noise.Settings().record()
  assert "schedule" not in recorded and settings.record()["schedule"] == "cosine"
