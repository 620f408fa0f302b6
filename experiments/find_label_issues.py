r"""Which labels of your data are wrong: a ranked list, and a page to correct them.

One small network is trained once on the labels as they are. What it predicts on the
way for each example ranks the labels by how suspicious they are.
Command, one of:
  python -m experiments.find_label_issues --images=FOLDER    # FOLDER/CLASS/FILE
  python -m experiments.find_label_issues --images=FOLDER --labels=labels.csv
  python -m experiments.find_label_issues --npz=FILE         # arrays X and y
  python -m experiments.find_label_issues --csv=FILE --label_column=NAME
  python -m experiments.find_label_issues --dataset=digits   # or a prepared TFDS set
Device, time: one CPU core, one to four minutes for 10,000 images of 28 x 28 pixels.
Writes issues.csv and issues.html (open it in a browser: it needs no network) to
--workdir, and the trained network.
"""

from collections.abc import Iterator
import csv
import dataclasses
import io
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib import launch
from experiments.lib import own_data as own_data_lib
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax.audit import page
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import image_files
from l2rw_jax.data import own_data
from l2rw_jax.data import sources
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop

_NAME = "find_label_issues"
_THUMBNAIL = 112
_TRUSTED_BATCH = 100


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of this script."""

  SEVERAL_PROCESSES = False

  # It changes what is written, not how the network is trained.
  EXTENDABLE = ("num_pictures",)

  images: str | None = flag(
    None, "Folder of images, with one folder for each class.", group="data"
  )
  labels: str | None = flag(
    None,
    "CSV file of path,label for --images.",
    unset="FOLDER/labels.csv, if there is one",
    group="data",
  )
  npz: str | None = flag(None, "NumPy archive with the arrays X and y.", group="data")
  csv: str | None = flag(None, "CSV file with a header.", group="data")
  label_column: str | None = flag(
    None,
    "Column of the labels in --csv.",
    unset="one called label, labels, class, target or y, else the last",
    group="data",
  )
  dataset: str | None = flag(None)
  trusted: str | None = flag(
    None,
    "Examples with labels that you trust, as images:DIR, npz:FILE or csv:FILE. They add"
    " the scores of L2RW to the statistics.",
    group="data",
  )
  image_size: int | None = flag(
    None,
    "Height and width to which --images are resized.",
    unset="their most frequent size, with no side above 64",
    bounds=settings_lib.Bounds(4, 1024),
    group="data",
  )
  num_epochs: int | None = flag(None, unset="20, 15 or 10: fewer for more examples")
  batch_size: int | None = flag(None, unset="100, and less for small data")
  learning_rate: float = flag(1e-3, "Learning rate of Adam.")
  seed: int = flag(
    0,
    "Seed of the network and of the order of the examples.",
    bounds=settings_lib.Bounds(0, 2**31 - 1),
  )
  num_pictures: int = flag(
    500,
    "Number of pictures or rows in issues.html, of the most suspicious examples.",
    bounds=settings_lib.Bounds(0, 10**5),
    group="output",
  )

  @property
  def source_name(self) -> str:
    """The one data set that the flags name, such as images:DIR.

    Raises:
      InputError: the flags name none, or several.
    """
    names = [n for n in ("images", "npz", "csv", "dataset") if getattr(self, n)]
    if len(names) != 1:
      raise base.InputError(
        "give exactly one of --images=FOLDER, --npz=FILE, --csv=FILE and"
        f" --dataset=NAME; got {' and '.join(f'--{n}' for n in names) or 'none'}."
      )
    (kind,) = names
    value = getattr(self, kind)
    return value if kind == "dataset" else f"{kind}:{value}"


@dataclasses.dataclass(frozen=True)
class Standardize:
  """Features to mean 0 and deviation 1, whatever their scale and dtype.

  Attributes:
    mean: over the training examples.
    std: likewise, not 0.
  """

  mean: float
  std: float

  def __call__(self, images: base.Array, keys: Any, train: bool) -> base.Array:
    """Images [B, ...] to float32 of the same shape."""
    del keys, train
    return augmentation.normalize(images.astype(jnp.float32), (self.mean,), (self.std,))


def read_data(settings: Settings) -> own_data.OwnData:
  """The examples to audit.

  Raises:
    InputError: the data cannot be read, or a flag is for other data.
  """
  name = settings.source_name
  kind = name.partition(":")[0]
  kinds = {"labels": "images", "image_size": "images", "label_column": "csv"}
  for flag_name, needed in kinds.items():
    if getattr(settings, flag_name) is not None and kind != needed:
      raise base.InputError(f"--{flag_name} is for --{needed}: leave it out.")
  if own_data.is_own(name):
    return own_data.read(
      name,
      labels=settings.labels,
      label_column=settings.label_column,
      image_size=settings.image_size,
    )
  source = settings.load("train")
  class_names = source.class_names or sources.numbers(source.num_classes)
  return own_data.OwnData(
    features=source.images,
    labels=source.labels,
    form=own_data.Form(class_names, source.images.shape[1:]),
    names=tuple(f"row {row}" for row in range(len(source.labels))),
    rows=np.arange(len(source.labels)),
    columns={},
    skipped=(),
    notes=(),
    duplicate_of=own_data.duplicates(source.images),
  )


def read_trusted(settings: Settings, data: own_data.OwnData) -> own_data.OwnData | None:
  """The examples of --trusted, in the form of `data`."""
  if settings.trusted is None:
    return None
  return own_data.read(
    settings.trusted, label_column=settings.label_column, like=data.form
  )


def make_splits(
  data: own_data.OwnData, trusted: own_data.OwnData | None
) -> examples_lib.Splits:
  """Everything is trained on; trusted examples are the meta set."""
  return examples_lib.from_arrays(
    (data.features, data.labels),
    meta=None if trusted is None else (trusted.features, trusted.labels),
    num_classes=len(data.form.class_names),
  )


def make_config(
  settings: Settings, data: own_data.OwnData, trusted: own_data.OwnData | None
) -> config_lib.Config:
  """How long to train: fewer epochs for more examples."""
  size = len(data.labels)
  batch_size = settings.batch_size or min(size, 100, max(8, size // 13))
  num_epochs = settings.num_epochs or (20 if size < 1000 else 15 if size < 5000 else 10)
  num_steps = num_epochs * max(1, size // batch_size)
  return settings.config(
    num_steps=num_steps,
    batch_size=batch_size,
    meta_batch_size=None
    if trusted is None
    else min(len(trusted.labels), _TRUSTED_BATCH),
    seeds=(settings.seed,),
    eval_every=num_steps,
  )


def train(
  settings: Settings,
  config: config_lib.Config,
  method: base.Method,
  data: own_data.OwnData,
  splits: examples_lib.Splits,
  folder: pathlib.Path,
) -> audit.LabelIssues:
  """Trains the network, or reads the finished run, and ranks the labels."""
  optimizer = optax.adam(settings.learning_rate)
  (result,) = loop.train(
    config, make_model(data), method, optimizer, [splits], folder, name=_NAME
  )
  statistics = {k: x for k, x in result.statistics.items() if _varies(x)}
  return audit.find_label_issues(statistics, data.labels)


def _varies(statistic: np.ndarray) -> bool:
  """Whether a statistic differs between examples; that of plain weights does not."""
  known = statistic[np.isfinite(statistic)]
  return known.size > 0 and bool(np.ptp(known) > 0)


def make_method(is_scored: bool) -> base.Method:
  """Plain training, which also reports the scores of L2RW if there are trusted ones."""
  return l2rw.l2rw(reweight=False) if is_scored else baselines.uniform()


def make_model(data: own_data.OwnData) -> classifier.Classifier:
  """A small CNN for images, an MLP for rows."""
  num_classes = len(data.form.class_names)
  if data.features.ndim != 4:
    return classifier.Classifier(mlp.MLP(num_classes), num_classes)
  pixels = data.features[:: max(1, len(data.features) // 1000)].astype(np.float64)
  scale = Standardize(float(pixels.mean()), float(pixels.std()) or 1.0)
  return classifier.Classifier(lenet.LeNet(num_classes), num_classes, scale)


# -- what is written ---------------------------------------------------------


def csv_text(
  data: own_data.OwnData, issues: audit.LabelIssues, names: tuple[str, ...]
) -> str:
  """The content of issues.csv: a line an example, the most suspicious first."""
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
  for rank, row in enumerate(issues.index.tolist()):
    copy = int(data.duplicate_of[row])
    writer.writerow(
      [
        own_data.csv_cell(names[row]) if key == "path" else int(data.rows[row]),
        classes[issues.given[rank]],
        classes[issues.suggested[rank]],
        _number(issues.score[rank]),
        bool(issues.is_issue[rank]),
        ""
        if copy < 0
        else own_data.csv_cell(names[copy])
        if key == "path"
        else int(data.rows[copy]),
        *(_number(column[rank]) for column in statistics.values()),
      ]
    )
  return text.getvalue()


def _number(value: float) -> str:
  return f"{value:.6g}" if np.isfinite(value) else ""


def pictures(data: own_data.OwnData, rows: list[int]) -> Iterator[bytes]:
  """PNG files of some examples; none for rows of numbers."""
  for row in rows:
    image = None
    if data.root is not None:
      try:
        image = image_files.read(
          data.root / data.names[row], (_THUMBNAIL, _THUMBNAIL), 3, keep_shape=True
        )
      except ValueError:  # Removed since it was decoded.
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
  made = Image.fromarray(pixels)
  made.thumbnail((_THUMBNAIL, _THUMBNAIL))
  file = io.BytesIO()
  made.save(file, "PNG", optimize=True)
  return file.getvalue()


def write(
  settings: Settings,
  data: own_data.OwnData,
  issues: audit.LabelIssues,
  folder: pathlib.Path,
) -> None:
  """Writes issues.csv and issues.html."""
  # A file name may hold bytes that are no UTF-8; they are written as they are.
  table = csv_text(data, issues, data.names).encode("utf-8", "surrogateescape")
  workdir_lib.write_bytes(folder / "issues.csv", table)
  worst = issues.index[: settings.num_pictures].tolist()
  notes = [
    *own_data.report(data),
    *(f"Skipped: {name}: {reason}" for name, reason in data.skipped),
  ]
  html = page.build(
    issues,
    data.form.class_names,
    data.names,
    title=f"Label issues in {pathlib.PurePath(settings.source_name).name}",
    key="path" if data.root is not None else "index",
    rows=data.rows,
    pictures=list(pictures(data, worst)),
    columns={k: [v[row] for row in worst] for k, v in data.columns.items()},
    duplicate_of=data.duplicate_of.tolist(),
    notes=notes,
  )
  workdir_lib.write_text(folder / "issues.html", html)


def summary(data: own_data.OwnData, issues: audit.LabelIssues) -> str:
  """What is printed: the number of issues and the worst five."""
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
  return "\n".join(lines)


def run(settings: Settings, workdir: runner.Folder) -> audit.LabelIssues:
  """Reads the data, trains, and writes the list and the page; returns the ranking."""
  data = read_data(settings)
  own_data_lib.show_report(settings.source_name, data)
  trusted = read_trusted(settings, data)
  config, splits = make_config(settings, data, trusted), make_splits(data, trusted)
  method = audit.recording(make_method(trusted is not None))
  # Mistakes show before anything is written.
  config_lib.check(config, method, [splits])
  folder = runner.open_folder(settings, _NAME, workdir)
  issues = train(settings, config, method, data, splits, folder)
  write(settings, data, issues, folder)
  print(own_data_lib.printable(summary(data, issues)))
  print(f"\nwritten: {folder}/issues.csv, {folder}/issues.html (open it in a browser)")
  return issues


if __name__ == "__main__":
  launch.main(Settings, run, _NAME)
