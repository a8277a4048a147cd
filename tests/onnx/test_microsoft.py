"""onnxruntime's own operators: each as onnxruntime computes it; a decoder made of them gets caches in place of its past."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from microsoft_models import CASES, DECODERS, TOKENS
from onnx import helper
from wasat.frontend.onnx import OnnxError, from_onnx
from wasat.ir import DType, TensorType, evaluate

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
