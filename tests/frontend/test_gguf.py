"""GGUF files as programs: the numbers are those of a checkpoint that holds the dequantized tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf_files as files
from gguf_files import HEAD, HEADS, KV, write
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from wasat.frontend import CheckpointError, ConfigError, from_pretrained
from wasat.frontend.gguf import from_gguf
from wasat.frontend.gguf.metadata import config_of
from wasat.frontend.weights import StoredTensor
from wasat.frontend.weights.gguf import read_gguf
from wasat.frontend.weights.safetensors import read_header
from wasat.ir import Program, QArray, evaluate, type_of

TOKENS = np.array([[1, 5, 200, 77, 3, 250, 9, 12, 13, 14, 90, 91], [9, 9, 1, 0, 2, 61, 5, 5, 8, 100, 101, 40]])


def logits(program: Program, tokens: np.ndarray = TOKENS) -> np.ndarray:
    g = program["forward"]
    return np.asarray(evaluate(g, {"tokens": tokens}, {name: program.load(name) for name in g.params})[0])


def permuted(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter puts them for interleaved rotation."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def restored(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def checkpoint(folder: Path, dense: dict[str, np.ndarray], arch: str, config: dict[str, Any]) -> Program:
    """The same model as a Hugging Face folder, read by the reader of these."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "attn_norm": "input_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "ffn_norm": "pre_feedforward_layernorm" if arch.startswith("gemma") else "post_attention_layernorm",
        "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    out = {}
    for name, x in dense.items():
        words = name.split(".")
        if name == "rope_freqs.weight":
            continue
        to = f"model.layers.{words[1]}.{parts[words[2]]}" if words[0] == "blk" else names[words[0]]
        if arch == "llama" and words[-2] in ("attn_q", "attn_k"):
            x = restored(x, HEADS if words[-2] == "attn_q" else KV)
        out[f"{to}.{words[-1]}"] = np.ascontiguousarray(x - 1 if arch.startswith("gemma") and "norm" in to else x)
    folder.mkdir(exist_ok=True)
    save_file(out, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return from_pretrained(folder)


@pytest.mark.parametrize("arch, model_type, kind, options", [
    ("llama", "llama", "F32", {}), ("llama", "llama", "Q4_1", {"tied": True}), ("llama", "llama", "Q5_0", {"bias": True}),
    ("qwen2", "qwen2", "Q8_0", {}), ("qwen3", "qwen3", "Q4_0", {}), ("qwen3", "qwen3", "F16", {}),
    ("gemma3", "gemma3_text", "Q5_1", {}), ("gemma2", "gemma2", "Q8_0", {}), ("llama", "llama", "BF16", {}),
])  # fmt: skip
def test_a_file_is_the_checkpoint_of_its_dequantized_tensors(
    arch: str, model_type: str, kind: str, options: dict[str, bool], tmp_path: Path
) -> None:
    dense = write(tmp_path / "m.gguf", arch, kinds=lambda name: kind, **options)
    program = from_gguf(tmp_path / "m.gguf")
    config = {
        "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 128,
        "rms_norm_eps": float(np.float32(1e-5)), "vocab_size": len(dense["token_embd.weight"]),
        "tie_word_embeddings": arch.startswith("gemma") or "tied" in options,
    }  # fmt: skip
    if arch == "gemma3":
        config |= {"query_pre_attn_scalar": 16, "sliding_window": 8}
    if arch == "gemma2":
        config |= {"query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 1.5}
    if "bias" in options:
        config["attention_bias"] = True
    want = logits(checkpoint(tmp_path / "hf", dense, arch, config))
    assert want.std() > 0.1
    np.testing.assert_allclose(logits(program), want, rtol=1e-4, atol=1e-5)
    found = {str(v.type).partition("[")[0] for n, v in program["forward"].params.items() if "proj.weight" in n}
    assert found == {{"Q8_0": "int8b32f16", "Q4_0": "int4b32f16"}.get(kind, kind.lower())}
    assert (program.origin.family, program.interface.context) == (model_type, 128)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
def test_rows_are_read_as_asked(kind: str, tmp_path: Path) -> None:
    """Of every reader."""
    dense = write(tmp_path / "m.gguf", "llama", kinds=lambda name: kind)
    save_file(dense, tmp_path / "m.safetensors")
    readers: list[Mapping[str, StoredTensor]] = [
        read_gguf(tmp_path / "m.gguf").tensors, read_header(tmp_path / "m.safetensors"),
    ]  # fmt: skip
    for tensors in readers:
        t, x = tensors["blk.0.ffn_up.weight"], dense["blk.0.ffn_up.weight"]
        for rows in (slice(None), slice(3, 9), slice(90, 200), slice(5, 5)):
            found = t.load(rows)
            numbers = found.dense() if isinstance(found, QArray) else found.astype(np.float32)
            np.testing.assert_array_equal(numbers, x[rows])
        assert type_of(t.load()) == t.type


def test_rows_of_queries_and_keys_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    dense = write(tmp_path / "m.gguf", "llama", kinds=lambda name: "Q4_0")
    q = from_gguf(tmp_path / "m.gguf").load("model.layers.0.self_attn.q_proj.weight").dense()  # type: ignore[union-attr]
    np.testing.assert_array_equal(permuted(q, HEADS), dense["blk.0.attn_q.weight"])
    assert not np.array_equal(q, dense["blk.0.attn_q.weight"])


@pytest.mark.parametrize("keys, rope", [
    ({"rope.freq_base": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 16.0,
      "rope.scaling.yarn_ext_factor": 1.0},
     {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}),
])  # fmt: skip
def test_rope_scalings(keys: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", keys=keys)
    assert config_of(read_gguf(tmp_path / "m.gguf"))["rope_parameters"] == {"rope_theta": 1e4, **rope}
    from_gguf(tmp_path / "m.gguf")


def test_frequencies_divided_by_a_tensor(tmp_path: Path) -> None:
    tensors = files.weights("llama", len(files.byte_vocabulary()[0]) + 2)
    plain = write(tmp_path / "a.gguf", "llama", tensors=tensors)
    assert plain
    halves = {**tensors, "rope_freqs.weight": np.full(HEAD // 2, 4, np.float32)}
    write(tmp_path / "b.gguf", "llama", tensors=halves)
    write(tmp_path / "c.gguf", "llama", tensors=tensors, keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    a, b, c = (logits(from_gguf(tmp_path / f"{x}.gguf")) for x in "abc")
    np.testing.assert_allclose(b, c, rtol=1e-5, atol=1e-6)
    assert np.abs(a - b).max() > 1e-3


def test_windows_and_caps(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", keys={"attention.sliding_window": 4})
    assert config_of(read_gguf(tmp_path / "m.gguf"))["model_type"] == "mistral"
    write(tmp_path / "g.gguf", "gemma3", keys={"final_logit_softcapping": 0.5, "attention.sliding_window_pattern": 2})
    config = config_of(read_gguf(tmp_path / "g.gguf"))
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert np.abs(logits(from_gguf(tmp_path / "g.gguf"))).max() <= 0.5
    write(tmp_path / "h.gguf", "gemma3", keys={"final_logit_softcapping": 0.0})
    assert config_of(read_gguf(tmp_path / "h.gguf"))["final_logit_softcapping"] is None


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("architecture", lambda p: write(p, "mamba"), "the architecture is 'mamba'; supported are llama, qwen2, qwen3, gemma2, "),
    ("projector", lambda p: write(p, "clip"), r"projector of pictures or sounds \(mmproj\)"),
    ("projector by type", lambda p: write(p, "llama", keys={"general.type": "mmproj"}), r"\(mmproj\)"),
    ("adapter", lambda p: write(p, "llama", keys={"general.type": "adapter"}), "general.type is 'adapter'"),
    ("unknown key", lambda p: write(p, "llama", keys={"attention.sinks": 4}), "llama.attention.sinks = 4: what that changes"),
    ("experts", lambda p: write(p, "qwen2", keys={"expert_count": 8}), "mixtures of experts"),
    ("partial rotation", lambda p: write(p, "llama", keys={"rope.dimension_count": 8}), "all of them are rotated"),
    ("scaling", lambda p: write(p, "llama", keys={"rope.scaling.type": "longrope"}), "there are none, linear and yarn"),
    ("another yarn", lambda p: write(p, "llama", keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0,
                                                       "rope.scaling.yarn_ext_factor": 0.5}), "only YaRN as published"),
    ("yarn's numbers without it", lambda p: write(p, "llama", keys={"rope.scaling.yarn_beta_fast": 16.0}), "beta_fast = 16.0"),
    ("older formats", lambda p: write(p, "llama", keys={"general.quantization_version": 1}), "version 2 are known"),
    ("no eps", lambda p: write(p, "llama", without=("attention.layer_norm_rms_epsilon",)), "epsilon is missing"),
    ("heads", lambda p: write(p, "llama", keys={"attention.head_count": [4, 2]}), "must be one positive integer"),
    ("zero layers", lambda p: write(p, "llama", keys={"block_count": 0}), "must be one positive integer"),
    ("width", lambda p: write(p, "llama", keys={"feed_forward_length": 97}), r"misshaped: blk.0.ffn_gate.weight is \[96, 64\]"),
    ("fewer layers", lambda p: write(p, "llama", keys={"block_count": 1}), "unexpected: blk.1.attn_norm.weight"),
    ("more layers", lambda p: write(p, "llama", keys={"block_count": 3}), "missing: model.layers.2"),
    ("frequencies", lambda p: write(p, "llama", tensors={"token_embd.weight": np.zeros((9, 64), np.float32),
                                                         "rope_freqs.weight": np.zeros(5, np.float32)}), "rope_freqs.weight i"),
    ("no embedding", lambda p: write(p, "llama", tensors={"x": np.zeros(5, np.float32)}), "token_embd.weight is missing"),
    ("vocabulary", lambda p: write(p, "llama", keys={"vocab_size": 5}), "token_embd.weight has"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_by_name(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    make(tmp_path / "m.gguf")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        from_gguf(tmp_path / "m.gguf")


# -- tokenizers ---------------------------------------------------------------------------------------------------------------
def tokenizer(path: Path) -> Any:
    return Tokenizer.from_str(from_gguf(path).origin.texts["tokenizer.json"])


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama")
    t = tokenizer(tmp_path / "m.gguf")
    text = "the quick brown fox, naïve 12 日本 🙂\n\n  x<|end|>y<|user|>"
    ids = t.encode(text).ids
    assert t.decode(ids, skip_special_tokens=False) == text
    assert t.decode(ids) == text.replace("<|end|>", "")  # of control: no text
    tokens = [t.id_to_token(i) for i in ids]
    assert "Ġquick" in tokens
    assert tokens.count("<|end|>") == tokens.count("<|user|>") == 1
    assert from_gguf(tmp_path / "m.gguf").interface.generation.eos == (t.token_to_id("<|end|>"),)  # type: ignore[union-attr]


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", tokenizer="llama")
    t = tokenizer(tmp_path / "m.gguf")
    ids = t.encode("the fox runs. é").ids
    assert [t.id_to_token(i) for i in ids] == ["<s>", "▁the", "▁fox", "▁runs", ".", "▁", "<0xC3>", "<0xA9>"]
    assert t.decode(ids) == "the fox runs. é"
    write(tmp_path / "n.gguf", "llama", tokenizer="llama", tokens={"add_bos_token": False, "add_space_prefix": False})
    t = tokenizer(tmp_path / "n.gguf")
    ids = t.encode("the fox").ids
    assert [t.id_to_token(i) for i in ids] == ["t", "h", "e", "▁fox"]
    assert t.decode(ids) == "the fox"


@pytest.mark.parametrize("tokens, message", [
    ({"model": "rwkv"}, "of kind 'rwkv'; there are gpt2, llama"),
    ({"pre": "gpt2"}, "pre is 'gpt2': how it cuts a text is not known"),
    ({"pre": "whatever"}, "pre is 'whatever': how it cuts a text is not known"),
    ({"token_type": [1, 2]}, "token_type has 2 entries"),
    ({"merges": ["a"]}, "no list of pairs"),
    ({"merges": ["z qqqq"]}, "not all of its parts are tokens"),
    ({"eos_token_id": 99999}, "eos_token_id is 99999, and there are"),
    ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "the token 'a' stands twice"),
    ({"add_bos_token": 3}, "expected true or false"),
])  # fmt: skip
def test_tokenizers_that_are_refused(tokens: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", tokens=tokens)
    with pytest.raises(CheckpointError, match=message):
        from_gguf(tmp_path / "m.gguf")


def test_tokens_that_end_an_answer_are_known_by_how_they_are_written(tmp_path: Path) -> None:
    """Files of models that chat often name the end of a text alone, and not that of a turn."""
    names, merges = files.byte_vocabulary()
    names += ["</s>", "<|eot_id|>", "<|end|>"]
    kinds = [1] * (len(names) - 3) + [3, 3, 1]
    tokens = {"tokens": names, "merges": merges, "token_type": kinds, "eos_token_id": len(names) - 3}
    write(tmp_path / "m.gguf", "llama", tokens=tokens, tensors=files.weights("llama", len(names)))
    generation = from_gguf(tmp_path / "m.gguf").interface.generation
    assert generation is not None
    assert generation.eos == (len(names) - 3, len(names) - 2)  # what is a usual word ends nothing


def test_chat_template_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", "llama", keys={"tokenizer.chat_template": "{{ messages }}"})
    assert from_gguf(tmp_path / "m.gguf").origin.texts["chat_template.jinja"] == "{{ messages }}"
