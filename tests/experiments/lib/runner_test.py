"""The folder of an experiment: files named by flags, and file names with numbers."""

import ast
import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
import scripts

from experiments import mnist_noise
from experiments.lib import registries
from experiments.lib import runner
from l2rw_jax import base
from l2rw_jax import processes
from l2rw_jax.methods.mentornet import mentor_file
from l2rw_jax.methods.mentornet import network as mentornet_network

_SUFFIXES = (".png", ".json", ".npz", ".txt", ".csv")


@dataclasses.dataclass(frozen=True)
class _Settings(registries.Settings):
  """The flags of the methods."""

  EXTENDABLE = ("mentor",)


def _prepare(folder, mentor):
  return runner.open_folder(_Settings(mentor=mentor), "noise", folder)


def _saved_mentor(path, curriculum, seed):
  network = mentornet_network.MentorNetwork()
  values, labels = np.zeros(1, np.float32), np.zeros(1, int)
  variables = network.init(jax.random.key(seed), values, values, labels, 0)
  mentor_file.save(path, mentornet_network.Mentor(curriculum, network, variables), {})
  return str(path)


def test_a_folder_continues_with_other_flags_that_save_memory(tmp_path):
  for flags in ({}, {"microbatch_size": 4}, {"mwn_recompute": True}):
    runner.open_folder(_Settings(**flags), "noise", tmp_path / "run")


@pytest.mark.parametrize(
  "dataset",
  ["images:../../../a", "npz:/data/{a}.npz", "npz:/data/a.npz", "csv:b c.csv"],
)
def test_the_folder_of_a_users_data_is_inside_the_experiment(dataset):
  name = runner.folder_name({"dataset": dataset, "fraction": 0.5, "none": None}, "l2rw")
  assert name.endswith("-0.5-l2rw") and pathlib.PurePath(name).parts == (name,)
  assert name.format(first=0) == name
  other = runner.folder_name(
    {"dataset": f"images:/x/{dataset}", "fraction": 0.5}, "l2rw"
  )
  assert other != name
  assert runner.folder_name({"dataset": "mnist", "rate": 1e-5}, "l2rw") == (
    "mnist-1e-05-l2rw"
  )


def test_processes_with_other_flags_that_save_memory_are_refused(tmp_path, monkeypatch):
  def exchange(name, text):
    return [text, text.replace('"microbatch_size": null', '"microbatch_size": 4')]

  monkeypatch.setattr(processes, "exchange", exchange)
  with pytest.raises(base.InputError, match="microbatch_size is null in process 0 and"):
    runner.open_folder(_Settings(), "noise", tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_processes_that_select_other_runs_are_refused(tmp_path, monkeypatch):
  compared = []

  def exchange(name, text):
    compared.append(text)
    return [text, text.replace('"num_seeds": 1', '"num_seeds": 3')]

  monkeypatch.setattr(processes, "exchange", exchange)
  settings = mnist_noise.Settings(num_seeds=1)
  with pytest.raises(base.InputError, match="num_seeds is 1 in process 0 and 3 in"):
    runner.open_folder(settings, "noise", tmp_path / "run")
  assert not (tmp_path / "run").exists()
  # The same file may have another path on another host.
  mentor = _saved_mentor(tmp_path / "mentor.json", "pd", 1)
  with pytest.raises(base.InputError, match="num_seeds is 1"):
    runner.open_folder(settings.replace(mentor=(mentor,)), "noise", tmp_path / "run")
  assert '"mentor": []' in compared[0] and "mentor" not in compared[1]


@pytest.mark.ci
def test_a_mentor_may_be_added_but_not_swapped(tmp_path):
  a, b = (_saved_mentor(tmp_path / f"{seed}.json", "pd", seed) for seed in (1, 2))
  other = _saved_mentor(tmp_path / "other.json", "dd", 1)
  run = tmp_path / "run"
  _prepare(run, [])
  _prepare(run, [a])
  _prepare(run, [])
  _prepare(run, [other, a])
  _prepare(run, [shutil.copy(a, tmp_path / "moved.json")])
  with pytest.raises(base.InputError, match="the content of --mentor of curriculum pd"):
    _prepare(run, [b])
  with pytest.raises(base.InputError, match=r"--mentor=.*cannot read it"):
    _prepare(run, [str(tmp_path / "none.json")])


@pytest.mark.ci
def test_two_mentors_of_a_curriculum_are_refused(tmp_path):
  a, b = (_saved_mentor(tmp_path / f"{seed}.json", "pd", seed) for seed in (1, 2))
  settings = _Settings(mentor=(a, b))
  with pytest.raises(base.InputError, match="are both mentors of the curriculum pd"):
    settings.choose_methods(["uniform"], ["uniform"])


def _rounds(text):
  """Whether an f-string rounds numbers, so that two of them may give the same name."""
  values = [v for v in text.values if isinstance(v, ast.FormattedValue)]
  specs = [ast.unparse(v.format_spec) for v in values if v.format_spec]
  return any(not spec.strip("f'").endswith("d") for spec in specs)


def _names_of_files(tree):
  """f-strings in functions called `folder`, after `/`, or that end with a suffix."""
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef) and node.name == "folder":
      yield from (n for n in ast.walk(node) if isinstance(n, ast.JoinedStr))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
      yield from (n for n in ast.walk(node) if isinstance(n, ast.JoinedStr))
    if isinstance(node, ast.JoinedStr) and _last(node).endswith(_SUFFIXES):
      yield node


def _last(text):
  end = text.values[-1]
  return str(end.value) if isinstance(end, ast.Constant) else ""


def test_file_names_do_not_round_numbers():
  for path in (scripts.REPOSITORY / "experiments").rglob("*.py"):
    for name in _names_of_files(ast.parse(path.read_text(encoding="utf-8"))):
      assert not _rounds(name), f"{path.name}: {ast.unparse(name)}"


def test_rounded_names_are_detected():
  text = 'def folder(x):\n  return f"a-{x:g}"\ny / f"{x:.3f}"\nz = f"{x:g}.png"'
  assert sum(map(_rounds, _names_of_files(ast.parse(text)))) == 3
