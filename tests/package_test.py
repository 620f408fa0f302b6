"""The package: its imports, and what the wheel installs."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Computing weights must neither import nor require these packages.
HEAVY = (
  "tensorflow",
  "tensorflow_datasets",
  "sklearn",
  "orbax",
  "matplotlib",
  "tensorboardX",
  "absl.flags",
)


@pytest.mark.ci
def test_importing_the_functions_imports_nothing_heavy():
  code = (
    "import sys, jax, flax.linen, optax; before = set(sys.modules)\n"
    "import l2rw_jax\n"
    f"print([m for m in {HEAVY} if m in set(sys.modules) - before])"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
  )
  assert result.stdout.strip() == "[]"


def test_the_wheel_installs_the_library_alone(tmp_path):
  # A top-level package `experiments` would hide a user's package of the same name.
  code = (
    "import sys; from setuptools import build_meta;"
    "print(build_meta.build_wheel(sys.argv[1]))"
  )
  source = tmp_path / "source"
  source.mkdir()
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(REPOSITORY / name, source)
  for name in ("l2rw_jax", "experiments"):
    shutil.copytree(REPOSITORY / name, source / name)
  subprocess.run(
    [sys.executable, "-c", code, tmp_path], check=True, capture_output=True, cwd=source
  )
  (wheel,) = tmp_path.glob("*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  top_level = {name.split("/")[0] for name in names}
  assert {name for name in top_level if ".dist-info" not in name} == {"l2rw_jax"}
  assert "l2rw_jax/py.typed" in names
  assert {"l2rw_jax/audit/page.html", "l2rw_jax/audit/page.js"} <= set(names)
