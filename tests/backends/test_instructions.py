"""The meaning of each instruction that kernels name, where this processor has it, and of its soft spelling everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_help import build, lacks, run, softened
from numpy.typing import NDArray
from wasat.backends.tvm.cpu.kernels.emit import Kernel, int64, load
from wasat.backends.tvm.cpu.kernels.instructions import Instructions
from wasat.backends.tvm.cpu.kernels.isa import AVX2, AVX512_VNNI, AVX_VNNI, ISAS, NEON_DOTPROD, NEON_I8MM, Isa

Array = NDArray[Any]


def vpdpbusd(sums: Array, a: Array, b: Array) -> Array:
    return sums + (a.astype(np.int32) * b).reshape(-1, 4).sum(1)


def pmaddubsw(a: Array, b: Array) -> Array:
    return (a.astype(np.int32) * b).reshape(-1, 2).sum(1).clip(-32768, 32767)


def pmaddwd(a: Array, b: Array) -> Array:
    return (a.astype(np.int64) * b).reshape(-1, 2).sum(1)


def psignb(a: Array, b: Array) -> Array:
    return (a.astype(np.int32) * np.sign(b)).astype(np.int8)


# definition, types of the operands and of the result
MEANT: dict[str, tuple[Callable[..., Array], list[str], str]] = {
    "vpdpbusd": (vpdpbusd, ["int32", "uint8", "int8"], "int32"), "pmaddubsw": (pmaddubsw, ["uint8", "int8"], "int16"),
    "pmaddwd": (pmaddwd, ["int16", "int16"], "int32"), "psignb": (psignb, ["int8", "int8"], "int8"),
}  # fmt: skip
HELD = [
    (AVX512_VNNI, "vpdpbusd"), (AVX_VNNI, "vpdpbusd"), (AVX2, "pmaddubsw"), (AVX2, "pmaddwd"), (AVX2, "psignb"),
    (NEON_DOTPROD, "vpdpbusd"), (NEON_I8MM, "vpdpbusd"),
]  # fmt: skip


def test_each_is_tested() -> None:
    assert set(MEANT) == {name for _, name in HELD} == set(Instructions.__dataclass_fields__)
    assert {isa for isa, _ in HELD} == {isa for isa in ISAS.values() if isa.dot != "float"}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("isa, name", HELD, ids=[f"{isa.name}-{name}" for isa, name in HELD])
def test_meaning(isa: Isa, name: str, soft: bool) -> None:
    if not soft and lacks(isa):
        pytest.skip(f"this CPU has no {', '.join(lacks(isa))}")
    isa = softened(isa) if soft else isa
    meant, types, made = MEANT[name]
    vectors, size = 64, isa.lanes * 4
    rng = np.random.default_rng(0)
    operands = []
    for dtype in types:
        count, info = vectors * size // np.dtype(dtype).itemsize, np.iinfo(dtype)
        x = rng.integers(info.min, info.max, count, dtype, endpoint=True)
        at = rng.random(count) < 0.5  # the ends: where sums saturate, and products of two least numbers
        x[at] = rng.choice(np.array([info.min, info.max, 0, 1], dtype), at.sum())
        operands.append(x if dtype != "int32" else x >> 8)  # no overflow: what it gives is nothing that a kernel asks for
    if name == "pmaddwd":
        operands[0] = np.maximum(operands[0], -32767)
    kernel = Kernel("one")
    buffers = [kernel.param(f"x{i}", x.shape, str(x.dtype)) for i, x in enumerate(operands)]
    total = vectors * size // np.dtype(made).itemsize
    y = kernel.param("y", (total,), made)
    with kernel.loop(vectors) as i:
        loaded = [load(b, i * (len(x) // vectors), len(x) // vectors) for b, x in zip(buffers, operands)]
        kernel.store(y, i * (total // vectors), getattr(isa.instructions, name)(*map(kernel.let, loaded)))
    [got] = run(build(kernel.build(), isa), operands, ((total,), made))
    np.testing.assert_array_equal(got, meant(*operands))


@pytest.mark.parametrize("make, what", [
    (lambda k: k.registers(3, "float32", 0), r"a local buffer of float32 has the shape \(0,\): each extent must be at least 1"),
    (lambda k: k.registers(0, "int32", 8), r"local buffer of int32 has the shape \(0,\)"),
    (lambda k: k.scratch((4, int64(-1)), "float32"), r"global buffer of float32 has the shape \(4, .*-1.*\)"),
])  # fmt: skip
def test_buffers_of_nothing_are_refused(make: Callable[[Kernel], Any], what: str) -> None:
    """TVM takes them, and what is written there lies over something else."""
    with pytest.raises(ValueError, match=what):
        make(Kernel("k"))
