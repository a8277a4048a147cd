"""Products of matrices and rows of tables: which CPU kernels take them, of packed weights or where operands lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from wasat.ir import DType, Node, TensorType, Value
from wasat.ir.ops.grouped import QuantizedGroupedLinear
from wasat.ir.ops.quant import QuantizedLinear

from ..layouts import Layout
from ..lower import Result
from ..selection import Shape, need_f32, need_sizes
from ..selection import is_f32 as _f32
from .convolution import convolution
from .grouped import rows_in
from .kernels.blocks import in_blocks
from .kernels.embedding import Embedding, embedding
from .kernels.gemm import gemm
from .kernels.linear_blocks import LinearBlocks, linear_blocks
from .kernels.linear_float import Linear, linear
from .kernels.linear_int import LinearInt, linear_int
from .strided import View, product, row_major, view_of

if TYPE_CHECKING:
    from .select import Selection


def of_integers(node: Node) -> bool:
    """Whether it is a product with quantized rows."""
    attrs = node.attrs
    return isinstance(attrs, (QuantizedLinear.Attrs, QuantizedGroupedLinear.Attrs)) and attrs.activation == "int8"


def _matrix(s: Selection, node: Node, kernel: Callable[..., Any], build: Callable[[Any], Any], x: Value, rows: Shape) -> None:
    """x @ w^T (+ bias) by ``kernel``; x is passed as ``rows``."""
    w, panels = s.weight(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    fused = bias is not None and bias.param is not None  # another one is added afterwards
    out = node.output
    n, k = w.shape
    desc = kernel(s.isa, n, k, panels.weights, bias=fused, threads=s.threads)
    layouts: dict[int, Layout] = {1: panels}
    operands = [x, w]
    if bias is not None and fused:
        operands.append(bias)
        layouts[2] = s.bias_layout
    results = [Result(out.tensor, (rows[0], n))]
    [y] = s.call(node, desc, build, operands, results, {0: rows}, layouts)
    s.graph.replace_uses(out, y if bias is None or fused else s.builder(node).add(y, bias))


def select_linear(s: Selection, node: Node) -> None:
    """Products with a packed weight; with other matrices as they lie."""
    x, w = node.inputs[:2]
    need_f32(x, *node.inputs[2:])
    if not _f32(w) or s.packs(w):
        _matrix(s, node, Linear, linear, x, s.rows(x))
    else:
        m, k = s.rows(x)
        rows = view_of(x).reshaped((m, k)) or row_major(x, (m, k))
        y = _product(s, node, rows, view_of(w).permuted((1, 0)), row_major(node.output, (m, w.shape[0])))
        if y is not None:
            s.graph.replace_uses(node.output, y if len(node.inputs) < 3 else s.builder(node).add(y, node.inputs[2]))


def select_matmul(s: Selection, node: Node) -> None:
    """Products of matrices, read where they were before they were transposed, and written as they will be."""
    need_f32(*node.inputs)
    out = node.output
    y = row_major(out, out.shape)
    [user] = out.users if len(out.uses) == 1 and not s.graph.is_output(out) else [None]
    perm = cast(Any, user.attrs).perm if user is not None and user.op.name == "transpose" else ()
    if user is not None and perm and perm[-1] >= len(perm) - 2:  # rows of the product or of its transpose
        out = user.output
        y = row_major(out, out.shape).permuted(sorted(range(len(perm)), key=lambda i: perm[i]))
    a, b = (view_of(x).broadcast((*y.shape[:-2], *x.shape[-2:])) for x in node.inputs)
    made = _product(s, node, a, b, y)
    if made is not None:
        s.graph.replace_uses(out, made)


def _product(s: Selection, node: Node, a: View, b: View, y: View) -> Value | None:
    """y = a @ b by the kernel; None where there is nothing to multiply."""
    if 0 in (*a.shape, *b.shape):
        return None
    desc, sources = product(s.isa, a, b, y, s.threads)
    results = [Result(y.source.tensor, (desc.y.size,))]
    [made] = s.call(node, desc, gemm, sources, results, {0: (desc.a.size,), 1: (desc.b.size,)})
    return made


def select_conv(s: Selection, node: Node) -> None:
    """Convolutions by weights of known sizes, as products of matrices."""
    need_f32(*node.inputs)
    need_sizes(*node.inputs[1].shape)
    found = convolution(s.builder(node), node, s.isa, s.threads)
    if found is None:
        return  # one of each channel by itself: loops do that as well
    desc, operands, swapped = found
    out, order = node.output, (1, 0, *range(2, node.output.tensor.rank))
    [user] = out.users if swapped and len(out.uses) == 1 and not s.graph.is_output(out) else [None]
    if user is not None and user.op.name == "transpose" and cast(Any, user.attrs).perm == order:
        out, swapped = user.output, False
    made = TensorType(DType.F32, tuple(node.output.shape[i] for i in order)) if swapped else out.tensor
    sizes: dict[int, Shape] = {0: (desc.a.size,), 1: (desc.b.size,)}
    [y] = s.call(node, desc, gemm, operands, [Result(made, (desc.y.size,))], sizes)
    s.graph.replace_uses(out, s.builder(node).transpose(y, perm=order) if swapped else y)


def select_quantized_linear(s: Selection, node: Node) -> None:
    """Products with quantized weights, in integers where the rows are quantized, too."""
    x = node.inputs[0]
    need_f32(x, *node.inputs[2:])
    _, panels = s.weight(node.inputs[1])
    if not of_integers(node):
        _matrix(s, node, Linear, linear, x, s.rows(x))
        return
    xq = s.quantized_rows(node, rows_in(x))
    if in_blocks(panels.weights):
        _matrix(s, node, LinearBlocks, linear_blocks, xq, xq.shape)
    else:
        _matrix(s, node, LinearInt, linear_int, xq, xq.shape)


def select_embedding(s: Selection, node: Node) -> None:
    """Rows of packed tables, and a factor of all of them."""
    need_f32(node.output)
    w, panels = s.weight(node.inputs[0])
    ids, out, scale = node.inputs[1], node.output, 1.0
    if ids.tensor.dtype is not DType.I64:
        ids = s.builder(node).cast(ids, dtype=DType.I64)
    if len(out.uses) == 1 and not s.graph.is_output(out):
        [user] = out.users
        factor = next((v.const for v in user.inputs if v is not out), None)
        if user.op.name == "mul" and factor is not None and factor.ndim == 0:
            out, scale = user.output, float(factor)
    n, k = w.shape
    m, _ = s.rows(out)
    desc = Embedding(s.isa, n, k, panels.weights, scale, s.threads)
    [y] = s.call(node, desc, embedding, [ids, w], [Result(out.tensor, (m, k))], {0: (m,)}, {1: panels})
    s.graph.replace_uses(out, y)
