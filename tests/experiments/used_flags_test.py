"""Every flag that a script accepts is read by the script or by code that it calls.

The code is searched, not run. The search begins at the `run` of a script and at the
code that starts every script. It follows names to their definitions in experiments/ and
benchmarks/, and collects the attributes of `settings` and, in the methods of a settings
class, of `self`.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import pathlib
import types
from typing import TypeGuard

import pytest

from benchmarks import xla_switches
from experiments.lib import settings as settings_lib

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_SCRIPTS = [
  f"{path.parent.name}.{path.stem}"
  for folder in ("experiments", "benchmarks")
  for path in sorted((_REPOSITORY / folder).glob("*.py"))
  if "\nclass Settings(" in path.read_text()
]
# Expressions that denote the settings in the methods of a settings class.
_RECEIVERS = (
  "self",
  "super()",
  "cast(Any, self)",
  "typing.cast(Any, self)",
  "settings",
)
# These functions start every script.
_STARTS = [
  ("experiments.lib.launch", "_run"),
  ("experiments.lib.distributed", "connect"),
]


@functools.cache
def _definitions(module_name: str) -> dict[str, list[ast.stmt]]:
  """The statements of a module that define each of its names."""
  definitions: dict[str, list[ast.stmt]] = {}
  for statement in ast.parse(inspect.getsource(_module(module_name))).body:
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    names = [
      node.id
      for t in targets
      if t
      for node in ast.walk(t)
      if isinstance(node, ast.Name)
    ]
    for name in [getattr(statement, "name", None), *names]:
      if name:
        definitions.setdefault(name, []).append(statement)
  return definitions


def _module(name: str) -> types.ModuleType:
  return importlib.import_module(name)


def _is_getattr(node: ast.AST) -> TypeGuard[ast.Call]:
  return isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"


def read_flags(script: str) -> set[str]:
  """Names of the attributes of `settings` that the code of a script reads."""
  settings = _module(script).Settings
  flags = settings_lib.flags_of(settings)
  read: set[str] = set()
  seen: set[int] = set()
  waiting = [*_STARTS, (script, "run")]

  def visit(node: ast.AST, module: str, receivers: tuple[str, ...]) -> None:
    for child in ast.walk(node):
      if isinstance(child, ast.Name):
        waiting.append((module, child.id))
      elif isinstance(child, ast.Attribute):
        owner = ast.unparse(child.value)
        value = getattr(_module(module), owner, None)
        if isinstance(value, types.ModuleType):
          waiting.append((value.__name__, child.attr))
        elif owner in receivers:
          add(child.attr)
      elif _is_getattr(child) and ast.unparse(child.args[0]) in receivers:
        # If the name is not a constant, it may be any constant in the definition.
        is_constant = isinstance(child.args[1], ast.Constant)
        for one in ast.walk(child.args[1] if is_constant else node):
          if isinstance(one, ast.Constant) and one.value in flags:
            add(one.value)

  def add(name: str) -> None:
    """Notes that the code reads a flag or calls a method of the settings."""
    read.add(name)
    for owner in settings.__mro__:
      member = owner.__dict__.get(name)
      member = getattr(member, "fget", None) or getattr(member, "func", member)
      if inspect.isfunction(member) and id(member) not in seen:
        seen.add(id(member))
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(member)))
        visit(tree, owner.__module__, _RECEIVERS)

  while waiting:
    module, name = waiting.pop()
    if not module.startswith(("experiments.", "benchmarks.")):
      continue
    for statement in _definitions(module).get(name, ()):
      defined = getattr(_module(module), name, None)
      is_settings = isinstance(defined, type) and issubclass(
        defined, settings_lib.Flags
      )
      if id(statement) not in seen and not is_settings:
        seen.add(id(statement))
        visit(statement, module, ("settings",))
  return read


@pytest.mark.parametrize("script", _SCRIPTS)
def test_every_flag_is_read(script):
  flags = settings_lib.flags_of(_module(script).Settings)
  unread = set(flags) - read_flags(script)
  assert not unread, f"{script} accepts flags that it ignores: {sorted(unread)}"


def test_a_flag_that_is_not_read_is_found(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class More(xla_switches.Settings):
    """The flags of a script, and one that it does not read."""

    steps_per_call: int = settings_lib.flag(1)

  monkeypatch.setattr(xla_switches, "Settings", More)
  unread = set(settings_lib.flags_of(More)) - read_flags(xla_switches.__name__)
  assert unread == {"steps_per_call"}
