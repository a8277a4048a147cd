"""Chat templates as Hugging Face folders keep them, and the tokens that they name: texts for an artifact."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from wasat.ir import CheckpointError

from .weights.safetensors import read_json

_NAME = re.compile(r"[\w-]{1,100}\Z")


def chat_texts(folder: Path) -> dict[str, str]:
    """``chat_template.jinja``, ``chat_template.NAME.jinja`` for others than the default, and ``chat_tokens.json``: of a folder
    with ``chat_template.jinja``, ``additional_chat_templates/``, a ``chat_template`` in ``tokenizer_config.json`` (one, or a
    list of them by name), or ``chat_template.json``; of these, the first that there is. Empty for a folder without templates.

    Raises CheckpointError for files that hold something else.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    found = _files(folder)
    if not found:
        found = _named(path, config.get("chat_template"))
    if not found and (other := folder / "chat_template.json").exists():
        found = _named(other, read_json(other).get("chat_template"))
    tokens = _tokens(folder / "special_tokens_map.json") | _of(config)
    return template_texts(folder, found, tokens)


def template_texts(where: Path, templates: dict[str, str], tokens: dict[str, str]) -> dict[str, str]:
    """Files for an artifact: templates by name, and the tokens; nothing without templates."""
    for name in templates:
        if not _NAME.match(name):
            raise CheckpointError(f"{where}: a chat template is called {name!r}: letters, digits, - and _ make a name")
    texts = {"chat_template.jinja" if n == "default" else f"chat_template.{n}.jinja": t for n, t in templates.items()}
    return {**texts, "chat_tokens.json": json.dumps(tokens, ensure_ascii=False)} if texts else {}


def _files(folder: Path) -> dict[str, str]:
    paths = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").exists():
        paths["default"] = single
    try:
        return {name: p.read_text(encoding="utf-8") for name, p in paths.items()}
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{folder}: a chat template cannot be read: {e}") from None


def _named(path: Path, given: Any) -> dict[str, str]:
    """One template, or a list of such by name."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list) and all(isinstance(x, dict) for x in given):
        found = {x.get("name"): x.get("template") for x in given}
        if len(found) == len(given) and all(isinstance(k, str) and isinstance(v, str) for k, v in found.items()):
            return found
    raise CheckpointError(f"{path}: chat_template is neither a text nor a list of templates with a name each")


def _tokens(path: Path) -> dict[str, str]:
    return _of(read_json(path)) if path.exists() else {}


def _of(config: dict[str, Any]) -> dict[str, str]:
    """Tokens by their names, ``bos_token``; each a text, or an object that holds it."""
    extra = config.get("extra_special_tokens")
    given = {**config, **(extra if isinstance(extra, dict) else {})}
    found = {k: v.get("content") if isinstance(v, dict) else v for k, v in given.items() if k.endswith("_token")}
    return {k: v for k, v in found.items() if isinstance(v, str)}
