"""GGUF files of models that embed texts or score pairs: equal to the Hugging Face folder of the same model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf: Any = pytest.importorskip("gguf")

import gguf_files as files
from rounding import assert_near, bound, spread
from safetensors.numpy import load_file
from test_authors_folders import JINA, jina
from wasat.frontend import CheckpointError, ConfigError, from_pretrained
from wasat.frontend.gguf import from_gguf
from wasat.ir import Program, evaluate

GOLDEN = Path(__file__).parents[1] / "golden" / "sentence"
ENCODER = {"attention.causal": False, "attention.layer_norm_epsilon": 1e-12, "pooling_type": 1}
MODERN = {
    **ENCODER, "attention.layer_norm_epsilon": 1e-5, "attention.sliding_window": 6, "rope.freq_base": 160000.0,
    "rope.freq_base_swa": 10000.0, "rope.scaling.type": "none", "pooling_type": 2,
}  # fmt: skip
ROBERTA = {**ENCODER, "attention.layer_norm_epsilon": 1e-5, "pooling_type": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_mean": ("bert", ENCODER),
    "xlmr_cls": ("bert", ROBERTA),
    "xlmr_score": ("bert", {**ROBERTA, "pooling_type": 4}),
    "roberta_score": ("bert", {**ENCODER, "pooling_type": 4}),
    "modernbert_cls": ("modern-bert", MODERN),
    "nomic_mean": ("nomic-bert", {**ENCODER, "rope.freq_base": 1000.0}),
    "jina_mean": ("jina-bert-v3", {**ENCODER, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 5000.0}),
    "eurobert_mean": ("eurobert", {
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.causal": False, "rope.freq_base": 5000.0, "pooling_type": 1,
        "rope.scaling.type": "none",
    }),
    "embeddinggemma": ("gemma-embedding", {
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.causal": False, "pooling_type": 1, "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, False, True], "rope.freq_base": 1e6,
    }),
    "qwen3_last": ("qwen3", {"attention.layer_norm_rms_epsilon": 1e-6, "pooling_type": 3}),
}  # fmt: skip
"""Folder -> GGUF's architecture and keys."""
_OF_NO_TENSOR = re.compile(r"pooler\.|.*(position_ids|inv_freq)$")


def tensors(folder: Path, arch: str, layers: int) -> dict[str, np.ndarray]:
    """A folder's tensors as llama.cpp's converter would write them, named by the gguf package."""
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), layers)
    found = {}
    for name, x in load_file(folder / "model.safetensors").items():
        name = re.sub(r"^(bert|roberta|distilbert)\.", "", name)
        if _OF_NO_TENSOR.match(name):
            continue
        if arch in ("gemma-embedding", "qwen3") and not name.startswith("model."):
            name = f"model.{name}"
        if name.endswith("position_embeddings.weight") and folder.name.startswith(("xlmr", "roberta")):
            x = x[2:]
        if arch == "gemma-embedding" and "norm" in name:
            x = x + 1
        if arch == "llama-embed" and "self_attn" in name and ("q_proj" in name or "k_proj" in name):
            x = np.ascontiguousarray(x.reshape(-1, 2, 4, x.shape[-1]).swapaxes(1, 2)).reshape(x.shape)
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = x
    for i, part in enumerate(sorted(folder.glob("?_Dense"))):
        found[f"dense_{i + 2}.weight"] = load_file(part / "model.safetensors")["linear.weight"]
    return found


def written(case: str, path: Path, arch: str = "", **more: Any) -> Path:
    folder, (usual, keys) = GOLDEN / case, CASES[case]
    arch = arch or usual
    config = json.loads((folder / "config.json").read_text())
    found = tensors(folder, arch, config["num_hidden_layers"])
    names = [*files.byte_vocabulary()[0][:89], "AB"]
    given = {
        "block_count": config["num_hidden_layers"], "embedding_length": 32, "feed_forward_length": config["intermediate_size"],
        "context_length": config["max_position_embeddings"] - (2 if case.startswith(("xlmr", "roberta")) else 0),
        "attention.head_count": 4, "attention.head_count_kv": config.get("num_key_value_heads"),
        "attention.key_length": config.get("head_dim"), **keys, **more,
    }  # fmt: skip
    tokens = {
        "tokens": names, "merges": ["A B"], "token_type": [1] * 90, "eos_token_id": 1,
        "padding_token_id": 0, "pre": "default",
    }  # fmt: skip
    kept = {k: v for k, v in given.items() if v is not None}
    absent = tuple(k for k in ("attention.layer_norm_rms_epsilon", "attention.head_count_kv", "attention.key_length",
                               "attention.value_length") if k not in kept)  # fmt: skip
    if "attention.key_length" in kept:
        kept["attention.value_length"] = kept["attention.key_length"]
    files.write(path / "m.gguf", arch, keys=kept, tokens=tokens, tensors=found, without=absent)
    return path / "m.gguf"


def result(program: Program, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """And how far rounding moves each element."""
    assert program.interface.embedder is not None
    graph = program[program.interface.embedder.entry]
    params = {k: p.load() for k, p in program.params.items()}
    return evaluate(graph, inputs, params)[0], spread(graph, inputs, params)[0]


@pytest.mark.parametrize("case", CASES)
def test_as_the_folder(case: str, tmp_path: Path) -> None:
    program = from_gguf(written(case, tmp_path))
    program.verify()
    golden = dict(np.load(GOLDEN / case / "golden.npz"))
    wanted = golden.pop("wanted")
    found, moved = result(program, **golden)
    assert wanted.std() > 0.01
    assert_near(found, wanted, bound(wanted, moved))
    embedder = program.interface.embedder
    assert embedder is not None
    assert embedder.pairs == case.endswith("score")
    assert "tokenizer.json" in program.origin.texts


@pytest.mark.parametrize("case, keys, message", [
    ("bert_mean", {"pooling_type": 9}, "pooling_type is 9; there are 0"),
    ("bert_mean", {"attention.causal": True}, "attention.causal is True: this architecture sees the whole text"),
    ("bert_mean", {"pooling_type": 4}, "it scores pairs by a head that is not read"),
    ("bert_mean", {"rope.freq_base": 1e4}, "rope.freq_base"),
    ("bert_mean", {"attention.head_count_kv": 2}, "attention.head_count_kv is 2"),
    ("nomic_mean", {"rope.scaling.type": "wavelets"}, "rope.scaling.type is 'wavelets'"),
    ("nomic_mean", {"moe_every_n_layers": 2}, "experts are not read of this architecture"),
    ("nomic_mean", {"rope.dimension_count": 4}, "all of them are rotated"),
    ("modernbert_cls", {"attention.sliding_window_pattern": 0}, "sliding_window_pattern is 0; a period"),
    ("modernbert_cls", {"rope.scaling.type": "yarn"}, "only rotation as trained"),
    ("qwen3_last", {"attention.causal": False}, "only models that look back"),
])  # fmt: skip
def test_refused_by_name(case: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message):
        from_gguf(written(case, tmp_path, **keys))


def test_llama_that_embeds(tmp_path: Path) -> None:
    """Is EuroBERT with queries and keys in the order of neighbouring pairs."""
    program = from_gguf(written("eurobert_mean", tmp_path, arch="llama-embed"))
    golden = dict(np.load(GOLDEN / "eurobert_mean" / "golden.npz"))
    wanted = golden.pop("wanted")
    found, moved = result(program, **golden)
    assert_near(found, wanted, bound(wanted, moved))


@pytest.mark.parametrize("apart", [False, True], ids=["one matrix", "a gate apart"])
def test_jina_2(apart: bool, tmp_path: Path) -> None:
    """As its folder, which tests/frontend/test_authors_folders.py holds beside the published computation."""
    folder, given = jina(tmp_path / "m", JINA)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.JINA_BERT_V2, 2)
    whole = dict[str, np.ndarray]()
    for name, x in given.items():
        both = zip("wv", np.split(x, 2)) if apart and "gated_layers" in name else [("", x)]
        for part, y in both:
            known = name.replace("gated_layers", f"gated_layers_{part}") if part else name
            whole[names.get_name(known, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(y)
    assert ("blk.1.ffn_gate.weight" in whole) == apart
    keys = {
        "block_count": 2, "embedding_length": 24, "feed_forward_length": 20, "context_length": 64, "attention.head_count": 6,
        **ENCODER,
    }  # fmt: skip
    absent = tuple(f"attention.{k}" for k in ("layer_norm_rms_epsilon", "head_count_kv", "key_length", "value_length"))
    tokens = {
        "tokens": [*files.byte_vocabulary()[0][:49], '!"'], "merges": ['! "'], "token_type": [1] * 50, "eos_token_id": 1,
        "padding_token_id": 0, "pre": "jina-v2-de",
    }  # fmt: skip
    files.write(tmp_path / "m.gguf", "jina-bert-v2", keys=keys, tokens=tokens, tensors=whole, without=absent)
    ids, lengths = np.random.default_rng(1).integers(1, 50, (3, 17)), np.array([17, 4, 9])
    wanted, _ = result(from_pretrained(folder), tokens=ids, lengths=lengths)
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True)
    found, _ = result(from_gguf(tmp_path / "m.gguf"), tokens=ids, lengths=lengths)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_pooling_by_default(tmp_path: Path) -> None:
    """An encoder embeds by the mean of its tokens, a decoder writes texts."""
    program = from_gguf(written("bert_mean", tmp_path, pooling_type=0))
    golden = dict(np.load(GOLDEN / "bert_mean" / "golden.npz"))
    wanted = golden.pop("wanted")
    found, moved = result(program, **golden)
    assert_near(found, wanted, bound(wanted, moved))
    assert list(from_gguf(written("qwen3_last", tmp_path, pooling_type=0)).graphs) == ["forward"]
