"""Examples on the devices and on the host give the same runs."""

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
from l2rw_jax.methods import l2rw
from l2rw_jax.training import device_data
from l2rw_jax.training import devices
from l2rw_jax.training import sampling

_TUNED = baselines.fine_tuning(2)  # Uses training and meta examples.
_SETS = [
  {
    "image": 100 * run + np.arange(24, dtype=np.float32).reshape(12, 2),
    "index": np.arange(12, dtype=np.int32),
  }
  for run in range(2)
]


class _Rows:
  """A row source that is not an array."""

  def __init__(self, array):
    self._array = array
    self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

  def __len__(self):
    return len(self._array)

  def __getitem__(self, rows):
    assert isinstance(rows, slice) or np.ndim(rows) == 1
    return self._array[rows]


def _batches(store, rows):
  """The batches of each device, run and step, [D, R, K, b, ...]."""
  part = store.part(rows)
  take = jax.vmap(device_data.take, in_axes=(None, 0))  # over K
  return jax.jit(jax.vmap(jax.vmap(take)))(part.examples, part.rows)


@pytest.mark.parametrize("count", [1, 2])
def test_both_stores_return_the_requested_rows(count):
  chosen = devices.choose(count, 8)
  rows = np.random.default_rng(0).integers(12, size=(2, 3, 4))  # [R, K, B]
  spread = devices.shard(rows.astype(np.int32), chosen)
  expected = np.stack([s["image"][r] for s, r in zip(_SETS, rows, strict=True)])
  for store in (device_data.OnDevices(_SETS, chosen), device_data.OnHost(_SETS)):
    batches = _batches(store, spread)
    np.testing.assert_array_equal(devices.unshard(batches["index"]), rows)
    images = np.asarray(batches["image"])  # [D, R, K, b, 2]
    images = np.moveaxis(images, 0, 2).reshape(expected.shape)
    np.testing.assert_array_equal(images, expected)


class _Device:
  """A device with the attributes that `budget` uses."""

  def __init__(self, platform, memory):
    self.platform = platform
    self.memory_stats = lambda: memory


def _store_name(monkeypatch, sets, chosen, kind="auto"):
  monkeypatch.setattr(device_data, "OnDevices", lambda *_: "OnDevices")
  budget = device_data.budget(chosen)
  store = device_data.store(sets, chosen, budget, kind, reads_ahead=True)
  return store if isinstance(store, str) else type(store).__name__


@pytest.mark.parametrize(
  ("chosen", "expected"),
  [
    # Two sets of 24 floats and 12 integers: 288 bytes.
    ([_Device("gpu", {"bytes_limit": 4 * 288})], "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 287})], "Stream"),
    ([_Device("gpu", {"bytes_limit": 4 * 288})] * 8, "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 288 + 9, "bytes_in_use": 9})], "OnDevices"),
    ([_Device("gpu", {"bytes_limit": 4 * 288, "bytes_in_use": 9})], "Stream"),
    ([_Device("tpu", None)], "OnDevices"),
    ([_Device("cpu", {"bytes_limit": 1})], "OnDevices"),
  ],
)
def test_sets_of_a_quarter_of_the_memory_are_on_the_devices(
  monkeypatch, chosen, expected
):
  assert _store_name(monkeypatch, _SETS, chosen) == expected


def test_cpu_devices_share_one_memory(monkeypatch):
  monkeypatch.setattr(device_data, "_HOST_BYTES", 2 * 288)
  assert _store_name(monkeypatch, _SETS, [_Device("cpu", None)] * 2) == "OnDevices"
  assert _store_name(monkeypatch, _SETS, [_Device("cpu", None)] * 4) == "Stream"
  assert _store_name(monkeypatch, _SETS, [_Device("tpu", None)] * 4) == "OnDevices"


def test_jax_arrays_are_on_the_devices(monkeypatch):
  sets = [{name: jnp.asarray(x) for name, x in one.items()} for one in _SETS]
  assert _store_name(monkeypatch, sets, devices.choose(1, 8)) == "OnDevices"


@pytest.mark.parametrize(("extra", "expected"), [(0, "OnDevices"), (-1, "OnHost")])
def test_meta_set_uses_the_rest_of_the_budget(tmp_path, monkeypatch, extra, expected):
  stores, original = [], device_data.store
  split = toy_runs.make_splits()
  sizes = [
    sum(x.nbytes for x in examples_lib.as_batch(part).values())
    for part in (split.train, split.meta)
  ]

  def store(*args, **options):
    stores.append(original(*args, **options))
    return stores[-1]

  monkeypatch.setattr(device_data, "store", store)
  monkeypatch.setattr(device_data, "_HOST_BYTES", sum(sizes) + extra)
  toy_runs.train(tmp_path, _TUNED, [split], num_steps=2)
  assert [type(s).__name__ for s in stores] == ["OnDevices", expected]
  assert [s.num_bytes for s in stores] == [sizes[0], sizes[1] if not extra else 0]


def test_rows_of_all_devices_are_read_once():
  num_read = []

  class CountingRows(_Rows):
    def __getitem__(self, rows):
      num_read.append(len(rows))
      return super().__getitem__(rows)

  sets = [{"image": CountingRows(s["image"])} for s in _SETS]
  rows = np.random.default_rng(0).integers(12, size=(2, 3, 5)).astype(np.int32)
  chosen = devices.choose(4, 8)
  images = _batches(device_data.OnHost(sets), devices.repeat(rows, chosen))["image"]
  assert num_read == [3 * 5] * 2
  expected = np.stack([s["image"][r] for s, r in zip(_SETS, rows, strict=True)])
  for local_images in images:
    np.testing.assert_array_equal(local_images, expected)


def test_row_sources_are_streamed(monkeypatch):
  sets = [{**s, "image": _Rows(s["image"])} for s in _SETS]
  chosen = devices.choose(1, 8)
  for kind in ("auto", "stream"):
    assert _store_name(monkeypatch, sets, chosen, kind) == "Stream"
  with pytest.raises(base.InputError, match=r"--data=resident needs .* row source"):
    _store_name(monkeypatch, sets, chosen, "resident")


def test_the_place_of_the_data_can_be_chosen(monkeypatch):
  monkeypatch.setattr(device_data, "_HOST_BYTES", 1)
  chosen = devices.choose(1, 8)
  assert _store_name(monkeypatch, _SETS, chosen, "resident") == "OnDevices"
  monkeypatch.setattr(device_data, "_HOST_BYTES", 2**30)
  assert _store_name(monkeypatch, _SETS, chosen, "stream") == "Stream"


def _of_bytes(examples, make):
  """Examples with uint8 images, passed through `make`."""
  image = np.clip(examples.image + 3, 0, 6).astype(np.uint8)
  return examples._replace(image=make(image))


class _File(_Rows):
  """A row source like HDF5: no `ndim`, and rows only in strictly ascending order."""

  def __init__(self, array):
    super().__init__(array)
    del self.ndim

  def __getitem__(self, rows):
    if not isinstance(rows, slice) and np.any(np.diff(rows) <= 0):
      raise TypeError("Indexing elements must be in increasing order")
    return super().__getitem__(rows)


def _of_file(examples):
  """Examples in the least convenient form: images in a file, and a list of labels."""
  return examples._replace(
    image=_File(examples.image), label=examples.label.astype(float).tolist()
  )


@pytest.mark.ci
@pytest.mark.slow(unless=("eight_devices_and_bytes",))
@pytest.mark.parametrize(
  ("count", "on_devices", "on_host"),
  [
    (1, lambda examples: examples, _of_file),
    (8, lambda part: _of_bytes(part, np.asarray), lambda part: _of_bytes(part, _Rows)),
  ],
  ids=["one_device_and_a_file", "eight_devices_and_bytes"],
)
def test_runs_on_data_of_devices_and_host_have_the_same_files(
  tmp_path, monkeypatch, count, on_devices, on_host
):
  monkeypatch.setattr(workdir, "_commit", lambda: "unknown")
  settings = {"seeds": (0, 1), "num_devices": count, "steps_per_call": 1}
  settings |= {"log_every": 6, "eval_every": 6, "meta_batch_size": 5}
  for name, changed in (("devices", on_devices), ("host", on_host)):
    splits = [
      split._replace(
        train=changed(split.train), meta=changed(split.meta), test=changed(split.test)
      )
      for split in map(toy_runs.make_splits, (0, 1))
    ]
    toy_runs.train(tmp_path / name, _TUNED, splits, **settings)
  assert toy_runs.outcome(tmp_path / "devices") == toy_runs.outcome(tmp_path / "host")


@pytest.mark.slow
def test_uint8_images_train_like_floats_in_a_quarter_of_the_memory(tmp_path):
  runs, sizes = {}, {}
  splits = toy_runs.make_splits(num_train=200, num_meta=20, shape=(5, 5, 1))
  parts = ("train", "meta", "test")
  for dtype in (np.uint8, np.float32):
    changed_parts = {}
    for part in parts:
      examples = getattr(splits, part)
      pixels = np.clip(60 * examples.image + 128, 0, 255).astype(np.uint8)
      floats = np.divide(pixels, np.float32(255), dtype=np.float32)
      image = pixels if dtype == np.uint8 else floats
      changed_parts[part] = examples._replace(image=image)
    changed = splits._replace(**changed_parts)
    (runs[dtype],) = toy_runs.train(
      tmp_path / np.dtype(dtype).name, l2rw.l2rw(), [changed], meta_batch_size=5
    )
    data = device_data.DeviceData([changed], jax.devices()[:1], needs_meta=True)
    resident = data.load([sampling.Rows(np.zeros((1, 8), int), np.zeros((1, 5), int))])
    sizes[dtype] = [part.examples["image"].nbytes for part in resident]
  hashes = [run.metrics["params_sha256"] for run in runs.values()]
  assert hashes[0] == hashes[1]
  assert sizes == {np.uint8: [200 * 25, 20 * 25], np.float32: [800 * 25, 80 * 25]}


def test_labels_that_are_not_numbers_raise(tmp_path):
  splits = toy_runs.make_splits()
  words = splits.train._replace(label=splits.train.label.astype(str))
  with pytest.raises(
    base.InputError, match="label in train of seed 0 must be integers"
  ):
    toy_runs.train(tmp_path, _TUNED, [splits._replace(train=words)])


def test_only_row_numbers_are_sent(tmp_path, monkeypatch):
  loaded = []
  original = device_data.DeviceData.load

  def record(self, steps):
    loaded.append(original(self, steps))
    return loaded[-1]

  monkeypatch.setattr(device_data.DeviceData, "load", record)
  settings = {"num_steps": 6, "log_every": 6, "eval_every": 6}
  toy_runs.train(tmp_path, _TUNED, num_devices=2, steps_per_call=2, **settings)
  assert len(loaded) == 3
  for part in ("train", "meta"):
    first, *others = [getattr(b, part) for b in loaded]
    assert all(isinstance(x, jax.Array) for x in first.examples.values())
    assert all(other.examples is first.examples for other in others)
    assert first.rows.dtype == np.int32 and first.rows.shape[:3] == (2, 1, 2)


def test_finished_run_frees_the_devices(tmp_path, monkeypatch):
  stores, original = [], device_data.store

  def store(*args, **options):
    new_store = original(*args, **options)
    stores.append(weakref.ref(new_store))
    return new_store

  monkeypatch.setattr(device_data, "store", store)
  gc.collect()
  gc.disable()  # Reference cycles would now keep the stores alive.
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
def test_sample_that_is_not_a_list_of_rows_raises(tmp_path, rows, what):
  method = baselines.uniform()._replace(sample=lambda *_: rows)
  with pytest.raises(
    base.InputError, match=f"`sample` returned {what}; it must return"
  ):
    toy_runs.train(tmp_path, method)


@pytest.mark.parametrize("row", [-1, toy_runs.NUM_TRAIN])
def test_sample_with_a_row_out_of_range_raises(tmp_path, row):
  uniform = baselines.uniform()
  method = uniform._replace(sample=lambda *_: np.full(16, row))
  message = f"`sample` returned row {row} of 40 training examples; rows are 0 to 39"
  with pytest.raises(base.InputError, match=message):
    toy_runs.train(tmp_path, method)


@pytest.mark.parametrize("needs_meta", [True, False])
def test_meta_set_on_the_host_is_streamed(monkeypatch, needs_meta):
  split = toy_runs.make_splits(num_meta=5)
  examples = examples_lib.as_batch(split.train)
  room = sum(np.asarray(x).nbytes for x in examples.values())
  monkeypatch.setattr(device_data, "budget", lambda devices: room)
  data = device_data.DeviceData([split], jax.devices()[:1], needs_meta)
  assert data.is_streamed == needs_meta
