"""Reads a user's data, and converts them to one format."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import os
import pathlib
import re
import unicodedata

import numpy as np

from l2rw_jax import base
from l2rw_jax.data.own_data import archives
from l2rw_jax.data.own_data import containers
from l2rw_jax.data.own_data import image_folders
from l2rw_jax.data.own_data import pixel_scale
from l2rw_jax.data.own_data import table_encoder
from l2rw_jax.data.own_data import tables

KINDS = ("images", "npz", "csv")
_FOLDS = 5  # One fifth of the examples of each class is held out.
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


def is_own(name: str) -> bool:
  """Whether the name of a data set refers to user data, such as images:DIR."""
  kind, colon, _ = name.partition(":")
  return bool(colon) and kind in KINDS


def read(
  name: str,
  split: str | None = None,
  *,
  labels: str | os.PathLike | None = None,
  label_column: str | None = None,
  image_size: int | None = None,
  like: containers.Form | None = None,
  in_memory: bool | None = True,
) -> containers.OwnData:
  """Reads a user's data.

  Args:
    name: images:DIR, npz:FILE, csv:FILE or csv:FILE#NAME with the label column NAME.
    split: "train" or "test". If the source has these splits (the folders DIR/train and
      DIR/test, the arrays X_test and y_test), they are used. Otherwise, a fixed fifth
      of the examples of each class, rounded down, is the test set. By default, all
      examples are returned, except for the source's test split.
    labels: for images, a CSV file of path,label. The paths are relative to DIR or, if
      there are folders DIR/train and DIR/test, to DIR or DIR/train; these folders are
      then not splits. The default is labels.csv in the folder that is read, if it
      exists: DIR or, if there are folders DIR/train and DIR/test, one of these.
      Otherwise, the folders are the classes.
    label_column: for a table, the label column. The default is a column called label,
      labels, class, target or y; if there is none, it is the last column.
    image_size: for image files, the height and width. The default is that of `like`
      or, without it, the most frequent size, shrunk if a side is longer than 64.
    like: the format that the examples must have. By default, the test set must have
      the format of the training set.
    in_memory: for image files, whether to read them into memory. If not, only their
      headers are read, so that a damaged file is not noticed until it is used. None
      reads the images into memory if they and a copy of them take at most half of the
      memory (`row_sources.memory`).

  Returns:
    The examples.

  Raises:
    InputError: the file or folder does not exist or has an unsupported layout, no
      example can be used, no test set can be held out, there are fewer than two classes
      or fewer than two examples per class on average, the examples do not have the
      format `like`, or an argument is invalid or for another kind of data.
  """
  kind, _, place = name.partition(":")
  if kind not in KINDS or not place:
    raise base.InputError(
      f"the data {name!r} must be one of images:DIR, npz:FILE and csv:FILE"
    )
  if split not in (None, "train", "test"):
    raise base.InputError(f"{name} has the parts train and test; got {split!r}")
  for argument, value, its_kind in (
    ("labels", labels, "images"),
    ("image_size", image_size, "images"),
    ("label_column", label_column, "csv"),
  ):
    if value is not None and kind != its_kind:
      raise base.InputError(
        f"{argument}={str(value)!r} is only for data of the kind {its_kind}; leave it"
        f" out for {name}"
      )
  if image_size is not None:
    image_size = base.check_integer("image_size", image_size)
  if split == "test" and like is None:
    read_train = functools.partial(
      read,
      name,
      "train",
      labels=labels,
      label_column=label_column,
      image_size=image_size,
    )
    if kind == "images":
      like = _image_form_of(read_train, in_memory)
    like = like or read_train(in_memory=in_memory).form
  path = pathlib.Path(place).expanduser()
  if kind == "images":
    raw, is_split = image_folders.list_images(path, split, labels)
  elif kind == "npz":
    raw, is_split = archives.read_archive(path, split)
  else:
    path, column = tables.parse_name(place, label_column)
    raw, is_split = tables.read_table(path, column), False
  if not len(raw.labels):
    raise base.InputError(
      f"{name} has no example that can be used{containers.skipped_suffix(raw)}"
    )
  raw = raw._replace(labels=_unified(raw.labels, like))
  chosen = np.arange(len(raw.labels))
  train = chosen
  if split and not is_split:
    train, test = _train_and_test(raw.labels, name)
    chosen = train if split == "train" else test
  return _convert(name, raw, chosen, train, image_size, like, in_memory)


def _image_form_of(
  read_lazily: Callable[..., containers.OwnData], in_memory: bool | None
) -> containers.Form | None:
  """The form of image files from their headers and one image of each class.

  With `in_memory=False`, the headers are enough. The result is None if there is a class
  without a readable image: the form then depends on all images.
  """
  data = read_lazily(in_memory=False)
  if in_memory is False:
    return data.form
  unread = set(range(len(data.form.class_names)))
  for row, label in enumerate(data.labels.tolist()):
    if label in unread:
      with contextlib.suppress(base.InputError):
        data.features[[row]]
        unread.remove(label)
  return None if unread else data.form


def _train_and_test(labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Splits the rows of every class 4 to 1; both results are ascending."""
  rng = np.random.default_rng(0)
  test = []
  for members in base.rows_by_class(labels, np.unique(labels)):
    rows = rng.permutation(members)
    test.append(rows[: len(rows) // _FOLDS])
  held_out = np.sort(np.concatenate(test))
  if not len(held_out):
    raise base.InputError(
      f"{name} has no class of {_FOLDS} or more examples, so that no test set can"
      " be held out; give it more examples, or a separate test set"
    )
  return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _convert(
  name: str,
  raw: containers.Raw,
  chosen: np.ndarray,
  train: np.ndarray,
  image_size: int | None,
  like: containers.Form | None,
  in_memory: bool | None,
) -> containers.OwnData:
  """Converts the examples `chosen` to the format `like`.

  Without `like`, the format of a table or an array [N, D] is determined by the rows
  `train`, and the format of images and of other arrays by all rows.
  """
  examples = raw.take(chosen)
  encoder = None if like is None else like.encoder
  pixels = None
  if isinstance(raw.values, dict) or (raw.values.ndim == 2 and raw.root is None):
    if encoder is None:
      if like is not None:
        raise base.InputError(
          f"{name} has a list of features for each example, but the other data have"
          f" examples of shape {list(like.shape)}; give both the same shape"
        )
      known = raw.take(train).values
      if isinstance(known, dict):
        known = {k: column for k, column in known.items() if k not in raw.left_out}
        raw.notes.extend(
          f"The column {k!r} numbers the rows and was left out." for k in raw.left_out
        )
        raw.notes.extend(
          f"The column {k!r} has one value for each label. If it is a copy of the"
          " labels, delete it: from a copy, a network learns wrong labels as easily as"
          " right ones."
          for k in known
          if tables.is_copy(raw.values[k], raw.labels)
        )
      encoder = table_encoder.Encoder.fit(name, known, raw.notes)
    features = encoder(name, examples.values)
    if like is not None:
      raw.notes.extend(encoder.unknown_values(name, examples.values))
  elif raw.root is not None:
    pixels = pixel_scale.BYTES
    if like is not None and like.pixels is not None and not like.pixels.is_uint8:
      raise base.InputError(
        f"{name} has image files, with pixels up to 255, but the other data have"
        f" numbers up to {like.pixels.highest:g}; give both the same scale"
      )
    examples, features = image_folders.decode(
      name, raw, examples, image_size, like, in_memory
    )
  else:
    # All rows determine the scale, so that it is the same for both splits.
    expected = None if like is None else like.pixels
    pixels = pixel_scale.choose(name, raw.values, expected, raw.notes)
    if raw.values.dtype.kind == "f":
      finite = pixel_scale.finite_rows(examples.values)
      raw.skipped.extend(
        (str(n), "it has NaN or infinite values") for n in examples.names[~finite]
      )
      if not finite.all():
        examples = examples.take(finite)
    features = pixel_scale.convert(examples.values, pixels)
  if not len(examples.labels):
    raise base.InputError(
      f"{name} has no example that can be used{containers.skipped_suffix(raw)}"
    )
  class_names = like.class_names if like else _ordered(np.unique(examples.labels))
  shape = features.shape[1:]
  if like is not None and like.shape != shape:
    raise base.InputError(
      f"{name} has examples of shape {list(shape)}, but the other data have"
      f" {list(like.shape)}; give both the same shape"
    )
  if like is None and not 2 <= len(class_names) <= max(2, len(examples.labels) // 2):
    number = (
      "1 label" if len(class_names) == 1 else f"{len(class_names)} distinct labels"
    )
    raise base.InputError(
      f"{name} has {number} in {len(examples.labels)} examples; the first is"
      f" {class_names[0]!r}. There must be two or more classes, with two or more"
      " examples on average"
      # The first note of a table says which column has the labels.
      + (f". {raw.notes[0].rstrip('.')}" if isinstance(raw.values, dict) else "")
      + containers.skipped_suffix(raw)
    )
  if like is None and {"-1", "0"} <= set(class_names) and len(class_names) > 2:
    # In arrays of integers, -1 often marks examples without a label.
    raw.notes.append(
      f"the label -1 ({int((examples.labels == '-1').sum())} examples) is a class. If"
      " it marks examples without a label, leave them out."
    )
  if like is None:
    raw.notes.extend(_notes_on_similar(class_names))
  is_array = isinstance(features, np.ndarray)
  if is_array:
    features = np.ascontiguousarray(features)
  no_duplicates = np.full(len(examples.labels), -1, np.int64)
  return containers.OwnData(
    features=features,
    labels=_numbered(name, examples.labels, class_names),
    form=containers.Form(class_names, shape, encoder, pixels),
    names=tuple(map(str, examples.names)),
    rows=examples.rows,
    columns={k: v.tolist() for k, v in examples.values.items()}
    if isinstance(examples.values, dict)
    else {},
    skipped=tuple(raw.skipped),
    notes=tuple(raw.notes),
    duplicate_of=containers.duplicates(features) if is_array else no_duplicates,
    root=raw.root,
  )


def _unified(labels: np.ndarray, like: containers.Form | None) -> np.ndarray:
  """Labels in which "1.0" and "+1" are the same class as "1".

  Without `like`, ".0" and "+" are removed if all labels are whole numbers. With `like`,
  a label that is not one of its classes becomes the class that differs from the label
  only in ".0" or "+", if there is one. Unicode has two forms of some letters, such as
  é; file systems and spreadsheets use different ones, so labels are converted to the
  same form (NFC).
  """
  names = [unicodedata.normalize("NFC", str(label)) for label in labels]
  if like is None:
    if all(_WHOLE.fullmatch(name) for name in names):
      names = [_plain(name) for name in names]
  else:
    known = set(like.class_names)
    similar = {_plain(name): name for name in like.class_names}
    names = [n if n in known else similar.get(_plain(n), n) for n in names]
  return np.array(names, object)


def _plain(label: str) -> str:
  """ "1" for "1.0", "1." and "+1"; other labels are only converted to NFC."""
  if _WHOLE.fullmatch(label):
    return label.partition(".")[0].removeprefix("+")
  return unicodedata.normalize("NFC", label)


def _notes_on_similar(class_names: Sequence[str]) -> list[str]:
  """Notes on names that differ only in case, spaces or invisible characters."""
  first: dict[str, str] = {}
  notes = []
  for name in class_names:
    visible = "".join(c for c in name if unicodedata.category(c) != "Cf").strip()
    key = re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", visible).casefold()
    if first.setdefault(key, name) != name:
      notes.append(
        f"The classes {first[key]!r} and {name!r} have almost the same name. If they"
        " are one class, give them the same name."
      )
  return notes


def _ordered(labels: np.ndarray) -> tuple[str, ...]:
  """Sorts class names: by value if all are integers, otherwise alphabetically."""
  names = [str(label) for label in labels]
  if all(re.fullmatch(r"[+-]?\d{1,18}", name) for name in names):
    return tuple(sorted(names, key=int))
  return tuple(sorted(names))


def _numbered(name: str, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
  number_of = {class_name: i for i, class_name in enumerate(class_names)}
  unknown = sorted(set(map(str, labels)) - number_of.keys())
  if unknown:
    shown = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
    raise base.InputError(
      f"{name} has the label {unknown[0]!r}, which the other data do not have; they"
      f" have {shown}"
    )
  return np.array([number_of[str(label)] for label in labels], np.int32)
