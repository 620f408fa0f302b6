"""Floor 4: a named data set as arrays in memory, as its makers published it.

`digits` comes with scikit-learn. Every other name is an image classification
set that tensorflow-datasets has prepared in its `array_record` format; it is
read without TensorFlow and without a network.
"""

from collections.abc import Iterator
import contextlib
import difflib
import hashlib
import logging
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import cache

_BLOCK = 1000
_EXTRA = "extra."


class Source(NamedTuple):
  """One split of a data set, whole.

  Attributes:
    name: name of the data set, with its configuration if it has any.
    version: version of the data set.
    split: what was asked for, such as `train` or `train[:90%]`.
    images: uint8 [N, H, W, channels].
    labels: int32 [N]; the true labels, where the set has several.
    num_classes: C.
    extra: other class labels of the examples, int32 [N] each, by the name they
      have in the set (`worse_label` of cifar10_n).
  """

  name: str
  version: str
  split: str
  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  extra: dict[str, np.ndarray]


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> Source:
  """Reads one split of a data set into memory; never downloads.

  A set is decoded once and its arrays are kept in `cache_dir`, under a key that
  holds name, version, split and the set's own description files. Meant for sets
  that fit in memory.

  Args:
    name: `digits`, or a prepared set: `mnist`, `emnist/letters` (with a
      configuration), `mnist:3.0.1` (a version; else the newest there).
    split: `train`, `test`, ..., for prepared sets also slices: `train[:90%]`.
    data_dir: folder of prepared sets, default `$TFDS_DATA_DIR`, else
      `~/tensorflow_datasets`. Not used by `digits`.
    cache_dir: folder of decoded arrays, default `$XDG_CACHE_HOME/l2rw_jax`,
      else `~/.cache/l2rw_jax`. Not used by `digits`.

  Returns:
    The split.

  Raises:
    InputError: unknown name or split, data that are not there, or a set whose
      examples are not uint8 images of one shape with a class label.
  """
  if name == "digits":
    return _digits(split)
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = pathlib.Path(data_dir or default).expanduser()
  folder = _find(name, root)
  title = name.partition(":")[0]
  arrays = cache.cached_arrays(
    _cache_dir(cache_dir),
    f"{title}/{folder.name}/{split}/{_description(folder)}",
    lambda: _decode(folder, split),
  )
  return Source(
    title,
    folder.name,
    split,
    arrays["images"],
    arrays["labels"],
    int(arrays["num_classes"]),
    {k.removeprefix(_EXTRA): v for k, v in arrays.items() if k.startswith(_EXTRA)},
  )


def _digits(split: str) -> Source:
  """1,797 handwritten digits of 8 x 8 pixels, split once and for all.

  Test: 500 images, stratified by class; train: the other 1,297. Pixels 0 .. 16
  become round(255 p / 16), from which p = round(16 u / 255) comes back exactly;
  scaled to [0, 1] they differ from p / 16 by at most 0.5 / 255.
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
  return Source("digits", "1.0.0", split, images[..., None], labels, 10, {})


def _cache_dir(cache_dir: str | os.PathLike | None) -> pathlib.Path:
  if cache_dir is not None:
    return pathlib.Path(cache_dir).expanduser()
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(caches).expanduser() / "l2rw_jax"


def _find(name: str, root: pathlib.Path) -> pathlib.Path:
  """The folder of one version of a prepared set."""
  title, _, version = name.partition(":")
  # Looked up here, not by `tfds.builder`, which knows only the versions it could
  # make itself and may ask the network about them.
  found = {
    tuple(map(int, path.parent.name.split("."))): path.parent
    for path in (root / title).glob("*/dataset_info.json")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
  }
  if version:
    found = {k: path for k, path in found.items() if path.name == version}
  if found:
    return found[max(found)]
  configs = {p.parts[-3] for p in (root / title).glob("*/*/dataset_info.json")}
  if configs:
    raise base.InputError(
      f"{title} comes in configurations; ask for one of those in {root}: "
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
      + "known are digits, the names at https://www.tensorflow.org/datasets/catalog"
      f" and what lies prepared in the data folder, here {root}"
    )
  return (
    f"data set {name!r} is not there: looked for"
    f" {root / title / (version or '<version>') / 'dataset_info.json'}. Either point"
    " --data_dir= (or TFDS_DATA_DIR) at a prepared copy or, with a network and"
    ' tensorflow installed, run: python -c "import tensorflow_datasets as tfds;'
    f" tfds.builder({name!r}, data_dir={str(root)!r},"
    " file_format='array_record').download_and_prepare()\""
  )


def _description(folder: pathlib.Path) -> str:
  # Two copies of one version can differ: re-compressed images, a part of it.
  digest = hashlib.sha256()
  for file in ("dataset_info.json", "features.json"):
    path = folder / file
    digest.update(path.read_bytes() if path.exists() else b"")
  return digest.hexdigest()[:16]


def _decode(folder: pathlib.Path, split: str) -> cache.Arrays:
  with _quiet():
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    features = dict(builder.info.features.items())
    labels = [
      name
      for name, feature in sorted(features.items())
      if isinstance(feature, tfds.features.ClassLabel)
    ]
    _check_features(folder, features, labels)
    rows = _open(builder, split)
    try:
      arrays = _stack(rows, features["image"].shape, labels)
    except MemoryError:
      raise base.InputError(
        f"the {len(rows)} images of {split!r} in {folder} do not fit in memory; take a"
        " slice of the split, such as train[:10%]"
      ) from None
    # Damage shows as any error, by where it hits and by who decodes the images.
    except Exception as error:
      reason = f"{type(error).__name__}: {str(error).partition(';')[0]}"
      raise base.InputError(
        f"{folder} is damaged or incomplete; copy or prepare it again ({reason})"
      ) from error
  return {
    "images": arrays.pop("image"),
    "labels": arrays.pop("label"),
    "num_classes": np.array(features["label"].num_classes),
    **{_EXTRA + name: array for name, array in arrays.items()},
  }


def _stack(rows: Any, shape: tuple[int, ...], labels: list[str]) -> cache.Arrays:
  images = np.empty((len(rows), *shape), np.uint8)
  columns = {name: np.empty(len(rows), np.int32) for name in labels}
  for start in range(0, len(rows), _BLOCK):
    # Several times faster than row by row.
    block = rows.__getitems__(range(start, min(start + _BLOCK, len(rows))))
    stop = start + len(block)
    images[start:stop] = [row["image"] for row in block]
    for name, column in columns.items():
      column[start:stop] = [row[name] for row in block]
  return {"image": images, **columns}


def _check_features(
  folder: pathlib.Path, features: dict[str, Any], labels: list[str]
) -> None:
  image = features.get("image")
  if "label" not in labels or image is None:
    raise base.InputError(
      f"{folder} is no image classification set: it needs the fields image and"
      f" label (a class); it has {', '.join(sorted(features))}"
    )
  if None in image.shape or image.np_dtype != np.uint8:
    raise base.InputError(
      f"{folder} needs uint8 images of one shape to be held in memory; it has"
      f" {np.dtype(image.np_dtype)} images of shape {image.shape}"
    )


def _open(builder: Any, split: str) -> Any:
  try:
    return builder.as_data_source(split=split)
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
  """Silences hints of tensorflow_datasets that no user of ours can act on."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
