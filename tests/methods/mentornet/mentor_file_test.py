"""Files of mentors: round trips, and one-line errors."""

import functools
import hashlib
import json

import jax
import numpy as np
import pytest

from l2rw_jax import base
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.methods.mentornet import network as mentornet_network


@functools.cache
def _mentor(compat="official_code", num_classes=None):
  network = mentornet_network.MentorNetwork(num_classes or 2, compat)
  values, labels = np.zeros(1, np.float32), np.zeros(1, int)
  shapes = jax.eval_shape(network.init, jax.random.key(1), values, values, labels, 0)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
  return mentornet_network.Mentor("pd", network, variables, num_classes)


@pytest.fixture
def path(tmp_path):
  mentor_file.save(tmp_path / "mentor.json", _mentor(), {"seed": 3})
  return tmp_path / "mentor.json"


@pytest.mark.parametrize("compat", mentornet_network.COMPAT)
@pytest.mark.parametrize("num_classes", [None, 10])
def test_mentor_is_restored_bit_for_bit(tmp_path, compat, num_classes):
  mentor = _mentor(compat, num_classes)
  mentor_file.save(tmp_path / "mentor.json", mentor, {"seed": 3})
  result = mentor_file.load(tmp_path / "mentor.json", num_classes=10)
  assert (result.curriculum, result.network) == ("pd", mentor.network)
  assert result.num_classes == num_classes
  before, after = (jax.tree_util.tree_flatten(m.variables) for m in (mentor, result))
  assert before[1] == after[1]
  for a, b in zip(before[0], after[0], strict=True):
    assert b.dtype == np.float32
    np.testing.assert_array_equal(a, b)
  assert mentor_file.read(tmp_path / "mentor.json")["facts"] == {"seed": 3}


def test_facts_may_have_integer_keys(tmp_path):
  # Integers are sorted differently from strings, and the checksum depends on the order.
  mentor_file.save(tmp_path / "mentor.json", _mentor(), {"a": {9: 1, 10: 2}})
  facts = mentor_file.read(tmp_path / "mentor.json")["facts"]
  assert facts == {"a": {"9": 1, "10": 2}}


def test_mentor_without_labels_is_accepted_for_any_number_of_classes(path):
  for num_classes in (2, 10, 100, None):
    mentor_file.load(path, num_classes=num_classes)


def _error_line(path, **settings):
  with pytest.raises(base.InputError) as error:
    mentor_file.load(path, **settings)
  (line,) = str(error.value).splitlines()
  assert "--mentor" in line and "experiments.mentornet_pretrain" in line
  return line


def test_another_number_of_classes_is_refused(tmp_path):
  mentor_file.save(tmp_path / "mentor.json", _mentor(num_classes=10), {})
  assert "labels of 10 classes, but the data have 100" in _error_line(
    tmp_path / "mentor.json", num_classes=100
  )


def test_missing_file_is_refused(tmp_path):
  assert "cannot read it (No such file" in _error_line(tmp_path / "mentor.json")
  assert "cannot read it (Is a directory" in _error_line(tmp_path)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version_is_refused(path, version):
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {"version": version}))
  line = _error_line(path)
  assert (
    f"has format version {version}, but this program reads version 1: fit another"
    in line
  )


@pytest.mark.parametrize("content", ["[]", "3", '{"kind": "cake"}', "{}"])
def test_another_kind_of_file_is_refused(path, content):
  path.write_text(content)
  assert "is not a mentor; name the mentor.json" in _error_line(path)


def test_binary_file_is_refused(path):
  path.write_bytes(b"\x89PNG\xff\xfe\x00")
  assert "is not a mentor" in _error_line(path)


def test_truncated_file_is_refused(path):
  text = path.read_text()
  for share in (0.0, 0.01, 0.5, 0.99):
    path.write_text(text[: int(share * len(text))])
    assert "is damaged" in _error_line(path)


def test_changed_number_is_refused(path):
  record = json.loads(path.read_text())
  record["variables"]["params/output_bias"][0] += 1e-6
  path.write_text(json.dumps(record))
  assert "is damaged (its checksum differs)" in _error_line(path)


def test_missing_folder_is_refused(tmp_path):
  with pytest.raises(base.InputError, match=r"cannot write .*No such file"):
    mentor_file.save(tmp_path / "none" / "mentor.json", _mentor(), {})


def _with_checksum(path, change):
  """Changes the file of a mentor and updates its checksum."""
  record = json.loads(path.read_text())
  del record["sha256"]
  change(record)
  text = json.dumps(record, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()
  path.write_text(json.dumps(record | {"sha256": digest}))


_BIAS = "params/output_bias"
_CRAFTED = {
  **{
    f"missing {name}": (lambda r, name=name: r.pop(name))
    for name in (
      *("curriculum", "compat", "num_labels", "num_classes", "facts", "variables"),
    )
  },
  "no such curriculum": lambda r: r.update(curriculum="easy"),
  "a list for a curriculum": lambda r: r.update(curriculum=[1]),
  "no such compat": lambda r: r.update(compat="keras"),
  "no labels": lambda r: r.update(num_labels=0),
  "many labels": lambda r: r.update(num_labels=10**12),
  "a fraction of a label": lambda r: r.update(num_labels=2.5),
  "more classes than labels": lambda r: r.update(num_classes=3),
  "a boolean for the classes": lambda r: r.update(num_classes=True),
  "facts in a list": lambda r: r.update(facts=[]),
  "variables in a list": lambda r: r.update(variables=[]),
  "an extra variable": lambda r: r["variables"].update(more=[1.0]),
  "a missing variable": lambda r: r["variables"].pop(_BIAS),
  "a wrong shape": lambda r: r["variables"].update({_BIAS: [1.0, 2.0]}),
  "a number": lambda r: r["variables"].update({_BIAS: 1.0}),
  "ragged": lambda r: r["variables"].update({_BIAS: [[1.0], 2.0]}),
  "text": lambda r: r["variables"].update({_BIAS: ["one"]}),
  "null": lambda r: r["variables"].update({_BIAS: [None]}),
  "an object": lambda r: r["variables"].update({_BIAS: {"a": 1}}),
  "NaN": lambda r: r["variables"].update({_BIAS: [float("nan")]}),
  "beyond float32": lambda r: r["variables"].update({_BIAS: [1e300]}),
  "beyond float64": lambda r: r["variables"].update({_BIAS: [10**400]}),
}


@pytest.mark.parametrize("name", _CRAFTED)
def test_invalid_fields_with_a_correct_checksum_are_refused(path, name):
  _with_checksum(path, _CRAFTED[name])
  assert "is damaged (" in _error_line(path)


def test_deep_json_is_refused(path):
  path.write_text("[" * 200_000)
  assert "is damaged" in _error_line(path)
