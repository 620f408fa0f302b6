r"""Fits a mentor: the network that computes the weights of a student's examples.

Paper: Jiang et al., "MentorNet: Learning Data-Driven Curriculum for Very Deep
  Neural Networks on Corrupted Labels" (ICML 2018), MentorNet-PD and -DD.
Command: python -m experiments.mentornet_pretrain --curriculum=pd
  python -m experiments.mentornet_pretrain --curriculum=dd --dump=FILE
  --percentile=90, where FILE has the recorded losses of a student. Students load the
  file mentor.json, which this script writes to --workdir.
Device, time: one CPU core, under a minute.
Published: nothing about the fit itself; for students, see results/.
"""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import fitting as mentornet_fitting
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.methods.mentornet import network as mentornet_network

# A predefined curriculum is drawn at these percentages of the training, and for these
# values of the percentile of the losses.
_EPOCHS = (5, 50, 95)
_LOSSES_AT_PERCENTILE = (0.5, 1.5, 3.0)


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this script."""

  EXTENDABLE = ("dump",)

  curriculum: str = flag(
    "pd",
    "Curriculum to fit; dd is learned from recorded losses and needs --dump.",
    choices=[*mentornet.CURRICULA, "dd"],
    group="method",
  )
  dump: str | None = data_flag(
    None, "File of a student's recorded losses, for --curriculum=dd."
  )
  percentile: float = data_flag(
    75.0,
    "Percentile of all losses in --dump, from 0 to 100, which is subtracted from the"
    " losses.",
    bounds=(0, 100),
  )
  use_labels: bool = flag(
    False,
    "Pass the labels to the mentor of --curriculum=dd, which then applies only to data"
    " with the same number of classes.",
    group="method",
  )
  compat: str = flag(
    "official_code",
    "Network of the released code or of the paper"
    " (l2rw_jax/methods/mentornet/network.py).",
    choices=mentornet_network.COMPAT,
    group="method",
  )
  num_rows: int = data_flag(
    100_000,
    "Number of rows to draw from the grid on which a mentor is fitted to a predefined"
    " curriculum.",
    bounds=(100, 1_200_000),
  )
  num_steps: int = flag(30_000)
  batch_size: int = flag(32, "Number of rows in an update.")
  learning_rate: float = flag(0.1, "Learning rate of Adam at the start.")
  restarts: int = flag(
    8,
    "Number of random starts, of which the best is kept; the released code has 1.",
    bounds=(1, 1000),
  )
  seed: int = flag(0, "Seed of all random draws.", bounds=(0, 2**31 - 1))

  def input_files(self) -> dict[str, str]:
    """The recorded losses."""
    return {"dump": self.dump} if self.dump else {}


TABLE = table.Layout(
  name="mentornet_pretrain",
  title="MentorNet fitted to a curriculum",
  metrics=(
    table.Metric("accuracy", "accuracy %", scale=100),
    table.Metric("mse", "mean squared error", decimals=5),
    table.Metric("num_rows", "number of rows", decimals=0),
  ),
  settings={"compat": "network of {}", "rows": "{} rows"},
  keys=("rows",),
  method=lambda row: row["curriculum"],
  method_heading="curriculum",
  repeat="fit",
  published="Published: nothing. The metrics compare a mentor with its targets.",
)


def make_rows(settings: Settings) -> tuple[mentornet_fitting.Rows, int | None]:
  """Rows to fit, and the number of classes if the mentor uses labels, or else None.

  Raises:
    InputError: a flag is invalid or is not for this curriculum, or the recorded losses
      are missing or invalid.
  """
  is_dd, where = settings.curriculum == "dd", f"with --curriculum={settings.curriculum}"
  settings.check_used("percentile", is_dd, where)
  settings.check_used("num_rows", not is_dd, where)
  if not is_dd:
    for name, given in (("dump", settings.dump), ("use_labels", settings.use_labels)):
      if given:
        raise base.InputError(f"--{name} is for --curriculum=dd: leave it out.")
    rows = mentornet_fitting.pd_rows(
      settings.curriculum, num_rows=settings.num_rows, seed=settings.seed
    )
    return rows, None
  if not settings.dump:
    raise base.InputError(
      "--curriculum=dd needs --dump=FILE: losses of a student, recorded with"
      " --dump_losses by experiments.mnist_noise or experiments.cifar_noise."
    )
  dump = loss_dump.read_dump(settings.dump)
  rows = mentornet_fitting.dd_rows(
    dump.loss,
    dump.label,
    dump.true_label,
    dump.epoch_percent,
    percentile=settings.percentile,
    use_labels=settings.use_labels,
    seed=settings.seed,
  )
  num_classes = int(max(dump.label.max(), dump.true_label.max())) + 1
  return rows, num_classes if settings.use_labels else None


def fit_or_load(
  settings: Settings,
  rows: mentornet_fitting.Rows,
  num_classes: int | None,
  folder: pathlib.Path,
) -> mentornet_network.Mentor:
  """The mentor in the folder, which is fitted if it does not exist.

  Raises:
    InputError: the mentor in the folder was fitted to other rows or cannot be read, or
      the fit diverged.
  """
  path = folder / "mentor.json"
  fitted_to = _fingerprint(rows)
  if path.exists():
    if mentor_file.read(path)["facts"].get("rows") != fitted_to:
      source = f"--curriculum={settings.curriculum}"
      source = f"--dump={settings.dump}" if settings.dump else source
      raise base.InputError(
        f"{path} was fitted to other rows than those of {source}: choose another"
        " --workdir, or delete this file."
      )
    return mentor_file.load(path)
  network = mentornet_network.MentorNetwork(num_classes or 2, settings.compat)
  variables = mentornet_fitting.fit(
    network,
    mentornet_fitting.split(rows)[0],
    num_steps=settings.num_steps,
    batch_size=settings.batch_size,
    learning_rate=settings.learning_rate,
    restarts=settings.restarts,
    seed=settings.seed,
  )
  mentor = mentornet_network.Mentor(
    settings.curriculum, network, variables, num_classes
  )
  facts = {"rows": fitted_to, "flags": settings.record()}
  mentor_file.save(path, mentor, facts | workdir_lib.run_info())
  return mentor


def _fingerprint(rows):
  digest = hashlib.sha256()
  for column in rows:
    digest.update(np.ascontiguousarray(column).data)
  return digest.hexdigest()[:16]


def table_rows(
  mentor: mentornet_network.Mentor, rows: mentornet_fitting.Rows
) -> list[dict[str, Any]]:
  """One result row for the training rows, and one for the held-out rows."""
  parts = zip(("train", "test"), mentornet_fitting.split(rows), strict=True)
  return [
    {
      "curriculum": mentor.curriculum,
      "compat": mentor.network.compat,
      "rows": name,
      "num_rows": len(part.losses),
      **mentornet_fitting.imitation_errors(mentor, part),
      "mean_target": float(part.targets.mean()),
      **workdir_lib.run_info(),
    }
    for name, part in parts
  ]


def draw(
  mentor: mentornet_network.Mentor,
  rows: mentornet_fitting.Rows,
  percentile: float,
  path: pathlib.Path,
) -> None:
  """Draws the learned and the target weights against the loss.

  There is a panel for each of three points of the training.
  """
  is_dd = mentor.curriculum == "dd"
  epochs: Any = _EPOCHS
  if is_dd:  # Show recorded epochs near the start, the middle and the end.
    epochs = np.quantile(np.unique(rows.epochs), (0, 0.5, 1), method="nearest")
  options = {"figsize": (10, 3.2), "sharey": True, "tight": True}
  with figures.figure(path, 1, 3, **options) as (figure, axes):
    for axis, epoch in zip(axes, epochs, strict=True):
      if is_dd:
        _draw_recorded(axis, mentor, rows, int(epoch), percentile)
      else:
        _draw_predefined(axis, mentor, int(epoch))
      axis.set_title(f"{int(epoch)}% of training")
      axis.set_xlabel("loss")
    axes[0].set_ylabel("weight of an example")
    axes[0].set_ylim(-0.05, 1.05)
    figures.legend_at_right(axes[-1])
    figure.suptitle(f"Mentor fitted to {mentor.curriculum} ({mentor.network.compat})")


def _draw_predefined(axis, mentor, epoch):
  losses = np.linspace(0, 6, 601, dtype=np.float32)
  labels = np.zeros(len(losses), np.int32)
  wanted = mentornet.CURRICULA[mentor.curriculum]
  for i, loss_at_percentile in enumerate(_LOSSES_AT_PERCENTILE):
    given = (losses, losses - loss_at_percentile, labels, epoch)
    name = f"percentile at loss {loss_at_percentile:g}"
    axis.plot(losses, mentor(*given), color=f"C{i}", label=f"learned, {name}")
    axis.plot(losses, wanted(*given), "k--", linewidth=1)
  axis.plot([], [], "k--", linewidth=1, label="the curriculum itself")


def _draw_recorded(axis, mentor, rows, epoch, percentile):
  """Draws the learned curve, and the share of correct labels by loss."""
  at = rows.epochs == epoch
  loss_at_percentile = float(np.median(rows.losses - rows.differences))
  top = float(np.quantile(rows.losses, 0.995))
  losses = np.linspace(0, top, 201, dtype=np.float32)
  for label in range(min(mentor.num_classes or 1, 3)):
    labels = np.full(len(losses), label, np.int32)
    weights = mentor(losses, losses - loss_at_percentile, labels, epoch)
    name = "learned" + (f", label {label}" if mentor.num_classes else "")
    axis.plot(losses, weights, color=f"C{label}", label=name)
  edges = np.linspace(0, top, 21)
  count, _ = np.histogram(rows.losses[at], edges)
  right, _ = np.histogram(rows.losses[at], edges, weights=rows.targets[at])
  present = count > 0
  centers = (edges[:-1] + edges[1:]) / 2
  name = "share of correct labels"
  axis.plot(centers[present], right[present] / count[present], "k.", label=name)
  name = f"percentile {percentile:g}"
  axis.axvline(loss_at_percentile, color="0.7", linewidth=1, label=name)


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Fits the mentor if it does not exist, prints its errors, and draws its weights.

  Raises:
    InputError: a flag is invalid, or the training rows cannot be read or are too few.
  """
  rows, num_classes = make_rows(settings)
  if settings.batch_size > len(mentornet_fitting.split(rows)[0].losses):
    raise base.InputError(
      "--batch_size is larger than the number of training rows: lower it."
    )
  folder = runner.open_folder(settings, TABLE.name, workdir)
  mentor = fit_or_load(settings, rows, num_classes, folder)
  draw(mentor, rows, settings.percentile, folder / "figure.png")
  results = table_rows(mentor, rows)
  return runner.report(settings, TABLE, folder, results, before=["mentor.json"])


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
