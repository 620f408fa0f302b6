"""Files that start training on clusters: their syntax, and the flags of the scripts."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from experiments.lib import launch

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CLUSTERS = REPOSITORY / "docs" / "clusters"
FILES = sorted(CLUSTERS.iterdir())
# Variables that the cluster or the file itself sets before the command runs.
VALUES = {
  "HOME": "/home/user",
  "JOB_COMPLETION_INDEX": "1",
  "port": "8476",
  "process": "1",
  "shared": "/shared",
  "workdir": "runs/two_processes",
}


def script_of(path):
  """The text of a shell script, or the command that the container of a JobSet runs."""
  if path.suffix == ".sh":
    return path.read_text()
  job = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]
  (container,) = job["spec"]["template"]["spec"]["containers"]
  return container["command"][-1]


def commands(text):
  """The scripts that a text starts, with their expanded arguments."""
  text = text.replace("\\\n", " ")
  matches = re.findall(r"python -m experiments\.(\w+)([^\n&|]*)", text)
  assert matches
  for name, arguments in matches:
    expanded = re.sub(r"\$(\w+)", lambda match: VALUES[match[1]], arguments)
    yield name, shlex.split(expanded.rstrip('"'))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_scripts_accept_the_arguments(path):
  for name, arguments in commands(script_of(path)):
    settings = importlib.import_module(f"experiments.{name}").Settings
    parsed = launch.parse(settings, arguments)
    given = {argument.partition("=")[0].removeprefix("--") for argument in arguments}
    assert given <= parsed.given
    assert parsed.workdir and parsed.initialization_timeout > 0
    if parsed.distributed:
      assert parsed.coordinator_address is None
    else:
      assert parsed.process_id == 1 < parsed.num_processes


@pytest.mark.parametrize(
  "path", [p for p in FILES if p.suffix == ".sh"], ids=lambda path: path.name
)
def test_shell_scripts_have_no_syntax_error(path):
  done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")
  assert path.read_text().startswith("#!/usr/bin/env bash\n")


def test_tpu_script_runs_the_same_command_on_all_hosts(tmp_path):
  """Runs the script with a fake `gcloud` that records its arguments."""
  (tmp_path / "gcloud").write_text(
    f"#!/usr/bin/env bash\nprintf '%s\\n' \"$*\" >> {tmp_path}/calls\n"
  )
  (tmp_path / "gcloud").chmod(0o755)
  names = {"TPU_NAME": "t", "ZONE": "z", "PROJECT": "p", "SHARED": "/mnt/s"}
  path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
  subprocess.run(
    ["bash", CLUSTERS / "tpu_pod.sh"],
    env={**os.environ, **names, "PATH": path},
    check=True,
  )
  calls = (tmp_path / "calls").read_text()
  assert calls.count("compute tpus tpu-vm ssh t --zone=z --project=p --worker=all") == 2
  assert "pip install" in calls and "--workdir=/mnt/s/runs/cifar_noise" in calls


def test_slurm_continues_a_run_that_was_stopped(tmp_path):
  """Runs the script with a fake `srun` that exits with a given status."""
  (tmp_path / ".venv" / "bin").mkdir(parents=True)
  (tmp_path / ".venv" / "bin" / "activate").touch()
  for name, body in {"srun": "exit $STATUS", "scontrol": "echo $* > calls"}.items():
    (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (tmp_path / name).chmod(0o755)
  path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
  for status in (0, 2, 75, 143):
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "STATUS": str(status)}
    script = CLUSTERS / "slurm.sh"
    done = subprocess.run(["bash", script], cwd=tmp_path, env=env, check=False)
    assert done.returncode == status
    calls = tmp_path / "calls"
    assert calls.exists() == (status in (75, 143))
    if calls.exists():
      assert calls.read_text() == "requeue 7\n"
      calls.unlink()


def test_the_job_set_has_one_process_for_each_pod():
  document = yaml.safe_load((CLUSTERS / "jobset.yaml").read_text())
  assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert document["kind"] == "JobSet"
  (job,) = document["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  (_, arguments), *_ = commands(script_of(CLUSTERS / "jobset.yaml"))
  flags = dict(a.removeprefix("--").split("=", 1) for a in arguments)
  assert spec["completionMode"] == "Indexed" and job["replicas"] == 1
  assert spec["parallelism"] == spec["completions"] == int(flags["num_processes"])
  # The name that JobSet gives the first pod.
  host, port = flags["coordinator_address"].split(":")
  name = document["metadata"]["name"]
  assert host == f"{name}-{job['name']}-0-0.{name}"
  (container,) = spec["template"]["spec"]["containers"]
  assert container["ports"] == [{"containerPort": int(port)}]
  volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
  assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_page_names_every_file():
  page = (REPOSITORY / "docs" / "many_machines.md").read_text()
  for path in FILES:
    assert f"clusters/{path.name}" in page
