"""Seconds that every pass takes over decoders of growing depth: all of them should be linear in the number of nodes.

    python benchmarks/passes.py                     # 1,000, 10,000 and 100,000 nodes
    python benchmarks/passes.py 1000 4000           # others
    python benchmarks/passes.py --quantize none     # without quantization

The last column compares time per node between the largest and the smallest graph: near 1 where a pass is linear, near the ratio
of sizes where it is quadratic. Verification after every pass is measured by itself.
"""

from __future__ import annotations

import argparse
import gc
import time

from wasat.frontend import nn
from wasat.frontend.models.gemma3 import Gemma3, Options
from wasat.ir import Program
from wasat.passes import PassManager, default_pipeline


def decoder(layers: int) -> Program:
    """A small Gemma 3 of as many layers, with every sixth a full one."""
    types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)]
    options = Options(
        vocab=64, dim=32, hidden=64, heads=4, kv_heads=2, head_dim=8, eps=1e-6, act="gelu_tanh", tied=True, scale=8**-0.5,
        bias=False, logit_softcap=None, window=16, types=types,
    )  # fmt: skip
    model = Gemma3(options, {"full_attention": nn.RoPE(8, 1e6), "sliding_attention": nn.RoPE(8)})
    program = nn.trace(model, {"tokens": "i64[b, s]"}, outputs=["logits"])
    program.declare(context=128, vocab=64)
    return program


def measure(nodes: int, quantize: str | None) -> tuple[int, dict[str, float]]:
    """Nodes of a decoder of about that size, and seconds by pass (in order of the pipeline; repeated passes are numbered)."""
    per_layer = len(decoder(3)["forward"]) - len(decoder(2)["forward"])
    started = time.perf_counter()
    program = decoder(max(1, nodes // per_layer))
    seconds = {"(tracing)": time.perf_counter() - started}
    size = len(program["forward"])
    gc.collect()
    gc.disable()  # its sweeps over a growing heap come at random moments
    started = time.perf_counter()
    program.verify()
    seconds["(one verification)"] = time.perf_counter() - started
    report = PassManager(default_pipeline(quantize=quantize), verify=False).run(program)
    gc.enable()
    for i, step in enumerate(report.steps):
        again = sum(s.name == step.name for s in report.steps[:i])
        seconds[step.name + (f" {again + 1}" if again else "")] = step.seconds
    return size, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--quantize", default="int4", help="int8, int4, f16, bf16 or none")
    args = parser.parse_args()
    quantize = None if args.quantize == "none" else args.quantize
    measure(500, quantize)  # imports and caches
    runs = [measure(n, quantize) for n in args.nodes]
    print(f"{'pass':20}" + "".join(f"{f'{size:,} nodes':>16}" for size, _ in runs) + f"{'time per node':>16}")
    (small, first), (large, last) = runs[0], runs[-1]
    for name in first:
        growth = last[name] / large / (first[name] / small)
        print(f"{name:20}" + "".join(f"{seconds[name]:14.4f} s" for _, seconds in runs) + f"{growth:15.2f}x")
    print(f"{'all passes':20}" + "".join(f"{sum(s for n, s in r.items() if n[0] != '('):14.4f} s" for _, r in runs))


if __name__ == "__main__":
    main()
