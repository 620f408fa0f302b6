"""Floor 4: sources of many classes with few images each, and what is done to them."""

from collections.abc import Sequence
import os
import pathlib
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import sources

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
_OTHER_SUFFIXES = {".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}


def omniglot(
  *,
  size: int = 28,
  data_dir: str | os.PathLike | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> sources.Source:
  """Handwritten characters: the splits `small1` and `small2` of TFDS, as one source.

  The two share alphabets (Greek and Latin), drawing by drawing; a character that is
  in both is taken once, 242 characters of 20 drawings in all. Drawings become gray,
  `size` by `size`, with bright ink on a dark ground as in MNIST.

  Args:
    size: of the images, in pixels.
    data_dir: as in `sources.load`.
    cache_dir: as in `sources.load`.

  Raises:
    InputError: the set is not there.
  """
  found = [
    sources.load("omniglot", split, data_dir=data_dir, cache_dir=cache_dir)
    for split in ("small1", "small2")
  ]
  new = ~np.isin(found[1].labels, found[0].labels)
  images = np.concatenate([found[0].images, found[1].images[new]])
  labels = np.concatenate([found[0].labels, found[1].labels[new]])
  return renumbered(
    found[0]._replace(
      split="small1+small2",
      images=255 - resized(images, size, 1),
      labels=labels,
      extra={},
    )
  )


def image_folder(root: str | os.PathLike, split: str, *, size: int) -> sources.Source:
  """Images that lie as root/split/CLASS/FILE, such as those of mini-ImageNet.

  The layout of TFDS's `ImageFolder` and of torchvision: one folder a class, in the
  order of their names; images in folders inside it are of that class, too. Images
  (JPEG, PNG or BMP) are made RGB of 8 bits a channel and `size` by `size`.

  Args:
    root: the folder of the data set.
    split: of it, such as `train`, `val` or `test`.
    size: of the images, in pixels.

  Returns:
    The split. Its `class_names` are those of the folders, so that splits with other
    classes are refused where they must have the same ones, as in
    `parts.check_sources`, or different ones, as in `episodes.episodes`.

  Raises:
    InputError: no such folder, no class in it, a class without images, an image
      outside any class or of another format, or a file that cannot be read.
  """
  sources.check_folder_name("the split of an image folder", split)
  folder = pathlib.Path(root).expanduser() / split
  classes = [p for p in _listed(folder) if p.is_dir()]
  if not classes:
    raise base.InputError(
      f"{folder} has no folders of classes: images are looked for as"
      f" {folder}/CLASS/FILE.jpg; point --data_dir at the folder above {split}."
    )
  outside = [p for p in _listed(folder) if p.suffix.lower() in _SUFFIXES]
  outside = [p for p in outside if not p.is_dir()]
  if outside:
    raise base.InputError(f"{outside[0]} is in no class; move it into a class folder.")
  images, labels = [], []
  for label, own in enumerate(classes):
    files = _images(own)
    if not files:
      raise base.InputError(f"{own} holds no image ({', '.join(sorted(_SUFFIXES))}).")
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
    tuple(own.name for own in classes),
  )


def _listed(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    return sorted(folder.iterdir())
  except (FileNotFoundError, NotADirectoryError):
    return []
  except OSError as error:
    raise base.InputError(f"{folder} cannot be read: {error.strerror}.") from error


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
  """The images in a folder and, after them, in the folders inside it."""
  found, inner = [], []
  for path in _listed(folder):
    if path.is_dir():
      inner += _images(path)
    elif path.suffix.lower() in _SUFFIXES:
      found.append(path)
    elif path.suffix.lower() in _OTHER_SUFFIXES:
      raise base.InputError(
        f"{path} is of a format that is not read; convert it to PNG or remove it."
      )
  return found + inner


def _read(path: pathlib.Path, size: int) -> np.ndarray:
  from PIL import Image

  try:
    with Image.open(path) as image:
      small = _of_bytes(image).convert("RGB")
      small = small.resize((size, size), Image.Resampling.BILINEAR)
      return np.asarray(small, np.uint8)
  # Damage shows as nearly any error, by where it hits.
  except Exception as error:
    raise base.InputError(f"{path} cannot be read as an image; remove it.") from error


def _of_bytes(image: Any) -> Any:
  """Scales 16 bits a pixel to 8; Pillow's `convert` would clip them instead."""
  from PIL import Image

  if image.mode.partition(";")[0] != "I":
    return image
  pixels = np.asarray(image).astype(np.float64) / 257  # 65535 / 255
  return Image.fromarray(np.round(np.clip(pixels, 0, 255)).astype(np.uint8))


def resized(images: np.ndarray, size: int, channels: int) -> np.ndarray:
  """uint8 [N, H, W, 1 or 3] to [N, size, size, channels], smoothed when shrunk.

  One channel of three is their luminance, three of one are equal.
  """
  from PIL import Image

  shape = (size, size, channels)
  if images.shape[1:] == shape:
    return images
  found = np.empty((len(images), *shape), np.uint8)
  for i, image in enumerate(images):
    own = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    own = own.convert("L" if channels == 1 else "RGB")
    own = own.resize((size, size), Image.Resampling.BILINEAR)
    found[i] = np.asarray(own).reshape(shape)
  return found


def shuffled(source: sources.Source, seed: int) -> sources.Source:
  """The same images in no classes at all: labels dealt out anew, as many of each."""
  labels = np.random.default_rng(seed).permutation(source.labels)
  return source._replace(
    name=f"{source.name}+shuffled", labels=labels, class_names=None
  )


def rotated(source: sources.Source) -> sources.Source:
  """Four classes of each: its images turned by 0, 90, 180 and 270 degrees.

  Class c turned k times is c + k C, as few-shot learning extends Omniglot. Cut
  classes apart before: a character and its turned self are not two characters.
  """
  turned = [np.rot90(source.images, k, axes=(1, 2)) for k in range(4)]
  labels = [source.labels + k * source.num_classes for k in range(4)]
  given = source.class_names or sources.numbers(source.num_classes)
  names = [*given, *(f"{name} turned {90 * k}" for k in (1, 2, 3) for name in given)]
  return source._replace(
    name=f"{source.name}+rotated",
    images=np.concatenate(turned),
    labels=np.concatenate(labels).astype(np.int32),
    num_classes=4 * source.num_classes,
    class_names=tuple(names),
  )


def renumbered(source: sources.Source) -> sources.Source:
  """The classes that occur, as 0 to C - 1 in their order."""
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
  """Sources without a class in common, of `sizes` classes each.

  Args:
    source: whose classes to deal out.
    sizes: classes of each part.
    seed: which class comes where; make it one for all repetitions of an experiment,
      or classes that settings were chosen on come to be tested on.

  Raises:
    InputError: more classes asked for than there are.
  """
  if sum(sizes) > source.num_classes:
    raise base.InputError(
      f"{source.name} has {source.num_classes} classes, less than"
      f" {' + '.join(map(str, sizes))}; lower the number of classes of a part."
    )
  order = np.random.default_rng(seed).permutation(source.num_classes)
  found = []
  for part in np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1]):
    rows = np.flatnonzero(np.isin(source.labels, part))
    names = ",".join(map(str, np.sort(part)))
    chosen = source._replace(
      split=f"{source.split}[{names}]",
      images=source.images[rows],
      labels=source.labels[rows],
    )
    found.append(renumbered(chosen))
  return found
