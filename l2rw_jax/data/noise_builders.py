"""Floor 4: every way to make a source's labels wrong, by name.

What "40%" (`fraction`) truly flips, in expectation, for C balanced classes:

| builder                  | truly wrong labels                               |
|--------------------------|--------------------------------------------------|
| `uniform_flip`           | fraction, exactly; official_code fraction (1 - 1/C) |
| `background_flip`        | fraction (1 - 1/C)                               |
| `bare_symmetric`         | fraction                                         |
| `bare_class_conditional` | fraction / 2: 5 of the 10 classes are affected   |
| `mwn_uniform`            | fraction (1 - 1/C): the true class may be drawn  |
| `mwn_flip`, `mwn_flip2`  | fraction                                         |
| `human`                  | what people got wrong; takes no fraction         |

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
from typing import NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import label_noise
from l2rw_jax.data import sources

# The true class -> the class it is mistaken for.
CLASS_CONDITIONAL = {
  "mnist": {7: 1, 2: 7, 3: 8, 5: 6, 6: 5},
  # truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
  "cifar10": {9: 1, 2: 0, 3: 5, 5: 3, 4: 7},
}
CLASS_CONDITIONAL["cifar10_n"] = CLASS_CONDITIONAL["cifar10"]

# Our name of each set of human labels -> its field in TFDS's cifar10_n.
ANNOTATIONS = {
  "aggre": "aggre_label",
  "worst": "worse_label",
  "random1": "random_label1",
  "random2": "random_label2",
  "random3": "random_label3",
}

# (source rows [n], generator) -> their wrong labels, int32 [n].
Flip = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Request(NamedTuple):
  """What a builder is asked for.

  Attributes:
    source: whose labels to make wrong.
    fraction: the builder's own parameter, in [0, 1]; None for `human`.
    variant: `"paper"` or `"official_code"`.
    annotation: of `ANNOTATIONS`; None for all but `human`.
    rng: draws what all parts share: the background class, the flip targets.
  """

  source: sources.Source
  fraction: float | None
  variant: str
  annotation: str | None
  rng: np.random.Generator


def flip(builder: str, request: Request) -> Flip:
  """The noise of that name, for several parts of one source to share.

  Args:
    builder: one of `BUILDERS`.
    request: its settings.

  Returns:
    `(rows, rng) -> labels` of those rows of the source.

  Raises:
    InputError: an unknown name, or settings that do not fit the builder or the
      data set.
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
        "the builder human takes no fraction (people decided how many labels are"
        f" wrong); leave it out instead of {request.fraction}"
      )
    return
  if request.annotation is not None:
    raise base.InputError(
      f"annotation={request.annotation!r} is for the builder human only; leave it out"
      f" with {builder}"
    )
  if request.fraction is None:
    raise base.InputError(f"the builder {builder} needs a fraction, such as 0.4")


def _uniform_flip(request: Request) -> Flip:
  return _of_labels(
    request, functools.partial(label_noise.uniform_flip, **_l2rw(request))
  )


def _background_flip(request: Request) -> Flip:
  background = label_noise.draw_background(
    request.source.num_classes, rng=request.rng, variant=request.variant
  )
  change = functools.partial(
    label_noise.background_flip, background=background, **_l2rw(request)
  )
  return _of_labels(request, change)


def _l2rw(request: Request) -> dict:
  return {
    "fraction": request.fraction,
    "num_classes": request.source.num_classes,
    "variant": request.variant,
  }


def _bare_symmetric(request: Request) -> Flip:
  return _of_matrix(request, label_noise.symmetric_matrix(*_size(request)))


def _bare_class_conditional(request: Request) -> Flip:
  name = request.source.name
  if name not in CLASS_CONDITIONAL:
    raise base.InputError(
      "the builder bare_class_conditional knows which classes look alike in"
      f" {', '.join(CLASS_CONDITIONAL)} only; choose another builder for {name}"
    )
  pairs = CLASS_CONDITIONAL[name]
  return _of_matrix(request, label_noise.pair_matrix(*_size(request), pairs))


def _mwn_uniform(request: Request) -> Flip:
  return _of_matrix(request, label_noise.uniform_matrix(*_size(request)))


def _mwn_flip(request: Request, num_targets: int) -> Flip:
  """Variants differ in who draws the targets.

  "paper": the split's own seed. "official_code": always seed 1 of NumPy's legacy
  generator, so that every seed of an experiment has the authors' one matrix.
  """
  official = request.variant == "official_code"
  rng = np.random.RandomState(1) if official else request.rng
  matrix = label_noise.flip_matrix(*_size(request), num_targets=num_targets, rng=rng)
  return _of_matrix(request, matrix)


def _human(request: Request) -> Flip:
  """The labels that people gave, of TFDS's cifar10_n."""
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


def _size(request: Request) -> tuple[int, float]:
  assert request.fraction is not None  # `_check` has seen to it.
  return request.source.num_classes, request.fraction


def _of_matrix(request: Request, matrix: np.ndarray) -> Flip:
  return _of_labels(request, functools.partial(label_noise.resample, matrix=matrix))


def _of_labels(request: Request, change: Callable[..., np.ndarray]) -> Flip:
  labels = request.source.labels
  return lambda rows, rng: change(labels[rows], rng=rng)


_BUILDERS: dict[str, Callable[[Request], Flip]] = {
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
