r"""Finds wrong labels in your data: writes a ranked list, and a page to correct them.

One small network is trained once on the labels as they are. Its predictions for each
example during training rank the labels by how suspicious they are.
Command, one of:
  python -m experiments.find_label_issues --images=FOLDER    # FOLDER/CLASS/FILE
  python -m experiments.find_label_issues --images=FOLDER --labels=labels.csv
  python -m experiments.find_label_issues --npz=FILE         # arrays X and y
  python -m experiments.find_label_issues --csv=FILE --label_column=NAME
  python -m experiments.find_label_issues --dataset=digits   # or a prepared TFDS set
Device, time: one CPU core, one to four minutes for 10,000 images of 28 x 28 pixels.
The script writes issues.csv, issues.html (a page for the browser that works offline)
and the trained network to --workdir.
"""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib import issue_files
from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib import trusted as trusted_lib
from experiments.lib.settings import data_flag, flag
from l2rw_jax import audit
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import own_data
from l2rw_jax.methods import baselines
from l2rw_jax.methods import l2rw
from l2rw_jax.models import augmentation
from l2rw_jax.models import classifier
from l2rw_jax.models import lenet
from l2rw_jax.models import mlp
from l2rw_jax.models import random_patches
from l2rw_jax.training import config as config_lib
from l2rw_jax.training import loop

_NAME = "find_label_issues"
_TRUSTED_BATCH = 100


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.Settings):
  """The flags of this script."""

  SEVERAL_PROCESSES = False

  # This flag changes what is written, not how the network is trained.
  EXTENDABLE = ("num_pictures",)

  images: str | None = data_flag(
    None, "Folder of images: one subfolder for each class, or any layout with --labels."
  )
  labels: str | None = data_flag(
    None,
    "CSV file with lines path,label for --images.",
    unset="FOLDER/labels.csv, if there is one",
  )
  npz: str | None = data_flag(None, "NumPy archive with the arrays X and y.")
  csv: str | None = data_flag(None, "CSV file with a header.")
  label_column: str | None = data_flag(
    None,
    "Column of the labels in --csv, and in a CSV file of --trusted unless that is"
    " csv:FILE#NAME.",
    unset="a column called label, labels, class, target or y, or otherwise the last",
  )
  dataset: str | None = flag(None)
  split: str | None = data_flag(
    None,
    "Split of --dataset, such as test or train[:10000]; for digits, train or test.",
    unset="train",
  )
  trusted: str | None = data_flag(
    None,
    "Examples with labels that you trust, as images:DIR, npz:FILE or csv:FILE. With"
    " them, issues.csv also has the scores of L2RW, which do not change the ranking.",
  )
  image_size: int | None = data_flag(
    None,
    "Height and width to which --images are resized.",
    unset="their most frequent size, with no side above 64",
    bounds=(4, 1024),
  )
  num_epochs: int | None = flag(
    None, unset="10 for tables, and 20, 15 or 10 for images, by their number"
  )
  batch_size: int | None = flag(None, unset="100, and fewer for small data")
  learning_rate: float = flag(1e-3, "Learning rate of Adam.")
  seed: int = flag(
    0, "Seed of the network and of the order of the examples.", bounds=(0, 2**31 - 1)
  )
  num_pictures: int = flag(
    500,
    "Number of examples, the most suspicious first, whose pictures or columns are in"
    " issues.html.",
    bounds=(0, 10**5),
    group="output",
  )

  @property
  def source_name(self) -> str:
    """The data set that the flags name, such as images:DIR.

    Raises:
      InputError: the flags name no data set, or several.
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

  @property
  def title(self) -> str:
    """The name of the data set for the title of the page, without its folder."""
    if not own_data.is_own(self.source_name):
      return self.source_name
    place = self.source_name.partition(":")[2]
    return pathlib.Path(place).expanduser().resolve().name


@dataclasses.dataclass(frozen=True)
class Standardize:
  """Standardizes images of any scale and type to mean 0 and deviation 1.

  Attributes:
    mean: mean over all pixels of some training images.
    std: standard deviation over these pixels, or 1 if it is 0.
  """

  mean: float
  std: float

  def __call__(self, images: base.Array, keys: Any, train: bool) -> base.Array:
    """Maps images [B, ...] to float32 of the same shape."""
    del keys, train
    return augmentation.normalize(images.astype(jnp.float32), (self.mean,), (self.std,))


def read_data(settings: Settings) -> own_data.OwnData:
  """The examples to audit.

  Raises:
    InputError: the flags name no data set, or several; the data cannot be read; or a
      flag does not apply to them.
  """
  name = settings.source_name
  kind = name.partition(":")[0] if own_data.is_own(name) else "dataset"
  kinds = {
    **{"labels": "images", "image_size": "images"},
    **{"label_column": "csv", "split": "dataset"},
  }
  for flag_name, needed in kinds.items():
    if getattr(settings, flag_name) is not None and kind != needed:
      # --dataset may also name a user's data.
      wanted = "a named data set" if needed == "dataset" else f"--{needed}"
      raise base.InputError(f"--{flag_name} is for {wanted}: leave it out.")
  if own_data.is_own(name):
    return own_data.read(
      name,
      labels=settings.labels,
      label_column=settings.label_column,
      image_size=settings.image_size,
    )
  split = settings.split or "train"
  if name == "digits" and split not in ("train", "test"):
    raise base.InputError(f"--split={split}: digits has the splits train and test.")
  return issue_files.as_own_data(settings.load(split))


def read_trusted(settings: Settings, data: own_data.OwnData) -> own_data.OwnData | None:
  """The examples of --trusted, in the format of `data`, or None.

  Raises:
    InputError: the examples cannot be read, or do not match `data`.
  """
  if settings.trusted is None:
    return None
  kind, _, place = settings.trusted.partition(":")
  # csv:FILE#NAME names its own column.
  has_column = "#" in place and not pathlib.Path(place).expanduser().exists()
  label_column = None if kind != "csv" or has_column else settings.label_column
  with settings_lib.naming("trusted", settings.trusted):
    examples = own_data.read(
      settings.trusted, label_column=label_column, like=data.form
    )
  trusted_lib.show_report(settings.trusted, examples)
  return examples


def prepare(
  data: own_data.OwnData, trusted: own_data.OwnData | None
) -> tuple[own_data.OwnData, own_data.OwnData | None]:
  """The examples in the form that the network takes: color images become features.

  On 9,950 images of CIFAR-10 with human labels, an audit with an MLP on the features
  takes 7 to 8 seconds and has an AUROC of 0.82 to 0.83
  (results/label_issues/cifar10_n).
  """
  shape = data.features.shape
  is_color = len(shape) == 4 and shape[-1] == 3 and data.features.dtype == np.uint8
  if not is_color or min(shape[1:3]) < random_patches.LEAST_SIDE:
    return data, trusted
  make_features, features = random_patches.fit(data.features)
  if trusted is not None:
    trusted = dataclasses.replace(trusted, features=make_features(trusted.features))
  return dataclasses.replace(data, features=features), trusted


def make_config(
  settings: Settings, data: own_data.OwnData, trusted: own_data.OwnData | None
) -> config_lib.Config:
  """The configuration of the run, with fewer epochs for more examples."""
  size = len(data.labels)
  batch_size = settings.batch_size or min(size, 100, max(8, size // 13))
  # A network memorizes a table sooner than the same number of images.
  is_table = data.features.ndim != 4
  default = 10 if is_table or size >= 5000 else 15 if size >= 1000 else 20
  num_epochs = settings.num_epochs or default
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
  statistics = {
    name: values
    for name, values in result.statistics.items()
    # The ranking needs the probabilities, even if all of them are 1/C.
    if values.ndim > 1 or _varies(values)
  }
  return audit.find_label_issues(statistics, data.labels)


def _varies(statistic: np.ndarray) -> bool:
  """Whether a statistic differs between examples, unlike uniform weights."""
  known = statistic[np.isfinite(statistic)]
  return known.size > 0 and bool(np.ptp(known) > 0)


def make_model(data: own_data.OwnData) -> classifier.Classifier:
  """A small CNN for images, and an MLP for rows and for features of color images."""
  num_classes = len(data.form.class_names)
  if data.features.ndim != 4:
    return classifier.Classifier(mlp.MLP(num_classes), num_classes)
  # The order of the examples may have a period, so they are drawn at random.
  rows = np.random.default_rng(0).permutation(len(data.features))[:1000]
  pixels = data.features[np.sort(rows)].astype(np.float64)
  scale = Standardize(float(pixels.mean()), float(pixels.std()) or 1.0)
  return classifier.Classifier(lenet.LeNet(num_classes), num_classes, scale)


def run(settings: Settings, workdir: runner.Folder) -> audit.LabelIssues:
  """Reads the data, trains, and writes the list and the page; returns the ranking."""
  data = read_data(settings)
  settings_lib.show_report(settings.source_name, data)
  trusted = read_trusted(settings, data)
  prepared, trusted = prepare(data, trusted)
  config = make_config(settings, data, trusted)
  # All examples are trained on, and the trusted examples are the meta set.
  splits = examples_lib.from_arrays(
    (prepared.features, prepared.labels),
    meta=None if trusted is None else (trusted.features, trusted.labels),
    num_classes=len(data.form.class_names),
  )
  # Training is plain; with trusted examples, the scores of L2RW are also recorded.
  plain = baselines.uniform() if trusted is None else l2rw.l2rw(reweight=False)
  method = audit.recording(plain)
  # The data are checked before anything is written.
  config_lib.check(config, method, [splits])
  folder = runner.open_folder(settings, _NAME, workdir)
  issues = train(settings, config, method, prepared, splits, folder)
  issue_files.write(
    folder, data, issues, name=settings.title, num_pictures=settings.num_pictures
  )
  print(settings_lib.printable(issue_files.summary(data, issues)))
  print(f"\nwritten: {folder}/issues.csv, {folder}/issues.html (open it in a browser)")
  return issues


if __name__ == "__main__":
  launch.main(Settings, run, _NAME)
