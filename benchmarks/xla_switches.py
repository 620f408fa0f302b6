r"""Whether a switch of XLA:CPU, or another layout, makes convolutions faster.

The benchmark times the forward and backward pass of four 3x3 convolutions with 32
channels on images of 32x32; the last convolution has stride 2. Each switch is measured
in a separate process, because XLA reads `XLA_FLAGS` only once. The processes take
turns, round by round, so that other load on the machine affects all switches about
equally. Times are processor seconds, summed over all threads. The column
changes_program says whether the switch changes the optimized program; switches of the
code generator do not.
Command: python -m benchmarks.xla_switches
Results: results/xla_switches, one file for each version of jax.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import _rows
from experiments.lib import launch
from experiments.lib import settings as settings_lib
from experiments.lib.settings import flag

# The switches of jaxlib 0.10 and 0.12 that select another library for convolutions or
# matrix products, or change how loops become machine code.
SWITCHES = (
  "",
  "--xla_cpu_use_onednn=true",
  "--xla_cpu_experimental_onednn_custom_call=true",
  "--xla_cpu_experimental_onednn_fusion_type=LIBRARY_FUSION_TYPE_DOT",
  "--xla_cpu_use_xnnpack=true",
  "--xla_cpu_experimental_xnn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
  "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION",
  "--xla_cpu_enable_fast_math=true",
  "--xla_cpu_prefer_vector_width=512",
)
LAYOUTS = ("NHWC", "NCHW")

# The program of a measuring process, which prints one JSON line.
_CHILD = """
import hashlib, json, sys, time
import jax
layout, batch, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
shape = (batch, 32, 32, 32)
images = jax.random.normal(jax.random.key(0), shape)
kernels = list(0.05 * jax.random.normal(jax.random.key(1), (4, 3, 3, 32, 32)))
numbers = (layout, "HWIO", layout)
def loss(kernels):
  x = images
  for kernel, stride in zip(kernels, (1, 1, 1, 2)):
    x = jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)
    x = jax.nn.relu(x)
  return (x * x).mean()
program = jax.jit(jax.value_and_grad(loss)).lower(kernels).compile()
jax.block_until_ready(program(kernels))
times = []
for _ in range(repeats):
  start = time.process_time()
  jax.block_until_ready(program(kernels))
  times.append(time.process_time() - start)
lines = [line.split(", metadata=")[0] for line in program.as_text().splitlines()]
print(json.dumps({
  "seconds": times,
  "flops": program.cost_analysis()["flops"],
  "program": hashlib.sha256("".join(lines).encode()).hexdigest(),
}))
"""


@dataclasses.dataclass(frozen=True)
class Settings(settings_lib.OutputFlags):
  """The flags of this benchmark."""

  batch_size: int = flag(32)
  repeats: int = flag(5, "Number of steps in a round.", bounds=settings_lib.REPEATS)
  num_rounds: int = flag(3, "Number of rounds.", bounds=settings_lib.REPEATS)
  switches: tuple[str, ...] = flag(
    SWITCHES, "Values of XLA_FLAGS to compare with an empty XLA_FLAGS."
  )
  layouts: tuple[str, ...] = flag(LAYOUTS, "Layouts of the images.", choices=LAYOUTS)


def measure(switch: str, layout: str, batch_size: int, repeats: int) -> dict[str, Any]:
  """Runs the convolutions in a process with this switch.

  Returns:
    "seconds" of every step, "flops" of a step, the hash of the "program"; or only
    "error" if the process fails, for instance because XLA does not accept the switch:
    the first line on stderr that names the switch, or else the last line, or the exit
    status if stderr is empty.
  """
  done = subprocess.run(
    [sys.executable, "-c", _CHILD, layout, str(batch_size), str(repeats)],
    env={**os.environ, "XLA_FLAGS": switch, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    name = switch.partition("=")[0].lstrip("-")
    return {"error": next((x for x in lines if name and name in x), lines[-1])}
  measured: dict[str, Any] = json.loads(done.stdout)
  return measured


def make_rows(settings: Settings) -> list[dict[str, Any]]:
  """A row for each switch and layout; ratios are to that layout without a switch."""
  switches = list(dict.fromkeys(("", *settings.switches)))
  cases = [(switch, layout) for layout in settings.layouts for switch in switches]
  measured: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
  for _ in range(settings.num_rounds):
    for case in cases:
      measured[case].append(measure(*case, settings.batch_size, settings.repeats))
  rows = []
  for switch, layout in cases:
    row: dict[str, Any] = {"switch": switch or "none", "layout": layout}
    results, plain = measured[switch, layout], measured["", layout]
    errors = [result["error"] for result in (*results, *plain) if "error" in result]
    if errors:
      rows.append({**row, "error": errors[0]})
      continue
    seconds = [value for result in results for value in result["seconds"]]
    ratios = [
      statistics.median(result["seconds"]) / statistics.median(base["seconds"])
      for result, base in zip(results, plain, strict=True)
    ]
    median = statistics.median(seconds)
    rows.append(
      {
        **row,
        "changes_program": results[0]["program"] != plain[0]["program"],
        "cpu_seconds": round(median, 4),
        "gflop_per_cpu_second": round(results[0]["flops"] / median / 1e9, 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_least": round(min(ratios), 3),
        "ratio_most": round(max(ratios), 3),
      }
    )
  return rows


def run(settings: Settings, workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Runs the benchmark, prints the results and writes them to a folder."""
  rows = make_rows(settings)
  facts = {
    "batch_size": settings.batch_size,
    "repeats": settings.repeats,
    "num_rounds": settings.num_rounds,
  }
  _rows.report(rows, facts, workdir)
  return rows


if __name__ == "__main__":
  launch.main(Settings, run, "xla_switches")
