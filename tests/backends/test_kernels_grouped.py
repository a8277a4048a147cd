"""Grouped products over packed weights: every storage type, groups without rows, of one and of many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_help import Terms, assert_near, build, each_isa, rounded, run, uneven
from ml_dtypes import bfloat16
from test_kernels_blocks import NAMES, weight
from wasat.backends.tvm.cpu.kernels.blocks import pack_blocks
from wasat.backends.tvm.cpu.kernels.grouped import Grouped, GroupRows, group_rows, grouped, grouped_shape
from wasat.backends.tvm.cpu.kernels.isa import GENERIC, Isa
from wasat.backends.tvm.cpu.kernels.linear_blocks import LinearBlocks, linear_blocks
from wasat.backends.tvm.cpu.kernels.linear_float import Linear, linear
from wasat.backends.tvm.cpu.kernels.linear_int import LinearInt, linear_int
from wasat.backends.tvm.cpu.kernels.pack import pack_bias, pack_float, pack_int
from wasat.backends.tvm.cpu.kernels.quantize import quantize_rows_reference
from wasat.ir import QTensorType
from wasat.ir.ops.quant import quantize_array

E = 5
COUNTS = [(1, 0, 0, 0, 0), (0, 1, 0, 1, 0), (2, 0, 1, 0, 3), (0, 0, 29, 1, 0), (3, 241, 7, 0, 1), (0, 0, 0, 500, 13), (0,) * E]
"""Rows of each group."""


def rows_of(counts: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(E), counts)).astype(np.int64)


def sorted_rows(groups: np.ndarray) -> list[np.ndarray]:
    starts = np.searchsorted(np.sort(groups), np.arange(E + 1)).astype(np.int64)
    return [np.argsort(groups, kind="stable").astype(np.int64), starts]


@pytest.mark.parametrize("counts", COUNTS)
def test_rows_are_sorted_by_group(counts: tuple[int, ...]) -> None:
    groups = rows_of(counts)
    made = run(build(group_rows(GroupRows(E)), GENERIC), [groups], ((len(groups),), "int64"), ((E + 1,), "int64"))
    for got, want in zip(made, sorted_rows(groups)):
        np.testing.assert_array_equal(got, want)


def weights(isa: Isa, storage: str, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrices as numbers, and packed."""
    if storage in NAMES:
        each = [weight(storage, n, k, seed) for seed in range(E)]
        return np.stack([w.dense() for w in each]), np.concatenate([pack_blocks(w, isa) for w in each])
    w = uneven(np.random.default_rng(1), E, n, k)
    if storage in ("int8", "int4"):
        q = quantize_array(w, QTensorType(storage, (E, n, k)))
        packed = [pack_int(v, s, int(storage[3:]), isa) for v, s in zip(q.values, q.scales)]
        return q.dense(), np.concatenate(packed)
    stored = w.astype(bfloat16 if storage == "bfloat16" else storage)
    return stored.astype(np.float32), np.concatenate([pack_float(m, isa, storage) for m in stored])  # type: ignore[arg-type]


SHAPES = [
    (260, 72, 1, True, "float32"), (33, 45, 2, False, "float32"), (40, 33, 2, True, "float16"), (7, 5, 3, False, "bfloat16"),
    (230, 72, 2, True, "int8"), (24, 45, 1, False, "int4"),
    (40, 160, 2, True, "s4b160"), (33, 256, 1, False, "q4_k"), (40, 128, 3, True, "int4zb128f16"),
]  # fmt: skip


@each_isa()
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("n, k, per, bias, storage", SHAPES)
def test_grouped(isa: Isa, n: int, k: int, per: int, bias: bool, storage: Any, integers: bool) -> None:
    if integers and storage not in ("int8", "int4", *NAMES):
        pytest.skip("products of integers are those of integer weights")
    if not integers and storage in NAMES and storage != "s4b160":
        pytest.skip("one format says how floats read all of them")
    kind, one = (LinearBlocks, linear_blocks) if storage in NAMES else (LinearInt, linear_int)
    if not integers:
        kind, one = Linear, linear  # type: ignore[assignment]
    desc = Grouped(kind(isa, n, k, storage, bias=bias, threads=2), E, per)  # type: ignore[arg-type]
    compiled = build(grouped(desc), isa)
    single = build(one(desc.product), isa)  # type: ignore[arg-type]
    w, packed = weights(isa, storage, n, k)
    assert packed.shape == grouped_shape(desc)
    rng = np.random.default_rng(2)
    b = rng.standard_normal((E, n)).astype(np.float32)
    biases = [pack_bias(row, isa) for row in b] if bias else []
    for counts in COUNTS:
        groups = rows_of(counts)
        groups = groups[: len(groups) // per * per]
        m = len(groups)
        x = uneven(rng, m // per, k)
        given = quantize_rows_reference(x) if integers else x
        more = [np.concatenate(biases)] if bias else []
        [y] = run(compiled, [given, packed, *sorted_rows(groups), *more], ((m, n), "float32"))
        read = rounded(x) if integers else x.astype(np.float64)
        sums = (np.einsum("mk,mnk->mn", f(np.repeat(read, per, 0)), f(w[groups])) for f in (np.asarray, np.abs))
        want = Terms(*sums, k) + (b[groups] if bias else np.zeros((m, n)))
        if not m:
            continue
        assert_near(y, want)
        panels = len(packed) // E
        for i in range(0, m, max(1, m // 5)):  # the same bits as that row's linear
            e = groups[i]
            alone = [given[i // per : i // per + 1], packed[e * panels : (e + 1) * panels], *biases[e : e + 1]]
            [row] = run(single, alone, ((1, n), "float32"))
            np.testing.assert_array_equal(y[i], row[0])
