from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_help import Terms, assert_near, build, each_isa, products, run, uneven
from numpy.lib.stride_tricks import as_strided
from wasat.backends.tvm.cpu.kernels.gemm import Axes, Gemm, Matrix, Windows, gemm
from wasat.backends.tvm.cpu.kernels.isa import AVX2, Isa


def matrix(x: np.ndarray, whole: np.ndarray) -> Matrix:
    """Where the view ``x`` [.., m, n] lies in ``whole``, of which it is a part."""
    offset = (x.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // 4
    *batch, row, column = (s // 4 for s in x.strides)
    return Matrix(whole.size, row, column, tuple(batch), offset)


def check(isa: Isa, a: np.ndarray, b: np.ndarray, wholes: list[np.ndarray], y: Matrix | None = None) -> np.ndarray:
    """The product of views into ``wholes``; returns y's whole buffer."""
    (*batch, m, k), n = a.shape, b.shape[-1]
    rows = [n * math.prod([m, *batch[i + 1 :]]) for i in range(len(batch))]
    y = y or Matrix(math.prod([*batch, m, n]), n, 1, tuple(rows))
    desc = Gemm(isa, m, n, k, matrix(a, wholes[0]), matrix(b, wholes[1]), y, tuple(batch), threads=2)
    [made] = run(build(gemm(desc), isa), [w.reshape(-1) for w in wholes], ((y.size,), "float32"))
    return made


@each_isa()
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("m, n, k", [
    (1, 7, 5), (13, 64, 33), (29, 100, 72), (961, 40, 9), (31, 33, 519), (5, 1, 1), (7, 33, 257), (9, 17, 520),
])  # fmt: skip
def test_gemm(isa: Isa, transposed: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    a, b = uneven(rng, m, k), np.ascontiguousarray(uneven(rng, n, k).T)
    stored = [np.ascontiguousarray(x.T if name in transposed else x) for name, x in (("a", a), ("b", b))]
    views = [x.T if name in transposed else x for name, x in zip("ab", stored)]
    y = check(isa, views[0], views[1], stored)
    assert_near(y.reshape(m, n), products(a, b))


@each_isa()
@pytest.mark.parametrize("keys_first", [False, True])
def test_batches_at_any_strides(isa: Isa, keys_first: bool) -> None:
    """Heads as slices of one merged projection, shared keys, the result as merged heads."""
    rng = np.random.default_rng(1)
    n, s, h, d = 3, 37, 4, 20
    merged = uneven(rng, n, s, h + 2, d)
    q = merged[:, :, :h].transpose(0, 2, 1, 3)
    k = np.broadcast_to(merged[:, :, h : h + 1].transpose(0, 2, 3, 1), (n, h, d, s))
    probs = check(isa, q, k, [merged, merged]).reshape(n, h, s, s)
    assert_near(probs, products(q, k))
    v = np.broadcast_to(merged[:, :, h + 1 :].transpose(0, 2, 1, 3), (n, h, s, d))
    a = probs.swapaxes(2, 3) if keys_first else probs
    out = check(isa, a, v, [probs, merged], Matrix(n * s * h * d, h * d, 1, (s * h * d, d)))
    want = products(a, v)
    assert_near(out.reshape(n, s, h, d), Terms(*(x.transpose(0, 2, 1, 3) for x in want[:2]), want.count))


@each_isa()
@pytest.mark.parametrize("column", [
    ((75, 1),), ((3, 60), (25, 1)), ((5, 47), (16, 1)), ((9, 31), (9, 2)), ((2, 150), (4, 30), (3, 1)), ((33, 3),), ((1, 1),),
], ids=str)  # fmt: skip
def test_windows(isa: Isa, column: Axes) -> None:
    """Columns in runs shorter, longer and as long as vectors, in steps, behind rows of three axes; two of them in a batch."""
    rng = np.random.default_rng(2)
    row: Axes = ((3, 7), (5, 2), (18, 1))  # 270 steps: two blocks
    apart, offset = 11, 4
    size = offset + apart + sum((extent - 1) * stride for extent, stride in (*row, *column)) + 1
    x = rng.standard_normal(size, np.float32)
    k, n = (math.prod(extent for extent, _ in axes) for axes in (row, column))
    extents, strides = zip(*((2, apart), *row, *column))
    b = as_strided(x[offset:], extents, [4 * s for s in strides]).reshape(2, k, n)
    a = uneven(rng, 29, k)
    desc = Gemm(
        isa, 29, n, k, Matrix(a.size, k, 1, (0,)), Windows(size, row, column, (apart,), offset),
        Matrix(2 * 29 * n, n, 1, (29 * n,)), (2,), threads=2,
    )  # fmt: skip
    [y] = run(build(gemm(desc), isa), [a.reshape(-1), x], ((2 * 29 * n,), "float32"))
    assert_near(y.reshape(2, 29, n), products(a, b))


@pytest.mark.parametrize("tiles, panels, threads, chunk", [
    (40, 4, 4, 40), (40, 1, 1, 40),  # every thread has its panels
    (40, 1, 4, 10), (40, 2, 4, 20), (40, 6, 4, 20), (41, 1, 4, 11), (24, 3, 8, 4),
    (7, 1, 4, 7), (8, 1, 4, 4), (11, 1, 4, 6), (12, 1, 4, 4),  # no fewer than four tiles for a copied panel
    (40, 31, 4, 20), (40, 33, 4, 40),  # of many, the last one is no loss
])  # fmt: skip
def test_every_thread_has_its_share(tiles: int, panels: int, threads: int, chunk: int) -> None:
    """How many tiles a copied panel is applied to."""
    m, n, k = tiles * AVX2.rows, panels * AVX2.columns, 8
    desc = Gemm(AVX2, m, n, k, Matrix(m * k, k, 1), Matrix(k * n, n, 1), Matrix(m * n, n, 1), threads=threads)
    assert desc.chunk == chunk
