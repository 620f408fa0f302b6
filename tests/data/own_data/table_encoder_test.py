"""Tables as features: numbers, categories, and missing cells."""

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data


def test_numbers_that_are_infinite_in_float32_are_missing(tmp_path):
  labels = ["yes", "no"] * 6
  cells = [str(i) for i in range(12)]
  tables = []
  for cell in ("1e300", "NA"):
    cells[3] = cell
    rows = [f"{x},red,{label}" for x, label in zip(cells, labels, strict=True)]
    tables.append(own_data.read(user_files.write_table(tmp_path / f"{cell}.csv", rows)))
  assert np.isfinite(tables[0].features).all()
  np.testing.assert_array_equal(tables[0].features, tables[1].features)


def test_a_table_with_numbers_categories_and_missing_cells(tmp_path):
  rows = [
    f"{i if i != 3 else 'NA'},{'red' if i % 3 else ''},{'yes' if i % 2 else 'no'}"
    for i in range(12)
  ]
  data = own_data.read(
    user_files.write_table(tmp_path / "t.csv", [*rows, "1,red", "7,red,"])
  )
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


def test_numbers_with_a_decimal_comma_are_noted(tmp_path):
  rows = [f"{i},5;{i % 2}" for i in range(12)]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "a;label"))
  assert any("such as '0,5', which are not numbers" in note for note in data.notes)


def test_values_that_the_other_data_do_not_have_are_noted(tmp_path):
  def table(name, numbers, colors):
    rows = [
      f"{number},{colors[i % len(colors)]},{i % 2}" for i, number in enumerate(numbers)
    ]
    return user_files.write_table(tmp_path / name, rows)

  form = own_data.read(table("a.csv", range(0, 72, 3), ["red", "blue", ""])).form
  same = own_data.read(table("b.csv", ["7", "inf", "", "2"], ["blue"]), like=form)
  assert len(same.notes) == 1  # On the label column.
  other = own_data.read(table("c.csv", ["7", "1 kg", "2"], ["Red", "red"]), like=form)
  assert list(other.notes[1:]) == [
    "1 values of the column 'a', such as '1 kg', are not numbers and count as missing.",
    "2 of 3 values of the column 'b', such as 'Red', do not occur in the other data.",
  ]
  # All numbers would be replaced by the median of the column.
  commas = table("d.csv", ['"1,5"', '"2,5"', ""], ["red"])
  with pytest.raises(base.InputError, match="'1,5' in the column 'a', and no number"):
    own_data.read(commas, like=form)


def test_columns_without_information_are_noted(tmp_path):
  rows = [f"{2 * i},,7,text {i},{'x' if i else '?!'},{i % 2}" for i in range(70)]
  name = user_files.write_table(tmp_path / "t.csv", rows, "n,empty,same,text,x,y")
  data = own_data.read(name)
  # The column x is 'x' in all rows but one.
  assert data.features.shape == (70, 3)
  assert [note.split("'")[1] for note in data.notes] == ["y", "empty", "same", "text"]
  assert "an embedding" in data.notes[3]
  stray = [f"{'n/k' if i == 5 else i},{i % 2}" for i in range(40)]
  data = own_data.read(user_files.write_table(tmp_path / "s.csv", stray, "n,y"))
  assert "1 values of the column 'n', such as 'n/k'" in data.notes[1]
  assert data.features.shape == (40, 2)


def test_infinities_are_missing_numbers_and_other_texts_are_noted(tmp_path):
  texts = ["inf", "-Infinity", "+INF"]
  rows = [
    f"{texts[i] if i < 3 else i},{'<5' if i % 9 == 0 else i % 9},{i % 2}"
    for i in range(27)
  ]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "a,b,label"))
  # A number, a mask of its missing values, and nine categories.
  assert data.features.shape == (27, 11)
  assert data.features[:, 1].argsort(kind="stable")[-3:].tolist() == [0, 1, 2]
  (_, note) = data.notes
  assert note == (
    "3 of 27 values of the column 'b', such as '<5', are not numbers; it was read as 9"
    " categories."
  )
