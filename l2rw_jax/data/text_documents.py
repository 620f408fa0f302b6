"""Documents of bytes for language models; some of the documents are corrupted.

The text is part of every Python installation: the sources of its standard library, and
the English prose of its help topics, which serves as another language. A document is an
excerpt, and a token is a byte.
"""

import hashlib
import importlib
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np

from l2rw_jax import base
from l2rw_jax.data import examples as examples_lib

VOCABULARY = 256
# The kinds of documents. The index of a kind is its number in `Examples.group`.
KINDS = ("clean", "shuffled", "english", "random")
# These folders are skipped, because some installations lack them or their text is not
# code.
_LEFT_OUT = frozenset(
  {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
  | {"pydoc_data", "config", "__pycache__", "ensurepip", "tkinter", "turtledemo"}
)


class Texts(NamedTuple):
  """Texts from which documents are taken.

  Attributes:
    files: the sources of the standard library in the order of their names, bytes.
    english: prose.
  """

  files: tuple[bytes, ...]
  english: bytes


def standard_library() -> Texts:
  """The texts of the running Python.

  Raises:
    InputError: this installation has fewer than 100 sources of the standard library.
  """
  folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
  paths = [
    path
    for path in sorted(folder.rglob("*.py"))
    if _LEFT_OUT.isdisjoint(path.relative_to(folder).parts)
  ]
  if len(paths) < 100:
    raise base.InputError(
      f"the standard library in {folder} has {len(paths)} source files, but at least"
      " 100 are needed: use a Python that is installed with its sources."
    )
  topics = importlib.import_module("pydoc_data.topics").topics
  english = "\n".join(topics[name] for name in sorted(topics))
  return Texts(tuple(path.read_bytes() for path in paths), english.encode())


def corrupted_documents(
  texts: Texts,
  *,
  length: int,
  num_train: int,
  num_meta: int,
  num_test: int,
  fraction: float,
  seed: int,
) -> examples_lib.Splits:
  """Makes splits of excerpts of source code; some training documents are corrupted.

  One third of the corrupted documents are excerpts whose bytes are shuffled, one third
  are English prose, and one third are random bytes. The training, meta and test sets
  are from different files. Excerpts do not overlap.

  Args:
    texts: the texts from which documents are taken.
    length: T, number of bytes that are predicted in a document.
    num_train: number of training documents.
    num_meta: number of clean documents in the meta set.
    num_test: number of clean test documents.
    fraction: share of corrupted training documents.
    seed: seed of the choice of files, excerpts and corrupted documents.

  Returns:
    Splits whose `image` is the first T bytes of a document, uint8 [N, T], and whose
    `label` is the byte after each of them, int32 [N, T]. `group` is the kind of a
    document, an index into `KINDS`; `true_label` equals `label`.

  Raises:
    InputError: `length` is not a positive integer, a size or the seed is negative or
      not an integer, `fraction` is not in [0, 1], or there is less text than needed.
  """
  base.check_integer("length", length)
  examples_lib.check_sizes(num_train=num_train, num_meta=num_meta, num_test=num_test)
  if not 0 <= fraction <= 1:
    raise base.InputError(f"fraction={fraction} must be in [0, 1].")
  file_rng, excerpt_rng, noise_rng = examples_lib.generators(seed, 3)
  files = [texts.files[i] for i in file_rng.permutation(len(texts.files))]
  parts, start = {}, 0
  for name, size in (("test", num_test), ("meta", num_meta), ("train", num_train)):
    # Each part gets at least eight files; otherwise one file could fill a small part.
    excerpts: list[np.ndarray] = []
    first = start
    while start < len(files) and (start - first < 8 or sum(map(len, excerpts)) < size):
      excerpts.append(_excerpts(files[start], length + 1))
      start += 1
    parts[name] = _drawn(
      np.concatenate(excerpts or [_excerpts(b"", length + 1)]), size, excerpt_rng, name
    )
  kinds = np.zeros(num_train, np.int32)
  wrong = noise_rng.permutation(num_train)[: round(float(fraction) * num_train)]
  kinds[wrong] = 1 + np.arange(len(wrong)) % (len(KINDS) - 1)
  _corrupt(parts["train"], kinds, texts.english, noise_rng)
  clean = {name: np.zeros(len(part), np.int32) for name, part in parts.items()}
  groups = {**clean, "train": kinds}
  examples = {name: _examples(part, groups[name]) for name, part in parts.items()}
  digest = hashlib.sha256(kinds.astype("<i4").tobytes())
  for name in sorted(parts):
    digest.update(name.encode() + parts[name].tobytes())
  return examples_lib.Splits(
    **examples,
    validation=_examples(parts["train"][:0], kinds[:0]),
    num_classes=VOCABULARY,
    fingerprint=digest.hexdigest()[:16],
  )


def _excerpts(text: bytes, size: int) -> np.ndarray:
  """All excerpts of `size` bytes, one after the other, uint8 [n, size]."""
  number = len(text) // size
  return np.frombuffer(text[: number * size], np.uint8).reshape(number, size)


def _drawn(
  excerpts: np.ndarray, size: int, rng: np.random.Generator, name: str
) -> np.ndarray:
  """Draws `size` of the excerpts, without repetition."""
  if len(excerpts) < size:
    raise base.InputError(
      f"there is text for {len(excerpts)} {name} documents, but {size} are requested:"
      " use fewer or shorter documents."
    )
  return excerpts[rng.permutation(len(excerpts))[:size]]


def _corrupt(
  documents: np.ndarray, kinds: np.ndarray, english: bytes, rng: np.random.Generator
) -> None:
  """Corrupts documents in place, each according to its kind."""
  size = documents.shape[1]
  for row in np.flatnonzero(kinds == KINDS.index("shuffled")):
    documents[row] = rng.permutation(documents[row])
  rows = np.flatnonzero(kinds == KINDS.index("english"))
  documents[rows] = _drawn(_excerpts(english, size), len(rows), rng, "English")
  rows = np.flatnonzero(kinds == KINDS.index("random"))
  documents[rows] = rng.integers(VOCABULARY, size=(len(rows), size), dtype=np.uint8)


def _examples(documents: np.ndarray, kinds: np.ndarray) -> examples_lib.Examples:
  index = np.arange(len(documents), dtype=np.int32)
  following = documents[:, 1:].astype(np.int32)
  return examples_lib.Examples(
    documents[:, :-1], following, following, index, index, kinds
  )
