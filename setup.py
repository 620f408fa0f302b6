"""Packaging of l2rw_jax; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'^__version__ = "(.+)"$', (HERE / "l2rw_jax/__init__.py").read_text(), re.MULTILINE
).group(1)

EXPERIMENTS = [
  "array_record",
  "grain>=0.2.12",
  "matplotlib>=3.8",
  "orbax-checkpoint>=0.11",
  "pillow>=10",
  "scikit-learn>=1.4",
  "scipy>=1.11",
  "tensorboardX>=2.6",
  "tqdm>=4.66",
]
TEST = [
  *EXPERIMENTS,
  "chex>=0.1.90",
  "dm-haiku>=0.0.14",
  "equinox>=0.11",
  "hypothesis>=6.100",
  "mypy>=1.11",
  "pytest>=8",
  "pytest-cov>=5",
  "pytest-xdist>=3.8",
  "pyyaml>=6",
  "ruff>=0.12",
  "setuptools>=77",
]

DOCS = [
  *EXPERIMENTS,
  "furo>=2024.8",
  "ipykernel>=6.29",
  "myst-nb>=1.2",
  "sphinx>=8",
]

setuptools.setup(
  name="l2rw_jax",
  version=VERSION,
  description="Per-example weights for training on wrong or imbalanced data, in JAX",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The l2rw_jax authors",
  license="Apache-2.0",
  license_files=["LICENSE"],
  # `experiments` is not installed, because it would hide a user's top-level package of
  # the same name.
  packages=setuptools.find_packages(include=["l2rw_jax*"]),
  package_data={"l2rw_jax": ["py.typed", "audit/page.html", "audit/page.js"]},
  python_requires=">=3.11",
  install_requires=[
    "absl-py>=2.0",
    "flax>=0.12",
    # tensorflow-datasets 4.9.10 imports this package but does not require it.
    "importlib_resources>=6.0",
    "jax>=0.10.2",
    "jaxlib>=0.10.2",
    "numpy>=2.0",
    "optax>=0.2.8",
    "tensorflow-datasets>=4.9.10",
  ],
  extras_require={
    "experiments": EXPERIMENTS,
    "benchmarks": [*EXPERIMENTS, "cleanlab>=2.7", "torch>=2.4"],
    "test": TEST,
    "docs": DOCS,
    "cuda12": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
  },
  keywords=[
    "jax",
    "noisy labels",
    "class imbalance",
    "example weighting",
    "meta-learning",
  ],
  classifiers=[
    "Development Status :: 4 - Beta",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
  ],
)
