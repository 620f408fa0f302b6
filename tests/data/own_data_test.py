"""Users' data: every layout, and everything that can be wrong with it."""

import csv
import os
import time

import numpy as np
from PIL import Image
import pytest

from l2rw_jax import base
from l2rw_jax.data import image_files
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import own_data
from l2rw_jax.data import sources


def _save(path, value, size=(6, 4), mode="L"):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
  """Two classes of ten gray images, each of a different shade."""
  for label, name in enumerate(("cat", "dog")):
    for i in range(10):
      _save(tmp_path / "set" / name / f"{i}.png", 20 * i + label)
  return tmp_path / "set"


def _table(path, rows, header="a,b,label"):
  path.write_text("\n".join([header, *rows]) + "\n")
  return f"csv:{path}"


# -- folders of images -------------------------------------------------------


def test_a_folder_of_classes(folder):
  data = own_data.read(f"images:{folder}")
  assert data.features.shape == (20, 4, 6, 1) and data.features.dtype == np.uint8
  assert data.form.class_names == ("cat", "dog")
  assert data.names[:2] == ("cat/0.png", "cat/1.png")
  np.testing.assert_array_equal(data.labels, np.repeat([0, 1], 10))
  np.testing.assert_array_equal(data.features[:, 0, 0, 0][:3], [0, 20, 40])
  assert data.skipped == () and data.notes == () and own_data.report(data) == []


def test_what_cannot_be_read_is_listed_and_skipped(folder):
  whole = (folder / "dog" / "1.png").read_bytes()
  (folder / "dog" / "cut.png").write_bytes(whole[:50])
  (folder / "dog" / "text.jpg").write_text("no image")
  (folder / "dog" / "empty.png").touch()
  (folder / "dog" / "notes.txt").write_text("x")
  (folder / ".hidden.png").write_text("x")
  _save(folder / "outside.png", 3)
  _save(folder / "dog" / "float.tif", 0.5, mode="F")
  _save(folder / "dog" / "int.tif", 65_536, mode="I")
  data = own_data.read(f"images:{folder}")
  reasons = dict(data.skipped)
  assert len(data.labels) == 20
  assert reasons.pop("outside.png") == "it is not in a folder of a class"
  assert reasons.pop("dog/notes.txt") == ".txt is not an image format"
  for name in ("dog/text.jpg", "dog/empty.png"):
    assert reasons.pop(name) == "it is not an image"
  assert "8 bits" in reasons.pop("dog/float.tif")
  assert reasons.pop("dog/int.tif").startswith("its pixels lie between 65536 and 65536")
  assert set(reasons) == {"dog/cut.png"}
  (line,) = own_data.report(data)
  assert line.startswith("7 skipped (") and line.endswith("; ...).")


def test_images_of_different_sizes_and_modes_are_converted_and_noted(folder):
  _save(folder / "cat" / "large.png", 7, size=(60, 40))
  _save(folder / "cat" / "color.png", (200, 0, 0), mode="RGB")
  _save(folder / "cat" / "clear.png", (9, 9, 9, 0), mode="RGBA")
  _save(folder / "cat" / "deep.png", 40_000, mode="I;16")
  data = own_data.read(f"images:{folder}")
  assert data.features.shape == (24, 4, 6, 3)
  pixels = {n: data.features[i, 0, 0] for i, n in enumerate(data.names)}
  np.testing.assert_array_equal(pixels["cat/color.png"], [200, 0, 0])
  np.testing.assert_array_equal(pixels["cat/clear.png"], [255, 255, 255])
  np.testing.assert_array_equal(pixels["cat/deep.png"], [156, 156, 156])  # 40,000 / 257
  assert data.notes == (
    "1 of 24 images (2 sizes) were resized to 6 x 4 pixels.",
    "22 of 24 images are gray; all were made RGB.",
  )
  small = own_data.read(f"images:{folder}", image_size=8)
  assert small.features.shape == (24, 8, 8, 3)


def test_large_images_are_shrunk(tmp_path):
  for name in ("a", "b"):
    for i in range(2):
      _save(tmp_path / name / f"{i}.png", i, size=(300, 150))
  data = own_data.read(f"images:{tmp_path}")
  assert data.features.shape == (4, 32, 64, 1)
  assert "4 of 4 images (300 x 150) were resized to 64 x 32" in data.notes[0]


def test_a_rotation_noted_by_the_camera_is_applied(tmp_path):
  for name in ("a", "b"):
    for i in range(2):
      image = Image.new("L", (6, 4), i)
      exif = image.getexif()
      exif[0x0112] = 6
      (tmp_path / name).mkdir(exist_ok=True)
      image.save(tmp_path / name / f"{i}.png", exif=exif)
  assert own_data.read(f"images:{tmp_path}").features.shape == (4, 6, 4, 1)


def test_duplicates_are_found(folder):
  (folder / "dog" / "copy.png").write_bytes((folder / "cat" / "3.png").read_bytes())
  data = own_data.read(f"images:{folder}")
  copy = data.names.index("dog/copy.png")
  assert data.names[data.duplicate_of[copy]] == "cat/3.png"
  assert (data.duplicate_of >= 0).sum() == 1
  assert own_data.report(data) == [
    "1 examples are exact duplicates of others, 1 of them with another label."
  ]


def test_both_zeros_are_equal():
  features = np.array([[0.0], [-0.0], [1.0]], np.float32)
  assert own_data.duplicates(features).tolist() == [-1, 0, -1]


def test_a_class_with_one_image(folder):
  _save(folder / "emu" / "only.png", 99)
  data = own_data.read(f"images:{folder}")
  assert np.bincount(data.labels).tolist() == [10, 10, 1]
  train, test = (own_data.read(f"images:{folder}", part) for part in ("train", "test"))
  assert np.bincount(train.labels).tolist() == [8, 8, 1]
  assert np.bincount(test.labels, minlength=3).tolist() == [2, 2, 0]
  assert train.form.class_names == test.form.class_names == ("cat", "dog", "emu")
  assert not set(train.names) & set(test.names)
  assert set(train.names) | set(test.names) == set(data.names)


def test_a_list_of_labels(folder, tmp_path):
  listing = tmp_path / "list.csv"
  listing.write_text(
    "label;path\ncat;cat/0.png\ncat;cat/1.png\ndog;dog/0.png\ndog;dog/1.png\n"
    "dog;cat/0.png\n;cat/2.png\ndog;../secret.png\ndog;none.png\n"
  )
  _save(tmp_path / "secret.png", 1)
  data = own_data.read(f"images:{folder}", labels=listing)
  assert data.names == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
  reasons = dict(data.skipped)
  assert "listed twice" in reasons["cat/0.png"]
  assert reasons["cat/2.png"] == "it has no label in list.csv"
  assert "no such file" in reasons["../secret.png"] and "none.png" in reasons
  assert reasons["dog/9.png"] == "it is not in list.csv"
  # labels.csv in the folder is used without being named; it needs no header.
  (folder / "labels.csv").write_text("cat/0.png,1\ncat/1.png,10\ndog/0.png,2\n")
  with pytest.raises(base.InputError, match="has 3 different labels in 3 examples"):
    own_data.read(f"images:{folder}")
  (folder / "labels.csv").write_text(
    "cat/0.png,2\ncat/1.png,10\ndog/0.png,2\ndog/1.png,10\n"
  )
  data = own_data.read(f"images:{folder}")
  assert data.form.class_names == ("2", "10")  # In numeric order.


def _listing(folder, header, cells):
  rows = [
    [f"{label}/{i}.png", *cells, label] for label in ("cat", "dog") for i in range(3)
  ]
  path = folder.parent / "list.csv"
  path.write_text("\n".join(",".join(row) for row in [header, *rows] if row) + "\n")
  return own_data.read(f"images:{folder}", labels=path)


@pytest.mark.parametrize(
  ("header", "cells", "note"),
  [
    (["filename", "category"], [], None),
    (["filename", "split", "label"], ["train"], "'label'"),
    (["filename", "split", "Class"], ["train"], "'Class'"),
    ([], [], None),
  ],
)
def test_the_columns_of_a_list(folder, header, cells, note):
  data = _listing(folder, header, cells)
  assert data.form.class_names == ("cat", "dog") and len(data.labels) == 6
  notes = [] if note is None else [f"The labels are the column {note} of list.csv."]
  assert list(data.notes) == notes


def test_a_list_whose_columns_are_not_known(folder):
  for header in (["filename", "split", "category"], ["name", "split", "label"]):
    with pytest.raises(base.InputError, match=r"has the columns .*, split, ") as caught:
      _listing(folder, header, ["train"])
    assert "that of the labels one of label, labels, class" in str(caught.value)
  # Without a header, the first row may have the name of a column as its label.
  path = folder.parent / "list.csv"
  path.write_text("".join(f"cat/{i}.png,{'yn'[i % 2]}\n" for i in range(6)))
  data = own_data.read(f"images:{folder}", labels=path)
  assert data.form.class_names == ("n", "y") and len(data.labels) == 6
  path.write_text("".join(f"cat/{i}.png,{'yn'[i % 2]},x\n" for i in range(6)))
  data = own_data.read(f"images:{folder}", labels=path)
  assert data.notes == ("The labels are the column number 2 of list.csv.",)


def test_links_out_of_the_folder_may_be_listed(folder, tmp_path):
  _save(tmp_path / "store" / "a.png", 250)
  (folder / "cat" / "linked.png").symlink_to(tmp_path / "store" / "a.png")
  listing = tmp_path / "list.csv"
  listing.write_text(
    f"path,label\ncat/linked.png,cat\n{folder}/cat/0.png,cat\n./dog/0.png,dog\n"
    "dog//1.png,dog\ndog\\2.png,dog\ndog/../cat/linked.png,dog\ncat/../../store/a.png,dog\n"
    f"{tmp_path}/store/a.png,dog\ncat\0,dog\n{'x' * 5000}.png,dog\n"
  )
  data = own_data.read(f"images:{folder}", labels=listing)
  names = ("cat/linked.png", "cat/0.png", "dog/0.png", "dog/1.png", "dog/2.png")
  assert data.names == names
  assert data.features[0].max() == 250
  reasons = dict(data.skipped)
  assert "listed twice" in reasons["dog/../cat/linked.png"]
  for name in ("cat/../../store/a.png", f"{tmp_path}/store/a.png", "cat\0"):
    assert "no such file" in reasons[name]


def test_linked_folders_are_classes_and_cycles_end(folder):
  (folder / "cat" / "up").symlink_to(folder)
  (folder / "pet").symlink_to(folder / "dog")
  data = own_data.read(f"images:{folder}")
  assert data.form.class_names == ("cat", "dog", "pet")
  assert np.bincount(data.labels).tolist() == [10, 10, 10]
  assert "10 examples are exact duplicates of others, 10 of" in own_data.report(data)[0]


def test_an_exported_list_has_the_files_and_classes_of_the_folder(tmp_path):
  names = [" lead", "trail ", "None", "NA ", "-x", "=1", "01", "1", "日本", 'a,"b"']
  for i, name in enumerate(names):
    for j in range(2):
      _save(tmp_path / "set" / name / f"{j} ü.PNG", 20 * i + j)
  data = own_data.read(f"images:{tmp_path / 'set'}")
  assert data.form.class_names == tuple(sorted(names))
  cells = [
    (own_data.csv_cell(name), own_data.csv_cell(data.form.class_names[label]))
    for name, label in zip(data.names, data.labels, strict=True)
  ]
  with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8-sig") as file:
    csv.writer(file).writerows([("path", "label"), *cells])
  again = own_data.read(f"images:{tmp_path / 'set'}", labels=tmp_path / "list.csv")
  assert again.names == data.names and again.skipped == ()
  for one, other in zip(data.labels, again.labels, strict=True):
    assert data.form.class_names[one].strip() == again.form.class_names[other]


@pytest.mark.parametrize("parts", [("train", "val"), ("Training", "Testing")])
def test_parts_are_not_classes(folder, tmp_path, parts):
  for part in parts:
    os.makedirs(tmp_path / "all" / part)
    (tmp_path / "all" / part / "cat").symlink_to(folder / "cat")
    (tmp_path / "all" / part / "dog").symlink_to(folder / "dog")
  with pytest.raises(base.InputError, match=rf"folders {', '.join(sorted(parts))}, wh"):
    own_data.read(f"images:{tmp_path / 'all'}")
  assert len(own_data.read(f"images:{tmp_path / 'all' / parts[0]}").labels) == 20
  (folder / "val").symlink_to(folder / "cat")  # One class may have such a name.
  assert "val" in own_data.read(f"images:{folder}").form.class_names


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
  original = os.scandir

  def scandir(path):
    if str(path).endswith("dog"):
      raise PermissionError(13, "Permission denied", str(path))
    return original(path)

  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(base.InputError, match="dog cannot be read: Permission denied"):
    own_data.read(f"images:{folder}")


def test_parts_of_a_folder(folder, tmp_path):
  (tmp_path / "both").mkdir()
  folder.rename(tmp_path / "both" / "train")
  _save(tmp_path / "both" / "test" / "dog" / "t.png", 5)
  name = f"images:{tmp_path / 'both'}"
  test = own_data.read(name, "test")
  assert test.names == ("dog/t.png",) and test.labels.tolist() == [1]
  whole = own_data.read(name)
  assert len(whole.labels) == 20 and "Only the images in" in whole.notes[0]
  # The paths of an exported list start in the same folder as those of the page.
  rows = [f"{path},{path.partition('/')[0]}" for path in whole.names]
  (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows[:-1]]))
  again = own_data.read(name, labels=tmp_path / "list.csv")
  assert again.names == whole.names[:-1] and again.notes == whole.notes
  assert dict(again.skipped) == {whole.names[-1]: "it is not in list.csv"}
  rows = [*(f"train/{row}" for row in rows), "test/dog/t.png,dog"]
  (tmp_path / "list.csv").write_text("\n".join(rows))
  again = own_data.read(name, labels=tmp_path / "list.csv")
  assert len(again.names) == 21 and again.names[-1] == "test/dog/t.png"


# -- archives ----------------------------------------------------------------


@pytest.mark.parametrize(
  "keys", [("X", "y"), ("images", "labels"), ("x_train", "y_train")]
)
def test_archives_of_images(tmp_path, keys):
  x = np.arange(10 * 12).reshape(10, 4, 3) % 256
  y = np.array(["b", "a"] * 5)
  np.savez(tmp_path / "a.npz", **dict(zip(keys, (x, y), strict=True)))
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  assert data.features.shape == (10, 4, 3, 1) and data.features.dtype == np.uint8
  assert data.form.class_names == ("a", "b") and data.labels[:2].tolist() == [1, 0]
  assert data.names[3] == "row 3"


def _archive(path, x, y=None, **more):
  np.savez(path, X=x, y=np.arange(len(x)) % 2 if y is None else y, **more)
  return f"npz:{path}"


_AS_THEY_ARE = (
  "The values, from {} to {}, are used as they are. Networks learn best from values"
  " between -1 and 1."
)


@pytest.mark.parametrize(
  ("stored", "expected", "note"),
  [
    (np.array([0.0, 7, 255]), np.array([0, 7, 255], np.uint8), None),
    (np.array([0, 7, 255]), np.array([0, 7, 255], np.uint8), None),
    (
      np.array([0, 7, 16]),
      np.array([0, 7, 16], np.uint8),
      "the largest is 16.",
    ),
    (np.array([0, 7.0, 16]), np.array([0, 7, 16], np.float32), None),
    (np.array([0, 1, 1]), np.array([0, 255, 255], np.uint8), None),
    (np.array([False, True, True]), np.array([0, 255, 255], np.uint8), None),
    (np.array([0.0, 1, 1]), np.array([0, 1, 1], np.float32), None),
    (np.array([-1, 0.5, 1]), np.array([-1, 0.5, 1], np.float32), None),
    (
      np.array([0, 257, 65535], np.uint16),
      np.array([0, 257, 65535], np.float32),
      _AS_THEY_ARE.format(0, 65535),
    ),
    (
      np.array([-5, 0.5, 300]),
      np.array([-5, 0.5, 300], np.float32),
      _AS_THEY_ARE.format(-5, 300),
    ),
  ],
)
def test_the_scale_of_pixels(tmp_path, stored, expected, note):
  images = np.tile(stored, (10, 4, 2))  # [10, 4, 6]
  data = own_data.read(_archive(tmp_path / "a.npz", images))
  assert data.features.dtype == expected.dtype
  np.testing.assert_array_equal(data.features[3, 1, :3, 0], expected)
  assert len(data.notes) == (note is not None)
  assert note is None or note in data.notes[0]


_LEVELS = np.random.default_rng(0).integers(0, 256, size=(20, 4, 6))
_STORED = {
  "bytes": _LEVELS.astype(np.uint8),
  "floats": _LEVELS.astype(float),
  "mask": _LEVELS > 127,
  "fractions": _LEVELS / 255,
  "standardized": (_LEVELS - 127) / 70,
  "16 bits": (257 * _LEVELS).astype(np.uint16),
  "99%": _LEVELS * 0.99,
}


@pytest.mark.parametrize(
  ("first", "others"),
  [
    # The kinds of pixels that are accepted after the first, and the factor that
    # converts them to its scale.
    ("bytes", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("floats", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("mask", {"bytes": 1, "floats": 1, "mask": 255, "fractions": 255}),
    ("fractions", {"mask": 1, "fractions": 1, "standardized": 1}),
    ("standardized", {"mask": 1, "fractions": 1, "standardized": 1}),
    ("16 bits", {"16 bits": 1}),
    ("99%", {"bytes": 1, "floats": 1, "99%": 1}),
  ],
)
def test_other_data_have_the_scale_of_the_first(tmp_path, first, others):
  names = {
    kind: _archive(tmp_path / f"{kind}.npz", stored) for kind, stored in _STORED.items()
  }
  like = own_data.read(names[first])
  for kind, name in names.items():
    if kind not in others:
      with pytest.raises(base.InputError, match="give both the same scale") as caught:
        own_data.read(name, like=like.form)
      assert "\n" not in str(caught.value)
      continue
    features = own_data.read(name, like=like.form).features
    assert features.dtype == like.features.dtype
    expected = _STORED[kind].astype(float) * others[kind]
    np.testing.assert_allclose(features[..., 0], expected, rtol=1e-6, atol=1e-6)


def test_test_images_and_files_have_the_scale_of_the_training_images(tmp_path, folder):
  more = {"X_test": _STORED["99%"], "y_test": np.arange(20) % 2}
  with pytest.raises(
    base.InputError, match=r"0 to 252\.45 as pixels, but the other data"
  ):
    own_data.read(_archive(tmp_path / "a.npz", _STORED["bytes"], **more), "test")
  more["X_test"] = _STORED["fractions"]
  name = _archive(tmp_path / "a.npz", _STORED["bytes"], **more)
  np.testing.assert_array_equal(own_data.read(name, "test").features[..., 0], _LEVELS)
  like = own_data.read(_archive(tmp_path / "b.npz", _STORED["fractions"])).form
  with pytest.raises(base.InputError, match="has image files, with pixels up to 255"):
    own_data.read(f"images:{folder}", like=like)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_skipped_images_do_not_change_the_scale(tmp_path):
  images = _LEVELS.astype(float)
  images[3, 0, :2] = np.nan, -9999
  images[5, 1, 1] = -np.finfo(np.float64).max  # Does not fit into float32.
  data = own_data.read(_archive(tmp_path / "a.npz", images))
  assert data.features.dtype == np.uint8
  assert [name for name, _ in data.skipped] == ["row 3", "row 5"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_labels_of_every_type(tmp_path):
  x, y = np.random.default_rng(0).normal(size=(10, 3)), np.arange(10) % 2
  for labels, class_names in (
    (y[:, None], ("0", "1")),
    (y[:, None].astype(float), ("0", "1")),
    (y > 0, ("0", "1")),
    (y.astype(np.float16), ("0", "1")),
    (np.array([b"\xe9", b"\xe8"])[y], (r"\xe8", r"\xe9")),  # Latin-1, not UTF-8.
  ):
    data = own_data.read(_archive(tmp_path / "a.npz", x, labels))
    assert data.form.class_names == class_names
    expected = 1 - y if class_names[0] == r"\xe8" else y
    np.testing.assert_array_equal(data.labels, expected)
  with pytest.raises(base.InputError, match=r"has the value 1e\+19; labels must be"):
    own_data.read(_archive(tmp_path / "a.npz", x, np.array([1e19, 2e19])[y]))


def test_other_arrays_of_an_archive_are_not_read(tmp_path):
  x, y = np.arange(24.0).reshape(12, 2), np.arange(12) % 2
  others = {
    "info": np.array([{}, None], object),
    "X_test": x,
    "y_test": y.astype(object),
  }
  np.savez(tmp_path / "a.npz", X=x, y=y, **others)
  for split in (None, "train"):
    assert own_data.read(f"npz:{tmp_path / 'a.npz'}", split).labels.tolist() == [*y]
  with pytest.raises(base.InputError, match="contains Python objects"):
    own_data.read(f"npz:{tmp_path / 'a.npz'}", "test")


def test_archives_with_missing_values(tmp_path):
  x = np.random.default_rng(0).normal(size=(10, 3, 5, 5))
  x[4, 0, 0, 0] = np.nan
  y = np.array([0, 1.0] * 5)
  y[7] = np.nan
  np.savez(tmp_path / "a.npz", X=x, y=y)
  data = own_data.read(f"npz:{tmp_path / 'a.npz'}")
  assert data.features.shape == (8, 5, 5, 3) and data.features.dtype == np.float32
  assert data.rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9]
  assert dict(data.skipped) == {
    "row 7": "it has no label",
    "row 4": "it has NaN or infinite values",
  }


def test_archives_of_rows_are_standardized_by_the_training_rows(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(5, 3, size=(100, 3))
  x[:10, 1] = np.nan
  np.savez(tmp_path / "a.npz", X=x, y=np.eye(2)[rng.integers(2, size=100)])
  train, test = (
    own_data.read(f"npz:{tmp_path / 'a.npz'}", p) for p in ("train", "test")
  )
  np.testing.assert_allclose(train.features.mean(axis=0), 0, atol=1e-5)
  assert train.features.shape[1] == 4  # Three columns, and a mask of missing values.
  rows = x[train.rows]
  expected = (x[test.rows][:, 0] - rows[:, 0].mean()) / rows[:, 0].std()
  np.testing.assert_allclose(test.features[:, 0], expected, rtol=1e-4, atol=1e-5)


# -- tables ------------------------------------------------------------------


def test_numbers_that_are_infinite_in_float32_are_missing(tmp_path):
  labels = ["yes", "no"] * 6
  cells = [str(i) for i in range(12)]
  tables = []
  for cell in ("1e300", "NA"):
    cells[3] = cell
    rows = [f"{x},red,{label}" for x, label in zip(cells, labels, strict=True)]
    tables.append(own_data.read(_table(tmp_path / f"{cell}.csv", rows)))
  assert np.isfinite(tables[0].features).all()
  np.testing.assert_array_equal(tables[0].features, tables[1].features)


def test_a_table_with_numbers_categories_and_missing_cells(tmp_path):
  rows = [
    f"{i if i != 3 else 'NA'},{'red' if i % 3 else ''},{'yes' if i % 2 else 'no'}"
    for i in range(12)
  ]
  data = own_data.read(_table(tmp_path / "t.csv", [*rows, "1,red", "7,red,"]))
  assert data.form.class_names == ("no", "yes")
  a = np.array([i for i in range(12) if i != 3])
  column = np.arange(12.0)
  column[3] = np.median(a)
  np.testing.assert_allclose(
    data.features[:, 0], (column - column.mean()) / column.std(), rtol=1e-5
  )
  missing = np.arange(12) == 3
  np.testing.assert_array_equal(data.features[:, 1] > 0, missing)
  blank = (np.arange(12) % 3 == 0).astype(np.float32)
  np.testing.assert_array_equal(data.features[:, 2:], np.stack([blank, 1 - blank], 1))
  assert dict(data.skipped) == {
    "row 12": "it has 2 fields, but the header has 3",
    "row 13": "it has no label",
  }
  assert data.columns["a"][:4] == ["0", "1", "2", "NA"]


@pytest.mark.parametrize(
  ("labels", "names"),
  [
    (["1", "1.0", "0", "0."], ("0", "1")),
    (["1.0", "0.0"], ("0", "1")),
    (["01", "1"], ("01", "1")),
    (["1.0", "1.5"], ("1.0", "1.5")),
    (["1", "a"], ("1", "a")),
  ],
)
def test_whole_numbers_are_the_same_label_with_and_without_a_point(
  tmp_path, labels, names
):
  rows = [f"{2 * i},{labels[i % len(labels)]}" for i in range(20)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "a,label"))
  assert data.form.class_names == names
  strings = [labels[i % len(labels)] for i in range(20)]
  archive = _archive(tmp_path / "a.npz", np.arange(20.0)[:, None], np.array(strings))
  assert own_data.read(archive).form.class_names == names


@pytest.mark.parametrize(
  ("labels", "others"), [(["1.0", "1.5", "2.0"], ["1.0", "2"]), (["1", "a"], ["1.0"])]
)
def test_labels_without_a_point_fit_those_of_other_data(tmp_path, labels, others):
  def table(name, labels):
    rows = [f"{2 * i},{labels[i % len(labels)]}" for i in range(20)]
    return _table(tmp_path / name, rows, "a,label")

  train = own_data.read(table("train.csv", labels))
  assert train.form.class_names == tuple(labels)
  other = own_data.read(table("other.csv", others), like=train.form)
  expected = {"1": 0, "1.0": 0, "2": 2}
  assert other.labels.tolist() == [expected[others[i % len(others)]] for i in range(20)]


def test_a_label_that_counts_as_missing_is_named(tmp_path):
  rows = [f"{i},{('none', 'cat', 'dog')[i % 3]}" for i in range(12)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "a,label"))
  assert dict(data.skipped)["row 0"] == "its label 'none' counts as missing"


def test_numbers_with_a_decimal_comma_are_noted(tmp_path):
  rows = [f"{i},5;{i % 2}" for i in range(12)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "a;label"))
  assert any("such as '0,5', which are not numbers" in note for note in data.notes)


def test_columns_without_information_are_noted(tmp_path):
  rows = [f"{2 * i},,7,text {i},{'x' if i else '?!'},{i % 2}" for i in range(70)]
  name = _table(tmp_path / "t.csv", rows, "n,empty,same,text,x,y")
  data = own_data.read(name)
  # The column x is 'x' in all rows but one.
  assert data.features.shape == (70, 3)
  assert [note.split("'")[1] for note in data.notes] == ["y", "empty", "same", "text"]
  stray = [f"{'n/k' if i == 5 else i},{i % 2}" for i in range(40)]
  data = own_data.read(_table(tmp_path / "s.csv", stray, "n,y"))
  assert "1 values of the column 'n', such as 'n/k'" in data.notes[1]
  assert data.features.shape == (40, 2)


def test_a_column_that_numbers_the_rows_is_left_out(tmp_path):
  rows = [f"{i + 1},{i * i % 7},{i // 10}" for i in range(30)]
  rows[4] = "5,2,"
  name = _table(tmp_path / "t.csv", rows, ",a,label")
  data, train = own_data.read(name), own_data.read(name, "train")
  for part in (data, train):
    assert part.features.shape[1] == 1
    assert "The column 'column 0' numbers the rows and was left out." in part.notes
  assert data.columns["column 0"][:5] == ["1", "2", "3", "4", "6"]
  shuffled = own_data.read(_table(tmp_path / "s.csv", [*rows, "30,1,2"], ",a,label"))
  assert shuffled.features.shape == (30, 2)  # One number occurs twice.
  other = own_data.read(name, like=shuffled.form)
  assert other.features.shape == (29, 2) and len(other.notes) == 1


def test_a_table_without_another_column_than_row_numbers_is_refused(tmp_path):
  name = _table(tmp_path / "t.csv", [f"{i},{i % 2}" for i in range(30)], ",label")
  reason = "no column to learn from. The column 'column 0' numbers the rows"
  with pytest.raises(base.InputError, match=reason):
    own_data.read(name)


def test_a_copy_of_the_labels_is_noted(tmp_path):
  rows = [f"{i * i},{10 * (i % 3)},{min(i % 3, 1)},{'abc'[i % 3]}" for i in range(30)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "n,copy,half,label"))
  assert data.features.shape == (30, 3) and len(data.notes) == 2
  assert data.notes[1].startswith("The column 'copy' has one value for each label.")
  rows[3] = "9,10,0,a"
  assert (
    len(own_data.read(_table(tmp_path / "t.csv", rows, "n,copy,half,label")).notes) == 1
  )


def test_tables_with_many_columns_of_one_name(tmp_path):
  header = ["x"] * 20_000 + ["", "x.2", "label"]
  rows = ["1," * 20_002 + "a", "2," * 20_002 + "b"]
  started = time.process_time()
  data = own_data.read(_table(tmp_path / "t.csv", rows, ",".join(header)))
  assert time.process_time() - started < 10  # Comparing all pairs takes minutes.
  assert list(data.columns)[-3:] == ["x.20000", "column 20000", "x.2.2"]


@pytest.mark.parametrize(
  ("header", "note"),
  [("5.1,3.5,setosa", "with '5.1'"), ("0,0,5", "with '0'"), ("0,1,label", None)],
)
def test_a_missing_header_is_noted(tmp_path, header, note):
  rows = [f"{i * i},{i % 3},{i % 2}" for i in range(12)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, header))
  assert len(data.labels) == 12 and len(data.notes) == (1 if note is None else 2)
  if note is not None:
    assert f"The first row, {note}, was read as the names of" in data.notes[1]


def test_a_blank_first_line_does_not_hide_the_delimiter(tmp_path):
  rows = [f"{i * i};{i % 2}" for i in range(12)]
  assert own_data.read(_table(tmp_path / "t.csv", rows, "\na;label")).rows[-1] == 11


def test_infinities_are_missing_numbers_and_other_texts_are_noted(tmp_path):
  texts = ["inf", "-Infinity", "+INF"]
  rows = [
    f"{texts[i] if i < 3 else i},{'<5' if i % 9 == 0 else i % 9},{i % 2}"
    for i in range(27)
  ]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "a,b,label"))
  # A number, a mask of its missing values, and nine categories.
  assert data.features.shape == (27, 11)
  assert data.features[:, 1].argsort(kind="stable")[-3:].tolist() == [0, 1, 2]
  (_, note) = data.notes
  assert note == (
    "3 of 27 values of the column 'b', such as '<5', are not numbers; it was read as 9"
    " categories."
  )


def test_the_column_of_labels(tmp_path):
  rows = [f"{i},{i % 2},{i % 3}" for i in range(12)]
  name = _table(tmp_path / "t.csv", rows, "n,class,kind")
  assert own_data.read(name).form.class_names == ("0", "1")
  named = own_data.read(name, label_column="kind")
  assert named.form.class_names == ("0", "1", "2") and "class" in named.columns
  again = own_data.read(f"{name}#kind")
  np.testing.assert_array_equal(again.labels, named.labels)
  with pytest.raises(base.InputError, match="no column 'none'; it has n, class, kind"):
    own_data.read(name, label_column="none")
  with pytest.raises(base.InputError, match="has 12 different labels in 12") as caught:
    own_data.read(name, label_column="n")
  assert str(caught.value).endswith(". The labels are the column 'n'")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_quotes_and_line_breaks(tmp_path, delimiter):
  texts = ['"x|y;z, w"', '"a ""quoted"" one"', '"two\nlines"', "one\u2028line"]
  rows = [delimiter.join((str(i), texts[i % 4], "pq"[i % 2])) for i in range(8)]
  data = own_data.read(
    _table(tmp_path / "t.csv", rows, delimiter.join(("n", "text", "label")))
  )
  assert data.columns["text"][:4] == [
    "x|y;z, w",
    'a "quoted" one',
    "two\nlines",
    "one\u2028line",
  ]
  assert data.skipped == () and data.form.class_names == ("p", "q")


def test_trusted_examples_take_the_form_of_the_others(tmp_path):
  rows = [f"{i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in range(12)]
  data = own_data.read(_table(tmp_path / "t.csv", rows))
  trusted = _table(tmp_path / "c.csv", ["5,a,z", "7,never,x"])
  few = own_data.read(trusted, like=data.form)
  assert few.labels.tolist() == [2, 0]
  np.testing.assert_allclose(few.features[0, 0], data.features[5, 0])
  np.testing.assert_array_equal(few.features[1, 1:], 0)  # A category never seen.
  with pytest.raises(base.InputError, match="the label 'w', which the other data do"):
    own_data.read(_table(tmp_path / "d.csv", ["5,a,w"]), like=data.form)
  with pytest.raises(base.InputError, match="no column 'b', which the other data"):
    own_data.read(_table(tmp_path / "e.csv", ["5,z"], "a,label"), like=data.form)


def test_data_of_another_kind_are_refused(tmp_path):
  table = _table(tmp_path / "t.csv", [f"{i},b,{i % 2}" for i in range(12)])
  archive = _archive(tmp_path / "a.npz", np.arange(24.0).reshape(12, 2))
  forms = [own_data.read(name).form for name in (table, archive)]
  with pytest.raises(base.InputError, match=r"t.csv must be an array \[N, D\] like"):
    own_data.read(table, like=forms[1])
  with pytest.raises(base.InputError, match=r"a.npz must be a table with the columns"):
    own_data.read(archive, like=forms[0])


def test_escaped_cells_are_read_back_unchanged(tmp_path):
  for text in ("=1+1", "+x", "-x", "@x", "\tx", "'=1", "''-x", "None", "'na", "?"):
    assert own_data.csv_cell(text) == f"'{text}"
  for text in ("", " ", "x=1", "-1", "+2.5e3", "'x", "'-1", "'", "nana"):
    assert own_data.csv_cell(text) == text
  for text in ("=b", "'=b", "''-b"):
    rows = [f"{i},{own_data.csv_cell(text)},'{i % 2}" for i in range(4)]
    data = own_data.read(_table(tmp_path / "t.csv", rows))
    assert data.form.class_names == ("'0", "'1")
    assert data.columns["b"] == [text] * 4


def test_corrected_labels(tmp_path):
  path = tmp_path / "corrected.csv"
  lines = ["index;label;given;decision", "7;'=b;a;relabel", "2;'None;None;", "10;01;1;"]
  path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
  rows, labels = own_data.corrected_labels(path)
  assert rows.tolist() == [2, 7, 10] and rows.dtype == np.int64
  assert labels.tolist() == ["None", "=b", "01"]
  for text, message in (
    ("path,label\na,b\n", "has the columns path, label; it must have index and label"),
    ("index,label\n1,a\n1,b\n", "has the line '1,b'; each line must have a different"),
    ("index,label\n1.5,a\n", "has the line '1.5,a'"),
    ("index,label\n1,\n", "has the line '1,'"),
    ("index,label\n1\n", "has the line '1'"),
    ("", "it must have index and label"),
  ):
    path.write_text(text)
    with pytest.raises(base.InputError, match=message):
      own_data.corrected_labels(path)


# -- mistakes ----------------------------------------------------------------


def _mistakes(folder):
  """Writes faulty data to a folder; returns the error message for each name of data."""
  np.save(folder / "one.npy", np.ones(3))
  objects = np.array([{}, None], object)
  np.savez(folder / "objects.npz", X=np.ones((2, 2)), y=objects)
  np.savez(folder / "keys.npz", a=np.ones(2))
  np.savez(folder / "lengths.npz", X=np.ones((4, 2)), y=np.ones(3))
  np.savez(folder / "values.npz", X=np.ones((4, 2)), y=np.array([0.5, 1, 2, 3]))
  np.savez(folder / "texts.npz", X=np.array([["a"]] * 4), y=np.ones(4))
  np.savez(folder / "no_pixels.npz", X=np.ones((4, 0, 5)), y=np.ones(4))
  (folder / "bad.npz").write_bytes(b"PK\x03\x04garbage")
  (folder / "latin.csv").write_bytes(b"a,label\n\xff,1\n")
  (folder / "one.csv").write_text("a\n1\n")
  (folder / "none.csv").write_text("a,label\n1,\n")
  (folder / "nul.csv").write_text("")
  (folder / "empty").mkdir()
  (folder / "broken" / "a").mkdir(parents=True)
  (folder / "broken" / "a" / "x.png").write_text("x")
  _save(folder / "single" / "a" / "x.png", 1)
  _save(folder / "single" / "a" / "y.png", 2)
  return {
    "images:none": "is not a folder of images",
    "images:empty": r"contains no images in class folders",
    "images:broken": "no image that can be read; 1 skipped, the first is a/x.png",
    "images:single": "has 1 different labels in 2 examples",
    "npz:none.npz": "none.npz cannot be read: No such file",
    "npz:bad.npz": "bad.npz is damaged or not a NumPy archive",
    "npz:one.npy": "contains a single array; save it as np.savez",
    "npz:objects.npz": "contains Python objects, which are not read",
    "npz:keys.npz": "must contain the arrays X and y, or images and labels; it con",
    "npz:lengths.npz": "has 4 examples in X but 3 labels in y",
    "npz:values.npz": "has the value 0.5; labels must be classes",
    "npz:texts.npz": "X in .*texts.npz must be numbers",
    "npz:no_pixels.npz": r"one or more axes of features; it is float64 of shape \[4, 0",
    "csv:none": "cannot be read: No such file",
    "csv:latin.csv": "is not encoded as UTF-8",
    "csv:one.csv": "must have a header and two or more columns",
    "csv:none.csv": "no example that can be used; 1 skipped, the first is row 0",
    "csv:nul.csv": "must have a header and two or more columns",
  }


def test_mistakes_are_errors_of_one_line(tmp_path):
  for name, message in _mistakes(tmp_path).items():
    kind, _, place = name.partition(":")
    with pytest.raises(base.InputError, match=message) as caught:
      own_data.read(f"{kind}:{tmp_path / place}")
    assert "\n" not in str(caught.value), name
  for name in ("zip:x", "images:", "images"):
    with pytest.raises(base.InputError, match="one of images:DIR, npz:FILE and csv"):
      own_data.read(name)
  with pytest.raises(base.InputError, match="has the parts train and test"):
    own_data.read("csv:x", "validation")


@pytest.mark.parametrize(
  ("kind", "argument", "message"),
  [
    (
      "csv",
      {"labels": "list.csv"},
      "labels='list.csv' is only for data of the kind im",
    ),
    ("csv", {"image_size": 8}, "image_size='8' is only for data of the kind images"),
    ("npz", {"label_column": "y"}, "label_column='y' is only for data of the kind csv"),
    ("images", {"image_size": 0}, "image_size=0 must be an integer of at least 1"),
    ("images", {"image_size": 2.5}, "image_size=2.5 must be an integer of at least 1"),
  ],
)
def test_arguments_of_another_kind_or_out_of_range_are_refused(kind, argument, message):
  with pytest.raises(base.InputError, match=message):
    own_data.read(f"{kind}:x", **argument)


def test_other_images_have_the_size_of_the_first(folder):
  like = own_data.read(f"images:{folder}", image_size=8).form
  for image_size in (None, 8):
    other = own_data.read(f"images:{folder}", like=like, image_size=image_size)
    assert other.features.shape == (20, 8, 8, 1)
  with pytest.raises(base.InputError, match="have images of 8 x 8 pixels; leave image"):
    own_data.read(f"images:{folder}", like=like, image_size=9)


def test_no_test_set_from_three_examples_a_class(tmp_path):
  name = _table(tmp_path / "t.csv", [f"{i},b,{i % 2}" for i in range(6)])
  with pytest.raises(base.InputError, match="no class of 5 or more examples"):
    own_data.read(name, "test")


# -- with the rest of the package --------------------------------------------


def test_own_data_are_a_source_with_a_trusted_meta_set(folder, caplog):
  (folder / "dog" / "text.png").write_text("no image")
  name = f"images:{folder}"
  train, test = (sources.load(name, part) for part in ("train", "test"))
  assert "1 skipped (dog/text.png" in caplog.text
  trusted = sources.from_own(name, "trusted", own_data.read(name))
  with_trusted = noisy_labels.noisy_labels(
    train,
    test,
    builder="uniform_flip",
    fraction=0.0,
    num_meta_per_class=0,
    seed=0,
    trusted=trusted,
  )
  sizes = [len(getattr(with_trusted, p).label) for p in ("train", "meta", "test")]
  # The file that cannot be read was assigned to the test part.
  assert sizes == [17, 20, 3] and with_trusted.train.image.dtype == np.uint8
  options = {"builder": "uniform_flip", "fraction": 0.0, "seed": 0}
  plain = noisy_labels.noisy_labels(train, test, num_meta_per_class=0, **options)
  # The class is called as in the user's folder.
  with pytest.raises(base.InputError, match="class 'cat' has 8 images in images:"):
    noisy_labels.noisy_labels(train, test, num_meta_per_class=9, **options)
  assert plain.fingerprint != with_trusted.fingerprint
  with pytest.raises(base.InputError, match="num_meta_per_class=1 must be 0 if"):
    noisy_labels.noisy_labels(
      train,
      test,
      builder="uniform_flip",
      fraction=0.0,
      num_meta_per_class=1,
      seed=0,
      trusted=trusted,
    )


def test_columns_with_one_name_do_not_get_the_name_of_another_column(tmp_path):
  rows = [f"{r},{r},{r},{r},{'ab'[r % 2]}" for r in range(4)]
  data = own_data.read(_table(tmp_path / "t.csv", rows, "x,x.3,x,x,label"))
  assert list(data.columns) == ["x", "x.3", "x.2", "x.4"]


def test_each_file_of_a_list_is_read_or_reported_once(tmp_path):
  for row in range(20):
    Image.new("L", (2, 2), row).save(tmp_path / f"{row}.png")
  # Half of the files have a label in the list. The others are reported, each with the
  # reason.
  lines = [f"{row}.png,{'ab'[row % 2]}" for row in range(10)]
  lines += [f"{row}.png," for row in range(10, 13)]
  (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
  data = own_data.read(f"images:{tmp_path}")
  assert sorted(data.names) == sorted(f"{row}.png" for row in range(10))
  reasons = dict(data.skipped)
  assert len(reasons) == len(data.skipped) == 10
  assert sum("no label" in reason for reason in reasons.values()) == 3


@pytest.mark.parametrize("in_memory", [True, None])
def test_a_test_split_reads_one_training_image_of_each_class(
  folder, monkeypatch, in_memory
):
  read = []
  read_image = image_files.read
  monkeypatch.setattr(
    image_files,
    "read",
    lambda path, *size: (read.append(path), read_image(path, *size))[1],
  )
  train = own_data.read(f"images:{folder}", "train", in_memory=in_memory)
  assert len(read) == 16
  test = own_data.read(f"images:{folder}", "test", in_memory=in_memory)
  assert len(read) == 16 + 2 + 4
  assert test.form[:2] == train.form[:2] and len(test.labels) == 4


def test_a_class_without_a_readable_image_is_no_class_of_the_test_split(folder):
  for i in range(10):
    _save(folder / "ant" / f"{i}.png", i)
    path = folder / "ant" / f"{i}.png"
    path.write_bytes(path.read_bytes()[:45])  # The header is intact.
  train = own_data.read(f"images:{folder}", "train")
  assert train.form.class_names == ("cat", "dog")
  test = own_data.read(f"images:{folder}", "test")
  assert test.form.class_names == ("cat", "dog")
  assert sorted(test.labels.tolist()) == [0, 0, 1, 1]
