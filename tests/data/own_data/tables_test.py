"""Tables: the label column, and columns that are not features."""

import time

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data


def test_a_column_that_numbers_the_rows_is_left_out(tmp_path):
  rows = [f"{i + 1},{i * i % 7},{i // 10}" for i in range(30)]
  rows[4] = "5,2,"
  name = user_files.write_table(tmp_path / "t.csv", rows, ",a,label")
  data, train = own_data.read(name), own_data.read(name, "train")
  for part in (data, train):
    assert part.features.shape[1] == 1
    assert "The column 'column 0' numbers the rows and was left out." in part.notes
  assert data.columns["column 0"][:5] == ["1", "2", "3", "4", "6"]
  shuffled = own_data.read(
    user_files.write_table(tmp_path / "s.csv", [*rows, "30,1,2"], ",a,label")
  )
  assert shuffled.features.shape == (30, 2)  # One number occurs twice.
  other = own_data.read(name, like=shuffled.form)
  assert other.features.shape == (29, 2) and len(other.notes) == 1


def test_a_table_whose_only_column_numbers_the_rows_is_refused(tmp_path):
  name = user_files.write_table(
    tmp_path / "t.csv", [f"{i},{i % 2}" for i in range(30)], ",label"
  )
  reason = "no column to learn from. The column 'column 0' numbers the rows"
  with pytest.raises(base.InputError, match=reason):
    own_data.read(name)


def test_a_copy_of_the_labels_is_noted(tmp_path):
  rows = [f"{i * i},{10 * (i % 3)},{min(i % 3, 1)},{'abc'[i % 3]}" for i in range(30)]
  data = own_data.read(
    user_files.write_table(tmp_path / "t.csv", rows, "n,copy,half,label")
  )
  assert data.features.shape == (30, 3) and len(data.notes) == 2
  assert data.notes[1].startswith("The column 'copy' has one value for each label.")
  rows[3] = "9,10,0,a"
  assert (
    len(
      own_data.read(
        user_files.write_table(tmp_path / "t.csv", rows, "n,copy,half,label")
      ).notes
    )
    == 1
  )


def test_tables_with_many_columns_of_the_same_name(tmp_path):
  header = ["x"] * 20_000 + ["", "x.2", "label"]
  rows = ["1," * 20_002 + "a", "2," * 20_002 + "b"]
  started = time.process_time()
  data = own_data.read(
    user_files.write_table(tmp_path / "t.csv", rows, ",".join(header))
  )
  assert time.process_time() - started < 10  # Comparing all pairs takes minutes.
  assert list(data.columns)[-3:] == ["x.20000", "column 20000", "x.2.2"]


@pytest.mark.parametrize(
  ("header", "note"),
  [("5.1,3.5,setosa", "with '5.1'"), ("0,0,5", "with '0'"), ("0,1,label", None)],
)
def test_a_missing_header_is_noted(tmp_path, header, note):
  rows = [f"{i * i},{i % 3},{i % 2}" for i in range(12)]
  data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows, header))
  assert len(data.labels) == 12 and len(data.notes) == (1 if note is None else 2)
  if note is not None:
    assert f"The first row, {note}, was read as the names of" in data.notes[1]


def test_the_column_of_labels(tmp_path):
  rows = [f"{i},{i % 2},{i % 3}" for i in range(12)]
  name = user_files.write_table(tmp_path / "t.csv", rows, "n,class,kind")
  assert own_data.read(name).form.class_names == ("0", "1")
  named = own_data.read(name, label_column="kind")
  assert named.form.class_names == ("0", "1", "2") and "class" in named.columns
  again = own_data.read(f"{name}#kind")
  np.testing.assert_array_equal(again.labels, named.labels)
  with pytest.raises(base.InputError, match="no column 'none'; it has n, class, kind"):
    own_data.read(name, label_column="none")
  with pytest.raises(base.InputError, match="has 12 distinct labels in 12") as caught:
    own_data.read(name, label_column="n")
  assert str(caught.value).endswith(". The labels are the column 'n'")


def test_columns_that_share_a_name_do_not_get_the_name_of_another_column(tmp_path):
  rows = [f"{r},{r},{r},{r},{'ab'[r % 2]}" for r in range(4)]
  data = own_data.read(
    user_files.write_table(tmp_path / "t.csv", rows, "x,x.3,x,x,label")
  )
  assert list(data.columns) == ["x", "x.3", "x.2", "x.4"]
