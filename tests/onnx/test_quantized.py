"""Quantized weights in ONNX files: quantized parameters with exactly the file's numbers, compiled in their own width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.ir import Program, QTensorType, evaluate
from wasat.passes import FoldDequantized, PassManager

import wasat as ws

RNG = np.random.default_rng(7)
K, N = 128, 48
TYPES = {
    "int8": (TensorProto.INT8, np.int8, -128, 128), "uint8": (TensorProto.UINT8, np.uint8, 0, 256),
    "int4": (TensorProto.INT4, ml_dtypes.int4, -8, 8), "uint4": (TensorProto.UINT4, ml_dtypes.uint4, 0, 16),
}  # fmt: skip
SYMMETRIC = {"int8": 0, "uint8": 128, "int4": 0, "uint4": 8}


def proto(name: str, x: np.ndarray) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(x, name)


def halves(*shape: int) -> np.ndarray:
    """Scales that f16 holds."""
    return RNG.uniform(0.001, 0.02, shape).astype(np.float16).astype(np.float32)


def integers(kind: str, *shape: int) -> np.ndarray:
    _, dtype, low, high = TYPES[kind]
    x = RNG.integers(low, high, shape)
    x.flat[0] = low
    return x.astype(dtype)


def qdq(
    w: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, node: str = "MatMul", axis: int = 1, block: int = 0, **attrs: Any
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if node == "Gather" else TensorProto.FLOAT, None)
    x.type.tensor_type.shape.CopyFrom(
        helper.make_tensor_value_info("s", 1, ["s"] if node == "Gather" else ["s", K]).type.tensor_type.shape
    )
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", N])
    operands = ["w_q", "w_scale"] + (["w_zero"] if zero is not None else [])
    extra = {"block_size": block} if block else {}
    nodes = [helper.make_node("DequantizeLinear", operands, ["w"], axis=axis, **extra)]
    nodes.append(helper.make_node(node, ["w", "x"] if node == "Gather" else ["x", "w"], ["y"], name="product", **attrs))
    given = [proto("w_q", w), proto("w_scale", scale)] + ([proto("w_zero", zero)] if zero is not None else [])
    graph = helper.make_graph(nodes, "g", [x], [y], given)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def folded(m: onnx.ModelProto | Path) -> Program:
    """The imported program whose weights are quantized."""
    program = from_onnx(m)
    PassManager([FoldDequantized()]).run(program)
    return program


def reasons(m: onnx.ModelProto) -> list[str]:
    """Why parameters stay dequantized."""
    return [r.message for r in ws.optimize(from_onnx(m))[1].remarks("missed") if "stays dequantized" in r.message]


def quantized_types(m: Any) -> list[str]:
    return [str(p.type) for p in m.params.values() if isinstance(p.type, QTensorType)]


def run(program: Any, x: np.ndarray) -> np.ndarray:
    program.verify()
    (y,) = evaluate(program["forward"], {"x": x}, {k: p.load() for k, p in program.params.items()})
    return np.asarray(y)


X = RNG.standard_normal((3, K)).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", ["tensor", "axis", "blocks16", "blocks32", "blocks64"])
@pytest.mark.parametrize("node", ["MatMul", "Gemm"])
def test_products_of_dequantized_weights(kind: str, layout: str, node: str) -> None:
    """Exactly the file's numbers, in blocks of 32 where theirs are whole ones of these."""
    rows = node == "Gemm"  # Gemm with transB sums over the last axis, MatMul over the first
    shape = (N, K) if rows else (K, N)
    block = int(layout[6:] or 0) if layout.startswith("blocks") else 0
    blocks = K // block if block else 0
    scales = {"tensor": (), "axis": (N,)}.get(layout, (N, blocks) if rows else (blocks, N))
    scale = halves(*scales)
    zero = np.full(scale.shape, SYMMETRIC[kind]).astype(TYPES[kind][1])
    axis = (1 if rows else 0) if block else (0 if rows else 1)
    m = qdq(integers(kind, *shape), np.asarray(scale), zero, node, axis, block, **({"transB": 1} if rows else {}))
    program = folded(m)
    want_block = "16f32" if layout == "blocks16" else "32f16"
    assert quantized_types(program) == [f"int{kind[-1]}b{want_block}[{N}, {K}]"]
    assert [v.op.name for v in program["forward"].nodes] == ["quantized_linear"]
    assert list(program.params) == [f"w_q|int{kind[-1]}"]
    np.testing.assert_allclose(run(program, X), ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-5, atol=1e-5)


def test_rows_of_a_dequantized_table() -> None:
    m = qdq(integers("int8", 50, N), halves(50), None, "Gather", axis=0)
    program = folded(m)
    assert [v.op.name for v in program["forward"].nodes] == ["quantized_embedding"]
    ids = np.array([0, 49, 7])
    np.testing.assert_array_equal(run(program, ids), ReferenceEvaluator(m).run(None, {"x": ids})[0])


def test_scales_that_f16_does_not_hold_stay() -> None:
    scale = np.full(N, 0.1, np.float32)
    m = qdq(integers("int8", K, N), scale, None)
    program = folded(m)
    assert quantized_types(program) == [f"int8b{K}f32[{N}, {K}]"]
    np.testing.assert_allclose(run(program, X), ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-5, atol=1e-4)


def test_zero_points_that_differ_are_kept() -> None:
    zero = RNG.integers(0, 16, N).astype(ml_dtypes.uint4)
    m = qdq(integers("uint4", K, N), halves(N), zero)
    program = folded(m)
    assert quantized_types(program) == [f"int4zb{K}f16[{N}, {K}]"]
    np.testing.assert_allclose(run(program, X), ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-5, atol=1e-4)


def test_zero_points_of_eight_bits_are_kept() -> None:
    m = qdq(integers("uint8", K, N), halves(N), np.full(N, 3, np.uint8))
    program = folded(m)
    assert quantized_types(program) == [f"int8zb{K}f16[{N}, {K}]"]
    np.testing.assert_allclose(run(program, X), ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "zero, axis, why",
    [
        (np.full(K, 128, np.uint8), 0, "its scales differ along axis 0, and products sum over axis 0"),
    ],
)  # fmt: skip
def test_what_has_no_exact_form_stays_dequantized(zero: np.ndarray, axis: int, why: str) -> None:
    m = qdq(integers("uint8", K, N), halves(len(zero)), zero, axis=axis)
    program = folded(m)
    assert not quantized_types(program)
    assert reasons(m) == [f"parameter w_q stays dequantized: {why}"]
    np.testing.assert_allclose(run(program, X), ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-5, atol=1e-4)


# -- MatMulNBits, GatherBlockQuantized ---------------------------------------------------------------------------------------
def pack(x: np.ndarray, bits: int) -> np.ndarray:
    """As ContribOperators.md packs: consecutive values of a row from the lowest bits on."""
    if bits == 8:
        return x.astype(np.uint8)
    x = np.concatenate([x, np.zeros_like(x[:, : x.shape[1] % 2])], 1).astype(np.uint8)
    return np.asarray(x[:, 0::2] | x[:, 1::2] << 4)


def nbits(
    bits: int, block: int, zeros: str = "none", k: int = K, group: bool = False, level: int = 0
) -> tuple[onnx.ModelProto, np.ndarray]:
    """A MatMulNBits model and the weight [N, k] that it stands for."""
    blocks = -(-k // block)
    q = RNG.integers(0, 1 << bits, (N, blocks * block))
    scale = halves(N, blocks)
    z = np.full((N, blocks), 1 << (bits - 1))
    given = [proto("w", pack(q, bits).reshape(N, blocks, -1)), proto("scale", scale.ravel())]
    if zeros == "packed":
        z = RNG.integers(0, 1 << bits, (N, blocks))
        given.append(proto("zero", pack(z, bits).ravel()))
    elif zeros == "float":
        z = RNG.integers(0, 1 << bits, (N, blocks))
        given.append(proto("zero", z.astype(np.float32)))
    names = ["x", "w", "scale", "zero" if zeros != "none" else ""]
    if group:
        given.append(proto("g_idx", (np.arange(k) // block).astype(np.int32)))
        names.append("g_idx")
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "MatMulNBits", names, ["y"], name="product", domain="com.microsoft", K=k, N=N, bits=bits, block_size=block,
        accuracy_level=level,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", N])
    graph = helper.make_graph([node], "g", [x], [y], given)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    spread = np.repeat(z, block, 1), np.repeat(scale, block, 1)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), ((q - spread[0]) * spread[1])[:, :k]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 256])
@pytest.mark.parametrize("zeros", ["none", "packed", "float"])
@pytest.mark.parametrize("k", [K, 100])
def test_matmul_nbits(bits: int, block: int, zeros: str, k: int) -> None:
    m, w = nbits(bits, block, zeros, k)
    program = from_onnx(m)
    if zeros != "none" and block != 16 and k % min(block, k) == 0 and min(block, k) % 32 == 0:
        assert quantized_types(program) == [f"int{bits}zb{min(block, k)}f16[{N}, {k}]"]
    elif bits == 4 or zeros == "none":
        scheme = 4 if bits == 4 and zeros == "none" else 8
        assert quantized_types(program) == [f"int{scheme}b{'16f32' if block == 16 else '32f16'}[{N}, {k}]"]
    else:
        assert "need more than 8 bits" in program.origin.dequantized["w"]
    x = RNG.standard_normal((2, 3, k)).astype(np.float32)
    np.testing.assert_allclose(run(program, x), x @ w.T, rtol=1e-4, atol=1e-4)


def test_accuracy_level_four_is_products_of_int8() -> None:
    (node,) = from_onnx(nbits(4, 32, level=4)[0])["forward"].nodes
    assert getattr(node.attrs, "activation") == "int8"  # noqa: B009


def test_act_order_is_refused_by_name() -> None:
    with pytest.raises(OnnxError, match=r"node 'product'.*g_idx"):
        from_onnx(nbits(4, 32, group=True)[0])


def test_damaged_sizes_are_refused() -> None:
    m, _ = nbits(4, 32)
    next(a for a in m.graph.node[0].attribute if a.name == "N").i = 10**9
    with pytest.raises(OnnxError, match=r"B has shape .* should have"):
        from_onnx(m)


@pytest.mark.parametrize("zeros", [False, True])
def test_gather_block_quantized(zeros: bool) -> None:
    q, scale, z = RNG.integers(0, 16, (50, 64)), halves(50, 2), np.full((50, 2), 8)
    given = [proto("w", pack(q, 4)), proto("scale", scale)]
    if zeros:
        z = RNG.integers(0, 16, (50, 2))
        given.append(proto("zero", pack(z, 4)))
    node = helper.make_node(
        "GatherBlockQuantized", ["w", "x", "scale", "zero"][: 3 + zeros], ["y"], domain="com.microsoft", block_size=32, bits=4,
        quantize_axis=1,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.INT64, ["s"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", 64])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    m = helper.make_model(helper.make_graph([node], "g", [x], [y], given), opset_imports=opsets, ir_version=10)
    ids = np.array([3, 49])
    want = ((q - np.repeat(z, 32, 1)) * np.repeat(scale, 32, 1)).astype(np.float32)[ids]
    np.testing.assert_array_equal(run(from_onnx(m), ids), want)


# -- laziness, and compiled --------------------------------------------------------------------------------------------------
def test_packed_external_data_are_read_when_loaded(tmp_path: Path) -> None:
    m = qdq(integers("int4", K, N), halves(N), None)
    want = ReferenceEvaluator(m).run(None, {"x": X})[0]
    onnx.save(m, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    program = folded(tmp_path / "m.onnx")
    np.testing.assert_allclose(run(program, X), want, rtol=1e-5, atol=1e-5)
    data = tmp_path / "m.data"
    data.write_bytes(bytes(data.stat().st_size))  # another content: what is loaded now is another weight
    assert not next(iter(program.params.values())).load().values.any()


@pytest.mark.parametrize("kind", ["nbits32", "nbits16", "int4", "int8"])
def test_compiled_weights_keep_their_width(kind: str, tmp_path: Path) -> None:
    bits = 8 if kind == "int8" else 4
    if kind.startswith("nbits"):
        m, w = nbits(4, int(kind[5:]))
        x = X[None]
        want = x @ w.T
    else:
        m, x = qdq(integers(kind, K, N), halves(N), None), X
        want = ReferenceEvaluator(m).run(None, {"x": X})[0]
    ws.compile(from_onnx(m), tmp_path / "out")
    size = (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert size < 64 * K * (bits / 8 + 4 / 16) + 4096  # rows padded to a panel, scales, the header; f32 would be four bytes
    y = ws.load(tmp_path / "out").run("forward", x=x)
    np.testing.assert_allclose(y["y"], want, rtol=1e-4, atol=1e-4)


def test_what_is_compiled_to_be_called_here_keeps_them_too() -> None:
    m = qdq(integers("int8", K, N), halves(N), None)
    compiled = ws.Executable(from_onnx(m))
    assert quantized_types(compiled._runner.program) == [f"int8b32f16[{N}, {K}]"]
    np.testing.assert_allclose(compiled(x=X)["y"], ReferenceEvaluator(m).run(None, {"x": X})[0], rtol=1e-4, atol=1e-4)


# -- dequantization spelled as a cast and a product ----------------------------------------------------------------------------
def spelled(
    nodes: list[Any], given: dict[str, np.ndarray], x: list[Any], kind: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """A model of ``nodes``, from x to y."""
    graph = helper.make_graph(
        [helper.make_node(op, ins, [out], **attrs) for op, ins, out, attrs in nodes], "g",
        [helper.make_tensor_value_info("x", kind, x)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [proto(name, array) for name, array in given.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


FLOAT, HALF, INT32 = ({"to": t} for t in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32))
TURN: dict[str, Any] = {"perm": [1, 0]}
CAST = ("Cast", ["q"], "f", FLOAT)
SPELLINGS: dict[str, tuple[list[Any], tuple[int, ...]]] = {
    "scale second": ([CAST, ("Mul", ["f", "scale"], "w", {})], (1, N)),
    "scale first": ([CAST, ("Mul", ["scale", "f"], "w", {})], (1, N)),
    "one scale": ([CAST, ("Mul", ["f", "scale"], "w", {})], ()),
    "a scale of the last axis": ([CAST, ("Mul", ["f", "scale"], "w", {})], (N,)),
    "zero as float": ([CAST, ("Sub", ["f", "zero_f"], "d", {}), ("Mul", ["d", "scale"], "w", {})], (1, N)),
    "zero as i32": (
        [
            ("Cast", ["q"], "i", INT32), ("Cast", ["zero"], "zi", INT32), ("Sub", ["i", "zi"], "d", {}),
            ("Cast", ["d"], "f", FLOAT), ("Mul", ["f", "scale"], "w", {}),
        ],
        (1, N),
    ),
    "turned behind": ([CAST, ("Mul", ["f", "scale"], "t", {}), ("Transpose", ["t"], "w", TURN)], (N, 1)),
    "turned between": ([CAST, ("Transpose", ["f"], "t", TURN), ("Mul", ["t", "scale"], "w", {})], (1, N)),
    "turned between, with a zero": (
        [CAST, ("Sub", ["f", "zero_t"], "d", {}), ("Transpose", ["d"], "t", TURN), ("Mul", ["scale", "t"], "w", {})],
        (1, N),
    ),
    "turned before": ([("Transpose", ["q"], "t", TURN), ("Cast", ["t"], "f", FLOAT), ("Mul", ["f", "scale"], "w", {})], (1, N)),
    "scales in f16": ([CAST, ("Cast", ["half"], "s", FLOAT), ("Mul", ["f", "s"], "w", {})], (1, N)),
}  # fmt: skip


@pytest.mark.parametrize(
    "spelling, kind", [(s, kind) for s in SPELLINGS for kind in ("int8", "uint8") if kind == "int8" or "zero" in s]
)
def test_a_cast_and_a_product_are_a_quantized_weight(spelling: str, kind: str) -> None:
    nodes, shape = SPELLINGS[spelling]
    turned = "turned" in spelling
    q = integers(kind, *((N, K) if turned else (K, N)))
    zero = np.full(N, SYMMETRIC[kind])
    scale = halves(*shape)
    given = {
        "q": q, "scale": scale, "half": scale.astype(np.float16), "zero": zero.reshape(1, N).astype(q.dtype),
        "zero_f": zero.reshape(1, N).astype(np.float32), "zero_t": zero.reshape(N, 1).astype(np.float32),
    }  # fmt: skip
    read = {name for _, ins, _, _ in nodes for name in ins}
    m = folded(spelled(
        [*nodes, ("MatMul", ["x", "w"], "y", {})], {k: v for k, v in given.items() if k in read}, ["s", K]
    ))  # fmt: skip
    assert quantized_types(m) == [f"int8b32f16[{N}, {K}]"]
    w = q.astype(np.float32).T if turned else q.astype(np.float32)
    w = (w - zero if "zero" in spelling else w) * (scale.reshape(1, -1) if scale.ndim else scale)
    np.testing.assert_allclose(run(m, X), X @ w, rtol=1e-5, atol=1e-4)


def test_a_scale_behind_the_product_leaves_integers() -> None:
    q, scale = integers("int8", K, N), halves(N)
    m = folded(spelled(
        [CAST, ("MatMul", ["x", "f"], "p", {}), ("Mul", ["p", "scale"], "y", {})], {"q": q, "scale": scale}, ["s", K]
    ))  # fmt: skip
    assert len(quantized_types(m)) == 1
    np.testing.assert_allclose(run(m, X), X @ q.astype(np.float32) * scale, rtol=1e-5, atol=1e-4)


def test_rows_of_a_table_that_is_cast_and_scaled() -> None:
    q, scale = integers("int8", N, K), halves(N, 1)
    nodes = [CAST, ("Mul", ["f", "scale"], "w", {}), ("Gather", ["w", "x"], "y", {})]
    m = folded(spelled(nodes, {"q": q, "scale": scale}, ["s"], TensorProto.INT64))
    assert len(quantized_types(m)) == 1
    ids = np.array([0, 5, N - 1])
    np.testing.assert_array_equal(run(m, ids), (q * scale)[ids])


@pytest.mark.parametrize(
    "scale, zero, why",
    [
        ((K, 1), None, "its scales differ along axis 0, and products sum over axis 0"),
        ((K, N), None, "its scales or zero points differ along both axes"),
        ((1, N), np.zeros((K, 1)), "its scales or zero points differ along both axes"),
        ((1, N), np.full((1, 1), 0.5), "its zero points are no integers"),
        ((1, N), np.full((1, N), np.inf), "its zero points are no integers"),
        ((1, N), np.full((1, N), 200), "need more than 8 bits"),
    ],
)
def test_cast_weights_that_no_scheme_holds_are_named(scale: tuple[int, ...], zero: np.ndarray | None, why: str) -> None:
    q = integers("int8", K, N)
    nodes: list[Any] = [CAST, ("Mul", ["f" if zero is None else "d", "scale"], "w", {}), ("MatMul", ["x", "w"], "y", {})]
    given = {"q": q, "scale": halves(*scale)}
    if zero is not None:
        nodes.insert(1, ("Sub", ["f", "zero"], "d", {}))
        given["zero"] = zero.astype(np.float32)
    m = spelled(nodes, given, ["s", K])
    assert not quantized_types(folded(m))
    assert [why in x for x in reasons(m)] == [True]


def test_cast_kernels_of_convolutions_are_named() -> None:
    q = integers("int8", 4, 3, 3, 3)
    nodes = [CAST, ("Mul", ["f", "scale"], "w", {}), ("Conv", ["x", "w"], "y", {})]
    m = spelled(nodes, {"q": q, "scale": halves(4, 1, 1, 1)}, [1, 3, 8, 8])
    assert ["no product" in x for x in reasons(m)] == [True]


def test_a_product_of_constants_that_no_parameter_makes_is_read() -> None:
    nodes = [
        helper.make_node("Range", ["zero", "four", "one"], ["r"]), helper.make_node("Cast", ["r"], ["f"], to=1),
        helper.make_node("Mul", ["f", "f"], ["m"]), helper.make_node("Add", ["x", "m"], ["y"]),
    ]  # fmt: skip
    stored = [onnx.numpy_helper.from_array(np.array(n), k) for k, n in (("zero", 0), ("four", 4), ("one", 1))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], stored)
    assert from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))["forward"]


@pytest.mark.parametrize("op, gates, first", [("LSTM", 4, False), ("GRU", 3, True), ("GRU", 3, False), ("RNN", 1, False)])
def test_weights_of_a_recurrence(op: str, gates: int, first: bool, tmp_path: Path) -> None:
    """That of x is multiplied by once, before the loop, and those of states in it, whole (a GRU that resets its state first has
    two); all are quantized, and what is compiled equals what is interpreted."""
    rng = np.random.default_rng(0)
    arrays = {"w": (1, gates * 32, 48), "r": (1, gates * 32, 32), "b": (1, 2 * gates * 32)}
    held = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32) / 5, k) for k, s in arrays.items()]
    float32 = TensorProto.FLOAT
    options = {"linear_before_reset": int(first)} if op == "GRU" else {}
    node = helper.make_node(op, ["x", "w", "r", "b"], ["y"], hidden_size=32, **options)
    x = helper.make_tensor_value_info("x", float32, ["s", "n", 48])
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", float32, None)], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    program, _ = ws.optimize(from_onnx(tmp_path / "m.onnx"), quantize="int8", activation=None)
    [loop] = [n for n in program["g" if "g" in program.graphs else "forward"].nodes if n.attrs.bodies]
    before = [n for n in loop.graph.nodes if n.op.name == "quantized_linear"] if loop.graph else []
    assert [str(n.inputs[1].type) for n in before] == [f"int8b32f16[{gates * 32}, 48]"]
    rows = [gates] if op != "GRU" or first else [2, 1]
    assert [str(v.type) for v in loop.inputs if "int8" in str(v.type)] == [f"int8b32f16[{n * 32}, 32]" for n in rows]
    [body] = loop.attrs.bodies
    assert body.graph.count("quantized_linear") == len(rows)
    assert body.graph.count("quantize") == body.graph.count("dequantize") == 0
    given = rng.standard_normal((5, 3, 48)).astype(np.float32)
    want = ws.run(program, x=given)["y"]
    np.testing.assert_allclose(ws.run(program, backend="cpu", x=given)["y"], want, rtol=1e-5, atol=1e-6)
