"""Decode and prefill on WebGPU and OpenCL: in Chromium beside onnxruntime-web, and through the hosts in Python.

    python benchmarks/browsers.py > benchmarks/results/browsers.md      # Debian's chromium, npm, playwright, wgpu, pyopencl
    python benchmarks/browsers.py examples/pygemma --quantize f32 --rounds 3

Contenders take turns in one page of one browser, on the same adapter: our WebGPU host, onnxruntime-web on WebGPU, and on the
processor (wasm). It runs the ONNX files that ``wasat export --optimized`` writes, its caches on the GPU. Each turn is a prompt
and greedy tokens, which are compared. Then lavapipe and PoCL, by turns too. A turn is timed by the clock, and by the processor
time of the browser or the process: on a device in software this says what work there is, the clock also who else was at work.
Figures are medians, ratios those of paired turns: compare no figures of different runs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import history
import numpy as np
import onnx
from wasat.backends.onnx import FORMATS

import wasat as ws
from wasat.web import export_web

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "onnxruntime-web@1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
CONTEXT = 256
RUNTIME = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
WEBGPU = [
    "--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader",
    "--use-webgpu-adapter=swiftshader",
]  # fmt: skip


class _Isolated(http.server.SimpleHTTPRequestHandler):
    """Pages that may share memory among threads, which onnxruntime-web's wasm wants."""

    extensions_map: ClassVar = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args: Any) -> None: ...


def fetch(folder: Path) -> None:
    """Puts onnxruntime-web's files into ``folder``. Raises SystemExit where npm brings something else."""
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=tmp, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(tmp).glob("*.tgz")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != INTEGRITY:
            raise SystemExit(f"npm brought another {PACKAGE}: {found}")
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                name = Path(member.name).name
                if member.name.startswith("package/dist/ort") and name.endswith((".mjs", ".wasm")):
                    file = tar.extractfile(member)
                    assert file is not None
                    (folder / name).write_bytes(file.read())


# -- in the browser -----------------------------------------------------------------------------------------------------------
def exported(source: Path, scheme: str, folder: Path, opsets: list[int]) -> tuple[dict[str, Any], dict[str, int]]:
    """Our folder, the artifact's for OpenCL, and the ONNX files: inputs of these, and bytes of all."""
    quantize = None if scheme == "f32" else scheme
    export_web(ws.from_pretrained(source), folder / "model", quantize=quantize)
    program = ws.from_pretrained(source)
    program, _ = ws.optimize(program, quantize=quantize, activation=None, kv_cache=None, formats=FORMATS)
    inputs: dict[str, Any] = {}
    for opset in opsets:
        for entry in ("prefill", "decode"):
            path = folder / f"{entry}-{opset}.onnx"
            ws.to_onnx(program, path, graph=entry, opset=opset, external_data=False, matmul_nbits=quantize is not None)
            inputs[entry] = _inputs(path)
    page = sum(f.stat().st_size for f in (folder / "model").iterdir())
    runtime = sum((folder / "ort" / name).stat().st_size for name in RUNTIME)
    return inputs, {"page": page, "onnx": (folder / f"decode-{opsets[0]}.onnx").stat().st_size, "runtime": runtime}


def _inputs(path: Path) -> dict[str, Any]:
    """Types and sizes of an ONNX file's inputs, of batch 1 and a cache of CONTEXT positions."""
    known = {"b": 1, "c": CONTEXT}
    out = {}
    for x in onnx.load(path, load_external_data=False).graph.input:
        t = x.type.tensor_type
        dtype = {1: "float32", 6: "int32", 7: "int64", 9: "bool"}[t.elem_type]
        out[x.name] = {"dtype": dtype, "shape": [d.dim_value or known.get(d.dim_param, 1) for d in t.shape.dim]}
    return out


def _children(pid: int) -> list[int]:
    found = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
    return [pid, *(x for c in found for x in _children(c))]


def processor_seconds(pid: int) -> float:
    """Of a process and what it started."""
    total = 0
    for p in _children(pid):
        with contextlib.suppress(OSError):
            total += sum(map(int, Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


TURN = "([name, ids, count, context]) => bench.turn(contenders[name], ids, count, context)"


def browser(
    folder: Path, inputs: dict[str, Any], opsets: list[int], rounds: int, shape: tuple[list[int], int]
) -> dict[str, list[dict[str, Any]]]:
    """Turns of each contender: ``ours``, ``webgpu`` and ``wasm`` with the operator set; says on stderr who fails, and why."""
    from playwright.sync_api import Page, sync_playwright

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Isolated, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    turns: dict[str, list[dict[str, Any]]] = {}

    def made(page: Page, name: str, code: str, *args: Any) -> None:
        try:
            script = f"async (args) => {{ contenders[{name!r}] = await bench.{code}(...args); }}"
            page.evaluate(script, list(args))
            first = page.evaluate(TURN, [name, shape[0], 2, CONTEXT])  # kernels are compiled
            print(f"{name}: first turn {first['prefill']:.1f} s, 2 tokens {first['decode']:.2f} s", file=sys.stderr, flush=True)
            turns[name] = []
        except Exception as e:
            print(f"{name}: {str(e).splitlines()[0][:300]}", file=sys.stderr, flush=True)

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=WEBGPU)
        page = chromium.new_page()
        page.set_default_timeout(0)
        page.goto(f"http://127.0.0.1:{server.server_port}/bench.html")
        page.wait_for_function("!!globalThis.bench")
        made(page, "ours", "ours")
        for opset in opsets:
            files = {entry: f"./{entry}-{opset}.onnx" for entry in ("prefill", "decode")}
            for provider in ("webgpu", "wasm"):
                made(page, f"{provider} {opset}", "theirs", provider, files, inputs)
        for _ in range(rounds):
            for name, found in turns.items():
                before = processor_seconds(os.getpid())
                turn = page.evaluate(TURN, [name, shape[0], 0, CONTEXT])
                between = processor_seconds(os.getpid())
                whole = page.evaluate(TURN, [name, *shape, CONTEXT])
                first, both = between - before, processor_seconds(os.getpid()) - between
                found.append({**whole, "prefill": turn["prefill"], "prefill_cpu": first, "decode_cpu": both - first})
                print(f"{name}: {found[-1]['prefill']:.2f} s, {found[-1]['decode']:.2f} s", file=sys.stderr, flush=True)
        chromium.close()
    server.shutdown()
    return turns


# -- hosts in Python ----------------------------------------------------------------------------------------------------------
def device(artifact: str, prompt: str, count: str, rounds: str) -> None:
    """Turns of an artifact in this process, as JSON."""
    from wasat import runtime

    model, ids = runtime.load(artifact), json.loads(prompt)
    turns = []
    model.generate([ids], 2)
    for _ in range(int(rounds)):
        a = time.process_time()
        model.generate([ids], 1)
        b = time.process_time()
        (r,) = model.generate([ids], int(count) + 1)
        n = int(count) / max(r.steps, 1)
        cpu = {"prefill_cpu": b - a, "decode_cpu": (time.process_time() - b - (b - a)) * n}
        turns.append({"prefill": r.prefill_seconds, "decode": r.decode_seconds * n, "tokens": r.tokens, **cpu})
    print(json.dumps(turns))


def python_hosts(source: Path, scheme: str, folder: Path, rounds: int, shape: tuple[list[int], int]) -> dict[str, list[Any]]:
    turns: dict[str, list[Any]] = {"webgpu": [], "opencl": []}
    program = ws.from_pretrained(source)
    program.declare(generation=dataclasses.replace(program.interface.generation, eos=()))  # as many tokens as the page writes
    for target in turns:
        ws.compile(program, folder / target, target=target, quantize=None if scheme == "f32" else scheme)
    for _ in range(rounds):
        for target, found in turns.items():
            command = [sys.executable, __file__, "device", str(folder / target), json.dumps(shape[0]), str(shape[1]), "1"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{target}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
                break
            found += json.loads(done.stdout.splitlines()[-1])
    return {target: found for target, found in turns.items() if found}


# -- tables -------------------------------------------------------------------------------------------------------------------
def _rows(turns: dict[str, list[dict[str, Any]]], others: dict[str, list[Any]], shape: tuple[list[int], int]) -> list[str]:
    count = shape[1]
    ours = turns.get("ours", [])
    rows = []
    named = {"ours": "Chromium, ours", "webgpu": "Chromium, onnxruntime-web, WebGPU", "wasm": "Chromium, onnxruntime-web, wasm"}
    for name, of in turns.items():
        kind, _, opset = name.partition(" ")
        label = named[kind] + (f", operator set {opset}" if opset else "")
        rows.append(_row(label, of, ours if kind != "ours" else [], shape))
        same = sum(a["tokens"] == b["tokens"] for a, b in zip(ours, of))
        rows[-1] += f" {same} of {len(of)} |"
    for target, name in (("webgpu", "lavapipe, from Python"), ("opencl", "PoCL, from Python")):
        if of := others.get(target, []):
            same = sum(a["tokens"][:count] == b["tokens"][:count] for a, b in zip(ours, of))
            rows.append(_row(name, of, [], shape) + f" {same} of {len(of)} |")
    return rows


def _row(name: str, of: list[dict[str, Any]], ours: list[dict[str, Any]], shape: tuple[list[int], int]) -> str:
    cells = [name]
    for what, n in (("prefill", len(shape[0])), ("decode", shape[1])):
        cells.append(f"{statistics.median(n / t[what] for t in of):.1f}")
        cells.append(f"{1000 * statistics.median(t[what + '_cpu'] for t in of) / n:.1f}")
        for kind in (what, what + "_cpu"):
            cells.append(f"{statistics.median(b[kind] / max(a[kind], 1e-3) for a, b in zip(ours, of)):.2f}" if ours else "")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="*", type=Path, default=[ROOT / "examples" / n for n in ("pygemma", "gemini")])
    parser.add_argument("--quantize", action="append", help="f32, int8, int4-plain; default: f32 and int4-plain")
    parser.add_argument("--opset", action="append", type=int, help="of the ONNX files; default: 24")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--no-python", action="store_true", help="Chromium alone")
    args = parser.parse_args()
    opsets = args.opset or [24]
    print("# WebGPU and OpenCL on devices in software\n")
    command = " ".join(["python benchmarks/browsers.py", *sys.argv[1:]])
    print(f"`{command}`, {PACKAGE}, {history.machine()}, {time.strftime('%Y-%m-%d')}.")
    print(f"Prompts of {args.prompt} tokens, then {args.tokens}; medians of {args.rounds} turns; CPU is processor time.")
    print("Ratios: how many times longer, and how much more processor time, onnxruntime-web takes than ours, turn by turn.")
    print("The machine did other work meanwhile: compare only figures of one table; processor time says more than the clock.")
    for source in args.models:
        for scheme in args.quantize or ["f32", "int4-plain"]:
            with tempfile.TemporaryDirectory() as tmp:
                folder = Path(tmp)
                (folder / "ort").mkdir()
                fetch(folder / "ort")
                shutil.copy(Path(__file__).with_suffix(".js"), folder / "bench.js")
                (folder / "bench.html").write_text(PAGE)
                inputs, sizes = exported(source, scheme, folder, opsets)
                shape = np.random.default_rng(0).integers(10, 200, args.prompt).tolist(), args.tokens
                turns = browser(folder, inputs, opsets, args.rounds, shape)
                others = {} if args.no_python else python_hosts(source, scheme, folder, args.rounds, shape)
            print(f"\n## {source.name}, {scheme}\n")
            mega = {name: f"{n / 1e6:.1f} MB" for name, n in sizes.items()}
            print(f"The page with the model, tokenizer and host: {mega['page']}. decode.onnx: {mega['onnx']},")
            print(f"onnxruntime-web's code for WebGPU: {mega['runtime']}.\n")
            columns = [f"{what} tok/s | CPU ms a token | ratio | of CPU" for what in ("prefill", "decode")]
            print(f"| where | {' | '.join(columns)} | turns with our tokens |\n" + "|---" * 10 + "|")
            print("\n".join(_rows(turns, others, shape)), flush=True)


PAGE = """<!doctype html><script type="module">
globalThis.contenders = {};
globalThis.bench = await import("./bench.js");
</script>"""

if __name__ == "__main__":
    if sys.argv[1:2] == ["device"]:
        device(*sys.argv[2:])
    else:
        main()
