"""Reads data sets by name, without changing the published examples and labels.

`digits` comes with scikit-learn. images:DIR, npz:FILE and csv:FILE are a user's data,
see `own_data`. Every other name is an image classification set that
tensorflow-datasets has prepared in its `array_record` format; it is read without
TensorFlow and without an internet connection.
"""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import cache
from l2rw_jax.data import own_data
from l2rw_jax.data import row_sources

_log = logging.getLogger(__name__)

_BLOCK = 1000
# If the files of a set take at most this many bytes, its images are read into memory
# without a check.
_SMALL_FILES = 2**28
_EXTRA = "extra."
_INFO = "dataset_info.json"
_FEATURES = "features.json"
# The classes that may be named in features.json. tensorflow-datasets imports any module
# that is named there, so all other names are refused.
_FEATURE_CLASSES = frozenset(
  f"tensorflow_datasets.core.features.{name}"
  for name in (
    "bounding_boxes.BBoxFeature",
    "class_label_feature.ClassLabel",
    "feature.Tensor",
    "features_dict.FeaturesDict",
    "image_feature.Image",
    "labeled_image.LabeledImage",
    "scalar.Scalar",
    "sequence_feature.Sequence",
    "tensor_feature.Tensor",
    "text_feature.Text",
  )
)
# Sets that were published without class names, and in which some classes do not occur.
_SPARSE = {("emnist", "letters")}


class Source(NamedTuple):
  """One split of a data set, or a part of a split.

  Attributes:
    name: name of the data set, with its configuration if it has any.
    version: version of the data set.
    split: the requested split, such as `train` or `train[:90%]`.
    images: uint8 [N, H, W, channels]; for a user's data also float32 [N, ...]. This
      is a row source if the images were not read into memory.
    labels: int32 [N]; the true labels if the set has several labels.
    num_classes: C.
    extra: other class labels of the examples, int32 [N] each, by the name they
      have in the set (`worse_label` of cifar10_n).
    class_names: name or number of each class in the whole data set, so that the classes
      of two splits can be compared; None if it is unknown.
  """

  name: str
  version: str
  split: str
  images: Any
  labels: np.ndarray
  num_classes: int
  extra: dict[str, np.ndarray]
  class_names: tuple[str, ...] | None = None


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
  in_memory: bool | None = True,
) -> Source:
  """Reads one split of a data set, without downloading anything.

  A prepared set is decoded once and its arrays are cached in `cache_dir`, under a key
  that contains its name, version and split, and a hash of its description files. If a
  set is not read into memory, only its labels are cached, and images are decoded when
  they are used. The notes of `own_data.report` about a user's data (changes, skipped
  examples, duplicates) are logged as warnings.

  Args:
    name: `digits`; a user's data, `images:DIR`, `npz:FILE` or `csv:FILE`, see
      `own_data.read`; or a prepared set: `mnist`, `emnist/letters` (with a
      configuration), `mnist:3.0.1` (with a version; the default is the newest one in
      the folder).
    split: `train`, `test`, ...; for prepared sets also a slice, such as `train[:90%]`.
    data_dir: folder of prepared sets. The default is `$TFDS_DATA_DIR` if it is set, and
      `~/tensorflow_datasets` otherwise. Only prepared sets use it.
    cache_dir: folder of decoded arrays. The default is `$XDG_CACHE_HOME/l2rw_jax` if
      the variable is set, and `~/.cache/l2rw_jax` otherwise. Only prepared sets use it.
    in_memory: whether to read the images into memory; None reads prepared sets and
      image files into memory if the images and a copy of them take at most half of the
      memory, or if the files of the prepared set take at most 256 MiB. `digits`,
      archives and tables are always read into memory.

  Returns:
    The split.

  Raises:
    InputError: the name or the split is unknown; the name leads out of `data_dir`; the
      data do not exist, are damaged, are not in the `array_record` format or do not fit
      in memory; the examples are not uint8 images of one shape with a class label; the
      description files are damaged, name files in other folders or classes that are not
      features of an image classification set, or disagree with the examples; `digits`
      is requested without scikit-learn; or `own_data.read` refuses a user's data.
  """
  if name == "digits":
    return _digits(split)
  if own_data.is_own(name):
    data = own_data.read(name, split, in_memory=in_memory)
    for line in own_data.report(data):
      _log.warning("%s %s: %s", name, split, line)
    return from_own(name, split, data)
  _check_name(name)
  if not split.isprintable():
    raise base.InputError(f"the split {split!r} contains characters that no split has")
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = pathlib.Path(data_dir or default).expanduser()
  folder = _find(name, root)
  title = name.partition(":")[0]
  key = f"{title}/{folder.name}/{split}/{_description(folder)}"
  if in_memory is None:
    in_memory = _fits_in_memory(folder, split)
  if in_memory:
    arrays = cache.cached_arrays(
      cache.folder(cache_dir), key, lambda: _decode(folder, split)
    )
  else:
    arrays = _labels_and_images(folder, split, key, cache_dir)
  return Source(
    title,
    folder.name,
    split,
    arrays["images"],
    arrays["labels"],
    int(arrays["num_classes"]),
    {k.removeprefix(_EXTRA): v for k, v in arrays.items() if k.startswith(_EXTRA)},
    numbers(int(arrays["num_classes"])),
  )


def from_own(name: str, split: str, data: own_data.OwnData) -> Source:
  """A user's data as a `Source`.

  Args:
    name: name of the data, such as images:DIR.
    split: name of the split.
    data: the result of `own_data.read`.
  """
  class_names = data.form.class_names
  return Source(
    name,
    "own",
    split,
    data.features,
    data.labels,
    len(class_names),
    {},
    class_names,
  )


def class_of(source: Source, label: int) -> str:
  """The name of a class in messages, such as "class 3" or "class 'cat'"."""
  name = str(label) if source.class_names is None else source.class_names[label]
  return f"class {name}" if name == str(label) else f"class {name!r}"


def numbers(num_classes: int) -> tuple[str, ...]:
  """The names of classes that were published without names: 0 to C - 1."""
  return tuple(map(str, range(num_classes)))


def _digits(split: str) -> Source:
  """1,797 handwritten digits of 8 x 8 pixels, in fixed splits.

  The test set has 500 images, stratified by class, and the training set the other
  1,297. Pixels p = 0 .. 16 become u = round(255 p / 16), from which p can be recovered
  exactly as round(16 u / 255). When u is scaled to [0, 1], it differs from p / 16 by at
  most 0.5 / 255.
  """
  try:
    from sklearn import datasets
    from sklearn import model_selection
  except ImportError:
    raise base.InputError(
      "the digits data set comes with scikit-learn: pip install scikit-learn"
    ) from None
  bunch = datasets.load_digits()
  train, test = model_selection.train_test_split(
    np.arange(len(bunch.target)), test_size=500, stratify=bunch.target, random_state=0
  )
  rows = {"train": train, "test": test}
  if split not in rows:
    raise base.InputError(f"digits has the splits train and test; got {split!r}")
  images = np.round(bunch.images[rows[split]] * (255 / 16)).astype(np.uint8)
  labels = bunch.target[rows[split]].astype(np.int32)
  return Source(
    "digits", "1.0.0", split, images[..., None], labels, 10, {}, numbers(10)
  )


def check_folder_name(what: str, name: str) -> None:
  """Raises InputError unless `name` is the name of a file or folder, not a path.

  Args:
    what: description of the name in the message.
    name: the name; it must not lead out of its folder.
  """
  if name in ("", ".", "..") or re.search(r"[/\\:]", name) or not name.isprintable():
    raise base.InputError(
      f"{what} must be a plain name of printable characters without '/', '\\' and"
      f" ':', and not '.' or '..'; got {name!r}"
    )


def _check_name(name: str) -> None:
  title, colon, version = name.partition(":")
  for part in title.split("/"):
    check_folder_name(f"each part of the data set name {name!r}", part)
  if colon and not re.fullmatch(r"\d+\.\d+\.\d+", version, re.ASCII):
    raise base.InputError(
      f"the version in the data set name {name!r} must look like 3.0.1"
    )


def _find(name: str, root: pathlib.Path) -> pathlib.Path:
  """The folder of one version of a prepared set."""
  title, _, version = name.partition(":")
  # `tfds.builder` is not used here, because it supports only the versions that it could
  # prepare itself, and may access the network.
  versions = {
    tuple(map(int, path.parent.name.split("."))): path.parent
    for path in (root / title).glob("*/dataset_info.json")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name, re.ASCII)
  }
  if version:
    versions = {k: path for k, path in versions.items() if path.name == version}
  if versions:
    return versions[max(versions)]
  configs = {p.parts[-3] for p in (root / title).glob("*/*/dataset_info.json")}
  if configs:
    raise base.InputError(
      f"{title} has configurations; choose one of those in {root}: "
      + ", ".join(f"{title}/{config}" for config in sorted(configs))
    )
  raise base.InputError(_missing(name, root))


def _missing(name: str, root: pathlib.Path) -> str:
  with _quiet():
    import tensorflow_datasets as tfds

    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
  title, _, version = name.partition(":")
  if title.partition("/")[0] not in known:
    near = difflib.get_close_matches(title, known)
    return (
      f"unknown data set {title!r}; "
      + (f"did you mean {' or '.join(near)}? " if near else "")
      + "choose digits, a name at https://www.tensorflow.org/datasets/catalog or a"
      f" prepared set in the data folder {root}"
    )
  return (
    f"data set {name!r} does not exist: looked for"
    f" {root / title / (version or '<version>') / 'dataset_info.json'}. Either point"
    " --data_dir= (or TFDS_DATA_DIR) at a prepared copy or, with internet access and"
    ' tensorflow installed, run: python -c "import tensorflow_datasets as tfds;'
    f" tfds.builder({name!r}, data_dir={str(root)!r},"
    " file_format='array_record').download_and_prepare()\""
  )


def _description(folder: pathlib.Path) -> str:
  # Two copies of one version can differ, because images may be recompressed or missing.
  digest = hashlib.sha256()
  for file in (_INFO, _FEATURES):
    path = folder / file
    digest.update(path.read_bytes() if path.exists() else b"")
  return digest.hexdigest()[:16]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a description file, which must contain a non-empty JSON object."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise base.InputError(_damaged(path, reason)) from error
  if not isinstance(content, dict) or not content:
    raise base.InputError(_damaged(path, "it has no description"))
  return content


def _damaged(path: pathlib.Path, reason: str) -> str:
  return f"{path} is damaged or incomplete; copy or prepare it again ({reason})"


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
  """Yields all strings in JSON, and in JSON nested in strings, with their keys."""
  if isinstance(content, dict):
    for name, value in content.items():
      yield from _strings(value, name)
  elif isinstance(content, list):
    for value in content:
      yield from _strings(value, key)
  elif isinstance(content, str):
    yield key, content
    if content.lstrip()[:1] in ("{", "["):
      with contextlib.suppress(ValueError):
        yield from _strings(json.loads(content), key)


def _check_descriptions(folder: pathlib.Path) -> None:
  """Raises InputError if tensorflow-datasets cannot safely read the descriptions."""
  path = folder / _FEATURES
  try:
    names = [
      value
      for key, value in _strings(_read_json(path))
      if key in ("pythonClassName", "python_class_name", "type")
    ]
  except RecursionError as error:
    raise base.InputError(_damaged(path, "it is nested too deeply")) from error
  for name in names:
    if name not in _FEATURE_CLASSES:
      raise base.InputError(
        f"{path} names the class {name!r}, which is not a feature of an image"
        " classification set and is not imported; use a data set that you trust"
      )
  path = folder / _INFO
  info = _read_json(path)
  splits = info.get("splits")
  if not isinstance(splits, list) or not all(isinstance(x, dict) for x in splits):
    raise base.InputError(_damaged(path, "it lists no splits"))
  for part in (info, *splits):
    for key in ("name", "filepathTemplate", "filepath_template"):
      if not isinstance(part.get(key, ""), str):
        raise base.InputError(_damaged(path, f"{key} is not a string"))
      if re.search(r"[/\\]|\.\.", part.get(key, "")):
        raise base.InputError(
          f"{path} has the {key} {part[key]!r}, which may lead out of its folder; use a"
          " data set that you trust"
        )


def _builder(folder: pathlib.Path) -> Any:
  """The reader of tensorflow-datasets; the descriptions are checked first."""
  import tensorflow_datasets as tfds

  _check_descriptions(folder)
  steps = (
    (_FEATURES, tfds.features.FeatureConnector.from_config),
    (_INFO, tfds.builder_from_directory),
  )
  objects = []
  for file, make in steps:
    try:
      objects.append(make(folder))
    # A damaged file can raise any error.
    except Exception as error:
      reason = f"{type(error).__name__}: {error}".partition("\n")[0]
      raise base.InputError(_damaged(folder / file, reason)) from error
  features, builder = objects
  if not isinstance(features, tfds.features.FeaturesDict):
    raise base.InputError(
      _damaged(folder / _FEATURES, "it does not describe fields of examples")
    )
  return builder


def _fits_in_memory(folder: pathlib.Path, split: str) -> bool:
  """Whether the images of a split fit in memory; small files are not checked."""
  files = sum(path.stat().st_size for path in folder.glob("*.array_record*"))
  if files <= _SMALL_FILES:
    return True
  with _quiet():
    builder, features, _ = _opened(folder)
    shape = features["image"].shape
    return row_sources.fit_in_memory(len(_open(builder, split)), shape)


def _decode(folder: pathlib.Path, split: str) -> cache.Arrays:
  """Images and labels of a split, in memory."""
  with _quiet():
    builder, features, labels = _opened(folder)
    rows = _open(builder, split)
    with _readable(folder, split, len(rows)):
      _check_numbers(folder, builder, split)
      arrays = _stack(rows, {"image": features["image"].shape, **labels})
  return {"images": arrays.pop("image"), **_checked(folder, split, features, arrays)}


def _labels_and_images(
  folder: pathlib.Path, split: str, key: str, cache_dir: str | os.PathLike | None
) -> dict[str, Any]:
  """Like `_decode`, with images that are decoded when they are read."""
  with _quiet():
    import tensorflow_datasets as tfds

    builder, features, labels = _opened(folder)
    rows = _open(builder, split)
    with _readable(folder, split, len(rows)):
      rows[0]  # The first read of an image logs a message, which `_quiet` silences.

    def build():
      only_labels = _open(builder, split, {"image": tfds.decode.SkipDecoding()})
      with _readable(folder, split, len(rows)):
        _check_numbers(folder, builder, split)
        arrays = _stack(only_labels, labels)
      return _checked(folder, split, features, arrays)

    arrays = cache.cached_arrays(cache.folder(cache_dir), f"{key}/labels", build)
  files = sorted(folder.glob("*.array_record*"))
  fingerprint = functools.partial(_fingerprint, key, files, cache_dir)
  shape = features["image"].shape
  images = row_sources.StoredImages(rows, shape, fingerprint, folder)
  return {"images": images, **arrays}


def _fingerprint(
  key: str, files: Sequence[pathlib.Path], cache_dir: str | os.PathLike | None
) -> str:
  return f"{key}/{row_sources.hash_of_files(files, cache_dir)}"


def _opened(
  folder: pathlib.Path,
) -> tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]:
  """The builder of a set, its features, and the shape () of each label by name."""
  import tensorflow_datasets as tfds

  builder = _builder(folder)
  features = dict(builder.info.features.items())
  labels = [
    name
    for name, feature in sorted(features.items())
    if isinstance(feature, tfds.features.ClassLabel)
  ]
  _check_features(folder, features, labels)
  return builder, features, dict.fromkeys(labels, ())


@contextlib.contextmanager
def _readable(folder: pathlib.Path, split: str, size: int) -> Iterator[None]:
  """Converts errors of reading to an InputError."""
  try:
    yield
  except base.InputError:
    raise
  except MemoryError:
    raise base.InputError(
      f"the {size} images of {split!r} in {folder} do not fit in memory; take a"
      " slice of the split, such as train[:10%], or set --data=stream"
    ) from None
  # A damaged file can raise any error, even in the decoders of images.
  except Exception as error:
    reason = f"{type(error).__name__}: {str(error).partition(';')[0]}"
    raise base.InputError(_damaged(folder, reason.partition("\n")[0])) from error


def _checked(
  folder: pathlib.Path, split: str, features: dict[str, Any], arrays: cache.Arrays
) -> cache.Arrays:
  """Checks the labels, and returns them by the names that `load` reads."""
  for name, labels in arrays.items():
    _check_classes(folder, split, name, labels, features[name].num_classes)
  return {
    "labels": arrays.pop("label"),
    "num_classes": np.array(features["label"].num_classes),
    **{_EXTRA + name: array for name, array in arrays.items()},
  }


def _check_numbers(folder: pathlib.Path, builder: Any, split: str) -> None:
  """Raises InputError unless the files of a split have as many examples as listed."""
  from array_record.python import array_record_module

  requested = set(re.findall(r"[^\s+\[\]]+", split))
  for name, info in builder.info.splits.items():
    if name not in requested and "all" not in requested:
      continue
    for path, number in zip(info.filepaths, info.shard_lengths, strict=True):
      reader = array_record_module.ArrayRecordReader(str(path))
      num_records = reader.num_records()
      reader.close()
      if num_records != number:
        raise base.InputError(
          f"{folder / _INFO} lists {number} examples of {name} in"
          f" {pathlib.Path(path).name}, which has {num_records}; copy or prepare the"
          " set again"
        )


def _check_classes(
  folder: pathlib.Path,
  split: str,
  name: str,
  labels: np.ndarray,
  num_classes: int | None,
) -> None:
  """Raises InputError unless the number of classes is the largest label plus 1.

  A larger number is accepted if class names are stored, for splits other than `train`,
  for labels other than the true ones, and for the sets in `_SPARSE`.
  """
  number, num_used = num_classes or 0, int(labels.max(initial=-1)) + 1
  file = folder / f"{name}.labels.txt"
  names = None
  if file.exists():
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    names = sum(bool(line.strip()) for line in lines)
    if names != number:
      raise base.InputError(
        f"{folder / _FEATURES} lists {number} classes of {name}, but {file.name} has"
        f" the names of {names}; copy or prepare the set again"
      )
  is_sparse = (
    name != "label"
    or split != "train"
    or folder.parts[-3:-1] in _SPARSE
    or names is not None
  )
  if num_used > number or (num_used < number and not is_sparse):
    advice = f", or list the names of all classes in {file.name}"
    raise base.InputError(
      f"{folder / _FEATURES} lists {number} classes of {name}, but the largest label of"
      f" {split} is {num_used - 1}; correct numClasses there"
      + (advice if num_used < number else "")
    )


def _stack(rows: Any, shapes: dict[str, tuple[int, ...]]) -> cache.Arrays:
  """The columns of a set: uint8 images, and int32 labels, whose shape is ()."""
  arrays = {
    name: np.empty((len(rows), *shape), np.uint8 if shape else np.int32)
    for name, shape in shapes.items()
  }
  for start in range(0, len(rows), _BLOCK):
    # Reading blocks is several times faster than reading rows.
    block = rows.__getitems__(range(start, min(start + _BLOCK, len(rows))))
    for name, array in arrays.items():
      values = np.stack([row[name] for row in block])
      if values.shape[1:] != tuple(shapes[name]):
        raise ValueError(
          f"images of shape {values.shape[1:]} instead of {shapes[name]}"
        )
      array[start : start + len(block)] = values
  return arrays


def _check_features(
  folder: pathlib.Path, features: dict[str, Any], labels: list[str]
) -> None:
  image = features.get("image")
  if "label" not in labels or image is None:
    raise base.InputError(
      f"{folder} is not an image classification set: it needs the fields image and"
      f" label (a class); it has {', '.join(sorted(features))}"
    )
  if None in image.shape or image.np_dtype != np.uint8:
    raise base.InputError(
      f"{folder} must have uint8 images of one shape to fit in an array; it has"
      f" {np.dtype(image.np_dtype)} images of shape {image.shape}"
    )


def _open(builder: Any, split: str, decoders: Any = None) -> Any:
  try:
    return builder.as_data_source(split=split, decoders=decoders)
  except NotImplementedError:
    raise base.InputError(
      f"{builder.data_path} is stored as {builder.info.file_format.value}; prepare it"
      " again in another folder, with file_format='array_record'"
    ) from None
  except ValueError:
    raise base.InputError(
      f"{builder.data_path} has no split {split!r}; it has"
      f" {', '.join(builder.info.splits)} and slices of them, such as train[:90%]"
    ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences messages of tensorflow_datasets that do not help the user."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
