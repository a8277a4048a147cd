"""Kernels for GPUs beside TVM's default schedules for the same operations, on a device in software.

    python benchmarks/gpu_kernels.py               # OpenCL, on PoCL
    python benchmarks/gpu_kernels.py webgpu        # on lavapipe

Seconds of the processor, by turns in one process, the best of five each: what else runs here costs cache, not time on a clock.
What a device in software says of GPUs is how much is computed and moved, and little of barriers and of memory that is shared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from wasat.backends.tvm.targets import target_named
from wasat.ir import Program, parse_program

from wasat.planned import PlanRunner


def _conv(x: str, w: str, y: str, more: str) -> str:
    return f"graph @f(%x: f32[{x}], %w: f32[{w}]) {{\n  %y: f32[{y}] = conv(%x, %w) {{{more}}}\n  return %y\n}}"


def _recurrent(s: int) -> str:
    rows, state = f"f32[1, {s}, 4, 64]", "f32[1, 4, 64, 64]"
    return f"""graph @f(%q: {rows}, %k: {rows}, %v: {rows}, %a: {state}, %d: f32[1, {s}, 4], %b: f32[1, {s}, 4]) {{
  %y: {rows}, %z: {state} = linear_attention(%q, %k, %v, %a, %d, %b) {{rule="gated_delta"}}
  return %y, %z
}}"""


CASES = {
    "conv 3 x 3, 64 to 64 channels, 28 x 28": _conv(
        "1, 64, 28, 28", "64, 64, 3, 3", "1, 64, 28, 28", "strides=(1, 1), low=(1, 1), high=(1, 1)"
    ),
    "conv of 3 of 300, 80 to 128 channels": _conv(
        "1, 80, 300", "128, 80, 3", "1, 128, 300", "strides=(1,), low=(1,), high=(1,)"
    ),
    "conv of patches, 14 x 14 of 3 to 128 channels": _conv(
        "1, 3, 112, 112", "128, 3, 14, 14", "1, 128, 8, 8", "strides=(14, 14), low=(0, 0), high=(0, 0)"
    ),
    "depthwise conv 3 x 3, 128 channels, 28 x 28": _conv(
        "1, 128, 28, 28", "128, 1, 3, 3", "1, 128, 28, 28", "strides=(1, 1), low=(1, 1), high=(1, 1), groups=128"
    ),
    "gated delta rule, 4 heads of 64 x 64, one token": _recurrent(1),
    "gated delta rule, 4 heads of 64 x 64, 64 tokens": _recurrent(64),
}


def seconds(runner: PlanRunner, arrays: Mapping[str, Any]) -> float:
    start = time.process_time()
    runner("f", arrays)
    return time.process_time() - start


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "opencl"
    own = target_named(name)
    default = replace(own, kernels=lambda target, program: lambda graph: [])
    print("| operation | default schedule, ms | kernel, ms | times as fast |\n|---|---|---|---|")
    for case, text in CASES.items():
        program = parse_program(text)
        rng = np.random.default_rng(0)
        arrays = {v.name: rng.standard_normal(v.shape).astype(np.float32) for v in program["f"].inputs}
        if "d" in arrays:  # decays are below 0, keys as long as one, what is written a share
            arrays |= {"d": -np.abs(arrays["d"]), "k": arrays["k"] / 8, "b": 1 / (1 + np.exp(arrays["b"]))}
        made = [PlanRunner(Program(dict(program.graphs)), target) for target in (default, own)]
        a, b = (runner("f", arrays) for runner in made)
        for key, x in a.items():
            np.testing.assert_allclose(b[key], x, rtol=1e-3, atol=1e-3, err_msg=case)
        taken = [[seconds(runner, arrays) for runner in made] for _ in range(5)]
        before, now = (min(t) * 1e3 for t in zip(*taken))
        print(f"| {case} | {before:.1f} | {now:.1f} | {before / now:.2f} |", flush=True)


if __name__ == "__main__":
    main()
