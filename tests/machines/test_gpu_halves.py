"""The kernels for GPUs of activations in f16 and bf16, which are computed with in f32: results are rounded once."""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
import kernel_help
from gpu_help import Machine, on_halves, run
from kernel_help import EPS, products
from rounding import LEAST, assert_near, bound, spread_of, unit
from test_gpu_kernels import RNG, added, made, normal
from wasat.backends.tvm.gpu.kernels.attention import Attention, attention
from wasat.backends.tvm.gpu.kernels.elementwise import CacheWrite, Embedding, Glu, Rope, cache_write, embedding, glu, rope
from wasat.backends.tvm.gpu.kernels.formats import Floats, format_of
from wasat.backends.tvm.gpu.kernels.linear import Linear, linear
from wasat.backends.tvm.gpu.kernels.rows import Norm, RoundRows, Softmax, norm, round_rows, softmax
from wasat.ir import DType, QArray, TensorType
from wasat.ir.op import OPS

pytestmark = pytest.mark.machines
Half = np.dtype[Any]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def wide(x: NDArray[Any]) -> NDArray[Any]:
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def empty(half: Half, *shape: int) -> NDArray[Any]:
    return np.full(shape, 77, half)


def close(got: NDArray[Any], reference: Callable[..., Any], *operands: NDArray[Any], lost: float = 0) -> None:
    """Each element is what the reference makes of the same numbers in f32, rounded once; in f32, it may differ as f32 does."""
    half, floats = DType.of(got.dtype), [wide(x) for x in operands]
    with np.errstate(invalid="ignore"):
        want = np.asarray(reference(*floats))
        tiny = 8 * float(np.finfo(np.float32).tiny) + LEAST[half]
        by = bound(want, spread_of(reference, *floats)) + lost + tiny + unit(half) * np.nan_to_num(np.abs(want))
    assert_near(got, want, by)


@on_halves()
@pytest.mark.parametrize("kind, m, k, rows", [
    ("float16", 1, 77, 1), ("int4", 3, 77, 4), ("float16", 70, 77, 32), ("bfloat16", 2, 96, 4),
])  # fmt: skip
def test_linear_of_halves(machine: Machine, half: Half, kind: str, m: int, k: int, rows: int) -> None:
    """Activations in 16 bits, arrays of weights in f16 where a device reads them."""
    n = 35
    w, dense = made(kind, n, k)
    f = format_of(w.type if isinstance(w, QArray) else TensorType(DType.of(w.dtype), w.shape), machine.limits.f16)
    assert not isinstance(f, str)
    x, bias = normal(m, k).astype(half), normal(n).astype(half)
    desc = Linear(machine.limits, n, k, f, rows, bias=True, dtype=half.name)
    got = run(machine, linear(desc), [x, f.pack(w), bias, empty(half, m, n)])[-1]
    want = products(wide(x), dense.T) + wide(bias)
    kernel_help.assert_within(got, want.sum, unit(DType.of(half)) * np.abs(want.sum) + 16 * EPS * want.size)


@on_halves()
def test_grouped_linear_of_halves(machine: Machine, half: Half) -> None:
    n, k, m = 9, 13, 6
    w = normal(3, n, k)
    groups = np.array([0, 2, 1, 2, 7, -1], np.int64)
    x, bias = normal(m, k).astype(half), normal(3, n).astype(half)
    desc = Linear(machine.limits, n, k, Floats("float32"), 1, bias=True, dtype=half.name, experts=3)
    got = run(machine, linear(desc), [x, w, groups, bias, empty(half, m, n)])[-1]
    at = np.clip(groups, 0, 2)
    for i, g in enumerate(at):
        want = products(wide(x[i : i + 1]), w[g].T) + wide(bias[g])
        kernel_help.assert_within(got[i : i + 1], want.sum, unit(DType.of(half)) * np.abs(want.sum) + 16 * EPS * want.size)


@on_halves(few=False)
@pytest.mark.parametrize("kind, bias, n", [("rms", False, 70), ("layer", True, 33)])
def test_norm_of_halves(machine: Machine, half: Half, kind: Any, bias: bool, n: int) -> None:
    """Of the sum as it is rounded, which is a result, too."""
    x, other, weight, offset = (a.astype(half) for a in (normal(4, n), normal(4, n), normal(n), normal(n)))
    x[2, 3] = np.nan
    desc = Norm(machine.limits, n, kind, 1e-5, bias=bias, residual=True, dtype=half.name)
    operands = [x, other, weight, *([offset] if bias else [])]
    *_, total, y = run(machine, norm(desc), [*operands, empty(half, 4, n), empty(half, 4, n)])
    np.testing.assert_array_equal(wide(total), wide(x + other))
    op = OPS[f"{kind}_norm"]
    close(y, partial(op.reference, op.Attrs(eps=1e-5)), total, weight, *([offset] if bias else []))


@on_halves()
def test_rows_of_halves(machine: Machine, half: Half) -> None:
    x = (normal(3, 70) * 4).astype(half)
    x[1, 2] = np.nan
    op = OPS["softmax"]
    y = run(machine, softmax(Softmax(machine.limits, None, half.name)), [x, empty(half, 3, 70)])[-1]
    close(y, partial(op.reference, op.Attrs(axis=-1)), x)
    op = OPS["glu"]
    y = run(machine, glu(Glu(machine.limits, 35, "gelu", dtype=half.name)), [x, empty(half, 3, 35)])[-1]
    close(y, partial(op.reference, op.Attrs(activation="gelu")), x, lost=4 * EPS * np.nanmax(np.abs(wide(x))) ** 2)
    a, b = (
        run(machine, round_rows(RoundRows(machine.limits, 70, dtype=v.dtype.name)), [v, np.zeros((3, 70), np.float32)])[-1]
        for v in (x, wide(x))
    )
    np.testing.assert_array_equal(a, b)


@on_halves()
def test_rope_of_halves(machine: Machine, half: Half) -> None:
    dims, interleaved = 16, False
    x = normal(2, 3, 5, 24).astype(half)
    positions = np.array([[0, 7, 8191], [3, 100000, 17]], np.int64)
    inv_freq = (1e4 ** -np.linspace(0, 1, dims // 2)).astype(np.float32)
    desc = Rope(machine.limits, 5, 24, dims, 1.25, interleaved, dtype=half.name)
    y = run(machine, rope(desc), [x, positions, inv_freq, empty(half, 2, 3, 5, 24)])[-1]
    op = OPS["rope"]
    close(y, lambda x: op.reference(op.Attrs(factor=1.25, interleaved=interleaved), x, positions, inv_freq), x)


@on_halves(few=False)
def test_rounding_of_halves(machine: Machine, half: Half) -> None:
    """To nearest even, what is too large to infinity, NaN to NaN whatever its bits are: a GPU's own has all of them set."""
    table = np.random.default_rng(1).integers(0, 2**32, (64, 40), np.uint32).view(np.float32)
    exact = (normal(64, 8) * 9).astype(half)
    table[:, :8] = wide(exact)
    table[:, 8:16] = wide(exact) + (wide(np.nextafter(exact, half.type(np.inf))) - wide(exact)) / 2  # half-way
    ends = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0x7F7FFFFF, 0x80000000]
    table[0, :6] = np.array(ends, np.uint32).view(np.float32)
    y = run(machine, embedding(Embedding(machine.limits, 64, 40, Floats("float32"), dtype=half.name)),
            [np.arange(64), table, empty(half, 64, 40)])[-1]  # fmt: skip
    with np.errstate(over="ignore", invalid="ignore"):
        want = table.astype(half)
    normal_ones = ~(np.abs(table) < np.finfo(np.float32).tiny)  # devices may have no subnormal numbers
    np.testing.assert_array_equal(wide(y)[normal_ones], wide(want)[normal_ones])


@on_halves()
def test_caches_of_halves(machine: Machine, half: Half) -> None:
    k, v, keys, values = (normal(*s).astype(half) for s in ((2, 2, 2, 5), (2, 2, 2, 8), (2, 7, 2, 5), (2, 7, 2, 8)))
    past = np.array([0, 4], np.int64)
    desc = CacheWrite(machine.limits, 2, 5, 8, dtype=half.name, stored=half.name)
    *_, new_keys, new_values = run(machine, cache_write(desc), [k, v, past, keys, values])
    for new, old, x in ((new_keys, keys, k), (new_values, values, v)):
        want = old.copy()
        for row, first in enumerate(past):
            want[row, first : first + 2] = x[row]
        np.testing.assert_array_equal(new, want)


@on_halves()
@pytest.mark.parametrize("s, more", [(1, ""), (9, "fBH")])
def test_attention_of_halves(machine: Machine, half: Half, s: int, more: str) -> None:
    q, k, v = (x.astype(half) for x in (normal(2, s, 4, 40), normal(2, 300, 2, 40), normal(2, 300, 2, 24)))
    past = np.array([300 - s, 20], np.int64)
    mask, sink = normal(2, 4, s, 300).astype(half), normal(4).astype(half)
    desc = Attention(
        machine.limits, 4, 2, 40, 24, 0.3, cached=True, decode=s == 1, mask=more, dtype=half.name, stored=half.name,
        sink=half.name if more else "",
    )  # fmt: skip
    extra = [mask, sink] if more else []
    y = run(machine, attention(desc), [q, past, k, v, *extra, empty(half, 2, s, 4, 24)])[-1]
    op = OPS["cached_attention"]
    new = [np.stack([x[r, p : p + s] for r, p in enumerate(past)]) for x in (k, v)]
    attrs = op.Attrs(scale=0.3, sink=bool(more))

    def reference(q: Any, a: Any, b: Any, k: Any, v: Any, *e: Any) -> Any:
        return op.reference(attrs, q, a, b, k, v, past, *e)[0]

    close(y, reference, q, *new, k, v, *extra, lost=added(wide(v)))
