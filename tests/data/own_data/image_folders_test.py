"""Folders of images: every layout, and files that cannot be read."""

import csv
import os

import numpy as np
from PIL import Image
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data


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
  user_files.save_image(folder / "outside.png", 3)
  user_files.save_image(folder / "dog" / "float.tif", 0.5, mode="F")
  user_files.save_image(folder / "dog" / "int.tif", 65_536, mode="I")
  data = own_data.read(f"images:{folder}")
  reasons = dict(data.skipped)
  assert len(data.labels) == 20
  assert reasons.pop("outside.png") == "it is not in a class folder"
  assert reasons.pop("dog/notes.txt") == ".txt is not an image format"
  for name in ("dog/text.jpg", "dog/empty.png"):
    assert reasons.pop(name) == "it is not an image"
  assert "8 bits" in reasons.pop("dog/float.tif")
  assert reasons.pop("dog/int.tif").startswith("its pixels lie between 65536 and 65536")
  assert set(reasons) == {"dog/cut.png"}
  (line,) = own_data.report(data)
  assert line.startswith("7 skipped (") and line.endswith("; ...).")


def test_images_of_different_sizes_and_modes_are_converted_and_noted(folder):
  user_files.save_image(folder / "cat" / "large.png", 7, size=(60, 40))
  user_files.save_image(folder / "cat" / "color.png", (200, 0, 0), mode="RGB")
  user_files.save_image(folder / "cat" / "clear.png", (9, 9, 9, 0), mode="RGBA")
  user_files.save_image(folder / "cat" / "deep.png", 40_000, mode="I;16")
  data = own_data.read(f"images:{folder}")
  assert data.features.shape == (24, 4, 6, 3)
  pixels = {n: data.features[i, 0, 0] for i, n in enumerate(data.names)}
  np.testing.assert_array_equal(pixels["cat/color.png"], [200, 0, 0])
  np.testing.assert_array_equal(pixels["cat/clear.png"], [255, 255, 255])
  np.testing.assert_array_equal(pixels["cat/deep.png"], [156, 156, 156])  # 40,000 / 257
  assert data.notes == (
    "images that were resized to 6 x 4 pixels: 1 of 24 (2 sizes).",
    "gray images: 22 of 24; all were converted to RGB.",
  )
  small = own_data.read(f"images:{folder}", image_size=8)
  assert small.features.shape == (24, 8, 8, 3)


@pytest.mark.parametrize(("largest", "is_noted"), [(4095, True), (16_383, False)])
def test_12_bit_images_in_16_bit_files_are_noted(folder, largest, is_noted):
  user_files.save_image(folder / "cat" / "black.png", 0, mode="I;16")
  user_files.save_image(folder / "cat" / "deep.png", largest, mode="I;16")
  notes = own_data.read(f"images:{folder}").notes
  message = (
    "2 images have more than 8 bits per pixel, and none of their pixels is above 16 of"
  )
  assert [note.startswith(message) for note in notes] == [True] * is_noted


def test_large_images_are_shrunk(tmp_path):
  for name in ("a", "b"):
    for i in range(2):
      user_files.save_image(tmp_path / name / f"{i}.png", i, size=(300, 150))
  data = own_data.read(f"images:{tmp_path}")
  assert data.features.shape == (4, 32, 64, 1)
  assert "resized to 64 x 32 pixels: 4 of 4 (300 x 150)" in data.notes[0]


def test_a_rotation_noted_by_the_camera_is_applied(tmp_path):
  for name in ("a", "b"):
    for i in range(2):
      image = Image.new("L", (6, 4), i)
      exif = image.getexif()
      exif[0x0112] = 6
      (tmp_path / name).mkdir(exist_ok=True)
      image.save(tmp_path / name / f"{i}.png", exif=exif)
  assert own_data.read(f"images:{tmp_path}").features.shape == (4, 6, 4, 1)


def test_a_class_with_one_image(folder):
  user_files.save_image(folder / "emu" / "only.png", 99)
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
  user_files.save_image(tmp_path / "secret.png", 1)
  data = own_data.read(f"images:{folder}", labels=listing)
  assert data.names == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
  reasons = dict(data.skipped)
  assert "listed twice" in reasons["cat/0.png"]
  assert reasons["cat/2.png"] == "it has no label in list.csv"
  assert "no such file" in reasons["../secret.png"] and "none.png" in reasons
  assert reasons["dog/9.png"] == "it is not in list.csv"
  # labels.csv in the folder is used without being named; it needs no header.
  (folder / "labels.csv").write_text("cat/0.png,1\ncat/1.png,10\ndog/0.png,2\n")
  with pytest.raises(base.InputError, match="has 3 distinct labels in 3 examples"):
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
    assert "the column of labels one of label, labels, class" in str(caught.value)
  # Without a header, the first row may have the name of a column as its label.
  path = folder.parent / "list.csv"
  path.write_text("".join(f"cat/{i}.png,{'yn'[i % 2]}\n" for i in range(6)))
  data = own_data.read(f"images:{folder}", labels=path)
  assert data.form.class_names == ("n", "y") and len(data.labels) == 6
  path.write_text("".join(f"cat/{i}.png,{'yn'[i % 2]},x\n" for i in range(6)))
  data = own_data.read(f"images:{folder}", labels=path)
  assert data.notes == ("The labels are the second column of list.csv.",)


def test_links_out_of_the_folder_may_be_listed(folder, tmp_path):
  user_files.save_image(tmp_path / "store" / "a.png", 250)
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
  assert "duplicates of other examples: 10 (10 with" in own_data.report(data)[0]


def test_an_exported_list_has_the_files_and_classes_of_the_folder(tmp_path):
  names = [" lead", "trail ", "None", "NA ", "-x", "=1", "01", "1", "日本", 'a,"b"']
  for i, name in enumerate(names):
    for j in range(2):
      user_files.save_image(tmp_path / "set" / name / f"{j} ü.PNG", 20 * i + j)
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
def test_train_and_test_folders_are_not_classes(folder, tmp_path, parts):
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


def test_a_folder_with_train_and_test_folders(folder, tmp_path):
  (tmp_path / "both").mkdir()
  folder.rename(tmp_path / "both" / "train")
  user_files.save_image(tmp_path / "both" / "test" / "dog" / "t.png", 5)
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


def test_other_images_have_the_size_of_the_first(folder):
  like = own_data.read(f"images:{folder}", image_size=8).form
  for image_size in (None, 8):
    other = own_data.read(f"images:{folder}", like=like, image_size=image_size)
    assert other.features.shape == (20, 8, 8, 1)
  with pytest.raises(base.InputError, match="have images of 8 x 8 pixels; leave image"):
    own_data.read(f"images:{folder}", like=like, image_size=9)


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
