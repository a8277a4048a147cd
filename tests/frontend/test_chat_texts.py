"""Chat templates of Hugging Face folders: where they are found, what they are called, which tokens they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wasat.frontend import CheckpointError
from wasat.frontend.chat import chat_texts


def folder(path: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CONFIG = {
    "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True, "pad_token": None,
    "extra_special_tokens": {"image_token": "<img>"}, "model_max_length": 7,
}  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<img>"}
TWO = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize("files, want", [
    ({"tokenizer_config.json": {**CONFIG, "chat_template": "D"}}, {"chat_template.jinja": "D"}),
    ({"tokenizer_config.json": {**CONFIG, "chat_template": TWO}},
     {"chat_template.jinja": "D", "chat_template.tool_use.jinja": "T"}),
    ({"tokenizer_config.json": CONFIG, "chat_template.jinja": "D\n"}, {"chat_template.jinja": "D\n"}),
    ({"tokenizer_config.json": {**CONFIG, "chat_template": TWO}, "chat_template.jinja": "J"}, {"chat_template.jinja": "J"}),
    ({"tokenizer_config.json": CONFIG, "chat_template.jinja": "J", "additional_chat_templates/rag.jinja": "R"},
     {"chat_template.jinja": "J", "chat_template.rag.jinja": "R"}),
    ({"tokenizer_config.json": CONFIG, "chat_template.json": {"chat_template": "P"}}, {"chat_template.jinja": "P"}),
    ({"tokenizer_config.json": {**CONFIG, "chat_template": "D"}, "chat_template.json": {"chat_template": "P"}},
     {"chat_template.jinja": "D"}),
    ({"special_tokens_map.json": {"bos_token": "<old>", "eos_token": "</s>"}, "chat_template.jinja": "J",
      "tokenizer_config.json": {"bos_token": "<s>", "extra_special_tokens": {"image_token": "<img>"}}},
     {"chat_template.jinja": "J"}),
])  # fmt: skip
def test_templates_are_found(tmp_path: Path, files: dict[str, Any], want: dict[str, str]) -> None:
    found = chat_texts(folder(tmp_path, files))
    assert json.loads(found.pop("chat_tokens.json")) == TOKENS
    assert found == want


def test_a_folder_without(tmp_path: Path) -> None:
    assert chat_texts(folder(tmp_path, {"tokenizer_config.json": CONFIG})) == {}
    assert chat_texts(folder(tmp_path, {"tokenizer_config.json": {**CONFIG, "chat_template": None}})) == {}


@pytest.mark.parametrize("given", [1, {"a": "b"}, ["D"], [{"name": "default"}], [{"name": 1, "template": "D"}], TWO[:1] * 2])
def test_what_is_no_template(tmp_path: Path, given: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is neither a text nor a list"):
        chat_texts(folder(tmp_path, {"tokenizer_config.json": {"chat_template": given}}))


def test_names_become_files(tmp_path: Path) -> None:
    given = [{"name": "../x", "template": "D"}]
    with pytest.raises(CheckpointError, match=r"a chat template is called '\.\./x'"):
        chat_texts(folder(tmp_path, {"tokenizer_config.json": {"chat_template": given}}))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="a chat template cannot be read"):
        chat_texts(tmp_path)
