"""Selection of a weighted subset of the training set, class by class.

The weighted sum of the gradients of the subset should approximate the sum of all n
gradients. With proxies q_i for the gradients, a greedy algorithm selects the subset of
each class so that the sum, over all examples of the class, of the distance to the
nearest selected example is small (see `facility_location`). The weight of a selected
example is the number of examples that are nearest to it.

Reference:
  Mirzasoleiman, Bilmes, Leskovec, "Coresets for Data-efficient Training of Machine
  Learning Models", ICML 2020 (CRAIG).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2rw_jax import base
from l2rw_jax.coresets import distances
from l2rw_jax.coresets import facility_location

GREEDY = ("lazy", "stochastic")
BUDGETS = ("proportional", "equal")
_SMALLEST_EPSILON = 1e-12


class Coreset(NamedTuple):
  """A weighted subset, as NumPy arrays.

  Attributes:
    rows: rows of the selected examples, ascending, int32 [r].
    weights: cluster sizes gamma, which sum to n, float32 [r]; selected examples with
      equal proxies share the sum of their cluster sizes.
  """

  rows: np.ndarray
  weights: np.ndarray


def class_budgets(
  class_counts: Sequence[int], size: int, budget: str = "proportional"
) -> np.ndarray:
  """The number of examples to select from each class, int [C], with sum `size`.

  Each class with examples gets at least one, and no class gets more than it has.

  Args:
    class_counts: number of examples of each class, [C].
    size: r, between the number of classes with examples and the number of examples.
    budget: "proportional" to the counts, rounded by largest remainder (CRAIG's scripts
      round up), or "equal" for all classes.

  Raises:
    InputError: `size` is not an integer or is out of range, `budget` is unknown, or the
      counts are masked, are not non-negative integers, or are all 0.

  >>> print(class_budgets([50, 30, 2], 8), class_budgets([50, 30, 2], 8, "equal"))
  [4 3 1] [3 3 2]
  """
  base.refuse_mask("class_counts", class_counts)
  given = np.asarray(class_counts)
  if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
    raise base.InputError(
      "class_counts must be one integer for each class, [C]; got"
      f" {given.dtype} of shape {list(given.shape)}."
    )
  # Products with counts of a narrow type would overflow.
  counts = given.astype(np.int64)
  if budget not in BUDGETS:
    raise base.InputError(f"budget={budget!r}: choose one of {BUDGETS}.")
  if (counts < 0).any() or not counts.any():
    raise base.InputError(
      f"class_counts={counts.tolist()}: counts must be at least 0, and at least one"
      " of them above 0."
    )
  present = int((counts > 0).sum())
  if not isinstance(size, int | np.integer):
    raise base.InputError(f"size={size!r} must be an integer.")
  if not present <= size <= counts.sum():
    raise base.InputError(
      f"cannot choose size={size} of {counts.sum()} examples in {present} classes:"
      f" size must lie between {present} and {counts.sum()}."
    )
  targets = size * counts / counts.sum()
  if budget == "equal":
    remaining, order = float(size), np.argsort(counts)
    for place, c in enumerate(order):
      targets[c] = min(counts[c], remaining / (len(order) - place))
      remaining -= targets[c]
  sizes = np.clip(targets.astype(int), counts > 0, counts)
  while sizes.sum() < size:
    sizes[np.argmax(np.where(sizes < counts, targets - sizes, -np.inf))] += 1
  while sizes.sum() > size:
    sizes[np.argmax(np.where(sizes > 1, sizes - targets, -np.inf))] -= 1
  return sizes


def select(
  proxies: base.Array,
  labels: np.ndarray,
  size: int,
  *,
  features: base.Array | None = None,
  scale: base.Array | None = None,
  budget: str = "proportional",
  greedy: str = "lazy",
  epsilon: float = 0.1,
  key: base.Array | None = None,
) -> Coreset:
  """Selects a weighted subset, separately for each class.

  Distances are between proxies or, with `features`, between the outer products of
  proxies and features with a bias, which are the gradients of a last layer. Classes are
  padded to a few sizes, so that they share compiled programs.

  Args:
    proxies: q, real numbers [n, C], which are converted to float32 or wider.
    labels: class of each example, [n]: integers, strings or other sortable values.
    size: r, at least one per class and at most n.
    features: inputs of the last layer, [n, d], or None.
    scale: divisor of each coordinate of the outer products, [C, d + 1], bias last; None
      for 1. It requires `features`.
    budget: see `class_budgets`.
    greedy: "lazy" is the exact greedy algorithm; "stochastic" evaluates random
      candidates, see `facility_location.stochastic_greedy`.
    epsilon: for "stochastic", at least 1e-12 and below 1; see
      `facility_location.stochastic_greedy`.
    key: a typed PRNG key for the stochastic greedy algorithm.

  Returns:
    A `Coreset`; its weights sum to n.

  Raises:
    InputError: an argument is out of range, is a masked array or has a wrong type or
      shape, a label is not finite, or a proxy or a feature is NaN, infinite, or so
      large that its square overflows.
  """
  check_greedy(greedy, epsilon)
  arguments = {
    "proxies": proxies,
    "labels": labels,
    "features": features,
    "scale": scale,
  }
  for name, values in arguments.items():
    base.refuse_mask(f"select: {name}", values)
  labels = np.asarray(labels)
  if np.ndim(proxies) != 2:
    raise base.InputError(
      f"select: proxies must be [n, C]; got shape {np.shape(proxies)}."
    )
  if not len(proxies):
    raise base.InputError("select: there are no examples to choose from.")
  if labels.shape != np.shape(proxies)[:1]:
    raise base.InputError(
      f"select: labels of shape {labels.shape} do not match proxies of shape"
      f" {np.shape(proxies)}; pass one label per proxy."
    )
  if greedy == "stochastic" and key is None:
    raise base.InputError("select: greedy='stochastic' needs key=jax.random.key(seed).")
  if not (key is None or isinstance(key, jax.Array | np.ndarray)):
    raise base.InputError(f"select: key={key!r} must be jax.random.key(seed).")
  if scale is not None and features is None:
    raise base.InputError("select: scale= requires features=.")
  if np.issubdtype(labels.dtype, np.inexact) and not np.isfinite(labels).all():
    raise base.InputError("select: labels must be finite; give integers or strings.")
  arrays = [_wide("proxies", proxies)]
  if features is not None:
    if np.ndim(features) != 2 or len(features) != len(arrays[0]):
      raise base.InputError(
        f"select: features must be [n, d] for n={len(arrays[0])} proxies; got shape"
        f" {np.shape(features)}."
      )
    arrays.append(_with_bias(_wide("features", features)))
  if scale is not None:
    scale = _wide("scale", scale)
    shape = (arrays[0].shape[1], arrays[1].shape[1])
    smallest = np.finfo(scale.dtype).tiny  # Smaller numbers have infinite reciprocals.
    is_divisor = np.isfinite(scale) & (np.abs(scale) >= smallest)
    if scale.shape != shape or not is_divisor.all():
      raise base.InputError(
        f"select: scale must be finite nonzero numbers of shape {shape}, at least"
        f" {smallest:.3g} in magnitude; got shape {scale.shape}."
      )
  try:
    classes, counts = np.unique(labels, return_counts=True)
  except TypeError:
    raise base.InputError(
      "select: labels must be of one type that can be sorted; give integers or strings."
    ) from None
  sizes = class_budgets(counts.tolist(), size, budget)
  selections = []
  groups = base.rows_by_class(labels, classes)
  for place, members in enumerate(groups):
    c, class_size = classes[place], int(sizes[place])
    # With integer labels, random draws for a class do not depend on the other classes.
    is_id = np.issubdtype(classes.dtype, np.integer) and 0 <= c < 2**32
    class_key = None
    if key is not None:
      class_key = jax.random.fold_in(key, int(c) if is_id else place)
    selection = _select_class(
      [x[members] for x in arrays], scale, class_size, greedy, epsilon, class_key
    )
    # Results are fetched after the loop, so that all classes run asynchronously.
    selections.append((members, class_size, selection))
  rows = np.concatenate([m[np.asarray(s.rows)[:k]] for m, k, s in selections])
  weights = np.concatenate([np.asarray(s.weights)[:k] for _, k, s in selections])
  order = np.argsort(rows)
  return Coreset(rows[order].astype(np.int32), weights[order].astype(np.float32))


def _select_class(arrays, scale, size, greedy, epsilon, key):
  num_points = len(arrays[0])
  padding = _rounded_up(num_points) - num_points
  arrays = [np.pad(x, ((0, padding), (0, 0))) for x in arrays]
  if len(arrays) == 1:
    points: Any = distances.vectors(arrays[0], num_points)
  else:
    points = distances.outer_products(arrays[0], arrays[1], scale)
  options = {"capacity": _rounded_up(size), "num_points": num_points}
  if greedy == "lazy":
    return facility_location.lazy_greedy(points, size, **options)
  num_candidates = _rounded_up(facility_location.sample_size(num_points, size, epsilon))
  return facility_location.stochastic_greedy(
    key, points, size, num_candidates=num_candidates, **options
  )


def _rounded_up(size: int) -> int:
  """Rounds up to one of four sizes per power of two, so few shapes are compiled."""
  step = 1 << max(0, size.bit_length() - 3)
  return -(-size // step) * step


def _wide(name, values):
  """`values` in float32 or wider.

  Raises:
    InputError: they are complex, NaN, infinite or too large to be squared.
  """
  values = np.asarray(values)
  if np.issubdtype(values.dtype, np.complexfloating):
    raise base.InputError(f"select: {name} must be real numbers; got {values.dtype}.")
  native = values.dtype.newbyteorder("=")  # JAX has no other byte order.
  dtype = jax.dtypes.canonicalize_dtype(base.accumulator_dtype(native))
  values = values.astype(dtype)
  with np.errstate(over="ignore"):
    lengths = np.sum(values**2, axis=-1, dtype=dtype)
  bad = np.flatnonzero(~np.isfinite(lengths))
  if bad.size:
    raise base.InputError(
      f"select: {bad.size} rows of {name} are NaN, infinite or too large to be squared;"
      f" the first is row {bad[0]}. Check the network or lower the learning rate."
    )
  return values


def _with_bias(features):
  return np.concatenate([features, np.ones((len(features), 1), features.dtype)], axis=1)


def check_greedy(greedy: str, epsilon: float) -> None:
  """Raises InputError unless the arguments are valid for `select`."""
  if greedy not in GREEDY:
    raise base.InputError(f"greedy={greedy!r}: choose one of {GREEDY}.")
  # At this bound, the stochastic algorithm evaluates 28 n gains in all, usually more
  # than the exact one.
  if not _SMALLEST_EPSILON <= epsilon < 1:
    advice = ""
    if greedy == "stochastic" and epsilon < _SMALLEST_EPSILON:
      advice = "; use greedy='lazy' instead, which is exact and usually faster"
    raise base.InputError(
      f"epsilon={epsilon} must lie between {_SMALLEST_EPSILON:g} and 1{advice}."
    )
