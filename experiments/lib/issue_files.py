"""Writes a ranking of labels to issues.csv and issues.html, and summarizes it."""

import codecs
from collections.abc import Iterator
import csv
import dataclasses
import io
import pathlib

import numpy as np

from l2rw_jax import audit
from l2rw_jax.audit import page
from l2rw_jax.data import image_files
from l2rw_jax.data import own_data
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib

# Largest height and width of a picture in issues.html, in pixels.
_THUMBNAIL = 112


def as_own_data(
  source: sources.Source,
  rows: np.ndarray | None = None,
  labels: np.ndarray | None = None,
) -> own_data.OwnData:
  """Converts a named data set to the form of a user's data.

  Args:
    source: the data set.
    rows: rows to take, [N]; None takes all.
    labels: labels of these rows, [N]; those of the data set if None.
  """
  rows = np.arange(len(source.labels)) if rows is None else rows
  features = source.images[rows]
  class_names = source.class_names or sources.numbers(source.num_classes)
  pixels = own_data.pixels_of(features) if features.ndim > 2 else None
  return own_data.OwnData(
    features=features,
    labels=source.labels[rows] if labels is None else labels,
    form=own_data.Form(class_names, features.shape[1:], pixels=pixels),
    names=tuple(f"row {row}" for row in rows),
    rows=rows,
    columns={},
    skipped=(),
    notes=(),
    duplicate_of=own_data.duplicates(features),
  )


def take(
  data: own_data.OwnData, rows: np.ndarray, labels: np.ndarray
) -> own_data.OwnData:
  """Some examples of a user's data, with their names and rows in the user's files.

  Args:
    data: the data.
    rows: positions in `data`, [N].
    labels: labels of these examples, [N].
  """
  features = data.features[rows]
  return dataclasses.replace(
    data,
    features=features,
    labels=labels,
    names=tuple(data.names[row] for row in rows),
    rows=data.rows[rows],
    columns={name: [x[row] for row in rows] for name, x in data.columns.items()},
    duplicate_of=own_data.duplicates(features),
  )


def csv_text(
  data: own_data.OwnData, issues: audit.LabelIssues, names: tuple[str, ...]
) -> str:
  """The content of issues.csv: a row for each example, the most suspicious first.

  Args:
    data: the examples.
    issues: the ranking of the examples.
    names: name of each example, for the column "path" of image files.
  """
  key = "path" if data.root is not None else "index"
  statistics = {k: v for k, v in issues.statistics.items() if v.ndim == 1}
  rows = np.arange(len(issues.index))
  p = issues.statistics["mean_probabilities"]
  statistics["probability_given"] = p[rows, issues.given]
  statistics["probability_suggested"] = p[rows, issues.suggested]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(
    [key, "given", "suggested", "score", "is_issue", "duplicate_of", *statistics]
  )
  classes = [own_data.csv_cell(name) for name in data.form.class_names]

  def name_of(row):
    return own_data.csv_cell(names[row]) if key == "path" else int(data.rows[row])

  for rank, row in enumerate(issues.index.tolist()):
    copy = int(data.duplicate_of[row])
    writer.writerow(
      [
        name_of(row),
        classes[issues.given[rank]],
        classes[issues.suggested[rank]],
        _number(issues.score[rank]),
        bool(issues.is_issue[rank]),
        "" if copy < 0 else name_of(copy),
        *(_number(column[rank]) for column in statistics.values()),
      ]
    )
  return text.getvalue()


def _number(value: float) -> str:
  return f"{value:.6g}" if np.isfinite(value) else ""


def pictures(data: own_data.OwnData, rows: list[int]) -> Iterator[bytes]:
  """Yields the bytes of a PNG file for each row; b"" if the examples are not images."""
  for row in rows:
    image = None
    if data.root is not None:
      try:
        image = image_files.read(
          data.root / data.names[row],
          (_THUMBNAIL, _THUMBNAIL),
          3,
          keep_aspect_ratio=True,
        )
      except ValueError:  # The file has been removed or changed since it was decoded.
        image = data.features[row]
    elif data.features.ndim == 4:
      image = data.features[row]
    yield b"" if image is None else _png(image)


def _png(image: np.ndarray) -> bytes:
  from PIL import Image

  pixels = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
  if pixels.dtype != np.uint8:
    low, high = float(pixels.min()), float(pixels.max())
    pixels = (255 * (pixels - low) / ((high - low) or 1)).round().astype(np.uint8)
  thumbnail = Image.fromarray(pixels)
  thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
  file = io.BytesIO()
  thumbnail.save(file, "PNG", optimize=True)
  return file.getvalue()


def write(
  folder: pathlib.Path,
  data: own_data.OwnData,
  issues: audit.LabelIssues,
  *,
  name: str,
  num_pictures: int,
) -> None:
  """Writes issues.csv and issues.html.

  Args:
    folder: the folder for both files.
    data: the examples.
    issues: the ranking of the examples.
    name: name of the data, for the title of the page.
    num_pictures: number of examples, the most suspicious first, that the page shows
      with their pictures or columns.
  """
  # A file name may contain bytes that are not UTF-8; they are written unchanged.
  table = csv_text(data, issues, data.names).encode("utf-8", "surrogateescape")
  # Without this mark, Excel does not read the file as UTF-8.
  mark = b"" if table.isascii() else codecs.BOM_UTF8
  workdir_lib.write_bytes(folder / "issues.csv", mark + table)
  worst = issues.index[:num_pictures].tolist()
  notes = [
    *notes_on_chance(issues),
    *own_data.report(data),
    *(f"Skipped: {name}: {reason}" for name, reason in data.skipped),
  ]
  html = page.build(
    issues,
    data.form.class_names,
    data.names,
    title=f"Label issues in {name}",
    key="path" if data.root is not None else "index",
    rows=data.rows,
    pictures=list(pictures(data, worst)),
    columns={k: [v[row] for row in worst] for k, v in data.columns.items()},
    duplicate_of=data.duplicate_of.tolist(),
    notes=notes,
  )
  workdir_lib.write_text(folder / "issues.html", html)


def notes_on_chance(issues: audit.LabelIssues) -> list[str]:
  """A note if the network has not learned the classes, or nothing.

  The statistic is the share of examples whose most likely class is the given label,
  averaged over the classes. There is a note unless this share is at least two standard
  errors above that of random predictions, or there is only one class.
  """
  sizes = issues.confusion.sum(axis=0)
  is_present = sizes > 0
  sizes, number = sizes[is_present], int(is_present.sum())
  share = (np.diag(issues.confusion)[is_present] / sizes).mean()
  chance = 1 / number
  error = np.sqrt(chance * (1 - chance) * (1 / sizes).sum()) / number
  if number < 2 or share >= chance + 2 * error:
    return []
  return [
    f"The network agrees with {share:.0%} of the labels of a class on average, and"
    f" chance with {chance:.0%}: it has not learned the classes, so the ranking and the"
    " number of wrong labels mean nothing. Train longer, or use other features."
  ]


def summary(data: own_data.OwnData, issues: audit.LabelIssues) -> str:
  """The text to print: the number of issues and at most five of them, worst first."""
  size = len(data.labels)
  lines = [
    f"{issues.num_issues} of {size} labels"
    f" ({issues.num_issues / size:.1%}) are estimated to be wrong."
  ]
  names = data.form.class_names
  for rank in range(min(5, issues.num_issues)):
    lines.append(
      f"  {data.names[issues.index[rank]]}: given {names[issues.given[rank]]},"
      f" suggested {names[issues.suggested[rank]]}, score {issues.score[rank]:.2f}"
    )
  return "\n".join([*lines, *notes_on_chance(issues)])
