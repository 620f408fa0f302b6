"""CSV files: delimiters, escaped cells, and lists of corrected labels."""

import numpy as np
import pytest
import user_files

from l2rw_jax import base
from l2rw_jax.data import own_data
from l2rw_jax.data.own_data import csv_files


def test_a_blank_first_line_does_not_hide_the_delimiter(tmp_path):
  rows = [f"{i * i};{i % 2}" for i in range(12)]
  assert (
    own_data.read(user_files.write_table(tmp_path / "t.csv", rows, "\na;label")).rows[
      -1
    ]
    == 11
  )


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_quotes_and_line_breaks(tmp_path, delimiter):
  texts = ['"x|y;z, w"', '"a ""quoted"" one"', '"two\nlines"', "one\u2028line"]
  rows = [delimiter.join((str(i), texts[i % 4], "pq"[i % 2])) for i in range(8)]
  data = own_data.read(
    user_files.write_table(
      tmp_path / "t.csv", rows, delimiter.join(("n", "text", "label"))
    )
  )
  assert data.columns["text"][:4] == [
    "x|y;z, w",
    'a "quoted" one',
    "two\nlines",
    "one\u2028line",
  ]
  assert data.skipped == () and data.form.class_names == ("p", "q")


def test_a_quotation_mark_that_swallows_rows_is_refused(tmp_path):
  path = tmp_path / "a.csv"
  lines = ["a,label", *(f"{i},x" for i in range(9))]
  cases = {  # Lines 4 and 8, and whether the file is read.
    ('1,"x', "2,x"): False,  # Never closed: all rows after it would be in one cell.
    ('1,"x', '2,"y"'): False,  # The next quotation mark would close it.
    ('"5" pipe",x', "2,x"): True,
    ('5" pipe,x', "2,x"): True,
    ('1,"a\nb"', "2,x"): True,
    ('1,"say ""x"""', "2,x"): True,
  }
  for (fourth, eighth), is_read in cases.items():
    changed = [*lines]
    changed[3], changed[7] = fourth, eighth
    path.write_text("\n".join(changed))
    if is_read:
      assert len(csv_files.read_rows(path)) == 10
    else:
      with pytest.raises(base.InputError, match="quotation mark in line 4"):
        csv_files.read_rows(path)


def test_escaped_cells_are_read_back_unchanged(tmp_path):
  for text in ("=1+1", "+x", "-x", "@x", "\tx", "'=1", "''-x", "None", "'na", "?"):
    assert own_data.csv_cell(text) == f"'{text}"
  for text in ("", " ", "x=1", "-1", "+2.5e3", "'x", "'-1", "'", "nana"):
    assert own_data.csv_cell(text) == text
  for text in ("=b", "'=b", "''-b"):
    rows = [f"{i},{own_data.csv_cell(text)},'{i % 2}" for i in range(4)]
    data = own_data.read(user_files.write_table(tmp_path / "t.csv", rows))
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
