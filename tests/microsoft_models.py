"""Small models of onnxruntime's own operators, with inputs: what ``golden/make_microsoft.py`` runs and the tests import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
B, S, H, G, D = 2, 5, 4, 2, 16
CODES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}


@dataclass
class Case:
    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    """Of every input, a past of no positions included."""
    rows: list[int] | None = None
    """How many tokens of each row are real, where behind them anything may stand."""


def waves(*shape: int, step: float = 0.37, scale: float = 1.0) -> np.ndarray:
    return (np.sin(np.arange(int(np.prod(shape))) * step + 0.3) * scale).astype(np.float32).reshape(shape)


def one(kind: str, inputs: list[np.ndarray | None], outputs: int = 1, domain: str = MS, weights: tuple[int, ...] = (),
        rows: list[int] | None = None, empty: tuple[int, ...] = (), **attrs: Any) -> Case:  # fmt: skip
    """A model of one node; inputs at ``weights`` are initializers; outputs at ``empty`` are not asked for."""
    names = [f"in{i}" if x is not None else "" for i, x in enumerate(inputs)]
    results = ["" if i in empty else f"out{i}" for i in range(outputs)]
    node = helper.make_node(kind, names, results, name="node", domain=domain, **attrs)
    given = {n: x for i, (n, x) in enumerate(zip(names, inputs)) if x is not None and i not in weights}
    stored = [numpy_helper.from_array(x, n) for i, (n, x) in enumerate(zip(names, inputs)) if x is not None and i in weights]
    infos = [helper.make_tensor_value_info(n, CODES[x.dtype], list(x.shape)) for n, x in given.items()]
    counts = kind == "EmbedLayerNormalization"  # whose second result counts tokens
    types = [TensorProto.INT32 if counts and i == 1 else TensorProto.FLOAT for i in range(outputs)]
    outs = [helper.make_tensor_value_info(n, t, None) for n, t in zip(results, types) if n]
    graph = helper.make_graph([node], "g", infos, outs, stored)
    sets = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]
    return Case(helper.make_model(graph, opset_imports=sets, ir_version=9), given, rows)


def tables(width: int = D) -> list[np.ndarray]:
    angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    return [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]


def grouped(rows: list[int] | None = None, rotary: list[np.ndarray] | None = None, packed: bool = False,
            extra: list[np.ndarray | None] | None = None, width: int = D, **attrs: Any) -> Case:  # fmt: skip
    q, k, v = waves(B, S, H * width), waves(B, S, G * width, step=0.61), waves(B, S, G * width, step=0.83)
    past = np.zeros((B, G, 0, width), np.float32)
    lengths = np.array(rows or [S] * B, np.int32) - 1
    qkv: list[np.ndarray | None] = [np.concatenate([q, k, v], 2), None, None] if packed else [q, k, v]
    inputs = [*qkv, past, past, lengths, np.array(S, np.int32), *(rotary or [None, None]), *(extra or [])]
    while inputs[-1] is None:
        inputs.pop()
    return one("GroupQueryAttention", inputs, 3, rows=rows, num_heads=H, kv_num_heads=G,
               do_rotary=int(rotary is not None), **attrs)  # fmt: skip


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers as bytes, two of 4 bits in one, along the last axis."""
    if bits == 8:
        return codes.astype(np.uint8)
    codes = np.concatenate([codes, codes[..., : codes.shape[-1] % 2]], axis=-1)
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def quantized_experts(bits: int, block: int = 0, zeros: bool = False, weights: bool = False, biases: bool = False,
                      **attrs: Any) -> Case:  # fmt: skip
    """Three of four experts of 64 -> 96 -> 64 for each of six tokens."""
    rng = np.random.default_rng(bits + block)
    wide = 2 if attrs.get("activation_type") == "swiglu" else 1
    inputs: list[np.ndarray | None] = [waves(6, 64), waves(6, 4, step=1.7, scale=2.0)]
    behind: list[np.ndarray | None] = []
    for n, k in ((96 * wide, 64), (64, 96)):
        blocks = k // block if block else 1
        scales = (rng.random((4, n, blocks)) * 0.02 + 0.01).astype(np.float32)
        zero = rng.integers(0, 1 << bits, (4, n, blocks))
        bias = waves(4, n, step=0.7) if biases else None
        inputs += [packed(rng.integers(0, 1 << bits, (4, n, k)), bits), scales if block else scales[..., 0], bias]
        behind.append(packed(zero if block else zero[..., 0], bits) if zeros else None)
    inputs += [None, None, None, *behind, None, waves(6, 4, step=0.9) + 1.5 if weights else None]
    while inputs[-1] is None:
        inputs.pop()
    kept = tuple(i for i in range(2, 14))
    return one("QMoE", inputs, weights=kept, k=3, expert_weight_bits=bits, **({"block_size": block} if block else {}), **attrs)


def _cases() -> dict[str, Case]:
    x, w, c = waves(B, S, H * D), waves(H * D, step=0.2), waves(H * D, step=0.5)
    qkv = [waves(B, S, H * D, step=t) for t in (0.37, 0.61, 0.83)]
    padded = np.array([[1] * S, [1, 1, 1, 0, 0]], np.int32)
    bias = waves(1, H, S, S, step=0.9)
    ids = (np.arange(B * S).reshape(B, S) * 7 % 11).astype(np.int32)
    words = [waves(11, 16), waves(9, 16, step=0.5), waves(2, 16, step=0.7), waves(16, step=0.2), waves(16, step=0.4)]
    at = np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], np.int64)
    experts = [waves(6, 16), waves(6, 4, step=1.7), waves(4, 12, 16, scale=0.5), waves(4, 12), waves(4, 16, 12, scale=0.5),
               waves(4, 16, step=0.3)]  # fmt: skip
    gated = [*experts[:2], waves(4, 24, 16, scale=0.5), waves(4, 24), *experts[4:]]
    return {
        "rms norm": one("SimplifiedLayerNormalization", [x, w], domain="", axis=-1, epsilon=1e-5),
        "skip, rms norm": one("SkipSimplifiedLayerNormalization", [x, qkv[1], w], 4, empty=(1, 2), epsilon=1e-6),
        "skip, bias, rms norm": one("SkipSimplifiedLayerNormalization", [x, qkv[1], w, c], 4, empty=(1, 2), epsilon=1e-6),
        "skip, norm": one("SkipLayerNormalization", [x, qkv[1], w, c, w], 4, empty=(1, 2), epsilon=1e-5),
        "skip of one row, norm": one("SkipLayerNormalization", [x, qkv[1][0], w, c], epsilon=1e-5),
        "embeddings, norm": one("EmbedLayerNormalization", [ids, ids % 2, *words, padded], 2, epsilon=1e-5,
                                weights=(2, 3, 4, 5, 6)),
        "gelu": one("Gelu", [x]), "fast gelu": one("FastGelu", [x, w]), "bias gelu": one("BiasGelu", [x, w]),
        "quick gelu": one("QuickGelu", [x], alpha=1.702),
        "product": one("FusedMatMul", [waves(2, 3, 5, 4), waves(2, 3, 6, 5, step=0.7)], transA=1, transB=1, alpha=0.5),
        "product, batch turned": one("FusedMatMul", [waves(3, 2, 4, 5), waves(2, 4, 5, 6, step=0.7)], transBatchA=1),
        "rotation": one("RotaryEmbedding", [x, at, *tables()], num_heads=H),
        "rotation of pairs": one("RotaryEmbedding", [x, at, *tables()], interleaved=1),
        "rotation of a part": one("RotaryEmbedding", [x, at, *tables(8)], num_heads=H, rotary_embedding_dim=8),
        "rotation, heads first": one("RotaryEmbedding", [waves(B, H, S, D), np.array([2], np.int64), *tables()]),
        "heads": one("MultiHeadAttention", qkv, num_heads=H),
        "heads, causal": one("MultiHeadAttention", qkv, num_heads=H, unidirectional=1, scale=0.3),
        "heads, biases, padding": one("MultiHeadAttention", [*qkv, waves(3 * H * D, step=0.11), padded], num_heads=H),
        "heads, lengths": one("MultiHeadAttention", [*qkv, None, np.array([5, 3], np.int32)], num_heads=H),
        "heads, a bias of scores": one("MultiHeadAttention", [*qkv, None, None, bias], num_heads=H, unidirectional=1),
        "heads, memory": one("MultiHeadAttention", [x, waves(B, H, 7, D), waves(B, H, 7, D, step=0.9)], num_heads=H),
        "heads, memory, biases": one("MultiHeadAttention", [x, waves(B, H, 7, D), waves(B, H, 7, D, step=0.9),
                                                            waves(3 * H * D, step=0.11)], num_heads=H),
        "one product": one("Attention", [x, waves(H * D, 3 * H * D, scale=0.3), waves(3 * H * D)], num_heads=H, weights=(1, 2)),
        "one product, causal": one("Attention", [x, waves(H * D, 3 * H * D, scale=0.3), waves(3 * H * D)], num_heads=H,
                                   unidirectional=1, weights=(1, 2)),
        "one product, padding": one("Attention", [x, waves(H * D, 3 * H * D, scale=0.3), waves(3 * H * D), padded], num_heads=H,
                                    weights=(1, 2)),
        "one product, narrow values": one("Attention", [x, waves(H * D, 160, scale=0.3), waves(160)], num_heads=H,
                                          qkv_hidden_sizes=[64, 64, 32], weights=(1, 2)),
        "groups": grouped(), "groups, softcap": grouped(softcap=2.0, scale=0.7), "groups, packed": grouped(packed=True),
        "groups, rotated": grouped(rotary=tables()), "groups, pairs rotated": grouped(rotary=tables(), rotary_interleaved=1),
        "groups, a part rotated": grouped(rotary=tables(16), width=32), 
        "groups, packed, rotated": grouped(packed=True, rotary=tables()),
        "groups, window": grouped(local_window_size=3), "groups, padded": grouped(rows=[5, 3], rotary=tables()),
        "groups, smooth": grouped(smooth_softmax=1), "groups, not smooth": grouped(smooth_softmax=-1),
        "groups, both ways": grouped(causal=0),
        "groups, sinks": grouped(extra=[None, None, np.array([0.5, -1.0, 2.0, 0.0], np.float32)], local_window_size=2),
        "groups, a bias of scores": grouped(extra=[None, bias]),
        "groups, positions": grouped(rotary=tables(), extra=[at]),
        "experts": one("MoE", experts, weights=(2, 3, 4, 5), k=2, activation_type="relu"),
        "experts, gelu": one("MoE", experts, weights=(2, 3, 4, 5), k=2, activation_type="gelu"),
        "experts, shares of one": one("MoE", experts, weights=(2, 3, 4, 5), k=2, activation_type="silu",
                                      normalize_routing_weights=1),
        "experts, swiglu": one("MoE", gated, weights=(2, 3, 4, 5), k=2, activation_type="swiglu", swiglu_fusion=1,
                               normalize_routing_weights=1, activation_alpha=1.702, activation_beta=1.0, swiglu_limit=0.8),
        "experts of 4 bits": quantized_experts(4),
        "experts of 8 bits": quantized_experts(8, biases=True, activation_type="gelu"),
        "experts of 4 bits, blocks": quantized_experts(4, 32, biases=True, activation_type="silu", normalize_routing_weights=1),
        "experts of 4 bits, zeros": quantized_experts(4, zeros=True, weights=True, activation_type="identity"),
        "experts of 8 bits, zeros": quantized_experts(8, zeros=True, weights=True, normalize_routing_weights=1),
        "experts of 4 bits, blocks, zeros": quantized_experts(4, 32, zeros=True, activation_type="swiglu", swiglu_fusion=1,
                                                              activation_alpha=1.702, activation_beta=1.0, swiglu_limit=0.8),
        "experts of 4 bits, short blocks, zeros": quantized_experts(4, 16, zeros=True),
    }  # fmt: skip


CASES = _cases()


# -- a decoder as ONNX Runtime GenAI writes it ------------------------------------------------------------------------------
VOCAB, WIDE, LAYERS = 13, 32, 2


def decoder(positions: bool = False, window: int = -1, experts: bool = False) -> onnx.ModelProto:
    """Two layers over packed projections, tables of angles, a past and a present of each, lengths from the attention mask.

    ``positions``: angles by an operator of its own at the positions that are an input, and MultiHeadAttention.
    ``experts``: each token goes through two of four layers of 4 bits.
    """
    rng = np.random.default_rng(0)
    cos, sin = tables()
    stored: dict[str, np.ndarray] = {"cos": cos, "sin": sin, "one": np.array(1, np.int64), "axis": np.array([1])}
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], outputs: list[str], domain: str = MS, **attrs: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attrs))

    def weight(name: str, *shape: int) -> str:
        stored[name] = (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        return name

    def mixture(x: str, i: int) -> None:
        add("MatMul", [x, weight(f"router{i}.w", WIDE, 4)], [f"r{i}"], "")
        stored["rows"] = np.array([-1, 4])
        add("Reshape", [f"r{i}", "rows"], [f"scores{i}"], "")
        for n in ("up", "down"):
            stored[f"{n}{i}.q"] = rng.integers(0, 256, (4, WIDE, WIDE // 2)).astype(np.uint8)
            stored[f"{n}{i}.s"] = (rng.random((4, WIDE)) * 0.1).astype(np.float32)
        operands = [f"up{i}.q", f"up{i}.s", "", f"down{i}.q", f"down{i}.s"]
        add("QMoE", [x, f"scores{i}", *operands], [f"d{i}"], k=2, activation_type="silu", expert_weight_bits=4)

    add("ReduceSum", ["attention_mask", "axis"], ["many"], "", keepdims=0)
    add("Sub", ["many", "one"], ["before"], "")
    add("Cast", ["before"], ["lengths"], "", to=TensorProto.INT32)
    add("Shape", ["attention_mask"], ["shape"], "")
    add("Gather", ["shape", "one"], ["long"], "")
    add("Cast", ["long"], ["total"], "", to=TensorProto.INT32)
    add("Gather", [weight("embed", VOCAB, WIDE), "input_ids"], ["x0"], "")
    add("SimplifiedLayerNormalization", ["x0", weight("norm", WIDE)], ["y0"], "", axis=-1, epsilon=1e-6)
    last, inputs, outputs = "x0", [], []
    for i in range(LAYERS):
        past, present = [f"past_key_values.{i}.{n}" for n in ("key", "value")], [f"present.{i}.{n}" for n in ("key", "value")]
        inputs, outputs = inputs + past, outputs + present
        if positions:
            for n, heads in (("q", H), ("k", H), ("v", H)):
                add("MatMul", [f"y{2 * i}", weight(f"{n}{i}.w", WIDE, heads * D)], [f"{n}{i}"], "")
            for n in "qk":
                add("RotaryEmbedding", [f"{n}{i}", "position_ids", "cos", "sin"], [f"{n}{i}.turned"], num_heads=H)
            operands = [f"q{i}.turned", f"k{i}.turned", f"v{i}", "", "", "", *past]
            add("MultiHeadAttention", operands, [f"a{i}", *present], num_heads=H, unidirectional=1)
        else:
            add("MatMul", [f"y{2 * i}", weight(f"qkv{i}.w", WIDE, (H + 2 * G) * D)], [f"qkv{i}"], "")
            add("GroupQueryAttention", [f"qkv{i}", "", "", *past, "lengths", "total", "cos", "sin"], [f"a{i}", *present],
                num_heads=H, kv_num_heads=G, do_rotary=1, local_window_size=window)  # fmt: skip
        add("MatMul", [f"a{i}", weight(f"o{i}.w", H * D, WIDE)], [f"o{i}"], "")
        add("SkipSimplifiedLayerNormalization", [last, f"o{i}", weight(f"n{i}", WIDE)], [f"y{2 * i + 1}", "", "", f"m{i}"])
        if experts:
            mixture(f"y{2 * i + 1}", i)
        else:
            add("MatMul", [f"y{2 * i + 1}", weight(f"up{i}.w", WIDE, WIDE)], [f"u{i}"], "")
            add("FastGelu", [f"u{i}"], [f"g{i}"])
            add("MatMul", [f"g{i}", weight(f"down{i}.w", WIDE, WIDE)], [f"d{i}"], "")
        last = f"x{i + 1}"
        add("SkipSimplifiedLayerNormalization", [f"m{i}", f"d{i}", weight(f"p{i}", WIDE)], [f"y{2 * i + 2}", "", "", last])
    add("MatMul", [f"y{2 * LAYERS}", weight("head", WIDE, VOCAB)], ["logits"], "")
    groups = H if positions else G
    given = [("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
             ("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]),
             *([("position_ids", TensorProto.INT64, ["batch_size", "sequence_length"])] if positions else []),
             *((n, TensorProto.FLOAT, ["batch_size", groups, "past_sequence_length", D]) for n in inputs)]  # fmt: skip
    made = [("logits", ["batch_size", "sequence_length", VOCAB]),
            *((n, ["batch_size", groups, "total_sequence_length", D]) for n in outputs)]  # fmt: skip
    graph = helper.make_graph(
        [n for n in nodes], "decoder", [helper.make_tensor_value_info(*i) for i in given],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in made],
        [numpy_helper.from_array(x, n) for n, x in stored.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 20), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=9)


DECODERS = {"grouped": decoder(), "grouped, a window": decoder(window=3), "heads, positions": decoder(positions=True),
            "grouped, experts": decoder(experts=True)}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 12))
