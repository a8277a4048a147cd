"""Prefill and decode through ``generate``, beside llama.cpp in the same run.

    python benchmarks/generate.py FOLDER                                              # ours alone
    python benchmarks/generate.py FOLDER --llama-bench PATH --gguf int8=Q8.gguf --gguf int4=Q4.gguf -o table.md

Each precision is compiled in a process of its own (seconds, peak memory, artifact size). Then the contenders take turns, one
process a turn, half a second apart: idle workers of one would disturb the other. Prefill reads 512 tokens and returns one
position's logits; decode writes 64 tokens after 128. Figures are medians; ratios are medians of paired turns. A turn during
which other processes used more than a tenth of a core is repeated, twice at most, and counted as noisy after that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PREFILL, PROMPT, TOKENS = 512, 128, 64
QUIET = 0.1  # cores that others may use during a turn


# -- one process each ---------------------------------------------------------------------------------------------------------
def compile_model(folder: str, out: str, precision: str) -> None:
    """Compiles; prints seconds and peak memory."""
    import wasat as ws

    started = time.perf_counter()
    ws.compile(ws.from_pretrained(folder), out, quantize=None if precision == "f32" else precision)
    seconds = time.perf_counter() - started
    size = sum(f.stat().st_size for f in Path(out).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"compile_s": seconds, "artifact_bytes": size, "compile_peak_bytes": peak}))


def measure(out: str) -> None:
    """Loads the artifact and runs both tests three times; prints the medians, in tokens a second."""
    import numpy as np

    from wasat import runtime

    started = time.perf_counter()
    model = runtime.load(out)
    load = time.perf_counter() - started
    rng = np.random.default_rng(0)
    ids = rng.integers(300, (model.manifest.interface.vocab or 1000) - 300, PREFILL).tolist()
    prefill, decode = [], []
    model.generate([ids], 1)
    for _ in range(3):
        (r,) = model.generate([ids], 1)
        prefill.append(PREFILL / r.prefill_seconds)
        (r,) = model.generate([ids[:PROMPT]], TOKENS + 1)
        if r.steps != TOKENS:
            raise SystemExit(f"the model ended its text after {r.steps} tokens: take other weights")
        decode.append(r.steps / r.decode_seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"prefill": statistics.median(prefill), "decode": statistics.median(decode), "load_s": load, "peak_bytes": peak}
    print(json.dumps(found))


def _python(*args: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _llama(binary: str, gguf: str, threads: int) -> dict[str, float]:
    def run(*args: str) -> float:
        command = [binary, "-m", gguf, "-t", str(threads), "-o", "json", "-ngl", "0", "-r", "3", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return statistics.median(json.loads(done.stdout)[-1]["samples_ts"])

    return {"prefill": run("-p", str(PREFILL), "-n", "0"), "decode": run("-p", "0", "-n", str(TOKENS), "-d", str(PROMPT))}


# -- turns --------------------------------------------------------------------------------------------------------------------
def _busy() -> float:
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields[:3]) + fields[5] + fields[6]) / os.sysconf("SC_CLK_TCK")


def _turn(run: Callable[[], dict[str, float]]) -> tuple[dict[str, float], bool]:
    """The result of one turn, and whether others left the machine alone."""
    for _ in range(3):
        time.sleep(0.5)
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        started, before = time.perf_counter(), _busy()
        found = run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - own.ru_utime - own.ru_stime
        quiet = (_busy() - before - used) / (time.perf_counter() - started) < QUIET
        if quiet:
            break
    return found, quiet


def _cpu() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return model.group(1) if model else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", help="a Hugging Face folder (random weights will do)")
    parser.add_argument("--precision", action="append", choices=["f32", "f16", "int8", "int4"])
    parser.add_argument("--llama-bench", help="path of llama.cpp's llama-bench")
    parser.add_argument("--gguf", action="append", default=[], metavar="PRECISION=FILE", help="the same model for llama.cpp")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="append the table to this file")
    args = parser.parse_args()
    ggufs = dict(item.split("=", 1) for item in args.gguf)
    threads = len(os.sched_getaffinity(0))
    lines = [
        f"{_cpu()}, {threads} threads, {Path(args.folder).name}, {time.strftime('%Y-%m-%d')}; medians of {args.turns} turns.",
        "",
        "| weights | prefill 512, tok/s | llama.cpp | ratio | decode 64 after 128, tok/s | llama.cpp | ratio | compile s "
        "| compile peak MB | artifact MB | load s | run peak MB | noisy turns |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    place = Path(tempfile.mkdtemp())
    try:
        for precision in args.precision or ["f32", "f16", "int8", "int4"]:
            out = str(place / precision)
            made = _python("compile", args.folder, out, precision)
            ours, theirs, noisy = [], [], 0
            for _ in range(args.turns):
                found, quiet = _turn(lambda: _python("measure", out))  # noqa: B023
                ours.append(found)
                noisy += not quiet
                if precision in ggufs:
                    found, quiet = _turn(lambda: _llama(args.llama_bench, ggufs[precision], threads))  # noqa: B023
                    theirs.append(found)
                    noisy += not quiet
            lines.append(_row(precision, made, ours, theirs, noisy))
            print(lines[-1], flush=True)
            shutil.rmtree(out)
    finally:
        shutil.rmtree(place)
    text = "\n".join([*lines, ""])
    print("\n" + text)
    if args.output:
        with open(args.output, "a") as f:
            f.write(text + "\n")


def _row(
    precision: str, made: dict[str, float], ours: list[dict[str, float]], theirs: list[dict[str, float]], noisy: int
) -> str:
    cells = [precision]
    for what in ("prefill", "decode"):
        cells.append(f"{statistics.median(x[what] for x in ours):.1f}")
        if theirs:
            cells.append(f"{statistics.median(x[what] for x in theirs):.1f}")
            cells.append(f"{statistics.median(a[what] / b[what] for a, b in zip(ours, theirs)):.2f}")
        else:
            cells += ["", ""]
    mega = 1e6
    cells += [f"{made['compile_s']:.1f}", f"{made['compile_peak_bytes'] / mega:.0f}", f"{made['artifact_bytes'] / mega:.1f}"]
    cells += [f"{statistics.median(x['load_s'] for x in ours):.2f}", f"{max(x['peak_bytes'] for x in ours) / mega:.0f}"]
    cells.append(str(noisy))
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("compile", "measure"):
        {"compile": compile_model, "measure": measure}[sys.argv[1]](*sys.argv[2:])
    else:
        main()
