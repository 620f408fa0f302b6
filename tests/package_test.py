"""What a newcomer meets: the package, its README, its imports."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l2rw_jax

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# Nobody who weighs examples should wait for these, let alone install them.
HEAVY = (
  "tensorflow",
  "tensorflow_datasets",
  "sklearn",
  "orbax",
  "matplotlib",
  "tensorboardX",
  "absl.flags",
)


def test_importing_the_functions_imports_nothing_heavy():
  code = (
    "import sys, jax, flax.linen, optax, chex; before = set(sys.modules)\n"
    "import l2rw_jax\n"
    f"print([m for m in {HEAVY} if m in set(sys.modules) - before])"
  )
  found = subprocess.run(
    [sys.executable, "-c", code],
    check=True,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
  )
  assert found.stdout.strip() == "[]"


def readme_blocks() -> list[str]:
  text = (REPOSITORY / "README.md").read_text()
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def readers_project():
  """What the reader of the README has: a loss of one example, and data."""
  keys = jax.random.split(jax.random.key(0), 4)
  batch = {
    "x": jax.random.normal(keys[0], (8, 3)),
    "y": jax.random.normal(keys[1], (8,)),
  }
  clean = {
    "x": jax.random.normal(keys[2], (4, 3)),
    "y": jax.random.normal(keys[3], (4,)),
  }
  return {
    "l2rw_jax": l2rw_jax,
    "loss_fn": lambda p, example: (example["x"] @ p - example["y"]) ** 2,
    "params": jnp.ones(3),
    "batch": batch,
    "meta_batch": clean,
  }


def test_readme_examples_run_in_order_and_agree(readers_project):
  first, drop_in, precision = readme_blocks()[:3]
  exec(first, readers_project)
  by_hand, weights = readers_project["grads"], readers_project["w"].weights
  assert np.isclose(weights.sum(), 1)
  exec(drop_in, readers_project)
  np.testing.assert_allclose(readers_project["grads"], by_hand, rtol=1e-5)
  exec(precision, readers_project)
  np.testing.assert_allclose(readers_project["w"].weights, weights, rtol=1e-5)


def test_makefile_and_readme_name_the_same_commands():
  readme, makefile = (
    (REPOSITORY / name).read_text() for name in ("README.md", "Makefile")
  )
  for target in re.findall(r"^    make (\w+)", readme, re.MULTILINE):
    assert f"\n{target}:" in makefile
