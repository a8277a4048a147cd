"""A mixture of experts beside a dense gated layer of the same active size: one token, and a prompt.

    python benchmarks/experts.py [--dim 2048] [--megabytes 96] [--experts 8] [--top-k 2] [--tokens 512] [--out FILE]

Both take random tokens. Experts are so wide that those of one token are of --megabytes, whatever the scheme: beyond the last
cache, as is the dense layer. "skewed": the first expert is among every token's, so that it gets half of the rows. The goal:
within 1.5 times the dense layer, 2 times where skewed. Times are medians of calls in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from wasat.backends.tvm.build import Runner
from wasat.backends.tvm.targets import cpu
from wasat.frontend import nn

import wasat as ws

SCHEMES = {"f32": 4, "int8": 1 + 2 / 32, "int4": 4.8 / 8, "int4-plain": 4.5 / 8, "s4": 4.5 / 8, "s6": 6.5 / 8}
"""Bytes of a weight."""


class Tilted(nn.MoE):
    """With numbers added to the router's scores."""

    def __call__(self, x: nn.Tensor, tilt: nn.Tensor | None = None) -> nn.Tensor:
        self.tilt = tilt
        return super().__call__(x)

    def route(self, x: nn.Tensor) -> tuple[nn.Tensor, nn.Tensor]:
        best, which = nn.top_k(self.router(x) + self.tilt, self.top_k)
        return nn.softmax(best), which


def runner(layer: nn.Module, inputs: dict[str, str], scheme: str, threads: int | None) -> Runner:
    program = nn.trace(layer, inputs, outputs=["y"])
    program, _ = ws.optimize(program, quantize=None if scheme == "f32" else scheme, kv_cache=False)
    return Runner(program, cpu(threads=threads))


def paired(runs: list[Callable[[int], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The median time of a call of each, in turns, so that whatever else the machine does is shared by all."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(0)
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, own in zip(runs, times):
            start = clock()
            run(len(own))
            own.append(clock() - start)
    return [statistics.median(own) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 2048), ("megabytes", 96), ("experts", 8), ("top-k", 2), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--schemes", nargs="+", default=["f32", "int8", "int4"], choices=SCHEMES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--own-time", action="store_true", help="one thread, and its own time: for a machine that others use")
    a = parser.parse_args()
    clock, threads = (time.thread_time, 1) if a.own_time else (time.perf_counter, None)
    rows = {"x": f"f32[s, {a.dim}]"}
    tokens = np.random.default_rng(0).normal(size=(a.tokens, a.dim)).astype(np.float32)
    even = np.zeros(a.experts, np.float32)
    skewed = np.array([100.0, *even[1:]], np.float32)
    found = []

    def slide(i: int, n: int) -> dict[str, np.ndarray]:
        """n tokens, others in each call."""
        return {"x": tokens[i % (a.tokens - n + 1) :][:n]}

    def called(layer: Runner, n: int, **more: np.ndarray) -> Callable[[int], object]:
        return lambda i: layer("forward", {**slide(i, n), **more})

    for scheme in a.schemes:
        hidden = round(a.megabytes * 1e6 / (SCHEMES[scheme] * 3 * a.dim * a.top_k) / 64) * 64
        dense = runner(nn.GLU(a.dim, hidden * a.top_k), rows, scheme, threads)
        mixed = runner(Tilted(a.dim, hidden, a.experts, a.top_k), {**rows, "tilt": f"f32[{a.experts}]"}, scheme, threads)
        for n in (1, a.tokens):
            runs = [called(dense, n), *(called(mixed, n, tilt=tilt) for tilt in (even, skewed))]
            of, *both = paired(runs, a.seconds, clock)
            for kind, t in zip(("even", "skewed"), both):
                found.append({"scheme": scheme, "tokens": n, "routing": kind, "seconds": t, "dense": of, "ratio": t / of})
                said = f"{t * 1e3:9.3f} ms, dense {of * 1e3:9.3f} ms, {t / of:.2f} x"
                print(f"{scheme:5} {n:4} tokens, {kind:6}: {said}", flush=True)
        del dense, mixed
    if a.out is not None:
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
