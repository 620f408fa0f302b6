"""The floor plan: imports, tests, flags, collectives, and errors in docstrings."""

import ast
import pathlib
import re

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# First match wins; see "Floor plan" in BUILD.md.
FLOORS = [
  (r"l2rw_jax/__init__\.py", 4),
  (r"l2rw_jax/base\.py", 0),
  (r"l2rw_jax/(losses|normalization|class_balance|group_objectives|inference)\.py", 1),
  (r"l2rw_jax/processes\.py", 1),
  (r"l2rw_jax/coresets/.*", 1),
  (r"l2rw_jax/linearization/.*", 1),
  (r"l2rw_jax/(changed_loss|label_transition|weighted_update)\.py", 2),
  (r"l2rw_jax/(hypergradient|meta_network)\.py", 2),
  (r"l2rw_jax/methods/mentornet/(mentor_file|loss_dump)\.py", 5),
  (r"l2rw_jax/((models|methods|audit)/.*|susceptibility\.py)", 3),
  (r"l2rw_jax/io/.*", 3),
  (r"l2rw_jax/data/.*", 4),
  (r"l2rw_jax/training/.*", 5),
  (r"experiments/(__init__|lib/report)\.py", 6),
  (r"experiments/tables/(catalog|__main__)\.py", 9),
  (r"experiments/tables/.*", 7),
  (r"experiments/lib/.*", 8),
  (r"experiments/.*", 9),
  (r"benchmarks/.*", 10),
]
FILES = sorted(
  str(path.relative_to(REPOSITORY))
  for folder in ("l2rw_jax", "experiments", "benchmarks")
  for path in (REPOSITORY / folder).rglob("*.py")
)


def floor(path: str) -> int:
  for pattern, number in FLOORS:
    if re.fullmatch(pattern, path):
      return number
  raise AssertionError(f"{path} has no floor: give it one here and in BUILD.md")


def tree(path: str) -> ast.Module:
  return ast.parse((REPOSITORY / path).read_text())


def file_of(name: str) -> str | None:
  """The file of a module or a package of this repository; None for other names."""
  path = name.replace(".", "/")
  return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in FILES), None)


def imported(path: str) -> set[str]:
  """Files of this repository that `path` imports; for a package, its `__init__.py`."""
  files = set()
  for node in ast.walk(tree(path)):
    if isinstance(node, ast.Import):
      files |= {file_of(alias.name) for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
      files |= {file_of(name) or file_of(node.module) for name in names}
  return {file for file in files if file is not None}


@pytest.mark.parametrize("path", FILES)
def test_imports_only_from_lower_floors(path):
  number = floor(path)
  for other in imported(path):
    room = pathlib.Path(other.removesuffix("/__init__.py")).parent
    in_reach = pathlib.Path(path).is_relative_to(room)
    assert floor(other) < number or (floor(other) == number and in_reach), other


def test_every_file_of_the_library_has_a_test_file():
  files = [pathlib.Path(f).relative_to("l2rw_jax") for f in FILES if "l2rw_jax/" in f]
  tests = [f.with_name(f"{f.stem}_test.py") for f in files if f.name != "__init__.py"]
  assert not [str(f) for f in tests if not (REPOSITORY / "tests" / f).exists()]


@pytest.mark.parametrize(
  ("pattern", "home"),
  [
    (r"jax\.pmap\(", "l2rw_jax/training/devices.py"),
    (r"lax\.(psum|pmean|pmax|all_gather|pcast|axis_index)\(", "l2rw_jax/base.py"),
    (r"from absl import flags", "experiments/lib/launch.py"),
  ],
)
def test_collectives_and_flags_have_one_home(pattern, home):
  users = [f for f in FILES if re.search(pattern, (REPOSITORY / f).read_text())]
  assert users and all(f.startswith(home) for f in users), users


def test_no_method_imports_another_method():
  folder = "l2rw_jax/methods/"
  for path in FILES:
    if not path.startswith(folder) or path == folder + "__init__.py":
      continue
    package = path.removeprefix(folder).partition("/")[0].removesuffix(".py")
    for other in imported(path):
      if other.startswith(folder):
        assert other.startswith(f"{folder}{package}/"), f"{path} imports {other}"


def test_training_does_not_import_methods():
  for path in FILES:
    if path.startswith("l2rw_jax/training/"):
      assert not any("/methods/" in other for other in imported(path)), path


def _raised_here(function: ast.FunctionDef) -> set[str]:
  """The names of errors in the `raise` statements of a function, not of inner ones."""
  found, remaining = set(), list(function.body)
  while remaining:
    node = remaining.pop()
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
      continue
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
      found.add(ast.unparse(node.exc.func).rpartition(".")[2])
    remaining += ast.iter_child_nodes(node)
  return found


def _public_functions(node: ast.AST) -> list[ast.FunctionDef]:
  found = []
  for child in ast.iter_child_nodes(node):
    name = getattr(child, "name", "_")
    if isinstance(child, ast.FunctionDef) and (name[0] != "_" or name == "__call__"):
      found.append(child)
    elif isinstance(child, ast.ClassDef) and name[0] != "_":
      found += _public_functions(child)
  return found


@pytest.mark.parametrize("path", [f for f in FILES if f.startswith("l2rw_jax/")])
def test_docstrings_name_the_errors_for_users(path):
  for function in _public_functions(tree(path)):
    if "InputError" in _raised_here(function):
      text = ast.get_docstring(function) or ""
      # Either a section, or a sentence such as "Raises an InputError if ...".
      assert "InputError" in text or "errors are those of" in text, function.name
