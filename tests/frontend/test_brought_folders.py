"""What people bring with a folder: pointers in place of files, adapters alone, shards without an index, fields said twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
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
