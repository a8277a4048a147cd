"""Attention of many queries on tensor cores: run on a GPU in software, which has the instructions as the PTX ISA describes
them; and the machine code that NVIDIA's compiler makes of them."""
from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
from gpu_help import BF16, MACHINES, run
from rounding import unit
from soft_cuda import soft_gpu
from test_cuda_code import fat_binaries, needs_nvcc
from test_gpu_halves import close, wide
from test_gpu_kernels import RNG, added, normal
from test_gpu_select import choose, evaluated, kernels
from test_tensor_cores import HMMA, LDL, LDSM, STL, instructions
from wasat.backends.tvm import cuda
from wasat.backends.tvm.gpu.kernels.attention import Attention
from wasat.backends.tvm.gpu.kernels.tensor_attention import tensor_attention
from wasat.backends.tvm.plan import ptx
from wasat.backends.tvm.plan.kernels import functions
from wasat.backends.tvm.targets import limits_of
from wasat.ir import DType
from wasat.ir.op import OPS

from wasat.testing import feed, random_program

pytestmark = pytest.mark.machines
MACHINE = MACHINES[-1]
F16 = np.dtype(np.float16)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def lost(half: np.dtype[Any], weighed: NDArray[Any], keys: int, v: NDArray[Any]) -> NDArray[Any]:
    """What rounding the weights to 16 bits moves: a share of each value; the smallest ones of f16 vanish."""
    moved: NDArray[Any] = unit(DType.of(half)) * np.abs(weighed) + keys * 2.0**-25 * np.nanmax(np.abs(v)) + added(v)
    return np.nan_to_num(moved)


def empty(half: np.dtype[Any], *shape: int) -> NDArray[Any]:
    return np.full(shape, 77, half)


@pytest.mark.parametrize("half, heads, d, e, s, t, more", [
    (F16, (4, 2), 64, 64, 37, 37, {}), (BF16, (3, 1), 256, 256, 30, 50, {}),
    (F16, (2, 2), 96, 16, 5, 70, {"window": 60, "causal": False}),
], ids=["causal, NaN", "256 features", "a window, not causal"])  # fmt: skip
def test_attention(half: np.dtype[Any], heads: tuple[int, int], d: int, e: int, s: int, t: int, more: dict[str, Any]) -> None:
    h, g = heads
    q, k, v = (x.astype(half) for x in (normal(2, s, h, d), normal(2, t, g, d), normal(2, t, g, e)))
    if s == 37:
        q[0, 3, 1], k[1, 5, 0] = np.nan, np.nan
    mask = []
    if not more.get("causal", True):  # nothing seen, all of it hidden by the lowest number, and half of it
        m = normal(1, 1, s, t).astype(half)
        m[0, 0, 0], m[0, 0, 1], m[0, 0, 2, ::2] = -np.inf, np.finfo(half).min, -np.inf
        mask = [m]
    desc = Attention(MACHINE.limits, h, g, d, e, 0.1, dtype=half.name, stored=half.name, mask="f" if mask else "", **more)
    y = run(MACHINE, tensor_attention(desc), [q, k, v, *mask, empty(half, 2, s, h, e)])[-1]
    op = OPS["attention"]
    reference = partial(op.reference, op.Attrs(scale=0.1, causal=more.get("causal", True), window=more.get("window")))
    weighed = reference(*map(wide, (q, k, np.abs(v), *mask)))
    close(y, reference, q, k, v, *mask, lost=lost(half, weighed, t, wide(v)))  # type: ignore[arg-type]


@pytest.mark.parametrize("half, d, s, past, window, ring, causal, mask", [
    (BF16, 80, 19, [0, 41], 11, False, True, "fBH"), (F16, 128, 9, [100, 0], 40, True, True, "bB"),
    (BF16, 64, 6, [30, 2], None, False, False, "bB"),
], ids=["full, all there is", "ring", "block not causal"])  # fmt: skip
def test_cached_attention(
    half: np.dtype[Any], d: int, s: int, past: list[int], window: Any, ring: bool, causal: bool, mask: str
) -> None:
    h, g, c, e = 4, 2, 64, 96
    q, k, v = (x.astype(half) for x in (normal(2, s, h, d), normal(2, s, g, d), normal(2, s, g, e)))
    keys, values, at = normal(2, c, g, d).astype(half), normal(2, c, g, e).astype(half), np.array(past, np.int64)
    if not ring:  # what was never written may be anything
        for row, first in enumerate(past):
            keys[row, first + s :], values[row, first + s :] = np.nan, np.nan
    own = normal(2, h if "H" in mask else 1, s, c)
    more = [own > 0 if "b" in mask else own.astype(half), normal(h).astype(half)]
    softcap = 2.0 if "f" in mask else None
    op = OPS["cached_attention"]
    attrs = op.Attrs(scale=0.1, window=window, ring=ring, causal=causal, sink=True, softcap=softcap)
    plain = [np.where(np.isnan(x), 0, x).astype(half) for x in (keys, values)]
    for row, first in enumerate(past):
        for i in range(s):
            keys[row, (first + i) % c], values[row, (first + i) % c] = k[row, i], v[row, i]
    desc = Attention(
        MACHINE.limits, h, g, d, e, 0.1, softcap, window, causal, cached=True, ring=ring, mask=mask, dtype=half.name,
        stored=half.name, sink=half.name,
    )  # fmt: skip
    assert desc.name.startswith("mma_attention_")
    y = run(MACHINE, tensor_attention(desc), [q, at, keys, values, *more, empty(half, 2, s, h, e)])[-1]

    def reference(q: Any, k: Any, v: Any, keys: Any, values: Any, *more: Any) -> Any:
        return op.reference(attrs, q, k, v, keys, values, at, *more)[0]

    weighed = reference(*map(wide, (q, k, np.abs(v), plain[0], np.abs(plain[1]), *more)))
    moved = lost(half, weighed, c, np.concatenate([wide(v), wide(plain[1])], 1))
    close(y, reference, q, k, v, *plain, *more, lost=moved)  # type: ignore[arg-type]


def test_order_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread of a workgroup comes first; and without its wait for what is copied, the kernel is wrong here."""
    q, k, v = (normal(1, 70, 1, 16).astype(BF16) for _ in range(3))
    desc = Attention(MACHINE.limits, 1, 1, 16, 16, 0.3, dtype="bfloat16", stored="bfloat16")

    def results() -> NDArray[Any]:
        return run(MACHINE, tensor_attention(desc), [q, k, v, empty(BF16, 1, 70, 1, 16)])[-1].astype(np.float32)

    first = results()
    monkeypatch.setattr("gpu_help.soft_gpu", lambda: soft_gpu(backwards=1))
    np.testing.assert_array_equal(results(), first)
    monkeypatch.setitem(ptx._FUNCTIONS, "wasat_copied", "static __device__ void wasat_copied() {}")
    assert np.isnan(results()).any()


def test_what_has_no_tensor_cores() -> None:
    d = Attention(MACHINE.limits, 4, 2, 64, 64, 0.1, dtype="bfloat16", stored="bfloat16")
    assert (d.slow, d.name[:4]) == (None, "mma_")
    plain = {
        "its queries are f32": replace(d, dtype="float32", stored="float32"),
        "its keys are float16, its queries bfloat16": replace(d, stored="float16"),
        "its heads have 40 and 64 features, no multiples of 16 up to 256": replace(d, key=40),
        "its heads have 64 and 272 features, no multiples of 16 up to 256": replace(d, value=272),
        "the device has none that take f16 and bf16": replace(d, limits=limits_of(MACHINE.device)),
        "it has one query": replace(d, decode=True, cached=True),
    }
    for why, desc in plain.items():
        assert (desc.slow, desc.name[:4] == "mma_") == (why, False)


GRAPH = """graph @f(%q: bf16[b, s, 2, 32], %k: bf16[b, s, 1, 32], %v: bf16[b, s, 1, 16], %n: bf16[b, s, 1, 24]) {
  %x: bf16[b, s, 2, 16] = attention(%q, %k, %v) {scale=0.2, causal=true}
  %y: bf16[b, s, 2, 24] = attention(%q, %k, %n) {scale=0.2, causal=true}
  return %x, %y
}"""


def test_it_is_told_which() -> None:
    """Of attentions as of products; what is chosen means the same."""
    program = random_program(GRAPH, seed=1)
    graphs, left = choose(program, MACHINE)
    assert [(x.kind, x.why) for x in left] == [
        ("fast", "1 attention of many queries on tensor cores"),
        ("slow", "1 attention of many queries without tensor cores: "
                 "its heads have 32 and 24 features, no multiples of 16 up to 256"),
    ]  # fmt: skip
    assert kernels(graphs["f"]) == ["Attention", "Attention"]
    inputs = feed(program["f"], {"b": 1, "s": 20}, seed=1)
    op = OPS["attention"]
    reference = partial(op.reference, op.Attrs(scale=0.2, causal=True))
    found = evaluated(graphs["f"], program, inputs, MACHINE)
    for name, values in (("x", "v"), ("y", "n")):
        q, k, v = (inputs[n] for n in ("q", "k", values))
        weighed = reference(*map(wide, (q, k, np.abs(v))))
        close(found[name], reference, q, k, v, lost=lost(BF16, weighed, 20, wide(v)))  # type: ignore[arg-type]
    assert choose(program, MACHINES[1])[1] == []


@needs_nvcc
def test_machine_code(tmp_path: Path) -> None:
    """Of heads of 128 features and blocks of 64 keys, in the loop: 64 products of fragments for the scores, 64 for the values;
    32 reads of fragments of each, and before it 8 of the queries. No register lies in memory."""
    desc = Attention(MACHINE.limits, 8, 2, 128, 128, 0.1, cached=True, dtype="bfloat16", stored="bfloat16")
    module = tvm.IRModule({desc.name: tensor_attention(desc)})
    [launch] = functions(module, MACHINE.target, MACHINE.device)[desc.name].launches
    path = tmp_path / "kernels.fatbin"
    path.write_bytes(cuda.fat_binary(launch.kernel.source, ["sm_80", "sm_90a"]))
    [entries] = fat_binaries(path)
    for e in entries:
        found, registers = instructions(e.data)
        assert (found[HMMA], found[LDSM]) == (128, 72)
        assert found[LDL] == found[STL] == 0
        assert registers <= 255
