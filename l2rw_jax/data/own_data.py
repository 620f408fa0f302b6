"""Readers of a user's data: a folder of images, a NumPy archive, or a CSV table.

    images:DIR        DIR/CLASS/FILE, or DIR with a labels.csv of path,label
    npz:FILE          arrays X and y (or images and labels), optionally X_test, y_test
    csv:FILE          a table with a header; csv:FILE#NAME names the label column

Labels may be strings or numbers. Examples that cannot be used (an unreadable image, a
row without a label) are skipped and listed with a reason. Changes to the data (resized
images, columns that are left out) are described in notes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
from typing import Any, NamedTuple
import zipfile

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import image_files
from l2rw_jax.data import row_sources

KINDS = ("images", "npz", "csv")
# Larger images are shrunk: a small network detects wrong labels equally well in small
# images, in a fraction of the time.
_LARGEST_SIDE = 64
_TEST_SHARE = 5  # One example in five is held out, per class.
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "<na>"})
_LABEL_COLUMNS = ("label", "labels", "class", "target", "y")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
# Folders with these names are parts of a data set, not classes.
_PART_NAMES = frozenset(
  {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
)
# Larger numbers count as missing: they are infinite in float32.
_LARGEST = float(np.finfo(np.float32).max)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_INFINITY = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
# A column with a larger share of values that are not numbers is not numeric.
_STRAY_SHARE = 0.05
_MAX_CATEGORIES = 30
# In a shorter table, the values of a feature may number the rows or repeat the labels.
_LEAST_ROWS = 20
_FEATURE_KEYS = ("x", "images", "image", "features", "data")
_LABEL_KEYS = ("y", "labels", "label", "target", "targets")
# Rounding can make pixels that have been divided by 255 slightly larger than 1.
_WHITE = 1.001
# Data sets whose largest values differ by a larger factor have different scales.
_SAME_SCALE = 10


class Pixels(NamedTuple):
  """The scale of the features of images, or of other arrays [N, ...] in an archive.

  Attributes:
    is_uint8: whether the features are uint8, which networks divide by 255. Otherwise,
      they are float32 and used as they are.
    factor: the number by which stored numbers are multiplied: 255 if numbers from 0 to
      1 (masks, or pixels that have been divided by 255) become uint8; otherwise 1.
    highest: the largest absolute value of the features.
  """

  is_uint8: bool
  factor: int
  highest: float


# The scale of 8-bit images, whether or not their pixels have been read.
BYTES = Pixels(is_uint8=True, factor=1, highest=255.0)


class Form(NamedTuple):
  """The format that other examples must have to be used with a data set.

  Attributes:
    class_names: the name of each class, in the order of the labels.
    shape: the shape of the features of one example.
    encoder: converts the columns of a table, or of an array [N, D], to features; None
      for other data.
    pixels: the scale of the features; None for tables, for arrays [N, D], and if any
      scale fits.
  """

  class_names: tuple[str, ...]
  shape: tuple[int, ...]
  encoder: "Encoder | None" = None
  pixels: Pixels | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class OwnData:
  """A user's data set of N examples.

  Attributes:
    features: uint8 [N, H, W, 1 or 3] for image files, a row source if they were not
      read into memory; standardized float32 for tables and for arrays [N, D] in
      archives; uint8 or float32 [N, ...] for other arrays.
    labels: the labels, int32 [N].
    form: the class names, and the format that other examples must have.
    names: the name of each example: its path relative to the folder, or "row 12",
      counted from 0.
    rows: the position of each example in the source, where skipped examples count too,
      int64 [N]; for images, the position among the files that have a label.
    columns: the raw columns of a table by name, N strings each.
    skipped: the name of each example that cannot be used, and the reason.
    notes: sentences that describe changes to the data.
    duplicate_of: the index, from 0 to N - 1, of the first example with exactly the same
      features, or -1 if there is no such example before this one; int64 [N]. Always -1
      if the features were not read into memory.
    root: the folder of the images; None for archives and tables.
  """

  features: Any
  labels: np.ndarray
  form: Form
  names: tuple[str, ...]
  rows: np.ndarray
  columns: Mapping[str, Sequence[str]]
  skipped: tuple[tuple[str, str], ...]
  notes: tuple[str, ...]
  duplicate_of: np.ndarray
  root: pathlib.Path | None = None


class _Raw(NamedTuple):
  """N examples before they are converted to one format."""

  values: Any  # Paths of images, an array, or a table (column name -> N strings).
  labels: np.ndarray  # Strings.
  names: np.ndarray
  rows: np.ndarray
  skipped: list[tuple[str, str]]
  notes: list[str]
  root: pathlib.Path | None = None
  left_out: tuple[str, ...] = ()  # Columns of a table that are not features.

  def take(self, chosen: np.ndarray) -> "_Raw":
    """Returns the examples that `chosen`, row indices or a mask, selects."""
    if isinstance(self.values, dict):
      values: Any = {name: column[chosen] for name, column in self.values.items()}
    else:
      values = self.values[chosen]
    return self._replace(
      values=values,
      labels=self.labels[chosen],
      names=self.names[chosen],
      rows=self.rows[chosen],
    )


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
  like: Form | None = None,
  in_memory: bool | None = True,
) -> OwnData:
  """Reads a user's data.

  Args:
    name: images:DIR, npz:FILE or csv:FILE.
    split: "train" or "test". If the source has these splits (the folders DIR/train and
      DIR/test, the arrays X_test and y_test), they are used. Otherwise, a fixed fifth
      of the examples of each class is the test set. By default, all examples are
      returned, except for the source's test split.
    labels: for images, a CSV file of path,label. The paths start in DIR or, if there
      are folders DIR/train and DIR/test, in DIR or DIR/train; these folders are then
      not splits. The default is labels.csv in the folder that is read, if it exists:
      DIR or, if there are folders DIR/train and DIR/test, one of these. Otherwise, the
      folders are the classes.
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
      example can be used, there are fewer than two classes, the examples do not have
      the format `like`, or an argument is for another kind of data.
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
    raw, is_split = _images(path, split, labels)
  elif kind == "npz":
    raw, is_split = _archive(path, split)
  else:
    path, column = _table_name(place, label_column)
    raw, is_split = _table(path, column), False
  if not len(raw.labels):
    raise base.InputError(f"{name} has no example that can be used{_skipped(raw)}")
  raw = raw._replace(labels=_unified(raw.labels, like))
  chosen = np.arange(len(raw.labels))
  train = chosen
  if split and not is_split:
    train, test = _train_and_test(raw.labels, name)
    chosen = train if split == "train" else test
  return _convert(name, raw, chosen, train, image_size, like, in_memory)


def _image_form_of(
  read_lazily: Callable[..., OwnData], in_memory: bool | None
) -> Form | None:
  """The form of image files from their headers and one image of each class.

  It is None if no image of a class can be read: the form then depends on all images.
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


def report(data: OwnData) -> list[str]:
  """Describes the changes to the data, the skipped examples and the duplicates.

  Args:
    data: the data as `read` returns it.

  Returns:
    Sentences. The first three skipped examples are listed by name.
  """
  lines = list(data.notes)
  if data.skipped:
    shown = "; ".join(f"{name}: {reason}" for name, reason in data.skipped[:3])
    more = "; ..." if len(data.skipped) > 3 else ""
    lines.append(f"{len(data.skipped)} skipped ({shown}{more}).")
  is_copy = data.duplicate_of >= 0
  if is_copy.any():
    originals = data.labels[data.duplicate_of[is_copy]]
    conflicts = int((originals != data.labels[is_copy]).sum())
    lines.append(
      f"{int(is_copy.sum())} examples are exact duplicates of others, {conflicts} of"
      " them with another label."
    )
  return lines


def _skipped(raw: _Raw) -> str:
  if not raw.skipped:
    return ""
  name, reason = raw.skipped[0]
  return f"; {len(raw.skipped)} skipped, the first is {name}: {reason}"


def _train_and_test(labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Splits the rows of every class 4 to 1; both results are ascending."""
  rng = np.random.default_rng(0)
  test = []
  for members in base.rows_by_class(labels, np.unique(labels)):
    rows = rng.permutation(members)
    test.append(rows[: len(rows) // _TEST_SHARE])
  held_out = np.sort(np.concatenate(test))
  if not len(held_out):
    raise base.InputError(
      f"{name} has no class of {_TEST_SHARE} or more examples, so that no test set can"
      " be held out; give it more examples, or a separate test set"
    )
  return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _convert(
  name: str,
  raw: _Raw,
  chosen: np.ndarray,
  train: np.ndarray,
  image_size: int | None,
  like: Form | None,
  in_memory: bool | None,
) -> OwnData:
  """Converts examples to the format `like`, or else to the format of rows `train`."""
  examples = raw.take(chosen)
  encoder = None if like is None else like.encoder
  pixels = None
  if isinstance(raw.values, dict) or (raw.values.ndim == 2 and raw.root is None):
    if encoder is None:
      if like is not None:
        raise base.InputError(f"{name} has rows, but the other data have images")
      known = raw.take(train).values
      if isinstance(known, dict):
        known = {k: column for k, column in known.items() if k not in raw.left_out}
        raw.notes.extend(
          f"The column {k!r} numbers the rows and was left out." for k in raw.left_out
        )
        raw.notes.extend(
          f"The column {k!r} has one value for each label. If it is a copy of them,"
          " delete it: with it, a network learns wrong labels as easily as right ones."
          for k in known
          if _is_copy(raw.values[k], raw.labels)
        )
      encoder = Encoder.fit(name, known, raw.notes)
    features = encoder(name, examples.values)
  elif raw.root is not None:
    pixels = BYTES
    if like is not None and like.pixels is not None and not like.pixels.is_uint8:
      raise base.InputError(
        f"{name} has image files, with pixels up to 255, but the other data have"
        f" numbers up to {like.pixels.highest:g}; give both the same scale"
      )
    examples, features = _decode(name, raw, examples, image_size, like, in_memory)
  else:
    # All rows determine the scale, so that it is the same for both splits.
    expected = None if like is None else like.pixels
    pixels = _pixels(name, raw.values, expected, raw.notes)
    if raw.values.dtype.kind == "f":
      finite = _finite_rows(examples.values)
      raw.skipped.extend(
        (str(n), "it has NaN or infinite values") for n in examples.names[~finite]
      )
      if not finite.all():
        examples = examples.take(finite)
    features = _scaled(examples.values, pixels)
  if not len(examples.labels):
    raise base.InputError(f"{name} has no example that can be used{_skipped(raw)}")
  class_names = like.class_names if like else _ordered(np.unique(examples.labels))
  shape = features.shape[1:]
  if like is not None and like.shape != shape:
    raise base.InputError(
      f"{name} has examples of shape {list(shape)}, but the other data have"
      f" {list(like.shape)}; give both the same shape"
    )
  if like is None and not 2 <= len(class_names) <= max(2, len(examples.labels) // 2):
    raise base.InputError(
      f"{name} has {len(class_names)} different labels in {len(examples.labels)}"
      f" examples; the first is {class_names[0]!r}. There must be two or more classes,"
      " with two or more examples on average"
      # The first note of a table says which column has the labels.
      + (f". {raw.notes[0].rstrip('.')}" if isinstance(raw.values, dict) else "")
      + _skipped(raw)
    )
  is_array = isinstance(features, np.ndarray)
  if is_array:
    features = np.ascontiguousarray(features)
  no_duplicates = np.full(len(examples.labels), -1, np.int64)
  return OwnData(
    features=features,
    labels=_numbered(name, examples.labels, class_names),
    form=Form(class_names, shape, encoder, pixels),
    names=tuple(map(str, examples.names)),
    rows=examples.rows,
    columns={k: v.tolist() for k, v in examples.values.items()}
    if isinstance(examples.values, dict)
    else {},
    skipped=tuple(raw.skipped),
    notes=tuple(raw.notes),
    duplicate_of=duplicates(features) if is_array else no_duplicates,
    root=raw.root,
  )


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


def duplicates(features: np.ndarray) -> np.ndarray:
  """Finds exact duplicates.

  Args:
    features: the features of N examples, [N, ...].

  Returns:
    For each example, the index of the first example that is exactly equal, or -1 if
    there is no such example before this one; int64 [N]. 0.0 and -0.0 are equal.

  >>> duplicates(np.array([[1], [2], [1], [1]])).tolist()
  [-1, -1, 0, 0]
  """
  features = np.asarray(features)
  first: dict[bytes, int] = {}
  duplicate_of = np.full(len(features), -1, np.int64)
  zero = np.zeros((), features.dtype)
  for row, example in enumerate(features):
    content = np.add(example, zero).tobytes()  # The sum of -0.0 and 0.0 is 0.0.
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if first.setdefault(digest, row) != row:
      duplicate_of[row] = first[digest]
  return duplicate_of


def csv_cell(text: str) -> str:
  """Escapes text for a CSV file so that `read` and spreadsheets take it as text.

  Text that a spreadsheet would evaluate as a formula (it starts with =, +, -, @, a tab
  or a carriage return and is not a number) and text that `read` would take for a
  missing label (such as None, the name of a folder) gets a leading apostrophe, which
  `read` removes. Text that would become such text without its leading apostrophes gets
  one more.

  >>> csv_cell("=A1"), csv_cell("-1.5"), csv_cell("cat"), csv_cell("'=A1")
  ("'=A1", '-1.5', 'cat', "''=A1")
  >>> csv_cell("None")
  "'None"
  """
  bare = text.lstrip("'")
  is_formula = bare[:1] in tuple("=+-@\t\r") and not _NUMBER.fullmatch(bare)
  is_missing = bare.strip().lower() in _MISSING - {""}
  return f"'{text}" if is_formula or is_missing else text


def _unquoted(text: str) -> str:
  """The inverse of `csv_cell`."""
  return text[1:] if text[:1] == "'" and csv_cell(text[1:]) == text else text


def corrected_labels(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
  """Reads the file that the page of label issues exports for tables and arrays.

  For images, pass the file to `read` as `labels`.

  Args:
    path: a CSV file with the columns index and label.

  Returns:
    The rows of the examples that were not removed, ascending int64 [n], and the names
    of their classes, n strings.

  Raises:
    InputError: the file cannot be read, lacks a column, or has a row that is not a
      number, has no label, or occurs twice.
  """
  path = pathlib.Path(path).expanduser()
  header, *lines = _csv_rows(path) or [[]]
  names = [cell.strip() for cell in header]
  if not {"index", "label"} <= set(names):
    raise base.InputError(
      f"{path} has the columns {', '.join(names)}; it must have index and label, as the"
      " page exports them for tables and arrays"
    )
  labels: dict[int, str] = {}
  for line in lines:
    cells = dict(zip(names, map(str.strip, line), strict=False))
    row, label = cells.get("index", ""), cells.get("label", "")
    if not re.fullmatch(r"[0-9]{1,18}", row) or int(row) in labels or not label:
      raise base.InputError(
        f"{path} has the line {','.join(line)[:100]!r}; each line must have a different"
        " row number and a label"
      )
    labels[int(row)] = _unquoted(label)
  rows = sorted(labels)
  return np.array(rows, np.int64), np.array([labels[row] for row in rows], object)


# -- folders of images -------------------------------------------------------


def _images(
  folder: pathlib.Path, split: str | None, labels: str | os.PathLike | None
) -> tuple[_Raw, bool]:
  """Returns the image files with their labels, and whether `folder` has this split."""
  if not folder.is_dir():
    raise base.InputError(f"{folder} is not a folder of images")
  notes: list[str] = []
  is_split = False
  listing = pathlib.Path(labels).expanduser() if labels else None
  has_parts = all((folder / p).is_dir() for p in ("train", "test"))
  if has_parts and (listing is None or _is_of_train(folder, listing)):
    is_split = listing is None and split is not None
    folder = folder / (split if split and is_split else "train")
    if not is_split:
      notes.append(f"Only the images in {folder} were read, not those in ../test.")
  listed = listing or folder / "labels.csv"
  if labels or listed.exists():
    files, given, skipped = _listed(folder, listed, notes)
  else:
    files, given, skipped = _in_classes(folder)
  names = [f.relative_to(folder).as_posix() for f in files]
  raw = _Raw(
    np.array(files, object),
    np.array(given, object),
    np.array(names, object),
    np.arange(len(files)),
    skipped,
    notes,
    folder,
  )
  return raw, is_split


def _is_of_train(folder: pathlib.Path, listing: pathlib.Path) -> bool:
  """Whether a list, such as an exported one, has paths in folder/train, not folder."""
  cells = [cell for row in _csv_rows(listing)[:20] for cell in row]
  in_folder, in_train = (
    any(_file_within(place, cell) for cell in cells)
    for place in (folder, folder / "train")
  )
  return in_train and not in_folder


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the files below a folder, except hidden ones, in a fixed order."""

  def refuse(error: OSError):
    raise base.InputError(f"{error.filename} cannot be read: {error.strerror}")

  above: dict[str, tuple[str, ...]] = {}
  for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
    real, parents = os.path.realpath(place), above.get(os.path.dirname(place), ())
    if real in parents:  # Links may form a cycle.
      folders.clear()
      continue
    above[place] = (*parents, real)
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    for name in sorted(files):
      if not name.startswith("."):
        yield pathlib.Path(place, name)


def _in_classes(
  folder: pathlib.Path,
) -> tuple[list[pathlib.Path], list[str], list[tuple[str, str]]]:
  """The images in class folders, their labels, and the skipped files."""
  files, labels, skipped = [], [], []
  for path in _walk(folder):
    inside = path.relative_to(folder)
    if len(inside.parts) < 2:
      skipped.append((inside.as_posix(), "it is not in a folder of a class"))
    elif path.suffix.lower() not in image_files.SUFFIXES:
      skipped.append(
        (inside.as_posix(), f"{path.suffix or 'it'} is not an image format")
      )
    else:
      files.append(path)
      labels.append(inside.parts[0])
  if files and all(label.lower() in _PART_NAMES for label in labels):
    parts = sorted(set(labels))
    raise base.InputError(
      f"{folder} has the folders {', '.join(parts)}, which are parts of a data set, not"
      f" classes; give one of them, such as images:{folder / parts[0]}, or call them"
      " train and test"
    )
  if not files:
    raise base.InputError(
      f"{folder} contains no images in class folders, {folder}/CLASS/FILE.png;"
      f" move them there, or list them as path,label in {folder}/labels.csv"
    )
  return files, labels, skipped


def _listed_columns(
  folder: pathlib.Path, listing: pathlib.Path, first: Sequence[str], notes: list[str]
) -> tuple[int, int, bool]:
  """The columns of paths and labels, and whether the first row is a header."""
  names = [cell.strip() for cell in first]
  lower = [name.lower() for name in names]
  paths = [lower.index(c) for c in _PATH_COLUMNS if c in lower]
  labels = [lower.index(c) for c in _LABEL_COLUMNS if c in lower]
  # Without a header, a label can have the name of a column, such as y for yes.
  is_row = bool(names) and _file_within(folder, first[0]) is not None
  path_at, label_at, is_header = 0, 1, False
  if paths and labels:
    path_at, label_at, is_header = paths[0], labels[0], True
  elif (paths or labels) and len(names) == 2 and not is_row:
    path_at = paths[0] if paths else 1 - labels[0]
    label_at, is_header = 1 - path_at, True
  elif (paths or labels) and len(names) > 2 and not is_row:
    raise base.InputError(
      f"{listing} has the columns {', '.join(names)}; call that of the paths one of"
      f" {', '.join(_PATH_COLUMNS)}, and that of the labels one of"
      f" {', '.join(_LABEL_COLUMNS)}"
    )
  if len(names) > 2:
    column = repr(names[label_at]) if is_header else "number 2"
    notes.append(f"The labels are the column {column} of {listing.name}.")
  return path_at, label_at, is_header


def _listed(
  folder: pathlib.Path, listing: pathlib.Path, notes: list[str]
) -> tuple[list[pathlib.Path], list[str], list[tuple[str, str]]]:
  """The images in a CSV file of path,label, their labels, and the skipped files."""
  rows = _csv_rows(listing)
  first = rows[0] if rows else []
  path_at, label_at, is_header = _listed_columns(folder, listing, first, notes)
  rows = rows[1:] if is_header else rows
  files: dict[pathlib.Path, str] = {}
  skipped = []
  for row in rows:
    if len(row) <= max(path_at, label_at):
      skipped.append((",".join(row), f"{listing.name} has no path and label for it"))
      continue
    cell, label = row[path_at], row[label_at].strip()
    path = _file_within(folder, cell)
    reason = ""
    if label.lower() in _MISSING:
      reason = f"{_missing(label)} in {listing.name}"
    elif path is None:
      reason = f"there is no such file in {folder}"
    elif path in files:
      reason = f"it is listed twice in {listing.name}; the first label counts"
    if reason:
      skipped.append((_unquoted(cell).strip(), reason))
    elif path is not None:
      files[path] = _unquoted(label)
  if not files:
    raise base.InputError(
      f"{listing} lists no image in {folder}: each row must be path,label with the path"
      f" of a file below the folder"
      + (f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else "")
    )
  named = {name for name, _ in skipped}
  for path in _walk(folder):
    if path.suffix.lower() in image_files.SUFFIXES and path not in files:
      inside = path.relative_to(folder).as_posix()
      if inside not in named:
        skipped.append((inside, f"it is not in {listing.name}"))
  return list(files), list(files.values()), skipped


def _file_within(folder: pathlib.Path, cell: str) -> pathlib.Path | None:
  """The file below `folder` that a cell of a list names, or None if there is none.

  The list may be untrusted, so no path may lead out of the folder. Links inside of the
  folder belong to the user and may.
  """
  unquoted = _unquoted(cell)
  stripped = unquoted.strip()
  # The list may come from Windows.
  for name in (unquoted, stripped, stripped.replace("\\", "/")):
    try:
      # Lexically, because the target of a link may be outside of the folder.
      inside = os.path.relpath(os.path.join(os.path.abspath(folder), name), folder)
      if os.path.isabs(name) and inside.startswith(os.pardir):
        inside = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))
      path = folder / inside
      if os.pardir not in pathlib.PurePath(inside).parts and path.is_file():
        return path
    except (OSError, ValueError):  # It is too long or has a null character.
      continue
  return None


def _decode(
  name: str,
  raw: _Raw,
  examples: _Raw,
  image_size: int | None,
  like: Form | None,
  in_memory: bool | None,
) -> tuple[_Raw, Any]:
  """Reads the images at a common size, and skips those that cannot be read."""
  # The headers of all images in `raw`, not only of those in `examples`, determine the
  # format, so that it is the same for both splits.
  headers = {}
  for example, path in zip(raw.names, raw.values, strict=True):
    try:
      headers[example] = image_files.header(path)
    except ValueError as error:
      raw.skipped.append((str(example), str(error)))
  if not headers:
    raise base.InputError(f"{name} has no image that can be read{_skipped(raw)}")
  if like is None:
    size, channels = _image_form(headers, image_size, raw.notes)
  elif len(like.shape) == 3 and like.shape[-1] in (1, 3):
    size, channels = (like.shape[0], like.shape[1]), like.shape[2]
    # For a test set, `read` passes `image_size` and a `like` of this size.
    if image_size is not None and size != (image_size, image_size):
      raise base.InputError(
        f"image_size={image_size}, but the other data have images of {size[1]} x"
        f" {size[0]} pixels; leave image_size out"
      )
  else:
    raise base.InputError(
      f"{name} has images, but the other data have examples of shape {list(like.shape)}"
    )
  if in_memory is None:
    in_memory = row_sources.fit_in_memory(len(examples.names), (*size, channels))
  if not in_memory:
    examples = examples.take(np.array([n in headers for n in examples.names], bool))
    return examples, row_sources.ImageFiles(examples.values, size, channels)
  features = np.empty((len(examples.names), *size, channels), np.uint8)
  is_good = np.zeros(len(examples.names), bool)
  for row, (example, path) in enumerate(
    zip(examples.names, examples.values, strict=True)
  ):
    if example not in headers:
      continue
    try:
      features[row] = image_files.read(path, size, channels)
      is_good[row] = True
    except ValueError as error:
      raw.skipped.append((str(example), str(error)))
  return examples.take(is_good), features if is_good.all() else features[is_good]


def _image_form(
  headers: Mapping[str, image_files.Header], image_size: int | None, notes: list[str]
) -> tuple[tuple[int, int], int]:
  sizes = [(h.height, h.width) for h in headers.values()]
  counts: dict[tuple[int, int], int] = {}
  for size in sizes:
    counts[size] = counts.get(size, 0) + 1
  most_frequent = max(counts, key=lambda size: (counts[size], size))
  if image_size is not None:
    height = width = image_size
  else:
    scale = min(1.0, _LARGEST_SIDE / max(most_frequent))
    height, width = (max(1, round(side * scale)) for side in most_frequent)
  resized = sum(count for size, count in counts.items() if size != (height, width))
  if resized:
    if len(counts) > 1:
      description = f"{len(counts)} sizes"
    else:
      description = f"{most_frequent[1]} x {most_frequent[0]}"
    notes.append(
      f"{resized} of {len(sizes)} images ({description}) were resized to"
      f" {width} x {height} pixels."
    )
  num_gray = sum(h.is_gray for h in headers.values())
  if 0 < num_gray < len(headers):
    notes.append(f"{num_gray} of {len(headers)} images are gray; all were made RGB.")
  return (height, width), 1 if num_gray == len(headers) else 3


# -- archives ----------------------------------------------------------------


def _archive(path: pathlib.Path, split: str | None) -> tuple[_Raw, bool]:
  """Reads a NumPy archive, and returns whether the archive provides this split."""
  with _opened(path) as stored:
    names = list(stored.files)
    pair, has_test = _archive_keys(path, names, split)
    # The other arrays are not read: they may be large, or Python objects.
    values = None if pair is None else [stored[key] for key in pair]
  if pair is None or values is None:
    return _archive(path, None)[0], False
  notes = []
  if split is None and has_test:
    notes.append(f"The test arrays in {path} were not read.")
  features = _archive_features(path, pair[0], values[0], notes)
  labels, is_labeled = _archive_labels(path, pair[1], values[1])
  if len(labels) != len(features):
    raise base.InputError(
      f"{path} has {len(features)} examples in {pair[0]} but {len(labels)} labels in"
      f" {pair[1]}; give one label to each example"
    )
  rows = np.arange(len(labels))
  examples = np.array([f"row {row}" for row in rows], object)
  skipped = [
    (name, _missing(label))
    for name, label in zip(examples[~is_labeled], labels[~is_labeled], strict=True)
  ]
  raw = _Raw(features, labels, examples, rows, skipped, notes)
  return raw.take(is_labeled), has_test


def _archive_keys(
  path: pathlib.Path, names: Sequence[str], split: str | None
) -> tuple[tuple[str, str] | None, bool]:
  """The names of the features and labels of a split, and whether there is a test set.

  The names are None if the split is "test" and there is no test set.
  """
  keys = {name.lower(): name for name in names}

  def key(stems, suffix):
    return next((keys[s + suffix] for s in stems if s + suffix in keys), None)

  suffixes = ("", "_train") if split != "test" else ("_test",)
  pairs = [(key(_FEATURE_KEYS, s), key(_LABEL_KEYS, s)) for s in suffixes]
  pair = next((p for p in pairs if None not in p), None)
  has_test = bool(key(_FEATURE_KEYS, "_test") and key(_LABEL_KEYS, "_test"))
  if pair is None and split != "test":
    raise base.InputError(
      f"{path} must contain the arrays X and y, or images and labels; it contains"
      f" {', '.join(names) or 'nothing'}"
    )
  return pair, has_test


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
  """Opens an archive; errors of reading it become errors of one line."""
  try:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
      raise base.InputError(
        f"{path} contains a single array; save it as np.savez(FILE, X=..., y=...)"
      )
    with stored:
      yield stored
  except base.InputError:
    raise
  except OSError as error:
    raise base.InputError(
      f"{path} cannot be read: {error.strerror or 'it is not a NumPy archive'}"
    ) from error
  except (ValueError, EOFError, KeyError, zipfile.BadZipFile, SyntaxError) as error:
    if "allow_pickle" in str(error) or "pickle" in str(error):
      raise base.InputError(
        f"{path} contains Python objects, which are not read because they can run code;"
        " save numbers, or strings with dtype=str"
      ) from error
    raise base.InputError(f"{path} is damaged or not a NumPy archive") from error


def _archive_features(
  path: pathlib.Path, name: str, features: np.ndarray, notes: list[str]
) -> np.ndarray:
  if features.dtype.kind not in "biuf" or 0 in features.shape[1:] or features.ndim < 2:
    raise base.InputError(
      f"{name} in {path} must be numbers, with an axis of examples and one or more axes"
      f" of features; it is {features.dtype} of shape {list(features.shape)}"
    )
  if features.ndim == 4 and features.shape[1] in (1, 3):
    if features.shape[3] not in (1, 3, 4):
      features = np.moveaxis(features, 1, 3)
      notes.append(f"The channels of {name} were moved to the last axis.")
  elif features.ndim == 3:
    features = features[..., None]
  is_whole = features.dtype.kind in "biu" and features.ndim > 2
  with np.errstate(over="ignore"):  # Infinite values count as missing.
    return features if is_whole else features.astype(np.float32, copy=False)


def pixels_of(features: np.ndarray) -> Pixels:
  """Returns the scale of features, uint8 or float32 [N, ...], as they are."""
  lowest, highest, _ = _range(features)
  return Pixels(features.dtype == np.uint8, 1, max(highest, -lowest))


def _finite_rows(values: np.ndarray) -> np.ndarray:
  return np.isfinite(values).reshape(len(values), -1).all(axis=1)


def _range(values: np.ndarray) -> tuple[float, float, bool]:
  """The lowest and the highest value of finite rows, and whether all are whole numbers.

  Rows are read in blocks to save memory. If no row is finite, the result is
  (0, 0, True).
  """
  if values.dtype.kind != "f":
    return (
      (float(values.min()), float(values.max()), True) if values.size else (0, 0, True)
    )
  ranges = []
  for start in range(0, len(values), 1024):
    rows = values[start : start + 1024]
    rows = rows[_finite_rows(rows)]
    if rows.size:
      is_whole = bool((rows == np.rint(rows)).all())
      ranges.append((float(rows.min()), float(rows.max()), is_whole))
  if not ranges:
    return 0, 0, True
  lowest, highest, are_whole = zip(*ranges, strict=True)
  return min(lowest), max(highest), all(are_whole)


def _pixels(
  name: str, values: np.ndarray, like: Pixels | None, notes: list[str]
) -> Pixels:
  """The scale that the features will have.

  Args:
    name: the name of the data, for messages.
    values: stored numbers, [N, ...].
    like: the scale of the other data, or None if there are none.
    notes: a list to which a note about unusual numbers is appended.

  Raises:
    InputError: the numbers cannot be converted to the scale `like`.
  """
  lowest, highest, is_whole = _range(values)
  is_float, is_mask = values.dtype.kind == "f", values.dtype.kind == "b"
  if like is None:
    # Small whole numbers that are stored as floats need not be pixels.
    is_uint8 = lowest >= 0 and highest <= 255 and is_whole
    is_uint8 = is_uint8 and (highest > 127 or not is_float)
    factor = 255 if is_uint8 and highest <= 1 else 1
    pixels = Pixels(is_uint8, factor, factor * max(highest, -lowest))
    if is_uint8 and pixels.highest <= 127:
      notes.append(
        "The pixels were read as those of 8-bit images, where white is 255; the largest"
        f" is {highest:g}."
      )
    if not is_uint8 and pixels.highest > 2 * _SAME_SCALE:
      notes.append(
        f"The values, from {lowest:g} to {highest:g}, are used as they are. Networks"
        " learn best from values between -1 and 1."
      )
    return pixels
  factor = like.factor if highest <= 1 and not is_float else 1
  if like.is_uint8 and (is_mask or (is_float and lowest >= 0 and highest <= _WHITE)):
    factor = 255  # Masks, and pixels that have been divided by 255.
  pixels = Pixels(like.is_uint8, factor, factor * max(highest, -lowest))
  smaller, larger = sorted((pixels.highest, like.highest))
  has_scale = larger <= _SAME_SCALE * smaller or smaller == 0
  can_be_uint8 = lowest >= 0 and pixels.highest <= 255 * _WHITE
  can_be_uint8 = can_be_uint8 and (is_whole or factor == 255)
  if not has_scale or (like.is_uint8 and not can_be_uint8):
    kind = "whole numbers" if is_whole else "numbers"
    others = "whole numbers" if like.is_uint8 else "numbers"
    raise base.InputError(
      f"{name} has {kind} from {lowest:g} to {highest:g} as pixels, but the other data"
      f" have {others} up to {like.highest:g}; give both the same scale"
    )
  return pixels


def _scaled(values: np.ndarray, pixels: Pixels) -> np.ndarray:
  """Converts stored numbers that are finite to features, uint8 or float32."""
  if not pixels.is_uint8:
    return values.astype(np.float32, copy=False)
  if values.dtype.kind == "f":
    return np.rint(values * np.float32(pixels.factor)).astype(np.uint8)  # At most 255.
  features = values.astype(np.uint8, copy=False)
  return features if pixels.factor == 1 else features * np.uint8(pixels.factor)


def _archive_labels(
  path: pathlib.Path, name: str, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the labels as strings, and a mask of the examples that have one."""
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  elif labels.ndim == 2 and labels.dtype.kind in "biuf":
    is_one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
    labels = labels.argmax(axis=1) if is_one_hot else labels
  if labels.ndim != 1 or labels.dtype.kind not in "biufUS":
    raise base.InputError(
      f"{name} in {path} must have one label for each example, numbers or strings; it"
      f" is {labels.dtype} of shape {list(labels.shape)}"
    )
  if labels.dtype.kind == "f":
    is_labeled = np.isfinite(labels)
    # In float16, 2^53 is infinite.
    numbers = np.where(is_labeled, labels, 0).astype(np.float64)
    is_class = (numbers == np.round(numbers)) & (np.abs(numbers) <= 2**53)
    if not is_class.all():
      raise base.InputError(
        f"{name} in {path} has the value {numbers[~is_class][0]}; labels must be"
        " classes, not measurements"
      )
    classes = numbers.astype(np.int64).astype(str).astype(object)
    return np.where(is_labeled, classes, ""), is_labeled
  if labels.dtype.kind == "S":
    # Labels that are not UTF-8 stay different from each other.
    labels = np.char.decode(labels, "utf-8", "backslashreplace")
  if labels.dtype.kind == "b":
    labels = labels.astype(np.int64)
  strings = np.array([str(label).strip() for label in labels.tolist()], object)
  is_labeled = np.array([s.lower() not in _MISSING for s in strings], bool)
  return strings, is_labeled


# -- tables ------------------------------------------------------------------


def _table_name(
  place: str, label_column: str | None
) -> tuple[pathlib.Path, str | None]:
  """Parses FILE or FILE#NAME into the path and the name of the label column."""
  path = pathlib.Path(place).expanduser()
  if label_column is None and not path.exists() and "#" in place:
    file, _, label_column = place.rpartition("#")
    path = pathlib.Path(file).expanduser()
  return path, label_column


def _csv_rows(path: pathlib.Path) -> list[list[str]]:
  """The nonempty rows of a CSV file, whose cells may be escaped (`csv_cell`)."""
  try:
    text = path.read_text(encoding="utf-8-sig")
  except OSError as error:
    raise base.InputError(f"{path} cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise base.InputError(f"{path} is not encoded as UTF-8; convert it") from error
  try:
    # `csv.Sniffer` is not reliable if cells contain quotes or text.
    headers = {d: next(filter(None, _parsed(text, d)), []) for d in ",;\t|"}
    delimiter = max(headers, key=lambda d: len(headers[d]))
    return [row for row in _parsed(text, delimiter) if row]
  except csv.Error as error:
    raise base.InputError(f"{path} is not a CSV file: {error}") from error


def _parsed(text: str, delimiter: str) -> Iterator[list[str]]:
  # Lines end only at line breaks, not at other line separators of Unicode.
  return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)


def _table(path: pathlib.Path, label_column: str | None) -> _Raw:
  """Reads the rows of a CSV file that have a label and as many fields as the header."""
  header, *rows = _csv_rows(path) or [[]]
  names = _unique([cell.strip() for cell in header])
  if len(names) < 2:
    raise base.InputError(
      f"{path} must have a header and two or more columns, one of them the labels"
    )
  if label_column is None:
    lower = [name.lower() for name in names]
    at = next((lower.index(c) for c in _LABEL_COLUMNS if c in lower), len(names) - 1)
  elif label_column in names:
    at = names.index(label_column)
  else:
    raise base.InputError(
      f"{path} has no column {label_column!r}; it has {', '.join(names)}"
    )
  notes = [f"The labels are the column {names[at]!r}."]
  numbers = [c for c in map(str.strip, header) if _NUMBER.fullmatch(c)]
  fractions = [c for c in numbers if not c.isdecimal()]
  if fractions or len(set(numbers)) < len(numbers):
    notes.append(
      f"The first row, with {(fractions or numbers)[0]!r}, was read as the names of the"
      " columns. If it is an example, add a row of names."
    )
  kept, skipped = [], []
  for number, row in enumerate(rows):
    if len(row) != len(names):
      reason = f"it has {len(row)} fields, but the header has {len(names)}"
      skipped.append((f"row {number}", reason))
    elif row[at].strip().lower() in _MISSING:
      skipped.append((f"row {number}", _missing(row[at].strip())))
    else:
      kept.append(number)
  cells = np.array([[_unquoted(c.strip()) for c in rows[n]] for n in kept], object)
  cells = cells.reshape(len(kept), len(names))
  columns = {name: cells[:, i] for i, name in enumerate(names) if i != at}
  counters = tuple(name for name, x in columns.items() if _counts_rows(x, kept))
  return _Raw(
    columns,
    cells[:, at],
    np.array([f"row {number}" for number in kept], object),
    np.array(kept, np.int64),
    skipped,
    notes,
    left_out=counters,
  )


def _is_copy(column: np.ndarray, labels: np.ndarray) -> bool:
  """Whether every value of a column belongs to one label, and every label to one."""
  number = len(set(labels))
  if len(labels) < _LEAST_ROWS or number < 2 or len(set(column)) != number:
    return False
  return len(set(zip(column, labels, strict=True))) == number


def _counts_rows(column: np.ndarray, rows: Sequence[int]) -> bool:
  """Whether a column numbers the rows, such as the index that pandas writes.

  If the rows are sorted by label, a network learns the labels from such a column,
  whether they are right or wrong.
  """
  if len(rows) < _LEAST_ROWS:
    return False
  offsets = (
    int(cell) - row if re.fullmatch(r"\d{1,18}", cell) else None
    for cell, row in zip(column, rows, strict=True)
  )
  first = next(offsets)  # Of most columns, only the first two cells are read.
  return first is not None and all(offset == first for offset in offsets)


def _missing(label: str) -> str:
  """Why an example without a label is skipped."""
  return f"its label {label!r} counts as missing" if label else "it has no label"


def _unified(labels: np.ndarray, like: Form | None) -> np.ndarray:
  """Labels in which "1.0" is the same class as "1".

  Without `like`, ".0" is removed if all labels are whole numbers. Otherwise, a label
  that is not a class of `like` becomes the class that differs only by ".0", if any.
  """
  names = [str(label) for label in labels]
  if like is None:
    if all(_WHOLE.fullmatch(name) for name in names):
      names = [_without_zeros(name) for name in names]
  else:
    known = set(like.class_names)
    similar = {_without_zeros(name): name for name in like.class_names}
    names = [n if n in known else similar.get(_without_zeros(n), n) for n in names]
  return np.array(names, object)


def _without_zeros(label: str) -> str:
  """ "1" for "1.0" and "1."; other labels are returned unchanged."""
  return label.partition(".")[0] if _WHOLE.fullmatch(label) else label


def _unique(names: Sequence[str]) -> list[str]:
  """Makes column names unique and nonempty."""
  unique: dict[str, None] = {}
  numbers: dict[str, int] = {}
  for i, name in enumerate(names):
    name = name or f"column {i}"
    candidate = name
    while candidate in unique:
      numbers[name] = numbers.get(name, 1) + 1
      candidate = f"{name}.{numbers[name]}"
    unique[candidate] = None
  return list(unique)


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """Converts the rows of a table to standardized numbers and one-hot categories.

  A missing number is replaced by the median of the column. If the column had missing
  numbers when the encoder was fitted, an additional column indicates them. Missing
  categories form one more category. If a column has more than 30 categories, all but
  the 29 most frequent ones are merged. The means, standard deviations, medians and
  categories are those of the rows that the encoder was fitted to.

  Attributes:
    numeric: the names of the numeric columns; None for an array [N, D].
    categorical: the names of the categorical columns.
    transforms: the fitted scikit-learn transformers for numeric and for categorical
      columns, each None if there are no such columns.
  """

  numeric: tuple[str, ...] | None
  categorical: tuple[str, ...]
  transforms: tuple[Any, Any]

  @classmethod
  def fit(cls, name: str, values: Any, notes: list[str]) -> "Encoder":
    """Fits an encoder.

    Args:
      name: the name of the data, for messages.
      values: numbers [N, D], or a table of strings by column name.
      notes: a list to which notes about omitted columns are appended.

    Returns:
      The fitted encoder.

    Raises:
      InputError: no column is usable.
    """
    impute, pipeline, preprocessing = _sklearn()
    if isinstance(values, dict):
      numeric, categorical = _kinds_of_columns(values, notes)
      numbers = _numbers(values, numeric)
      labels: tuple[str, ...] | None = tuple(numeric)
    else:
      numbers, categorical, labels = values.astype(np.float64), [], None
      numbers[~(np.abs(numbers) <= _LARGEST)] = np.nan
    empty = np.isnan(numbers).all(axis=0)
    if empty.any():
      notes.append(f"{int(empty.sum())} columns have no number and were left out.")
    if empty.all() and not categorical:
      reason = f". {notes[-1].rstrip('.')}" if notes else ""
      raise base.InputError(f"{name} has no column to learn from{reason}")
    scaler = encoder = None
    if not empty.all():
      scaler = pipeline.make_pipeline(
        impute.SimpleImputer(strategy="median", add_indicator=True),
        preprocessing.StandardScaler(),
      ).fit(numbers)
    if categorical:
      encoder = preprocessing.OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        max_categories=_MAX_CATEGORIES,
        sparse_output=False,
      ).fit(_categories(values, categorical))
    return cls(labels, tuple(categorical), (scaler, encoder))

  def __call__(self, name: str, values: Any) -> np.ndarray:
    """Returns the features of rows, float32 [N, D'].

    Args:
      name: the name of the data, for messages.
      values: numbers or a table, as in `fit`.

    Raises:
      InputError: columns are missing, their number differs, or `values` is not of the
        kind that was passed to `fit`.
    """
    scaler, encoder = self.transforms
    if isinstance(values, dict) != (self.numeric is not None):
      is_table = self.numeric is not None
      form = "a table with the columns of" if is_table else "an array [N, D] like"
      raise base.InputError(f"{name} must be {form} the other data")
    if self.numeric is None:
      numbers = np.asarray(values, np.float64).copy()
      numbers[~(np.abs(numbers) <= _LARGEST)] = np.nan
    else:
      missing = [c for c in (*self.numeric, *self.categorical) if c not in values]
      if missing:
        raise base.InputError(
          f"{name} has no column {missing[0]!r}, which the other data have"
        )
      numbers = _numbers(values, self.numeric)
    blocks = []
    if scaler is not None:
      if numbers.shape[1] != scaler.n_features_in_:
        raise base.InputError(
          f"{name} has {numbers.shape[1]} features, but the other data have"
          f" {scaler.n_features_in_}"
        )
      blocks.append(scaler.transform(numbers))
    if encoder is not None:
      blocks.append(encoder.transform(_categories(values, self.categorical)))
    return np.concatenate(blocks, axis=1).astype(np.float32)


def _sklearn() -> tuple[Any, Any, Any]:
  try:
    from sklearn import impute
    from sklearn import pipeline
    from sklearn import preprocessing
  except ImportError:
    raise base.InputError(
      "rows of numbers and tables need scikit-learn: pip install scikit-learn"
    ) from None
  return impute, pipeline, preprocessing


def _kinds_of_columns(
  table: Mapping[str, np.ndarray], notes: list[str]
) -> tuple[list[str], list[str]]:
  """The names of numeric and categorical columns; appends notes about the others."""
  numeric, categorical = [], []
  for name, column in table.items():
    cells = [c for c in column if c.lower() not in _MISSING]
    different = set(cells)
    strays = [
      c for c in cells if not _NUMBER.fullmatch(c) and not _INFINITY.fullmatch(c)
    ]
    if not cells:
      notes.append(f"The column {name!r} is empty and was left out.")
    elif len(different) == 1 and len(cells) == len(column):
      notes.append(f"The column {name!r} has a single value and was left out.")
    elif len(strays) <= _STRAY_SHARE * len(cells):
      numeric.append(name)
      if strays:
        notes.append(
          f"{len(strays)} values of the column {name!r}, such as {strays[0]!r}, are"
          " not numbers and count as missing."
        )
    elif len(different) > max(_MAX_CATEGORIES, len(cells) // 2):
      notes.append(
        f"The column {name!r} has {len(different)} different texts in {len(cells)} rows"
        " and was left out."
      )
    else:
      categorical.append(name)
      if len(strays) <= len(cells) // 2:
        notes.append(
          f"{len(strays)} of {len(cells)} values of the column {name!r}, such as"
          f" {strays[0]!r}, are not numbers; it was read as {len(different)}"
          " categories."
        )
      elif sum(c[:1].isdigit() for c in strays) > len(cells) // 2:
        notes.append(
          f"The column {name!r} has texts such as {strays[0]!r}, which are not numbers"
          f" with a decimal point, and was read as {len(different)} categories."
        )
  return numeric, categorical


def _numbers(table: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
  def number(cell):
    value = float(cell) if _NUMBER.fullmatch(cell) else np.nan
    return value if abs(value) <= _LARGEST else np.nan

  size = max(map(len, table.values()), default=0)
  columns = [[number(cell) for cell in table[name]] for name in names]
  return np.array(columns, np.float64).reshape(len(names), size).T


def _categories(table: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
  def category(cell):
    return "" if cell.lower() in _MISSING else cell

  return np.array([[category(c) for c in table[n]] for n in names], object).T
