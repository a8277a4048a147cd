"""``wasat compare`` with peers that are installed: equal where they are equal, and a fault of the model named where it lies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import wasat as ws
from wasat.comparison.engines import OnnxRuntime
from wasat.comparison.sides import Side
from wasat.testing import random_program

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("transformers")

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3"])
def test_transformers_on_a_folder(name: str) -> None:
    found = ws.compare(GOLDEN / "hf" / name, "transformers", tokens=12)
    assert found.ok, str(found)
    assert found.stages[0].values > 20
    assert found.outputs[0].value == "logits"


def test_a_fault_between_modules(tmp_path: Path) -> None:
    """Another base of the rotation: what goes into each attention's last product is wrong, and nothing that follows."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "hf" / "llama", folder)
    ours = ws.load_program(folder)
    config = folder / "config.json"
    text = config.read_text()
    assert '"rms_norm_eps"' in text
    read = json.loads(text)
    for where in (read, read.get("rope_parameters") or {}):
        if "rope_theta" in where:
            where["rope_theta"] = 2 * where["rope_theta"]
    config.write_text(json.dumps(read))
    found = ws.compare(Side("ours", ours, folder), Side("theirs", path=folder, peer="transformers"), tokens=12)
    assert not found.ok
    assert found.first is not None
    assert {d.op.partition("(")[2] for d in found.stages[0].differences} == {
        f"into model.layers.{i}.self_attn.o_proj)" for i in range(read["num_hidden_layers"])
    }


@pytest.mark.parametrize("name", ["llama_legacy", "vit_legacy", "bert_eager", "t5_encoder"])
def test_onnxruntime_on_a_file(name: str) -> None:
    found = ws.compare(GOLDEN / "onnx" / f"{name}.onnx", "onnxruntime", tokens=8)
    assert found.ok, str(found)
    assert found.stages[0].values > 40


def test_onnxruntime_on_a_file_whose_node_was_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = GOLDEN / "onnx" / "vit_legacy.onnx"
    program = ws.load_program(path)
    norm = next(n for n in program["forward"].nodes if n.op.name == "layer_norm")
    norm.attrs = dataclasses.replace(norm.attrs, eps=0.01)  # type: ignore[call-arg]
    found = ws.compare(Side("ours", program), Side("theirs", program, path, OnnxRuntime(), peer="onnxruntime"))
    assert [d.value for d in found.stages[-1].differences] == [norm.output.name]
    assert not found.ok


def test_onnxruntime_on_our_export() -> None:
    found = ws.compare(random_program("""
graph @forward(%x: f32[b, s, 8]) {
  param %w: f32[16, 8]
  %h: f32[b, s, 16] = linear(%x, %w)
  %a: f32[b, s, 16] = silu(%h)
  %p: f32[b, s, 16] = softmax(%a) {axis=2}
  return %p
}
"""), "onnxruntime")  # fmt: skip
    assert found.ok, str(found)
    assert found.stages[0].values == 3
    assert not found.stages[0].skipped


def test_logits_of_transformers_over_a_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "hf" / "llama", folder)
    words = {w: i for i, w in enumerate(["what", "comes", "next", "a", "model", "says"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    found = ws.compare(folder, "transformers", text="a model says what comes next " * 3, window=7, tokens=8)
    assert found.text is not None
    assert found.text.tokens == 18
    assert abs(found.text.kl) < 1e-9
    assert found.text.same_top == 1
    assert np.isclose(found.text.perplexity, found.text.base_perplexity, rtol=1e-6)


def test_the_parts_of_a_sequence_are_outputs_of_their_own(tmp_path: Path) -> None:
    h = onnx.helper
    f32 = onnx.TensorProto.FLOAT
    cut = h.make_node("SplitToSequence", ["x"], ["parts"], axis=0)
    whole = h.make_node("Neg", ["x"], ["out/0"])
    outputs = [h.make_tensor_sequence_value_info("parts", f32, None), h.make_tensor_value_info("out/0", f32, [2, 3])]
    graph = h.make_graph([cut, whole], "g", [h.make_tensor_value_info("x", f32, [2, 3])], outputs)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(tmp_path / "m.onnx"))
    found = ws.compare(tmp_path / "m.onnx", "onnxruntime")
    assert found.ok, str(found)
    assert [d.value for d in found.outputs] == ["parts.0", "parts.1", "out/0"]


@pytest.mark.parametrize("tokens", [4, 5])
def test_as_many_tokens_as_heads(tokens: int) -> None:
    """Norms of heads: transformers has heads before positions there; with 4 tokens both have the same shape."""
    found = ws.compare(GOLDEN / "hf" / "gemma3", "transformers", tokens=tokens)
    assert found.ok, str(found)
    assert found.stages[0].values > 24  # norms of heads among them
