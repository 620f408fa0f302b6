"""Where examples wait makes no difference but to how much is sent."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_runs

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.io import workdir
from l2rw_jax.methods import baselines
from l2rw_jax.training import device_data
from l2rw_jax.training import devices

pytestmark = pytest.mark.usefixtures("quick_compilation")

_TUNED = baselines.fine_tuning(2)  # Takes training and clean examples.
_SETS = [
  {
    "image": 100 * run + np.arange(24, dtype=np.float32).reshape(12, 2),
    "index": np.arange(12, dtype=np.int32),
  }
  for run in range(2)
]


class _Rows:
  """A source of rows that is no array."""

  def __init__(self, array):
    self._array = array
    self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    assert isinstance(rows, slice) or np.ndim(rows) == 1
    return self._array[rows]


def _taken(store, rows):
  """What each device, run and step is given, [D, R, K, b, ...]."""
  part = store.part(rows)
  take = jax.vmap(device_data.take, in_axes=(None, 0))  # over K
  return jax.jit(jax.vmap(jax.vmap(take)))(part.examples, part.rows)


@pytest.mark.parametrize("count", [1, 2])
def test_both_stores_give_the_rows_asked_for(count):
  chosen = devices.choose(count, 8)
  rows = np.random.default_rng(0).integers(12, size=(2, 3, 4))  # [R, K, B]
  spread = devices.shard(rows.astype(np.int32), chosen)
  expected = np.stack([s["image"][r] for s, r in zip(_SETS, rows, strict=True)])
  for store in (device_data.OnDevices(_SETS, chosen), device_data.OnHost(_SETS)):
    found = _taken(store, spread)
    np.testing.assert_array_equal(devices.unshard(found["index"]), rows)
    images = np.asarray(found["image"])  # [D, R, K, b, 2]
    images = np.moveaxis(images, 0, 2).reshape(expected.shape)
    np.testing.assert_array_equal(images, expected)


class _Device:
  """As much as is asked of one."""

  def __init__(self, platform, memory):
    self.platform = platform
    self.memory_stats = lambda: memory


def _kind(monkeypatch, sets, chosen):
  monkeypatch.setattr(device_data, "OnDevices", lambda *_: "OnDevices")
  store = device_data.store(sets, chosen, device_data.budget(chosen))
  return store if isinstance(store, str) else type(store).__name__


@pytest.mark.parametrize(
  ("chosen", "kind"),
  [
    # Two sets of 24 floats and 12 integers: 288 bytes.
    ([_Device("gpu", {"bytes_limit": 4 * 288})], "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 287})], "OnHost"),
    ([_Device("gpu", {"bytes_limit": 4 * 288})] * 8, "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 288 + 9, "bytes_in_use": 9})], "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 288, "bytes_in_use": 9})], "OnHost"),
    ([_Device("tpu", None)], "OnDevices"),
    ([_Device("cpu", {"bytes_limit": 1})], "OnDevices"),
  ],
)
def test_what_fits_a_quarter_of_the_memory_goes_to_the_devices(
  monkeypatch, chosen, kind
):
  assert _kind(monkeypatch, _SETS, chosen) == kind


def test_cpu_devices_share_one_memory(monkeypatch):
  monkeypatch.setattr(device_data, "_HOST_BYTES", 2 * 288)
  assert _kind(monkeypatch, _SETS, [_Device("cpu", None)] * 2) == "OnDevices"
  assert _kind(monkeypatch, _SETS, [_Device("cpu", None)] * 4) == "OnHost"
  assert _kind(monkeypatch, _SETS, [_Device("tpu", None)] * 4) == "OnDevices"


def test_arrays_of_jax_are_arrays(monkeypatch):
  sets = [{name: jnp.asarray(x) for name, x in one.items()} for one in _SETS]
  assert _kind(monkeypatch, sets, devices.choose(1, 8)) == "OnDevices"


@pytest.mark.parametrize(("more", "kept"), [(0, "OnDevices"), (-1, "OnHost")])
def test_the_clean_set_has_what_the_other_left(tmp_path, monkeypatch, more, kept):
  stores, original = [], device_data.store
  split = toy_runs.make_splits()
  sizes = [
    sum(x.nbytes for x in examples_lib.as_batch(part).values())
    for part in (split.train, split.meta)
  ]

  def store(*args):
    stores.append(original(*args))
    return stores[-1]

  monkeypatch.setattr(device_data, "store", store)
  monkeypatch.setattr(device_data, "_HOST_BYTES", sum(sizes) + more)
  toy_runs.train(tmp_path, _TUNED, [split], num_steps=1)
  assert [type(s).__name__ for s in stores] == ["OnDevices", kept]
  assert [s.num_bytes for s in stores] == [sizes[0], sizes[1] if not more else 0]


def test_what_all_devices_take_is_read_once():
  asked = []

  class Noting(_Rows):
    def __getitem__(self, rows):
      asked.append(len(rows))
      return super().__getitem__(rows)

  sets = [{"image": Noting(s["image"])} for s in _SETS]
  rows = np.random.default_rng(0).integers(12, size=(2, 3, 5)).astype(np.int32)
  chosen = devices.choose(4, 8)
  found = _taken(device_data.OnHost(sets), devices.repeat(rows, chosen))["image"]
  assert asked == [3 * 5] * 2
  expected = np.stack([s["image"][r] for s, r in zip(_SETS, rows, strict=True)])
  for own in found:
    np.testing.assert_array_equal(own, expected)


def test_what_is_no_array_stays_on_the_host(monkeypatch):
  sets = [{**s, "image": _Rows(s["image"])} for s in _SETS]
  assert _kind(monkeypatch, sets, devices.choose(1, 8)) == "OnHost"


@pytest.mark.parametrize("count", [1, 8])
def test_a_run_ends_in_the_same_bytes(tmp_path, monkeypatch, count):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  settings = {"seeds": (0, 1), "num_devices": count, "steps_per_call": 1}
  settings |= {"log_every": 6, "eval_every": 6, "meta_batch_size": 5}
  found = []
  for place in (np.asarray, _Rows):  # On the devices; on the host.
    splits = [_of_bytes(toy_runs.make_splits(seed), place) for seed in (0, 1)]
    toy_runs.train(tmp_path / place.__name__, _TUNED, splits, **settings)
    found.append(toy_runs.outcome(tmp_path / place.__name__))
  assert found[0] == found[1]


def _of_bytes(splits, make):
  """With `make` of images in bytes; only of bytes need a source be no array."""

  def convert(examples):
    image = np.clip(examples.image + 3, 0, 6).astype(np.uint8)
    return examples._replace(image=make(image))

  return splits._replace(train=convert(splits.train), meta=convert(splits.meta))


def test_row_numbers_alone_are_sent(tmp_path, monkeypatch):
  loaded = []
  original = device_data.DeviceData.load

  def note(self, steps):
    loaded.append(original(self, steps))
    return loaded[-1]

  monkeypatch.setattr(device_data.DeviceData, "load", note)
  toy_runs.train(tmp_path, _TUNED, num_devices=2, steps_per_call=2, log_every=4)
  assert len(loaded) > 2
  for part in ("train", "meta"):
    first, *others = [getattr(b, part) for b in loaded]
    assert all(isinstance(x, jax.Array) for x in first.examples.values())
    assert all(other.examples is first.examples for other in others)
    assert first.rows.dtype == np.int32 and first.rows.shape[:3] == (2, 1, 2)


def test_a_run_leaves_nothing_on_the_devices(tmp_path, monkeypatch):
  stores, original = [], device_data.store

  def store(*args):
    made = original(*args)
    stores.append(weakref.ref(made))
    return made

  monkeypatch.setattr(device_data, "store", store)
  gc.collect()
  gc.disable()  # What is left is freed at once, or not before it runs.
  try:
    toy_runs.train(tmp_path, _TUNED, num_steps=2)
    assert len(stores) == 2 and all(ref() is None for ref in stores)
  finally:
    gc.enable()


@pytest.mark.parametrize(
  ("rows", "what"),
  [
    (np.arange(toy_runs.NUM_TRAIN) % 2 == 0, r"bool \[40\]"),
    (np.arange(16.0), r"float64 \[16\]"),
    (np.arange(16).reshape(2, 8), r"int64 \[2, 8\]"),
  ],
)
def test_what_is_no_list_of_rows_is_refused(tmp_path, rows, what):
  method = baselines.uniform()._replace(sample=lambda *_: rows)
  with pytest.raises(
    base.InputError, match=f"`sample` returned {what}; it must return"
  ):
    toy_runs.train(tmp_path, method)


@pytest.mark.parametrize("row", [-1, toy_runs.NUM_TRAIN])
def test_a_row_that_is_not_there_is_refused(tmp_path, row):
  uniform = baselines.uniform()
  method = uniform._replace(sample=lambda *_: np.full(16, row))
  message = f"`sample` returned row {row} of 40 training examples; rows are 0 to 39"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path, method)


@pytest.mark.parametrize("needs_meta", [True, False])
def test_clean_examples_on_the_host_are_sent_step_by_step(monkeypatch, needs_meta):
  split = toy_runs.make_splits(num_meta=5)
  examples = examples_lib.as_batch(split.train)
  room = sum(np.asarray(x).nbytes for x in examples.values())
  monkeypatch.setattr(device_data, "budget", lambda devices: room)
  data = device_data.DeviceData([split], jax.devices()[:1], needs_meta)
  assert data.is_streamed == needs_meta


class _File(_Rows):
  """Floats as HDF5 gives them: no ndim, ascending rows only, each of them once."""

  def __init__(self, array):
    super().__init__(array)
    del self.ndim

  def __getitem__(self, rows):
    if not isinstance(rows, slice) and np.any(np.diff(rows) <= 0):
      raise TypeError("Indexing elements must be in increasing order")
    return super().__getitem__(rows)


def test_files_of_rows_and_lists_of_labels_train_alike(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  splits = toy_runs.make_splits()

  def changed(examples):
    return examples._replace(
      image=_File(examples.image), label=examples.label.astype(float).tolist()
    )

  parts = {name: changed(getattr(splits, name)) for name in ("train", "meta", "test")}
  settings = {"num_steps": 6, "steps_per_call": 1, "meta_batch_size": 5}
  settings |= {"log_every": 6, "eval_every": 6}
  for name, given in (("arrays", splits), ("files", splits._replace(**parts))):
    toy_runs.train(tmp_path / name, _TUNED, [given], **settings)
  assert toy_runs.outcome(tmp_path / "arrays") == toy_runs.outcome(tmp_path / "files")
  words = splits.train._replace(label=splits.train.label.astype(str))
  with pytest.raises(
    base.InputError, match="label in train of seed 0 must be integers"
  ):
    toy_runs.train(tmp_path / "words", _TUNED, [splits._replace(train=words)])
