"""Named data sets: digits, prepared sets, the cache, and damaged or unsafe files."""

import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from sklearn import datasets

from l2rw_jax import base
from l2rw_jax.data import sources

IMAGES = 12


def png(value, height=6):
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(np.full((height, 5, 3), value, np.uint8)).save(file, "PNG")
  file.seek(0)
  return file


def prepare(root, dataset, features, row):
  """Prepares a TFDS set of 12 + 5 examples, with `download_and_prepare`."""
  import tensorflow_datasets as tfds

  class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    name = dataset

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, _):
      return {
        "train": self._generate_examples(IMAGES),
        "test": self._generate_examples(5),
      }

    def _generate_examples(self, number):
      return ((i, row(i)) for i in range(number))

  tfds.disable_progress_bar()
  Prepared(data_dir=root, file_format="array_record").download_and_prepare(
    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
  )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  import tensorflow_datasets as tfds

  root = tmp_path_factory.mktemp("prepared")
  label = tfds.features.ClassLabel(num_classes=3)
  prepare(
    root,
    "tiny",
    {
      "image": tfds.features.Image(shape=(6, 5, 3)),
      "label": label,
      "worse_label": label,
      "worker": np.int64,
    },
    lambda i: {
      "image": png(i),
      "label": i % 3,
      "worse_label": (i + 1) % 3,
      "worker": i,
    },
  )
  prepare(
    root,
    "ragged",
    {"image": tfds.features.Image(shape=(None, 5, 3)), "label": label},
    lambda i: {"image": png(i, height=i + 1), "label": 0},
  )
  prepare(
    root,
    "unlabeled",
    {"image": tfds.features.Image(shape=(6, 5, 3)), "label": np.int64},
    lambda i: {"image": png(i), "label": 0},
  )
  return root


@pytest.fixture
def data_dir(prepared, tmp_path):
  """A copy of the `prepared` data sets that a test may damage."""
  return shutil.copytree(prepared, tmp_path / "data")


def load(data_dir, name="tiny", split="train", cache_dir=None):
  return sources.load(
    name, split, data_dir=data_dir, cache_dir=cache_dir or data_dir / "cache"
  )


def test_images_can_be_decoded_when_they_are_used(data_dir, tmp_path, monkeypatch):
  def load_slice(cache_dir="cache", split="train[2:]", in_memory=False):
    place = tmp_path / cache_dir
    return sources.load(
      "tiny", split, data_dir=data_dir, cache_dir=place, in_memory=in_memory
    )

  expected, source = load_slice(in_memory=True), load_slice()
  assert not isinstance(source.images, np.ndarray)
  assert source.images.shape == expected.images.shape == (IMAGES - 2, 6, 5, 3)
  np.testing.assert_array_equal(source.images[:], expected.images)
  rows = np.array([5, 0, 5])
  for images in (source.images, pickle.loads(pickle.dumps(source.images))):
    np.testing.assert_array_equal(images[rows], expected.images[rows])
  np.testing.assert_array_equal(source.labels, expected.labels)
  np.testing.assert_array_equal(
    source.extra["worse_label"], expected.extra["worse_label"]
  )
  assert source[:3] == expected[:3] and source.class_names == expected.class_names
  # The fingerprint depends on the split and on the files.
  digests = {source.images.fingerprint, load_slice(split="train").images.fingerprint}
  assert len(digests) == 2 and load_slice().images.fingerprint in digests
  file = next((data_dir / "tiny" / "1.0.0").glob("*train.array_record*"))
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  os.utime(file, ns=(0, 1))
  assert load_slice().images.fingerprint not in digests
  # A small set is read into memory, and a large one if it fits there.
  assert isinstance(load_slice(in_memory=None).images, np.ndarray)
  monkeypatch.setattr(sources, "_SMALL_FILES", 0)
  assert isinstance(load_slice(in_memory=None).images, np.ndarray)
  monkeypatch.setattr(sources.row_sources, "memory", lambda: 1)
  assert not isinstance(load_slice(in_memory=None).images, np.ndarray)


def test_an_image_that_cannot_be_decoded_names_the_set(data_dir, tmp_path):
  source = sources.load(
    "tiny", "train", data_dir=data_dir, cache_dir=tmp_path, in_memory=False
  )
  file = next((data_dir / "tiny" / "1.0.0").glob("*train.array_record*"))
  file.write_bytes(bytes(len(file.read_bytes())))
  with pytest.raises(base.InputError, match=r"an image in .*tiny/1.0.0 cannot be read"):
    source.images[:]


def test_digits_sizes_and_types():
  train, test = (sources.load("digits", split) for split in ("train", "test"))
  assert train.images.shape == (1297, 8, 8, 1)
  assert test.images.shape == (500, 8, 8, 1)
  assert train.images.dtype == np.uint8
  assert train.labels.dtype == np.int32
  assert (train.name, train.split, train.num_classes) == ("digits", "train", 10)
  shares = np.bincount(test.labels) / np.bincount(datasets.load_digits().target)
  np.testing.assert_allclose(shares, 500 / 1797, atol=0.01)


def test_digits_pixels_are_the_original_ones():
  digits = datasets.load_digits()
  original = {row.tobytes() for row in digits.images.astype(np.uint8)}
  both = [sources.load("digits", split).images for split in ("train", "test")]
  pixels = np.concatenate(both)[..., 0]
  restored = np.round(pixels * (16 / 255)).astype(np.uint8)
  assert {row.tobytes() for row in restored} == original
  assert pixels.max() == 255
  assert np.max(np.abs(pixels / 255 - restored / 16)) <= 0.5 / 255


def test_digits_split_never_changes():
  labels = sources.load("digits", "test").labels
  digest = hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()
  assert digest[:16] == "a65306104cc1cf7f"


def test_digits_needs_no_tensorflow_datasets(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  assert len(sources.load("digits", "test").labels) == 500


def test_digits_without_scikit_learn(monkeypatch):
  monkeypatch.setitem(sys.modules, "sklearn", None)
  with pytest.raises(base.InputError, match="pip install scikit-learn"):
    sources.load("digits", "train")


def test_digits_unknown_split():
  with pytest.raises(base.InputError, match="splits train and test; got 'val'"):
    sources.load("digits", "val")


def test_prepared_set(prepared, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_BLOCK", 5)
  source = load(prepared, cache_dir=tmp_path)
  number = source.images[:, 0, 0, 0].astype(int)
  assert source.images.shape == (IMAGES, 6, 5, 3)
  assert source.images.dtype == np.uint8
  assert sorted(number) == list(range(IMAGES))
  np.testing.assert_array_equal(source.labels, number % 3)
  assert set(source.extra) == {"worse_label"}
  np.testing.assert_array_equal(source.extra["worse_label"], (number + 1) % 3)
  assert source.labels.dtype == source.extra["worse_label"].dtype == np.int32
  assert source[:3] == ("tiny", "1.0.0", "train")
  assert source.num_classes == 3


def test_splits_and_slices(data_dir):
  whole = load(data_dir)
  np.testing.assert_array_equal(
    load(data_dir, split="train[4:9]").images, whole.images[4:9]
  )
  assert len(load(data_dir, split="test").labels) == 5


def test_second_load_reads_the_cache(data_dir):
  first = load(data_dir)
  for file in (data_dir / "tiny" / "1.0.0").glob("*array_record*"):
    file.unlink()
  second = load(data_dir)
  np.testing.assert_array_equal(first.images, second.images)
  np.testing.assert_array_equal(first.labels, second.labels)
  np.testing.assert_array_equal(first.extra["worse_label"], second.extra["worse_label"])
  assert second.num_classes == 3


def other_version(data_dir, version):
  old, new = data_dir / "tiny" / "1.0.0", data_dir / "tiny" / version
  shutil.copytree(old, new)
  info = new / "dataset_info.json"
  info.write_text(info.read_text().replace('"1.0.0"', f'"{version}"'))
  return new


def test_latest_version_is_the_default(data_dir):
  other_version(data_dir, "1.9.0")
  other_version(data_dir, "1.10.0")
  (data_dir / "tiny" / "incomplete.X_2.0.0").mkdir()
  assert load(data_dir).version == "1.10.0"
  assert load(data_dir, "tiny:1.9.0").version == "1.9.0"
  assert load(data_dir, "tiny:1.9.0").name == "tiny"
  with pytest.raises(base.InputError, match=r"unknown data set 'tiny'"):
    load(data_dir, "tiny:3.0.0")


def test_different_copies_of_a_version_do_not_share_the_cache(data_dir, tmp_path):
  import tensorflow_datasets as tfds

  first = load(data_dir, cache_dir=tmp_path / "cache")
  other = data_dir / "other"
  prepare(
    other,
    "tiny",
    {
      "image": tfds.features.Image(shape=(6, 5, 3)),
      "label": tfds.features.ClassLabel(num_classes=2),
    },
    lambda i: {"image": png(i), "label": i % 2},
  )
  second = load(other, cache_dir=tmp_path / "cache")
  assert (first.num_classes, second.num_classes) == (3, 2)


def test_configurations(data_dir):
  (data_dir / "family").mkdir()
  (data_dir / "tiny").rename(data_dir / "family" / "letters")
  assert load(data_dir, "family/letters").name == "family/letters"
  with pytest.raises(base.InputError, match=r"configurations.*: family/letters$"):
    load(data_dir, "family")


def test_folders_from_the_environment(data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
  assert len(sources.load("tiny", "test").labels) == 5
  assert len(list((tmp_path / "caches" / "l2rw_jax").glob("tiny_1.0.0_test*"))) == 1


def test_folders_without_any_setting(data_dir, tmp_path, monkeypatch):
  monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  data_dir.rename(tmp_path / "tensorflow_datasets")
  assert len(sources.load("tiny", "test").labels) == 5
  assert list((tmp_path / ".cache" / "l2rw_jax").iterdir())


def assert_raises(message, data_dir, *args):
  with pytest.raises(base.InputError, match=message) as error:
    load(data_dir, *args)
  assert "\n" not in str(error.value)


def test_missing_set_names_its_path_and_two_solutions(tmp_path):
  with pytest.raises(base.InputError) as error:
    load(tmp_path, "fashion_mnist")
  message = str(error.value)
  assert str(tmp_path / "fashion_mnist" / "<version>" / "dataset_info.json") in message
  assert "--data_dir=" in message
  assert "TFDS_DATA_DIR" in message
  assert "tfds.builder('fashion_mnist'" in message
  assert "file_format='array_record').download_and_prepare()" in message
  assert "\n" not in message
  assert not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
  assert_raises("unknown data set 'mnsit'; did you mean mnist or", tmp_path, "mnsit")
  assert_raises("unknown data set 'digts'; did you mean digits", tmp_path, "digts")
  assert_raises("unknown data set 'qqqqqq'; choose digits", tmp_path, "qqqqqq")


@pytest.mark.parametrize(
  "name",
  ["../tiny", "..", "a/../tiny", "/etc", "a//b", "a\\b", "", ".", "a\nb", "\udc80"],
)
def test_names_outside_the_data_folder_raise(data_dir, name):
  assert_raises("must be a plain name", data_dir / "tiny", name)
  assert_raises("must look like 3.0.1", data_dir, "tiny:../1.0.0")


_MODULE = "evil_features"


@pytest.mark.parametrize(
  "replacement",
  [
    {"pythonClassName": f"{_MODULE}.Image", "text": {}},
    {"python_class_name": f"{_MODULE}.Image", "text": {}},
    {
      "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
      "jsonFeature": {
        "json": json.dumps({"a": {"type": f"{_MODULE}.Image", "content": {}}})
      },
    },
  ],
)
def test_modules_named_by_a_data_set_are_not_imported(
  data_dir, tmp_path, monkeypatch, replacement
):
  (tmp_path / f"{_MODULE}.py").write_text("")
  monkeypatch.syspath_prepend(tmp_path)
  path = data_dir / "tiny" / "1.0.0" / "features.json"
  features = json.loads(path.read_text())
  features["featuresDict"]["features"]["worker"] = replacement
  path.write_text(json.dumps(features))
  assert_raises(rf"features.json names the class '{_MODULE}.Image'", data_dir)
  assert _MODULE not in sys.modules
  path.write_text(json.dumps({"type": f"{_MODULE}.X", "content": {}}))
  assert_raises(rf"features.json names the class '{_MODULE}.X'", data_dir)
  assert _MODULE not in sys.modules


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_damaged_descriptions_are_one_line_errors(data_dir, file):
  path = data_dir / "tiny" / "1.0.0" / file
  original = path.read_bytes()
  deep = b'{"a": ' * 100_000
  half = original[: len(original) // 2]
  for content in (b"", b"{}", b"[]", b"null", b"\xff", half, b'{"a": 1}', deep):
    path.write_bytes(content)
    assert_raises(rf"{file} is damaged or incomplete", data_dir)
  path.unlink()
  if file == "features.json":
    assert_raises(rf"{file} is damaged or incomplete", data_dir)


def change(path, old, new):
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


@pytest.mark.parametrize("number", ["2", "4"])
def test_wrong_number_of_classes_raises(data_dir, number):
  path = data_dir / "tiny" / "1.0.0" / "features.json"
  change(path, '"numClasses": "3"', f'"numClasses": "{number}"')
  message = f"features.json lists {number} classes of label, .* largest label .* is 2"
  # Listing class names is advised only if features.json has too many classes.
  advice = {"2": "there$", "4": "there, or list the names of all classes"}[number]
  assert_raises(f"{message}; correct numClasses {advice}", data_dir)
  if number == "4":  # Classes with names need no examples.
    (path.parent / "label.labels.txt").write_text("a\nb\nc\nd\n")
    assert load(data_dir).num_classes == 4


def test_wrong_number_of_class_names_raises(data_dir):
  (data_dir / "tiny" / "1.0.0" / "label.labels.txt").write_text("a\nb\n")
  message = "features.json lists 3 classes of label, but label.labels.txt .* names of 2"
  assert_raises(message, data_dir)


@pytest.mark.parametrize("number", ["11", "13"])
def test_wrong_number_of_examples_raises(data_dir, number):
  change(data_dir / "tiny" / "1.0.0" / "dataset_info.json", '"12"', f'"{number}"')
  message = f"dataset_info.json lists {number} examples of train in .* has 12"
  assert_raises(message, data_dir)
  assert_raises(message, data_dir, "tiny", "train[:5]")
  assert len(load(data_dir, split="test").labels) == 5


def test_records_outside_of_the_folder_raise(data_dir):
  path = data_dir / "tiny" / "1.0.0" / "dataset_info.json"
  change(path, "{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}")
  assert_raises("filepathTemplate .* may lead out of its folder", data_dir)


def test_unknown_split(data_dir):
  message = r"no split 'val'; it has train, test and slices"
  assert_raises(message, data_dir, "tiny", "val")
  assert_raises(r"no split 'train\[x\]'", data_dir, "tiny", "train[x]")


def test_damaged_records(data_dir):
  (file,) = (data_dir / "tiny" / "1.0.0").glob("*train.array_record*")
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  assert_raises("tiny.1.0.0 is damaged or incomplete", data_dir)
  file.unlink()
  assert_raises("tiny.1.0.0 is damaged or incomplete", data_dir)


def test_set_larger_than_memory_raises(data_dir, monkeypatch):
  def stack(*_):
    raise MemoryError

  monkeypatch.setattr(sources, "_stack", stack)
  assert_raises(
    "12 images of 'train' in .* do not fit in memory; take a slice", data_dir
  )


def test_unsupported_features_raise(data_dir, monkeypatch):
  assert_raises(r"one shape.*\(None, 5, 3\)", data_dir, "ragged")
  assert_raises(
    "not an image classification set.*has image, label", data_dir, "unlabeled"
  )
  # Whether a large set fits in memory is known only if all images have one shape.
  monkeypatch.setattr(sources, "_SMALL_FILES", 0)
  with pytest.raises(base.InputError, match=r"one shape.*\(None, 5, 3\)"):
    sources.load("ragged", "train", data_dir=data_dir, in_memory=None)


def test_other_file_format_raises(data_dir):
  info = data_dir / "tiny" / "1.0.0" / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  assert_raises("is stored as tfrecord; prepare it again", data_dir)


@pytest.mark.ci
def test_load_uses_no_tensorflow_and_no_network_and_prints_nothing(prepared, tmp_path):
  fake = tmp_path / "tensorflow"
  fake.mkdir()
  (fake / "__init__.py").write_text("raise AssertionError('tensorflow was imported')")
  program = textwrap.dedent("""
    import socket, sys
    def refuse(*_, **__):
      raise AssertionError("the network was used")
    socket.socket.connect = socket.getaddrinfo = refuse
    from l2rw_jax import base
    from l2rw_jax.data import sources
    print(len(sources.load("tiny", "train", data_dir=sys.argv[1]).labels))
    try:
      sources.load("mnist", "train", data_dir=sys.argv[1])
    except base.InputError:
      print("missing")
    print("tensorflow" in sys.modules)
  """)
  path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
  done = subprocess.run(
    [sys.executable, "-c", program, str(prepared)],
    env={**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.stdout.split() == [str(IMAGES), "missing", "False"], done.stderr
  assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.real_data
def test_real_mnist(tfds_dir: pathlib.Path, decoded: pathlib.Path):
  source = sources.load("mnist", "train", data_dir=tfds_dir, cache_dir=decoded)
  assert source.images.shape == (60_000, 28, 28, 1)
  assert source.num_classes == 10
  # The published class sizes and mean of the data set.
  np.testing.assert_array_equal(
    np.bincount(source.labels),
    [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
  )
  assert abs(source.images.mean() / 255 - 0.1307) < 1e-4


@pytest.mark.real_data
def test_real_cifar10_n(tfds_dir: pathlib.Path, tmp_path):
  if not (tfds_dir / "cifar10_n").is_dir():
    pytest.skip(f"no prepared cifar10_n in {tfds_dir}")
  source = sources.load(
    "cifar10_n", "train[:2000]", data_dir=tfds_dir, cache_dir=tmp_path
  )
  assert set(source.extra) == {
    "aggre_label",
    "random_label1",
    "random_label2",
    "random_label3",
    "worse_label",
  }
  # 40.208% and 9.010% of all 50,000 labels are wrong. The tolerances are four standard
  # deviations of the share in 2,000 labels.
  assert abs(np.mean(source.extra["worse_label"] != source.labels) - 0.402) < 0.044
  assert abs(np.mean(source.extra["aggre_label"] != source.labels) - 0.090) < 0.026
