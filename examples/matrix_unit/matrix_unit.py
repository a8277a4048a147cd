"""An accelerator as a target of Wasat, in one file: a unit that multiplies int8 tiles of 16 x 64 by 16 x 64 into i32.

Every ``quantized_linear`` of integers runs on it, whatever its sizes, with the interpreter's bits. The rest is the CPU's, and
each product among it is named.
"""


import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from wasat.backends.tvm.layouts import Packed
from wasat.backends.tvm.lower import KernelCall, Left, Result, Select
from wasat.backends.tvm.targets import Target, cpu
from wasat.ir import Attrs, Builder, DType, Graph, Node, Program, QArray, QTensorType, TensorType, Type, Value

DRIVER = Path(__file__).with_name("libmatrix_unit.so")
ROWS, STEPS = 16, 64
"""Rows of both operands of a tile, and how many numbers each has."""


# -- what the unit does, and the calls that do it ------------------------------------------------------------------------------
@T.prim_func(s_tir=True)
def multiply(A: T.Buffer((16, 64), "int8"), B: T.Buffer((16, 64), "int8"), C: T.Buffer((16, 16), "int32")) -> None:
    with T.sblock("root"):
        T.reads(C[0:16, 0:16], A[0:16, 0:64], B[0:16, 0:64])
        T.writes(C[0:16, 0:16])
        for i, j, k in T.grid(16, 16, 64):
            with T.sblock("multiply"):
                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                C[vi, vj] = C[vi, vj] + T.cast(A[vi, vk], "int32") * T.cast(B[vj, vk], "int32")


@T.prim_func(s_tir=True)
def multiply_call(
    A: T.Buffer((16, 64), "int8", offset_factor=1), B: T.Buffer((16, 64), "int8", offset_factor=1),
    C: T.Buffer((16, 16), "int32", offset_factor=1),
) -> None:  # fmt: skip
    with T.sblock("root"):
        T.reads(C[0:16, 0:16], A[0:16, 0:64], B[0:16, 0:64])
        T.writes(C[0:16, 0:16])
        a, b, c = T.address_of(A[0, 0]), T.address_of(B[0, 0]), T.address_of(C[0, 0])
        T.evaluate(T.call_extern("int32", "matrix_unit_multiply", a, b, c))


TensorIntrin.register("matrix_unit_multiply", multiply, multiply_call, override=True)


# -- the kernel ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Product:
    """y[m, n] = (q * d) @ w^T; ``block`` numbers of a row share a scale, those of w as many or a multiple."""

    n: int
    k: int
    block: int

    @property
    def name(self) -> str:
        return f"matrix_unit_{self.n}x{self.k}"

    @property
    def columns(self) -> int:
        """Tiles beside each other that hold the outputs."""
        return -(-self.n // ROWS)

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)

    @property
    def tiles(self) -> int:
        """Tiles that hold a block: their sums are of integers, and each block has its own scale."""
        return -(-self.block // STEPS)

    @property
    def width(self) -> int:
        """Numbers of a row in whole tiles."""
        return self.blocks * self.tiles * STEPS


def product(p: Product) -> tvm.tirx.PrimFunc:
    """PrimFunc(q i8[m, width], d f32[m, blocks], w i8[columns, blocks * tiles, 16, 64], s f32[columns, blocks, 16],
    y f32[m, n]).

    Rows and columns that fill the last tiles are zeros, and are not written.
    """
    n, columns, blocks, tiles, width = (T.int64(x) for x in (p.n, p.columns, p.blocks, p.tiles, p.width))

    @T.prim_func(s_tir=True, private=True)
    def main(q: T.handle, d: T.handle, w: T.handle, s: T.handle, y: T.handle):
        m = T.int64()
        Q = T.match_buffer(q, (m, width), "int8")
        D = T.match_buffer(d, (m, blocks), "float32")
        W = T.match_buffer(w, (columns, blocks * tiles, 16, 64), "int8")
        S = T.match_buffer(s, (columns, blocks, 16), "float32")
        Y = T.match_buffer(y, (m, n), "float32")
        for row, column in T.grid((m + T.int64(15)) // T.int64(16), columns):
            with T.sblock("tile"):
                r, c = T.axis.remap("SS", [row, column])
                T.reads(Q[0:m, 0:width], D[0:m, 0:blocks], W[c, 0 : blocks * tiles, 0:16, 0:64], S[c, 0:blocks, 0:16])
                T.writes(Y[0:m, 0:n])
                A = T.sblock_alloc_buffer((16, 64), "int8")
                C = T.sblock_alloc_buffer((16, 16), "int32")
                scales = T.sblock_alloc_buffer((16,), "float32")
                total = T.sblock_alloc_buffer((16, 16), "float32")
                for i, j in T.grid(16, 16):
                    total[i, j] = T.float32(0)
                for b in T.serial(blocks):
                    for i, j in T.grid(16, 16):
                        C[i, j] = 0
                    for t in T.serial(tiles):
                        for i, k in T.grid(16, 64):
                            A[i, k] = T.if_then_else(r * 16 + i < m, Q[r * 16 + i, (b * tiles + t) * 64 + k], T.int8(0))
                        for i, j, k in T.grid(16, 16, 64):
                            with T.sblock("multiply"):
                                at = T.axis.reduce(blocks * tiles, b * tiles + t)
                                vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                                C[vi, vj] = C[vi, vj] + T.cast(A[vi, vk], "int32") * T.cast(W[c, at, vj, vk], "int32")
                    for i in range(16):
                        scales[i] = T.if_then_else(r * 16 + i < m, D[r * 16 + i, b], T.float32(0))
                    T.evaluate(
                        T.call_extern(
                            "int32", "matrix_unit_scale", T.address_of(C[0, 0]), T.address_of(scales[0]),
                            T.address_of(S[c, b, 0]), T.address_of(total[0, 0]),
                        )
                    )  # fmt: skip
                for i, j in T.grid(16, 16):
                    if r * 16 + i < m and c * 16 + j < n:
                        Y[r * 16 + i, c * 16 + j] = total[i, j]

    schedule = tvm.s_tir.Schedule(main)
    schedule.tensorize(schedule.get_loops("multiply")[-3], "matrix_unit_multiply")
    return schedule.mod["main"]


# -- weights as it reads them --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tiles:
    """A quantized matrix in tiles, and its scales beside them."""

    product: Product
    rows = ROWS

    def arrays(self, name: str, type: Type) -> list[Packed]:
        p = self.product
        return [
            Packed(f"{name}/tiles", "int8", (p.columns, p.blocks * p.tiles, ROWS, STEPS)),
            Packed(f"{name}/tile_scales", "float32", (p.columns, p.blocks, ROWS)),
        ]

    def pack(self, weight: QArray) -> list[np.ndarray]:
        p, n = self.product, len(weight.values)
        columns = -(-n // ROWS)
        values = np.zeros((columns * ROWS, p.blocks * p.block), np.int8)
        values[:n, : p.k] = weight.values
        wide = np.zeros((columns * ROWS, p.blocks, p.tiles * STEPS), np.int8)
        wide[:, :, : p.block] = values.reshape(-1, p.blocks, p.block)
        scales = np.zeros((columns * ROWS, p.blocks), np.float32)
        scales[:n] = np.repeat(weight.scales.astype(np.float32), weight.type.block // p.block, axis=1)[:, : p.blocks]
        tiles = wide.reshape(columns, ROWS, p.blocks * p.tiles, STEPS).swapaxes(1, 2)
        return [np.ascontiguousarray(tiles), np.ascontiguousarray(scales.reshape(columns, ROWS, p.blocks).swapaxes(1, 2))]


# -- what runs on it -----------------------------------------------------------------------------------------------------------
def why_not(node: Node) -> str:
    """Why a product is not the unit's; empty where it is."""
    if not node.is_a("quantized_linear"):
        return f"it multiplies for quantized_linear, not for {node.op.name}"
    x, w = node.inputs[:2]
    assert isinstance(w.type, QTensorType)
    if node.attrs.activation != "int8":
        return "its rows are not rounded to int8 (activation=int8)"
    if w.param is None or not all(isinstance(d, int) and d > 0 for d in w.shape):
        return "its weight is not a parameter of known sizes"
    if w.type.stored is not None:
        return f"its weight is kept as {w.type.scheme}, not as int8 or int4"
    if w.type.zeros:
        return "its weight has zero points"
    if x.tensor.dtype is DType.F64:
        return "it is in f64"
    return ""


def quantized(b: Builder, x: Value, p: Product) -> tuple[Value, Value]:
    """Rows f32[m, k] as the interpreter rounds them: numbers i8[m, width], scales f32[m, blocks]."""
    m = x.shape[0]
    blocks = b.reshape(b.pad(x, low=(0, 0), high=(0, p.blocks * p.block - p.k)), shape=(m, p.blocks, p.block))
    top = b.reduce_max(b.abs(blocks), axes=(2,), keepdims=True)
    finite = b.less_equal(top, float(np.finfo(np.float32).max))
    inverse = b.select(b.greater(top, 0.0), b.div(127.0, top), 0.0)
    q = b.cast(b.select(finite, b.round(b.mul(blocks, inverse)), 0.0), dtype=DType.I8)
    q = b.reshape(b.pad(q, low=(0, 0, 0), high=(0, 0, p.tiles * STEPS - p.block)), shape=(m, p.width))
    return q, b.reshape(b.div(b.select(finite, top, float("nan")), 127.0), shape=(m, p.blocks))


Rounded = dict[tuple[Value, int], tuple[Value, Value]]
"""Rows once they are rounded, by the value that they were and the numbers that share a scale."""


def replace_product(graph: Graph, node: Node, rounded: Rounded) -> None:
    """The unit's call in place of a ``quantized_linear``."""
    x, w, *bias = node.inputs
    assert isinstance(w.type, QTensorType)
    n, k = map(int, w.shape)
    p = Product(n, k, w.type.row_block)
    b = Builder(graph, before=node, loc=node.loc)
    m = functools.reduce(operator.mul, x.shape[:-1], 1)
    if (x, p.block) not in rounded:
        rounded[x, p.block] = quantized(b, b.cast(b.reshape(x, shape=(m, k)), dtype=DType.F32), p)
    call = KernelCall(p, product, [Result(TensorType(DType.F32, (m, n)))], {}, {2: Tiles(p)})
    operands = (*rounded[x, p.block], w)
    y = graph.add_node(call, operands, Attrs(), before=node, loc=node.loc, names=[node.output.name]).output
    y = b.reshape(y, shape=node.output.shape)
    for v in bias:
        y = b.add(y, b.cast(v, dtype=DType.F32))
    graph.replace_uses(node.output, b.cast(y, dtype=x.tensor.dtype))
    graph.erase(node)


def matrix_unit(threads: int | None = None) -> Target:
    """An int8 matrix unit of 16 x 16 x 64, in software, beside this machine's CPU."""
    host = cpu(threads=threads)

    def kernels(target: Target, program: Program) -> Select:
        rest = host.kernels(host, program)

        def select(graph: Graph) -> Iterator[Left]:
            rounded: Rounded = {}
            for node in [n for n in graph.nodes if n.op.kind == "product"]:
                if why := why_not(node):
                    yield Left(graph.name, f"%{node.outputs[0].name} = {node.op.name} is left to the CPU: {why}", node.loc)
                else:
                    replace_product(graph, node, rounded)
            yield from rest(graph) or ()

        return select

    formats = (("linear", "int?b*"), *host.formats[1:])
    return replace(host, name="matrix-unit", kernels=kernels, libraries=(DRIVER,), formats=formats)
