"""Errors of files, and whether freed memory stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from experiments.lib import launch
from experiments.lib import registries

_PROGRAM = """
import ctypes, resource
from experiments.lib import launch
if {keep}:
  assert launch.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, size = [ctypes.c_void_p], 2**26
for turn in range(4):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  block = libc.malloc(size)
  ctypes.memset(block, 1, size)
  libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (OSError("plain message"), "error: input/output: plain message"),
    (TimeoutError("timed out"), "error: input/output: timed out"),
    (FileNotFoundError(2, "No such file", "a.png"), "error: a.png: No such file"),
  ],
)
def test_errors_of_files_have_one_line(error, line, capsys):
  with pytest.raises(SystemExit) as ended, launch._one_line_errors(registries.Settings):
    raise error
  assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="applies to glibc only")
def test_large_blocks_stay_with_the_process():
  faults = [
    int(
      subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(keep=keep)],
        check=True,
        capture_output=True,
        text=True,
      ).stdout
    )
    for keep in (True, False)
  ]
  # Page faults show whether the memory is new. 64 MiB are 32 huge pages, or 16,384
  # small ones.
  assert faults[0] < 8
  assert faults[1] >= 32


def test_help_for_a_closed_pipe_prints_no_error(monkeypatch, capsys):
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as pipe:
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as ended:
      launch.execute(registries.Settings, lambda *_: None, "name", ["--help"])
    assert ended.value.code == 1
  assert not capsys.readouterr().err
