"""ONNX models: import time and memory of large ones; what is fused in those that torch exports; time of the backend suite.

    python benchmarks/onnx_models.py > benchmarks/results/onnx.md       # about five minutes, 3 GB of disk
    python benchmarks/onnx_models.py --skip-suite
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from wasat.backends.onnx import to_onnx
from wasat.frontend.onnx import from_onnx
from wasat.ir import Array, Builder, DType, Graph, IRError, Program, QArray, QTensorType, TensorType, Type, Value, symbol
from wasat.passes import DeriveKVCache, PassManager, default_pipeline

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "onnx"


# -- large models ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Made:
    """A parameter made when it is asked for."""

    type: Type
    seed: int

    def load(self) -> Array:
        rng, t = np.random.default_rng(self.seed), self.type
        if isinstance(t, TensorType):
            return rng.standard_normal(t.concrete({}), np.float32)
        values = rng.integers(-8, 8, t.shape, np.int8)
        return QArray(t, values, np.full((t.shape[0], t.blocks), 2**-10, t.scale.np))


def products(weight: Type, count: int, emit: Callable[[Builder, Value, Value], Value]) -> Program:
    """A chain of ``count`` products with square matrices."""
    g = Graph("forward")
    b, params = Builder(g), {}
    x = g.add_input("x", TensorType(DType.F32, (symbol("n"), weight.shape[1])))
    for i in range(count):
        params[f"layers.{i}.weight"] = Made(weight, i)
        x = emit(b, x, g.add_param(f"layers.{i}.weight", weight))
    g.set_outputs([x], ["y"])
    return Program({"forward": g}, dict(params))


def large(folder: Path) -> Iterator[tuple[str, Path]]:
    floats = products(TensorType(DType.F32, (4096, 4096)), 16, lambda b, x, w: b.linear(x, w))
    yield "f32, in the file", to_onnx(floats, folder / "inside.onnx", external_data=False)
    yield "f32, external data", to_onnx(floats, folder / "beside.onnx", external_data=True)
    small = products(QTensorType("int4", (8192, 8192)), 26, lambda b, x, w: b.quantized_linear(x, w))
    yield "MatMulNBits (4 bits), external data", to_onnx(small, folder / "nbits.onnx", external_data=True, matmul_nbits=True)


MEASURED = """
import sys, time
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
from wasat.frontend.onnx import from_onnx
before, started = peak(), time.perf_counter()
program = from_onnx(sys.argv[1])
seconds, imported = time.perf_counter() - started, peak()
started = time.perf_counter()
for p in program.params.values():
    p.load()
print(seconds, imported - before, time.perf_counter() - started, peak() - before)
"""


def import_table(folder: Path) -> Iterator[str]:
    yield "| model | file MB | import s | peak MB | loading every parameter, s | peak MB |"
    yield "|---|---|---|---|---|---|"
    for name, path in large(folder):
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
        seconds, imported, loading, loaded = map(float, done.stdout.split())
        yield f"| {name} | {size:.0f} | {seconds:.2f} | {imported:.0f} | {loading:.1f} | {loaded:.0f} |"
        for f in folder.iterdir():
            f.unlink()


# -- what is fused -----------------------------------------------------------------------------------------------------------
def fusion_table() -> Iterator[str]:
    yield "| model | attention | causal | windows | masks as data | rope | norms | glu | softmax left | KV cache |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for path in sorted(GOLDEN.glob("*.onnx")):
        program = from_onnx(path)
        report = PassManager(default_pipeline(kv_cache=None)).run(program)
        g = program["forward"]
        found: list[Any] = [n for n in g.nodes if n.is_a("attention")]
        norms = g.count("rms_norm") + g.count("layer_norm")
        left = [r.message for r in report.remarks("missed") if "softmax" in r.message]
        if len(left) != g.count("softmax"):
            raise SystemExit(f"{path.name}: {g.count('softmax')} softmax are left and {len(left)} remarks say why")
        counts = [
            len(found), sum(n.attrs.causal for n in found), sum(n.attrs.window is not None for n in found),
            sum(len(n.inputs) == 4 for n in found), g.count("rope"), norms, g.count("glu"),
            "; ".join(left) or 0, cache(path),
        ]  # fmt: skip
        yield f"| {path.stem} | " + " | ".join(map(str, counts)) + " |"


def cache(path: Path) -> str:
    """Whether prefill and decode follow, an attention mask being an input of ones, or the reason why not."""
    masked = any(i.name == "attention_mask" for i in onnx.load(path, load_external_data=False).graph.input)
    program = from_onnx(path, constants={"attention_mask": np.asarray(1)} if masked else {})
    PassManager(default_pipeline(kv_cache=None)).run(program)
    try:
        PassManager([DeriveKVCache()]).run(program)
    except IRError as e:
        what, *why = e.message.splitlines()  # the first line shows the node, if it is one's fault
        return "no: " + (why[0] if len(why) > 1 else what.removeprefix("pass derive-kv-cache: ")).strip()
    return "derived"


def suite_table() -> Iterator[str]:
    yield "| backend suite | of one process |"
    yield "|---|---|"
    for name, file in (("interpreter", "test_suite.py"), ("compiled for the CPU", "test_suite_compiled.py")):
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-o", "addopts=", "-q", f"tests/onnx/{file}"]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        yield f"| {name} | {done.stdout.splitlines()[-1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-suite", action="store_true", help="do not time the ONNX backend suite")
    args = parser.parse_args()
    print(f"# ONNX models\n\n`python benchmarks/onnx_models.py`, onnx {onnx.__version__}, {time.strftime('%Y-%m-%d')}.\n")
    print("## Import of large models\n\nPeak: resident memory beyond what it was before. ", end="")
    print("External floats are mapped, not read, when they are loaded.\n")
    with tempfile.TemporaryDirectory() as folder:
        print("\n".join(import_table(Path(folder))))
    print("\n## What is fused in models that torch exported\n\n`tests/golden/onnx`; of every softmax that is left, why.\n")
    print("\n".join(fusion_table()))
    if not args.skip_suite:
        print("\n## Time of the backend suite\n")
        print("\n".join(suite_table()))


if __name__ == "__main__":
    main()
