"""A list of suspicious labels as one HTML page that works offline.

The page shows the examples, most suspicious first, with their pictures or columns, the
given and the suggested label and the mean predicted distribution. Users can sort and
filter the list, decide which labels to keep, to change and to remove, and export the
corrected labels as a CSV file.

File names, labels and columns may contain any text: they are stored as JSON in which no
character can end the script element, and are put on the page as text. A content
security policy allows only the script of the page to run, and forbids every request.
"""

import base64
from collections.abc import Mapping, Sequence
import hashlib
from importlib import resources
import json
from typing import Any

import numpy as np

from l2rw_jax import base
from l2rw_jax.audit import label_issues

# Number of classes of the predicted distribution that are drawn for an example.
_NUM_BARS = 4
_MOST_COLUMNS, _MOST_CHARACTERS = 60, 200
_MOST_NOTES = 1000
# Statistics that are not listed; the mean probabilities are drawn as bars instead.
_NOT_SHOWN = ("mean_probabilities", "seen")


def build(
  issues: label_issues.LabelIssues,
  class_names: Sequence[str],
  names: Sequence[str],
  *,
  title: str = "Label issues",
  key: str = "index",
  rows: Any = None,
  pictures: Sequence[bytes] = (),
  columns: Mapping[str, Sequence[str]] | None = None,
  duplicate_of: Sequence[int] | None = None,
  notes: Sequence[str] = (),
) -> str:
  """Builds the page of a ranking.

  Args:
    issues: the ranking of N examples.
    class_names: C names, in the order of the labels.
    names: names of the examples in the order of the training set, N strings; paths for
      images.
    title: title of the page.
    key: the first column of the exported file: "path" for the names, or "index" for
      `rows`.
    rows: for `key` "index", the row of each example in the user's data, [N]; None is
      the row in the training set.
    pictures: PNG files of the most suspicious examples, in the order of the ranking;
      empty bytes for an example without one.
    columns: texts to show for the most suspicious examples, in the order of the
      ranking, by name of the column. The page has the first 60 columns and the first
      200 characters of each text.
    duplicate_of: for each example, the row in the training set of the example of which
      it is an exact copy, or -1; [N].
    notes: sentences about the data; after the first 1000, the page only counts them.

  Returns:
    HTML, to be stored as UTF-8.

  Raises:
    InputError: the lengths do not match, or `key` is unknown.
  """
  size = len(issues.index)
  num_classes = issues.statistics["mean_probabilities"].shape[1]
  if len(names) != size or len(class_names) != num_classes:
    raise base.InputError(
      f"names must have {size} entries and class_names {num_classes}; got {len(names)}"
      f" and {len(class_names)}."
    )
  for name, given in (("rows", rows), ("duplicate_of", duplicate_of)):
    if given is not None and np.shape(given) != (size,):
      raise base.InputError(
        f"{name} must have shape [{size}], one number for each example; got"
        f" {np.shape(given)}."
      )
  shown = {
    "pictures": pictures,
    **{f"columns[{k!r}]": v for k, v in (columns or {}).items()},
  }
  for name, entries in shown.items():
    if len(entries) > size:
      raise base.InputError(
        f"{name} has {len(entries)} entries, but there are only {size} examples."
      )
  if key not in ("path", "index"):
    raise base.InputError(f"key must be 'path' or 'index'; got {key!r}.")
  top_classes, top_shares = _top(issues, num_classes)
  original = np.arange(size) if rows is None else np.asarray(rows)
  copies = np.full(size, -1) if duplicate_of is None else np.asarray(duplicate_of)
  notes = [str(note) for note in notes]
  if len(notes) > _MOST_NOTES:
    notes = [*notes[:_MOST_NOTES], f"... and {len(notes) - _MOST_NOTES} more."]
  content = {
    "title": title,
    "key": key,
    "classes": [str(name) for name in class_names],
    "names": [str(names[row]) for row in issues.index],
    "index": original[issues.index].tolist(),
    "given": issues.given.tolist(),
    "suggested": issues.suggested.tolist(),
    "score": _numbers(issues.score, 4),
    "num_issues": int(issues.num_issues),
    "top_classes": top_classes.ravel().tolist(),
    "top_shares": top_shares.ravel().tolist(),
    "statistics": {
      name: _numbers(x, 3)
      for name, x in issues.statistics.items()
      if x.ndim == 1 and name not in _NOT_SHOWN
    },
    "pictures": [base64.b64encode(picture).decode() for picture in pictures],
    "columns": {
      str(name): [str(value)[:_MOST_CHARACTERS] for value in values]
      for name, values in list((columns or {}).items())[:_MOST_COLUMNS]
    },
    "duplicate_of": [
      str(names[row]) if row >= 0 else "" for row in copies[issues.index].tolist()
    ],
    "notes": notes,
  }
  identity = json.dumps([content["names"], content["given"], content["classes"]])
  content["id"] = hashlib.sha256(identity.encode()).hexdigest()[:16]
  return _filled(content)


def _top(
  issues: label_issues.LabelIssues, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """The classes to draw, likeliest first, and their shares in thousandths.

  Both have shape [N, 4], or [N, C] if there are fewer classes. The given and the
  suggested class are among the classes.
  """
  p = issues.statistics["mean_probabilities"]
  top = np.empty((len(p), min(_NUM_BARS, num_classes)), np.int64)
  for block in label_issues.blocks(p):
    chosen = np.nan_to_num(p[block])
    rows = np.arange(len(chosen))
    chosen[rows, issues.given[block]] += 3
    chosen[rows, issues.suggested[block]] += 2
    for column in top[block].T:  # A sort would also order all other classes.
      column[:] = chosen.argmax(axis=1)
      chosen[rows, column] = -np.inf
  shares = np.nan_to_num(np.take_along_axis(p, top, axis=1))
  order = np.argsort(-shares, axis=1, kind="stable")
  top, shares = (np.take_along_axis(x, order, axis=1) for x in (top, shares))
  return top, np.round(1000 * shares).astype(int)


def _numbers(values: np.ndarray, digits: int) -> list[float | int | None]:
  """Rounded numbers, with None in place of those that are not finite."""
  rounded = np.round(np.asarray(values, np.float64), digits)
  return [
    None if not np.isfinite(x) else int(x) if x == int(x) else x
    for x in rounded.tolist()
  ]


def _filled(content: Mapping[str, Any]) -> str:
  folder = resources.files("l2rw_jax.audit")
  page = (folder / "page.html").read_text(encoding="utf-8")
  script = (folder / "page.js").read_text(encoding="utf-8")
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  # This is valid JSON in which "</script>" and "<!--" cannot occur. Undecodable file
  # names contain lone surrogates, which cannot be encoded in UTF-8.
  text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  page = page.replace("@SCRIPT_HASH@", f"sha256-{digest}").replace("@SCRIPT@", script)
  # The data are filled in last, so that no text in them is mistaken for a placeholder.
  return page.replace("@DATA@", text)
