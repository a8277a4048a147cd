"""The kernels for GPUs against the reference, run as WGSL and as OpenCL C on software devices."""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("wasat.backends.tvm.plan")  # the language of a device, out of TensorIR
import kernel_help
from gpu_help import Machine, each_machine, run
from kernel_help import EPS, products
from rounding import assert_near, bound, spread_of
from wasat.backends.tvm.gpu.kernels.attention import Attention, attention
from wasat.backends.tvm.gpu.kernels.elementwise import CacheWrite, Embedding, Glu, Rope, cache_write, embedding, glu, rope
from wasat.backends.tvm.gpu.kernels.formats import Format, format_of
from wasat.backends.tvm.gpu.kernels.linear import Linear, linear
from wasat.backends.tvm.gpu.kernels.rows import Norm, RoundRows, Softmax, norm, round_rows, softmax
from wasat.ir import BlockArray, DType, QArray, QTensorType, TensorType
from wasat.ir.op import OPS
from wasat.ir.ops.quant import quantize_array, quantize_rows
from wasat.ir.schemes import SCHEMES as OF_GGUF
from wasat.ir.schemes import scheme_named

pytestmark = pytest.mark.machines
RNG = np.random.default_rng(5)
FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Each test begins with the same ones, whichever ran before it in this process."""
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def made(kind: str, *shape: int) -> tuple[Any, NDArray[np.float32]]:
    """A weight of a storage type, and the numbers that it stands for."""
    if kind in FLOATS:
        w = normal(*shape).astype(FLOATS[kind])
        return w, w.astype(np.float32)
    if kind in SCHEMES:
        rows = BlockArray(QTensorType(kind, shape), SCHEMES[kind].random(RNG, shape))
        return rows, rows.dense()
    scheme, _, rest = kind.partition("b")
    block, _, scale = rest.partition("f")
    q: QArray = quantize_array(normal(*shape), QTensorType(scheme, shape, int(block or 32), DType.of(f"f{scale or 16}")))
    return q, q.dense()


def packed(w: Any) -> tuple[Format, NDArray[Any]]:
    type = w.type if isinstance(w, QArray) else TensorType(DType.of(w.dtype), w.shape)
    f = format_of(type, False)
    assert not isinstance(f, str)
    return f, f.pack(w)


SCHEMES = {s.name: s for name in (*OF_GGUF, "s4b160", "s5b64", "s6b96", "s7b96") if (s := scheme_named(name))}
KINDS = [*FLOATS, "int8", "int4", "int4b16f32", "int8b64", *SCHEMES]


@each_machine()
@pytest.mark.parametrize("kind, m, rows", [
    (kind, m, rows) for kind in KINDS for m, rows in ((1, 1), (5, 4), (70, 32)) if kind in ("float16", "int8", "int4") or m == 5
])  # fmt: skip
def test_linear(machine: Machine, kind: str, m: int, rows: int) -> None:
    n = 71
    k = SCHEMES[kind].block * (2 if SCHEMES[kind].block > 32 else 3) if kind in SCHEMES else 77 if m > 1 else 290
    w, dense = made(kind, n, k)
    f, array = packed(w)
    half = machine.name == "cuda" and m == 5  # the arithmetic of weights does not depend on what x is: bf16 in one language
    x, bias = (a.astype(FLOATS["bfloat16"] if half else np.float32) for a in (normal(m, k), normal(n)))
    desc = Linear(machine.limits, n, k, f, rows, bias=m == 5, dtype=x.dtype.name)
    got = run(machine, linear(desc), [x, array, *([bias] if desc.bias else []), np.full((m, n), 9, x.dtype)])[-1]
    want = products(x, dense.T)
    want = want + bias.astype(np.float32) if desc.bias else want
    kernel_help.assert_within(got, want.sum, want.roundings() * EPS * want.size + half * 2.0**-8 * np.abs(want.sum))


@each_machine()
@pytest.mark.parametrize("kind, k, m, rows", [
    ("float32", 96, 1, 4), ("float16", 200, 1, 1), ("bfloat16", 96, 2, 4), ("int8", 96, 1, 4), ("int4", 96, 5, 4),
    ("int4b16f32", 96, 1, 1), ("float32", 64, 70, 32), ("float32", 96, 0, 4),
])  # fmt: skip
def test_linear_side_by_side(machine: Machine, kind: str, k: int, m: int, rows: int) -> None:
    """Rows of whole octets and of whole runs of them, which are read 16 bytes at once where a device does; of a batch, one row
    is a launch of its own, and none is none."""
    n = 71
    w, dense = made(kind, n, k)
    f, array = packed(w)
    x, bias = normal(m, k), normal(n)
    got = run(machine, linear(Linear(machine.limits, n, k, f, rows, bias=True)), [x, array, bias, empty(m, n)])[-1]
    kernel_help.assert_near(got, products(x, dense.T) + bias)


def close(got: NDArray[Any], reference: Callable[..., Any], *operands: Any, lost: Any = 0) -> None:
    """Each element within what rounding the operands moves it by, a few roundings of its own, and what it may have ``lost``;
    devices have no subnormal numbers."""
    with np.errstate(invalid="ignore"):
        want = np.asarray(reference(*operands))
        assert_near(got, want, bound(want, spread_of(reference, *operands)) + lost + 8 * float(np.finfo(np.float32).tiny))


NOTHING = np.float32(77)


def empty(*shape: int) -> NDArray[np.float32]:
    """Where a kernel is to write all there is."""
    return np.full(shape, NOTHING, np.float32)


@each_machine()
@pytest.mark.parametrize("kind, bias, residual, n", [
    ("rms", False, False, 70), ("rms", False, True, 300), ("layer", True, True, 33),
])  # fmt: skip
def test_norm(machine: Machine, kind: Any, bias: bool, residual: bool, n: int) -> None:
    x, other, weight, offset = normal(5, n), normal(5, n), normal(n), normal(n)
    x[3, 2] = np.nan
    desc = Norm(machine.limits, n, kind, 1e-5, bias=bias, residual=residual)
    operands = [x, *([other] if residual else []), weight, *([offset] if bias else [])]
    *_, total, y = run(machine, norm(desc), [*operands, *([empty(5, n)] if residual else []), empty(5, n)])
    source = (x + other) if residual else x
    if residual:
        np.testing.assert_array_equal(total, source)

    def reference(x: Any, weight: Any, offset: Any) -> Any:
        wide = x - x.mean(-1, keepdims=True) if kind == "layer" else x
        return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-5)) * weight + (offset if bias else 0)

    close(y, reference, source, weight, offset)


@each_machine()
@pytest.mark.parametrize("n, known", [(1, True), (70, True), (1000, False)])
def test_softmax(machine: Machine, n: int, known: bool) -> None:
    x = normal(5, n) * 4
    x[0], x[1, 0], x[2, n // 2] = -np.inf, np.nan, -np.inf
    x[3] += 200
    y = run(machine, softmax(Softmax(machine.limits, n if known else None)), [x, empty(5, n)])[-1]
    op = OPS["softmax"]
    with np.errstate(invalid="ignore"):  # an exponential loses of itself what its argument, which is up to 30, loses
        np.testing.assert_allclose(y, op.reference(op.Attrs(axis=-1), x), rtol=1e-5, atol=1e-37)


@each_machine()
def test_round_rows(machine: Machine) -> None:
    x = normal(4, 70)
    x[1, 3], x[2, 69], x[3, :32] = np.nan, np.inf, 0
    x[3, 32:64] = np.resize(np.float32([1e-37, -2e-37, 0]), 32)
    y = run(machine, round_rows(RoundRows(machine.limits, 70)), [x, empty(4, 70)])[-1]
    q, d = quantize_rows(x)
    np.testing.assert_allclose(y, (q * d[..., None]).reshape(4, -1)[:, :70], rtol=1e-6)


@each_machine()
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "sigmoid"])
def test_glu(machine: Machine, activation: Any) -> None:
    x = normal(3, 2 * 37) * 5
    x[0, :4] = [np.nan, 100, -100, 0]
    op = OPS["glu"]
    y = run(machine, glu(Glu(machine.limits, 37, activation)), [x, empty(3, 37)])[-1]
    lost = 4 * EPS * np.nan_to_num(np.abs(x[:, :37] * x[:, 37:])) if "gelu" in activation else 0  # of 1 + erf, which goes to 0
    close(y, partial(op.reference, op.Attrs(activation=activation)), x, lost=lost)


@each_machine()
@pytest.mark.parametrize("dims, interleaved, rows", [(24, False, True), (16, True, False), (0, False, True)])
def test_rope(machine: Machine, dims: int, interleaved: bool, rows: bool) -> None:
    x = normal(2, 3, 5, 24)
    positions = np.array([[0, 7, 8191], [3, 100000, 17]] if rows else [[5, 6, 70000]], np.int64)
    inv_freq = (1e4 ** -np.linspace(0, 1, dims // 2)).astype(np.float32)
    desc = Rope(machine.limits, 5, 24, dims, 1.25, interleaved, rows)
    y = run(machine, rope(desc), [x, positions, inv_freq, empty(2, 3, 5, 24)])[-1]
    op = OPS["rope"]
    attrs = op.Attrs(factor=1.25, interleaved=interleaved)
    close(y, lambda x: op.reference(attrs, x, positions if rows else positions[0], inv_freq), x)


@each_machine()
@pytest.mark.parametrize("kind, k", [
    ("float32", 13), ("float16", 13), ("bfloat16", 8), ("int8", 70), ("int4", 40), ("q5_k", 256),
])  # fmt: skip
def test_embedding(machine: Machine, kind: str, k: int) -> None:
    w, dense = made(kind, 9, k)
    f, array = packed(w)
    ids = np.array([0, 8, -1, -9, 4, 100, -100], np.int64)
    y = run(machine, embedding(Embedding(machine.limits, 9, k, f, 3.0)), [ids, array, empty(7, k)])[-1]
    np.testing.assert_allclose(y, dense[[0, 8, 8, 0, 4, 8, 0]] * np.float32(3), rtol=1e-6)


@each_machine()
@pytest.mark.parametrize("ring", [False, True])
def test_cache_write(machine: Machine, ring: bool) -> None:
    k, v = normal(3, 2, 2, 5), normal(3, 2, 2, 8)
    keys, values = normal(3, 7, 2, 5), normal(3, 7, 2, 8)
    past = np.array([0, 20 if ring else 6, 5], np.int64)  # one that a full cache has no room for
    desc = CacheWrite(machine.limits, 2, 5, 8, ring=ring)
    *_, new_keys, new_values = run(machine, cache_write(desc), [k, v, past, keys, values])
    for new, old, x in ((new_keys, keys, k), (new_values, values, v)):
        want = old.copy()
        for row, first in enumerate(past):
            for i in range(2):
                if ring or first + i < 7:
                    want[row, (first + i) % 7] = x[row, i]
        np.testing.assert_array_equal(new, want)


@each_machine()
@pytest.mark.parametrize("shared", [False, True])
def test_cache_start(machine: Machine, shared: bool) -> None:
    k, v = normal(1 if shared else 2, 2, 2, 8), normal(1 if shared else 2, 2, 2, 5)
    keys, values, past = normal(2, 6, 2, 8), normal(2, 6, 2, 5), np.array([3, 0], np.int64)
    desc = CacheWrite(machine.limits, 2, 8, 5, start=True, shared=shared)
    *_, new_keys, new_values = run(machine, cache_write(desc), [k, v, past, keys, values])
    op = OPS["cache_start"]
    for got, want in zip((new_keys, new_values), op.reference(op.Attrs(), k, v, keys, values, past)):
        np.testing.assert_array_equal(got, want)


@each_machine()
@pytest.mark.parametrize("rows", [1, 32])
def test_linear_of_infinity(machine: Machine, rows: int) -> None:
    """What stands behind a row's last element takes no part."""
    w, dense = made("int4", 9, 13)
    f, array = packed(w)
    x = normal(rows, 13)
    x[0, -1] = np.inf
    got = run(machine, linear(Linear(machine.limits, 9, 13, f, rows)), [x, array, empty(rows, 9)])[-1]
    close(got, np.matmul, x, dense.T)


MASKS = {"": None, "f": (1, 1), "fBH": (2, 4), "bB": (2, 1)}


def _mask(kind: str, s: int, c: int) -> Any:
    if not kind:
        return None
    x = normal(*MASKS[kind], s, c)  # type: ignore[misc]
    x[0, 0, 0, :] = x[0, 0, 0, :] if s > 1 else -np.inf
    return x > 0 if "b" in kind else x


def added(*values: NDArray[Any]) -> float:
    """What adding up values by shares that sum to 1, one after another, may lose beside adding them in pairs."""
    return 4 * 2.0**-24 * max(float(np.nanmax(np.abs(v))) for v in values)


@each_machine()
@pytest.mark.parametrize("s, t, causal, window, softcap, mask", [
    (1, 1, True, None, None, ""), (37, 37, True, None, None, ""), (9, 70, True, 11, 2.0, "fBH"),
    (20, 5, True, None, None, "bB"), (6, 40, False, None, None, "fBH"), (5, 40, False, None, None, "f"),
    (40, 70, False, 9, None, ""),
])  # fmt: skip
def test_attention(machine: Machine, s: int, t: int, causal: bool, window: Any, softcap: Any, mask: str) -> None:
    d = 20 if s == 6 else 40
    q, k, v = normal(2, s, 4, d), normal(2, t, 2, d), normal(2, t, 2, 24)
    if s == 37:
        q[0, 3, 1], k[1, 5, 0] = np.nan, np.nan
    more = [] if not mask else [_mask(mask, s, t)]
    sink = np.array([0.5, -np.inf, 90, 0], np.float32) if softcap or s == 20 else None
    more += [] if sink is None else [sink]
    desc = Attention(
        machine.limits, 4, 2, d, 24, 0.3, softcap, window, causal, mask=mask, sink="" if sink is None else "float32"
    )  # fmt: skip
    y = run(machine, attention(desc), [q, k, v, *more, empty(2, s, 4, 24)])[-1]
    op = OPS["attention"]
    attrs = op.Attrs(scale=0.3, causal=causal, window=window, softcap=softcap, sink=sink is not None)
    close(y, partial(op.reference, attrs), q, k, v, *more, lost=added(v))


@each_machine()
@pytest.mark.parametrize("s, c, past, window, ring, causal, mask, heads", [
    (1, 700, [0, 699], None, False, True, "", (4, 2)), (1, 300, [299, 130], 100, False, True, "f", (6, 1)),
    (1, 64, [1000, 3], 50, True, True, "bB", (4, 4)), (1, 600, [2000, 100], 500, True, True, "", (4, 2)),
    (19, 64, [0, 41], None, False, True, "", (4, 2)), (9, 64, [100, 0], 40, True, True, "fBH", (4, 2)),
    (6, 64, [30, 2], None, False, False, "", (4, 2)), (6, 64, [30, 90], 20, True, False, "", (4, 1)),
])  # fmt: skip
def test_cached_attention(
    machine: Machine, s: int, c: int, past: list[int], window: Any, ring: bool, causal: bool, mask: str, heads: tuple[int, int]
) -> None:
    h, g = heads
    q, k, v = normal(2, s, h, 40), normal(2, s, g, 40), normal(2, s, g, 24)
    keys, values, at = normal(2, c, g, 40), normal(2, c, g, 24), np.array(past, np.int64)
    if not ring:  # what was never written may be anything
        for row, first in enumerate(past):
            keys[row, first + s :], values[row, first + s :] = np.nan, np.nan
    m = _mask(mask, s, c)
    if m is not None and mask == "fBH":
        m = np.resize(m, (2, h, s, c))
    op = OPS["cached_attention"]
    attrs = op.Attrs(scale=0.3, window=window, ring=ring, causal=causal, sink=s == 1 or bool(mask))
    plain = [np.nan_to_num(x, copy=True) for x in (keys, values)]
    more = [] if m is None else [m]
    sink = normal(h) if s == 1 or mask else None
    more += [] if sink is None else [sink]
    for row, first in enumerate(past):
        for i in range(s):
            keys[row, (first + i) % c], values[row, (first + i) % c] = k[row, i], v[row, i]
    most = window if window is not None else None
    desc = Attention(
        machine.limits, h, g, 40, 24, 0.3, None, window, causal, cached=True, ring=ring, decode=s == 1, mask=mask, most=most,
        sink="" if sink is None else "float32",
    )  # fmt: skip
    y = run(machine, attention(desc), [q, at, keys, values, *more, empty(2, s, h, 24)])[-1]
    close(y, lambda *x: op.reference(attrs, *x)[0], q, k, v, *plain, at, *more, lost=added(v, plain[1]))
