"""Omniglot, image folders, and transformations of classes."""

import numpy as np
from PIL import Image
import pytest

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import image_classes
from l2rw_jax.data import sources


def _source(num_classes=5, per_class=3):
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(num_classes), per_class).astype(np.int32)
  images = rng.integers(256, size=(len(labels), 4, 4, 1)).astype(np.uint8)
  return sources.Source("toy", "1", "train", images, labels, num_classes, {})


def _omniglot_split(labels, alphabet):
  """Black drawings on white; the number of inked rows depends on the label."""
  images = np.full((len(labels), 8, 8, 3), 255, np.uint8)
  for image, label in zip(images, labels, strict=True):
    image[: 2 * (label % 4)] = 0
  labels = np.asarray(labels, np.int32)
  return sources.Source(
    "omniglot", "3", alphabet, images, labels, 1623, {"alphabet": labels}
  )


def test_omniglot_uses_characters_of_both_splits_once(monkeypatch):
  splits = {
    "small1": _omniglot_split([1001, 1001, 7, 7], "small1"),
    "small2": _omniglot_split([7, 7, 402, 402], "small2"),
  }
  monkeypatch.setattr(sources, "load", lambda name, split, **_: splits[split])
  source = image_classes.omniglot(size=4)
  assert source.labels.tolist() == [2, 2, 0, 0, 1, 1] and source.num_classes == 3
  assert source.images.shape == (6, 4, 4, 1) and source.images.dtype == np.uint8
  # Bright ink on a dark background: one, three and two of four rows.
  ink = (source.images > 127).sum(axis=(1, 2, 3)) / 4
  assert ink.tolist() == [1, 1, 3, 3, 2, 2]


@pytest.mark.ci
@pytest.mark.real_data
def test_real_omniglot(tfds_dir, decoded):
  source = image_classes.omniglot(data_dir=tfds_dir, cache_dir=decoded)
  assert source.num_classes == 242 and source.images.shape == (4840, 28, 28, 1)
  np.testing.assert_array_equal(np.bincount(source.labels), 20)
  assert 0.05 < (source.images > 127).mean() < 0.2


def test_split_classes_are_disjoint():
  source = _source()
  parts = image_classes.split_classes(source, (2, 1, 2), seed=0)
  assert [p.num_classes for p in parts] == [2, 1, 2]
  images = np.concatenate([p.images for p in parts])
  assert len(np.unique(images.reshape(15, -1), axis=0)) == 15
  for part in parts:
    np.testing.assert_array_equal(np.bincount(part.labels), 3)
  names = [p.split for p in parts]
  assert len(set(names)) == 3 and names == [
    p.split for p in image_classes.split_classes(source, (2, 1, 2), seed=0)
  ]
  others = {
    image_classes.split_classes(source, (2, 1, 2), seed=s)[0].split for s in range(9)
  }
  assert len(others) > 1
  with pytest.raises(base.InputError, match=r"toy has 5 classes, fewer than 4 \+ 2"):
    image_classes.split_classes(source, (4, 2), seed=0)


def test_rotated_classes():
  source = _source(num_classes=2, per_class=1)
  rotated = image_classes.rotated(source)
  assert rotated.num_classes == 8 and sorted(rotated.labels) == list(range(8))
  np.testing.assert_array_equal(
    rotated.images[5, ..., 0], np.rot90(source.images[1, ..., 0], 2)
  )
  assert rotated.labels[5] == 1 + 2 * 2  # Class 1 of 2 after two rotations.


def test_images_that_cannot_be_rotated_or_resized_are_refused():
  source = _source(num_classes=2, per_class=1)
  wide = source._replace(images=np.zeros((2, 4, 6, 1), np.uint8))
  with pytest.raises(base.InputError, match="6 x 4 pixels; only square images can be"):
    image_classes.rotated(wide)
  two, four = (np.full((1, 4, 4, c), 9, np.uint8) for c in (2, 4))
  for images, channels in ((two, 3), (four[..., :3], 2)):
    with pytest.raises(base.InputError, match=r"cannot be resized to \(2, 2, "):
      image_classes.resized(images, 2, channels)
  assert image_classes.resized(four, 2, 3).tolist() == [[[[9] * 3] * 2] * 2]


def test_shuffled_classes_keep_their_sizes():
  source = _source(num_classes=4, per_class=20)
  shuffled = image_classes.shuffled(source, seed=0)
  np.testing.assert_array_equal(np.bincount(shuffled.labels), 20)
  # By chance, a quarter of the labels do not change.
  assert 0.1 < np.mean(shuffled.labels == source.labels) < 0.45
  assert shuffled.images is source.images and shuffled.name != source.name


def _checkerboard():
  """Pixels [4, 4] of 0 and 200."""
  return (np.indices((4, 4)).sum(axis=0) % 2 * 200).astype(np.uint8)


def test_resizing():
  gray = np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)
  assert image_classes.resized(gray, 4, 1) is gray
  np.testing.assert_array_equal(
    image_classes.resized(gray, 4, 3), np.repeat(gray, 3, -1)
  )
  red = np.zeros((1, 4, 4, 3), np.uint8)
  red[..., 0] = 200
  assert image_classes.resized(red, 2, 1).tolist() == [[[[60], [60]], [[60], [60]]]]
  # Fine patterns become gray, because pixels are averaged.
  small = image_classes.resized(_checkerboard()[None, ..., None], 2, 1)
  np.testing.assert_allclose(small, 100, atol=10)
  # A rectangle is squeezed: there are no margins, and nothing is cut off.
  stripes = np.repeat(np.array([0, 60, 120, 180], np.uint8), 3)
  rectangle = np.broadcast_to(stripes[:, None], (1, 4, 12, 1))
  squeezed = image_classes.resized(rectangle, 4, 1)
  expected = np.broadcast_to([0, 60, 120, 180], (4, 4))
  np.testing.assert_allclose(squeezed[0, ..., 0], expected, atol=20)


@pytest.fixture
def folder(tmp_path):
  for split, colors in (("train", ("red", "blue", "lime")), ("val", ("red",))):
    for color in colors:
      class_folder = tmp_path / "tiny" / split / color
      class_folder.mkdir(parents=True)
      for i in range(2):
        name = f"{i}.{('png', 'JPG')[i]}"
        Image.new("RGB", (6 + i, 5), color).save(class_folder / name)
      (class_folder / "notes.txt").write_text("not an image")
  return tmp_path / "tiny"


def test_image_folder(folder):
  source = image_classes.image_folder(folder, "train", size=4)
  assert source[:3] == ("tiny", "folder", "train") and source.num_classes == 3
  assert source.images.shape == (6, 4, 4, 3) and source.labels.tolist() == [
    0,
    0,
    1,
    1,
    2,
    2,
  ]
  strongest = source.images.mean(axis=(1, 2)).argmax(-1)
  assert strongest.tolist() == [2, 2, 1, 1, 0, 0]  # blue, lime, red
  Image.fromarray(_checkerboard()).save(folder / "val" / "red" / "0.png")
  small = image_classes.image_folder(folder, "val", size=2).images
  np.testing.assert_allclose(small[0], 100, atol=10)


def test_jfif_files_are_images(folder):
  (folder / "val" / "red" / "0.png").unlink()
  (folder / "val" / "red" / "1.JPG").rename(folder / "val" / "red" / "1.jfif")
  assert len(image_classes.image_folder(folder, "val", size=4).labels) == 1


def test_hidden_files_and_folders_are_left_out(folder):
  (folder / "train" / ".ipynb_checkpoints").mkdir()
  (folder / "train" / "red" / ".thumbnails").mkdir()
  for place in (".ipynb_checkpoints", "red/.thumbnails"):
    Image.new("RGB", (4, 4)).save(folder / "train" / place / "0.png")
  (folder / "train" / "._red.png").touch()
  (folder / "train" / "red" / "._0.png").touch()
  source = image_classes.image_folder(folder, "train", size=4)
  assert source.class_names == ("blue", "lime", "red") and len(source.labels) == 6


def test_unexpected_folders_raise(folder):
  def message(split):
    with pytest.raises(base.InputError) as caught:
      image_classes.image_folder(folder, split, size=4)
    return str(caught.value)

  assert "test has no class folders" in message("test")
  (folder / "val" / "empty").mkdir()
  assert "empty contains no image (.bmp, .jfif, .jpeg, .jpg, .png)" in message("val")
  (folder / "train" / "blue" / "0.png").write_bytes(b"broken")
  assert "0.png cannot be read as an image" in message("train")


def test_16_bit_pixels_are_scaled(tmp_path):
  ramp = np.array([[0, 257, 32768, 65535]], np.uint16)
  class_folder = tmp_path / "set" / "train" / "a"
  class_folder.mkdir(parents=True)
  Image.fromarray(np.repeat(ramp, 4, 0)).save(class_folder / "0.png")
  source = image_classes.image_folder(tmp_path / "set", "train", size=4)
  assert source.images[0, :, :, 0].tolist() == [[0, 1, 128, 255]] * 4


def test_an_image_that_cannot_be_read_is_an_error(folder):
  inner = folder / "train" / "red" / "more" / "still"
  inner.mkdir(parents=True)
  Image.new("RGB", (5, 5), "red").save(inner / "x.PNG")
  source = image_classes.image_folder(folder, "train", size=4)
  assert np.bincount(source.labels).tolist() == [2, 2, 3]
  assert source.class_names == ("blue", "lime", "red")

  def assert_raises(file, message, content=b""):
    file.write_bytes(content)
    with pytest.raises(base.InputError, match=message) as caught:
      image_classes.image_folder(folder, "train", size=4)
    assert file.name in str(caught.value) and "\n" not in str(caught.value)
    file.unlink()

  assert_raises(folder / "train" / "lost.png", "is not in a class folder")
  assert_raises(inner / "y.webp", "has a format that cannot be read")
  valid = (inner / "x.PNG").read_bytes()
  # Empty, cut off, and with a broken header.
  for content in (b"", valid[:40], valid[:46], valid.replace(b"IHDR", b"IHDX")):
    assert_raises(inner / "y.png", "cannot be read as an image", content)
  (inner / "y.png").symlink_to("nowhere")
  with pytest.raises(base.InputError, match=r"y.png cannot be read"):
    image_classes.image_folder(folder, "train", size=4)
  with pytest.raises(base.InputError, match="must be a plain name"):
    image_classes.image_folder(folder / "train", "../val", size=4)


def test_splits_with_different_classes_raise(folder):
  train = image_classes.image_folder(folder, "train", size=4)
  (folder / "val" / "black").mkdir()
  (folder / "val" / "lime").mkdir()
  for name in ("black", "lime"):
    Image.new("RGB", (5, 5), name).save(folder / "val" / name / "0.png")
  val = image_classes.image_folder(folder, "val", size=4)
  message = "class 0 is 'blue' in train of tiny and 'black' in val of tiny"
  with pytest.raises(base.InputError, match=message):
    examples_lib.check_sources(train, val)
  examples_lib.check_sources(train, val._replace(class_names=train.class_names))


def test_class_names_follow_their_classes():
  source = _source(num_classes=4)
  one, other = image_classes.split_classes(source, (2, 2), seed=0)
  assert sorted(one.class_names + other.class_names) == ["0", "1", "2", "3"]
  assert image_classes.rotated(one).class_names[:2] == one.class_names
  assert len(set(image_classes.rotated(one).class_names)) == 8
  assert image_classes.shuffled(one, 0).class_names is None
