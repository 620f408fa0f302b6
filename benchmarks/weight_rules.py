r"""Other ways to use L2RW's scores and its clean examples.

An MLP is trained on images with symmetric noise, with Adam and a cosine schedule. All
runs of a seed have the same data, initial parameters and training batches. The scores
s_i are those of L2RW (`l2rw.example_weights`); rules differ in the weights of a batch:

  clipped      max(s_i, 0) / S, the rule of L2RW
  mask         equal weights for all examples with s_i > 0
  tempered_T   softmax of s_i / (T r), where r is the root mean square of the scores of
               the batch, so that no weight is 0; a large T approaches uniform weights
  growing      clipped; the clean batches have 25, 50, 125 and 200 images in the four
               quarters of the steps, instead of 100
  clean_C      clipped; a step also trains on the clean batch: C times its mean loss is
               added to the weighted loss

Columns:

  validation_percent   accuracy on held-out training images with their true labels, by
                       which a rule should be chosen
  accuracy_percent     accuracy on the test images
  wrong_weight_percent share of the weight on wrong labels in the last tenth of the
                       steps

Command: python -m benchmarks.weight_rules --data_dir=DIR
Results: results/weight_rules.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import report
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag
from l2rw_jax import base
from l2rw_jax import normalization
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import noisy_labels
from l2rw_jax.io import workdir as workdir_lib
from l2rw_jax.methods import l2rw
from l2rw_jax.models import classifier
from l2rw_jax.models import mlp
from l2rw_jax.training import evaluation

_BATCH_SIZE = 100
# Numbers of clean images per step, in consecutive parts of the run that have the same
# length. The mean over a run is 100.
_CONSTANT = (100,)
_GROWING = (25, 50, 125, 200)


def _tempered(temperature: float) -> Callable[[base.Array], base.Array]:
  def weights(scores):
    scale = jnp.sqrt(jnp.mean(scores**2))
    return jax.nn.softmax(scores / (temperature * jnp.where(scale > 0, scale, 1)))

  return weights


class Rule(NamedTuple):
  """A way to use the scores and the clean examples.

  Attributes:
    weights: `scores [B] -> weights [B]`.
    sizes: sizes of the clean batches in consecutive parts of the run.
    clean_factor: factor of the mean loss of the clean batch in the loss of a step.
  """

  weights: Callable[[base.Array], base.Array]
  sizes: tuple[int, ...] = _CONSTANT
  clean_factor: float = 0.0


RULES = {
  "clipped": Rule(normalization.rectify),
  "mask": Rule(normalization.equal_weights),
  "tempered_0.3": Rule(_tempered(0.3)),
  "tempered_1": Rule(_tempered(1.0)),
  "tempered_3": Rule(_tempered(3.0)),
  "growing": Rule(normalization.rectify, _GROWING),
  "clean_0.3": Rule(normalization.rectify, clean_factor=0.3),
  "clean_1": Rule(normalization.rectify, clean_factor=1.0),
}


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.DataFlags, settings_lib.OutputFlags):
  """The flags of this benchmark."""

  dataset: str = flag("mnist")
  fractions: tuple[float, ...] = flag(
    (0.5, 0.7),
    "Fractions of the labels that are wrong.",
    bounds=settings_lib.SHARE,
    group="data",
  )
  methods: tuple[str, ...] = settings_lib.methods_flag(tuple(RULES), RULES)
  num_seeds: int = flag(3)
  num_steps: int = flag(8_850)
  learning_rate: float = flag(0.001, "Initial learning rate of Adam.")
  num_meta: int = flag(100)
  num_validation: int = flag(5_000, "Number of held-out training images.")


def make_trainer(
  problem: base.Problem, rule: Rule, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
  """Returns `(carry, model_state, train, meta, rows, meta_rows) -> (carry, weights)`.

  The carry is the pair of parameters and optimizer state. The rows are [S, B] and
  [S, M] for S steps, and the weights [S, B].
  """

  def train_fn(carry, model_state, train, meta, rows, meta_rows):
    losses_fn = problem.losses_fn(model_state, jax.random.key(0))

    def step_fn(carry, inputs):
      params, opt_state = carry
      batch, meta_batch = (
        jax.tree.map(lambda x, rows=rows: x[rows], part)
        for part, rows in zip((train, meta), inputs, strict=True)
      )
      info = l2rw.example_weights(losses_fn, params, batch, meta_batch, has_aux=True)
      weights = rule.weights(info.scores)

      def loss_fn(params):
        loss = jnp.sum(weights * losses_fn(params, batch)[0])
        if rule.clean_factor:
          loss += rule.clean_factor * jnp.mean(losses_fn(params, meta_batch)[0])
        return loss

      grads = jax.grad(loss_fn)(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), weights

    return jax.lax.scan(step_fn, carry, (rows, meta_rows))

  return jax.jit(train_fn)


def _meta_rows(
  sizes: tuple[int, ...], num_meta: int, num_steps: int, seed: int
) -> list[np.ndarray]:
  """For each part of the run, the clean rows of its steps, distinct in each step."""
  rng = np.random.default_rng([seed, 1])
  parts = np.array_split(np.arange(num_steps), len(sizes))
  return [
    np.stack([rng.permutation(num_meta)[:size] for _ in part]).astype(np.int32)
    for size, part in zip(sizes, parts, strict=True)
    if len(part)
  ]


def make_rows(
  settings: Settings, names: Sequence[str], fraction: float
) -> list[dict[str, Any]]:
  """A row for each rule in `names` and each seed.

  Raises:
    InputError: the data set cannot be read, or there are too few clean images.
  """
  train_source, test_source = settings.load("train"), settings.load("test")
  num_classes = train_source.num_classes
  for name in names:  # Before any of them is trained.
    size = max(RULES[name].sizes)
    if size > num_classes * settings.num_meta:
      raise base.InputError(
        f"--num_meta={settings.num_meta}: {name} takes steps with {size} clean images,"
        f" but there are only {num_classes * settings.num_meta}."
      )
  splits = [
    noisy_labels.noisy_labels(
      *(train_source, test_source),
      builder="bare_symmetric",
      fraction=fraction,
      num_meta_per_class=settings.num_meta,
      num_validation=settings.num_validation,
      seed=seed,
    )
    for seed in range(settings.num_seeds)
  ]
  model = classifier.Classifier(mlp.MLP(num_classes, (256,)), num_classes)
  problem = model.problem(
    class_counts=jnp.ones(num_classes),
    num_examples=len(splits[0].train.label),
    num_steps=settings.num_steps,
  )
  schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps)
  optimizer = optax.adam(schedule)
  rows: list[dict[str, Any]] = []
  for name in names:
    trainer = make_trainer(problem, RULES[name], optimizer)
    for seed, split in enumerate(splits):
      row = {"method": name, "dataset": settings.dataset, "fraction": fraction}
      row |= {"seed": seed, "data": split.fingerprint}
      rows.append(
        row | _train(settings, problem, model, optimizer, trainer, name, split, seed)
      )
    print(summary(rows[-settings.num_seeds :]), flush=True)
  return rows


def _train(settings, problem, model, optimizer, trainer, name, split, seed):
  train, meta = map(examples_lib.as_batch, (split.train, split.meta))
  params, model_state = model.init(jax.random.key(seed), meta)
  num_train, num_steps = len(split.train.label), settings.num_steps
  rng = np.random.default_rng(seed)
  order = rng.integers(num_train, size=(num_steps, _BATCH_SIZE), dtype=np.int32)
  train, meta = jax.device_put((train, meta))
  carry: Any = params, optimizer.init(params)
  weights, start = [], 0
  sizes, num_meta = RULES[name].sizes, len(split.meta.label)
  for meta_rows in _meta_rows(sizes, num_meta, num_steps, seed):
    end = start + len(meta_rows)
    carry, part = trainer(carry, model_state, train, meta, order[start:end], meta_rows)
    weights.append(np.asarray(part))
    start = end
  # The validation images are measured with their true labels.
  validation = split.validation._replace(label=split.validation.true_label)
  result = {}
  for column, part in (("validation", validation), ("accuracy", split.test)):
    predictions = evaluation.predict(
      problem, carry[0], model_state, examples_lib.as_batch(part)
    )
    percent = 100 * evaluation.accuracy(predictions)["accuracy"]
    result[f"{column}_percent"] = round(percent, 2)
  last = slice(-max(1, num_steps // 10), None)
  is_wrong = (split.train.label != split.train.true_label)[order[last]]
  late = np.concatenate(weights)[last]
  wrong_percent = 100 * float((late * is_wrong).sum() / late.sum())
  return {**result, "wrong_weight_percent": round(wrong_percent, 2)}


def summary(rows: list[dict[str, Any]]) -> str:
  """A line with the results of one rule: means and intervals over its seeds."""
  text = f"fraction {rows[0]['fraction']:g} {rows[0]['method']}:"
  for name in ("validation_percent", "accuracy_percent", "wrong_weight_percent"):
    text += f" {name} {report.interval([row[name] for row in rows]):.2f},"
  return text[:-1]


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Trains all networks, prints the results and writes them to a folder.

  Raises:
    InputError: a flag is invalid, or the data cannot be read.
  """
  names = settings_lib.choose("methods", settings.methods, tuple(RULES))
  path, info = pathlib.Path(workdir) / "results.csv", workdir_lib.run_info()
  info |= {
    "num_steps": settings.num_steps,
    "learning_rate": settings.learning_rate,
    "num_meta": settings.num_meta,
    "num_validation": settings.num_validation,
  }
  rows: list[dict[str, Any]] = []
  for fraction in dict.fromkeys(settings.fractions):
    rows += make_rows(settings, names, fraction)
    _rows.write(path, [{**row, **info} for row in rows])
  print(f"\nwritten: {path}")
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "weight_rules")
