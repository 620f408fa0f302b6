r"""A small language model on text with corrupted documents.

A GPT is trained on the sources of Python's standard library, byte by byte. 30% of the
training documents are corrupted: one third of these are shuffled bytes, one third are
English prose, and one third are random bytes. A few documents are known to be clean,
and L2RW and Meta-Weight-Net use them to weight the others. Both methods are compared
with uniform weights, with training without the documents that have a large loss, with
training on the clean documents alone, with fine-tuning on the clean documents, and with
uniform training that stops at the lowest loss on the clean documents.
Command: python -m experiments.lm_reweight
Device, time: 2 CPU cores, 10 minutes with --num_steps=400 --num_seeds=2.
Published: no comparable number. Measured: results/lm_reweight.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.lib import curves as curves_lib
from experiments.lib import figures
from experiments.lib import launch
from experiments.lib import optimizers
from experiments.lib import registries
from experiments.lib import report
from experiments.lib import runner
from experiments.lib import settings as settings_lib
from experiments.lib.settings import data_flag, flag, methods_flag
from experiments.tables import table
from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import text_documents
from l2rw_jax.methods import l2rw
from l2rw_jax.methods import mentornet
from l2rw_jax.methods import meta_weight_net
from l2rw_jax.models import gpt
from l2rw_jax.models import language_model
from l2rw_jax.training import evaluation
from l2rw_jax.training import results as results_lib

METHODS = (
  *("uniform", "small_loss", "clean_only", "fine_tuning", "fine_tuning_restarted"),
  *("early_stopped", "l2rw", "meta_weight_net"),
)
# Width of an attention head.
_HEAD = 16


@dataclasses.dataclass(frozen=True)
class Settings(registries.MemoryFlags, settings_lib.TrainingFlags):
  """The flags of this script."""

  EXTENDABLE = ("methods", "num_seeds")

  methods: tuple[str, ...] = methods_flag(METHODS, METHODS)
  num_train: int = flag(4000, "Number of training documents.")
  num_meta: int = flag(64, "Number of clean documents.", bounds=(1, 10**8))
  num_test: int = data_flag(500, "Number of clean test documents.", bounds=(1, 10**8))
  length: int = data_flag(
    64, "Number of bytes that are predicted in a document.", bounds=(1, 65_536)
  )
  corrupted: float = data_flag(
    0.3, "Share of corrupted documents.", bounds=settings_lib.SHARE
  )
  width: int = flag(
    64,
    f"Width of the network (features of each byte), a multiple of {_HEAD}, which is the"
    " width of an attention head.",
    bounds=(_HEAD, 8192),
  )
  depth: int = flag(2, "Number of transformer blocks.", bounds=(1, 1000))
  scan: bool = flag(
    False, "Compile the blocks as one lax.scan over stacked parameters."
  )
  remat: bool = flag(
    False, "Recompute activations in the backward pass instead of storing them."
  )
  bfloat16: bool = flag(False, "Use bfloat16 in the computations of the network.")
  num_steps: int = flag(2000)
  batch_size: int = flag(32)
  meta_batch_size: int | None = flag(32)
  eval_every: int = flag(50)
  learning_rate: float = flag(
    0.003, "Initial learning rate of AdamW; it decays to 0 on a cosine schedule."
  )
  lookahead_learning_rate: float = flag(0.1, methods=("meta_weight_net",))
  num_seeds: int = flag(3)


TABLE = table.Layout(
  name="lm_reweight",
  title="A language model on text with corrupted documents",
  metrics=(
    table.Metric("bits_per_byte", "bits per byte, clean test", decimals=3),
    table.Metric("bits_in_uniform_time", "bits per byte in uniform's time", decimals=3),
    table.Metric("recovered_percent", "corrupted documents detected %", decimals=1),
    table.Metric("shuffled_percent", "shuffled documents detected %", decimals=1),
    table.Metric("english_percent", "English documents detected %", decimals=1),
    table.Metric("random_percent", "random documents detected %", decimals=1),
    table.Metric("seconds", "seconds", decimals=0),
  ),
  settings={
    "num_train": "{:,} documents",
    "corrupted": "{:.0%} corrupted",
    "num_meta": "{} clean documents",
    "num_steps": "{:,} steps",
  },
  published="Published: nothing; the problem is this project's.",
)


def make_method(name: str, settings: Settings) -> base.Method:
  """The `Method` for a name in `--methods`."""
  methods = {
    # This method knows the share of corrupted documents. It begins to select after 9%
    # of the run.
    "small_loss": lambda: mentornet.mentornet(
      mentornet.self_paced, percentile=100 * (1 - settings.corrupted), burn_in=10
    ),
    "l2rw": lambda: l2rw.l2rw(microbatch_size=settings.microbatch_size),
    "meta_weight_net": lambda: meta_weight_net.meta_weight_net(
      settings.lookahead_learning_rate,
      microbatch_size=settings.microbatch_size,
      recompute=settings.mwn_recompute,
    ),
  }
  return registries.simple_method(name, settings.num_steps, methods)


def make_splits(settings: Settings, seeds: Sequence[int]) -> list[examples_lib.Splits]:
  """The documents of some seeds."""
  texts = text_documents.standard_library()
  return [
    text_documents.corrupted_documents(
      texts,
      length=settings.length,
      num_train=settings.num_train,
      num_meta=settings.num_meta,
      num_test=settings.num_test,
      fraction=settings.corrupted,
      seed=seed,
    )
    for seed in seeds
  ]


def make_model(settings: Settings) -> language_model.LanguageModel:
  """The network of the flags; InputError if --width is not a multiple of 16."""
  if settings.width % _HEAD:
    raise base.InputError(f"--width={settings.width} must be a multiple of {_HEAD}.")
  vocabulary = text_documents.VOCABULARY
  network = gpt.GPT(
    vocabulary,
    settings.width,
    settings.depth,
    num_heads=settings.width // _HEAD,
    scan=settings.scan,
    remat=settings.remat,
    dtype="bfloat16" if settings.bfloat16 else "float32",
  )
  return language_model.LanguageModel(network, vocabulary)


@functools.cache  # The training loop compiles again for a new function.
def make_optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW, applied to gradients that are clipped by their global norm."""
  return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def make_cells(settings: Settings) -> list[runner.Cell]:
  """A cell for every method, whose seeds are trained one after the other.

  Raises:
    InputError: a method is unknown.
  """
  names = settings_lib.choose("methods", settings.methods, METHODS)
  config = settings.config()
  splits, model = functools.partial(make_splits, settings), make_model(settings)
  cosine = optimizers.OptimizerConfig("adam", settings.learning_rate, cosine=True)
  num_steps = settings.num_steps
  return [
    runner.Cell(
      name,
      {},
      config,
      model,
      make_method(name, settings),
      make_optimizer(cosine.for_method(name, num_steps).schedule(num_steps)),
      splits,
      folder=f"{name}/seed-{{first}}",
      side_by_side=1,
    )
    for name in names
  ]


def suspicion(
  name: str,
  model: language_model.LanguageModel,
  train: examples_lib.Examples,
  result: results_lib.Result,
) -> np.ndarray | None:
  """A number for each training document that is higher if the method rejects it, [N].

  The number is the share of steps in which the document had weight zero, or minus its
  mean weight if the method gives no zero weights. For uniform training, it is the loss
  of the trained network. The result is None for clean_only, early_stopped and the
  methods of fine-tuning.
  """
  if name == "uniform":
    problem = model.problem(
      class_counts=jnp.zeros(model.num_classes),
      num_examples=len(train.label),
      num_steps=result.metrics["num_steps"],
    )
    batch = examples_lib.as_batch(train)
    return evaluation.predict(problem, result.params, result.model_state, batch).losses
  if name == "meta_weight_net":
    return -result.weights["mean_weight"]
  if name in ("l2rw", "small_loss"):
    return report.rejected_share(result.weights)
  return None


def recovered(values: np.ndarray | None, kinds: np.ndarray) -> dict[str, float | None]:
  """Percentages of corrupted documents that are among the k most suspicious ones.

  k is the number of corrupted documents.

  Args:
    values: suspicion of each document, [N], NaN if it was never seen; None if the
      method does not rank the documents.
    kinds: kinds of the documents, indices into `text_documents.KINDS`, [N].

  Returns:
    The percentage of all corrupted documents ("recovered_percent") and that of each
    kind of corruption, such as "shuffled_percent"; None where it is undefined.
  """
  is_wrong = kinds != 0
  names = {"recovered": is_wrong}
  names |= {kind: kinds == i for i, kind in enumerate(text_documents.KINDS) if i}
  if values is None or not is_wrong.any():
    return {f"{name}_percent": None for name in names}
  # A stable sort of the negative values keeps equal values in the order of the
  # documents, which does not depend on their kind.
  ranked = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
  is_flagged = np.zeros(len(kinds), bool)
  is_flagged[ranked[: is_wrong.sum()]] = True
  return {
    f"{name}_percent": 100 * float(is_flagged[members].mean())
    if members.any()
    else None
    for name, members in names.items()
  }


def draw(
  rows: runner.Rows,
  curves: dict[str, list[curves_lib.Curve]],
  path: pathlib.Path,
  title: str,
) -> None:
  """Draws bits per byte against seconds, and the share of detected documents.

  The second panel is left out if no method ranks the documents or none is corrupted.
  """
  ranked = [row for row in rows if row["recovered_percent"] is not None]
  panels = 1 + bool(ranked)
  size = (5.5 * panels, 4)
  with figures.figure(path, 1, panels, figsize=size, squeeze=False) as (drawn, axes):
    drawn.suptitle(title, fontsize=10)
    left = axes[0, 0]
    for color, (name, runs) in enumerate(curves.items()):
      for number, curve in enumerate(runs):
        label = name.replace("_", " ") if not number else None
        left.plot(
          curve.seconds, curve.values, color=f"C{color}", lw=1.2, alpha=0.8, label=label
        )
    # Training on the clean documents alone memorizes them within seconds. Its curve is
    # far above all others.
    best = min(np.nanmin(curve.values) for runs in curves.values() for curve in runs)
    left.set_ylim(0.95 * best, 2 * best)
    left.set_xlabel("seconds of training")
    left.set_ylabel("bits per byte of clean test documents")
    left.set_title("A line for each seed", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    if ranked:
      _draw_recovered(axes[0, 1], report.grouped(ranked, "method"))


def _draw_recovered(right: Any, by_method: dict[str, runner.Rows]) -> None:
  percents = {
    "all" if kind == "recovered" else kind: [
      # A seed without documents of this kind has no percentage, which is not 0.
      [p for row in rows if (p := row[f"{kind}_percent"]) is not None]
      for rows in by_method.values()
    ]
    for kind in ("recovered", *text_documents.KINDS[1:])
  }
  names = [name.replace("_", "\n") for name in by_method]
  figures.grouped_bars(right, percents, names)
  right.set_ylim(0, 100)
  right.set_ylabel("detected documents (%)")
  right.set_title("Among the k most suspicious; k are corrupted", fontsize=10)
  right.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def run(settings: Settings, workdir: runner.Folder) -> runner.Rows:
  """Trains the runs that are missing, and prints and writes the comparison.

  Raises:
    InputError: a flag is invalid, or a test loss is not finite at the end.
  """
  cells = make_cells(settings)
  splits = make_splits(settings, settings.seeds)
  for cell in cells:
    runner.check_data(cell.config, cell.method, splits[0])
  folder = runner.open_folder(settings, TABLE.name, workdir)
  rows: runner.Rows = []
  curves: dict[str, list[curves_lib.Curve]] = {}
  for cell in cells:
    results = runner.train(settings, cell, folder)
    curves[cell.method_name] = []
    for split, result in zip(splits, results, strict=True):
      seed = result.metrics["seed"]
      run_folder = folder / cell.folder.format(first=seed)
      curve = curves_lib.read(run_folder, seed, "loss")
      curve = curve._replace(values=curve.values / math.log(2))  # Nats to bits.
      if not math.isfinite(curve.values[-1]):
        where = f"{cell.method_name}, seed {seed}"
        raise base.InputError(
          f"{where}: the test loss is not finite at the end. Lower --learning_rate and"
          " choose another --workdir, or leave the method out of --methods."
        )
      curves[cell.method_name].append(curve)
      values = suspicion(cell.method_name, make_model(settings), split.train, result)
      rows.append(
        {
          "method": cell.method_name,
          # For early_stopped, this is the value at the chosen step.
          "bits_per_byte": result.metrics["last"]["loss"] / math.log(2),  # From nats.
          "bits_in_uniform_time": None,
          **recovered(values, np.asarray(split.train.group)),
          "seconds": float(curve.seconds[-1]),
          **report.run_fields(result.metrics),
        }
      )
  uniform_seconds = {
    row["seed"]: row["seconds"] for row in rows if row["method"] == "uniform"
  }
  for row in rows:
    # The curve of early_stopped is that of uniform training.
    if row["seed"] in uniform_seconds and row["method"] != "early_stopped":
      curve = curves[row["method"]][settings.seeds.index(row["seed"])]
      limit = uniform_seconds[row["seed"]]
      value = float(curve.at(limit))  # NaN before the first evaluation.
      row["bits_in_uniform_time"] = value if math.isfinite(value) else None
  title = (
    f"{settings.num_train:,} documents, {settings.corrupted:.0%} corrupted,"
    f" {settings.num_meta} clean ones, {settings.num_steps:,} steps"
  )
  draw(rows, curves, folder / "figure.png", title)
  return runner.report(
    settings, TABLE, folder, rows, methods=(METHODS, settings.methods)
  )


if __name__ == "__main__":
  launch.main(Settings, run, TABLE.name)
