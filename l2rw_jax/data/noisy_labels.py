"""Data sets with wrong labels: named kinds of label noise, and their splits.

`noisy_labels` makes the splits, and `BUILDERS` names the kinds of noise. The meaning of
`fraction` depends on the builder. For C balanced classes, the expected share of wrong
labels is:

| builder                  | share of wrong labels                            |
|--------------------------|--------------------------------------------------|
| `uniform_flip`           | fraction, exactly; official_code: fraction (1 - 1/C) |
| `background_flip`        | fraction (1 - 1/C)                               |
| `bare_symmetric`         | fraction                                         |
| `bare_class_conditional` | fraction / 2: 5 of the 10 classes are affected   |
| `mwn_uniform`            | fraction (1 - 1/C): the true class may be drawn  |
| `mwn_flip`, `mwn_flip2`  | fraction                                         |
| `human`                  | that of the annotators; there is no fraction     |

References:
  `uniform_flip`, `background_flip`: Ren et al., ICML 2018 (L2RW).
  `bare_*`: Patel, Sastry, WACV 2023 (BARE).
  `mwn_*`: Shu et al., NeurIPS 2019 (Meta-Weight-Net), released code.
  `human`: Wei et al., "Learning with Noisy Labels Revisited: A Study Using
  Real-World Human Annotations", ICLR 2022 (CIFAR-10N); its labels are licensed
  CC BY-NC 4.0.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib
from l2rw_jax.data import label_noise
from l2rw_jax.data import sources

# Maps a true class to the class with which it is confused, by data set.
CLASS_CONDITIONAL = {
  "mnist": {7: 1, 2: 7, 3: 8, 5: 6, 6: 5},
  # truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
  "cifar10": {9: 1, 2: 0, 3: 5, 5: 3, 4: 7},
}
CLASS_CONDITIONAL["cifar10_n"] = CLASS_CONDITIONAL["cifar10"]

# Maps the name of a set of human labels to its field in TFDS's cifar10_n.
ANNOTATIONS = {
  "aggre": "aggre_label",
  "worst": "worse_label",
  "random1": "random_label1",
  "random2": "random_label2",
  "random3": "random_label3",
}

# (source rows [n], generator) -> noisy labels of these rows, int32 [n].
Relabeling = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def noisy_labels(
  train: sources.Source,
  test: sources.Source,
  *,
  builder: str,
  fraction: float | None = None,
  num_meta_per_class: int,
  num_validation: int = 0,
  seed: int,
  variant: str = "paper",
  annotation: str | None = None,
  trusted: sources.Source | None = None,
) -> examples_lib.Splits:
  """Splits with label noise in train and validation, and clean meta and test sets.

  First the meta set is drawn, with the same number of images of every class. Then the
  validation set is drawn from the other images, and the remaining images are the
  training set. The sets are therefore disjoint for every seed, unlike in several
  released programs, in which the training set contains the meta set. Noise is added to
  the training and validation sets separately, with the same background class or
  transition matrix. If the builder flips an exact number of labels, the number is exact
  in both sets. The meta set does not depend on `fraction` or `num_validation`.

  Args:
    train: the source of the training, meta and validation sets; N images.
    test: the source whose images are all used as the test set.
    builder: the kind of noise, one of `BUILDERS`; see the table in this module's
      docstring.
    fraction: the builder's parameter, in [0, 1]. None for `human`.
    num_meta_per_class: number of meta images of every class.
    num_validation: number of validation images.
    seed: seed of all draws, at least 0.
    variant: variant of the builder, `"paper"` or `"official_code"`. The `bare_`
      builders, `mwn_uniform` and `human` have only one.
    annotation: the set of human labels, one of `ANNOTATIONS`; for `human` only.
    trusted: a source that becomes the whole meta set; `num_meta_per_class` must then
      be 0.

  Returns:
    The splits.

  Raises:
    InputError: an argument is out of range, the sources do not match, the builder does
      not support the data set, a class has too few images, or no image is left to train
      on.

  References:
    Ren et al., "Learning to Reweight Examples for Robust Deep Learning"
    (https://arxiv.org/abs/1803.09050), 2018, CIFAR noisy label experiments. The
    authors' program draws its meta set at random, not balanced.
  """
  examples_lib.check_sources(train, test)
  examples_lib.check_sizes(
    num_meta_per_class=num_meta_per_class, num_validation=num_validation
  )
  if trusted is not None:
    examples_lib.check_trusted(train, trusted, num_meta_per_class)
  meta_rng, rows_rng, shared_rng, *noise_rngs = examples_lib.generators(seed, 5)
  request = Request(train, fraction, variant, annotation, shared_rng)
  relabel = make_relabeling(builder, request)
  meta = _per_class(train, num_meta_per_class, meta_rng)
  rest = np.setdiff1d(np.arange(len(train.labels)), meta)
  if len(rest) <= num_validation:
    raise base.InputError(
      f"nothing is left to train on: {train.name} {train.split} has"
      f" {len(train.labels)} images, num_meta_per_class={num_meta_per_class} takes"
      f" {len(meta)} and num_validation={num_validation}; lower one of them"
    )
  rest = rows_rng.permutation(rest)
  rows = {"train": rest[num_validation:], "validation": rest[:num_validation]}
  labels = train.labels.copy()
  for part, rng in zip(rows.values(), noise_rngs, strict=True):
    labels[part] = relabel(part, rng)
  splits = examples_lib.assemble(
    train,
    test,
    {**rows, "meta": meta, "test": np.arange(len(test.labels))},
    labels=labels,
    true_labels=train.labels,
    test_labels=test.labels,
    num_classes=train.num_classes,
  )
  return splits if trusted is None else examples_lib.with_meta(splits, trusted)


def _per_class(
  source: sources.Source, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Rows of `size` random images of every class, int [C size]."""
  rows = [np.zeros(0, np.int64)]
  pools = base.rows_by_class(source.labels, np.arange(source.num_classes))
  for label, pool in enumerate(pools):
    if len(pool) < size:
      raise base.InputError(
        f"{sources.class_of(source, label)} has {len(pool)} images in {source.name}"
        f" {source.split}; the meta set needs {size}: lower num_meta_per_class"
      )
    rows.append(rng.choice(pool, size, replace=False))
  return np.concatenate(rows)


class Request(NamedTuple):
  """Arguments of a builder.

  Attributes:
    source: the source whose labels get noise.
    fraction: the builder's parameter, in [0, 1]; None for `human`.
    variant: `"paper"` or `"official_code"`.
    annotation: one of `ANNOTATIONS` for `human`; None for all other builders.
    rng: the generator that draws the background class or the flip targets, which all
      parts share.
  """

  source: sources.Source
  fraction: float | None
  variant: str
  annotation: str | None
  rng: np.random.Generator


def make_relabeling(builder: str, request: Request) -> Relabeling:
  """Label noise of the given kind, which several parts of one source can share.

  Args:
    builder: one of `BUILDERS`.
    request: its arguments.

  Returns:
    A function `(rows, rng) -> labels` that gives the noisy labels of some rows of
    the source.

  Raises:
    InputError: the builder is unknown, or an argument is not valid for the builder or
      the data set.
  """
  if builder not in _BUILDERS:
    raise base.InputError(
      f"builder must be one of {', '.join(BUILDERS)}; got {builder!r}"
    )
  _check(builder, request)
  return _BUILDERS[builder](request)


def _check(builder: str, request: Request) -> None:
  if request.variant not in label_noise.VARIANTS:
    raise base.InputError(
      f"variant must be one of {label_noise.VARIANTS}; got {request.variant!r}"
    )
  if builder == "human":
    if request.fraction is not None:
      raise base.InputError(
        "the builder human has no fraction (the annotators determine how many labels"
        f" are wrong); got {request.fraction}: leave it out"
      )
    return
  if request.annotation is not None:
    raise base.InputError(
      f"annotation={request.annotation!r} is for the builder human only; leave it out"
      f" with {builder}"
    )
  if request.fraction is None:
    raise base.InputError(f"the builder {builder} needs a fraction, such as 0.4")
  label_noise.check_share("fraction", request.fraction)


def _uniform_flip(request: Request) -> Relabeling:
  return _relabel_with(
    request, functools.partial(label_noise.uniform_flip, **_flip_options(request))
  )


def _background_flip(request: Request) -> Relabeling:
  background = label_noise.draw_background(
    request.source.num_classes, rng=request.rng, variant=request.variant
  )
  change = functools.partial(
    label_noise.background_flip, background=background, **_flip_options(request)
  )
  return _relabel_with(request, change)


def _flip_options(request: Request) -> dict[str, Any]:
  return {
    "fraction": request.fraction,
    "num_classes": request.source.num_classes,
    "variant": request.variant,
  }


def _bare_symmetric(request: Request) -> Relabeling:
  return _resample_with(
    request, label_noise.symmetric_matrix(*_classes_and_rate(request))
  )


def _bare_class_conditional(request: Request) -> Relabeling:
  name = request.source.name
  if name not in CLASS_CONDITIONAL:
    raise base.InputError(
      "the builder bare_class_conditional is defined only for"
      f" {', '.join(CLASS_CONDITIONAL)}; choose another builder for {name}"
    )
  pairs = CLASS_CONDITIONAL[name]
  return _resample_with(
    request, label_noise.pair_matrix(*_classes_and_rate(request), pairs)
  )


def _mwn_uniform(request: Request) -> Relabeling:
  return _resample_with(
    request, label_noise.uniform_matrix(*_classes_and_rate(request))
  )


def _mwn_flip(request: Request, num_targets: int) -> Relabeling:
  """Each class flips to `num_targets` classes; `variant` selects the seed of the draw.

  "paper" draws the targets with the seed of the split. "official_code" always draws
  them with seed 1 of NumPy's legacy generator, so that every seed of an experiment
  uses the authors' matrix.
  """
  official = request.variant == "official_code"
  rng = np.random.RandomState(1) if official else request.rng
  matrix = label_noise.flip_matrix(
    *_classes_and_rate(request), num_targets=num_targets, rng=rng
  )
  return _resample_with(request, matrix)


def _human(request: Request) -> Relabeling:
  """Labels by human annotators, from TFDS's cifar10_n."""
  if request.annotation not in ANNOTATIONS:
    raise base.InputError(
      f"annotation must be one of {', '.join(ANNOTATIONS)} with the builder human; got"
      f" {request.annotation!r}"
    )
  field, source = ANNOTATIONS[request.annotation], request.source
  if field not in source.extra:
    raise base.InputError(
      f"{source.name} has no human labels {field!r}; the builder human needs the data"
      " set cifar10_n"
    )
  labels = label_noise.check_labels(
    f"human labels {field} of {source.name} {source.split}",
    source.extra[field],
    source.num_classes,
  )
  return lambda rows, rng: labels[rows]


def _classes_and_rate(request: Request) -> tuple[int, float]:
  assert request.fraction is not None  # Checked by `_check`.
  return request.source.num_classes, request.fraction


def _resample_with(request: Request, matrix: np.ndarray) -> Relabeling:
  return _relabel_with(request, functools.partial(label_noise.resample, matrix=matrix))


def _relabel_with(request: Request, change: Callable[..., np.ndarray]) -> Relabeling:
  labels = request.source.labels
  return lambda rows, rng: change(labels[rows], rng=rng)


_BUILDERS: dict[str, Callable[[Request], Relabeling]] = {
  "uniform_flip": _uniform_flip,
  "background_flip": _background_flip,
  "bare_symmetric": _bare_symmetric,
  "bare_class_conditional": _bare_class_conditional,
  "mwn_uniform": _mwn_uniform,
  "mwn_flip": functools.partial(_mwn_flip, num_targets=1),
  "mwn_flip2": functools.partial(_mwn_flip, num_targets=2),
  "human": _human,
}
BUILDERS = tuple(_BUILDERS)
