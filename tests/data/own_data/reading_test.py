"""Test sets, other data with the same form, and mistakes of every kind."""

import unicodedata

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import image_files
from l2rw_jax.data import noisy_labels
from l2rw_jax.data import own_data
from l2rw_jax.data import sources


@pytest.mark.parametrize(
  ("labels", "names"),
  [
    (["1", "1.0", "0", "0."], ("0", "1")),
    (["1.0", "0.0"], ("0", "1")),
    (["01", "1"], ("01", "1")),
    (["+1", "1", "-1.0"], ("-1", "1")),
    (["1.0", "1.5"], ("1.0", "1.5")),
    (["1", "a"], ("1", "a")),
  ],
)
def test_whole_numbers_are_the_same_label_with_and_without_a_point(
  tmp_path, labels, names
):
  rows = [f"{2 * i},{labels[i % len(labels)]}" for i in range(20)]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "a,label"))
  assert data.form.class_names == names
  strings = [labels[i % len(labels)] for i in range(20)]
  archive = user_files.write_archive(
    tmp_path / "a.npz", np.arange(20.0)[:, None], np.array(strings)
  )
  assert own_data.read(archive).form.class_names == names


def test_a_label_of_minus_one_is_a_class_and_noted(tmp_path):
  points = np.arange(12.0)[:, None]
  for labels, is_noted in (([-1, 0, 1, 1], True), ([-1, 1], False), ([0, 1], False)):
    name = user_files.write_archive(tmp_path / "a.npz", points, np.resize(labels, 12))
    data = own_data.read(name)
    assert data.form.class_names == tuple(map(str, sorted(set(labels))))
    message = "the label -1 (3 examples) is a class."
    assert [note.startswith(message) for note in data.notes] == [True] * is_noted


@pytest.mark.parametrize(
  ("labels", "others"), [(["1.0", "1.5", "2.0"], ["1.0", "2"]), (["1", "a"], ["1.0"])]
)
def test_labels_without_a_point_fit_those_of_other_data(tmp_path, labels, others):
  def table(name, labels):
    rows = [f"{2 * i},{labels[i % len(labels)]}" for i in range(20)]
    return user_files.write_table(tmp_path / name, rows, "a,label")

  train = own_data.read(table("train.csv", labels))
  assert train.form.class_names == tuple(labels)
  other = own_data.read(table("other.csv", others), like=train.form)
  expected = {"1": 0, "1.0": 0, "2": 2}
  assert other.labels.tolist() == [expected[others[i % len(others)]] for i in range(20)]


def test_labels_in_two_unicode_forms_are_one_class(tmp_path):
  forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
  points, labels = np.arange(12.0)[:, None], np.resize([*forms, "b"], 12)
  data = own_data.read(user_files.write_archive(tmp_path / "a.npz", points, labels))
  assert data.form.class_names == ("b", forms[0])
  # Folders of macOS have the second form, and most lists the first.
  for name in (forms[1], "b"):
    for i in range(2):
      user_files.save_image(tmp_path / "images" / name / f"{i}.png", 10 * i)
  lines = [f"{name}/{i}.png,{name}" for name in (forms[0], "b") for i in range(2)]
  listing = tmp_path / "labels.csv"
  listing.write_text("\n".join(lines), encoding="utf-8")
  for labels in (None, listing):
    data = own_data.read(f"images:{tmp_path / 'images'}", labels=labels)
    assert data.form.class_names == ("b", forms[0]) and not data.skipped
  trusted = user_files.write_archive(
    tmp_path / "t.npz", np.zeros((4, 4, 6), np.uint8), np.resize([*forms, "b"], 4)
  )
  assert own_data.read(trusted, like=data.form).labels.tolist() == [1, 1, 0, 1]


def test_classes_with_almost_the_same_name_are_noted(tmp_path):
  def notes(*names):
    rows = [f"{i * i},{names[i % len(names)]}" for i in range(12)]
    data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "a,label"))
    assert len(data.form.class_names) == len(names)
    return [note for note in data.notes if "almost the same name" in note]

  (note,) = notes("sea lion", "Sea_Lion", "seal")
  assert note.startswith("The classes 'Sea_Lion' and 'sea lion' have almost")
  assert len(notes("cat", "cat\u200b", "dog")) == 1
  assert not notes("-1", "1") and not notes("C", "C++", "C#") and not notes("x_1", "x1")


def test_a_label_that_counts_as_missing_is_named(tmp_path):
  rows = [f"{i},{('none', 'cat', 'dog')[i % 3]}" for i in range(12)]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "a,label"))
  assert dict(data.skipped)["row 0"] == "its label 'none' counts as missing"


def test_trusted_examples_take_the_form_of_the_others(tmp_path):
  rows = [f"{i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in range(12)]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows))
  trusted = user_files.write_table(tmp_path / "c.csv", ["5,a,z", "7,never,x"])
  few = own_data.read(trusted, like=data.form)
  assert few.labels.tolist() == [2, 0]
  np.testing.assert_allclose(few.features[0, 0], data.features[5, 0])
  np.testing.assert_array_equal(few.features[1, 1:], 0)  # A category never seen.
  with pytest.raises(base.InputError, match="the label 'w', which the other data do"):
    own_data.read(user_files.write_table(tmp_path / "d.csv", ["5,a,w"]), like=data.form)
  with pytest.raises(base.InputError, match="no column 'b', which the other data"):
    own_data.read(
      user_files.write_table(tmp_path / "e.csv", ["5,z"], "a,label"), like=data.form
    )


def test_data_of_another_kind_are_refused(tmp_path):
  table = user_files.write_table(
    tmp_path / "t.csv", [f"{i},b,{i % 2}" for i in range(12)]
  )
  archive = user_files.write_archive(tmp_path / "a.npz", np.arange(24.0).reshape(12, 2))
  forms = [own_data.read(name).form for name in (table, archive)]
  with pytest.raises(base.InputError, match=r"t.csv must be an array \[N, D\] like"):
    own_data.read(table, like=forms[1])
  with pytest.raises(base.InputError, match=r"a.npz must be a table with the columns"):
    own_data.read(archive, like=forms[0])


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
  (folder / "table.npz").write_text("a,label\n1,2\n")
  (folder / "latin.csv").write_bytes(b"a,label\n\xff,1\n")
  (folder / "one.csv").write_text("a\n1\n")
  (folder / "none.csv").write_text("a,label\n1,\n")
  (folder / "nul.csv").write_text("")
  (folder / "empty").mkdir()
  (folder / "broken" / "a").mkdir(parents=True)
  (folder / "broken" / "a" / "x.png").write_text("x")
  user_files.save_image(folder / "single" / "a" / "x.png", 1)
  user_files.save_image(folder / "single" / "a" / "y.png", 2)
  return {
    "images:none": "is not a folder of images",
    "images:empty": r"contains no images in class folders",
    "images:broken": "no image that can be read; 1 skipped, the first is a/x.png",
    "images:single": "has 1 label in 2 examples",
    "npz:none.npz": "none.npz cannot be read: No such file",
    "npz:bad.npz": "bad.npz is damaged or not a NumPy archive",
    "npz:table.npz": "table.npz is damaged or not a NumPy archive",
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


def test_mistakes_are_one_line_errors(tmp_path):
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


def test_no_test_set_from_three_examples_a_class(tmp_path):
  name = user_files.write_table(
    tmp_path / "t.csv", [f"{i},b,{i % 2}" for i in range(6)]
  )
  with pytest.raises(base.InputError, match="no class of 5 or more examples"):
    own_data.read(name, "test")


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


def test_a_class_without_a_readable_image_is_not_a_class_of_the_test_split(folder):
  for i in range(10):
    user_files.save_image(folder / "ant" / f"{i}.png", i)
    path = folder / "ant" / f"{i}.png"
    path.write_bytes(path.read_bytes()[:45])  # The header is intact.
  train = own_data.read(f"images:{folder}", "train")
  assert train.form.class_names == ("cat", "dog")
  test = own_data.read(f"images:{folder}", "test")
  assert test.form.class_names == ("cat", "dog")
  assert sorted(test.labels.tolist()) == [0, 0, 1, 1]
