"""Sources with many classes of few images each, and transformations of sources."""

from collections.abc import Sequence
import os
import pathlib

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import image_files
from l2rw_jax.data import sources

_SUFFIXES = {".jfif", ".jpg", ".jpeg", ".png", ".bmp"}
_OTHER_SUFFIXES = {".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}


def omniglot(
  *,
  size: int = 28,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> sources.Source:
  """Handwritten characters: the splits `small1` and `small2` of TFDS, as one source.

  The two splits share alphabets (Greek and Latin), including the drawings. A
  character that is in both splits is used once, so there are 242 characters with 20
  drawings each. Drawings are converted to gray and resized to `size` by `size`, with
  bright ink on a dark background as in MNIST.

  Args:
    size: width and height of the images, in pixels.
    data_dir: folder of prepared sets, see `sources.load`.
    cache_dir: folder of decoded arrays, see `sources.load`.

  Raises:
    InputError: the set does not exist.
  """
  parts = [
    sources.load("omniglot", split, data_dir=data_dir, cache_dir=cache_dir)
    for split in ("small1", "small2")
  ]
  new = ~np.isin(parts[1].labels, parts[0].labels)
  images = np.concatenate([parts[0].images, parts[1].images[new]])
  labels = np.concatenate([parts[0].labels, parts[1].labels[new]])
  return renumbered(
    parts[0]._replace(
      split="small1+small2",
      images=255 - resized(images, size, 1),
      labels=labels,
      extra={},
    )
  )


def image_folder(root: str | os.PathLike, split: str, *, size: int) -> sources.Source:
  """Images in files root/split/CLASS/FILE, such as those of mini-ImageNet.

  This is the layout of TFDS's `ImageFolder` and of torchvision: one folder for each
  class. Classes are numbered in the order of the folder names. Images in subfolders
  belong to the class, too. Hidden files and folders are left out. Images (JPEG, PNG or
  BMP) are converted to RGB with 8 bits per channel and resized to `size` by `size`.

  Args:
    root: the folder of the data set.
    split: name of the split, such as `train`, `val` or `test`.
    size: width and height of the images, in pixels.

  Returns:
    The split. Its `class_names` are the names of the folders, so that
    `examples.check_sources` detects splits with different classes, and
    `episodes.episodes` detects splits that share classes.

  Raises:
    InputError: `split` is not a plain name, the folder does not exist or has no
      classes, a class has no images, an image is outside of the class folders or has
      another format, or a file cannot be read.
  """
  sources.check_folder_name("the split of an image folder", split)
  folder = pathlib.Path(root).expanduser() / split
  classes = [p for p in _listed(folder) if p.is_dir()]
  if not classes:
    raise base.InputError(
      f"{folder} has no class folders with images, such as {folder}/CLASS/FILE.jpg: set"
      f" --data_dir to the folder that contains {split}."
    )
  outside = [p for p in _listed(folder) if p.suffix.lower() in _SUFFIXES]
  outside = [p for p in outside if not p.is_dir()]
  if outside:
    raise base.InputError(f"{outside[0]} is not in a class folder; move it into one.")
  images, labels = [], []
  for label, class_folder in enumerate(classes):
    files = _images(class_folder)
    if not files:
      suffixes = ", ".join(sorted(_SUFFIXES))
      raise base.InputError(f"{class_folder} contains no image ({suffixes}).")
    images += [_read(file, size) for file in files]
    labels += [label] * len(files)
  name = pathlib.Path(root).expanduser().resolve().name
  return sources.Source(
    name,
    "folder",
    split,
    np.stack(images),
    np.asarray(labels, np.int32),
    len(classes),
    {},
    tuple(class_folder.name for class_folder in classes),
  )


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    # Notebooks and file managers put hidden folders and files next to images.
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise base.InputError(f"{folder} cannot be read: {error.strerror}.") from error


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
  """The images in a folder, followed by those in its subfolders."""
  files, inner = [], []
  for path in _listed(folder):
    if path.is_dir():
      inner += _images(path)
    elif path.suffix.lower() in _SUFFIXES:
      files.append(path)
    elif path.suffix.lower() in _OTHER_SUFFIXES:
      raise base.InputError(
        f"{path} has a format that cannot be read; convert it to PNG or remove it."
      )
  return files + inner


def _read(path: pathlib.Path, size: int) -> np.ndarray:
  from PIL import Image

  try:
    with Image.open(path) as image:
      small = image_files.to_8_bits(image).convert("RGB")
      small = small.resize((size, size), Image.Resampling.BILINEAR)
      return np.asarray(small, np.uint8)
  # A damaged file can raise nearly any error.
  except Exception as error:
    raise base.InputError(f"{path} cannot be read as an image; remove it.") from error


def resized(images: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Resizes uint8 [N, H, W, 1, 3 or 4] to [N, size, size, channels], antialiased.

  Three channels are converted to one by their luminance; one channel is copied to
  three. A fourth channel (transparency) is left out. Images that already have the
  requested shape are returned unchanged.

  Raises:
    InputError: images of another shape do not have 1, 3 or 4 channels, or `channels` is
      not 1 or 3.
  """
  from PIL import Image

  shape = (size, size, channels)
  if images.shape[1:] == shape:
    return images
  if images.shape[-1] not in (1, 3, 4) or channels not in (1, 3):
    raise base.InputError(
      f"images of shape {images.shape[1:]} cannot be resized to {shape}; give gray"
      " images (1 channel) or color images (3 channels)"
    )
  results = np.empty((len(images), *shape), np.uint8)
  for i, pixels in enumerate(images):
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    results[i] = np.asarray(image).reshape(shape)
  return results


def shuffled(source: sources.Source, seed: int) -> sources.Source:
  """The same images with permuted labels, so that classes have no meaning."""
  labels = np.random.default_rng(seed).permutation(source.labels)
  return source._replace(
    name=f"{source.name}+shuffled", labels=labels, class_names=None
  )


def rotated(source: sources.Source) -> sources.Source:
  """Makes four classes from each class, by rotations of 0, 90, 180 and 270 degrees.

  Class c rotated by 90 k degrees becomes class c + k C. Omniglot is extended in this
  way in few-shot learning. Split the classes before you call this function, so that a
  character and its rotations are in the same part.

  Raises:
    InputError: the images are not square.
  """
  height, width = source.images.shape[1:3]
  if height != width:
    raise base.InputError(
      f"the images of {source.name} have {width} x {height} pixels; only square images"
      " can be rotated: crop or resize them, or train without rotations"
    )
  whole = examples_lib.read_rows(source.images, np.arange(len(source.labels)))
  images = [np.rot90(whole, k, axes=(1, 2)) for k in range(4)]
  labels = [source.labels + k * source.num_classes for k in range(4)]
  names = source.class_names or sources.numbers(source.num_classes)
  new_names = [f"{name} turned {90 * k}" for k in (1, 2, 3) for name in names]
  return source._replace(
    name=f"{source.name}+rotated",
    images=np.concatenate(images),
    labels=np.concatenate(labels).astype(np.int32),
    num_classes=4 * source.num_classes,
    class_names=(*names, *new_names),
  )


def renumbered(source: sources.Source) -> sources.Source:
  """Removes classes without images, and numbers the others 0 to C - 1, in order."""
  classes, labels = np.unique(source.labels, return_inverse=True)
  names = source.class_names or sources.numbers(source.num_classes)
  return source._replace(
    labels=labels.astype(np.int32),
    num_classes=len(classes),
    class_names=tuple(names[label] for label in classes),
  )


def split_classes(
  source: sources.Source, sizes: Sequence[int], seed: int
) -> list[sources.Source]:
  """Splits a source into sources without common classes.

  Args:
    source: the source.
    sizes: number of classes in each part; other classes are left out.
    seed: decides to which part each class belongs. Use one seed for all repetitions of
      an experiment; otherwise settings are tested on the classes for which they were
      chosen.

  Raises:
    InputError: the source has fewer classes than the parts need.
  """
  if sum(sizes) > source.num_classes:
    raise base.InputError(
      f"{source.name} has {source.num_classes} classes, fewer than"
      f" {' + '.join(map(str, sizes))}; lower the number of classes of a part."
    )
  order = np.random.default_rng(seed).permutation(source.num_classes)
  parts = []
  for part in np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1]):
    rows = np.flatnonzero(np.isin(source.labels, part))
    names = ",".join(map(str, np.sort(part)))
    chosen = source._replace(
      split=f"{source.split}[{names}]",
      images=source.images[rows],
      labels=source.labels[rows],
    )
    parts.append(renumbered(chosen))
  return parts
