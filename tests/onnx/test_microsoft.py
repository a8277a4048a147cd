"""onnxruntime's own operators: each as onnxruntime computes it; a decoder made of them gets caches in place of its past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from microsoft_models import CASES, DECODERS, TOKENS, quantized_experts
from onnx import helper
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.ir import DType, QTensorType, TensorType, evaluate

import wasat as ws

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "onnx" / "microsoft.npz")


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str) -> None:
    case = CASES[name]
    program = from_onnx(case.model)
    taken = {v.name for v in program["forward"].inputs}
    got = ws.run(program, **{k: x for k, x in case.feeds.items() if k in taken})
    assert got
    for output, y in got.items():
        want = GOLDEN[f"{name}/{output}"]
        if case.rows is None:
            np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5, err_msg=output)
        for r, n in enumerate(case.rows or []):
            along = want.ndim - 2 if want.ndim == 4 else 1  # keys and values have heads before positions
            np.testing.assert_allclose(y[r].take(range(n), along - 1), want[r].take(range(n), along - 1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_past_becomes_a_cache(name: str) -> None:
    """Inputs of a past, its outputs and what told how long it is are gone; step by step as onnxruntime."""
    program = from_onnx(DECODERS[name])
    positions = ["position_ids"] if "positions" in name else []
    g = program["forward"]
    assert [v.name for v in g.inputs] == ["input_ids", *positions]
    assert list(g.output_names) == ["logits"]
    served, _ = ws.optimize(program, kv_cache=True, chunk=5)
    assert served["decode"].count("cached_attention") == 2
    assert {s.kind for s in served.interface.states} == {"ring" if "window" in name else "full"}
    params = {k: p.load() for k, p in served.params.items()}
    states = {v.name: np.zeros(v.tensor.substitute({"batch_size": 2, "c": 16}).concrete({}), np.float32)
              for v in served["decode"].inputs if v.name in served.interface.state_names}  # fmt: skip
    want, at = GOLDEN[f"{name}/logits"], 0
    for end in (5, 6, 9, 10, 11, 12):
        e = served["decode" if end - at == 1 else "prefill"]
        feeds = {"tokens": TOKENS[:, at:end], "past": np.full(2, at), "last": np.full(2, end - at - 1), **states}
        made = evaluate(e, {v.name: feeds[v.name] for v in e.inputs}, {k: params[k] for k in e.params})
        out = dict(zip(e.output_names, made))
        np.testing.assert_allclose(out["logits"], want[:, end - 1], rtol=1e-4, atol=1e-4)
        states, at = {k: out[k] for k in states}, end


def test_what_is_not_read_is_refused_by_name() -> None:
    for name, attrs, reason in (
        ("rotation", {"scale": 2.0}, "a scale are not supported"), ("experts", {"use_sparse_mixer": 1}, "sparse mixer"),
        ("one product", {"do_rotary": 1}, "do_rotary"), ("groups", {"local_window_size": 0}, "a window of no keys"),
        ("groups, window", {"causal": 0}, "one of keys after a query"),
        ("heads, memory", {"unidirectional": 1}, "unidirectional with 5 queries and 7 keys"),
        ("rotation", {"num_heads": 2}, "turn 16 features, and a head has 32"),
        ("rotation of a part", {"rotary_embedding_dim": 16}, "turn 8 features, and a head has 16"),
        ("experts of 4 bits", {"quant_type": "fp8"}, "quant_type 'fp8'.* 'int' is"),
        ("experts of 4 bits", {"weights_prepacked": 1}, "an order of one kind of device"),
        ("experts of 4 bits", {"swiglu_limit_after_activation": 1}, "swiglu_limit_after_activation are not supported"),
        ("experts of 4 bits", {"fc2_expert_weight_bits": 2}, "weights of 2 bits are not supported"),
        ("experts of 4 bits", {"activation_type": "geglu"}, "activation geglu"),
        ("experts of 4 bits", {"activation_type": "swiglu"}, "swiglu without fc3 or swiglu_fusion"),
        ("experts of 4 bits, blocks", {"block_size": 24}, "block_size=24: blocks are powers of two.* that divide 64"),
        ("experts of 4 bits, blocks", {"block_size": 64}, "fc1_scales has shape .4, 96, 2. and should have 384 elements"),
        ("experts of 8 bits", {"expert_weight_bits": 4}, "last axis of x"),
        ("rotation", {"theta": 0}, "RotaryEmbedding node .* has an attribute theta, which is not understood"),
    ):  # fmt: skip
        model = onnx.ModelProto()
        model.CopyFrom(CASES[name].model)
        node = model.graph.node[0]
        kept = [a for a in node.attribute if a.name not in attrs]
        del node.attribute[:]
        node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attrs.items())])
        with pytest.raises(OnnxError, match=reason):
            from_onnx(model)


def test_a_past_that_is_kept_as_an_input_is_refused() -> None:
    with pytest.raises(OnnxError, match="a past that is not an input of the model alone"):
        from_onnx(DECODERS["grouped"], types={"past_key_values.0.key": TensorType(DType.F32, (2, 2, 3, 16))})


# -- experts of quantized weights --------------------------------------------------------------------------------------------
def unpacked(x: np.ndarray, bits: int) -> np.ndarray:
    return x.astype(np.float64) if bits == 8 else np.stack([x & 15, x >> 4], -1).reshape(*x.shape[:-1], -1).astype(np.float64)


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def dense(arrays: dict[str, np.ndarray], at: int, zero: int, bits: int, block: int) -> np.ndarray:
    """The documentation's (weight - zero point) * scale, [experts, out, in]."""
    codes, scales = unpacked(arrays[f"in{at}"], bits), arrays[f"in{at + 1}"].astype(np.float64)
    e, n, k = codes.shape
    scales = scales.reshape(e, n, -1)
    zeros = np.full(scales.shape, float(1 << (bits - 1)))
    if f"in{zero}" in arrays:
        given = unpacked(arrays[f"in{zero}"], bits)
        zeros = given[..., : scales.shape[2]] if block else given[..., None]
    spread = k // scales.shape[2]
    return (codes - zeros.repeat(spread, 2)) * scales.repeat(spread, 2)


STORED = [(4, 0, False), (4, 0, True), (4, 16, True), (4, 32, False), (8, 0, True), (8, 32, False), (8, 32, True)]


@pytest.mark.parametrize("bits, block, zeros", STORED)
def test_quantized_experts_hold_the_same_numbers(bits: int, block: int, zeros: bool) -> None:
    """Weights stay in their bits; the sum is the documentation's: onnxruntime rounds activations where blocks are of 8 bits."""
    case = quantized_experts(bits, block, zeros)
    program, arrays = from_onnx(case.model), stored(case.model)
    g = program["forward"]
    assert g.count("quantized_grouped_linear") == 2
    first, second = (dense(arrays, at, zero, bits, block) for at, zero in ((2, 11), (5, 12)))
    kept = [p.load() for p in program.params.values() if isinstance(p.type, QTensorType)]
    assert {q.type.scheme for q in kept} == {"int8" if bits == 8 or (zeros and block == 16) else "int4"}
    for q, want in zip(kept, (first, second)):
        np.testing.assert_array_equal(q.dense(), want.astype(np.float32))
    x, scores = case.feeds["in0"].astype(np.float64), case.feeds["in1"].astype(np.float64)
    want = np.zeros_like(x)
    for i in range(len(x)):
        best = np.argsort(-scores[i], kind="stable")[:3]
        share = np.exp(scores[i, best] - scores[i, best].max())
        for e, s in zip(best, share / share.sum()):
            want[i] += s * (second[e] @ np.maximum(first[e] @ x[i], 0))
    np.testing.assert_allclose(ws.run(program, **case.feeds)["out0"], want, rtol=2e-5, atol=2e-5)


def test_quantized_experts_may_be_multiplied_as_integers() -> None:
    case = quantized_experts(4, 32, accuracy_level=4)
    nodes = [n for n in from_onnx(case.model)["forward"].nodes if n.is_a("quantized_grouped_linear")]
    assert [n.attrs.activation for n in nodes] == ["int8", "int8"]  # type: ignore[attr-defined]


def test_quantized_experts_compiled() -> None:
    pytest.importorskip("tvm")
    case = CASES["experts of 4 bits, blocks, zeros"]
    got = ws.run(from_onnx(case.model), backend="cpu", **case.feeds)["out0"]
    np.testing.assert_allclose(got, GOLDEN["experts of 4 bits, blocks, zeros/out0"], rtol=2e-5, atol=2e-5)
