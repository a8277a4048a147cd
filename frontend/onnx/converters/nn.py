"""Products, normalizations, positions."""

from __future__ import annotations

from typing import Any

from wasat.ir import DimLike, DType, less_equal
from wasat.ir.dims import floordiv

from ..emit import Emitter, Operand, size_of
from ..registry import Inline, NodeView, op


@op("MatMul")
def matmul(c: Emitter, n: NodeView, x: Operand, y: Operand) -> Any:
    left, right = c.rank(x) == 1, c.rank(y) == 1
    out = c.matmul(c.add_axes(x, 0) if left else x, c.add_axes(y, 1) if right else y)
    if right:
        out = c.drop_axes(out, -1)
    return c.drop_axes(out, -1 if right else -2) if left else out


@op("Gemm", since=7)
def gemm(c: Emitter, n: NodeView, x: Operand, y: Operand, bias: Operand | None = None) -> Any:
    x = c.permute(x, (1, 0)) if n["transA"] else x
    plain = n["alpha"] == 1 and (bias is None or (n["beta"] == 1 and c.rank(bias) == 1 and c.shape(bias)[0] != 1))
    if n["transB"] and plain and c.dtype(x).is_float:
        return c.linear(x, y, *(() if bias is None else (bias,)))
    out = c.matmul(x, c.permute(y, (1, 0)) if n["transB"] else y)
    out = out if n["alpha"] == 1 else c.mul(out, n["alpha"])
    if bias is None:
        return out
    return c.add(out, bias if n["beta"] == 1 else c.mul(bias, n["beta"]))


@op("Einsum")
def einsum(c: Emitter, n: NodeView, *xs: Operand) -> Any:
    """Operands one after another: shared labels that nobody needs later are summed, by matmul."""
    left, arrow, right = n["equation"].replace(" ", "").partition("->")
    texts = left.split(",")
    if len(texts) != len(xs):
        raise n.fail(f"{n['equation']!r} describes {len(texts)} operands, {len(xs)} are given")
    wide = max((c.rank(x) - len(t.replace("...", "")) for t, x in zip(texts, xs) if "..." in t), default=0)
    dots = "".join(chr(0xE000 + i) for i in range(wide))
    terms = []
    for t, x in zip(texts, xs):
        own = c.rank(x) - len(t.replace("...", ""))
        terms.append(_diagonal(c, n, x, t.replace("...", dots[wide - own :] if own else "")))
    if arrow:
        wanted = right.replace("...", dots)
    else:
        flat = left.replace(",", "").replace("...", "")
        wanted = dots + "".join(sorted(k for k in set(flat) if flat.count(k) == 1))
    (names, total), *rest = terms
    for i, (other, y) in enumerate(rest, 1):
        later = set(wanted).union(*(t for t, _ in terms[i + 1 :]))
        names, total = _multiply(c, names, total, other, y, later)
    gone = [i for i, k in enumerate(names) if k not in wanted]
    if gone:
        total = c.reduce_sum(total, axes=tuple(gone))
        names = "".join(k for k in names if k in wanted)
    return c.permute(total, [names.index(k) for k in wanted])


def _diagonal(c: Emitter, n: NodeView, x: Operand, names: str) -> tuple[str, Any]:
    """A label that occurs twice takes the diagonal."""
    if len(names) != c.rank(x):
        raise n.fail(f"{names!r} names {len(names)} axes of an operand that has {c.rank(x)}")
    for k in dict.fromkeys(names):
        while names.count(k) > 1:
            a = names.index(k)
            b = names.index(k, a + 1)
            at = c.along(c.iota(size=c.shape(x)[a]), a, c.rank(x))
            x = c.drop_axes(c.take_along(x, at, axis=b), b)
            names = names[:b] + names[b + 1 :]
    return names, x


def _multiply(c: Emitter, a: str, x: Any, b: str, y: Any, later: set[str]) -> tuple[str, Any]:
    size = {**dict(zip(b, c.shape(y))), **{k: d for k, d in zip(a, c.shape(x)) if d != 1 or k not in b}}

    def total(names: str) -> DimLike:
        return size_of(size[k] for k in names)

    def drop(names: str, v: Any, other: str) -> tuple[str, Any]:
        gone = tuple(i for i, k in enumerate(names) if k not in other and k not in later)
        return "".join(k for i, k in enumerate(names) if i not in gone), c.reduce_sum(v, axes=gone) if gone else v

    a, x = drop(a, x, b)
    b, y = drop(b, y, a)
    summed = "".join(k for k in a if k in b and k not in later)
    batch = "".join(k for k in a if k in b and k in later)
    rows, columns = "".join(k for k in a if k not in b), "".join(k for k in b if k not in a)

    def arrange(names: str, v: Any, first: str, second: str) -> Any:
        v = c.permute(v, [names.index(k) for k in batch + first + second])
        v = c.expand(v, *(size[k] if k not in batch else d for k, d in zip(batch + first + second, c.shape(v))))
        return c.view(v, *c.shape(v)[: len(batch)], total(first), total(second))

    out = c.matmul(arrange(a, x, rows, summed), arrange(b, y, summed, columns))
    names = batch + rows + columns
    return names, c.view(out, *(size[k] for k in names))


# -- normalizations --------------------------------------------------------------------------------------------------------
@op("LayerNormalization")
def layer_norm(c: Emitter, n: NodeView, x: Operand, scale: Operand, bias: Operand | None = None) -> Any:
    rank = c.rank(x)
    axis = c.axis(n["axis"], rank)
    if axis == rank - 1 and c.shape(scale) == c.shape(x)[-1:] and (bias is None or c.rank(bias) == 1) and not n.wants(1):
        return c.layer_norm(x, scale, *(() if bias is None else (bias,)), eps=n["epsilon"])
    work, own = n.dtype("stash_type", DType.F32), c.dtype(x)
    axes = tuple(range(axis, rank))
    w = c.to(x, work)
    mean = c.reduce_mean(w, axes=axes, keepdims=True)
    centered = c.sub(w, mean)
    inverse = c.rsqrt(c.add(c.reduce_mean(c.mul(centered, centered), axes=axes, keepdims=True), n["epsilon"]))
    y = c.mul(c.to(c.mul(centered, inverse), own), scale)
    return (y if bias is None else c.add(y, bias)), mean, inverse


@op("RMSNormalization")
def rms_norm(c: Emitter, n: NodeView, x: Operand, scale: Operand) -> Any:
    rank = c.rank(x)
    axis = c.axis(n["axis"], rank)
    if axis == rank - 1 and c.shape(scale) == c.shape(x)[-1:] and c.dtype(scale) is c.dtype(x):
        return c.rms_norm(x, scale, eps=n["epsilon"])
    w = c.to(x, n.dtype("stash_type", DType.F32))
    square = c.reduce_mean(c.mul(w, w), axes=tuple(range(axis, rank)), keepdims=True)
    y = c.to(c.mul(w, c.rsqrt(c.add(square, n["epsilon"]))), c.dtype(x))
    return c.mul(c.to(y, c.dtype(scale)), scale)


@op("BatchNormalization", since=7)
def batch_norm(
    c: Emitter, n: NodeView, x: Operand, scale: Operand, bias: Operand, mean: Operand, var: Operand
) -> Any:
    """Before operator set 9, without ``spatial``, a mean and a variance belong to an element of a row, else to a channel."""
    if not n.get("spatial", 1):
        scale, bias, mean, var = (c.view(v, size_of(c.shape(v))) for v in (scale, bias, mean, var))
        flat = c.view(x, c.shape(x)[0], size_of(c.shape(x)[1:]))
        return c.view(_normalized(c, n, flat, c.to(flat, c.dtype(mean)), scale, bias, mean, var), *c.shape(x))
    rank, work = c.rank(x), c.dtype(mean)
    w = c.to(x, work)
    if n.get("training_mode", 0):
        axes = tuple(i for i in range(rank) if i != 1)
        here = c.reduce_mean(w, axes=axes)
        centered = c.sub(w, c.along(here, 1, rank))
        spread = c.reduce_mean(c.mul(centered, centered), axes=axes)
        m = n["momentum"]
        running = [c.add(c.mul(old, m), c.mul(new, 1 - m)) for old, new in ((mean, here), (var, spread))]
        return (_normalized(c, n, x, w, scale, bias, here, spread), *running)
    return _normalized(c, n, x, w, scale, bias, mean, var)


def _normalized(c: Emitter, n: NodeView, x: Operand, w: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
    rank, work = c.rank(x), c.dtype(mean)
    factor = c.mul(c.to(scale, work), c.rsqrt(c.add(var, n["epsilon"])))
    y = c.add(c.mul(c.sub(w, c.along(mean, 1, rank)), c.along(factor, 1, rank)), c.along(c.to(bias, work), 1, rank))
    return c.to(y, c.dtype(x))


@op("InstanceNormalization", since=6)
def instance_norm(c: Emitter, n: NodeView, x: Operand, scale: Operand, bias: Operand) -> Any:
    rank = c.rank(x)
    axes = tuple(range(2, rank))
    centered = c.sub(x, c.reduce_mean(x, axes=axes, keepdims=True))
    var = c.reduce_mean(c.mul(centered, centered), axes=axes, keepdims=True)
    y = c.mul(c.mul(centered, c.rsqrt(c.add(var, n["epsilon"]))), c.along(scale, 1, rank))
    return c.add(y, c.along(bias, 1, rank))


@op("GroupNormalization", since=18)
def group_norm(c: Emitter, n: NodeView, x: Operand, scale: Operand, bias: Operand) -> Any:
    """Of operator set 18: scale and bias belong to a group. Later they belong to a channel, and the function body says all."""
    if "stash_type" in n.attrs:
        raise Inline
    flat = c.view(x, c.shape(x)[0], n["num_groups"], floordiv(size_of(c.shape(x)[1:]), n["num_groups"]))
    return c.view(instance_norm(c, n, flat, scale, bias), *c.shape(x))


@op("LRN")
def local_response(c: Emitter, n: NodeView, x: Operand) -> Any:
    """The squares of neighbouring channels are summed as a window of a pool whose only spatial axis is the channel."""
    size = n["size"]
    shape = c.shape(x)
    rest = size_of(shape[2:])
    square = c.permute(c.view(c.mul(x, x), shape[0], shape[1], rest), (0, 2, 1))
    low = (size - 1) // 2
    total = c.pool(square, kind="sum", kernel=(size,), strides=(1,), low=(low,), high=(size - 1 - low,))
    total = c.view(c.permute(total, (0, 2, 1)), *shape)
    return c.div(x, c.pow(c.add(c.mul(total, n["alpha"] / size), n["bias"]), n["beta"]))


# -- positions -------------------------------------------------------------------------------------------------------------
@op("RotaryEmbedding")
def rotary(
    c: Emitter, n: NodeView, x: Operand, cos: Operand, sin: Operand, positions: Operand | None = None
) -> Any:
    """x [b, h, s, d] or [b, s, h*d]; tables [positions, r/2], or [b, s, r/2] without positions."""
    flat = c.rank(x) == 3
    shape = c.shape(x)
    if flat:
        heads = n["num_heads"]
        if not heads:
            raise n.fail("num_heads is needed for an input of three axes")
        x = c.permute(c.view(x, shape[0], shape[1], heads, floordiv(shape[2], heads)), (0, 2, 1, 3))
    depth = c.shape(x)[3]
    width = n["rotary_embedding_dim"] or depth
    if less_equal(width, depth) is False:
        raise n.fail(f"rotary_embedding_dim {width} is larger than a head, {depth}")
    turned, rest = c.cut(x, 3, 0, width), c.cut(x, 3, width, depth)
    if positions is not None:
        cos, sin = c.gather(cos, positions, axis=0), c.gather(sin, positions, axis=0)
    cos, sin = c.add_axes(cos, 1), c.add_axes(sin, 1)
    half = floordiv(width, 2)
    if n["interleaved"]:
        first, second = c.cut(turned, 3, 0, width, 2), c.cut(turned, 3, 1, width, 2)
    else:
        first, second = c.cut(turned, 3, 0, half), c.cut(turned, 3, half, width)
    real, imag = c.sub(c.mul(cos, first), c.mul(sin, second)), c.add(c.mul(sin, first), c.mul(cos, second))
    if n["interleaved"]:
        out = c.view(c.concat(c.add_axes(real, -1), c.add_axes(imag, -1), axis=4), *c.shape(turned))
    else:
        out = c.concat(real, imag, axis=3)
    if width != depth:
        out = c.concat(out, rest, axis=3)
    return c.view(c.permute(out, (0, 2, 1, 3)), *shape) if flat else out


@op("Det")
def determinant(c: Emitter, n: NodeView, x: Operand) -> Any:
    """Gaussian elimination with row pivoting, unrolled: the product of the pivots and of the exchanges' signs."""
    size = c.static(x, -1, "Det")
    if size > 256:
        raise n.fail(f"the elimination of a matrix of {size} rows would be unrolled")
    batch = c.shape(x)[:-2]
    m = c.view(x, *batch, size, size)
    rank = len(batch) + 2
    det: Any = None
    for k in range(size):
        left = size - k
        column = c.drop_axes(c.cut(m, rank - 1, 0, 1), -1)
        at = c.arg_max(c.abs(column), axis=rank - 2, keepdims=True)
        row = c.take_along(m, c.add_axes(at, -1), axis=rank - 2)
        top = c.cut(m, rank - 2, 0, 1)
        pivot = c.cut(row, rank - 1, 0, 1)
        swapped = c.select(c.equal(c.along(c.iota(size=left), rank - 2, rank), c.add_axes(at, -1)), top, m)
        sign = c.select(c.equal(c.add_axes(at, -1), 0), 1.0, -1.0)
        factor = c.mul(c.to(sign, c.dtype(x)), pivot)
        det = factor if det is None else c.mul(det, factor)
        if left > 1:
            below = c.cut(c.cut(swapped, rank - 2, 1, left), rank - 1, 1, left)
            lead = c.cut(c.cut(swapped, rank - 2, 1, left), rank - 1, 0, 1)
            safe = c.select(c.equal(pivot, 0.0), 1.0, pivot)
            m = c.sub(below, c.mul(c.div(lead, safe), c.cut(row, rank - 1, 1, left)))
    return c.view(det, *batch)
