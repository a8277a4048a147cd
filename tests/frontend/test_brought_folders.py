"""What people bring with a folder: pointers in place of files, adapters alone, shards without an index, fields said twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import family_files as families
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import LLAMA, logits, save, tensors
from wasat.frontend import CheckpointError, ConfigError, from_pretrained

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "m", LLAMA, tensors(LLAMA))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_called_one(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name} is only Git LFS's pointer to the file: run git lfs pull there"):
        from_pretrained(folder)


def test_a_gguf_file_that_is_a_pointer(tmp_path: Path) -> None:
    from wasat.frontend.gguf import from_gguf

    (tmp_path / "m.gguf").write_text(POINTER)
    with pytest.raises(CheckpointError, match="is only Git LFS's pointer"):
        from_gguf(tmp_path / "m.gguf")


def test_an_adapter_alone_is_called_one(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"holds an adapter \(LoRA\), and no model: .*merge_and_unload"):
        from_pretrained(folder)


def test_shards_without_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is missing: .*model-00001-of-00001"):
        from_pretrained(folder)


def test_fields_that_are_said_twice_alike(folder: Path) -> None:
    """As folders are that old and new versions of transformers read; and written by editors that begin a file with a mark."""
    ids = np.arange(5)[None]
    scaled = {"type": "linear", "factor": 2.0}
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_scaling": scaled}))
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": LLAMA["rope_theta"]}
    (other / "config.json").write_text("\ufeff" + json.dumps({**LLAMA, "rope_scaling": scaled, "rope_parameters": new}))
    np.testing.assert_array_equal(logits(from_pretrained(folder), ids), logits(from_pretrained(other), ids))
    said = {**LLAMA, "rope_scaling": {**scaled, "factor": 4.0}, "rope_parameters": new}
    (other / "config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="both rope_parameters and rope_scaling are given"):
        from_pretrained(other)


def seeing(path: Path, family: str, kind: str, newer: bool) -> tuple[Path, Path]:
    """A folder of a text model, and one of a model that sees whose language model it is."""
    given, shapes, _, _ = families.golden(family)
    alone = families.write(path / "alone", given, shapes)
    text = {k: v for k, v in given.items() if k not in ("architectures", "transformers_version")}
    if kind == "llama4":  # as Scout says it
        text |= {"attn_temperature_tuning": 4, "for_llm_compressor": False}
    both = families.write(path / "both", {
        "model_type": kind, "architectures": ["SomeForConditionalGeneration"], "text_config": text, "image_token_index": 7,
        "vision_config": {"model_type": "some_vision", "hidden_size": 8}, "eos_token_id": [5, 6],
    }, {})  # fmt: skip
    found = {}
    for name, x in load_file(alone / "model.safetensors").items():
        inner = name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1)
        found[inner if newer else f"language_model.{name}"] = x
    start = "model." if newer else ""
    sees = {f"{start}{part}.w": np.ones(3, np.float32) for part in ("vision_tower", "multi_modal_projector")}
    save_file(found | sees, both / "model.safetensors")
    return alone, both


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("family, kind", [("llama4_text", "llama4"), ("mistral_text", "mistral3")])
def test_the_language_model_of_one_that_sees(family: str, kind: str, newer: bool, tmp_path: Path) -> None:
    alone, both = seeing(tmp_path, "llama_plain" if kind == "mistral3" else family, kind, newer)
    if kind == "mistral3":
        for folder, place in ((alone, ()), (both, ("text_config",))):
            config = json.loads((folder / "config.json").read_text())
            inner = config[place[0]] if place else config
            inner |= {"model_type": "mistral", "architectures": None, "sliding_window": None}
            inner.pop("mlp_bias", None), inner.pop("attention_bias", None), inner.pop("pretraining_tp", None)
            (folder / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(1).integers(0, 48, (2, 9))
    a, b = from_pretrained(alone), from_pretrained(both)
    assert a.params.keys() == b.params.keys()
    np.testing.assert_array_equal(logits(a, ids), logits(b, ids))
    assert b.interface.generation is not None
    assert b.interface.generation.eos == (5, 6)


def test_gemma_3_says_little_of_its_text(tmp_path: Path) -> None:
    """As the folder of 4B does: the rest are the family's defaults."""
    from wasat.frontend.huggingface import from_config

    text = {
        "hidden_size": 64, "intermediate_size": 48, "model_type": "gemma3_text", "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "vocab_size": 40,
    }  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = from_config(tmp_path / "config.json")
    shapes = {k: v.type.shape for k, v in program["forward"].params.items() if ".0." in k or "layers" not in k}
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (1024, 64)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (256,)
    assert program.interface.context == 131072


def test_a_model_that_sees_and_says_nothing_of_its_text(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "vision_config": {}}))
    with pytest.raises(ConfigError, match="text_config, which describes its language model, is missing"):
        from_pretrained(folder)


def test_a_rotation_without_a_passage() -> None:
    """As Llama 4 Scout has it: long waves divided, short ones kept, and nothing between."""
    from wasat.frontend import nn

    scaling = {
        "rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    plain, found = nn.RoPE(16, 500.0).inv_freq, nn.RoPE(16, 500.0, scaling).inv_freq
    np.testing.assert_allclose(found, np.where(2 * np.pi / plain > 64, plain / 16, plain), rtol=1e-6)
