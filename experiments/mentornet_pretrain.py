r"""Fits a mentor: the curriculum network that weighs a student's examples.

Paper: Jiang et al., "MentorNet: Learning Data-Driven Curriculum for Very Deep
  Neural Networks on Corrupted Labels" (ICML 2018), MentorNet-PD and -DD.
Command: python -m experiments.mentornet_pretrain --curriculum=pd
  python -m experiments.mentornet_pretrain --curriculum=dd --dump=FILE
  --percentile=90, where FILE is a student's recorded losses. Students load the
  mentor.json it leaves in --workdir.
Device, time: one CPU core, under a minute.
Published: none of the fit itself; of students see results/.
"""

import hashlib
import pathlib
from typing import Any

from absl import flags
import numpy as np

from experiments import _bounds
from experiments import _catalogue
from experiments import _launch
from experiments import _report
from l2rw_jax import base
from l2rw_jax.io import workdir
from l2rw_jax.methods import mentornet
from l2rw_jax.methods.mentornet import fitting as mentornet_fitting
from l2rw_jax.methods.mentornet import loss_dump
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.methods.mentornet import network as mentornet_network

_CURRICULUM = flags.DEFINE_enum(
  "curriculum", "pd", [*mentornet.CURRICULA, "dd"], "What to fit; dd needs --dump."
)
_DUMP = flags.DEFINE_string("dump", None, "Recorded losses of a student, for dd.")
_PERCENTILE = flags.DEFINE_float(
  "percentile",
  75.0,
  "Of all losses in --dump, from 0 to 100; differences are taken from it.",
)
_USE_LABELS = flags.DEFINE_bool(
  "use_labels", False, "dd: shows the labels to the mentor, which then fits their C."
)
_COMPAT = flags.DEFINE_enum(
  "compat",
  "official_code",
  mentornet_network.COMPAT,
  "Whose network, see methods/mentornet_network.py.",
)
_NUM_ROWS = flags.DEFINE_integer(
  "num_rows", 100_000, "Rows of the grid to keep.", lower_bound=2
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 30_000, "Updates.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Rows an update.", lower_bound=1)
_LEARNING_RATE = flags.DEFINE_float(
  "learning_rate", 0.1, "Of Adam, at first.", lower_bound=0.0
)
_RESTARTS = flags.DEFINE_integer(
  "restarts", 8, "Starts, of which the best is kept; released: 1.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of all draws.", lower_bound=0)
flags.declare_key_flag("workdir")

_EPOCHS = (5, 50, 95)
_PERCENTILES_SHOWN = (0.5, 1.5, 3.0)


def make_rows() -> tuple[mentornet_fitting.Rows, int | None]:
  """What to fit, and the classes the mentor will look at (None: no labels)."""
  is_dd, where = _CURRICULUM.value == "dd", f"with --curriculum={_CURRICULUM.value}"
  _bounds.check_used("percentile", is_dd, where)
  _bounds.check_used("num_rows", not is_dd, where)
  if not is_dd:
    for name, given in (("dump", _DUMP.value), ("use_labels", _USE_LABELS.value)):
      if given:
        raise base.InputError(f"--{name} is for --curriculum=dd.")
    rows = mentornet_fitting.pd_rows(
      _CURRICULUM.value, num_rows=_NUM_ROWS.value, seed=_SEED.value
    )
    return rows, None
  if not _DUMP.value:
    raise base.InputError(
      "--curriculum=dd needs --dump=FILE: losses of a student, recorded with"
      " --dump_losses by experiments.mnist_noise or experiments.cifar_noise."
    )
  dump = loss_dump.read_dump(_DUMP.value)
  rows = mentornet_fitting.dd_rows(
    dump.loss,
    dump.label,
    dump.true_label,
    dump.epoch_percent,
    percentile=_PERCENTILE.value,
    use_labels=_USE_LABELS.value,
    seed=_SEED.value,
  )
  num_classes = int(max(dump.label.max(), dump.true_label.max())) + 1
  return rows, num_classes if _USE_LABELS.value else None


def fit_or_load(
  rows: mentornet_fitting.Rows, num_classes: int | None, folder: pathlib.Path
) -> mentornet_network.Mentor:
  """The mentor in the folder, fitted if it is not there yet."""
  path = folder / "mentor.json"
  fitted_to = _fingerprint(rows)
  if path.exists():
    if mentor_file.read(path)["facts"].get("rows") != fitted_to:
      raise base.InputError(
        f"{path} was fitted to other losses than those of --dump={_DUMP.value} now;"
        " choose another --workdir or delete it."
      )
    return mentor_file.load(path)
  network = mentornet_network.MentorNetwork(num_classes or 2, _COMPAT.value)
  variables = mentornet_fitting.fit(
    network,
    mentornet_fitting.split(rows)[0],
    num_steps=_NUM_STEPS.value,
    batch_size=_BATCH_SIZE.value,
    learning_rate=_LEARNING_RATE.value,
    restarts=_RESTARTS.value,
    seed=_SEED.value,
  )
  mentor = mentornet_network.Mentor(_CURRICULUM.value, network, variables, num_classes)
  facts = {"rows": fitted_to, "flags": _launch.flags_of(__name__)}
  mentor_file.save(path, mentor, facts | workdir.run_info())
  return mentor


def _fingerprint(rows):
  digest = hashlib.sha256()
  for column in rows:
    digest.update(np.ascontiguousarray(column).data)
  return digest.hexdigest()[:16]


def table_rows(
  mentor: mentornet_network.Mentor, rows: mentornet_fitting.Rows
) -> list[dict[str, Any]]:
  """A result row for the rows fitted to and one for the others."""
  parts = zip(("train", "test"), mentornet_fitting.split(rows), strict=True)
  return [
    {
      "curriculum": mentor.curriculum,
      "compat": mentor.network.compat,
      "rows": name,
      "num_rows": len(part.losses),
      **mentornet_fitting.imitation_errors(mentor, part),
      "mean_target": float(part.targets.mean()),
      **workdir.run_info(),
    }
    for name, part in parts
  ]


def draw(
  mentor: mentornet_network.Mentor, rows: mentornet_fitting.Rows, path: pathlib.Path
) -> None:
  """Weight against loss, a panel an epoch: learned, and what it was fitted to."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  is_dd = mentor.curriculum == "dd"
  epochs: Any = _EPOCHS
  if is_dd:  # Recorded ones near the start, the middle and the end.
    epochs = np.quantile(np.unique(rows.epochs), (0, 0.5, 1), method="nearest")
  figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True)
  for axis, epoch in zip(axes, epochs, strict=True):
    (_draw_recorded if is_dd else _draw_predefined)(axis, mentor, rows, int(epoch))
    axis.set_title(f"{int(epoch)}% of training")
    axis.set_xlabel("loss")
  axes[0].set_ylabel("weight of an example")
  axes[0].set_ylim(-0.05, 1.05)
  axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
  figure.suptitle(f"Mentor fitted to {mentor.curriculum} ({mentor.network.compat})")
  figure.tight_layout()
  figure.savefig(path, dpi=150, bbox_inches="tight")
  plt.close(figure)


def _draw_predefined(axis, mentor, rows, epoch):
  losses = np.linspace(0, 6, 601, dtype=np.float32)
  labels = np.zeros(len(losses), np.int32)
  wanted = mentornet.CURRICULA[mentor.curriculum]
  for i, percentile in enumerate(_PERCENTILES_SHOWN):
    given = (losses, losses - percentile, labels, epoch)
    name = f"moving percentile {percentile:g}"
    axis.plot(losses, mentor(*given), color=f"C{i}", label=f"learned, {name}")
    axis.plot(losses, wanted(*given), "k--", linewidth=1)
  axis.plot([], [], "k--", linewidth=1, label="the curriculum itself")


def _draw_recorded(axis, mentor, rows, epoch):
  """Learned curve, and the share of right labels among losses of one size."""
  at = rows.epochs == epoch
  percentile = float(np.median(rows.losses - rows.differences))
  top = float(np.quantile(rows.losses, 0.995))
  losses = np.linspace(0, top, 201, dtype=np.float32)
  for label in range(min(mentor.num_classes or 1, 3)):
    labels = np.full(len(losses), label, np.int32)
    weights = mentor(losses, losses - percentile, labels, epoch)
    name = "learned" + (f", label {label}" if mentor.num_classes else "")
    axis.plot(losses, weights, color=f"C{label}", label=name)
  edges = np.linspace(0, top, 21)
  found, _ = np.histogram(rows.losses[at], edges)
  right, _ = np.histogram(rows.losses[at], edges, weights=rows.targets[at])
  seen = found > 0
  centers = (edges[:-1] + edges[1:]) / 2
  name = "share of right labels"
  axis.plot(centers[seen], right[seen] / found[seen], "k.", label=name)
  name = f"percentile {_PERCENTILE.value:g}"
  axis.axvline(percentile, color="0.7", linewidth=1, label=name)


def main() -> None:
  """Fits the mentor if need be, then prints and draws how well it imitates."""
  rows, num_classes = make_rows()
  folder = _launch.prepare("mentornet_pretrain", __name__, ())
  mentor = fit_or_load(rows, num_classes, folder)
  results = table_rows(mentor, rows)
  flags_given = _launch.flags_of(__name__)
  _report.save(folder, results, flags_given)
  draw(mentor, rows, folder / "figure.png")
  print(_catalogue.summary("mentornet_pretrain", results, flags_given))
  print(f"\nwritten: {folder}/mentor.json, results.json, results.csv, figure.png")


if __name__ == "__main__":
  _launch.run(main)
