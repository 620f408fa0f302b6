"""The cache: built once, verified, never incomplete."""

import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from l2rw_jax.data import cache
from l2rw_jax.io import workdir

KEY = "mnist/3.0.1/train"


def arrays():
  return {
    "images": np.arange(3000, dtype=np.uint8).reshape(50, 60),
    "labels": np.arange(50, dtype=np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "num_classes": np.array(10),
  }


def assert_same(actual):
  expected = arrays()
  assert set(actual) == set(expected)
  for name, array in expected.items():
    assert actual[name].dtype == array.dtype
    np.testing.assert_array_equal(actual[name], array, strict=True)


class Builder:
  """Returns `arrays()` and counts its calls."""

  def __init__(self):
    self.calls = 0

  def __call__(self):
    self.calls += 1
    return arrays()


def only_file(folder):
  (file,) = folder.iterdir()
  return file


def stored_file(folder):
  """Caches `arrays()` in an empty folder and returns the path of the file."""
  cache.cached_arrays(folder, KEY, arrays)
  return only_file(folder)


def test_builds_once(tmp_path, caplog):
  build = Builder()
  assert_same(cache.cached_arrays(tmp_path / "a" / "b", KEY, build))
  assert_same(cache.cached_arrays(tmp_path / "a" / "b", KEY, build))
  assert build.calls == 1
  assert not caplog.records


def test_file_name_contains_the_key_and_numpy_reads_it(tmp_path):
  file = stored_file(tmp_path)
  assert file.name.startswith("mnist_3.0.1_train-")
  with np.load(file) as stored:
    np.testing.assert_array_equal(stored["labels"], arrays()["labels"])


def test_unusual_names_and_types_are_stored_and_bfloat16_is_refused(tmp_path, caplog):
  # `file` and `allow_pickle` are also names of arguments of `np.savez`.
  content = {
    "file": np.arange(3),
    "allow_pickle": np.array([b"x", b""]),
    "dates": np.array(["2020-01-01"], "datetime64[s]"),
  }
  cache.cached_arrays(tmp_path, KEY, lambda: content)
  stored = cache.cached_arrays(tmp_path, KEY, lambda: {})
  assert not caplog.records and stored.keys() == content.keys()
  for name, array in content.items():
    np.testing.assert_array_equal(stored[name], array, strict=True)
  with pytest.raises(ValueError, match="cannot cache x: bfloat16 is not a type of Num"):
    cache.cached_arrays(tmp_path, "b", lambda: {"x": jnp.zeros(2, jnp.bfloat16)})


def test_similar_keys_have_different_files(tmp_path):
  long = "x" * 100
  keys = ["a/b", "a_b", "a:b", long + "1", long + "2"]
  for number, key in enumerate(keys):
    cache.cached_arrays(tmp_path, key, lambda n=number: {"x": np.array([n])})
  for number, key in enumerate(keys):
    got = cache.cached_arrays(tmp_path, key, lambda: {"x": np.array([-1])})
    assert got["x"] == number


def assert_rebuilt_once(folder, caplog):
  build = Builder()
  assert_same(cache.cached_arrays(folder, KEY, build))
  assert build.calls == 1
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert "it is built again" in record.message
  assert_same(cache.cached_arrays(folder, KEY, build))
  assert build.calls == 1
  only_file(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file_is_rebuilt(tmp_path, caplog, share):
  file = stored_file(tmp_path)
  content = file.read_bytes()
  file.write_bytes(content[: int(share * len(content))])
  assert_rebuilt_once(tmp_path, caplog)


def test_flipped_bit_of_a_pixel_is_detected(tmp_path, caplog):
  file = stored_file(tmp_path)
  content = bytearray(file.read_bytes())
  content[content.index(bytes(range(100, 160)))] ^= 1
  file.write_bytes(content)
  assert_rebuilt_once(tmp_path, caplog)


def test_flipped_bits_never_change_the_arrays(tmp_path):
  file = stored_file(tmp_path)
  content = file.read_bytes()
  rebuilt = Builder()
  positions = range(0, len(content), 37)
  for position in positions:
    damaged = bytearray(content)
    damaged[position] ^= 1 << position % 8
    file.write_bytes(damaged)
    assert_same(cache.cached_arrays(tmp_path, KEY, rebuilt))
  # Some bits (time stamps of the archive) do not matter; most do.
  assert rebuilt.calls > 0.5 * len(positions)


def test_valid_archive_with_other_content_is_detected(tmp_path, caplog):
  file = stored_file(tmp_path)
  with np.load(file) as stored:
    content = {name: stored[name] for name in stored.files}
  content["labels"][7] += 1
  np.savez(file, **content)
  assert_rebuilt_once(tmp_path, caplog)


def test_file_of_another_key_is_detected(tmp_path, caplog):
  cache.cached_arrays(tmp_path / "other", "cifar10", lambda: {"x": np.zeros(3)})
  only_file(tmp_path / "other").replace(stored_file(tmp_path / "here"))
  assert_rebuilt_once(tmp_path / "here", caplog)


def test_folder_that_cannot_be_created_is_a_warning(tmp_path, caplog):
  (tmp_path / "file").write_text("in the way")
  build = Builder()
  assert_same(cache.cached_arrays(tmp_path / "file" / "cache", KEY, build))
  assert build.calls == 1
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert "cannot write the cache file" in record.message


def test_full_disk_is_a_warning_and_leaves_no_file(tmp_path, caplog, monkeypatch):
  def write(file, _):
    file.write(b"half a fi")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(workdir, "write_arrays", write)
  assert_same(cache.cached_arrays(tmp_path, KEY, arrays))
  (record,) = caplog.records
  assert "No space left on device" in record.message
  assert not list(tmp_path.iterdir())


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
  def fsync(_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(KeyboardInterrupt):
    cache.cached_arrays(tmp_path, KEY, arrays)
  assert not list(tmp_path.iterdir())


def test_error_of_build_is_raised_and_leaves_no_file(tmp_path):
  def build():
    raise LookupError("no such data")

  with pytest.raises(LookupError, match="no such data"):
    cache.cached_arrays(tmp_path, KEY, build)
  assert not list(tmp_path.iterdir())


def test_object_arrays_are_refused(tmp_path):
  with pytest.raises(ValueError, match="cannot cache x: NumPy would pickle"):
    cache.cached_arrays(tmp_path, KEY, lambda: {"x": np.array([{}, None])})
  assert not list(tmp_path.glob("*"))


@pytest.mark.slow
def test_two_processes_may_share_the_cache(tmp_path):
  program = textwrap.dedent("""
    import pathlib, sys
    import numpy as np
    from l2rw_jax.data import cache
    folder = pathlib.Path(sys.argv[1])
    def build():
      return {"x": np.arange(20_000), "y": np.ones(3)}
    for _ in range(60):
      for file in folder.glob("*.npz"):
        file.unlink(missing_ok=True)
      got = cache.cached_arrays(folder, "key", build)
      assert np.array_equal(got["x"], np.arange(20_000)), got["x"]
  """)
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(tmp_path)],
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "cache file" not in errors
  only_file(tmp_path)
