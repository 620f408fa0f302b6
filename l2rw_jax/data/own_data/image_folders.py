"""Folders of images: which files have labels, and how they are decoded."""

from collections.abc import Iterator, Mapping, Sequence
import os
import pathlib
from typing import Any
import unicodedata

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import image_files
from l2rw_jax.data import row_sources
from l2rw_jax.data.own_data import containers
from l2rw_jax.data.own_data import csv_files

# Larger images are shrunk: a small network detects wrong labels equally well in small
# images, in a fraction of the time.
_LARGEST_SIDE = 64
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")
# If a 16-bit file has a 12-bit image, no pixel exceeds this after the conversion to 8
# bits.
_BRIGHTEST_OF_12_BITS = 16
# Folders with these names are parts of a data set, not classes.
_PART_NAMES = frozenset(
  {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
)


def list_images(
  folder: pathlib.Path, split: str | None, labels: str | os.PathLike | None
) -> tuple[containers.Raw, bool]:
  """Lists the images of a folder and their labels; no image is read.

  Args:
    folder: the folder.
    split: "train", "test" or None, as in `reading.read`.
    labels: a CSV file of path,label, or None, as in `reading.read`.

  Returns:
    The paths of the images with their labels, and whether the folder has this split.

  Raises:
    InputError: the folder or the CSV file cannot be read or has an unsupported layout,
      or no image is in a class folder or in the CSV file.
  """
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
  raw = containers.Raw(
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
  """Whether the paths of a list are relative to folder/train, not to the folder.

  This is so in a list that the page of label issues exports for a training set.
  """
  cells = [cell for row in csv_files.read_rows(listing)[:20] for cell in row]
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
      skipped.append((inside.as_posix(), "it is not in a class folder"))
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
  labels = [lower.index(c) for c in csv_files.LABEL_COLUMNS if c in lower]
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
      f"{listing} has the columns {', '.join(names)}; name the column of paths one of"
      f" {', '.join(_PATH_COLUMNS)}, and the column of labels one of"
      f" {', '.join(csv_files.LABEL_COLUMNS)}"
    )
  if len(names) > 2:
    column = f"the column {names[label_at]!r}" if is_header else "the second column"
    notes.append(f"The labels are {column} of {listing.name}.")
  return path_at, label_at, is_header


def _listed(
  folder: pathlib.Path, listing: pathlib.Path, notes: list[str]
) -> tuple[list[pathlib.Path], list[str], list[tuple[str, str]]]:
  """The images in a CSV file of path,label, their labels, and the skipped files."""
  rows = csv_files.read_rows(listing)
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
    if label.lower() in csv_files.MISSING:
      reason = f"{csv_files.reason_without_label(label)} in {listing.name}"
    elif path is None:
      reason = f"there is no such file in {folder}"
    elif path in files:
      reason = f"it is listed twice in {listing.name}; the first label counts"
    if reason:
      skipped.append((csv_files.unquoted(cell).strip(), reason))
    elif path is not None:
      files[path] = csv_files.unquoted(label)
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

  The list may be untrusted, so no path may lead out of the folder. Links inside the
  folder belong to the user and may lead out of it.
  """
  unquoted = csv_files.unquoted(cell)
  stripped = unquoted.strip()
  # The list may come from Windows, or have another Unicode form than the file system.
  slashes = stripped.replace("\\", "/")
  forms = [unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")]
  for name in dict.fromkeys((unquoted, stripped, slashes, *forms)):
    try:
      # Links are not resolved, because their targets may be outside of the folder.
      inside = os.path.relpath(os.path.join(os.path.abspath(folder), name), folder)
      if os.path.isabs(name) and inside.startswith(os.pardir):
        inside = os.path.relpath(os.path.realpath(name), os.path.realpath(folder))
      path = folder / inside
      if os.pardir not in pathlib.PurePath(inside).parts and path.is_file():
        return path
    except (OSError, ValueError):  # The name is too long or has a null character.
      continue
  return None


def decode(
  name: str,
  raw: containers.Raw,
  examples: containers.Raw,
  image_size: int | None,
  like: containers.Form | None,
  in_memory: bool | None,
) -> tuple[containers.Raw, Any]:
  """Reads images at a common size; those that cannot be read are skipped.

  If the images stay on disk, only their headers are read.

  Args:
    name: the name of the data, for messages.
    raw: all examples, as `list_images` returns them; skipped images and notes are
      appended to its lists.
    examples: those of `raw` to read.
    image_size: the height and width, or None, as in `reading.read`.
    like: the form of the other data, or None if there are none.
    in_memory: whether to read the images into memory, as in `reading.read`.

  Returns:
    The examples that could be read, and their images: uint8 [N, H, W, 1 or 3], or a row
    source.

  Raises:
    InputError: no header can be read, `image_size` is not the size of `like`, or `like`
      is not the form of images.
  """
  # The headers of all images in `raw`, not only of those in `examples`, determine the
  # format, so that it is the same for both splits.
  headers = {}
  for example, path in zip(raw.names, raw.values, strict=True):
    try:
      headers[example] = image_files.header(path)
    except ValueError as error:
      raw.skipped.append((str(example), str(error)))
  if not headers:
    raise base.InputError(
      f"{name} has no image that can be read{containers.skipped_suffix(raw)}"
    )
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
  brightest: list[int] = []  # For each image that has more than 8 bits per pixel.
  for row, (example, path) in enumerate(
    zip(examples.names, examples.values, strict=True)
  ):
    if example not in headers:
      continue
    try:
      features[row] = image_files.read(path, size, channels)
      is_good[row] = True
      if headers[example].is_deep:
        brightest.append(int(features[row].max()))
    except ValueError as error:
      raw.skipped.append((str(example), str(error)))
  _note_dark_images(brightest, raw.notes)
  return examples.take(is_good), features if is_good.all() else features[is_good]


def _note_dark_images(brightest: list[int], notes: list[str]) -> None:
  """Appends a note if all images from files of more than 8 bits are nearly black.

  Cameras and scanners often store 10 or 12 bits in 16-bit files.

  Args:
    brightest: the largest value of each of these images, from 0 to 255.
    notes: a list to which the note is appended.
  """
  if brightest and max(brightest) <= _BRIGHTEST_OF_12_BITS:
    notes.append(
      f"{len(brightest)} images have more than 8 bits per pixel, and none of their"
      f" pixels is above {max(brightest)} of 255 after the conversion to 8 bits. If"
      " they have fewer bits (10 or 12), scale their pixels to the range from 0 to"
      " 65535."
    )


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
      f"images that were resized to {width} x {height} pixels: {resized} of"
      f" {len(sizes)} ({description})."
    )
  num_gray = sum(h.is_gray for h in headers.values())
  if 0 < num_gray < len(headers):
    notes.append(
      f"gray images: {num_gray} of {len(headers)}; all were converted to RGB."
    )
  return (height, width), 1 if num_gray == len(headers) else 3
